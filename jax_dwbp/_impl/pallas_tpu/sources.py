"""How the kernels read their source: in place, or from a copy with zeros around."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_dwbp._impl.pallas_tpu.plan import (
    LANES,
    Piece,
    Plan,
    ceil_div,
    even_piece,
)
from jax_dwbp._impl.taps import Tap
from jax_dwbp._spec import FILTER_GRAD, INPUT_GRAD

# Registers that a body of a loop copies.
_COPIED = 256


def readers_of(plan: Plan, ids, source_ref, scratch_ref=None) -> list[Callable]:
    """For each chunk, of a piece of rows and one of columns makes the function that reads them.

    read(offset, tap) are the values that the columns of the piece meet at a tap, in the row that is
    `offset` from the first: of all columns or of a slice, beyond which all are zeros, with it; or
    None if all are.
    """
    if scratch_ref is None:
        return [functools.partial(_reader, plan, ids, source_ref)]
    _fill(plan, ids, source_ref, scratch_ref)
    return [functools.partial(_copy_reader, plan, scratch_ref.at[m]) for m in range(plan.chunks)]


def _copy_reader(plan: Plan, scratch_ref, rows: Piece, columns: Piece) -> Callable:
    window, step = plan.columns, plan.columns.axis.step

    def read(offset, tap: Tap):
        row = plan.rows.position(rows, offset)
        if plan.rows.outside(row):
            return None
        at = pl.ds(step * columns.start + tap.offset + window.border, columns.count, stride=step)
        return scratch_ref.at[row + plan.rows.border][at], slice(0, columns.count)

    return read


def _reader(plan: Plan, ids, source_ref, rows: Piece, columns: Piece) -> Callable:
    *_, h, w = ids
    window, step = plan.columns, plan.columns.axis.step

    def load(row, first: int, count: int):
        """`count` columns for all the taps of a run, and the first of them that there is."""
        start = window.position(columns, first)
        low, high = 0, count
        if window.tiles == 1 and isinstance(start, int):
            low = max(0, ceil_div(-start, step))
            high = min(count, ceil_div(window.axis.source - start, step))
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
        values = mask_batch(plan, ids[2], loaded[0].astype(jnp.float32))
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


def _fill(plan: Plan, ids, source_ref, scratch_ref):
    rows, columns = plan.rows, plan.columns
    unit, registers = plan.unit
    _, _, image, h, w = ids

    def copy(r, source_row, c, source_column, n, inside):
        values = source_ref[source_row, pl.ds(source_column, n)].astype(jnp.float32)
        if inside is not True:
            values = jnp.where(inside, values, 0.0)
        values = mask_batch(plan, image, values)
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

            loop(columns.scratch, 1, column, None)
            return
        first, last = columns.copied
        # Beyond these only what there is not in the result is computed from.
        start, stop = columns.read
        zero(r, start, first - start)
        filled = first + ceil_div(last - first, unit) * unit
        zero(r, filled, stop - filled)

        def piece(c, n, carry):
            copy(r, source_row, first + c, first + c - columns.border, n, inside)
            return carry

        loop(last - first, _COPIED * unit // registers, piece, None)

    def copy_rows(first, last, known):
        def block(r, n, carry):
            for i in range(n):
                copy_row(first + r + i, known)
            return carry

        of_a_row = ceil_div(columns.scratch * registers, unit)
        loop(last - first, even_piece(last - first, max(1, _COPIED // of_a_row)), block, None)

    if rows.tiles > 1:
        copy_rows(0, rows.scratch, False)
        return
    first, last = rows.copied
    if plan.bordered:
        loop(first, 1, zero_row, None)
        loop(rows.scratch - last, 1, lambda r, n, carry: zero_row(last + r, n, carry), None)
    copy_rows(first, last, True)


def _widen(plan: Plan, values) -> list[jax.Array]:
    """Values of C lanes as the registers of C*M lanes, each channel M times in a row."""
    multiplier = plan.spec.multiplier
    if plan.op == INPUT_GRAD or multiplier == 1:
        return [values[..., i : i + LANES] for i in range(0, values.shape[-1], LANES)]
    return [
        gather(values, lambda lane, i=i: lax.div(lane + i * LANES, jnp.int32(multiplier)))
        for i in range(plan.chunks)
    ]


def loop(count: int, size: int, body: Callable, carry):
    """carry = body(start, size, carry) for whole pieces, of which a loop is made, and the rest."""
    whole = count // size
    if whole == 1:
        carry = body(0, size, carry)
    elif whole:

        def step(i, carry):
            return body(pl.multiple_of(i * size, size), size, carry)

        carry = lax.fori_loop(0, whole, step, carry)
    return body(whole * size, count % size, carry) if count % size else carry


def mask_batch(plan: Plan, n, values):
    """Zeros for what a block has beyond the last image, where filter_grad sums over images."""
    block = plan.block["n"]
    if plan.op != FILTER_GRAD or plan.batch % block == 0:
        return values
    image = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 5 + plan.view.index("n"))
    return jnp.where(n * block + image < plan.batch, values, 0.0)


def gather(values, index: Callable) -> jax.Array:
    """values[..., index(lane)] for each of 128 lanes."""
    pad = LANES - values.shape[-1]
    if pad:
        values = jnp.concatenate([values, jnp.zeros((*values.shape[:-1], pad), values.dtype)], -1)
    flat = values.reshape(-1, LANES)
    lane = lax.broadcasted_iota(jnp.int32, flat.shape, 1)
    at = jnp.minimum(index(lane), LANES - 1)
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
