"""The kernels of a plan."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_dwbp._impl.pallas_tpu.plan import (
    LANES,
    REGISTERS,
    SUBLANES,
    Piece,
    Plan,
    best_plan,
    sublanes_of,
)
from jax_dwbp._impl.pallas_tpu.sources import gather, loop, mask_batch, readers_of
from jax_dwbp._impl.taps import Tap
from jax_dwbp._spec import FILTER_GRAD, FORWARD, INPUT_GRAD, ConvSpec, Op

_SPARE = 6 << 20  # bytes of VMEM, for what the compiler adds
# Gathers that sum the lanes of each channel beyond which a loop makes them, a lane at a time.
_GATHERED = 64


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    return _sum_taps(FORWARD, spec, x, f)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    return _sum_taps(INPUT_GRAD, spec, dy, f)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    plan = _plan_of(FILTER_GRAD, spec, x)
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
    height, width = spec.out_spatial if op == FORWARD else spec.in_spatial
    channels = spec.channels * (spec.multiplier if op == FORWARD else 1)
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


def _plan_of(op: Op, spec: ConvSpec, source: jax.Array) -> Plan:
    plan = best_plan(op, spec, source.shape[1], source.dtype)
    if plan is None:
        raise NotImplementedError("`unsupported` says why")
    return plan


def _call(plan: Plan, kernel: Callable, operands: dict[str, Any], out_shape, out_spec) -> Any:
    arrays, in_specs = zip(*operands.values(), strict=True)
    # filter_grad sums over the images, rows and columns.
    semantics: Any = "arbitrary" if plan.op == FILTER_GRAD else "parallel"
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
            interpret=plan.spec.interpret,
            name=f"depthwise_{plan.op}",
        )(*arrays)


def _sum_taps_kernel(plan: Plan, source_ref, f_ref, result_ref, *scratch):
    source_ref, result_ref = (_spatial(plan, ref) for ref in (source_ref, result_ref))
    readers = readers_of(plan, _program_ids(), source_ref, *scratch)
    height, width = plan.accumulators
    phases = dict(enumerate(plan.rows.axis.phases))

    def block(rows: Piece, columns: Piece, _):
        reads = [reader(rows, columns) for reader in readers]
        sums = functools.partial(_weighted_sums, plan, f_ref, reads, rows.count, columns.count)
        totals = _looped(sums, phases) if plan.loops else sums(phases)
        for r in range(rows.count):
            for a in phases:
                row = len(phases) * (rows.start + r) + a
                _store(plan, result_ref, row, columns, totals[a, r])

    def row_block(rows: Piece, _):
        body = functools.partial(block, rows)
        return plan.columns.each(width, not plan.copies, body, None)

    plan.rows.each(height, True, row_block, None)


def _program_ids() -> list[jax.Array]:
    """Of the axes g, c, n, h and w; known to the interpreter outside of loops alone."""
    return [pl.program_id(axis) for axis in range(5)]


def _spatial(plan: Plan, ref):
    """The block as [H, W, tile]."""
    return ref.at[(0,) * plan.view.index("h")]


def _narrow(plan: Plan, chunks: list[jax.Array]) -> jax.Array:
    """The sums of the M lanes of each channel."""
    multiplier = plan.spec.multiplier
    if multiplier == 1:
        return chunks[0]
    lanes = lax.broadcasted_iota(jnp.int32, chunks[0].shape, chunks[0].ndim - 1) * multiplier

    def every(m) -> jax.Array:
        """The m-th lane of each channel, out of the register that it is in."""
        parts = [
            gather(chunk, lambda lane: lax.rem(lane * multiplier + m, jnp.int32(LANES)))
            for chunk in chunks
        ]
        result = parts[0]
        for i, part in enumerate(parts[1:], 1):
            result = jnp.where(lanes + m >= i * LANES, part, result)
        return result

    if multiplier * len(chunks) > _GATHERED:
        return lax.fori_loop(1, multiplier, lambda m, total: total + every(m), every(0))
    return functools.reduce(lax.add, [every(m) for m in range(multiplier)])


def _store(plan: Plan, result_ref, row, columns: Piece, sums):
    """Stores the sums of each phase of the columns, which alternate."""
    phases = len(sums)
    narrow = [_narrow(plan, s) if plan.op == INPUT_GRAD else s for s in sums]
    lanes = result_ref.shape[-1]

    def put(values, first):
        values = values if phases == 1 else jnp.stack(values, 1).reshape(-1, *plan.tile)
        size = min(LANES, lanes - first)
        at = pl.ds(phases * columns.start, phases * columns.count)
        result_ref[row, at, ..., first : first + size] = values[..., :size].astype(plan.dtype)

    if plan.op == INPUT_GRAD:
        put(narrow if phases > 1 else narrow[0], 0)
    else:
        for m, values in enumerate(narrow[0]):
            put(values, m * LANES)


def _weighted_sums(plan: Plan, f_ref, reads, height: int, width: int, phases: dict):
    """sums[a, r][b][chunk] of the row r of a phase a of `phases` and all phases b of columns.

    `reads` has for each chunk what `readers_of` describes.
    """
    shape = (width, *plan.tile)
    column_phases = plan.columns.axis.phases
    sums: dict[Any, jax.Array] = {}
    for m, read in enumerate(reads):

        @functools.cache
        def weight(a, i, j, m=m) -> jax.Array:
            lanes = slice(m * LANES, m * LANES + plan.tile[-1])
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


def _meetings(plan: Plan, phases: dict[int, list[Tap]], height: int) -> list[tuple[Any, list]]:
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


def _filter_grad_kernel(plan: Plan, x_ref, dy_ref, df_ref, *scratch):
    ids = _program_ids()

    @pl.when((ids[2] == 0) & (ids[3] == 0) & (ids[4] == 0))
    def _():
        df_ref[...] = jnp.zeros(df_ref.shape, jnp.float32)

    x_ref, dy_ref = _spatial(plan, x_ref), _spatial(plan, dy_ref)
    [row_taps], [column_taps] = plan.rows.axis.phases, plan.columns.axis.phases
    for m, reader in enumerate(readers_of(plan, ids, x_ref, *scratch)):
        add = functools.partial(_add_filter_rows, plan, ids, reader, dy_ref, df_ref, m)
        if plan.loops:

            def add_row(i, carry, add=add):
                add([_evenly(row_taps, i)])
                return carry

            lax.fori_loop(0, len(row_taps), add_row, None)
        else:
            several = max(1, REGISTERS // 2 // len(column_taps))
            for i in range(0, len(row_taps), several):
                add(row_taps[i : i + several])


def _add_filter_rows(plan: Plan, ids, reader: Callable, dy_ref, df_ref, m: int, row_taps):
    """Adds to some rows of the gradient, whose sums are in registers all the while."""
    rows, columns = plan.rows, plan.columns
    [column_taps] = columns.axis.phases
    unit = sublanes_of(plan.dtype) if plan.view[-2] == "w" else 1
    height, width = plan.accumulators
    lanes = slice(m * LANES, min((m + 1) * LANES, dy_ref.shape[-1]))

    def load_dy(row: Piece, piece: Piece):
        """And which of it there is, where that is not known."""
        at = row.start, pl.ds(piece.start, piece.count), ..., lanes
        dy = mask_batch(plan, ids[2], dy_ref[at].astype(jnp.float32))
        exists = []
        if not rows.exist(row):
            exists.append(ids[3] * rows.tile + row.start < rows.axis.count)
        if not columns.exist(piece):
            column = piece.start + lax.broadcasted_iota(jnp.int32, dy.shape, 0)
            exists.append(ids[4] * columns.tile + column < columns.axis.count)
        return dy, exists

    def block(rows: Piece, columns: Piece, totals):
        totals = [list(row) for row in totals]
        read = reader(rows, columns)
        each_row = [Piece(rows.start + r, 1, rows.inside) for r in range(rows.count)]
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
        if plan.view[-2] == "n" and shape[1] % SUBLANES == 0:
            shape = (1, SUBLANES, shape[2])  # images are summed anyway
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
        return loop(whole, width, lambda c, n, totals: body(Piece(c, n, False), totals), totals)

    if whole:
        region(width, whole_registers)
    if rest:
        region(rest, lambda body, totals: body(Piece(whole, rest, False), totals))
