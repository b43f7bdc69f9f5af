"""Which of lax's convolutions are depthwise, in any form that they are written in.

With G groups, feature_group_count or batch_group_count, of I inputs and J outputs each, these are:

    form               how it is told                       what it is here
    convolution        no lhs_dilation                      forward, C = G * I and M = J, and the
                                                            results of the inputs are added
    its transpose      window_strides of 1                  input_grad of the reversed filter,
                                                            C = G * J and M = I
    a gradient by      batch_group_count,                   filter_grad, C = G * I and M = J
    the filter         no lhs_dilation
    that of a          batch_group_count,                   filter_grad with lhs as dy, reversed,
    transpose          no rhs_dilation                      C = G * J and M = I

A transpose is what lax writes for the gradient by the input, and what transposed convolutions are:
lhs_dilation is the stride there. In gradients by the filter batch and channels have changed roles,
and window_strides are the dilation; without groups they are told from a convolution by the window,
which is larger than the result. Where both I and J are more than 1, each group of an operand is
read once for each input, or output, of the other. What `vmap` makes of any of these has more
groups, and is one of these again.

A dilated operand under strides is neither of the first two: it is made before, with its zeros.
Integers are convolved as floats, where these hold every sum of theirs exactly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_dwbp import _compat, _rules
from jax_dwbp._spec import (
    DTYPES,
    FILTER_GRAD,
    FORWARD,
    INPUT_GRAD,
    ConvSpec,
    Op,
    Pair,
    canonical_precision,
    check_sizes,
    spatial_axis,
)

# With groups lax's own convolution takes 2 to 1,000 times as long on a CPU. But what is read
# several times here is memory.
_GROUP_CHANNELS = 8
# Without groups it is a matmul and fast, but from or to one channel: with so many others, and with
# strides that leave windows much in common, it takes 3 to 100 times as long.
_DENSE_CHANNELS = 16
_DENSE_STRIDE = 2
_FLOAT32 = jnp.dtype("float32")
# Under strides lhs_dilation is written out. Beyond so many times the elements it is lax's.
_MOST_ZEROS = 16


class Convolution(NamedTuple):
    """One of lax's, with every default resolved."""

    lhs: tuple[Any, ...]  # sizes: batch, channels, spatial
    rhs: tuple[Any, ...]  # sizes: features, channels of a group, spatial
    numbers: Any  # lax's ConvDimensionNumbers
    strides: tuple[int, ...]
    padding: tuple[Pair, ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    batch_groups: int
    precision: Any
    dtypes: tuple[Any, Any, Any]  # of lhs, rhs and the result

    @property
    def dilated(self) -> list[int]:
        """Of lhs, with its zeros."""
        return [(n - 1) * d + 1 for n, d in zip(self.lhs[2:], self.lhs_dilation, strict=True)]

    @property
    def spatial(self) -> tuple[int, ...]:
        """Of the result."""
        windows = [(k - 1) * d + 1 for k, d in zip(self.rhs[2:], self.rhs_dilation, strict=True)]
        return tuple(
            max(n + sum(pads) - window, -stride) // stride + 1
            for n, pads, window, stride in zip(
                self.dilated, self.padding, windows, self.strides, strict=True
            )
        )


class Images(NamedTuple):
    """How lax has the axes of what is x or dy here."""

    batch: int
    channels: int
    spatial: tuple[int, ...]

    @property
    def are_channels_first(self) -> bool:
        return (self.batch, self.channels, *self.spatial) == tuple(range(2 + len(self.spatial)))


class Depthwise(NamedTuple):
    """An op that gives the same as a convolution of lax's."""

    op: Op
    spec: ConvSpec
    # What the op takes, of lhs and rhs, and the result of lax's, of the op's.
    operands: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    result: Callable[[jax.Array], jax.Array]
    dtype: Any  # of the result
    compute_dtype: Any
    is_dense: bool  # without groups

    def apply(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        a, b = self._converted_operands(lhs, rhs)
        y = _rules.apply(a, b, op=self.op, spec=self.spec, forward_mode=True)
        y = self.result(y)
        if self.dtype.kind in "iu":  # where it is beyond the type, its lowest bits are the result
            y = jnp.round(y).astype("int32" if y.dtype == _FLOAT32 else "int64")
        return _converted(y, self.dtype)

    def op_operands(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        """The shapes and dtypes of what the op takes."""
        a, b = jax.eval_shape(self._converted_operands, lhs, rhs)
        return _compat.plain(a), _compat.plain(b)

    def _converted_operands(self, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = self.operands(lhs, rhs)
        return _converted(a, self.compute_dtype), _converted(b, self.compute_dtype)


def op_of(conv: Convolution) -> Depthwise | str:
    """The op that computes it, or why none does."""
    reason = _why_none(conv)
    if reason:
        return reason
    by_filter = _is_by_filter(conv)
    groups = max(conv.groups, conv.batch_groups)
    inputs = conv.lhs[0] // groups if by_filter else conv.rhs[1]
    outputs = conv.rhs[0] // groups
    least, most = sorted((inputs, outputs))
    if least > (1 if groups == 1 else _GROUP_CHANNELS) or (groups == 1 and most > _DENSE_CHANNELS):
        where = "without groups" if groups == 1 else f"each of {groups} groups"
        return f"{where}: {inputs} inputs and {outputs} outputs"
    is_matmul = 1 in (math.prod(conv.rhs[2:]), math.prod(conv.spatial))
    if groups == 1 and (is_matmul or max(conv.strides) > _DENSE_STRIDE):
        return f"without groups: a window of {conv.rhs[2:]}, strides of {conv.strides}"
    steps = conv.rhs_dilation if by_filter else conv.strides
    # Either will do where neither is more than 1: the one that repeats less.
    is_transposed = set(steps) == {1} and (set(conv.lhs_dilation) != {1} or inputs > outputs)
    if not is_transposed and set(conv.lhs_dilation) != {1}:
        return _of_dilated_lhs(conv)
    try:
        if by_filter:
            return _filter_grad(conv, inputs, outputs, is_transposed=is_transposed)
        return (_input_grad if is_transposed else _forward)(conv, inputs, outputs)
    except ValueError as error:  # sizes beyond what the ops take, another kind of precision
        return str(error)


def _of_dilated_lhs(conv: Convolution) -> Depthwise | str:
    """With lhs_dilation by zeros in memory."""
    if math.prod(conv.dilated) > _MOST_ZEROS * math.prod(conv.lhs[2:]):
        return f"lhs_dilation is {conv.lhs_dilation}, under strides of {conv.strides}"
    sizes = (*conv.lhs[:2], *conv.dilated)
    found = op_of(conv._replace(lhs=sizes, lhs_dilation=(1,) * len(conv.dilated)))
    if isinstance(found, str):
        return found
    config = [(0, 0, 0)] * len(conv.lhs)
    for axis, dilation in zip(conv.numbers.lhs_spec[2:], conv.lhs_dilation, strict=True):
        config[axis] = (0, 0, dilation - 1)

    def operands(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return found.operands(lax.pad(lhs, jnp.zeros((), lhs.dtype), config), rhs)

    return found._replace(operands=operands)


def _is_by_filter(conv: Convolution) -> bool:
    """Whether it is written as gradients by the filter are."""
    if conv.batch_groups > 1:
        return True
    is_large = math.prod(conv.rhs[2:]) > math.prod(conv.spatial) > 1
    return is_large and conv.groups == 1 and 1 in (conv.lhs[0], conv.rhs[0])


def _are_static(*sizes: Any) -> bool:
    return all(type(size) is int for size in sizes)


def _why_none(conv: Convolution) -> str | None:
    batch, channels, *spatial = conv.lhs
    features, _, *window = conv.rhs
    if len(spatial) not in (1, 2, 3):
        return f"one to three spatial dimensions are depthwise here, not {len(spatial)}"
    if 0 in (*conv.lhs, *conv.rhs):
        return "an operand is empty"
    if not _are_static(*spatial, *window, features):
        return "a size is symbolic"
    # The other one of these two is what this calls the batch.
    if not _are_static(batch if _is_by_filter(conv) else channels):
        return "a size is symbolic"
    if 0 in conv.spatial:
        return "the output is empty"
    if _compute_dtype(conv) is None:
        inexact = ", which floats do not sum exactly" * _are_integers(conv)
        return f"dtypes are {', '.join(map(str, conv.dtypes))}{inexact}"
    return None


def _are_integers(conv: Convolution) -> bool:
    """Of which lax makes integers: not narrower ones, nor unsigned ones of signed ones."""
    lhs, rhs, result = conv.dtypes
    kinds = lhs.kind + result.kind
    return lhs == rhs and kinds in ("ii", "uu", "ui") and lhs.itemsize <= result.itemsize


def _compute_dtype(conv: Convolution) -> Any:
    """What it is computed in, None where that is not what lax computes."""
    lhs, rhs, result = conv.dtypes
    if lhs != rhs:
        return None
    if {lhs.name, result.name} <= set(DTYPES) and lhs.itemsize <= result.itemsize:
        return result if lhs == result else max(result, _FLOAT32, key=lambda x: x.itemsize)
    if _are_integers(conv) and _are_static(*conv.rhs[1:]):
        limits = jnp.iinfo(lhs)
        largest = math.prod(conv.rhs[1:]) * max(-int(limits.min), int(limits.max)) ** 2
        for dtype in (_FLOAT32, jax.dtypes.canonicalize_dtype("float64")):
            if largest <= 2 ** (jnp.finfo(dtype).nmant + 1):
                return dtype
    return None


def _forward(conv: Convolution, inputs: int, outputs: int) -> Depthwise | str:
    x, y = (_images(spec) for spec in (conv.numbers.lhs_spec, conv.numbers.out_spec))
    first = x.are_channels_first and y.are_channels_first
    crop, spatial, padding = _cropped(conv.lhs[2:], conv.padding)
    spec = _spec(
        conv,
        batch=conv.lhs[0],
        spatial=spatial,
        window=conv.rhs[2:],
        channels=conv.groups * inputs,
        multiplier=outputs,
        strides=conv.strides,
        padding=padding,
        dilation=conv.rhs_dilation,
        channels_first=first,
    )

    def operands(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        f = _to_filter(rhs, conv).reshape(-1, conv.groups, outputs, inputs)
        return (
            _read(_to_images(lhs, x, first), crop, spatial, first),
            f.swapaxes(-1, -2).reshape(*spec.kernel_spatial, spec.channels, spec.multiplier),
        )

    def result(images: jax.Array) -> jax.Array:
        images = _summed(images, conv.groups, inputs, first)
        return _from_images(images, y, first)

    found = _op(FORWARD, spec, conv, operands, result)
    if inputs == 1 or found.compute_dtype.itemsize > 2:
        return found
    return found._replace(compute_dtype=_FLOAT32)  # for the sum


def _input_grad(conv: Convolution, inputs: int, outputs: int) -> Depthwise | str:
    """dx[h] = sum over k of dy[(h + low - dilation * k) / stride] * f[k], with lax's k from the
    other end: so low is what lies from the first tap to the last, less lax's low."""
    dy, x = (_images(spec) for spec in (conv.numbers.lhs_spec, conv.numbers.out_spec))
    first = x.are_channels_first and dy.are_channels_first
    features, _, *window = conv.rhs
    spatial, padding, zeros = [], [], []
    for size, out, kernel, stride, dilation, (low, high) in zip(
        conv.spatial,
        conv.lhs[2:],
        window,
        conv.lhs_dilation,
        conv.rhs_dilation,
        conv.padding,
        strict=True,
    ):
        reach = dilation * (kernel - 1)
        # Where lax pads further than the filter reaches, the result is zeros, which no op writes.
        before, after = max(low - reach, 0), max(high - reach, 0)
        size -= before + after
        if size < 1:
            return "it is of padding alone"
        low = reach - low + before
        spatial.append(size)
        padding.append((low, (out - 1) * stride + reach + 1 - size - low))
        zeros.append((before, after))
    spec = _spec(
        conv,
        batch=conv.lhs[0],
        spatial=spatial,
        window=window,
        channels=features,
        multiplier=inputs,
        strides=conv.lhs_dilation,
        padding=padding,
        dilation=conv.rhs_dilation,
        channels_first=first,
    )

    def operands(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        f = _to_filter(rhs, conv).reshape(*spec.kernel_spatial, features, inputs)
        images = _to_images(lhs, dy, first)
        return lax.rev(f, range(len(window))), _repeated(images, conv.groups, outputs, first)

    def result(images: jax.Array) -> jax.Array:
        return _from_images(_padded(images, zeros, first), x, first)

    return _op(INPUT_GRAD, spec, conv, operands, result)


def _filter_grad(
    conv: Convolution, inputs: int, outputs: int, *, is_transposed: bool
) -> Depthwise | str:
    """Of a transpose lhs is dy, and it is rhs that rows and columns of the filter are apart in:
    df[k] = sum over p of x[stride * p - low + dilation * k] * dy[p], with lax's k from the other
    end."""
    lhs_spec, rhs_spec, out_spec = conv.numbers
    lhs_images, rhs_images = (Images(spec[1], spec[0], spec[2:]) for spec in (lhs_spec, rhs_spec))
    first = lhs_images.are_channels_first and rhs_images.are_channels_first
    batch, features = conv.lhs[1], conv.rhs[0]
    groups = conv.batch_groups
    spatial, outs, strides = list(conv.lhs[2:]), conv.rhs[2:], conv.rhs_dilation
    lows = [low for low, _ in conv.padding]
    reaches = [(k - 1) * step for k, step in zip(conv.spatial, conv.strides, strict=True)]
    if is_transposed:
        spatial, outs, strides = list(conv.rhs[2:]), conv.lhs[2:], conv.lhs_dilation
        lows = [reach - low for reach, low in zip(reaches, lows, strict=True)]
    highs = [
        (out - 1) * stride + reach + 1 - size - low
        for out, stride, reach, size, low in zip(outs, strides, reaches, spatial, lows, strict=True)
    ]
    crop, spatial, padding = _cropped(spatial, [*zip(lows, highs, strict=True)])
    spec = _spec(
        conv,
        batch=batch,
        spatial=spatial,
        window=conv.spatial,
        channels=groups * (outputs if is_transposed else inputs),
        multiplier=inputs if is_transposed else outputs,
        strides=strides,
        padding=padding,
        dilation=conv.strides,
        channels_first=first,
    )

    def operands(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, dy = _to_images(lhs, lhs_images, first), _to_images(rhs, rhs_images, first)
        if is_transposed:
            x, dy = dy, _repeated(x, groups, outputs, first)
        else:
            dy = _repeated(dy, groups, inputs, first)
        return _read(x, crop, spatial, first), dy

    def result(f: jax.Array) -> jax.Array:
        if is_transposed:
            f = lax.rev(f, range(len(conv.spatial)))
        else:
            f = f.reshape(-1, groups, inputs, outputs).swapaxes(-1, -2)
        f = f.reshape(*conv.spatial, features, inputs)
        many, feature, *axes = out_spec
        return lax.transpose(f, np.argsort((*axes, feature, many)))

    return _op(FILTER_GRAD, spec, conv, operands, result)


def _op(
    op: Op, spec: ConvSpec, conv: Convolution, operands: Callable, result: Callable
) -> Depthwise:
    is_dense = conv.groups == conv.batch_groups == 1
    return Depthwise(op, spec, operands, result, conv.dtypes[2], _compute_dtype(conv), is_dense)


def _spec(
    conv: Convolution,
    *,
    batch: Any,
    spatial: Any,
    window: Any,
    channels: int,
    multiplier: int,
    strides: Any,
    padding: Any,
    dilation: Any,
    channels_first: bool,
) -> ConvSpec:
    axes = tuple(
        spatial_axis(*axis, filter_name="rhs")
        for axis in zip(spatial, window, strides, dilation, padding, strict=True)
    )
    spec = ConvSpec(
        axes=axes,
        channels_first=channels_first,
        channels=channels,
        multiplier=multiplier,
        precision=canonical_precision(conv.precision),
        implementation=None,
        are_integers=_are_integers(conv),
    )
    check_sizes(spec, batch, "lhs", "rhs")
    return spec


def _images(spec: tuple[int, ...]) -> Images:
    return Images(spec[0], spec[1], tuple(spec[2:]))


def _to_images(array: jax.Array, axes: Images, channels_first: bool) -> jax.Array:
    """[N,spatial,C], or [N,C,spatial] where that is lax's layout already."""
    if channels_first:
        return array
    return lax.transpose(array, (axes.batch, *axes.spatial, axes.channels))


def _from_images(images: jax.Array, axes: Images, channels_first: bool) -> jax.Array:
    if channels_first:
        return images
    return lax.transpose(images, np.argsort((axes.batch, *axes.spatial, axes.channels)))


def _to_filter(rhs: jax.Array, conv: Convolution) -> jax.Array:
    """[window, features, inputs of a group]."""
    feature, group, *window = conv.numbers.rhs_spec
    return lax.transpose(rhs, (*window, feature, group))


def _summed(images: jax.Array, groups: int, parts: int, channels_first: bool) -> jax.Array:
    """The sum of the parts that the channels of each group are in."""
    if parts == 1:
        return images
    axis = 1 if channels_first else images.ndim - 1
    before, after = images.shape[:axis], images.shape[axis + 1 :]
    parted = images.reshape(*before, groups, parts, -1, *after)
    return parted.sum(axis + 1).reshape(*before, -1, *after)


def _repeated(images: jax.Array, groups: int, repeats: int, channels_first: bool) -> jax.Array:
    """The channels of each group so many times."""
    if repeats == 1:
        return images
    axis = 1 if channels_first else images.ndim - 1
    before, after = images.shape[:axis], images.shape[axis + 1 :]
    grouped = images.reshape(*before, groups, 1, -1, *after)
    shape = (*grouped.shape[: axis + 1], repeats, *grouped.shape[axis + 2 :])
    return jnp.broadcast_to(grouped, shape).reshape(*before, -1, *after)


def _padded(images: jax.Array, pads: list[Pair], channels_first: bool) -> jax.Array:
    """With zeros around, or less of it where the pads are negative."""
    if not any(pad for pair in pads for pad in pair):
        return images
    none, axes = [(0, 0, 0)], [(*pair, 0) for pair in pads]
    config = none * 2 + axes if channels_first else none + axes + none
    return lax.pad(images, jnp.zeros((), images.dtype), config)


def _cropped(
    sizes: Sequence[int], padding: Sequence[Pair]
) -> tuple[list[Pair] | None, list[int], list[Pair]]:
    """What negative pads cut off, the sizes without it, and the pads that are left.

    None is cut off where nothing would be left: then the sizes are those of the padding alone, of
    which XLA's kernel for a CPU reads what is not there.
    """
    crop = [(min(low, 0), min(high, 0)) for low, high in padding]
    left = [size + sum(pads) for size, pads in zip(sizes, crop, strict=True)]
    if min(left) < 1:
        whole = [size + sum(pads) for size, pads in zip(sizes, padding, strict=True)]
        return None, whole, [(0, 0)] * len(whole)
    return crop, left, [(max(low, 0), max(high, 0)) for low, high in padding]


def _read(
    images: jax.Array, crop: list[Pair] | None, spatial: list[int], channels_first: bool
) -> jax.Array:
    """What is left of images after a crop, or padding of those sizes."""
    if crop is not None:
        return _padded(images, crop, channels_first)
    batch, *others = images.shape
    shape = (others[0], *spatial) if channels_first else (*spatial, others[-1])
    return lax.full_like(images, 0, shape=(batch, *shape))


def _converted(x: jax.Array, dtype: Any) -> jax.Array:
    """x.astype(dtype), which takes time where there is nothing to do."""
    return x if x.dtype == dtype and not x.weak_type else x.astype(dtype)
