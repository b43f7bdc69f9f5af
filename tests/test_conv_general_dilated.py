"""The stand-in for lax's convolution: the same results, through this package where it can."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_dwbp

LAYOUTS = (
    None,
    ("NCHW", "OIHW", "NCHW"),
    ("NHWC", "HWIO", "NHWC"),
    ("NHWC", "OIHW", "NCHW"),
    ("HWCN", "HWIO", "HWCN"),
    ("CHWN", "HWOI", "NHCW"),
)


def operands(
    layout, channels=4, multiplier=1, batch=2, spatial=(7, 6), window=(3, 2), dtype="float32"
):
    rank = len(spatial)
    ones = (1,) * (rank + 2)
    numbers = lax.conv_dimension_numbers(ones, ones, layout)
    rng = np.random.default_rng(0)
    arrays = []
    for dims, spec in (
        ((batch, channels, *spatial), numbers.lhs_spec),
        ((channels * multiplier, 1, *window), numbers.rhs_spec),
    ):
        shape = [0] * len(dims)
        for size, axis in zip(dims, spec, strict=True):
            shape[axis] = size
        arrays.append(jnp.asarray(rng.uniform(-1, 1, shape), dtype))
    return arrays


def ours(function, *arguments):
    """How many convolutions run here. Of each other one `implementations` gives the reason."""
    found = jax_dwbp.implementations(function, *arguments, platform="cpu")
    left = [selection for selection in found if selection.op == "conv_general_dilated"]
    assert all(selection.runs == "lax" and selection.reasons["jax_dwbp"] for selection in left)
    return len(found) - len(left)


def check(lhs, rhs, runs_here, **options):
    """Same result, dtype and gradients as lax, run by this package or not."""

    def run(conv):
        return lambda lhs, rhs: conv(lhs=lhs, rhs=rhs, **options)

    got, want = run(jax_dwbp.conv_general_dilated), run(lax.conv_general_dilated)
    assert ours(got, lhs, rhs) == runs_here
    y, expected = got(lhs, rhs), want(lhs, rhs)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    eps = max(float(jnp.finfo(x.dtype).eps) for x in (lhs, y))
    np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(expected, np.float64), rtol=8 * eps, atol=8 * eps
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_depthwise(layout):
    for multiplier, padding, (strides, dilation) in itertools.product(
        (1, 2),
        ("SAME", "valid", "same_lower", ((1, 2), (0, 1)), ((-2, 1), (2, -1))),
        (((1, 1), None), ((2, 1), (1, 2))),
    ):
        lhs, rhs = operands(layout, multiplier=multiplier)
        check(
            *(lhs, rhs, 1),
            window_strides=strides,
            padding=padding,
            rhs_dilation=dilation,
            dimension_numbers=layout,
            feature_group_count=4,
        )


@pytest.mark.parametrize("layout", [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), None], ids=str)
def test_one_dimension(layout):
    paddings = ("same", "VALID", "SAME_LOWER", [(2, 0)], [(-3, 4)])
    for padding, stride in itertools.product(paddings, (1, 2)):
        lhs, rhs = operands(layout, multiplier=2, spatial=(9,), window=(4,))
        check(
            *(lhs, rhs, 1),
            window_strides=[stride],
            padding=padding,
            dimension_numbers=layout,
            feature_group_count=4,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": np.int64(4)},
        {"batch_group_count": np.int32(1)},
        {"window_strides": np.array([1, 2])},
        {"rhs_dilation": np.array([2, 1])},
        {"lhs_dilation": np.array([1, 1]), "padding": ((0, 0), (0, 0))},
        {"padding": np.array([[1, 1], [0, 2]])},
        {"padding": [np.array([1, 1]), (0, 2)]},
    ],
    ids=str,
)
def test_integers_of_numpy(options):
    """Each way of writing an integer or a vector that lax takes."""
    lhs, rhs = operands(None)
    defaults = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4}
    check(lhs, rhs, 1, **{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"lhs_dilation": (40, 1), "padding": ((1, 1), (1, 0)), "window_strides": (1, 2)},
            "lhs_dilation is (40, 1), under strides of (1, 2)",
        ),
        ({"padding": ((0, 0), (-3, -2))}, "the output is empty"),
        ({"batch_group_count": 1, "feature_group_count": 1}, "without groups: 4 inputs and 4 out"),
        ({"window_strides": (1, 9**12)}, "strides and dilations must be below 2**31"),
    ],
    ids=str,
)
def test_other_calls_go_to_lax(options, reason):
    lhs, rhs = operands(None)
    if "batch_group_count" in options:
        rhs = jnp.concatenate([rhs] * 4, axis=1)
    options = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4, **options}
    check(lhs, rhs, 0, **options)

    def gradient(lhs, rhs):
        return jax.grad(lambda lhs: jax_dwbp.conv_general_dilated(lhs, rhs, **options).sum())(lhs)

    found = jax_dwbp.implementations(gradient, lhs, rhs, platform="cpu")
    assert found or reason == "the output is empty"  # of which there is no gradient
    for selection in found:
        assert selection.op == "conv_general_dilated" and selection.runs == "lax"
        assert str(selection.reasons["jax_dwbp"]).startswith(reason)


@pytest.mark.parametrize(("features", "runs_here"), [(1, 1), (16, 1), (17, 0)])
def test_one_channel(features, runs_here):
    """lax's own is fast for many features."""
    lhs, rhs = operands(None, channels=1, multiplier=features)
    check(lhs, rhs, runs_here, window_strides=(1, 1), padding="SAME", feature_group_count=1)


def test_ones_for_lhs_dilation_and_no_out_sharding():
    """What flax.nnx and equinox pass on every call."""
    lhs, rhs = operands(None)
    check(
        *(lhs, rhs, 1),
        window_strides=(1, 1),
        padding=[(1, 1), (1, 1)],
        lhs_dilation=(1, 1),
        rhs_dilation=(1, 1),
        feature_group_count=4,
        precision=lax.Precision.HIGHEST,
        out_sharding=None,
        preferred_element_type=None,
    )


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [
        ("bfloat16", None),
        ("bfloat16", "float32"),
        ("bfloat16", "float64"),
        ("float16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float64"),
        ("float64", "float64"),
    ],
)
def test_preferred_element_type(dtype, preferred):
    lhs, rhs = operands(None, dtype=dtype)
    check(
        *(lhs, rhs, 1),
        window_strides=(1, 1),
        padding="SAME",
        feature_group_count=4,
        preferred_element_type=preferred and jnp.dtype(preferred),
    )


def test_float64_without_x64_goes_to_lax():
    """It warns of the dtype that the result won't have, or doesn't."""
    lhs, rhs = operands(None)
    options = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4}
    with jax.enable_x64(False):
        for dtype in (float, np.float64, "float64"):
            warned = []
            for conv in (lax.conv_general_dilated, jax_dwbp.conv_general_dilated):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    conv(lhs, rhs, **options, preferred_element_type=dtype)
                warned.append([str(warning.message) for warning in caught])
            assert warned[0] == warned[1]


def test_integers_go_to_lax():
    lhs, rhs = (jnp.round(4 * x).astype("int32") for x in operands(None))
    run = jax.jit(
        lambda lhs, rhs: jax_dwbp.conv_general_dilated(
            lhs, rhs, (1, 1), "SAME", feature_group_count=4
        )
    )
    want = lax.conv_general_dilated(lhs, rhs, (1, 1), "SAME", feature_group_count=4)
    np.testing.assert_array_equal(run(lhs, rhs), want)


def test_derivatives_in_both_modes():
    """Unlike the three ops this function takes lax's place, so it has lax's derivatives."""
    lhs, rhs = operands(("NHWC", "HWIO", "NHWC"), multiplier=2, dtype="float64", spatial=(4, 3))

    def loss(conv, lhs, rhs):
        y = conv(
            *(lhs, rhs, (1, 2), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )
        return jnp.sum(jnp.sin(y))

    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        got, want = (
            derivative(loss, argnums=2)(conv, lhs, rhs)
            for conv in (jax_dwbp.conv_general_dilated, lax.conv_general_dilated)
        )
        np.testing.assert_allclose(got, want, atol=1e-12)
    batched = jax.vmap(jax.grad(loss, argnums=2), (None, 0, None))
    got, want = (
        batched(conv, jnp.stack([lhs, 2 * lhs]), rhs)
        for conv in (jax_dwbp.conv_general_dilated, lax.conv_general_dilated)
    )
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.filterwarnings("ignore:divide by zero")  # NumPy's, inside lax
@pytest.mark.parametrize(
    "change",
    [
        {"window_strides": (0, 1)},
        {"window_strides": (1,)},
        {"window_strides": (1, 1, 1, 1)},
        {"padding": "EQUAL"},
        {"lhs_dilation": (2, 1)},  # and "SAME"
        {"padding": ((1, 1),)},
        {"feature_group_count": 2},
        {"feature_group_count": 3},
        {
            "batch_group_count": 2,
            "rhs": jnp.ones((8, 1, 3, 2), "float32"),
        },  # and groups of features
        {"dimension_numbers": ("NHWC", "HWIO", "NH")},
        {"precision": "exact"},
        {"preferred_element_type": jnp.bfloat16},
        {"rhs": None},
        {"rhs": "kernel"},
    ],
    ids=str,
)
def test_errors_are_those_of_lax(change):
    lhs, rhs = operands(None)
    options = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4}

    def outcome(conv):
        try:
            return conv(**{"lhs": lhs, "rhs": rhs, **options, **change}).shape
        except Exception as error:
            return type(error), str(error)[:80]

    assert outcome(jax_dwbp.conv_general_dilated) == outcome(lax.conv_general_dilated)
