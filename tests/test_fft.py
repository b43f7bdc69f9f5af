"""Transforms: filters that are large, where they run by default, and what they can't do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DEFAULT_ON_CPU, DTYPES, HAS_NATIVE, OPS, OTHER_RANKS, SMALL, Case
from covering import covering
from jax.sharding import AxisType, PartitionSpec
from test_derivatives import check_linear
from test_partition import check_all_axes, check_that_nothing_is_sent, sent_by

import jax_dwbp

LARGE = (
    Case("line", (2, 300, 3), (200, 3, 2), padding=((199, 0),)),
    Case("line_above_signal", (1, 90, 2), (128, 2, 1)),
    Case("strided_line", (3, 257, 2), (64, 2, 1), (3,), ((20, 31),), (2,)),
    # Of these there are blocks.
    Case("long_line", (2, 5000, 2), (150, 2, 2), padding=((149, 0),)),
    Case("long_strided_line", (1, 7001, 1), (90, 1, 3), (3,), ((50, 100),), (2,)),
    Case("long_line_without_overlap", (1, 9000, 2), (3, 2, 1), (5,), "VALID"),
    Case("long_cropped_line", (1, 4100, 1), (40, 1, 1), (2,), "VALID"),
    Case("long_rows", (1, 3, 4000, 2), (2, 70, 2, 1), (2, 1), ((0, 1), (90, 3))),
    Case("picture", (2, 33, 40, 3), (31, 17, 3, 1)),
    Case("strided_picture", (1, 37, 41, 2), (16, 25, 2, 3), (2, 3), ((3, 9), (40, 0))),
    Case("cropped_picture", (1, 40, 30, 2), (20, 9, 2, 1), padding=((0, 25), (30, 0))),
    Case("valid_picture", (2, 40, 40, 1), (40, 38, 1, 2), padding="VALID"),
    Case("volume", (1, 12, 13, 14, 2), (9, 5, 7, 2, 1)),
    Case("strided_volume", (2, 9, 10, 11, 1), (4, 6, 5, 1, 2), (2, 1, 3), dilations=(1, 2, 1)),
)


@covering(case=LARGE, op=OPS, dtype=DTYPES, data_format=("NHWC", "NCHW"))
def test_large_filters(case, op, dtype, data_format):
    a, b = case.operands(op, dtype)
    got = case.run(op, a, b, data_format, implementation="fft")
    case.check(op, got, case.expected(op, a, b), dtype)


@pytest.mark.parametrize("case", SMALL + OTHER_RANKS, ids=str)
def test_small_filters(case):
    """Right as well, but for more than the rounding of a short sum."""
    for op in OPS:
        a, b = case.operands(op, "float64")
        got = case.run(op, a, b, implementation="fft")
        np.testing.assert_allclose(got, case.expected(op, a, b).astype(float), atol=1e-14)


@pytest.mark.parametrize("op", OPS)
def test_problems_with_filters_of_their_own(op):
    case = LARGE[4]
    problems = [case.operands(op, "float64", seed) for seed in range(3)]
    run = jax.vmap(functools.partial(case.run, op, implementation="fft"))
    got = run(*(np.stack(operand) for operand in zip(*problems, strict=True)))
    for result, (a, b) in zip(got, problems, strict=True):
        case.check(op, result, case.expected(op, a, b), "float64")


def runs(case, op="forward", **options):
    a, b = case.operands(op)
    run = functools.partial(case.run, op, **options)
    [found] = jax_dwbp.implementations(run, a, b, platform="cpu")
    return found.runs


@pytest.mark.parametrize(
    ("sizes", "kernel", "channels", "is_quicker"),
    [
        ((4096,), (256,), 1, False),
        ((4096,), (1024,), 1, True),
        ((4096,), (1024,), 16, False),
        ((4096,), (4096,), 16, True),
        ((64, 64), (15, 15), 1, False),
        ((64, 64), (45, 45), 1, True),
        ((64, 64), (31, 31), 16, False),
        ((224, 224), (63, 63), 3, True),
        ((16, 32, 32), (3, 3, 3), 1, False),
        ((16, 32, 32), (15, 15, 15), 1, True),
    ],
    ids=str,
)
def test_default_changes(sizes, kernel, channels, is_quicker):
    case = Case("large", (1, *sizes, channels), (*kernel, channels, 1))
    assert runs(case) == ("fft" if is_quicker else DEFAULT_ON_CPU)


def test_it_comes_before_what_is_slower_yet():
    """Where the native kernel would need more memory than it may have, or is not there."""
    column = Case("column", (1, 2048, 128, 16), (2048, 1, 16, 1))
    assert runs(column) == "fft"


def test_where_the_native_kernel_is_not():
    """Of what is exported, from fewer taps on."""
    for kernel, name in ((5, "xla_taps"), (15, "fft")):
        case = Case("exported", (1, 64, 64, 16), (kernel, kernel, 16, 1))
        run, operands = functools.partial(case.run, "forward"), case.operands("forward")
        [found] = jax_dwbp.implementations(run, *operands, platform="cpu", exported=True)
        assert found.runs == name


@pytest.mark.parametrize("precision", ["highest", ("default", "highest")])
def test_highest_precision_rules_it_out(precision):
    case = Case("large", (1, 4096, 1), (2048, 1, 1))
    assert (runs(case), runs(case, precision=precision)) == ("fft", DEFAULT_ON_CPU)


def test_padding_is_not_what_makes_a_filter_large():
    case = Case("full", (1, 4, 4, 3), (100, 100, 3, 1), padding=((99, 99), (99, 99)))
    assert runs(case) == DEFAULT_ON_CPU


def test_an_infinity_reaches_its_image_and_no_other():
    case = Case("images", (3, 5000, 2), (200, 2, 1))
    x, f = case.operands("forward")
    x[1, 100, 0] = np.inf
    y = np.asarray(case.run("forward", x, f, implementation="fft"))
    exact = case.expected("forward", np.where(np.isinf(x), 0, x), f)
    finite = np.isfinite(y)
    assert finite[[0, 2]].all() and finite[1, :, 1].all() and not finite[1, 80:120, 0].any()
    np.testing.assert_allclose(y[[0, 2]], exact[[0, 2]], atol=1e-5)


@pytest.mark.parametrize("case", [LARGE[0], LARGE[4], LARGE[-1]], ids=str)
@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_derivatives(case, op, forward_mode):
    run = functools.partial(case.run, op, implementation="fft", forward_mode=forward_mode)
    check_linear(run, case.operands(op, "float64"))


@pytest.mark.parametrize("sharded", ["batch", "channels"])
@pytest.mark.parametrize("op", OPS)
def test_sharded(op, sharded):
    check_that_nothing_is_sent(op, sharded, 2, implementation="fft")


@pytest.mark.parametrize("op", OPS)
def test_sharded_along_all_axes(op):
    check_all_axes(op, implementation="fft")


@pytest.mark.skipif(not HAS_NATIVE, reason="it was not compiled")
def test_it_does_not_run_where_xla_divides():
    """It would gather the images: a warning says so, and another one runs."""
    case = Case("large", (8, 1, 4096, 1), (1, 2048, 1, 1))
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.shard_map(
        functools.partial(case.run, "forward"),
        mesh=mesh,
        in_specs=(PartitionSpec("i"), PartitionSpec()),
        out_specs=PartitionSpec("i"),
        axis_names={"i"},
    )
    with pytest.warns(UserWarning, match="and not by fft: it is divided among devices"):
        program = jax.jit(sharded).lower(*case.operands("forward")).compile()
    assert "all-gather" not in sent_by(program)


def test_one_channel_in_place_of_lax():
    """Without groups too it is not left to lax."""
    jax_dwbp.install()
    x, f = (np.ones(size, np.float32) for size in (16_384, 2048))
    text = jax.jit(functools.partial(jnp.convolve, mode="same")).lower(x, f).as_text()
    jax_dwbp.uninstall()
    assert "stablehlo.fft" in text and "stablehlo.convolution" not in text


def test_of_integers_sums_are_exact():
    """Be they as long as they like: of these the native kernel errs by nothing."""
    rng = np.random.default_rng(0)
    x, f = (rng.integers(-128, 128, (1, 2, size), np.int8) for size in (4096, 1000))
    f = f.swapaxes(0, 1)

    def run(x, f):
        return jax_dwbp.conv_general_dilated(
            x, f, (1,), "VALID", feature_group_count=2, preferred_element_type="int32"
        )

    [found] = jax_dwbp.implementations(run, x, f, platform="cpu")
    assert found.runs == DEFAULT_ON_CPU and "sums of integers" in str(found.reasons["fft"])
    want = [np.correlate(x[0, c].astype(int), f[c, 0].astype(int), "valid") for c in range(2)]
    np.testing.assert_array_equal(run(x, f)[0], want)


def test_too_many_points():
    shapes = (
        jax.ShapeDtypeStruct(shape, "float32")
        for shape in ((1, 30_000, 20_000, 1), (1, 30_001, 1, 1))
    )
    run = functools.partial(jax_dwbp.depthwise_conv2d_native, strides=(1, 1), padding="SAME")
    [found] = jax_dwbp.implementations(run, *shapes, platform="cpu")
    assert "at most 2**30 points, got 1500000000" in str(found.reasons["fft"])


def test_long_lines_are_cut():
    """To transforms of a few times the filter."""
    case = Case("long", (1, 65_536, 1), (1024, 1, 1))
    run = functools.partial(case.run, "forward", implementation="fft")
    text = jax.jit(run).lower(*case.operands("forward")).as_text()
    lengths = re.findall(r"stablehlo.fft.* length = \[(.*?)\]", text)
    assert lengths and set(lengths) == {"4096"}
