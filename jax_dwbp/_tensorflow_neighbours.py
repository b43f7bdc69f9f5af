"""TensorFlow's ops around the convolutions of a training step that tf2jax lacks or gets wrong.

A parser takes the node of a graph and returns the JAX function of its operands. Gradients that are
not one line are derivatives of what tf2jax has for the op itself. Their formulas and the order of
their operands are those of TensorFlow's op definitions and of its `python/ops/*_grad.py`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Parser = Callable[[Any], Callable]

# Of selu, as TensorFlow and JAX have them.
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def parsers(table: dict[str, Parser]) -> tuple[dict[str, Parser], dict[str, Parser]]:
    """Those that stand in the place of what `table` has, and those for what it may lack."""
    normalizations = {
        f"FusedBatchNorm{version}": functools.partial(_normalization, results=results)
        for version, results in (("", 5), ("V2", 5), ("V3", 6))
    }
    # tf2jax's leave out what gradients read, and some rows of what is enlarged by more than 2.
    better = {**normalizations, "ResizeBilinear": _resize}
    lacking = {
        **{name: _plain(function) for name, function in _ELEMENTWISE.items()},
        **{f"FusedBatchNormGrad{version}": _normalization_gradient for version in ("", "V2", "V3")},
        "AvgPoolGrad": _transpose_of(table["AvgPool"]),
        "BiasAddGrad": _bias_gradient,
        "ConcatOffset": _plain(_concat_offset),
        "DepthToSpace": functools.partial(_blocks, to_space=True),
        "LeakyReluGrad": _leaky_relu_gradient,
        "MaxPoolGrad": _max_pool_gradient(table["MaxPool"]),
        "MirrorPad": _mirror_pad,
        "MirrorPadGrad": _mirror_pad_gradient,
        "ResizeBilinearGrad": _resize_gradient,
        "ShapeN": _plain(lambda *arrays: [np.array(jnp.shape(array)) for array in arrays]),
        "SoftmaxCrossEntropyWithLogits": _plain(_cross_entropy),
        "SpaceToDepth": functools.partial(_blocks, to_space=False),
        "StridedSliceGrad": _transpose_of(table["StridedSlice"]),
    }
    return better, lacking


def _plain(function: Callable) -> Parser:
    """For an op whose attributes say nothing that its operands don't."""
    return lambda proto: function


def _relu_gradient(dy: jax.Array, x: jax.Array, upper: float = math.inf) -> jax.Array:
    return jnp.where((x > 0) & (x < upper), dy, jnp.zeros_like(dy))


def _elu_gradient(dy: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(y < 0, dy * (y + 1), dy)


def _selu_gradient(dy: jax.Array, y: jax.Array) -> jax.Array:
    return dy * jnp.where(y < 0, y + _SELU_SCALE * _SELU_ALPHA, _SELU_SCALE)


def _by_result(gradient: Callable) -> Callable:
    """Of dy and of y, of which TensorFlow takes the conjugate, and nothing where dy is 0."""

    def run(y: jax.Array, dy: jax.Array) -> jax.Array:
        is_zero = dy == 0
        y = jnp.where(is_zero, jnp.ones_like(y), jnp.conj(y))  # so that derivatives are finite too
        return jnp.where(is_zero, jnp.zeros_like(dy), gradient(y, dy))

    return run


def _leaky_relu_gradient(proto: Any) -> Callable:
    alpha = proto.attr["alpha"].f
    return lambda dy, x: jnp.where(x > 0, dy, alpha * dy)


_ELEMENTWISE: dict[str, Callable] = {
    "EluGrad": _elu_gradient,
    "ReciprocalGrad": _by_result(lambda y, dy: -dy * y * y),
    "Relu6Grad": functools.partial(_relu_gradient, upper=6.0),
    "ReluGrad": _relu_gradient,
    "RsqrtGrad": _by_result(lambda y, dy: -0.5 * dy * y**3),
    "Selu": jax.nn.selu,
    "SeluGrad": _selu_gradient,
    "SigmoidGrad": lambda y, dy: dy * y * (1 - y),
    "SoftplusGrad": lambda dy, x: dy * jax.nn.sigmoid(x),
    "Softsign": jax.nn.soft_sign,
    "SoftsignGrad": lambda dy, x: dy / (1 + jnp.abs(x)) ** 2,
    "SqrtGrad": _by_result(lambda y, dy: 0.5 * dy / y),
    "TanhGrad": lambda y, dy: dy * (1 - y * y),
}


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of each row, and its gradient by the logits."""
    logits, labels = jnp.broadcast_arrays(logits, labels)
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.sum(labels * log_probabilities, -1), jnp.exp(log_probabilities) - labels


def _bias_gradient(proto: Any) -> Callable:
    channels_first = proto.attr["data_format"].s == b"NCHW"

    def run(dy: jax.Array) -> jax.Array:
        channels = 1 if channels_first else dy.ndim - 1
        others = [axis for axis in range(dy.ndim) if axis != channels]
        return jnp.sum(dy, others, dtype=dy.dtype)

    return run


def transposed(function: Callable, shape: Any, dy: jax.Array) -> jax.Array:
    """The gradient by x, of that shape, of function(x), which is linear."""
    x = jax.ShapeDtypeStruct(tuple(map(int, shape)), dy.dtype)
    return jax.linear_transpose(function, x)(dy)[0]


def _transpose_of(forward: Parser) -> Parser:
    """Of what is linear in its first operand: its shape is the gradient's first, dy the last."""

    def parse(proto: Any) -> Callable:
        function = forward(proto)

        def run(shape: Any, *operands: Any) -> jax.Array:
            *others, dy = operands
            return transposed(lambda x: function(x, *others), shape, dy)

        return run

    return parse


def _max_pool_gradient(forward: Parser) -> Parser:
    def parse(proto: Any) -> Callable:
        function = forward(proto)
        return lambda x, y, dy: jax.vjp(function, x)[1](dy)[0]

    return parse


def _concat_offset(axis: Any, *shapes: Any) -> list[np.ndarray]:
    """Where each array begins in what they are concatenated to."""
    offsets, begin = [], np.zeros_like(shapes[0])
    for shape in shapes:
        offsets.append(begin.copy())
        begin[int(axis)] += shape[int(axis)]
    return offsets


def _normalization_axes(proto: Any) -> tuple[tuple[int, ...], float]:
    """All but that of the channels, of four or five; and epsilon."""
    layout = proto.attr["data_format"].s.decode() or "NHWC"
    return tuple(i for i, axis in enumerate(layout) if axis != "C"), proto.attr["epsilon"].f


def _normalization(proto: Any, results: int) -> Callable:
    axes, epsilon = _normalization_axes(proto)
    is_training, factor = proto.attr["is_training"].b, 1.0
    if "exponential_avg_factor" in proto.attr:
        factor = proto.attr["exponential_avg_factor"].f

    def run(x: jax.Array, scale: Any, offset: Any, mean: Any, variance: Any) -> tuple[Any, ...]:
        """y, the two moments to keep, those that the gradient reads, and what is GPUs' own."""
        wide = jnp.asarray(x, scale.dtype)
        kept = mean, variance
        if is_training:
            before = kept
            mean, variance = jnp.mean(wide, axes), jnp.var(wide, axes)
            many = x.size // mean.size
            kept = mean, variance * (many / max(many - 1, 1))
            if factor != 1:
                kept = tuple(
                    old + factor * (new - old) for old, new in zip(before, kept, strict=True)
                )
        slope = scale * jax.lax.rsqrt(variance + epsilon)
        y = (wide - _along(mean, axes)) * _along(slope, axes) + _along(offset, axes)
        reserved = mean, variance, jnp.zeros(0, scale.dtype)
        return (y.astype(x.dtype), *kept, *reserved)[:results]

    return run


def _normalization_gradient(proto: Any) -> Callable:
    axes, epsilon = _normalization_axes(proto)
    is_training = proto.attr["is_training"].b

    def run(dy: jax.Array, x: jax.Array, scale: Any, mean: Any, variance: Any, *_: Any) -> Any:
        wide_dy, wide = jnp.asarray(dy, scale.dtype), jnp.asarray(x, scale.dtype)
        slope = jax.lax.rsqrt(variance + epsilon)
        normal = (wide - _along(mean, axes)) * _along(slope, axes)
        d_scale, d_offset = jnp.sum(wide_dy * normal, axes), jnp.sum(wide_dy, axes)
        dx = wide_dy
        if is_training:
            many = x.size // mean.size
            dx = dx - (_along(d_offset, axes) + normal * _along(d_scale, axes)) / many
        dx = dx * _along(slope * scale, axes)
        unused = jnp.zeros(0, scale.dtype)
        return dx.astype(x.dtype), d_scale, d_offset, unused, unused

    return run


def _along(channels: Any, axes: tuple[int, ...]) -> jax.Array:
    return jnp.expand_dims(channels, axes)


def _blocks(proto: Any, *, to_space: bool) -> Callable:
    size, data_format = proto.attr["block_size"].i, proto.attr["data_format"].s.decode()
    if data_format not in ("NHWC", "NCHW"):
        raise ValueError(f"`data_format` must be NHWC or NCHW, got {data_format}")

    def to_channels_last(x: jax.Array) -> jax.Array:
        return x if data_format == "NHWC" else x.transpose(0, 2, 3, 1)

    def from_channels_last(x: jax.Array) -> jax.Array:
        return x if data_format == "NHWC" else x.transpose(0, 3, 1, 2)

    def run(x: jax.Array) -> jax.Array:
        x = to_channels_last(jnp.asarray(x))
        n, h, w, c = x.shape
        if to_space:
            parts = n, h, w, size, size, c // size**2
            sizes = n, h * size, w * size, c // size**2
        else:
            parts = n, h // size, size, w // size, size, c
            sizes = n, h // size, w // size, size**2 * c
        return from_channels_last(x.reshape(parts).transpose(0, 1, 3, 2, 4, 5).reshape(sizes))

    return run


def _mirror_pad(proto: Any) -> Callable:
    mode = proto.attr["mode"].s.decode().lower()
    return lambda x, pads: jnp.pad(x, np.asarray(pads), mode=mode)


def _mirror_pad_gradient(proto: Any) -> Callable:
    function = _mirror_pad(proto)

    def run(dy: jax.Array, pads: Any) -> jax.Array:
        sizes = np.array(dy.shape) - np.asarray(pads).sum(1)
        return transposed(lambda x: function(x, pads), sizes, dy)

    return run


def _resize(proto: Any) -> Callable:
    def run(images: jax.Array, size: Any) -> jax.Array:
        rows, columns = (
            _interpolation(int(out), images.shape[axis], proto)
            for axis, out in zip((1, 2), size, strict=True)
        )
        # TensorFlow's is float32 whatever it is given.
        return _einsum("nhwc,ph,qw->npqc", images.astype("float32"), rows, columns)

    return run


def _resize_gradient(proto: Any) -> Callable:
    def run(dy: jax.Array, images: jax.Array) -> jax.Array:
        rows, columns = (
            _interpolation(dy.shape[axis], images.shape[axis], proto) for axis in (1, 2)
        )
        return _einsum("npqc,ph,qw->nhwc", dy, rows, columns).astype(images.dtype)

    return run


_einsum = functools.partial(jnp.einsum, precision="highest")


def _interpolation(out: int, size: int, proto: Any) -> np.ndarray:
    """What each position of the result takes of each of the image, along an axis."""
    position = np.arange(out, dtype=np.float32)
    if proto.attr["align_corners"].b and out > 1:
        position = position * np.float32((size - 1) / (out - 1))
    elif proto.attr["half_pixel_centers"].b:
        position = (position + np.float32(0.5)) * np.float32(size / out) - np.float32(0.5)
    else:
        position = position * np.float32(size / out)
    low = np.floor(position)
    share = position - low
    weights = np.zeros((out, size), np.float32)
    for place, part in ((low, 1 - share), (low + 1, share)):
        np.add.at(weights, (np.arange(out), np.clip(place, 0, size - 1).astype(int)), part)
    return weights
