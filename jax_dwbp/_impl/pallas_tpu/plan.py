"""The plan: which axes are tiled, what a step of the grid computes and what that takes."""

import bisect
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_dwbp._impl.taps import Axis, axes
from jax_dwbp._spec import INPUT_GRAD, ConvSpec, Op

LANES, SUBLANES = 128, 8
# Bytes of VMEM that a program may take. Blocks of 1 to 4 MB keep the DMAs busy; what needs more
# than the first may have the second, which every TPU since v5e has.
VMEM = (20 << 20, 56 << 20)
# Registers of the result that the body of a loop computes: enough to hide the latencies, as the
# compiler does not pipeline loops. Its accumulators are those of a few rows at a time. Times the
# taps that makes a limit of instructions, or else there are few to compile.
REGISTERS = 56
_PRODUCTS = 1600
# Taps of a phase beyond which the rows of the filter are looped over; its columns never are.
_UNROLLED = 64
# Pieces of an axis outside of its loop.
_PEELED = 3


class Piece(NamedTuple):
    """Positions of a tile, from a start that may be traced."""

    start: Any
    count: int
    inside: bool  # are they, and all that the taps meet, known to be there?


class Window(NamedTuple):
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

    def exist(self, piece: Piece) -> bool:
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

    def position(self, piece: Piece, offset) -> Any:
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

    def pieces(self, size: int, peels: bool) -> tuple[list[Piece], list[Piece], list[Piece]]:
        """Pieces of `size` positions: those before, in and after a loop.

        If it `peels`, what meets a border is outside of the loop, unless that is too much.
        """
        before, after = _reach(self.axis)
        step, last_tile = self.axis.step, self.tile * (self.tiles - 1)

        def piece(start: int) -> Piece:
            count = min(size, self.tile - start)
            low, high = step * start + before, step * (last_tile + start + count - 1) + after
            inside = 0 <= low and high < self.axis.source
            exist = self.exist(Piece(start, count, False))
            return Piece(start, count, inside and exist)

        pieces = [piece(start) for start in range(0, self.tile, size)]
        looped = [p for p in pieces if p.inside and p.count == size]
        if not peels or len(pieces) - len(looped) > _PEELED:
            pieces = [p._replace(inside=False) for p in pieces]
            looped = [p for p in pieces if p.count == size]
        if len(looped) < 2:
            return pieces, [], []
        first, last = pieces.index(looped[0]), pieces.index(looped[-1]) + 1
        return pieces[:first], looped, pieces[last:]

    def each(self, size: int, peels: bool, body: Callable[[Piece, Any], Any], carry):
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


def window_of(axis: Axis, tiles: int, unit: int) -> Window:
    low, high = _reach(axis)
    tile = -(-axis.count // tiles)
    border = -(low // unit * unit)
    # Columns are computed `unit` at a time, and those beyond the last one read what is there.
    span = axis.step * (-(-tile // unit) * unit - 1) + 1
    rows = high + border + span
    return Window(axis, tile, border, -(-rows // unit) * unit)


def _reach(axis: Axis) -> tuple[int, int]:
    """The least and the greatest offset: those of a phase rise or fall."""
    ends = [tap.offset for taps in axis.phases for tap in (*taps[:1], *taps[-1:])]
    return min(ends, default=0), max(ends, default=0)


class Plan(NamedTuple):
    op: Op
    spec: ConvSpec
    view: str  # the order of the axes g (of problems), n, h, w and c: the last two are tiled
    rows: Window
    columns: Window
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
        minor = {self.view[-1]: LANES, self.view[-2]: sublanes_of(self.dtype)}
        sizes = {"n": self.batch, "c": self.spec.channels}
        return {d: min(minor.get(d, 1), size) for d, size in sizes.items()}

    @property
    def chunks(self) -> int:
        """Registers that the lanes of a block of channels take side by side."""
        return (
            ceil_div(self.block["c"] * self.spec.multiplier, LANES) if self.view[-1] == "c" else 1
        )

    @property
    def tile(self) -> tuple[int, ...]:
        """The minor axes of the scratch that are not indices: (sublanes, lanes) or (lanes,)."""
        lanes = LANES if self.copies else self.block[self.view[-1]]
        return (lanes,) if self.view[-2] == "w" else (self.block[self.view[-2]], lanes)

    @property
    def grid(self) -> dict[str, int]:
        return {
            "c": ceil_div(self.spec.channels, self.block["c"]),
            "n": ceil_div(self.batch, self.block["n"]),
            "h": self.rows.tiles,
            "w": self.columns.tiles,
        }

    # The filter: its taps are sublanes, and the lanes of each block of channels whole registers.
    # Where the lanes are images a weight has to be all of them.

    @property
    def filter_shape(self) -> tuple[int, ...]:
        r, s = self.spec.kernel_spatial
        if self.view[-1] == "n":
            return r, s, self.spec.channels, LANES
        return r * s, self.grid["c"] * self.chunks * LANES

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
            "c": self._lanes(self.op == INPUT_GRAD),
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
        unit = sublanes_of(self.dtype) if self.view[-2] == "w" else 1
        return self._spec(
            {
                "g": 1,
                "n": self.block["n"],
                "h": self.rows.result,
                "w": ceil_div(self.columns.result, unit) * unit,
                "c": self._lanes(self.op != INPUT_GRAD),
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
            block = (1, r, s, self.block["c"], LANES)
            return pl.BlockSpec(block, lambda g, c, n, h, w: (g, 0, 0, c, 0))
        block = (1, self.filter_shape[0], self.chunks * LANES)
        return pl.BlockSpec(block, lambda g, c, n, h, w: (g, 0, c))

    @property
    def scratch(self) -> tuple[int, ...]:
        return (self.chunks, self.rows.scratch, self.columns.scratch, *self.tile)

    @property
    def unit(self) -> tuple[int, int]:
        """The fewest columns that fill registers, and how many those are."""
        if self.view[-2] == "w":
            return SUBLANES, 1
        return 1, ceil_div(self.tile[0], SUBLANES)

    @property
    def accumulators(self) -> tuple[int, int]:
        """Rows and columns, of a phase, that are computed at a time."""
        unit, registers = self.unit
        registers *= len(self.columns.axis.phases) * self.chunks
        # Where W is tiled few columns of more rows spill less.
        most = 8 if unit == 1 else 2
        columns = even_piece(ceil_div(self.columns.tile, unit), max(1, most // registers))
        if unit > 1 and columns > 1:
            columns += columns % 2  # bfloat16 packs two to a register
        r, s = self.spec.kernel_spatial
        taps = s if self.loops else r * s
        most = min(REGISTERS, _PRODUCTS // taps) // (columns * registers)
        # Interpreted, a CPU compiles them, which takes it seconds for what a TPU does in one.
        rows = even_piece(self.rows.tile, 2 if self.spec.interpret else max(1, most))
        return rows, columns * unit

    @property
    def bytes(self) -> int:
        """The VMEM that it takes: blocks twice, as the next are copied while these are computed."""
        arrays = (self.source_spec, self.dtype), (self.result_spec, self.dtype)
        arrays += ((self.filter_spec, jnp.dtype("float32")),)
        blocks = sum(_padded(spec.block_shape, dtype) for spec, dtype in arrays)
        scratch = _padded(self.scratch, jnp.dtype("float32")) if self.copies else 0
        return 2 * blocks + scratch


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def even_piece(total: int, most: int) -> int:
    """The size of at most `most` of even pieces of `total`, or else of nearly even ones."""
    divisors = [size for size in range(most // 2 + 1, most + 1) if total % size == 0]
    return max(divisors, default=ceil_div(total, ceil_div(total, most)))


def sublanes_of(dtype) -> int:
    return SUBLANES * 4 // dtype.itemsize


def _padded(shape: Any, dtype) -> int:
    """The bytes of an array with whole tiles."""
    *major, sublanes, lanes = (d.block_size if isinstance(d, pl.Element) else d for d in shape)
    tiles = ceil_div(sublanes, sublanes_of(dtype)) * ceil_div(lanes, LANES)
    return math.prod(major) * tiles * SUBLANES * LANES * 4


@functools.lru_cache
def best_plan(op: Op, spec: ConvSpec, batch: int, dtype) -> Plan | None:
    """The one with the fewest tiles of columns that fits, and which moves the least of rows."""
    if 2 * math.prod(spec.kernel_spatial) * LANES * 4 > VMEM[-1]:
        return None  # for the filter alone, of which all taps are to be listed
    for limit in VMEM:
        for plans in _plans(op, spec, batch, dtype):
            # Cut columns take conditions for each: that is the last resort.
            if plans(1).columns.tiles > 1 and limit != VMEM[-1]:
                break
            count = plans(1).rows.axis.count
            # The more tiles of rows, the less they take.
            fewest = bisect.bisect_left(
                range(count), True, key=lambda i: plans(i + 1).bytes <= limit
            )
            if fewest < count:
                most = ceil_div(count, fewest + 1)
                downs = {ceil_div(count, tile) for tile in range(1, most + 1)}
                return min(map(plans, sorted(downs)), key=lambda plan: plan.rows.moved)
    return None


def _plans(op: Op, spec: ConvSpec, batch: int, dtype) -> Iterator[Callable[[int], Plan]]:
    """By the tiles of columns, that of so many tiles of rows."""
    rows, columns = axes(op, spec)
    for view in _views(spec, batch):
        unit = SUBLANES if view[-2] == "w" else 1
        # A block may not start within a tile.
        most = 1 if unit > 1 else columns.count
        for across in (2**i for i in range(most.bit_length())):
            window = window_of(columns, across, unit)

            def plan(down: int, view=view, window=window) -> Plan:
                return Plan(op, spec, view, window_of(rows, down, 1), window, batch, dtype)

            yield plan


def _views(spec: ConvSpec, batch: int) -> list[str]:
    """Best first: the layouts that XLA has for activations between pointwise convolutions."""
    if batch < SUBLANES:
        return ["gnhwc", "ghwnc"]
    if spec.multiplier == 1 and spec.channels < LANES and batch >= 64:
        return ["ghwcn"]
    return ["ghwnc"]
