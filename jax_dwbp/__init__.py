"""TensorFlow's depthwise convolution and its two gradients as ops that compose like JAX's own."""

import importlib.metadata

from jax_dwbp._api import Selection as Selection
from jax_dwbp._api import depthwise_conv2d_native as depthwise_conv2d_native
from jax_dwbp._api import (
    depthwise_conv2d_native_backprop_filter as depthwise_conv2d_native_backprop_filter,
)
from jax_dwbp._api import (
    depthwise_conv2d_native_backprop_input as depthwise_conv2d_native_backprop_input,
)
from jax_dwbp._api import implementations as implementations
from jax_dwbp._conv_general_dilated import conv_general_dilated as conv_general_dilated
from jax_dwbp._conv_general_dilated import in_place_of_lax as in_place_of_lax

__version__ = importlib.metadata.version("jax_dwbp")
