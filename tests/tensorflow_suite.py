"""Runs the tests of the depthwise ops in TensorFlow's wheel with this package in the ops' place.

A program, since the suite wants TensorFlow 1's global mode. Its argument is a regular expression
for the names of the tests; its standard output is a JSON object of those that passed, failed and
were skipped, and of how often each of our ops was called.

Half of the suite is for GPUs, to compare their kernels with the CPU's. Here the "GPU" is this
package: `use_gpu=True` means ours, `use_gpu=False` TensorFlow's own kernel.
"""

import collections
import contextlib
import json
import os
import re
import sys
import unittest

os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import test_util
from tensorflow.python.kernel_tests.nn_ops import depthwise_conv_op_base as base
from tensorflow.python.ops import nn_impl, nn_ops
from tensorflow.python.platform import test

import jax_dwbp

TENSORFLOW = {
    name: getattr(nn_ops, name)
    for name in (
        "depthwise_conv2d_native",
        "depthwise_conv2d_native_backprop_input",
        "depthwise_conv2d_native_backprop_filter",
    )
}
calls = collections.Counter()
use_ours = True


def run(name, shape, *operands, **attributes):
    """Our op as a node of a TensorFlow graph. The shape is that of the result, None if unknown."""
    dtype = next(x.dtype for x in operands if isinstance(x, tf.Tensor))

    def call(*arrays):
        calls[f"{name} {dtype.name} {attributes['data_format']}"] += 1
        arrays = iter(arrays)
        full = [next(arrays) if isinstance(x, tf.Tensor) else x for x in operands]
        return np.asarray(getattr(jax_dwbp, name)(*full, **attributes))

    result = tf.numpy_function(call, [x for x in operands if isinstance(x, tf.Tensor)], dtype)
    result.set_shape(shape)
    return result


def output_shape(x, f, attributes):
    """As our op's abstract evaluation has it, which the suite compares with its own."""
    if not x.shape.is_fully_defined():
        return None
    shapes = (jax.ShapeDtypeStruct(a.shape.as_list(), jnp.float32) for a in (x, f))
    return jax.eval_shape(
        lambda a, b: jax_dwbp.depthwise_conv2d_native(a, b, **attributes), *shapes
    ).shape


def forward(x, f, attributes):
    @tf.custom_gradient
    def op(x, f):
        def gradients(dy):
            return (
                run(
                    "depthwise_conv2d_native_backprop_input",
                    x.shape,
                    x.shape.as_list(),
                    f,
                    dy,
                    **attributes,
                ),
                run(
                    "depthwise_conv2d_native_backprop_filter",
                    f.shape,
                    x,
                    f.shape.as_list(),
                    dy,
                    **attributes,
                ),
            )

        y = run("depthwise_conv2d_native", output_shape(x, f, attributes), x, f, **attributes)
        return y, gradients

    return op(x, f)


def native(input, filter, strides, padding, data_format="NHWC"):
    if not use_ours:
        return TENSORFLOW["depthwise_conv2d_native"](input, filter, strides, padding, data_format)
    attributes = {"strides": strides, "padding": padding, "data_format": data_format}
    return forward(input, filter, attributes)


def interface(
    input, filter, strides, padding, rate=None, name=None, data_format="NHWC", dilations=None
):
    attributes = {"strides": strides, "padding": padding, "data_format": data_format}
    attributes["dilations"] = rate or dilations or (1, 1)
    x, f = tf.convert_to_tensor(input), tf.convert_to_tensor(filter)
    return forward(x, f, attributes)


def backprop_input(input_sizes, filter, out_backprop, strides, padding, data_format="NHWC"):
    name = "depthwise_conv2d_native_backprop_input"
    if not use_ours:
        return TENSORFLOW[name](input_sizes, filter, out_backprop, strides, padding, data_format)
    sizes = tf.get_static_value(input_sizes)
    attributes = {"strides": strides, "padding": padding, "data_format": data_format}
    return run(name, sizes, sizes, filter, out_backprop, **attributes)


def backprop_filter(input, filter_sizes, out_backprop, strides, padding, data_format="NHWC"):
    name = "depthwise_conv2d_native_backprop_filter"
    if not use_ours:
        return TENSORFLOW[name](input, filter_sizes, out_backprop, strides, padding, data_format)
    sizes = tf.get_static_value(filter_sizes)
    attributes = {"strides": strides, "padding": padding, "data_format": data_format}
    return run(name, sizes, input, sizes, out_backprop, **attributes)


class Suite(base.DepthwiseConv2DBase):
    @contextlib.contextmanager
    def cached_session(self, graph=None, config=None, use_gpu=True, force_gpu=False):
        """What the comparisons of the two devices open, once for each."""
        global use_ours
        use_ours = use_gpu
        try:
            with super().cached_session(graph, config, use_gpu, force_gpu) as session:
                yield session
        finally:
            use_ours = True


def set_up():
    jax.config.update("jax_enable_x64", True)
    tf.compat.v1.disable_v2_behavior()
    # The first makes decorators skip nothing, the second makes tests of NCHW do anything at all.
    test_util.is_gpu_available = test.is_gpu_available = lambda *args, **kwargs: True
    nn_ops.depthwise_conv2d_native = native
    nn_ops.depthwise_conv2d_native_backprop_input = backprop_input
    nn_ops.depthwise_conv2d_native_backprop_filter = backprop_filter
    nn_impl.depthwise_conv2d = interface


def main(pattern):
    set_up()
    every = unittest.TestLoader().getTestCaseNames(Suite)
    names = [name for name in every if re.search(pattern, name)]
    tests = unittest.TestSuite(map(Suite, names))
    result = unittest.TextTestRunner(sys.stderr, verbosity=2).run(tests)
    assert result.testsRun == len(names)
    failed = [test.id().rpartition(".")[2] for test, _ in result.failures + result.errors]
    skipped = [test.id().rpartition(".")[2] for test, _ in result.skipped]
    passed = [name for name in names if name not in failed + skipped]
    report = {"passed": passed, "failed": failed, "skipped": skipped, "calls": calls}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
