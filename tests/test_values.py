"""Each implementation, dtype and layout against loops in float64 or better."""

import jax
import numpy as np
import pytest
from cases import (
    CROPPED,
    DTYPES,
    EMPTY,
    FRAMEWORKS,
    IMPLEMENTATIONS,
    LAYERS,
    OPS,
    OTHER_RANKS,
    SMALL,
    TENSORFLOW,
    XLA,
)
from covering import covering

import jax_dwbp

every_op = pytest.mark.parametrize("op", OPS)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@covering(
    together=("case", "op", "implementation"),
    case=SMALL + OTHER_RANKS,
    op=OPS,
    dtype=DTYPES,
    data_format=("NHWC", "NCHW"),
    implementation=IMPLEMENTATIONS,
)
def test_small(case, op, dtype, data_format, implementation):
    a, b = case.operands(op, dtype)
    got = case.run(op, a, b, data_format, implementation=implementation)
    case.check(op, got, case.expected(op, a, b), dtype)


@pytest.mark.parametrize("case", CROPPED, ids=str)
@every_implementation
@every_op
def test_cropped(case, implementation, op):
    if implementation == "xla_taps" and case.filter[1] > 63:
        implementation = ("xla_taps", "lax")
    a, b = case.operands(op)
    got = case.run(op, a, b, implementation=implementation)
    case.check(op, got, case.expected(op, a, b), "float32")


@pytest.mark.parametrize("case", TENSORFLOW + XLA + FRAMEWORKS, ids=str)
def test_of_other_projects(case):
    operands = {op: case.operands(op) for op in OPS}
    results = jax.jit(lambda operands: {op: case.run(op, *operands[op]) for op in OPS})(operands)
    for op, got in results.items():
        case.check(op, got, case.expected(op, *operands[op]), "float32")


# Without lax, which adds up the filter gradient in one chain: of thousands of them, the worst errs
# by more than the tolerance has for a chain.
@covering(case=LAYERS, op=OPS, implementation=[i for i in IMPLEMENTATIONS if i != "lax"])
def test_layers(case, op, implementation):
    a, b = case.operands(op)
    got = case.run(op, a, b, implementation=implementation)
    case.check(op, got, case.expected(op, a, b), "float32")


@every_op
@every_implementation
def test_empty(op, implementation):
    for case in EMPTY:
        a, b = case.operands(op)
        got = case.run(op, a, b, implementation=implementation)
        np.testing.assert_array_equal(got, case.expected(op, a, b))


def test_same_values_eager_and_jitted():
    for case in SMALL + OTHER_RANKS:
        a, b = case.operands("input_grad")
        jitted = jax.jit(lambda a, b, case=case: case.run("input_grad", a, b))
        np.testing.assert_array_equal(jitted(a, b), case.run("input_grad", a, b))


def test_input_sizes_decide_between_inputs():
    """One output shape belongs to `stride` input heights; rows that no window touched get zeros."""
    f, dy = np.ones((3, 3, 1, 1), np.float32), np.ones((1, 2, 2, 1), np.float32)
    for height in (7, 8, 9):
        dx = jax_dwbp.depthwise_conv2d_native_backprop_input(
            (1, height, 7, 1), f, dy, strides=(1, 4, 4, 1), padding="VALID"
        )
        assert dx.shape == (1, height, 7, 1)
        np.testing.assert_array_equal(dx[0, :, 0, 0], ([1, 1, 1, 0, 1, 1, 1, 0, 0])[:height])


@every_implementation
@pytest.mark.parametrize("channels", (1, 16))
def test_nonfinite_values_stay_where_they_are(implementation, channels):
    """An infinity or a NaN of the data reaches what its windows touch, through every sum."""
    for size in (3, 9):  # unrolled and looped over
        x = np.zeros((1, 24, 24, channels), np.float32)
        x[0, 12, 12, 0] = np.inf
        f = np.ones((size, size, channels, 1), np.float32)
        y = jax_dwbp.depthwise_conv2d_native(x, f, (1, 1), "SAME", implementation=implementation)
        expected = np.zeros((24, 24), np.float32)
        reach = size // 2
        expected[12 - reach : 13 + reach, 12 - reach : 13 + reach] = np.inf
        np.testing.assert_array_equal(y[0, :, :, 0], expected)
