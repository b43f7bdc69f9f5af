"""Teaches tf2jax the depthwise convolution and its gradients.

tf2jax converts TensorFlow graphs to JAX functions. It has no gradient ops of the depthwise
convolution, so that a graph that holds a training step does not convert; with `register` it does,
and runs the ops of this package. It needs tf2jax and TensorFlow, which are not installed with it.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_dwbp

_ATTRIBUTES = ("strides", "padding", "explicit_paddings", "data_format", "dilations")


def register() -> None:
    """Registers the ops with tf2jax, for all conversions that follow.

    These are DepthwiseConv2dNative, in the place of tf2jax's own, its BackpropInput and its
    BackpropFilter. So that whole training steps convert, what else the gradient of a network has
    is registered too where tf2jax has none: ReluGrad, Relu6Grad, BiasAddGrad, RsqrtGrad, ShapeN and
    Conv2DBackpropFilter; and Conv2DBackpropInput in the place of tf2jax's, which leaves the shape
    of strided ones to chance.

    Raises:
      ImportError: tf2jax or TensorFlow is not installed, or this version of tf2jax keeps its ops
        elsewhere: it has no public way to add any.
    """
    try:
        # Not public, but there is no other way.
        table = importlib.import_module("tf2jax._src.ops")._jax_ops
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"`register` needs tf2jax 0.3.8, or a later one with its table of ops in the same "
            f"place, and TensorFlow: {error}"
        ) from error
    table.update(_OPS)
    for name, parser in _NEIGHBOURS.items():
        table.setdefault(name, parser)


def _parser(function: Callable) -> Callable[[Any], Callable]:
    def parse(proto: Any) -> Callable:
        """The JAX function of a node of a graph."""
        attributes = _attributes(proto)

        def run(*operands: Any) -> jax.Array:
            # tf2jax's own op has forward mode.
            return function(*operands, **attributes, forward_mode=True)

        return run

    return parse


def _attributes(proto: Any) -> dict[str, Any]:
    """Those of a node that say how it convolves."""
    present = {name: proto.attr[name] for name in _ATTRIBUTES if name in proto.attr}
    return {
        name: value.s.decode() if value.HasField("s") else tuple(value.list.i)
        for name, value in present.items()
    }


def _plain(function: Callable) -> Callable[[Any], Callable]:
    """For an op whose attributes say nothing that its operands don't."""
    return lambda proto: function


def _relu_gradient(dy: jax.Array, x: jax.Array, upper: float = math.inf) -> jax.Array:
    return jnp.where((x > 0) & (x < upper), dy, jnp.zeros_like(dy))


def _bias_gradient(proto: Any) -> Callable:
    channels_first = proto.attr["data_format"].s == b"NCHW"

    def run(dy: jax.Array) -> jax.Array:
        channels = 1 if channels_first else dy.ndim - 1
        return jnp.sum(dy, [axis for axis in range(dy.ndim) if axis != channels])

    return run


def _dense_gradient(wanted: int) -> Callable[[Any], Callable]:
    """Of Conv2D by its input or filter: the transpose of what lax computes."""

    def parse(proto: Any) -> Callable:
        attributes = _attributes(proto)
        layout = attributes.get("data_format", "NHWC")
        dilations = attributes.get("dilations") or (1,) * 4
        height, width = layout.index("H"), layout.index("W")
        padding = attributes["padding"]
        if padding == "EXPLICIT":
            pads = attributes["explicit_paddings"]
            padding = [pads[2 * axis : 2 * axis + 2] for axis in (height, width)]

        def run(a: Any, b: Any, dy: jax.Array) -> jax.Array:
            # One of the first two operands is an array, the other is a shape.
            operands = [a, b]
            known = operands[1 - wanted]
            sizes = tuple(int(size) for size in operands[wanted])
            shapes = [sizes, known.shape] if wanted == 0 else [known.shape, sizes]

            def forward(unknown: jax.Array) -> jax.Array:
                x, f = (unknown, known) if wanted == 0 else (known, unknown)
                return lax.conv_general_dilated(
                    x,
                    f,
                    [attributes["strides"][axis] for axis in (height, width)],
                    padding,
                    rhs_dilation=[dilations[axis] for axis in (height, width)],
                    dimension_numbers=(layout, "HWIO", layout),
                    feature_group_count=shapes[0][layout.index("C")] // shapes[1][2],
                )

            transpose = jax.linear_transpose(forward, jax.ShapeDtypeStruct(sizes, dy.dtype))
            return transpose(dy)[0]

        return run

    return parse


_OPS = {
    "DepthwiseConv2dNative": _parser(jax_dwbp.depthwise_conv2d_native),
    "DepthwiseConv2dNativeBackpropInput": _parser(jax_dwbp.depthwise_conv2d_native_backprop_input),
    "DepthwiseConv2dNativeBackpropFilter": _parser(
        jax_dwbp.depthwise_conv2d_native_backprop_filter
    ),
    "Conv2DBackpropInput": _dense_gradient(0),
}
_NEIGHBOURS = {
    "Conv2DBackpropFilter": _dense_gradient(1),
    "ReluGrad": _plain(_relu_gradient),
    "Relu6Grad": _plain(functools.partial(_relu_gradient, upper=6.0)),
    "BiasAddGrad": _bias_gradient,
    "RsqrtGrad": _plain(lambda y, dy: -0.5 * dy * y**3),
    "ShapeN": _plain(lambda *arrays: [np.array(jnp.shape(array)) for array in arrays]),
}
