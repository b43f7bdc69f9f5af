"""Kernels for NVIDIA GPUs, by Pallas and its Triton backend.

Everything is counted in vectors: up to four neighbouring lanes (c, m) of one pixel, which one
instruction loads. forward and input_grad are one kernel over the plan of `taps`: a thread owns
a tile of results of one vector and reads each vector of the source that its taps meet once, row by
row, so that what lives in registers are its sums. The threads lie flat over vectors, tiles and
images: no width and no number of channels leaves threads idle. Large filters are looped over.

filter_grad owns taps instead of pixels: a thread sums a share of the pixels for a vector and a
group of taps, a block adds up its threads, and XLA adds up the blocks. Nothing is atomic, so
results are the same in each run.
"""

import functools
import importlib
import math
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jax_dwbp._impl import Implementation, interpret
from jax_dwbp._impl.taps import Axis, Tap, axes
from jax_dwbp._spec import FILTER_GRAD, FORWARD, INPUT_GRAD, ConvSpec, Op

_WARPS = 4
_THREADS = 32 * _WARPS  # of a block
_VECTOR = 4  # lanes: 128 bits of float32, and as many sums in registers for a shorter type
_CHAIN = 49  # products that are added up one by one, of 7x7 taps
_SMALL_GROUP = 9  # taps up to which the filter gradient has registers for tiles of several rows
_LINE = 128  # bytes of memory that are read at once
# Blocks that share the pixels in the filter gradient: 132 multiprocessors, 3 each, twice.
_BLOCKS = 132 * 3 * 2
_MAX_ELEMENTS = 2**31  # indices are 32 bits wide, as
_MAX_REACH = 2**30  # are positions and the differences between them
_MAX_PHASES = 16
_MIN_CAPABILITY = 8.0


class _Sizes(NamedTuple):
    """How much code a kernel has: registers limit it, and the time that its compilation takes."""

    tile: int  # results of a thread's tile
    height: int  # of that, if all taps are unrolled
    low: int  # and if not
    unrolled: int  # products of a tile beyond which the taps are looped over, row by row
    columns: int  # of the filter that are unrolled then
    group: int  # taps that a thread sums in the filter gradient


# Of 4x4 results 3x3 taps are unrolled. A row of taps loads less for 2x8 results than for 4x4.
_COMPILED = _Sizes(tile=16, height=4, low=2, unrolled=144, columns=8, group=28)
# XLA takes a second to compile what a CPU runs of this, and ten seconds for the other.
_INTERPRETED = _Sizes(tile=4, height=2, low=1, unrolled=16, columns=4, group=4)


def _sizes() -> _Sizes:
    return _INTERPRETED if interpret.value else _COMPILED


def unsupported(
    op: Op,
    spec: ConvSpec,
    platform: str | None,
    a: jax.ShapeDtypeStruct,
    b: jax.ShapeDtypeStruct,
) -> str | None:
    if len(spec.axes) > 2:
        return f"it has kernels for one and two spatial axes, got {len(spec.axes)}"
    if a.dtype.itemsize > 4:
        return f"it takes float16, bfloat16 and float32, got {a.dtype}"
    shapes = a.shape, b.shape, spec.result_shape(op, a.shape, b.shape)
    if any(math.prod(shape) >= _MAX_ELEMENTS for shape in shapes):
        return "operands and results must have less than 2**31 elements, got {} and {}: {}".format(
            *shapes
        )
    for axis in spec.axes:
        padded = axis.size + sum(axis.pads)
        if max(padded, axis.kernel * axis.dilation, axis.stride) >= _MAX_REACH:
            return "strides, dilated filters and the padded input must each span less than 2**30"
    if op == INPUT_GRAD and math.prod(spec.window_strides) > _MAX_PHASES:
        return f"strides may have a product of at most {_MAX_PHASES}, got {spec.window_strides}"
    if platform is None:
        return None
    for device in _devices():
        if float(device.compute_capability) < _MIN_CAPABILITY and not spec.interpret:
            return (
                f"it needs a compute capability of {_MIN_CAPABILITY}, got "
                f"{device.compute_capability} of {device.device_kind}"
            )
    return _load()


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    return _primitive.bind(x, f, op=FORWARD, spec=spec)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    return _primitive.bind(f, dy, op=INPUT_GRAD, spec=spec)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    return _primitive.bind(x, dy, op=FILTER_GRAD, spec=spec)


def _devices() -> list[Any]:
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


@functools.cache
def _load() -> str | None:
    """Imports Pallas, which takes longer than all of this package, or says why not."""
    try:
        _pallas()
    except ImportError as error:
        return f"this JAX has no Pallas for Triton: {error}"
    return None


def _pallas() -> tuple[types.ModuleType, types.ModuleType]:
    return (
        importlib.import_module("jax.experimental.pallas"),
        importlib.import_module("jax.experimental.pallas.triton"),
    )


_lock = threading.Lock()  # the filters of warnings are those of all threads


# A primitive of their own lowers the kernels, for what has to hold meanwhile.
_primitive = Primitive("depthwise_conv2d_pallas_gpu")


@_primitive.def_abstract_eval
def _abstract_eval(a, b, *, op, spec):
    return a.update(shape=spec.result_shape(op, a.shape, b.shape), weak_type=False)


def _lower(ctx, a, b, *, op, spec):
    device = None
    if not _devices():
        # JAX asks for one, which makes no difference to these kernels.
        device = AbstractDevice("NVIDIA A100-SXM4-40GB", num_cores=None, platform="gpu")
    with (
        _lock,
        interpret(spec.interpret),
        use_abstract_mesh(AbstractMesh((), (), abstract_device=device)),
        warnings.catch_warnings(),
    ):
        # Whoever calls this package can't do anything about the backend that it uses.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        kernel = functools.partial(_KERNELS[op.name], spec)
        return mlir.lower_fun(kernel, multiple_results=False)(ctx, a, b)


mlir.register_lowering(_primitive, _lower)


class _Vectors(NamedTuple):
    """Lanes (c, m) in groups of `width` neighbours, which are of `channels` channels."""

    width: int
    channels: int
    multiplier: int

    def first_channel(self, vector: jax.Array) -> jax.Array:
        if self.width >= self.multiplier:
            return vector * self.channels
        return lax.div(vector, np.int32(self.multiplier // self.width))

    def spread(self, x: jax.Array) -> jax.Array:
        """Each channel as often as it has lanes."""
        copies = self.width // self.channels
        wide = jnp.broadcast_to(x[:, :, None], (*x.shape, copies))
        return wide.reshape(x.shape[0], self.width) if copies > 1 else x

    def gather(self, y: jax.Array) -> jax.Array:
        """The sums of the lanes of each channel."""
        copies = self.width // self.channels
        return y.reshape(y.shape[0], self.channels, copies).sum(2) if copies > 1 else y


def _vectors(spec: ConvSpec, most: int = _VECTOR) -> _Vectors:
    """The widest that divide a channel's lanes, or are divided by them."""
    m, width = spec.multiplier, most
    while spec.channels * m % width or (width % m and m % width):
        width //= 2
    return _Vectors(width, max(1, width // m), m)


def _tile_sizes(rows: Axis, cols: Axis, by_rows: bool) -> tuple[int, int, bool]:
    """Height and width of a tile, and whether its taps are unrolled.

    A tile has all phases of each axis, which share what they read of the source, some times.
    """
    sizes = _sizes()
    height, width = _at_most(sizes.height, rows, cols)
    if _products(rows, height) * _products(cols, width) <= sizes.unrolled:
        return height, width, True
    return *_at_most(1 if by_rows else sizes.low, rows, cols), False


def _at_most(height: int, rows: Axis, cols: Axis) -> tuple[int, int]:
    phases = len(rows.phases), len(cols.phases)
    most = _sizes().tile // math.prod(phases)
    down = max(1, min(height // phases[0], most, rows.count))
    across = max(1, min(most // down, cols.count))
    if across > 4:
        # 8 or 7, as images of 224 pixels have it.
        across = min(across, across - 1, key=lambda size: -(-cols.count // size) * size)
    return down * phases[0], across * phases[1]


def _products(axis: Axis, size: int) -> int:
    return sum(len(axis.phases[i % len(axis.phases)]) for i in range(size))


def _tile_sums(op: Op, spec: ConvSpec, source: jax.Array, f: jax.Array) -> jax.Array:
    """forward and input_grad."""
    pl, _ = _pallas()
    rows, cols = axes(op, spec)
    vectors = _vectors(spec)
    # The vectors of dy that a sum of lanes takes.
    parts = 1 if op == FORWARD else max(1, spec.multiplier // vectors.width)
    # Long sums are sums of rows, which takes registers and an addition for each.
    by_rows = math.prod(spec.kernel_spatial) * parts > _CHAIN
    height, width, is_unrolled = _tile_sizes(rows, cols, by_rows)
    tiles_h, tiles_w = -(-rows.result // height), -(-cols.result // width)
    problems, batch = source.shape[:2]
    lanes = spec.channels * spec.multiplier
    is_forward = op == FORWARD
    count = lanes // vectors.width if is_forward else spec.channels // vectors.channels
    threads = problems * batch * tiles_h * tiles_w * count
    row_loop = _looped(rows, None if is_unrolled else 1)
    col_loop = _looped(cols, None if is_unrolled else _sizes().columns)

    def kernel(source_ref, f_ref, result_ref):
        # Threads beyond the last one do its work again.
        thread = pl.program_id(0) * _THREADS + _range(_THREADS)
        tile, vector = _divmod(jnp.minimum(thread, threads - 1), count)
        # Downwards: a block of tiles that are wider than high meets less of the source so.
        tile, tile_h = _divmod(tile, tiles_h)
        image, tile_w = _divmod(tile, tiles_w)
        if is_forward:
            lane, channel = vector * vectors.width, vectors.first_channel(vector)
        else:
            channel = vector * vectors.channels
            lane = channel * spec.multiplier
        filter_lane = lane
        if problems > 1:
            size = math.prod(spec.kernel_spatial) * lanes
            filter_lane += lax.div(image, np.int32(batch)) * size
        first_row = tile_h * (height // len(rows.phases) * rows.step)
        first_col = tile_w * (width // len(cols.phases) * cols.step)

        def add(part, rows, cols, shift, sums):
            """Adds the products of the taps of both axes, all moved on by `shift`."""

            @functools.cache
            def weight(r, s):
                tap = (r + shift[0].k) * spec.kernel_spatial[1] + s + shift[1].k
                index = filter_lane + part * vectors.width + tap * lanes
                return _load_vector(f_ref, index, vectors.width)

            sums = dict(sums)
            row_uses, col_uses = _uses(rows, height), _uses(cols, width)
            last_row, last_col = (
                {i: offset for offset, pairs in uses.items() for i, _ in pairs}
                for uses in (row_uses, col_uses)
            )
            for row_offset, row_pairs in row_uses.items():
                row = first_row + row_offset + shift[0].offset
                terms = {} if by_rows else sums
                for col_offset, col_pairs in col_uses.items():
                    col = first_col + col_offset + shift[1].offset
                    mask = _inside(row, rows.source) & _inside(col, cols.source)
                    pixel = (image * rows.source + row) * cols.source + col
                    if is_forward:
                        index = pixel * spec.channels + channel
                        value = _load_vector(source_ref, index, vectors.channels, mask)
                        value = vectors.spread(value)
                    else:
                        index = pixel * lanes + lane + part * vectors.width
                        value = _load_vector(source_ref, index, vectors.width, mask)
                    for i, r in row_pairs:
                        for j, s in col_pairs:
                            if (i, j) in terms:
                                terms[i, j] = _multiply_add(value, weight(r, s), terms[i, j])
                            else:
                                terms[i, j] = value * weight(r, s)
                            if by_rows and col_offset == last_col[j]:
                                sums[i, j] += terms[i, j]
                if is_unrolled and parts == 1:
                    # What has got its last row makes room for the others.
                    for i in [i for i, _ in row_pairs if last_row[i] == row_offset]:
                        sums = store(i, sums)
            return sums

        def add_rows(part, rows, shift, sums):
            def add_columns(trip, sums):
                return add(part, rows, col_loop.body, (shift, col_loop.shift(trip)), sums)

            sums = _loop(col_loop.trips, add_columns, sums)
            return add(part, rows, col_loop.rest, (shift, Tap(0, 0)), sums)

        def add_part(part, sums):
            def add_row(trip, sums):
                return add_rows(part, row_loop.body, row_loop.shift(trip), sums)

            sums = _loop(row_loop.trips, add_row, sums)
            return add_rows(part, row_loop.rest, Tap(0, 0), sums)

        def store(i, sums):
            """Stores a row of the tile, and returns what is left of it."""
            row = tile_h * height + i
            for j in range(width):
                col = tile_w * width + j
                pixel = (image * rows.result + row) * cols.result + col
                mask = (row < rows.result) & (col < cols.result)
                if is_forward:
                    _store_vector(result_ref, pixel * lanes + lane, sums[i, j], mask)
                else:
                    value = vectors.gather(sums[i, j])
                    _store_vector(result_ref, pixel * spec.channels + channel, value, mask)
            return {at: value for at, value in sums.items() if at[0] != i}

        zeros = jnp.zeros((_THREADS, vectors.width), jnp.float32)
        sums = {(i, j): zeros for i in range(height) for j in range(width)}
        sums = _loop(parts, add_part, sums)
        for i in sorted({i for i, _ in sums}):
            sums = store(i, sums)

    shapes = (source.shape, f.shape) if is_forward else (f.shape, source.shape)
    result = jax.ShapeDtypeStruct(spec.result_shape(op, *shapes), source.dtype)
    return _call(kernel, -(-threads // _THREADS), result, source, f)


class _Loop(NamedTuple):
    """The taps of an axis, some of each phase at a time and then the rest.

    The taps of a phase are evenly spaced, at the same distance in each phase.
    """

    trips: int
    body: Axis  # with the taps of the first trip
    step: Tap  # from one trip to the next
    rest: Axis

    def shift(self, trip) -> Tap:
        return Tap(trip * self.step.k, trip * self.step.offset)


def _looped(axis: Axis, most: int | None) -> _Loop:
    counts = [len(taps) for taps in axis.phases if taps]
    if most is None or not counts or min(counts) <= most:
        return _Loop(0, axis, Tap(0, 0), axis)
    # As many at a time as leave the fewest, for the compiler keeps more in registers for those.
    most = min(range(most, most // 2, -1), key=lambda size: min(counts) % size)
    trips = min(counts) // most
    first, second = next(taps for taps in axis.phases if taps)[:2]
    step = Tap(most * (second.k - first.k), most * (second.offset - first.offset))
    body = axis._replace(phases=[taps[:most] for taps in axis.phases])
    rest = axis._replace(phases=[taps[trips * most :] for taps in axis.phases])
    return _Loop(trips, body, step, rest)


def _uses(axis: Axis, size: int) -> dict[int, list[tuple[int, int]]]:
    """What a tile of `size` results reads: for each row of the source, counted from the tile's
    first, the results and the taps that meet there."""
    uses = {}
    for i in range(size):
        t, phase = divmod(i, len(axis.phases))
        for k, offset in axis.phases[phase]:
            uses.setdefault(offset + t * axis.step, []).append((i, k))
    return dict(sorted(uses.items()))


def _first(axis: Axis, taps: int) -> Axis:
    """The only phase of the axis with its first taps, counted from 0."""
    [phase] = axis.phases
    return axis._replace(phases=[[Tap(i, tap.offset) for i, tap in enumerate(phase[:taps])]])


def _even_share(count: int, most: int) -> int:
    """The size of the shares if `count` are dealt out evenly, at most `most` to each."""
    return -(-count // -(-count // most))


def _tile_side(size: int, most: int) -> int:
    """One that divides the size, if one of at least half of what it may be does."""
    sides = range(most, most // 2 - 1, -1)
    return next((side for side in sides if side and size % side == 0), min(most, size))


def _filter_sums(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    """filter_grad."""
    pl, _ = _pallas()
    rows, cols = axes(FILTER_GRAD, spec)
    taps_h, taps_w = (axis.phases[0] for axis in (rows, cols))
    shape = spec.result_shape(FILTER_GRAD, x.shape, dy.shape)
    if not taps_h or not taps_w:
        return jnp.zeros(shape, x.dtype)
    problems, batch = x.shape[:2]
    lanes = spec.channels * spec.multiplier
    sizes = _sizes()
    taps = len(taps_h) * len(taps_w)
    # Where the taps are more than a group, what the groups read again is less with larger tiles,
    # for which shorter vectors leave the registers.
    vectors = _vectors(spec, _VECTOR // 2 if taps > sizes.group else _VECTOR)
    is_tall = taps > sizes.group or taps <= _SMALL_GROUP
    count = lanes // vectors.width
    # Neighbouring threads of a block read one line of memory, the others other pixels.
    abreast = min(pl.next_power_of_2(count), _LINE // (vectors.width * x.dtype.itemsize))
    slots = _THREADS // abreast
    columns = -(-count // abreast)
    group_w = _even_share(len(taps_w), sizes.group)
    group_h = _even_share(len(taps_h), sizes.group // group_w)
    groups_h, groups_w = -(-len(taps_h) // group_h), -(-len(taps_w) // group_w)
    width = _tile_side(cols.result, sizes.height)
    height = _tile_side(rows.result, sizes.height if is_tall else 1)
    overhang = rows.result % height or cols.result % width
    tiles_h, tiles_w = -(-rows.result // height), -(-cols.result // width)
    tiles = batch * tiles_h * tiles_w
    blocks = problems * groups_h * groups_w * columns
    # Partial sums, by blocks that each make some trips over tiles of all slots.
    trips = -(-tiles // (slots * max(1, _BLOCKS // blocks)))
    shares = -(-tiles // (slots * trips))
    dilation_h, dilation_w = spec.rhs_dilation
    row_uses = _uses(_first(rows, group_h), height)
    col_uses = _uses(_first(cols, group_w), width)

    def kernel(x_ref, dy_ref, partial_ref):
        block, column = _divmod(pl.program_id(0), columns)
        block, group_col = _divmod(block, groups_w)
        block, group_row = _divmod(block, groups_h)
        share, problem = _divmod(block, problems)
        slot, place = _divmod(_range(_THREADS), abreast)
        # Threads beyond the last vector do its work again.
        vector = jnp.minimum(column * abreast + place, count - 1)
        lane, channel = vector * vectors.width, vectors.first_channel(vector)

        def add_tile(trip, sums):
            sums = dict(sums)
            tile = (share * trips + trip) * slots + slot
            live = tile < tiles
            image, tile_w = _divmod(tile, tiles_w)
            image, tile_h = _divmod(image, tiles_h)
            image += problem * batch
            row, col = tile_h * height, tile_w * width
            y, met = {}, {}
            for i in range(height):
                for j in range(width):
                    met[i, j] = live
                    if overhang:
                        met[i, j] &= (row + i < rows.result) & (col + j < cols.result)
                    pixel = (image * rows.result + row + i) * cols.result + col + j
                    y[i, j] = _load_vector(dy_ref, pixel * lanes + lane, vectors.width, met[i, j])
            row = row * rows.step + group_row * (group_h * dilation_h)
            col = col * cols.step + group_col * (group_w * dilation_w)
            for u, row_pairs in row_uses.items():
                for v, col_pairs in col_uses.items():
                    pixel = (image * rows.source + row + u) * cols.source + col + v
                    mask = live & _inside(row + u, rows.source) & _inside(col + v, cols.source)
                    index = pixel * spec.channels + channel
                    value = _load_vector(x_ref, index, vectors.channels, mask)
                    value = vectors.spread(value)
                    for i, r in row_pairs:
                        for j, s in col_pairs:
                            # A zero of dy is not enough: x may be infinite where no window is.
                            term = jnp.where(met[i, j][:, None], value, 0) if overhang else value
                            sums[r, s] = _multiply_add(term, y[i, j], sums[r, s])
            return sums

        zeros = jnp.zeros((_THREADS, vectors.width), jnp.float32)
        sums = {(r, s): zeros for r in range(group_h) for s in range(group_w)}
        sums = _loop(trips, add_tile, sums)
        lane = jnp.minimum(column * abreast + _range(abreast), count - 1) * vectors.width
        problem_taps = (share * problems + problem) * (len(taps_h) * len(taps_w))
        for (r, s), value in sums.items():
            value = value.reshape(slots, abreast, vectors.width).sum(0)
            row, col = group_row * group_h + r, group_col * group_w + s
            mask = jnp.broadcast_to((row < len(taps_h)) & (col < len(taps_w)), (abreast,))
            tap = problem_taps + row * len(taps_w) + col
            _store_vector(partial_ref, tap * lanes + lane, value, mask)

    sums = jax.ShapeDtypeStruct(
        (shares, problems, len(taps_h), len(taps_w), spec.channels, spec.multiplier), jnp.float32
    )
    df = _call(kernel, shares * blocks, sums, x, dy).sum(0).astype(x.dtype)
    # Taps that only ever met the padding have no gradient.
    unused = [
        (taps[0].k, size - 1 - taps[-1].k)
        for taps, size in zip((taps_h, taps_w), spec.kernel_spatial, strict=True)
    ]
    return jnp.pad(df, [(0, 0), *unused, (0, 0), (0, 0)])


_KERNELS: dict[str, Callable[[ConvSpec, jax.Array, jax.Array], jax.Array]] = {
    "forward": functools.partial(_tile_sums, FORWARD),
    "input_grad": lambda spec, f, dy: _tile_sums(INPUT_GRAD, spec, dy, f),
    "filter_grad": _filter_sums,
}


def _call(
    kernel: Callable, blocks: int, result: jax.ShapeDtypeStruct, *operands: jax.Array
) -> jax.Array:
    """Runs the kernel on flat operands."""
    pl, triton = _pallas()
    flat = pl.pallas_call(
        kernel,
        grid=(blocks,),
        out_shape=jax.ShapeDtypeStruct(
            (math.prod(result.shape),),
            result.dtype,
            manual_axis_type=jax.typeof(operands[0]).manual_axis_type,
        ),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret.value,
        name="depthwise_conv2d",
    )(*(operand.reshape(-1) for operand in operands))
    return flat.reshape(result.shape)


def _range(size: int) -> jax.Array:
    return lax.iota(jnp.int32, size)


def _divmod(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """Of non-negative numbers, without the code that the sign of others would take."""
    quotient = lax.div(a, np.int32(b))
    return quotient, a - quotient * b


def _inside(index: jax.Array, size: int) -> jax.Array:
    return (index >= 0) & (index < size)


def _loop(trips: int, body: Callable, init):
    if trips < 2:
        return body(np.int32(0), init) if trips else init
    return lax.fori_loop(np.int32(0), np.int32(trips), body, init)


def _load_vector(ref, first: jax.Array, width: int, mask: jax.Array | None = None) -> jax.Array:
    """`width` neighbours for each thread, in float32; zeros where the mask is not set."""
    _, triton = _pallas()
    index = first[:, None] + _range(width)[None]
    if mask is None:
        value = triton.load(ref.at[index])
    else:
        mask = jnp.broadcast_to(mask[:, None], index.shape)
        value = triton.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))
    if value.dtype == jnp.bfloat16 and width > 1 and not interpret.value:
        # Two at a time, an instruction each.
        [value] = triton.elementwise_inline_asm(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            args=[value],
            constraints="=&r,=r,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(value.shape, jnp.float32)],
        )
    return value.astype(jnp.float32)


def _store_vector(ref, first: jax.Array, value: jax.Array, mask: jax.Array) -> None:
    _, triton = _pallas()
    index = first[:, None] + _range(value.shape[1])[None]
    mask = jnp.broadcast_to(mask[:, None], index.shape)
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """a * b + c in one instruction, which XLA does not make of it."""
    if interpret.value:
        return a * b + c
    _, triton = _pallas()
    [value] = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, c],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, jnp.float32)],
    )
    return value


def _rank(spec: ConvSpec, platform: str | None) -> int:
    # After lax, until a device has timed both.
    return 3


IMPLEMENTATION = Implementation(
    name="pallas_gpu",
    unsupported=unsupported,
    rank=_rank,
    forward=forward,
    input_grad=input_grad,
    filter_grad=filter_grad,
    platform="cuda",
    device="an NVIDIA GPU",
    is_pallas=True,
    is_opaque=True,
    is_stable=False,
)
