"""Transforms: filters that are large, where they run by default, and what they can't do."""

import functools
import re

import jax
import numpy as np
import pytest
from cases import DEFAULT_ON_CPU, DTYPES, OPS, OTHER_RANKS, SMALL, Case
from covering import covering

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
def test_default_is_what_is_quicker(sizes, kernel, channels, is_quicker):
    case = Case("large", (1, *sizes, channels), (*kernel, channels, 1))
    assert runs(case) == ("fft" if is_quicker else DEFAULT_ON_CPU)


def test_it_comes_before_what_is_slower_yet():
    """Where the native kernel would need more memory than it may have, or is not there."""
    column = Case("column", (1, 2048, 128, 16), (2048, 1, 16, 1))
    assert runs(column) == "fft"
    assert runs(Case("small", (1, 64, 8, 16), (5, 5, 16, 1)), implementation=None) != "fft"


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
