"""A Pallas kernel for TPUs: sums over taps on the vector unit, which no matrix unit can speed up.

A TPU tiles the two minor axes of an array, (8, 128) elements a register. XLA keeps the activations
of a convolution with N and C there, so that H and W are merely indices: taps, strides and dilation
cost nothing, and a transposition to the same axes around the kernel is a change of names, not a
copy. For small batches W and C are the tiled ones (`_view`).

A step of the grid copies its rows of the source, with the zeros that the taps read beyond the
edges, to a float32 scratch: no padded array is made in HBM. Then forward and input_grad sum the
taps of each phase of `taps.axes`, and filter_grad sums products with dy for each tap.

A multiplier makes lanes: x is repeated M times as it is copied, or the M lanes of each channel
are summed before they are stored, both by gathers along lanes.
"""

import functools
import math
from collections.abc import Callable, Iterator
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
_SPARE = 4 << 20  # for what the compiler adds
# Registers of the result that the body of a loop computes: enough to hide the latencies, as the
# compiler does not pipeline loops. Its accumulators are those of a few rows at a time.
_REGISTERS = 56
# Registers that a body of a loop copies.
_COPIED = 64
# Taps of a phase beyond which the rows of the filter are looped over; its columns never are.
_UNROLLED = 64
_MAX_COLUMNS = 128
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
    lanes = min(spec.channels, _LANES) * spec.multiplier
    if lanes > _MAX_CHUNKS * _LANES:
        return (
            f"{_LANES} channels, or all, may have at most {_MAX_CHUNKS * _LANES} outputs, got "
            f"{lanes} by a depth multiplier of {spec.multiplier}"
        )
    if _plan(op, spec, _batch(op, a, b), a.dtype) is None:
        return f"what a row of the result takes must fit {_VMEM[-1]} bytes of VMEM"
    return None


def preferred(op: Op, spec: ConvSpec, a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct) -> bool:
    """Where static figures (tests/figures) promise 15% and more; no TPU has timed it.

    XLA's own kernel is as good for most layers. It takes 2 to 8 times the issue cycles for a few
    images; more than ever for a multiplier, where it computes dense convolutions; 3 to 4 times in
    the gradient of the input for the phases of 5x5 and 7x7 filters with a stride; and 1.1 to 1.3
    times for few channels of many images. With 7x7 taps and no stride it is behind by 17% on v5e,
    but by 4% and 7% on v6e and tpu7x.
    """
    batch = _batch(op, a, b)
    phases = op == "input_grad" and min(spec.kernel_spatial) > 3 and min(spec.window_strides) > 1
    lanes = (
        op != "filter_grad"
        and a.dtype == jnp.bfloat16
        and _views(spec, batch) == ["ghwcn"]
        and spec.window_strides == (1, 1)
    )
    return spec.multiplier > 1 or batch < _SUBLANES or phases or lanes


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    return _sum_taps("forward", spec, x, f)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    return _sum_taps("input_grad", spec, dy, f)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    plan = _plan_of("filter_grad", spec, x)
    shape = (x.shape[0], *spec.kernel_spatial, plan.filter_channels, plan.filter_lanes)
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

    def start(self, t):
        """The first row of the source in the block of tile t."""
        if self.tiles == 1:
            return 0
        first = self.axis.step * self.tile * t - self.border
        return jnp.clip(first, 0, self.axis.source - self.source)

    def shift(self, t):
        """Row r of the scratch is row r + shift of the block."""
        return (
            -self.border
            if self.tiles == 1
            else self.axis.step * self.tile * t - self.border - self.start(t)
        )


def _window(axis: Axis, tiles: int, unit: int) -> _Window:
    offsets = [tap.offset for taps in axis.phases for tap in taps] or [0]
    tile = -(-axis.count // tiles)
    border = -(min(offsets) // unit * unit)
    # Columns are computed `unit` at a time, and those beyond the last one read what is there.
    span = axis.step * (-(-tile // unit) * unit - 1) + 1
    rows = max(offsets) + border + span
    return _Window(axis, tile, border, -(-rows // unit) * unit)


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
        return (_LANES,) if self.view[-2] == "w" else (self.block[self.view[-2]], _LANES)

    @property
    def grid(self) -> dict[str, int]:
        return {
            "c": _ceil(self.spec.channels, self.block["c"]),
            "n": _ceil(self.batch, self.block["n"]),
            "h": self.rows.tiles,
            "w": self.columns.tiles,
        }

    # Lanes of the filter: those of each block of channels are padded to whole registers.

    @property
    def filter_lanes(self) -> int:
        return self.grid["c"] * self.chunks * _LANES if self.view[-1] == "c" else _LANES

    @property
    def filter_channels(self) -> int:
        return 1 if self.view[-1] == "c" else self.spec.channels

    def to_lanes(self, f: jax.Array) -> jax.Array:
        """[G,R,S,C,M] as the kernels read it, [G,R,S,filter_channels,filter_lanes] in float32."""
        f = f.astype(jnp.float32)
        if self.view[-1] == "n":
            return jnp.broadcast_to(f, (*f.shape[:4], _LANES))
        wide = f.reshape(*f.shape[:3], 1, f.shape[3] * f.shape[4])
        pad = self.filter_lanes - wide.shape[4]
        return jnp.pad(wide, [(0, 0)] * 4 + [(0, pad)])

    def from_lanes(self, f: jax.Array) -> jax.Array:
        if self.view[-1] == "n":
            return jnp.sum(f, 4, keepdims=True)
        wide = f[..., : self.spec.channels * self.spec.multiplier]
        return wide.reshape(*f.shape[:3], self.spec.channels, self.spec.multiplier)

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
        r, s = self.spec.kernel_spatial
        if self.view[-1] == "n":
            return pl.BlockSpec(
                (1, r, s, self.block["c"], _LANES), lambda g, c, n, h, w: (g, 0, 0, c, 0)
            )
        return pl.BlockSpec(
            (1, r, s, 1, self.chunks * _LANES), lambda g, c, n, h, w: (g, 0, 0, 0, c)
        )

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
        columns = _piece(_ceil(self.columns.tile, unit), max(1, 8 // registers))
        if unit > 1 and columns > 1:
            columns += columns % 2  # bfloat16 packs two to a register
        # Interpreted, a CPU compiles them, which takes it seconds for what a TPU does in one.
        most = 2 if interpreted() else max(1, _REGISTERS // (columns * registers))
        return _piece(self.rows.tile, most), columns * unit

    @property
    def bytes(self) -> int:
        """The VMEM that it takes: blocks twice, as the next are copied while these are computed."""
        r, s = self.spec.kernel_spatial
        blocks = sum(
            _padded(spec.block_shape, self.dtype) for spec in (self.source_spec, self.result_spec)
        )
        blocks += _padded((r, s, 8, self.chunks * _LANES), jnp.dtype("float32"))
        return 2 * blocks + _padded(self.scratch, jnp.dtype("float32"))


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
    """The one with the fewest tiles that fits, if there is one."""
    for limit in _VMEM:
        for plan in _plans(op, spec, batch, dtype):
            if plan.bytes <= limit:
                return plan
            # Cut rows have to be copied column by column: that is the last resort.
            if plan.columns.tiles > 1 and limit != _VMEM[-1]:
                break
    return None


def _plans(op: Op, spec: ConvSpec, batch: int, dtype) -> Iterator[_Plan]:
    rows, columns = axes(op, spec)
    for view in _views(spec, batch):
        unit = _SUBLANES if view[-2] == "w" else 1
        # A block may not start within a tile.
        most = 1 if unit > 1 else columns.count
        for across in (2**i for i in range(most.bit_length())):
            for down in sorted({_ceil(rows.count, tile) for tile in range(1, rows.count + 1)}):
                windows = _window(rows, down, 1), _window(columns, across, unit)
                yield _Plan(op, spec, view, *windows, batch, dtype)


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
            scratch_shapes=[pltpu.VMEM(plan.scratch, jnp.float32)],
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


def _sum_taps_kernel(
    plan: _Plan,
    source_ref,
    f_ref,
    result_ref,
    scratch_ref,
):
    source_ref, result_ref = (_spatial(plan, ref) for ref in (source_ref, result_ref))
    _fill(plan, _program_ids(), source_ref, scratch_ref)
    phases = plan.columns.axis.phases
    height, width = plan.accumulators

    def block(q, rows, c, columns):
        for a, row_taps in enumerate(plan.rows.axis.phases):
            sums = [
                _weighted_sum(
                    plan, scratch_ref, f_ref.at[0], row_taps, taps, (q, rows), (c, columns)
                )
                for taps in phases
            ]
            for r in range(rows):
                row = len(plan.rows.axis.phases) * (q + r) + a
                _store(plan, result_ref, row, c, columns, [sum_[r] for sum_ in sums])

    def row_block(q, rows, _):
        return _loop(plan.columns.tile, width, lambda c, n, _: block(q, rows, c, n), None)

    _loop(plan.rows.tile, height, row_block, None)


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
    row_shift, column_shift = rows.shift(h), columns.shift(w)

    def copy(r, source_row, c, source_column, n, inside):
        values = source_ref[source_row, pl.ds(source_column, n)].astype(jnp.float32)
        values = jnp.where(inside, values, 0.0)
        values = _mask_batch(plan, image, values)
        for m, lanes in enumerate(_widen(plan, values)):
            scratch_ref[m, r, pl.ds(c, n), ..., : lanes.shape[-1]] = lanes

    def zero(r, c, n):
        if n > 0:
            shape = (plan.chunks, n, *plan.tile)
            scratch_ref[:, r, pl.ds(c, n)] = jnp.zeros(shape, jnp.float32)

    def row(r):
        source_row = r + row_shift
        inside = (source_row >= 0) & (source_row < rows.source)
        source_row = jnp.clip(source_row, 0, rows.source - 1)
        if columns.tiles > 1:

            def column(c, _, carry):
                source_column = c + column_shift
                both = inside & (source_column >= 0) & (source_column < columns.source)
                at = jnp.clip(source_column, 0, columns.source - 1)
                copy(r, source_row, c, at, 1, both)
                return carry

            _loop(columns.scratch, 1, column, None)
            return
        first = min(max(columns.border, 0), columns.scratch)
        last = max(first, min(columns.border + columns.axis.source, columns.scratch))
        zero(r, 0, first)
        zero(r, last, columns.scratch - last)

        def piece(c, n, carry):
            copy(r, source_row, first + c, first + c - columns.border, n, inside)
            return carry

        _loop(last - first, _COPIED * unit // registers, piece, None)

    def row_block(r, n, carry):
        for i in range(n):
            row(r + i)
        return carry

    copied = _ceil(columns.scratch * registers, unit)
    _loop(rows.scratch, _piece(rows.scratch, max(1, _COPIED // copied)), row_block, None)


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

    return functools.reduce(lax.add, [every(m) for m in range(multiplier)])


def _gather(values, index: Callable) -> jax.Array:
    """values[..., index(lane)] for each of 128 lanes."""
    pad = _LANES - values.shape[-1]
    if pad:
        values = jnp.concatenate([values, jnp.zeros((*values.shape[:-1], pad), values.dtype)], -1)
    flat = values.reshape(-1, _LANES)
    lane = lax.broadcasted_iota(jnp.int32, flat.shape, 1)
    at = jnp.minimum(index(lane), _LANES - 1)
    return jnp.take_along_axis(flat, at, axis=1, mode="promise_in_bounds").reshape(values.shape)


def _store(plan: _Plan, result_ref, row, c, columns, sums):
    """Stores the sums of each phase of the columns [c, c + columns), which alternate."""
    phases = len(sums)
    narrow = [_narrow(plan, s) if plan.op == "input_grad" else s for s in sums]
    lanes = result_ref.shape[-1]

    def put(values, first):
        values = values if phases == 1 else jnp.stack(values, 1).reshape(-1, *plan.tile)
        size = min(_LANES, lanes - first)
        at = pl.ds(phases * c, phases * columns)
        result_ref[row, at, ..., first : first + size] = values[..., :size].astype(plan.dtype)

    if plan.op == "input_grad":
        put(narrow if phases > 1 else narrow[0], 0)
    else:
        for m, values in enumerate(narrow[0]):
            put(values, m * _LANES)


def _weighted_sum(plan: _Plan, scratch_ref, f_ref, row_taps, column_taps, rows, columns):
    """[rows][chunks] sums over the taps of one phase."""
    (q, height), (c, width) = rows, columns
    shape = (width, *plan.tile)
    if not row_taps or not column_taps:
        return [[jnp.zeros(shape, jnp.float32)] * plan.chunks] * height

    def weight(m, k, j):
        weights = f_ref[k, j, :, m * _LANES : (m + 1) * _LANES]
        return weights.reshape((1,) * (len(shape) - 2) + weights.shape)

    def sums(m, taps) -> list[jax.Array]:
        totals: list[Any] = [None] * height
        for row, meeting in _meetings(plan, taps, q, height):
            for tap in column_taps:
                values = _load(plan, scratch_ref, m, row, c, tap, width)
                for r, i in meeting:
                    product = values * weight(m, taps[i].k, tap.k)
                    totals[r] = product if totals[r] is None else totals[r] + product
        return totals

    def looped_sums(m) -> list[jax.Array]:
        # The taps of a row are summed first: no chain has all of them.
        def add(i, totals):
            parts = sums(m, [_evenly(row_taps, i)])
            return [total + part for total, part in zip(totals, parts, strict=True)]

        return lax.fori_loop(0, len(row_taps), add, [jnp.zeros(shape, jnp.float32)] * height)

    if len(row_taps) > 1 and len(row_taps) * len(column_taps) > _UNROLLED:
        chunks = [looped_sums(m) for m in range(plan.chunks)]
    else:
        chunks = [sums(m, row_taps) for m in range(plan.chunks)]
    return list(zip(*chunks, strict=True))


def _evenly(taps: list[Tap], i) -> Tap:
    """The tap of index i, which may be traced: those of a phase are evenly spaced."""
    first, second = taps[:2]
    return Tap(
        first.k + i * (second.k - first.k), first.offset + i * (second.offset - first.offset)
    )


def _meetings(plan: _Plan, taps: list[Tap], q, height: int) -> list[tuple[Any, list]]:
    """The rows of the scratch that the result rows q, ..., q + height - 1 meet.

    With each of them the pairs (r, i) of a row q + r and the index of the tap that it meets it at:
    so it needs to be loaded but once. If a tap is traced, it is the only one.
    """
    first, step = taps[0].offset, plan.rows.axis.step
    meetings: dict[int, list] = {}
    for i, tap in enumerate(taps):
        for r in range(height):
            meetings.setdefault(step * r + (tap.offset - first if i else 0), []).append((r, i))
    start = step * q + first + plan.rows.border
    return [(start + offset, meetings[offset]) for offset in sorted(meetings)]


def _load(plan: _Plan, scratch_ref, m, row, c, tap: Tap, count: int) -> jax.Array:
    """What `count` columns of the result from c on meet at a tap, in a row of the scratch."""
    step = plan.columns.axis.step
    start = step * c + tap.offset + plan.columns.border
    return scratch_ref.at[m, row][pl.ds(start, count, stride=step)]


def _filter_grad_kernel(plan: _Plan, x_ref, dy_ref, df_ref, scratch_ref):
    ids = _program_ids()

    @pl.when((ids[2] == 0) & (ids[3] == 0) & (ids[4] == 0))
    def _():
        df_ref[...] = jnp.zeros(df_ref.shape, jnp.float32)

    x_ref, dy_ref = _spatial(plan, x_ref), _spatial(plan, dy_ref)
    _fill(plan, ids, x_ref, scratch_ref)
    [row_taps], [column_taps] = plan.rows.axis.phases, plan.columns.axis.phases
    for m in range(plan.chunks):
        add = functools.partial(
            _add_filter_rows, plan, ids, scratch_ref, dy_ref, df_ref, m, column_taps
        )
        if len(row_taps) > 1 and len(row_taps) * len(column_taps) > _UNROLLED:

            def add_row(i, carry, add=add):
                add([_evenly(row_taps, i)])
                return carry

            lax.fori_loop(0, len(row_taps), add_row, None)
        else:
            several = max(1, _REGISTERS // 2 // len(column_taps))
            for i in range(0, len(row_taps), several):
                add(row_taps[i : i + several])


def _add_filter_rows(plan: _Plan, ids, scratch_ref, dy_ref, df_ref, m, column_taps, row_taps):
    """Adds to some rows of the gradient, whose sums are in registers all the while."""
    rows, columns = plan.rows, plan.columns
    unit = _sublanes(plan.dtype) if plan.view[-2] == "w" else 1
    height, width = plan.accumulators
    lanes = slice(m * _LANES, min((m + 1) * _LANES, dy_ref.shape[-1]))

    def load_dy(q, c, n):
        dy = dy_ref[q, pl.ds(c, n), ..., lanes].astype(jnp.float32)
        dy = _mask_batch(plan, ids[2], dy)
        for window, tile, index in ((rows, ids[3], q), (columns, ids[4], c)):
            if window.axis.count % window.tile:
                if window is columns:
                    index += lax.broadcasted_iota(jnp.int32, dy.shape, 0)
                dy = jnp.where(tile * window.tile + index < window.axis.count, dy, 0.0)
        return dy

    def block(q, height, c, n, totals):
        totals = [list(row) for row in totals]
        dys = [load_dy(q + r, c, n) for r in range(height)]
        for row, meeting in _meetings(plan, row_taps, q, height):
            for j, tap in enumerate(column_taps):
                x = _load(plan, scratch_ref, m, row, c, tap, n)[..., : dys[0].shape[-1]]
                for r, i in meeting:
                    products = (x * dys[r]).reshape(-1, *totals[i][j].shape)
                    totals[i][j] += jnp.sum(products, 0)
        return totals

    def region(c, n, count):
        """Sums over `count` columns from c on."""
        shape = (min(n, unit), *plan.tile[:-1], lanes.stop - lanes.start)

        def row(q, height, totals):
            return _loop(count, n, lambda i, n, totals: block(q, height, c + i, n, totals), totals)

        totals = [[jnp.zeros(shape, jnp.float32)] * len(column_taps)] * len(row_taps)
        totals = _loop(rows.tile, height, row, totals)
        summed = (0,) if plan.view[-2] == "w" or plan.view[-1] == "n" else (0, 1)
        for row_tap, row_totals in zip(row_taps, totals, strict=True):
            for column, total in zip(column_taps, row_totals, strict=True):
                value = jnp.sum(total, summed)
                value = value if value.ndim == 2 else value[None]
                df_ref[0, row_tap.k, column.k, :, lanes] += value

    whole = columns.tile // unit * unit
    if whole:
        region(0, width, whole)
    if columns.tile % unit:
        region(whole, columns.tile % unit, columns.tile % unit)
