"""Sums over the taps (r, s) of shifted slices times a row of the filter, fused by XLA to one loop.

Everything is elementwise in the channels, so a multiplier becomes C*M independent lanes: x is
repeated M times beforehand, or the M lanes of each channel are summed afterwards.

Rounding: products are summed along a row of at most `_CHAIN` taps, rows pairwise, so an error grows
with the logarithm of the filter's size and not with the size.
"""

import functools
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jax_dwbp._impl import Implementation, depth
from jax_dwbp._impl.taps import Tap, axes, looped_sum, meeting, pairwise, strided, widen
from jax_dwbp._spec import FILTER_GRAD, FORWARD, INPUT_GRAD, ConvSpec, Op, SpatialAxis

T = TypeVar("T")

# Taps beyond which the rows of the filter are looped over: unrolled, XLA needs 0.2 s for 49 taps
# on a CPU and its time grows faster than the taps.
_UNROLLED = 49
# Columns of the filter are always unrolled: 63 take XLA 0.3 s, in the filter gradient some seconds.
_MAX_COLUMNS = 63
# A stride of 4 x 4 has 16 phases, each a sum of its own.
_MAX_PHASES = 16
# The lanes of a channel are summed slice by slice: 256 take XLA 0.3 s.
_MAX_LANES = 256
# The padded input is built, as a multiple of what there is to compute from it.
_MAX_PADDED = 64
# Taps of a running sum.
_CHAIN = 5
# Products that one loop over x and dy reduces in the filter gradient: of 1, 3, 5, 7, 9 and 49, 9 is
# the best for 3x3 and within 5% of the best for 5x5 and 7x7.
_REDUCED = 9
# Columns of the output that are reduced one after the other in the filter gradient.
_MAX_RUN, _RUN = 128, 64


def unsupported(
    op: Op, spec: ConvSpec, platform: str | None, *operands: jax.ShapeDtypeStruct
) -> str | None:
    del platform
    r, s = spec.kernel_spatial[-2:]
    if r * s > _UNROLLED and s > _MAX_COLUMNS:
        return f"filters above {_UNROLLED} taps may have at most {_MAX_COLUMNS} columns, got {s}"
    if op == INPUT_GRAD and math.prod(spec.window_strides) > _MAX_PHASES:
        return f"strides may have a product of at most {_MAX_PHASES}, got {spec.window_strides}"
    if op == INPUT_GRAD and spec.multiplier > _MAX_LANES:
        return f"the depth multiplier may be at most {_MAX_LANES}, got {spec.multiplier}"
    padded = math.prod(map(_padded_size, spec.axes))
    arrays = math.prod(spec.in_spatial) + math.prod(spec.out_spatial)
    if op != INPUT_GRAD and padded > _MAX_PADDED * max(1, arrays):
        return f"nearly all of the padded input may not be padding, got {spec.padding}"
    return None


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    if len(spec.axes) == 3:
        return depth.forward(forward, spec, x, f)
    rows, cols = (axis.phases[0] for axis in axes(FORWARD, spec))
    y = _weighted_sum(
        widen(_repeat(x, spec.multiplier)),
        widen(_lanes(f)),
        rows,
        cols,
        spec.out_spatial,
        spec.window_strides,
    )
    return y.astype(x.dtype)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    if len(spec.axes) == 3:
        return depth.input_grad(input_grad, spec, f, dy)
    row_axis, col_axis = axes(INPUT_GRAD, spec)
    h, w = spec.in_spatial
    stride_h, stride_w = spec.window_strides
    counts = row_axis.count, col_axis.count
    wide_f, wide_dy = widen(_lanes(f)), widen(dy)
    dx = jnp.stack(
        [
            jnp.stack(
                [
                    _weighted_sum(wide_dy, wide_f, rows, cols, counts, (1, 1))
                    for cols in col_axis.phases
                ],
                axis=4,
            )
            for rows in row_axis.phases
        ],
        axis=3,
    )  # [G,N,counts[0],stride_h,counts[1],stride_w,C*M]
    dx = dx.reshape(*dx.shape[:2], counts[0] * stride_h, counts[1] * stride_w, dx.shape[6])
    # The lanes of a channel as strided slices: a reduction over a minor axis of M does not fuse.
    lanes = [dx[:, :, :h, :w, m :: spec.multiplier] for m in range(spec.multiplier)]
    return pairwise(lanes).astype(dy.dtype)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    if len(spec.axes) == 3:
        return depth.filter_grad(filter_grad, spec, x, dy)
    rows, cols = (axis.phases[0] for axis in axes(FILTER_GRAD, spec))
    problems, _, p, q, lanes = dy.shape
    shape = (*spec.kernel_spatial, problems, spec.channels, spec.multiplier)
    if not rows or not cols:
        return jnp.moveaxis(jnp.zeros(shape, x.dtype), 2, 0)
    # A run of output columns is one chain of additions, so long rows are cut into several.
    runs, run = (-(-q // _RUN), _RUN) if q > _MAX_RUN else (1, q)
    stride_h, stride_w = spec.window_strides
    wide_dy = jnp.pad(widen(dy), [(0, 0)] * 3 + [(0, runs * run - q), (0, 0)])
    wide_dy = wide_dy.reshape(*dy.shape[:3], runs, run, lanes)
    wide_x, rows, cols = _pad(
        widen(_repeat(x, spec.multiplier)), rows, cols, (p, runs * run), spec.window_strides
    )

    def row_grads(offset) -> list[jax.Array]:
        slab = strided(wide_x, offset, p, stride_h, axis=2)
        return [
            lax.mul(
                strided(slab, col.offset, runs * run, stride_w, axis=3).reshape(wide_dy.shape),
                wide_dy,
            )
            for col in cols
        ]

    def reduce(products: list[jax.Array]) -> jax.Array:
        """The sums of the products over N, P and Q, by one loop over x and dy for each group."""
        zero = jnp.zeros((), wide_dy.dtype)
        partials = [
            partial
            for group in _groups(products, _REDUCED)
            for partial in lax.reduce(group, [zero] * len(group), _add_all, (4,))
        ]
        return jnp.stack([jnp.sum(partial, (1, 2, 3)) for partial in partials])

    if len(rows) * len(cols) <= _UNROLLED:
        df = reduce([product for row in rows for product in row_grads(row.offset)])
    else:
        df = lax.map(
            lambda offset: reduce(row_grads(offset)), jnp.array([row.offset for row in rows])
        )
    df = df.reshape(len(rows), len(cols), *shape[2:]).astype(x.dtype)
    # Taps that only ever met the padding have no gradient.
    unused = [
        (taps[0].k, size - 1 - taps[-1].k)
        for taps, size in zip((rows, cols), spec.kernel_spatial, strict=True)
    ]
    return jnp.moveaxis(jnp.pad(df, [*unused, (0, 0), (0, 0), (0, 0)]), 2, 0)


def _repeat(x: jax.Array, multiplier: int) -> jax.Array:
    """[..., C] as [..., C*M]."""
    wide = jnp.broadcast_to(x[..., None], (*x.shape, multiplier))
    return wide.reshape(*x.shape[:-1], x.shape[-1] * multiplier)


def _lanes(f: jax.Array) -> jax.Array:
    """[G,R,S,C,M] as [G,R,S,C*M]."""
    return f.reshape(*f.shape[:3], f.shape[3] * f.shape[4])


def _padded_size(axis: SpatialAxis) -> int:
    """What `_pad` makes of the axis."""
    first, last = meeting(axis)
    low = max(0, axis.pads[0] - first * axis.dilation)
    end = last * axis.dilation - axis.pads[0] + (axis.out - 1) * axis.stride + 1
    high = max(0, end - axis.size)
    return low + axis.size + high if first <= last else 0


def _weighted_sum(
    a: jax.Array,
    f: jax.Array,
    rows: list[Tap],
    cols: list[Tap],
    counts: tuple[int, ...],
    strides: tuple[int, ...],
) -> jax.Array:
    """Sum over the taps of f[:, row.k, col.k] times what they read of a, `counts` elements."""
    shape = (*a.shape[:2], *counts, a.shape[4])
    if not rows or not cols:
        return jnp.zeros(shape, a.dtype)
    a, rows, cols = _pad(a, rows, cols, counts, strides)

    def row_sum(k, offset) -> jax.Array:
        slab = strided(a, offset, counts[0], strides[0], axis=2)
        weights = strided(f, k, 1, 1, axis=1)
        products = [
            lax.mul(
                strided(slab, col.offset, counts[1], strides[1], axis=3),
                lax.broadcast_in_dim(strided(weights, col.k, 1, 1, axis=2), shape, (0, 2, 3, 4)),
            )
            for col in cols
        ]
        return pairwise([functools.reduce(lax.add, chain) for chain in _groups(products, _CHAIN)])

    if len(rows) == 1 or len(rows) * len(cols) <= _UNROLLED:
        return pairwise([row_sum(*row) for row in rows])

    # The taps of a phase are evenly spaced.
    first, step = rows[0], Tap(rows[1].k - rows[0].k, rows[1].offset - rows[0].offset)
    zeros = lax.full_like(a, 0, shape=shape)
    return looped_sum(
        len(rows), lambda i: row_sum(first.k + i * step.k, first.offset + i * step.offset), zeros
    )


def _pad(
    a: jax.Array,
    rows: list[Tap],
    cols: list[Tap],
    counts: tuple[int, ...],
    strides: tuple[int, ...],
) -> tuple[jax.Array, list[Tap], list[Tap]]:
    """`a` with the zeros that the taps read beyond its edges, and the taps' offsets into it."""
    config, shifted = [(0, 0, 0)] * 5, []
    for axis, taps in ((2, rows), (3, cols)):
        offsets = [tap.offset for tap in taps]
        span = (counts[axis - 2] - 1) * strides[axis - 2] + 1
        low, high = max(0, -min(offsets)), max(0, max(offsets) + span - a.shape[axis])
        config[axis] = (low, high, 0)
        shifted.append([Tap(tap.k, tap.offset + low) for tap in taps])
    return lax.pad(a, jnp.zeros((), a.dtype), config), *shifted


def _groups(terms: list[T], most: int) -> list[list[T]]:
    """The terms in as few groups, of even size, as have at most `most` of them."""
    count = -(-len(terms) // most)
    return [terms[i * len(terms) // count : (i + 1) * len(terms) // count] for i in range(count)]


def _add_all(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [lax.add(u, v) for u, v in zip(a, b, strict=True)]


def _rank(spec: ConvSpec, platform: str | None) -> int:
    # On a CPU it takes a third to a 450th of lax's time, and more than that only for a single
    # channel with a multiplier of 64 or more, which is a dense convolution.
    return 2


IMPLEMENTATION = Implementation(
    name="xla_taps",
    unsupported=unsupported,
    rank=_rank,
    forward=forward,
    input_grad=input_grad,
    filter_grad=filter_grad,
)
