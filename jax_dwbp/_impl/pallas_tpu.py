"""A Pallas kernel for TPUs: sums over taps on the vector unit, which no matrix unit can speed up.

A TPU tiles the two minor axes of an array, (8, 128) elements a register. XLA keeps the activations
of a convolution with N and C there, so that H and W are merely indices: taps, strides and dilation
cost nothing, and a transposition to the same axes around the kernel is a change of names, not a
copy. For small batches W and C are the tiled ones (`_views`).

Forward and input_grad sum the taps of each phase of `taps.axes`, and filter_grad sums products with
dy for each tap. The source is read in place, each row and column once for all results of a piece
(`_reader`), and no padded array is made: what meets a border is computed outside of the loops,
where the taps that meet nothing are left out. Where W is tiled, for a multiplier and for many taps,
a step of the grid copies its rows of the source to a float32 scratch with zeros around (`_fill`).

A multiplier makes lanes: x is repeated M times as it is copied, or the M lanes of each channel
are summed before they are stored, both by gathers along lanes.
"""

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_dwbp._impl import interpreted
from jax_dwbp._impl.taps import Axis, Tap, axes
from jax_dwbp._spec import ConvSpec, Op

_LANES, _SUBLANES = 128, 8
# Bytes of VMEM that a program may take. Blocks of 1 to 4 MB keep the DMAs busy; what needs more
# than the first may have the second, which every TPU since v5e has.
_VMEM = (20 << 20, 56 << 20)
_SPARE = 6 << 20  # for what the compiler adds
# Registers of the result that the body of a loop computes: enough to hide the latencies, as the
# compiler does not pipeline loops. Its accumulators are those of a few rows at a time. Times the
# taps that makes a limit of instructions, or else there are few to compile.
_REGISTERS = 56
_PRODUCTS = 1600
# Registers that a body of a loop copies.
_COPIED = 256
# Taps of a phase beyond which the rows of the filter are looped over; its columns never are.
_UNROLLED = 64
# Gathers that sum the lanes of each channel beyond which a loop makes them, a lane at a time.
_GATHERED = 64
# Pieces of an axis outside of its loop.
_PEELED = 3
_MAX_COLUMNS = 128
# A stride of 16 x 16 has 256 phases, whose results a body computes one after the other.
_MAX_PHASES = 256
_MAX_CHUNKS = 32


def unsupported(
    op: Op,
    spec: ConvSpec,
    platform: str | None,
    a: jax.ShapeDtypeStruct,
    b: jax.ShapeDtypeStruct,
) -> str | None:
    if a.dtype not in (jnp.float32, jnp.bfloat16):
        return f"a TPU computes in float32 and bfloat16, got {a.dtype}"
    if spec.kernel_spatial[1] > _MAX_COLUMNS:
        return f"filters may have at most {_MAX_COLUMNS} columns, got {spec.kernel_spatial[1]}"
    if op == "input_grad" and math.prod(spec.window_strides) > _MAX_PHASES:
        return f"strides may have a product of at most {_MAX_PHASES}, got {spec.window_strides}"
    lanes = min(spec.channels, _LANES) * spec.multiplier
    if lanes > _MAX_CHUNKS * _LANES:
        return (
            f"{_LANES} channels, or all, may have at most {_MAX_CHUNKS * _LANES} outputs, got "
            f"{lanes} by a depth multiplier of {spec.multiplier}"
        )
    if _plan(op, spec, _batch(op, a, b), a.dtype) is None:
        return f"what a row of the result takes must fit {_VMEM[-1]} bytes of VMEM"
    return None


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    return _sum_taps("forward", spec, x, f)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    return _sum_taps("input_grad", spec, dy, f)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    plan = _plan_of("filter_grad", spec, x)
    shape = (x.shape[0], *plan.filter_shape)
    if not plan.taps:
        return plan.from_lanes(jnp.zeros(shape, x.dtype))
    df = _call(
        plan,
        _filter_grad_kernel,
        {"x": (plan.to_view(x), plan.source_spec), "dy": (plan.to_view(dy), plan.result_spec)},
        jax.ShapeDtypeStruct(shape, jnp.float32),
        plan.filter_spec,
    )
    return plan.from_lanes(df).astype(x.dtype)


def _sum_taps(op: Op, spec: ConvSpec, source: jax.Array, f: jax.Array) -> jax.Array:
    plan = _plan_of(op, spec, source)
    height, width = spec.out_spatial if op == "forward" else spec.in_spatial
    channels = spec.channels * (spec.multiplier if op == "forward" else 1)
    sizes = dict(zip("gnhwc", (*source.shape[:2], height, width, channels), strict=True))
    shape = tuple(sizes[axis] for axis in plan.view)
    if not plan.taps:
        return plan.from_view(jnp.zeros(shape, source.dtype))
    result = _call(
        plan,
        _sum_taps_kernel,
        {
            "source": (plan.to_view(source), plan.source_spec),
            "f": (plan.to_lanes(f), plan.filter_spec),
        },
        jax.ShapeDtypeStruct(shape, source.dtype),
        plan.result_spec,
    )
    return plan.from_view(result)


# ---- The plan: which axes are tiled, what a step of the grid computes and what that takes.


class _Piece(NamedTuple):
    """Positions of a tile, from a start that may be traced."""

    start: Any
    count: int
    inside: bool  # are they, and all that the taps meet, known to be there?


class _Window(NamedTuple):
    """How a spatial axis is cut. Tile t has the positions t*tile, ... of each phase of the result.

    Its scratch holds the source rows from step*tile*t - border on, zero where there are none.
    """

    axis: Axis
    tile: int
    border: int
    scratch: int

    @property
    def tiles(self) -> int:
        return -(-self.axis.count // self.tile)

    @property
    def source(self) -> int:
        """Rows of the source in a block."""
        return min(self.axis.source, self.scratch) if self.tiles > 1 else self.axis.source

    @property
    def result(self) -> int:
        """Rows of the result in a block, whole phases: what is beyond the last row is dropped."""
        return self.tile * len(self.axis.phases)

    @property
    def last(self) -> int:
        """The positions that there are in the last tile."""
        return self.axis.count - self.tile * (self.tiles - 1)

    def exist(self, piece: _Piece) -> bool:
        """Are all positions of a piece known to be there in every tile?"""
        known = isinstance(piece.start, int) and piece.start + piece.count <= self.last
        return piece.inside or self.last == self.tile or known

    @property
    def copied(self) -> tuple[int, int]:
        """The rows of the scratch that are copied, of those that are not cut."""
        first = min(max(self.border, 0), self.scratch)
        return first, max(first, min(self.border + self.axis.source, self.scratch))

    @property
    def read(self) -> tuple[int, int]:
        """The rows of the scratch that a tap meets."""
        low, high = _reach(self.axis)
        span = self.axis.step * (self.tile - 1) + 1
        return max(0, self.border + low), self.border + high + span

    @property
    def moved(self) -> tuple[int, int]:
        """Rows that are read and written, and positions that are not there."""
        return self.tiles * (self.source + self.result), self.tile - self.last

    def start(self, t):
        """The first row of the source in the block of tile t."""
        if self.tiles == 1:
            return 0
        first = self.axis.step * self.tile * t - self.border
        return jnp.clip(first, 0, self.axis.source - self.source)

    def shift(self, t):
        """The row of the block at position 0."""
        return 0 if self.tiles == 1 else self.axis.step * self.tile * t - self.start(t)

    def position(self, piece: _Piece, offset) -> Any:
        """Of the row that is `offset` from what the piece starts at, from the tile's first on."""
        return self.axis.step * piece.start + offset

    def outside(self, position) -> bool:
        """Is it known that there is no such row?"""
        known = self.tiles == 1 and isinstance(position, int)
        return known and not 0 <= position < self.axis.source

    def within(self, t, position, inside: bool) -> tuple[Any, Any]:
        """The row of the block at a position, and whether it is one."""
        row = position + self.shift(t)
        if inside or (self.tiles == 1 and isinstance(position, int)):
            return row, True
        return jnp.clip(row, 0, self.source - 1), (row >= 0) & (row < self.source)

    def pieces(self, size: int, peels: bool) -> tuple[list[_Piece], list[_Piece], list[_Piece]]:
        """Pieces of `size` positions: those before, in and after a loop.

        If it `peels`, what meets a border is outside of the loop, unless that is too much.
        """
        before, after = _reach(self.axis)
        step, last_tile = self.axis.step, self.tile * (self.tiles - 1)

        def piece(start: int) -> _Piece:
            count = min(size, self.tile - start)
            low, high = step * start + before, step * (last_tile + start + count - 1) + after
            inside = 0 <= low and high < self.axis.source
            exist = self.exist(_Piece(start, count, False))
            return _Piece(start, count, inside and exist)

        pieces = [piece(start) for start in range(0, self.tile, size)]
        looped = [p for p in pieces if p.inside and p.count == size]
        if not peels or len(pieces) - len(looped) > _PEELED:
            pieces = [p._replace(inside=False) for p in pieces]
            looped = [p for p in pieces if p.count == size]
        if len(looped) < 2:
            return pieces, [], []
        first, last = pieces.index(looped[0]), pieces.index(looped[-1]) + 1
        return pieces[:first], looped, pieces[last:]

    def each(self, size: int, peels: bool, body: Callable[[_Piece, Any], Any], carry):
        """carry = body(piece, carry) for each of the pieces."""
        before, looped, after = self.pieces(size, peels)
        for piece in before:
            carry = body(piece, carry)
        if looped:
            first = looped[0]

            def step(i, carry):
                start = pl.multiple_of(first.start + i * size, size)
                return body(first._replace(start=start), carry)

            carry = lax.fori_loop(0, len(looped), step, carry)
        for piece in after:
            carry = body(piece, carry)
        return carry


def _window(axis: Axis, tiles: int, unit: int) -> _Window:
    low, high = _reach(axis)
    tile = -(-axis.count // tiles)
    border = -(low // unit * unit)
    # Columns are computed `unit` at a time, and those beyond the last one read what is there.
    span = axis.step * (-(-tile // unit) * unit - 1) + 1
    rows = high + border + span
    return _Window(axis, tile, border, -(-rows // unit) * unit)


def _reach(axis: Axis) -> tuple[int, int]:
    """The least and the greatest offset: those of a phase rise or fall."""
    ends = [tap.offset for taps in axis.phases for tap in (*taps[:1], *taps[-1:])]
    return min(ends, default=0), max(ends, default=0)


class _Plan(NamedTuple):
    op: Op
    spec: ConvSpec
    view: str  # the order of the axes g (of problems), n, h, w and c: the last two are tiled
    rows: _Window
    columns: _Window
    batch: int
    dtype: jnp.dtype

    @property
    def taps(self) -> bool:
        """Does any tap meet the source?"""
        return all(any(window.axis.phases) for window in (self.rows, self.columns))

    @property
    def loops(self) -> bool:
        """Over the rows of the filter."""
        rows, columns = (max(map(len, w.axis.phases)) for w in (self.rows, self.columns))
        return rows > 1 and rows * columns > _UNROLLED

    @property
    def copies(self) -> bool:
        """Is the source read from a copy? Else every row and column is one of registers."""
        return self.view[-2] == "w" or self.spec.multiplier > 1 or self.loops

    @property
    def bordered(self) -> bool:
        """Are rows of the copy read that are beyond the source?"""
        _, looped, _ = self.rows.pieces(self.accumulators[0], peels=True)
        inside = self.rows.tiles == 1 and all(piece.inside for piece in looped)
        return self.loops or not inside

    @property
    def block(self) -> dict[str, int]:
        """The elements of the axes c, of the narrow side, and n in a block."""
        minor = {self.view[-1]: _LANES, self.view[-2]: _sublanes(self.dtype)}
        sizes = {"n": self.batch, "c": self.spec.channels}
        return {d: min(minor.get(d, 1), size) for d, size in sizes.items()}

    @property
    def chunks(self) -> int:
        """Registers that the lanes of a block of channels take side by side."""
        return _ceil(self.block["c"] * self.spec.multiplier, _LANES) if self.view[-1] == "c" else 1

    @property
    def tile(self) -> tuple[int, ...]:
        """The minor axes of the scratch that are not indices: (sublanes, lanes) or (lanes,)."""
        lanes = _LANES if self.copies else self.block[self.view[-1]]
        return (lanes,) if self.view[-2] == "w" else (self.block[self.view[-2]], lanes)

    @property
    def grid(self) -> dict[str, int]:
        return {
            "c": _ceil(self.spec.channels, self.block["c"]),
            "n": _ceil(self.batch, self.block["n"]),
            "h": self.rows.tiles,
            "w": self.columns.tiles,
        }

    # The filter: its taps are sublanes, and the lanes of each block of channels whole registers.
    # Where the lanes are images a weight has to be all of them.

    @property
    def filter_shape(self) -> tuple[int, ...]:
        r, s = self.spec.kernel_spatial
        if self.view[-1] == "n":
            return r, s, self.spec.channels, _LANES
        return r * s, self.grid["c"] * self.chunks * _LANES

    def to_lanes(self, f: jax.Array) -> jax.Array:
        """[G,R,S,C,M] as the kernels read it, [G,*filter_shape] in float32."""
        f = f.astype(jnp.float32)
        if self.view[-1] == "n":
            return jnp.broadcast_to(f, (f.shape[0], *self.filter_shape))
        taps, lanes = self.filter_shape
        wide = f.reshape(f.shape[0], taps, f.shape[3] * f.shape[4])
        return jnp.pad(wide, ((0, 0), (0, 0), (0, lanes - wide.shape[2])))

    def from_lanes(self, f: jax.Array) -> jax.Array:
        if self.view[-1] == "n":
            return jnp.sum(f, 4, keepdims=True)
        shape = *self.spec.kernel_spatial, self.spec.channels, self.spec.multiplier
        return f[..., : shape[2] * shape[3]].reshape(f.shape[0], *shape)

    def tap(self, k, j: int, lanes: slice) -> tuple[Any, ...]:
        """Where the weights of a tap are in the block of a filter, [channels or 1, lanes]."""
        if self.view[-1] == "n":
            return 0, k, j, slice(None), lanes
        return 0, pl.ds(k * self.spec.kernel_spatial[1] + j, 1), lanes

    def to_view(self, a: jax.Array) -> jax.Array:
        return a.transpose(["gnhwc".index(d) for d in self.view])

    def from_view(self, a: jax.Array) -> jax.Array:
        return a.transpose([self.view.index(d) for d in "gnhwc"])

    def _lanes(self, wide: bool) -> int:
        return self.block["c"] * (self.spec.multiplier if wide else 1)

    @property
    def source_spec(self) -> pl.BlockSpec:
        sizes = {
            "g": 1,
            "n": self.block["n"],
            "h": self.rows.source,
            "w": self.columns.source,
            "c": self._lanes(self.op == "input_grad"),
        }
        if self.rows.tiles == self.columns.tiles == 1:
            return self._spec(sizes)
        totals = {"n": self.batch, "c": self.spec.channels * (sizes["c"] // self.block["c"])}
        shape = [
            pl.Element(sizes[d], (0, -totals[d] % sizes[d]) if d in totals else (0, 0))
            for d in self.view
        ]

        def index(g, c, n, h, w):
            starts = {
                "g": g,
                # A start that is a product must be one of whole tiles.
                "n": n * sizes["n"] if self.grid["n"] > 1 else 0,
                "h": self.rows.start(h),
                "w": self.columns.start(w),
                "c": c * sizes["c"] if self.grid["c"] > 1 else 0,
            }
            return tuple(starts[d] for d in self.view)

        return pl.BlockSpec(shape, index)

    @property
    def result_spec(self) -> pl.BlockSpec:
        """Of the result, and of dy in filter_grad."""
        unit = _sublanes(self.dtype) if self.view[-2] == "w" else 1
        return self._spec(
            {
                "g": 1,
                "n": self.block["n"],
                "h": self.rows.result,
                "w": _ceil(self.columns.result, unit) * unit,
                "c": self._lanes(self.op != "input_grad"),
            }
        )

    def _spec(self, sizes: dict[str, int]) -> pl.BlockSpec:
        def index(*ids):
            at = dict(zip("gcnhw", ids, strict=True))
            return tuple(at[d] for d in self.view)

        return pl.BlockSpec([sizes[d] for d in self.view], index)

    @property
    def filter_spec(self) -> pl.BlockSpec:
        if self.view[-1] == "n":
            r, s = self.spec.kernel_spatial
            block = (1, r, s, self.block["c"], _LANES)
            return pl.BlockSpec(block, lambda g, c, n, h, w: (g, 0, 0, c, 0))
        block = (1, self.filter_shape[0], self.chunks * _LANES)
        return pl.BlockSpec(block, lambda g, c, n, h, w: (g, 0, c))

    @property
    def scratch(self) -> tuple[int, ...]:
        return (self.chunks, self.rows.scratch, self.columns.scratch, *self.tile)

    @property
    def unit(self) -> tuple[int, int]:
        """The fewest columns that fill registers, and how many those are."""
        if self.view[-2] == "w":
            return _SUBLANES, 1
        return 1, _ceil(self.tile[0], _SUBLANES)

    @property
    def accumulators(self) -> tuple[int, int]:
        """Rows and columns, of a phase, that are computed at a time."""
        unit, registers = self.unit
        registers *= len(self.columns.axis.phases) * self.chunks
        # Where W is tiled few columns of more rows spill less.
        most = 8 if unit == 1 else 2
        columns = _piece(_ceil(self.columns.tile, unit), max(1, most // registers))
        if unit > 1 and columns > 1:
            columns += columns % 2  # bfloat16 packs two to a register
        r, s = self.spec.kernel_spatial
        taps = s if self.loops else r * s
        most = min(_REGISTERS, _PRODUCTS // taps) // (columns * registers)
        # Interpreted, a CPU compiles them, which takes it seconds for what a TPU does in one.
        return _piece(self.rows.tile, 2 if interpreted() else max(1, most)), columns * unit

    @property
    def bytes(self) -> int:
        """The VMEM that it takes: blocks twice, as the next are copied while these are computed."""
        arrays = (self.source_spec, self.dtype), (self.result_spec, self.dtype)
        arrays += ((self.filter_spec, jnp.dtype("float32")),)
        blocks = sum(_padded(spec.block_shape, dtype) for spec, dtype in arrays)
        scratch = _padded(self.scratch, jnp.dtype("float32")) if self.copies else 0
        return 2 * blocks + scratch


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _piece(total: int, most: int) -> int:
    """The size of at most `most` of even pieces of `total`, or else of nearly even ones."""
    divisors = [size for size in range(most // 2 + 1, most + 1) if total % size == 0]
    return max(divisors, default=_ceil(total, _ceil(total, most)))


def _sublanes(dtype) -> int:
    return _SUBLANES * 4 // dtype.itemsize


def _padded(shape: Any, dtype) -> int:
    """The bytes of an array with whole tiles."""
    *major, sublanes, lanes = (d.block_size if isinstance(d, pl.Element) else d for d in shape)
    tiles = _ceil(sublanes, _sublanes(dtype)) * _ceil(lanes, _LANES)
    return math.prod(major) * tiles * _SUBLANES * _LANES * 4


def _batch(op: Op, a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct) -> int:
    return (b if op == "input_grad" else a).shape[1]


def _plan_of(op: Op, spec: ConvSpec, source: jax.Array) -> _Plan:
    plan = _plan(op, spec, source.shape[1], source.dtype)
    if plan is None:
        raise NotImplementedError("`unsupported` says why")
    return plan


@functools.lru_cache
def _plan(op: Op, spec: ConvSpec, batch: int, dtype) -> _Plan | None:
    """The one with the fewest tiles of columns that fits, and which moves the least of rows."""
    if 2 * math.prod(spec.kernel_spatial) * _LANES * 4 > _VMEM[-1]:
        return None  # for the filter alone, of which all taps are to be listed
    for limit in _VMEM:
        for plans in _plans(op, spec, batch, dtype):
            # Cut columns take conditions for each: that is the last resort.
            if plans(1).columns.tiles > 1 and limit != _VMEM[-1]:
                break
            count = plans(1).rows.axis.count
            # The more tiles of rows, the less they take.
            fewest = bisect.bisect_left(
                range(count), True, key=lambda i: plans(i + 1).bytes <= limit
            )
            if fewest < count:
                most = _ceil(count, fewest + 1)
                downs = {_ceil(count, tile) for tile in range(1, most + 1)}
                return min(map(plans, sorted(downs)), key=lambda plan: plan.rows.moved)
    return None


def _plans(op: Op, spec: ConvSpec, batch: int, dtype) -> Iterator[Callable[[int], _Plan]]:
    """By the tiles of columns, that of so many tiles of rows."""
    rows, columns = axes(op, spec)
    for view in _views(spec, batch):
        unit = _SUBLANES if view[-2] == "w" else 1
        # A block may not start within a tile.
        most = 1 if unit > 1 else columns.count
        for across in (2**i for i in range(most.bit_length())):
            window = _window(columns, across, unit)

            def plan(down: int, view=view, window=window) -> _Plan:
                return _Plan(op, spec, view, _window(rows, down, 1), window, batch, dtype)

            yield plan


def _views(spec: ConvSpec, batch: int) -> list[str]:
    """Best first: the layouts that XLA has for activations between pointwise convolutions."""
    if batch < _SUBLANES:
        return ["gnhwc", "ghwnc"]
    if spec.multiplier == 1 and spec.channels < _LANES and batch >= 64:
        return ["ghwcn"]
    return ["ghwnc"]


# ---- The kernels.


def _call(plan: _Plan, kernel: Callable, operands: dict[str, Any], out_shape, out_spec) -> Any:
    arrays, in_specs = zip(*operands.values(), strict=True)
    # filter_grad sums over the images, rows and columns.
    semantics: Any = "arbitrary" if plan.op == "filter_grad" else "parallel"
    # A `shard_map` wants to be told.
    out_shape = out_shape.update(manual_axis_type=jax.typeof(arrays[0]).manual_axis_type)
    # Within the kernel all integers have 32 bits.
    with jax.enable_x64(False):
        return pl.pallas_call(
            functools.partial(kernel, plan),
            out_shape=out_shape,
            grid=(arrays[0].shape[0], *plan.grid.values()),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(plan.scratch, jnp.float32)] if plan.copies else [],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", *[semantics] * 3),
                vmem_limit_bytes=plan.bytes + _SPARE,
            ),
            interpret=interpreted(),
            name=f"depthwise_{plan.op}",
        )(*arrays)


def _loop(count: int, size: int, body: Callable, carry):
    """carry = body(start, size, carry) for whole pieces, of which a loop is made, and the rest."""
    whole = count // size
    if whole == 1:
        carry = body(0, size, carry)
    elif whole:

        def step(i, carry):
            return body(pl.multiple_of(i * size, size), size, carry)

        carry = lax.fori_loop(0, whole, step, carry)
    return body(whole * size, count % size, carry) if count % size else carry


def _sum_taps_kernel(plan: _Plan, source_ref, f_ref, result_ref, *scratch):
    source_ref, result_ref = (_spatial(plan, ref) for ref in (source_ref, result_ref))
    readers = _readers(plan, _program_ids(), source_ref, *scratch)
    height, width = plan.accumulators
    phases = dict(enumerate(plan.rows.axis.phases))

    def block(rows: _Piece, columns: _Piece, _):
        reads = [reader(rows, columns) for reader in readers]
        sums = functools.partial(_weighted_sums, plan, f_ref, reads, rows.count, columns.count)
        totals = _looped(sums, phases) if plan.loops else sums(phases)
        for r in range(rows.count):
            for a in phases:
                row = len(phases) * (rows.start + r) + a
                _store(plan, result_ref, row, columns, totals[a, r])

    def row_block(rows: _Piece, _):
        body = functools.partial(block, rows)
        return plan.columns.each(width, not plan.copies, body, None)

    plan.rows.each(height, True, row_block, None)


def _program_ids() -> list[jax.Array]:
    """Of the axes g, c, n, h and w; known to the interpreter outside of loops alone."""
    return [pl.program_id(axis) for axis in range(5)]


def _spatial(plan: _Plan, ref):
    """The block as [H, W, tile]."""
    return ref.at[(0,) * plan.view.index("h")]


def _fill(plan: _Plan, ids, source_ref, scratch_ref):
    rows, columns = plan.rows, plan.columns
    unit, registers = plan.unit
    _, _, image, h, w = ids

    def copy(r, source_row, c, source_column, n, inside):
        values = source_ref[source_row, pl.ds(source_column, n)].astype(jnp.float32)
        if inside is not True:
            values = jnp.where(inside, values, 0.0)
        values = _mask_batch(plan, image, values)
        if n % unit:
            # Zeros follow: so whole registers are stored.
            zeros = jnp.zeros((-n % unit, *values.shape[1:]), jnp.float32)
            values = jnp.concatenate([values, zeros])
        for m, lanes in enumerate(_widen(plan, values)):
            scratch_ref[m, r, pl.ds(c, lanes.shape[0]), ..., : lanes.shape[-1]] = lanes

    def zero(r, c, n):
        if n > 0:
            shape = (plan.chunks, n, *plan.tile)
            scratch_ref[:, r, pl.ds(c, n)] = jnp.zeros(shape, jnp.float32)

    def zero_row(r, _, carry):
        zero(r, 0, columns.scratch)
        return carry

    def copy_row(r, known):
        source_row, inside = rows.within(h, r - rows.border, known)
        if columns.tiles > 1:

            def column(c, _, carry):
                at, exists = columns.within(w, c - columns.border, False)
                copy(r, source_row, c, at, 1, exists & inside)
                return carry

            _loop(columns.scratch, 1, column, None)
            return
        first, last = columns.copied
        # Beyond these only what there is not in the result is computed from.
        start, stop = columns.read
        zero(r, start, first - start)
        filled = first + _ceil(last - first, unit) * unit
        zero(r, filled, stop - filled)

        def piece(c, n, carry):
            copy(r, source_row, first + c, first + c - columns.border, n, inside)
            return carry

        _loop(last - first, _COPIED * unit // registers, piece, None)

    def copy_rows(first, last, known):
        def block(r, n, carry):
            for i in range(n):
                copy_row(first + r + i, known)
            return carry

        of_a_row = _ceil(columns.scratch * registers, unit)
        _loop(last - first, _piece(last - first, max(1, _COPIED // of_a_row)), block, None)

    if rows.tiles > 1:
        copy_rows(0, rows.scratch, False)
        return
    first, last = rows.copied
    if plan.bordered:
        _loop(first, 1, zero_row, None)
        _loop(rows.scratch - last, 1, lambda r, n, carry: zero_row(last + r, n, carry), None)
    copy_rows(first, last, True)


def _mask_batch(plan: _Plan, n, values):
    """Zeros for what a block has beyond the last image, where filter_grad sums over images."""
    block = plan.block["n"]
    if plan.op != "filter_grad" or plan.batch % block == 0:
        return values
    image = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 5 + plan.view.index("n"))
    return jnp.where(n * block + image < plan.batch, values, 0.0)


def _widen(plan: _Plan, values) -> list[jax.Array]:
    """Values of C lanes as the registers of C*M lanes, each channel M times in a row."""
    multiplier = plan.spec.multiplier
    if plan.op == "input_grad" or multiplier == 1:
        return [values[..., i : i + _LANES] for i in range(0, values.shape[-1], _LANES)]
    return [
        _gather(values, lambda lane, i=i: lax.div(lane + i * _LANES, jnp.int32(multiplier)))
        for i in range(plan.chunks)
    ]


def _narrow(plan: _Plan, chunks: list[jax.Array]) -> jax.Array:
    """The sums of the M lanes of each channel."""
    multiplier = plan.spec.multiplier
    if multiplier == 1:
        return chunks[0]
    lanes = lax.broadcasted_iota(jnp.int32, chunks[0].shape, chunks[0].ndim - 1) * multiplier

    def every(m) -> jax.Array:
        """The m-th lane of each channel, out of the register that it is in."""
        parts = [
            _gather(chunk, lambda lane: lax.rem(lane * multiplier + m, jnp.int32(_LANES)))
            for chunk in chunks
        ]
        result = parts[0]
        for i, part in enumerate(parts[1:], 1):
            result = jnp.where(lanes + m >= i * _LANES, part, result)
        return result

    if multiplier * len(chunks) > _GATHERED:
        return lax.fori_loop(1, multiplier, lambda m, total: total + every(m), every(0))
    return functools.reduce(lax.add, [every(m) for m in range(multiplier)])


def _gather(values, index: Callable) -> jax.Array:
    """values[..., index(lane)] for each of 128 lanes."""
    pad = _LANES - values.shape[-1]
    if pad:
        values = jnp.concatenate([values, jnp.zeros((*values.shape[:-1], pad), values.dtype)], -1)
    flat = values.reshape(-1, _LANES)
    lane = lax.broadcasted_iota(jnp.int32, flat.shape, 1)
    at = jnp.minimum(index(lane), _LANES - 1)
    # As `jnp.take_along_axis` has it, but of a single row too, where that is another gather.
    along = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    gathered = lax.gather(flat, at[..., None], along, (1, 1), mode="promise_in_bounds")
    return gathered.reshape(values.shape)


def _store(plan: _Plan, result_ref, row, columns: _Piece, sums):
    """Stores the sums of each phase of the columns, which alternate."""
    phases = len(sums)
    narrow = [_narrow(plan, s) if plan.op == "input_grad" else s for s in sums]
    lanes = result_ref.shape[-1]

    def put(values, first):
        values = values if phases == 1 else jnp.stack(values, 1).reshape(-1, *plan.tile)
        size = min(_LANES, lanes - first)
        at = pl.ds(phases * columns.start, phases * columns.count)
        result_ref[row, at, ..., first : first + size] = values[..., :size].astype(plan.dtype)

    if plan.op == "input_grad":
        put(narrow if phases > 1 else narrow[0], 0)
    else:
        for m, values in enumerate(narrow[0]):
            put(values, m * _LANES)


def _weighted_sums(plan: _Plan, f_ref, reads, height: int, width: int, phases: dict):
    """sums[a, r][b][chunk] of the row r of a phase a of `phases` and all phases b of columns.

    `reads` has for each chunk what `_readers` describes.
    """
    shape = (width, *plan.tile)
    column_phases = plan.columns.axis.phases
    sums: dict[Any, jax.Array] = {}
    for m, read in enumerate(reads):

        @functools.cache
        def weight(a, i, j, m=m) -> jax.Array:
            lanes = slice(m * _LANES, m * _LANES + plan.tile[-1])
            weights = f_ref[plan.tap(phases[a][i].k, j, lanes)]
            return weights.reshape((1,) * (len(shape) - 2) + weights.shape)

        for offset, meeting in _meetings(plan, phases, height):
            for b, taps in enumerate(column_phases):
                found: list[Any] = [(tap, *met) for tap in taps if (met := read(offset, tap))]
                # What fills all columns comes first: it needs no zeros to be added to.
                for tap, values, at in sorted(found, key=lambda f: f[2].start - f[2].stop):
                    for a, r, i in meeting:
                        product = values * weight(a, i, tap.k)
                        at_ = a, r, b, m
                        sums[at_] = _add(sums.get(at_), product, at, width)

    def sum_(*at) -> jax.Array:
        return sums[at] if at in sums else jnp.zeros(shape, jnp.float32)

    return {
        (a, r): [[sum_(a, r, b, m) for m in range(len(reads))] for b in range(len(column_phases))]
        for a in phases
        for r in range(height)
    }


def _add(total: jax.Array | None, values: jax.Array, at: slice, width: int) -> jax.Array:
    """total[at] += values, where None is zeros."""
    if at == slice(0, width):
        return values if total is None else total + values
    if total is None:
        total = jnp.zeros((width, *values.shape[1:]), values.dtype)
    middle = lax.slice_in_dim(total, at.start, at.stop) + values
    before, after = total[: at.start], total[at.stop :]
    return lax.concatenate([part for part in (before, middle, after) if part.shape[0]], 0)


def _looped(sums: Callable, phases: dict):
    """sums(phases), each phase in a loop over its taps.

    The taps of a row are summed first: no chain has all of them.
    """
    totals = {}
    for a, taps in phases.items():

        def add(i, total, a=a, taps=taps):
            return jax.tree.map(lax.add, total, sums({a: [_evenly(taps, i)]}))

        zeros = jax.tree.map(jnp.zeros_like, sums({a: []}))
        totals |= lax.fori_loop(0, len(taps), add, zeros) if len(taps) > 1 else sums({a: taps})
    return totals


def _evenly(taps: list[Tap], i) -> Tap:
    """The tap of index i, which may be traced: those of a phase are evenly spaced."""
    first, second = taps[:2]
    return Tap(
        first.k + i * (second.k - first.k), first.offset + i * (second.offset - first.offset)
    )


def _meetings(plan: _Plan, phases: dict[int, list[Tap]], height: int) -> list[tuple[Any, list]]:
    """What rows of the source `height` rows of the result meet, by the offset from the first.

    With each of them come the triples (a, r, i): row r of phase a meets it at the tap of index i.
    So it needs to be loaded but once. If a tap is traced, it is the only one.
    """
    every = [(a, i, tap) for a, taps in phases.items() for i, tap in enumerate(taps)]
    if not every:
        return []
    _, _, first = every[0]
    meetings: dict[int, list] = {}
    for a, i, tap in every:
        relative = 0 if tap is first else tap.offset - first.offset
        for r in range(height):
            meetings.setdefault(plan.rows.axis.step * r + relative, []).append((a, r, i))
    return [(first.offset + offset, meetings[offset]) for offset in sorted(meetings)]


def _readers(plan: _Plan, ids, source_ref, scratch_ref=None) -> list[Callable]:
    """For each chunk, of a piece of rows and one of columns makes the function that reads them.

    read(offset, tap) are the values that the columns of the piece meet at a tap, in the row that is
    `offset` from the first: of all columns or of a slice, beyond which all are zeros, with it; or
    None if all are.
    """
    if scratch_ref is None:
        return [functools.partial(_reader, plan, ids, source_ref)]
    _fill(plan, ids, source_ref, scratch_ref)
    return [functools.partial(_copy_reader, plan, scratch_ref.at[m]) for m in range(plan.chunks)]


def _copy_reader(plan: _Plan, scratch_ref, rows: _Piece, columns: _Piece) -> Callable:
    window, step = plan.columns, plan.columns.axis.step

    def read(offset, tap: Tap):
        row = plan.rows.position(rows, offset)
        if plan.rows.outside(row):
            return None
        at = pl.ds(step * columns.start + tap.offset + window.border, columns.count, stride=step)
        return scratch_ref.at[row + plan.rows.border][at], slice(0, columns.count)

    return read


def _reader(plan: _Plan, ids, source_ref, rows: _Piece, columns: _Piece) -> Callable:
    *_, h, w = ids
    window, step = plan.columns, plan.columns.axis.step

    def load(row, first: int, count: int):
        """`count` columns for all the taps of a run, and the first of them that there is."""
        start = window.position(columns, first)
        low, high = 0, count
        if window.tiles == 1 and isinstance(start, int):
            low = max(0, _ceil(-start, step))
            high = min(count, _ceil(window.axis.source - start, step))
        elif not columns.inside:
            each = []
            for i in range(count):
                column, inside = window.within(w, start + step * i, False)
                each.append(jnp.where(inside, source_ref[row, column], 0.0))
            return jnp.stack(each), 0
        if low >= high:
            return None
        at = start + window.shift(w)
        if step == 1:
            return source_ref.at[row][pl.ds(at + low, high - low)], low
        # There is no load of bfloat16 with a stride.
        return jnp.stack([source_ref[row, at + step * i] for i in range(low, high)]), low

    offsets = {tap.offset for taps in window.axis.phases for tap in taps}
    runs = _runs(offsets, step, columns.count)

    @functools.cache
    def load_run(offset, run: range):
        position = plan.rows.position(rows, offset)
        if plan.rows.outside(position):
            return None
        row, inside = plan.rows.within(h, position, rows.inside)
        loaded = load(row, run.start, len(run) - 1 + columns.count)
        if loaded is None:
            return None
        values = _mask_batch(plan, ids[2], loaded[0].astype(jnp.float32))
        return (values if inside is True else jnp.where(inside, values, 0.0)), loaded[1]

    def read(offset, tap: Tap):
        run = next(run for run in runs if tap.offset in run)
        loaded = load_run(offset, run)
        if loaded is None:
            return None
        values, low = loaded
        skipped = run.index(tap.offset) - low
        at = slice(max(0, -skipped), min(columns.count, len(values) - skipped))
        if at.start >= at.stop:
            return None
        return lax.slice_in_dim(values, at.start + skipped, at.stop + skipped), at

    return read


def _runs(offsets: Iterable[int], step: int, width: int) -> list[range]:
    """The offsets in ranges, each of those whose `width` columns, a step apart, overlap."""
    runs: list[range] = []
    for offset in sorted(offsets, key=lambda offset: (offset % step, offset)):
        last = runs[-1] if runs else range(0)
        if last and (offset - last.start) % step == 0 and offset - last[-1] <= step * width:
            runs[-1] = range(last.start, offset + 1, step)
        else:
            runs.append(range(offset, offset + 1, step))
    return runs


def _filter_grad_kernel(plan: _Plan, x_ref, dy_ref, df_ref, *scratch):
    ids = _program_ids()

    @pl.when((ids[2] == 0) & (ids[3] == 0) & (ids[4] == 0))
    def _():
        df_ref[...] = jnp.zeros(df_ref.shape, jnp.float32)

    x_ref, dy_ref = _spatial(plan, x_ref), _spatial(plan, dy_ref)
    [row_taps], [column_taps] = plan.rows.axis.phases, plan.columns.axis.phases
    for m, reader in enumerate(_readers(plan, ids, x_ref, *scratch)):
        add = functools.partial(_add_filter_rows, plan, ids, reader, dy_ref, df_ref, m)
        if plan.loops:

            def add_row(i, carry, add=add):
                add([_evenly(row_taps, i)])
                return carry

            lax.fori_loop(0, len(row_taps), add_row, None)
        else:
            several = max(1, _REGISTERS // 2 // len(column_taps))
            for i in range(0, len(row_taps), several):
                add(row_taps[i : i + several])


def _add_filter_rows(plan: _Plan, ids, reader: Callable, dy_ref, df_ref, m: int, row_taps):
    """Adds to some rows of the gradient, whose sums are in registers all the while."""
    rows, columns = plan.rows, plan.columns
    [column_taps] = columns.axis.phases
    unit = _sublanes(plan.dtype) if plan.view[-2] == "w" else 1
    height, width = plan.accumulators
    lanes = slice(m * _LANES, min((m + 1) * _LANES, dy_ref.shape[-1]))

    def load_dy(row: _Piece, piece: _Piece):
        """And which of it there is, where that is not known."""
        at = row.start, pl.ds(piece.start, piece.count), ..., lanes
        dy = _mask_batch(plan, ids[2], dy_ref[at].astype(jnp.float32))
        exists = []
        if not rows.exist(row):
            exists.append(ids[3] * rows.tile + row.start < rows.axis.count)
        if not columns.exist(piece):
            column = piece.start + lax.broadcasted_iota(jnp.int32, dy.shape, 0)
            exists.append(ids[4] * columns.tile + column < columns.axis.count)
        return dy, exists

    def block(rows: _Piece, columns: _Piece, totals):
        totals = [list(row) for row in totals]
        read = reader(rows, columns)
        each_row = [_Piece(rows.start + r, 1, rows.inside) for r in range(rows.count)]
        dys = [load_dy(row, columns) for row in each_row]
        for offset, meeting in _meetings(plan, {0: row_taps}, rows.count):
            for j, tap in enumerate(column_taps):
                found = read(offset, tap)
                if found is None:
                    continue
                values, at = found
                for _, r, i in meeting:
                    dy, exists = dys[r]
                    products = values[..., : dy.shape[-1]] * lax.slice_in_dim(dy, at.start, at.stop)
                    # What is not there must not meet an infinity: 0 * inf is no zero.
                    for condition in exists:
                        products = jnp.where(condition, products, 0.0)
                    products = products.reshape(-1, *totals[i][j].shape)
                    totals[i][j] += jnp.sum(products, 0)
        return totals

    def region(size: int, each: Callable):
        """Sums over the columns of pieces, which have at least `size`."""
        shape = (min(size, unit), *plan.tile[:-1], lanes.stop - lanes.start)
        if plan.view[-2] == "n" and shape[1] % _SUBLANES == 0:
            shape = (1, _SUBLANES, shape[2])  # images are summed anyway
        totals = [[jnp.zeros(shape, jnp.float32)] * len(column_taps)] * len(row_taps)
        totals = rows.each(
            height,
            True,
            lambda rows, totals: each(lambda c, totals: block(rows, c, totals), totals),
            totals,
        )
        summed = (0,) if plan.view[-2] == "w" or plan.view[-1] == "n" else (0, 1)
        for row_tap, row_totals in zip(row_taps, totals, strict=True):
            for column, total in zip(column_taps, row_totals, strict=True):
                value = jnp.sum(total, summed)
                value = value if value.ndim == 2 else value[None]
                df_ref[plan.tap(row_tap.k, column.k, lanes)] += value

    if unit == 1:
        region(1, functools.partial(columns.each, width, not plan.copies))
        return
    whole, rest = columns.tile // unit * unit, columns.tile % unit

    def whole_registers(body, totals):
        return _loop(whole, width, lambda c, n, totals: body(_Piece(c, n, False), totals), totals)

    if whole:
        region(width, whole_registers)
    if rest:
        region(rest, lambda body, totals: body(_Piece(whole, rest, False), totals))
