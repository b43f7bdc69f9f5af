"""TensorFlow's depthwise convolution and its two gradients as ops that compose like JAX's own."""

from jax_dwbp._api import (
    Selection,
    depthwise_conv2d_native,
    depthwise_conv2d_native_backprop_filter,
    depthwise_conv2d_native_backprop_input,
    implementations,
)
from jax_dwbp._conv_general_dilated import conv_general_dilated
from jax_dwbp._in_place_of_lax import in_place_of_lax, install, uninstall
from jax_dwbp._version import __version__

__all__ = [
    "Selection",
    "__version__",
    "conv_general_dilated",
    "depthwise_conv2d_native",
    "depthwise_conv2d_native_backprop_filter",
    "depthwise_conv2d_native_backprop_input",
    "implementations",
    "in_place_of_lax",
    "install",
    "uninstall",
]
