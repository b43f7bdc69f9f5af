"""Random convolutions of lax's, in every form that it has for them, against loops in float64."""

import functools
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lax_convolution import result_and_gradients
from test_fuzz import integer, pick

import jax_dwbp

# Why what is depthwise is lax's all the same.
NOTHING_LEFT = ("it is of padding alone",)


@pytest.fixture(params=["stand_in", "installed"])
def conv(request):
    """The stand-in, or lax's own after `install`."""
    if request.param == "stand_in":
        yield jax_dwbp.conv_general_dilated
        return
    jax_dwbp.install()
    yield lax.conv_general_dilated
    jax_dwbp.uninstall()


def sizes(rng):
    """Batch, channels, features, channels of a group, the two numbers of groups, and whether all of
    its derivatives are depthwise too."""
    form = pick(rng, "depthwise", "depthwise", "one output", "groups", "batch", "batch", "dense")
    groups, many, batch = integer(rng, 2, 5), integer(rng, 1, 3), integer(rng, 1, 3)
    if form == "depthwise":
        return batch, groups, groups * many, 1, groups, 1, True
    if form == "one output":
        return batch, groups * many, groups, many, groups, 1, True
    if form == "groups":
        return batch, groups * 2, groups * many, 2, groups, 1, False
    if form == "batch":
        return groups * pick(rng, 1, 1, 1, 2), batch, groups * many, batch, 1, groups, False
    channels, features = pick(rng, 1, 1, 2), pick(rng, 1, 3, 17)
    return batch, channels, features, channels, 1, 1, False


def draw(seed, ranks=(1, 2, 2)):
    """Operands, in lax's default layout, u for its gradients, the options of a call, and whether it
    and its gradients are depthwise."""
    rng = np.random.default_rng([5, seed])
    rank = pick(rng, *ranks)
    while True:
        batch, channels, features, group, groups, batch_groups, is_ours = sizes(rng)
        spatial = tuple(integer(rng, 1, 9) for _ in range(rank))
        window = tuple(integer(rng, 1, 5) for _ in range(rank))
        strides = tuple(pick(rng, 1, 1, 2, 3) for _ in range(rank))
        lhs_dilation, rhs_dilation = (1,) * rank, tuple(pick(rng, 1, 1, 2) for _ in range(rank))
        if rng.random() < 0.4:
            lhs_dilation = tuple(pick(rng, 1, 2, 3) for _ in range(rank))
            strides = (1,) * rank if rng.random() < 0.7 else strides
        # lax reads out of bounds for some pads outside of this range.
        reach = [(k - 1) * d for k, d in zip(window, rhs_dilation, strict=True)]
        if is_ours:
            pads = tuple((integer(rng, -3, 4), integer(rng, -3, 4)) for _ in range(rank))
        else:
            pads = tuple((integer(rng, 0, n), integer(rng, 0, n)) for n in reach)
        options = {
            "window_strides": strides,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "padding": pads,
            "feature_group_count": groups,
            "batch_group_count": batch_groups,
        }
        steps = [*zip(window, strides, strict=True), *zip(window, lhs_dilation, strict=True)]
        if groups == batch_groups == 1 and (2, 2) in steps:
            continue  # XLA aborts the process at some gradients of these
        lhs, rhs = (batch, channels, *spatial), (features, group, *window)
        try:
            out = jax.eval_shape(
                functools.partial(lax.conv_general_dilated, **options),
                *(jax.ShapeDtypeStruct(shape, "float32") for shape in (lhs, rhs)),
            )
        except (ValueError, TypeError):  # negative pads that leave less than nothing
            continue
        if 0 not in out.shape:
            break
    dtype = pick(rng, "float32", "float32", "float64", "bfloat16", "float16")
    lhs, rhs, u = (jnp.asarray(rng.uniform(-1, 1, shape), dtype) for shape in (lhs, rhs, out.shape))
    return lhs, rhs, u, options, is_ours


def transposed(conv, options, seed):
    """A call in some layout of each array, of operands and to a result in lax's default one."""
    rank = len(options["padding"]) + 2
    rng = np.random.default_rng([6, seed])
    numbers = lax.ConvDimensionNumbers(*(tuple(map(int, rng.permutation(rank))) for _ in range(3)))
    if rng.random() < 0.3:
        numbers = None

    def function(lhs, rhs):
        if numbers is None:
            return conv(lhs, rhs, **options)
        lhs = lhs.transpose(np.argsort(numbers.lhs_spec))
        rhs = rhs.transpose(np.argsort(numbers.rhs_spec))
        y = conv(lhs, rhs, **options, dimension_numbers=numbers)
        return y.transpose(numbers.out_spec)

    return function


def check(got, want, dtype, terms):
    eps = float(jnp.finfo(dtype).eps)
    atol = (4 if dtype.itemsize > 2 else 1) * eps * math.sqrt(terms + 8)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2 * eps, atol=atol)


def counts(lhs, rhs):
    """Of the terms in the sums of the result and of its gradients, at most."""
    return math.prod(rhs.shape[1:]), rhs.size, lhs.size


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    ("ranks", "seeds"),
    [((1, 2, 2), range(i, i + 10)) for i in range(0, 120, 10)]
    + [((3,), range(i, i + 4)) for i in range(2000, 2012, 4)],
    ids=str,
)
def test_result_and_gradients(conv, ranks, seeds):
    cases = [draw(seed, ranks) for seed in seeds]

    def one(seed, options, lhs, rhs, u):
        function = transposed(conv, options, seed)
        y, pullback = jax.vjp(function, lhs, rhs)
        _, tangent = jax.jvp(function, (lhs, rhs), (lhs, rhs))
        return y, *pullback(u), tangent

    def run(arrays):
        every = zip(seeds, cases, arrays, strict=True)
        return [one(seed, options, *some) for seed, (*_, options, _), some in every]

    got = jax.jit(lambda arrays: run(arrays))([case[:3] for case in cases])
    for seed, (lhs, rhs, u, options, is_ours), results in zip(seeds, cases, got, strict=True):
        y, dx, df, tangent = results
        for found in jax_dwbp.implementations(functools.partial(one, seed, options), lhs, rhs, u):
            reason = found.reasons.get("jax_dwbp")
            assert not (is_ours and reason) or reason in NOTHING_LEFT
        want = result_and_gradients(lhs, rhs, u, options)
        terms = counts(lhs, rhs)
        for result, expected, count in zip((y, dx, df), want, terms, strict=True):
            assert result.dtype == lhs.dtype
            check(result, expected, lhs.dtype, count)
        check(tangent, 2 * want[0], lhs.dtype, 4 * terms[0])


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)], ids=str)
@pytest.mark.parametrize(
    ("ranks", "seeds"),
    [((1, 2, 2), range(i, i + 5)) for i in range(1000, 1020, 5)] + [((3,), range(3000, 3002))],
    ids=str,
)
def test_vmap(conv, mapped, ranks, seeds):
    cases = [draw(seed, ranks) for seed in seeds]
    parts = ((1, 2), (-2, 1))

    def stacked(lhs, rhs, u):
        pairs = ((a, b) if m == 0 else (1, 1) for m, a, b in zip(mapped, *parts, strict=True))
        many = [
            x if m is None else jnp.stack([jnp.asarray(k, x.dtype) * x for k in pair])
            for x, m, pair in zip((lhs, rhs), mapped, pairs, strict=True)
        ]
        return *many, jnp.stack([u, u])

    def run(arrays):
        results = []
        for seed, (*_, options, _), (lhs, rhs, u) in zip(seeds, cases, arrays, strict=True):
            function = transposed(conv, options, seed)

            def one(lhs, rhs, u, function=function):
                y, pullback = jax.vjp(function, lhs, rhs)
                return y, *pullback(u)

            results.append(jax.vmap(one, (*mapped, 0))(lhs, rhs, u))
        return results

    arrays = [stacked(*case[:3]) for case in cases]
    got = jax.jit(lambda arrays: run(arrays))(arrays)
    for (lhs, rhs, u), (*_, options, _), results in zip(arrays, cases, got, strict=True):
        for i in range(2):
            a, b = (x if m is None else x[i] for x, m in zip((lhs, rhs), mapped, strict=True))
            want = result_and_gradients(a, b, u[i], options)
            for result, expected, count in zip(results, want, counts(a, b), strict=True):
                check(result[i], expected, lhs.dtype, 4 * count)


@pytest.mark.parametrize(
    "pads", [((-3, 3), (1, 1)), ((0, 1), (2, -8)), ((-2, 2), (-9, 9))], ids=str
)
@pytest.mark.parametrize("layout", [None, ("NHWC", "HWIO", "NHWC")], ids=str)
def test_padding_alone(conv, pads, layout):
    """Where negative pads leave nothing of lhs the result is zeros, and so are its gradients."""
    lhs, rhs = np.ones((2, 3, 3, 8), "f4"), np.ones((6, 1, 3, 2), "f4")
    if layout:
        lhs, rhs = lhs.transpose(0, 2, 3, 1), rhs.transpose(2, 3, 1, 0)
    function = functools.partial(
        conv,
        window_strides=(1, 1),
        padding=pads,
        dimension_numbers=layout,
        feature_group_count=3,
    )
    assert "lax" not in taken(function, lhs, rhs)
    results = jax.jit(lambda *x: (function(*x), *jax.vjp(function, *x)[1](function(*x) + 1)))(
        lhs, rhs
    )
    for result, like in zip(results[1:], (lhs, rhs), strict=True):
        np.testing.assert_array_equal(result, np.zeros_like(like))
    assert not np.any(results[0])


def taken(function, *args):
    """The ops that run in place of lax's convolutions, "lax" where none does."""
    found = jax_dwbp.implementations(function, *args, platform="cpu")
    return ["lax" if one.op == "conv_general_dilated" else one.op for one in found]


@pytest.mark.parametrize(
    ("form", "dtype", "result", "mapped"),
    [
        ("convolution", "int8", None, (None, None)),
        ("groups", "uint8", "int32", (0, None)),
        ("transpose", "int8", "int16", (None, 0)),
        ("one channel", "int16", None, (0, 0)),
        ("transpose", "int16", "int64", (None, None)),
    ],
)
def test_integers(conv, form, dtype, result, mapped):
    """Are exact; what is beyond the result's type loses its high bits, as by lax."""
    lhs, rhs, options, _ = FORMS[form]
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC, **options}
    limits, rng = jnp.iinfo(dtype), np.random.default_rng(0)
    lhs, rhs = (
        rng.integers(limits.min, limits.max, shape if m is None else (3, *shape), dtype, True)
        for shape, m in zip((lhs, rhs), mapped, strict=True)
    )
    function = functools.partial(conv, **options, preferred_element_type=result)
    if mapped != (None, None):
        function = jax.vmap(function, mapped)
    assert "lax" not in taken(function, lhs, rhs)
    got = jax.jit(function)(lhs, rhs)

    def exact(lhs, rhs):  # the products of NumPy's integers, in float64 exact below 2^53
        exactly = functools.partial(lax.conv_general_dilated, **options)
        return np.asarray(exactly(lhs.astype(np.float64), rhs.astype(np.float64)))

    jax_dwbp.uninstall()
    want = [
        exact(*(x if m is None else x[i] for x, m in zip((lhs, rhs), mapped, strict=True)))
        for i in range(3)
    ]
    want = want[0] if mapped == (None, None) else np.stack(want)
    assert got.dtype == (result or dtype)
    np.testing.assert_array_equal(got, want.astype(np.int64).astype(got.dtype))


def test_integers_beyond_floats(conv):
    """Are lax's."""
    lhs, rhs, options, _ = FORMS["convolution"]
    function = functools.partial(conv, **options, padding="SAME", dimension_numbers=NHWC)
    int32, int16 = ([jnp.ones(shape, dtype) for shape in (lhs, rhs)] for dtype in ("i4", "i2"))
    assert taken(function, *int32) == ["lax"]
    with jax.enable_x64(False):
        assert taken(function, *int16) == ["lax"]
        long = jnp.ones((1, 33, 33, 4), "i1"), jnp.ones((33, 33, 1, 4), "i1")
        assert taken(function, *long) == ["lax"]
        assert "which floats do not sum exactly" in str(jax_dwbp.implementations(function, *long))


@pytest.mark.parametrize(("dtype", "result"), [("i2", "i1"), ("i1", "u1"), ("i1", "u4")])
def test_results_that_lax_refuses(conv, dtype, result):
    x, f = (jnp.ones(shape, dtype) for shape in ((1, 2, 5, 5), (2, 1, 3, 3)))
    with pytest.raises(TypeError, match="preferred_element_type"):
        conv(x, f, (1, 1), "SAME", feature_group_count=2, preferred_element_type=result)


def test_zeros_that_would_fill_the_memory(conv):
    """Lhs is written out where it is dilated under strides, unless that is many times as much."""

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 2, 40, 40), (2, 1, 3, 3))]

    def found(dilation):
        pads = functools.partial(
            conv,
            window_strides=(3, 3),
            padding=((0, 0), (0, 0)),
            lhs_dilation=(dilation,) * 2,
            feature_group_count=2,
        )
        return taken(pads, *shapes)

    assert found(4) == ["forward"] and found(5) == ["lax"]


def test_symbolic_batch_of_integers(conv):
    """As channels of a group, where the number of terms is not known."""
    [batch] = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((4, batch, size, size), "int8") for size in (9, 3)]
    function = functools.partial(
        conv, window_strides=(1, 1), padding=((0, 0), (0, 0)), batch_group_count=4
    )
    exported = jax.export.export(jax.jit(function))(*shapes)
    assert exported.out_avals[0].shape == (1, 4, 7, 7)


NHWC = ("NHWC", "HWIO", "NHWC")
FORMS = {
    # The shapes of lhs and rhs, options, and the ops of the result and of both gradients.
    "convolution": (
        (2, 9, 9, 4),
        (3, 3, 1, 8),
        {"window_strides": (2, 2), "feature_group_count": 4},
        ["forward", "input_grad", "filter_grad"],
    ),
    "one channel": ((6, 8, 8, 1), (3, 3, 1, 1), {}, ["forward", "forward", "filter_grad"]),
    "to one channel": ((6, 8, 8, 3), (3, 3, 3, 1), {}, ["input_grad", "forward", "filter_grad"]),
    "groups": (
        (2, 8, 8, 12),
        (3, 3, 3, 8),
        {"feature_group_count": 4},
        ["input_grad", "forward", "filter_grad"],
    ),
    "transpose": (
        (2, 5, 5, 4),
        (4, 4, 1, 4),
        {"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2)), "feature_group_count": 4},
        ["input_grad", "forward", "filter_grad"],
    ),
    "strided": (
        (2, 9, 9, 1),
        (4, 4, 1, 8),
        {"window_strides": (3, 3)},
        ["lax"] * 2 + ["input_grad"],
    ),
    "both dilations": (
        (2, 5, 5, 4),
        (4, 4, 1, 4),
        {
            "lhs_dilation": (2, 3),
            "window_strides": (1, 2),
            "padding": ((2, 1), (3, 2)),
            "feature_group_count": 4,
        },
        ["forward", "forward", "filter_grad"],
    ),
    "pixels": ((2, 9, 9, 16), (1, 1, 16, 1), {}, ["lax"] * 3),
    "whole image": ((1, 5, 5, 3), (5, 5, 3, 9), {"padding": "VALID"}, ["lax"] * 3),
    "many groups": ((1, 5, 5, 36), (3, 3, 18, 36), {"feature_group_count": 2}, ["lax"] * 3),
    "dense": ((2, 5, 5, 3), (3, 3, 3, 8), {}, ["lax"] * 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_taken(conv, form):
    """Of a call and of its gradients, in the order of the program."""
    lhs, rhs, options, want = FORMS[form]
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC, **options}

    def gradients(lhs, rhs):
        return jax.value_and_grad(lambda *x: conv(*x, **options).sum(), (0, 1))(lhs, rhs)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lhs, rhs))
    found = taken(gradients, *shapes)
    assert ("lax" in found) == ("lax" in want)
    if conv is lax.conv_general_dilated:  # the gradients of the stand-in are those of its op
        assert sorted(found) == sorted(want)
