"""What wraps a call without deriving or batching it: jit, control flow, dtypes, threads."""

import concurrent.futures
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, SMALL, Case

import jax_dwbp
from jax_dwbp._spec import PRECISIONS

CASE = SMALL[1]
every_op = pytest.mark.parametrize("op", OPS)


def call(op, **options):
    return functools.partial(CASE.run, op, **options)


@every_op
def test_eval_shape_and_jaxpr(op):
    a, b = CASE.operands(op)
    shape = jax.eval_shape(call(op), a, b)
    result = call(op)(a, b)
    assert (shape.shape, shape.dtype) == (result.shape, result.dtype)
    # The implementation is not in the jaxpr: one equation, whatever the filter's size.
    assert str(jax.make_jaxpr(call(op))(a, b)).count("depthwise_conv2d[") == 1


@every_op
def test_disable_jit(op):
    a, b = CASE.operands(op)
    with jax.disable_jit():
        got = call(op)(a, b)
        gradient = jax.grad(lambda a: jnp.sum(call(op)(a, b)))(a)
    np.testing.assert_array_equal(got, call(op)(a, b))
    assert gradient.shape == a.shape


@every_op
def test_scan_with_checkpoint(op):
    """Gradients through a scan whose body is rematerialised, against the unrolled loop."""
    a, b = CASE.operands(op, "float64")

    def step(a, scale):
        return a * (1 + 0.1 * jnp.mean(call(op)(a, b * scale) ** 2)), None

    scales = jnp.array([1.0, 0.5, 2.0])

    def scanned(a):
        return jnp.sum(jax.lax.scan(jax.checkpoint(step), a, scales)[0] ** 2)

    def unrolled(a):
        for scale in scales:
            a, _ = step(a, scale)
        return jnp.sum(a**2)

    np.testing.assert_allclose(
        jax.jit(jax.grad(scanned))(a), jax.grad(unrolled)(a), rtol=1e-10, atol=1e-10
    )


@every_op
def test_cond_and_while(op):
    a, b = CASE.operands(op, "float64")

    def branch(flag, a):
        return jax.lax.cond(flag, lambda a: call(op)(a, b), lambda a: -call(op)(a, b), a)

    for flag in (True, False):
        sign = 1 if flag else -1
        np.testing.assert_allclose(jax.jit(branch)(flag, a), sign * call(op)(a, b), atol=1e-14)
        got = jax.grad(lambda a, flag=flag: jnp.sum(branch(flag, a) ** 2))(a)
        want = jax.grad(lambda a: jnp.sum(call(op)(a, b) ** 2))(a)
        np.testing.assert_allclose(got, want, atol=1e-12)
    looped = jax.lax.fori_loop(0, 3, lambda i, a: a + jnp.mean(call(op)(a, b)), a)
    for _ in range(3):
        a = a + jnp.mean(call(op)(a, b))
    np.testing.assert_allclose(looped, a, rtol=1e-12)


@every_op
def test_donation(op):
    """A donated operand is given up, and what could be built in its place is right."""
    case = Case("donated", (2, 5, 6, 3), (3, 3, 3, 1))  # input and output have one shape
    a, b = (jnp.asarray(x) for x in case.operands(op))
    want = np.asarray(case.run(op, a, b))
    index = 0 if op == "forward" else 1
    donating = jax.jit(functools.partial(case.run, op), donate_argnums=index)
    if op == "filter_grad":
        with pytest.warns(UserWarning, match="donated buffers were not usable"):
            got = donating(a, b)
    else:
        got = donating(a, b)
        assert (a, b)[index].is_deleted()
    np.testing.assert_array_equal(got, want)


@every_op
def test_numpy_and_jax_operands_agree(op):
    a, b = CASE.operands(op)
    want = call(op)(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_array_equal(call(op)(a, b), want)
    lists = {
        "forward": lambda: jax_dwbp.depthwise_conv2d_native(
            a.tolist(), jnp.asarray(b, "float64"), **CASE.attributes()
        ),
        "input_grad": lambda: jax_dwbp.depthwise_conv2d_native_backprop_input(
            np.array(CASE.input), a.tolist(), jnp.asarray(b, "float64"), **CASE.attributes()
        ),
        "filter_grad": lambda: jax_dwbp.depthwise_conv2d_native_backprop_filter(
            a.tolist(), jnp.array(CASE.filter), jnp.asarray(b, "float64"), **CASE.attributes()
        ),
    }
    np.testing.assert_allclose(lists[op](), want, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@every_op
def test_weak_types_give_way(op, dtype):
    a, b = CASE.operands(op, dtype)
    weak = jnp.full(a.shape, 0.5)
    assert jax.typeof(weak).weak_type
    got = call(op)(weak, b)
    np.testing.assert_array_equal(got, call(op)(weak.astype(dtype), b))
    assert got.dtype == jnp.dtype(dtype) and not jax.typeof(got).weak_type
    both = call(op)(weak, jnp.full(b.shape, 0.5))
    assert both.dtype == weak.dtype and not jax.typeof(both).weak_type
    gradient = jax.grad(lambda weak: jnp.sum(call(op)(weak, b)).astype("float32"))(weak)
    assert gradient.dtype == weak.dtype


def test_without_x64():
    """float64 NumPy arrays become float32, as everywhere in JAX."""
    a, b = CASE.operands("input_grad", "float64")
    with jax.enable_x64(False):
        got = call("input_grad")(a, b)
    assert got.dtype == jnp.float32
    CASE.check("input_grad", got, CASE.expected("input_grad", a, b), "float32")


def test_name_is_a_scope():
    a, b = CASE.operands("input_grad")
    text = jax.jit(call("input_grad", name="my_scope")).lower(a, b).as_text(debug_info=True)
    assert "my_scope" in text


@every_op
def test_concurrent_calls(op):
    """Sixteen threads, each with its own shape and so its own compilation, twice."""
    cases = SMALL[:16]
    operands = [case.operands(op) for case in cases]

    def run(i):
        return np.asarray(cases[i].run(op, *operands[i]))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        first, second = list(pool.map(run, range(16))), list(pool.map(run, range(16)))
    for case, (a, b), got, again in zip(cases, operands, first, second, strict=True):
        case.check(op, got, case.expected(op, a, b), "float32")
        np.testing.assert_array_equal(got, again)


def test_default_matmul_precision_is_part_of_the_call():
    """As for lax: the precision in force when the op is called, not when it is lowered."""
    a, b = CASE.operands("forward")
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(call("forward", implementation="lax")).trace(a, b)
    assert "HIGHEST" in traced.lower(lowering_platforms=("tpu",)).as_text()
    plain = jax.jit(call("forward", implementation="lax")).trace(a, b)
    assert "HIGHEST" not in plain.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", [*PRECISIONS, jax.lax.Precision.HIGH, ("highest", "default")])
def test_precision_is_that_of_lax(name):
    """By each of the names that it has there, given or configured."""

    def of_lax(x, f):
        return jax.lax.conv(x, f, (1, 1), "SAME", precision=name)

    def precision(function, *shapes):
        structs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
        text = jax.jit(function).trace(*structs).lower(lowering_platforms=("tpu",)).as_text()
        [found] = re.findall(r"precision_config = \[(.*?)\]", text)
        return found

    want = precision(of_lax, (1, 1, 5, 6), (1, 1, 3, 3))
    shapes = CASE.input, CASE.filter
    run = functools.partial(CASE.run, "forward", implementation="lax")
    assert precision(functools.partial(run, precision=name), *shapes) == want
    if isinstance(name, str) and name not in ("fastest", "bfloat16_3x"):  # no configuration's
        with jax.default_matmul_precision(name):
            assert precision(run, *shapes) == want


@every_op
def test_x64_may_change_between_trace_and_lowering(op):
    """float64 operands stay so, whatever the flag is at the lowering or when a gradient runs."""
    a, b = CASE.operands(op, "float64")
    traced = jax.jit(call(op)).trace(a, b)
    value, pullback = jax.vjp(call(op), jnp.asarray(a), jnp.asarray(b))
    with jax.enable_x64(False):
        compiled = traced.lower().compile()
        cotangents = pullback(value)
    CASE.check(op, compiled(a, b), CASE.expected(op, a, b), "float64")
    assert all(x.dtype == jnp.float64 for x in cotangents)
    empty = Case("empty", (2, 5, 6, 3), (3, 3, 3, 0))
    a, b = empty.operands(op, "float64")
    traced = jax.jit(functools.partial(empty.run, op)).trace(a, b)
    with jax.enable_x64(False):
        compiled = traced.lower().compile()
    got = compiled(a, b)
    np.testing.assert_array_equal(got, np.zeros(got.shape), strict=True)


@every_op
def test_default_float32_without_x64(op):
    """JAX as it comes, the looped filter included."""
    for case in (CASE, *(c for c in SMALL if c.name == "big_filter")):
        a, b = case.operands(op)
        with jax.enable_x64(False):
            got = case.run(op, a, b)
            gradient = jax.grad(lambda a, case=case, b=b: jnp.sum(case.run(op, a, b)))(a)
        case.check(op, got, case.expected(op, a, b), "float32")
        assert gradient.dtype == jnp.float32


def test_nothing_around_is_computed_once_for_each_tap():
    """A gradient of three layers does the work of its parts, not their product."""
    case = Case("layer", (1, 12, 12, 8), (5, 5, 8, 1))
    x, f = case.operands("forward")

    def loss(filters, x):
        for f in filters:
            x = case.run("forward", x, f, implementation="xla_taps")
        return jnp.sum(x**2)

    def flops(function, *arguments):
        analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
        assert analysis
        return analysis["flops"]

    parts = {op: flops(call_of(case, op), *case.operands(op)) for op in OPS}
    whole = flops(jax.grad(loss), [f, f, f], x)
    assert whole <= 1.1 * (
        3 * parts["forward"] + 3 * parts["filter_grad"] + 2 * parts["input_grad"]
    )


@pytest.mark.parametrize("op", OPS)
def test_a_barrier_on_each_side_of_an_op(op):
    """Where the compiler keeps them, for the same purpose."""
    case = Case("layer", (1, 6, 6, 8), (3, 3, 8, 1))
    traced = jax.jit(call_of(case, op)).trace(*case.operands(op))
    for platform in ("tpu", "cuda"):
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
        assert lowered.count("stablehlo.optimization_barrier") == 2


def call_of(case, op):
    return functools.partial(case.run, op, implementation="xla_taps")
