"""The reference: `lax.conv_general_dilated` with `feature_group_count`, the transposes written out.

All G problems are folded into the channels, where groups keep them apart. With d the dilation, s
the stride and l the low padding of an axis, the forward correlation pairs the input row i with the
output row o and the filter row k where i = s*o - l + d*k. Solving for the row of each result gives
the three convolutions below: the padding is what makes their sizes come out, negative pads crop.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import conv_general_dilated  # lax's own: `in_place_of_lax` may put ours in jax.lax

from jax_dwbp._impl import Implementation
from jax_dwbp._spec import ConvSpec, Op, Pair

# XLA's kernel for a CPU counts the positions of a window in float32. Where that rounds, it may miss
# the last one, and its results are what the memory held.
_MAX_POSITIONS = 2**24


def unsupported(
    op: Op, spec: ConvSpec, platform: str | None, *operands: jax.ShapeDtypeStruct
) -> str | None:
    if platform != "cpu":
        return None
    for axis in spec.axes:
        positions = {
            "forward": sum(axis.pads) + axis.size - axis.reach,
            "input_grad": axis.size,
            "filter_grad": axis.reach + 1,
        }[op.name]
        if positions > _MAX_POSITIONS:
            return (
                f"on a CPU a window may have at most 2**24 positions along an axis, before "
                f"strides, got {positions}"
            )
    return None


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    kernel = _fold_filter(f)
    *window, groups, multiplier = kernel.shape
    y = _conv(
        spec,
        _fold(x),
        kernel.reshape(*window, 1, groups * multiplier),
        window_strides=spec.window_strides,
        padding=spec.padding,
        rhs_dilation=spec.rhs_dilation,
        feature_group_count=groups,
    )
    return _unfold(y, x.shape[0], spec.channels * spec.multiplier)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    # i + l = s*o + d*k: a correlation of the stretched dy with the flipped filter.
    padding = []
    for axis in spec.axes:
        low, window = axis.pads[0], (axis.out - 1) * axis.stride + 1
        padding.append((axis.reach - low, axis.size + low - window))
    rank = len(spec.axes)
    rhs = lax.rev(_fold_filter(f), range(rank)).swapaxes(-1, -2)
    dx = _conv(
        spec,
        _fold(dy),
        rhs,
        window_strides=(1,) * rank,
        padding=padding,
        lhs_dilation=spec.window_strides,
        rhs_dilation=spec.rhs_dilation,
        feature_group_count=rhs.shape[-1],
    )
    return _unfold(dx, f.shape[0], spec.channels)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    # d*k = i + l - s*o: a correlation of x with the dilated dy, N as the features it sums over.
    padding = []
    for axis in spec.axes:
        low, window = axis.pads[0], (axis.out - 1) * axis.stride + 1
        padding.append((low, axis.reach + window - axis.size - low))
    df = _conv(
        spec,
        _fold(x).swapaxes(0, -1),
        jnp.moveaxis(_fold(dy), 0, -2),
        window_strides=spec.rhs_dilation,
        padding=padding,
        rhs_dilation=spec.window_strides,
        batch_group_count=x.shape[0] * spec.channels,
    )[0]
    return jnp.moveaxis(
        df.reshape(*df.shape[:-1], x.shape[0], spec.channels, spec.multiplier), -3, 0
    )


def _fold(a: jax.Array) -> jax.Array:
    """[G,N,spatial,D] as [N,spatial,G*D]."""
    return jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], a.shape[0] * a.shape[-1])


def _fold_filter(f: jax.Array) -> jax.Array:
    """[G,window,C,M] as [window,G*C,M]."""
    problems, *window, channels, multiplier = f.shape
    return jnp.moveaxis(f, 0, -3).reshape(*window, problems * channels, multiplier)


def _unfold(a: jax.Array, problems: int, channels: int) -> jax.Array:
    """[N,spatial,G*D] as [G,N,spatial,D]."""
    return jnp.moveaxis(a.reshape(*a.shape[:-1], problems, channels), -2, 0)


def _conv(
    spec: ConvSpec,
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    padding: Sequence[Pair],
    lhs_dilation: Sequence[int] | None = None,
    **geometry,
) -> jax.Array:
    dtype: Literal["float32"] | None = "float32" if lhs.dtype.itemsize < 4 else None
    lhs_dilation = lhs_dilation or (1,) * len(padding)
    spatial = "DHW"[-len(padding) :]
    conv = functools.partial(
        conv_general_dilated,
        rhs=rhs,
        lhs_dilation=lhs_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        precision=spec.precision,
        preferred_element_type=dtype,
        **geometry,
    )
    # XLA's kernel for a CPU reads out of bounds where a low pad is negative and the high one is not
    # (openxla/xla issue 48713). So what pads would crop is cut off.
    cut, pads, out = lhs, [], [slice(None)]
    for axis, ((low, high), step) in enumerate(zip(padding, lhs_dilation, strict=True), 1):
        before, after = (-(min(pad, 0) // step) for pad in (low, high))
        if before + after >= lhs.shape[axis]:  # the windows see nothing but padding
            result = jax.eval_shape(functools.partial(conv, padding=padding), lhs)
            return jnp.zeros(result.shape, lhs.dtype)
        cut = lax.slice_in_dim(cut, before, lhs.shape[axis] - after, axis=axis)
        low, high = low + before * step, high + after * step
        # XLA takes these for two groups when it swaps the operands, and aborts the process.
        is_mistaken = low == high == 0 and step == rhs.shape[axis - 1] == 2
        pads.append((low, high + is_mistaken))
        out.append(slice(-1 if is_mistaken else None))
    return conv(cut, padding=pads)[tuple(out)].astype(lhs.dtype)


def _rank(spec: ConvSpec, platform: str | None) -> int:
    # Nothing has been timed on an accelerator. There it is the first but for what asks to be before
    # it, where what XLA makes of it is hopeless.
    return 2 if platform == "cpu" else 0


IMPLEMENTATION = Implementation(
    name="lax",
    unsupported=unsupported,
    rank=_rank,
    forward=forward,
    input_grad=input_grad,
    filter_grad=filter_grad,
)
