"""TensorFlow's own tests of its depthwise kernels, run against this package by tensorflow_suite.py.

Strong in float32 and float64. In float16 they can't see a gradient: all zeros pass.
"""

import importlib.util
import itertools
import json
import pathlib

import fresh_process
import pytest
from cases import DTYPES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="the suite is in TensorFlow's wheel"
)

PROGRAM = pathlib.Path(__file__).with_name("tensorflow_suite.py")
FORWARD = "depthwise_conv2d_native"
INPUT_GRAD = "depthwise_conv2d_native_backprop_input"
FILTER_GRAD = "depthwise_conv2d_native_backprop_filter"


# Three parts, each test in exactly one: 20 tests in all.
@pytest.mark.parametrize(
    ("pattern", "count", "ops"),
    [
        ("^(?!.*Grad)", 8, {FORWARD}),
        ("InputGrad", 6, {FORWARD, INPUT_GRAD}),
        ("(?<!Input)Grad", 6, {FORWARD, FILTER_GRAD}),
    ],
    ids=["forward", "input_grad", "filter_grad"],
)
def test_suite(pattern, count, ops):
    status, out, err = fresh_process.finish(fresh_process.start(PROGRAM, pattern))
    assert status == 0, err[-4000:]
    report = json.loads(out)
    assert report["failed"] == [], err[-4000:]
    # unittest takes this helper of TensorFlow's test class for a test.
    assert set(report["skipped"]) <= {"test_session"}
    assert len(report["passed"]) == count
    # Some of the tests return early where they would be skipped, so what was called matters.
    kinds = itertools.product(ops, DTYPES, ("NHWC", "NCHW"))
    assert set(report["calls"]) == {" ".join(kind) for kind in kinds}
