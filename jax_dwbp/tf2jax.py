"""Teaches tf2jax the depthwise convolution and its gradients.

tf2jax converts TensorFlow graphs to JAX functions. It has no gradient ops of the depthwise
convolution, so that a graph that holds a training step does not convert; with `register` it does,
and runs the ops of this package. It needs tf2jax and TensorFlow, which are not installed with it.
"""

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import jax

import jax_dwbp
from jax_dwbp import _tensorflow_neighbours

_ATTRIBUTES = ("strides", "padding", "explicit_paddings", "data_format", "dilations")


def register() -> None:
    """Registers the ops with tf2jax, for all conversions that follow.

    These are DepthwiseConv2dNative, in the place of tf2jax's own, its BackpropInput and its
    BackpropFilter; and Conv2D with its two gradients, of which those with as many groups as
    channels run here as well, as Keras writes them for a ConvNeXt.

    So that whole training steps convert, what else the gradient of a network has is registered too
    where tf2jax has none: of activations, pooling, normalization, slices, padding, resizing and
    the cross entropy. Of FusedBatchNorm and ResizeBilinear tf2jax's own are replaced: the one
    leaves out what its gradient reads, the other is zero at the end of what it enlarges by more
    than 2 without half_pixel_centers.

    In a graph that has gradients those of custom gradients, as of swish, are there too. So they are
    not converted once more, which tf2jax can't ("Overlapping subgraphs"). To differentiate such a
    graph again in JAX through one of them is a LookupError, and a forward graph of several of them
    fails in tf2jax: `tf2jax.override_config("convert_custom_gradient", False)` around the
    conversion lets JAX differentiate what they compute.

    Raises:
      ImportError: tf2jax or TensorFlow is not installed, or this version of tf2jax keeps its ops
        elsewhere: it has no public way to add any.
    """
    try:
        # Not public, but there is no other way.
        table = importlib.import_module("tf2jax._src.ops")._jax_ops
        graphs = importlib.import_module("tf2jax._src.tf2jax")
        extract = graphs._extract_subgraphs
        better, lacking = _tensorflow_neighbours.parsers(table)
    except (ImportError, AttributeError, KeyError) as error:
        raise ImportError(
            f"`register` needs tf2jax 0.3.8, or a later one with its table of ops in the same "
            f"place, and TensorFlow: {error}"
        ) from error
    table.update(_OPS)
    table.update(better)
    for name, parser in lacking.items():
        table.setdefault(name, parser)
    if not hasattr(extract, "looks_for_gradients"):
        graphs.__dict__["_extract_subgraphs"] = _but_of_training_steps(extract)


def _but_of_training_steps(extract: Callable) -> Callable:
    """tf2jax's search for what custom gradients belong to, but for graphs that have them."""

    @functools.wraps(extract)
    def subgraphs(graph: Any, nodes: Any, library: Any) -> dict[str, Any]:
        has_gradients = any(re.search(r"Backprop|Grad(V\d+)?$", node.op) for node in graph.node)
        return {} if has_gradients else extract(graph, nodes, library)

    subgraphs.looks_for_gradients = True  # pyright: ignore[reportAttributeAccessIssue]
    return subgraphs


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


def _dense(function: Callable) -> Callable[[Any], Callable]:
    """For Conv2D, or one of its gradients: `function` gets what convolves x with f."""

    def parse(proto: Any) -> Callable:
        attributes = _attributes(proto)
        layout = attributes.get("data_format", "NHWC")
        dilations = attributes.get("dilations") or (1,) * 4
        height, width = layout.index("H"), layout.index("W")
        padding = attributes["padding"]
        if padding == "EXPLICIT":
            pads = attributes["explicit_paddings"]
            padding = [pads[2 * axis : 2 * axis + 2] for axis in (height, width)]

        def convolve(x: jax.Array, f: jax.Array) -> jax.Array:
            return jax_dwbp.conv_general_dilated(
                x,
                f,
                [attributes["strides"][axis] for axis in (height, width)],
                padding,
                rhs_dilation=[dilations[axis] for axis in (height, width)],
                dimension_numbers=(layout, "HWIO", layout),
                feature_group_count=x.shape[layout.index("C")] // f.shape[2],
            )

        return functools.partial(function, convolve)

    return parse


def _dense_backprop_input(convolve: Callable, sizes: Any, f: Any, dy: jax.Array) -> jax.Array:
    if len(sizes) != 4:
        raise ValueError(f"`input_sizes` of Conv2DBackpropInput must have 4 entries, got {sizes}")
    return _tensorflow_neighbours.transposed(lambda x: convolve(x, f), sizes, dy)


def _dense_backprop_filter(convolve: Callable, x: Any, sizes: Any, dy: jax.Array) -> jax.Array:
    return _tensorflow_neighbours.transposed(lambda f: convolve(x, f), sizes, dy)


_OPS = {
    "DepthwiseConv2dNative": _parser(jax_dwbp.depthwise_conv2d_native),
    "DepthwiseConv2dNativeBackpropInput": _parser(jax_dwbp.depthwise_conv2d_native_backprop_input),
    "DepthwiseConv2dNativeBackpropFilter": _parser(
        jax_dwbp.depthwise_conv2d_native_backprop_filter
    ),
    "Conv2D": _dense(lambda convolve, x, f: convolve(x, f)),
    # tf2jax's leaves the shape of strided ones to chance.
    "Conv2DBackpropInput": _dense(_dense_backprop_input),
    "Conv2DBackpropFilter": _dense(_dense_backprop_filter),
}
