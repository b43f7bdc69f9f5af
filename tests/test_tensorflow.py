"""Values and derivatives against TensorFlow's own ops.

TensorFlow on a CPU is two implementations. Eigen's kernels have NHWC, equal strides and no
dilations (which its gradients ignore), sum half types in half precision and leave the result
uninitialised where nothing is summed. XLA has the rest.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    DETERMINISM,
    DTYPES,
    FRAMEWORKS,
    IMPLEMENTATIONS,
    OPS,
    SMALL,
    TENSORFLOW,
    XLA,
    Case,
    from_layout,
    layout_shape,
    to_layout,
)
from covering import covering

import jax_dwbp

tf = pytest.importorskip("tensorflow", reason="TensorFlow is what these tests compare with")

over_ops = pytest.mark.parametrize("op", OPS)


def tensorflow_op(case, op, a, b, data_format: Any = "NHWC"):
    """TensorFlow's op on NHWC operands: by Eigen where that can be trusted, else by XLA."""
    attributes = case.attributes(data_format)
    sizes = layout_shape((b.shape[0], *case.input[1:]), data_format)

    def native(a, b):
        if op == "forward":
            return tf.raw_ops.DepthwiseConv2dNative(input=a, filter=b, **attributes)
        if op == "input_grad":
            return tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
                input_sizes=sizes, filter=a, out_backprop=b, **attributes
            )
        return tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=a, filter_sizes=case.filter, out_backprop=b, **attributes
        )

    if eigen_has(case, b.dtype, data_format):
        return native(a, b)
    a = a if op == "input_grad" else to_layout(a, data_format)
    b = b if op == "forward" else to_layout(b, data_format)
    result = tf.function(native, jit_compile=True)(a, b).numpy()
    return result if op == "filter_grad" else from_layout(result, data_format)


def eigen_has(case, dtype="float64", data_format="NHWC"):
    return (
        data_format == "NHWC"
        and tf.as_dtype(dtype).size >= 4
        and case.strides[0] == case.strides[1]
        and case.dilations == (1, 1)
    )


def check(case, op, got, want, dtype):
    """`Case.check` with twice its tolerance, since TensorFlow's result is rounded as well."""
    return case.check(op, got / 2, np.asarray(want, np.float64) / 2, dtype)


def compare(case, op, dtype, data_format="NHWC", **options):
    a, b = case.operands(op, dtype)
    got = case.run(op, a, b, data_format, **options)
    return check(case, op, got, tensorflow_op(case, op, a, b, data_format), dtype)


@covering(
    case=SMALL, op=OPS, dtype=DTYPES, data_format=("NHWC", "NCHW"), implementation=IMPLEMENTATIONS
)
def test_small(case, op, dtype, data_format, implementation):
    compare(case, op, dtype, data_format, implementation=implementation)


@covering(
    apart=[("case", "dtype")],
    case=(*TENSORFLOW, *XLA, *FRAMEWORKS),
    op=OPS,
    dtype=("float32", "float64"),
)
def test_of_other_projects(case, op, dtype):
    compare(case, op, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hand_values(implementation):
    """Worked out by hand in TensorFlow's tests."""
    x = np.arange(1, 13, dtype=np.float32).reshape(1, 2, 3, 2)
    f = np.arange(1, 17, dtype=np.float32).reshape(2, 2, 2, 2)
    y = jax_dwbp.depthwise_conv2d_native(
        x, f, strides=(1, 1, 1, 1), padding="VALID", implementation=implementation
    )
    expected = [[[[196, 216, 272, 296], [252, 280, 344, 376]]]]
    np.testing.assert_array_equal(y, expected)


def derivatives(grad, total, loss, directions, args):
    """The gradient of `loss`, that of its derivative along the first direction, and so on."""
    gradients = []
    for direction in directions:
        gradient = grad(loss)
        gradients.append(gradient(*args))
        loss = along(gradient, direction, total)
    return gradients


def along(gradient, direction, total):
    return lambda *args: sum(total(g * v) for g, v in zip(gradient(*args), direction, strict=True))


def tensorflow_grad(loss):
    def gradient(*args):
        with tf.GradientTape() as tape:
            tape.watch(args)
            value = loss(*args)
        return tape.gradient(value, args)

    return gradient


@over_ops
@pytest.mark.parametrize(
    "case",
    (
        *(case for case in SMALL if case.name in ("multiplier", "stride2_even", "big_filter")),
        *(case for case in SMALL if case.name in ("valid_unused_rows", "causal_1d")),
        Case("explicit_strided", (1, 5, 6, 2), (3, 3, 2, 2), (2, 2), ((2, 0), (1, 3))),
    ),
    ids=str,
)
def test_derivatives(case, op):
    """Orders 1 to 3 of a cubic loss, none of them constant in an argument."""
    assert eigen_has(case)
    operands = case.operands(op, "float64")
    directions = [case.operands(op, "float64", seed) for seed in (1, 2, 3)]

    @jax.jit
    def ours(*args):
        def loss(a, b):
            return jnp.sum(case.run(op, a, b) ** 3)

        def grad(loss):
            return jax.grad(loss, argnums=(0, 1))

        return derivatives(grad, jnp.sum, loss, directions, args)

    def theirs(*args):
        def loss(a, b):
            return tf.reduce_sum(tensorflow_op(case, op, a, b) ** 3)

        return derivatives(tensorflow_grad, tf.reduce_sum, loss, directions, args)

    for got_order, want_order in zip(
        ours(*operands), theirs(*map(tf.constant, operands)), strict=True
    ):
        for got, want in zip(got_order, want_order, strict=True):
            # Every order runs all three ops.
            allowed = sum(case.tolerance(each, "float64") for each in OPS)
            scale = np.abs(want).max()
            assert scale > 0
            np.testing.assert_allclose(got, want, rtol=0, atol=allowed * scale)


@over_ops
@pytest.mark.parametrize("argument", range(2))
def test_second_derivative_of_what_is_linear(op, argument):
    """TensorFlow has none, JAX has zeros."""
    case = next(case for case in SMALL if case.name == "multiplier")
    operands = case.operands(op, "float64")
    weights = np.random.default_rng(0).uniform(-1, 1, case.expected(op, *operands).shape)

    def arguments(v):
        return [v if i == argument else fixed for i, fixed in enumerate(operands)]

    def loss(v):
        return jnp.sum(weights * case.run(op, *arguments(v)))

    def tensorflow_loss(v):
        return tf.reduce_sum(weights * tensorflow_op(case, op, *arguments(v)))

    v = operands[argument]
    got, [want] = jax.grad(loss)(v), tensorflow_grad(tensorflow_loss)(tf.constant(v))
    check(case, op, got, want, "float64")
    [second] = tensorflow_grad(lambda v: tf.reduce_sum(tensorflow_grad(tensorflow_loss)(v)[0]))(
        tf.constant(v)
    )
    assert second is None
    second = jax.grad(lambda v: jnp.sum(jax.grad(loss)(v)))(v)
    np.testing.assert_array_equal(second, np.zeros_like(v))


@over_ops
def test_determinism(op):
    """One of the two configurations: they differ in nothing that matters here but the time."""
    case = DETERMINISM[1]
    a, b = map(jnp.asarray, case.operands(op, "float32"))
    first, second = case.run(op, a, b), case.run(op, a, b)
    np.testing.assert_array_equal(first, second)
