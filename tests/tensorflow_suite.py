"""Runs the tests of the depthwise ops that ship in TensorFlow's wheel with this package in their place.

A program, since the suite wants TensorFlow 1's global mode: its argument is a regular expression for
the names of the tests, its standard output a JSON object of those that passed, failed and were
skipped and of how often each of our ops was called.

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

jax.config.update("jax_enable_x64", True)
tf.compat.v1.disable_v2_behavior()
# The first makes decorators skip nothing, the second makes the tests of NCHW do anything at all.
test_util.is_gpu_available = test.is_gpu_available = lambda *args, **kwargs: True

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
        result = getattr(jax_dwbp, name)(*full, **attributes)
        # TensorFlow trusts what a NumPy function claims of its dtype.
        assert result.dtype == jnp.dtype(dtype.as_numpy_dtype)
        return np.asarray(result)

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


nn_ops.depthwise_conv2d_native = native
nn_ops.depthwise_conv2d_native_backprop_input = backprop_input
nn_ops.depthwise_conv2d_native_backprop_filter = backprop_filter
nn_impl.depthwise_conv2d = interface


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


class Result(unittest.TextTestResult):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passed = []

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed.append(test)


def main(pattern):
    names = unittest.TestLoader().getTestCaseNames(Suite)
    tests = unittest.TestSuite(Suite(name) for name in names if re.search(pattern, name))
    result = unittest.TextTestRunner(sys.stderr, resultclass=Result, verbosity=2).run(tests)
    outcomes = {
        "passed": result.passed,
        "failed": [test for test, _ in result.failures + result.errors],
        "skipped": [test for test, _ in result.skipped],
    }
    report = {
        outcome: [test.id().rpartition(".")[2] for test in tests]
        for outcome, tests in outcomes.items()
    }
    json.dump({**report, "calls": calls}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
