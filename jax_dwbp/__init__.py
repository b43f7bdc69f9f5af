"""TensorFlow's depthwise convolution and its two gradients as ops that compose like JAX's own."""

import importlib.metadata

from jax_dwbp._api import (
    Selection,
    depthwise_conv2d_native,
    depthwise_conv2d_native_backprop_filter,
    depthwise_conv2d_native_backprop_input,
    implementations,
)
from jax_dwbp._conv_general_dilated import conv_general_dilated, in_place_of_lax

__all__ = [
    "Selection",
    "conv_general_dilated",
    "depthwise_conv2d_native",
    "depthwise_conv2d_native_backprop_filter",
    "depthwise_conv2d_native_backprop_input",
    "implementations",
    "in_place_of_lax",
]
try:
    __version__ = importlib.metadata.version("jax_dwbp")
except importlib.metadata.PackageNotFoundError:  # a copy in another project
    __version__ = "unknown"
