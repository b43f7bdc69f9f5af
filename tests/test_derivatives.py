"""Derivatives of every order, in both modes, against finite differences.

Each op is linear in each operand, and so is each of its derivatives: along one argument a
difference quotient with eps=1 is exact but for rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DEFAULT_ON_CPU, EMPTY, OPS, OTHER_RANKS, SMALL, Case
from jax.test_util import check_grads

import jax_dwbp
from jax_dwbp import _select

# check_grads multiplies its tolerance by the size of the array: at 1,024 elements a derivative that
# is wrong by half would pass.
TINY = (
    Case("plain", (1, 3, 4, 2), (3, 2, 2, 1)),
    Case("multiplier_strided", (1, 4, 3, 2), (2, 3, 2, 2), (2, 1)),
    Case("explicit_dilated", (1, 4, 4, 1), (2, 2, 1, 2), (1, 2), ((1, 0), (0, 2)), (2, 1)),
)
# The operands of each op and, last, what it computes.
OPERANDS = {
    "forward": ("x", "f", "dy"),
    "input_grad": ("f", "dy", "x"),
    "filter_grad": ("x", "dy", "f"),
}
LEAVES_OUT = {"x": "input_grad", "f": "filter_grad", "dy": "forward"}
every_op = pytest.mark.parametrize("op", OPS)
both_modes = pytest.mark.parametrize("forward_mode", [False, True])


def uniform(seed, shape, dtype="float64"):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(jnp.dtype(dtype))


def cotangents(function):
    """The cotangents of all arguments of `function`, as a function of these and of the result's."""

    def run(*arguments):
        *primals, u = arguments
        return jax.vjp(function, *primals)[1](u)

    return run


def check_linear(function, arguments):
    """Along each argument, the derivative of `function` is its difference with eps=1."""
    results, pullback = jax.vjp(function, *arguments)
    u = jax.tree.map(lambda leaf: uniform(1, leaf.shape), results)
    for index, cotangent in enumerate(pullback(u)):
        delta = uniform(2, arguments[index].shape)
        moved = [*arguments[:index], arguments[index] + delta, *arguments[index + 1 :]]
        differences = jax.tree.map(
            lambda u, new, old: np.sum(u * (new - old)), u, function(*moved), results
        )
        difference = sum(jax.tree.leaves(differences))
        np.testing.assert_allclose(np.sum(cotangent * delta), difference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", SMALL + OTHER_RANKS[::2], ids=str)
@every_op
def test_first_order(case, op):
    check_linear(functools.partial(case.run, op), case.operands(op, "float64"))


@pytest.mark.parametrize("case", TINY, ids=str)
@both_modes
@every_op
def test_orders_one_to_three(case, op, forward_mode):
    first = jax.jit(functools.partial(case.run, op, forward_mode=forward_mode))
    a, b = case.operands(op, "float64")
    check_linear(first, (a, b))
    second = jax.jit(cotangents(first))
    u = uniform(3, first(a, b).shape)
    check_linear(second, (a, b, u))
    third = jax.jit(cotangents(lambda *arguments: second(*arguments)[0]))
    check_linear(third, (a, b, u, uniform(4, a.shape)))


@every_op
def test_check_grads(op):
    case = TINY[1]
    a, b = case.operands(op, "float64")
    assert max(a.size, b.size) <= 64
    check_grads(jax.jit(functools.partial(case.run, op)), (a, b), order=3, modes=["rev"])
    run = jax.jit(functools.partial(case.run, op, forward_mode=True))
    check_grads(run, (a, b), order=2, modes=["fwd", "rev"])


@every_op
def test_forward_mode(op):
    """jvp, linearize, linear_transpose, jacfwd and hessian, against each other and differences."""
    case = TINY[1]
    run = functools.partial(case.run, op, forward_mode=True)
    a, b = case.operands(op, "float64")
    da = uniform(5, a.shape)
    value, tangent = jax.jvp(lambda a: run(a, b), (a,), (da,))
    np.testing.assert_allclose(tangent, run(a + da, b) - value, atol=1e-12)
    np.testing.assert_allclose(jax.linearize(lambda a: run(a, b), a)[1](da), tangent, atol=1e-12)
    u = uniform(6, value.shape)
    [transposed] = jax.linear_transpose(lambda a: run(a, b), a)(u)
    np.testing.assert_allclose(np.sum(transposed * da), np.sum(u * tangent), atol=1e-12)
    forward, reverse = (jacobian(run)(a, b) for jacobian in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward, reverse, atol=1e-12)

    def loss(a):
        return jnp.sum(run(a, b) ** 2)

    hessian = jax.hessian(loss)(a)
    expected = jnp.tensordot(forward, forward, axes=[tuple(range(value.ndim))] * 2)
    np.testing.assert_allclose(hessian, 2 * expected, atol=1e-11)


@every_op
def test_default_refuses_forward_mode(op):
    case = TINY[0]
    a, b = case.operands(op)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(case.run, op), (a, b), (a, b))


def test_forward_mode_runs_the_best_implementation():
    """Tangents and their transposes are the same three ops, not something slower."""
    case = TINY[0]
    a, b = case.operands("forward")

    def loss(a, b):
        return jnp.sum(case.run("forward", a, b, forward_mode=True) ** 2)

    for derivative in (jax.grad(loss, argnums=(0, 1)), jax.hessian(loss)):
        ops = jax_dwbp.implementations(derivative, a, b, platform="cpu")
        assert ops and {op.runs for op in ops} == {DEFAULT_ON_CPU}
        assert "conv_general_dilated" not in str(jax.make_jaxpr(derivative)(a, b))


def flop_count(function, *arguments):
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert analysis
    return analysis["flops"]


@both_modes
@pytest.mark.parametrize("argnum", [0, 1])
@every_op
def test_only_requested_gradients_run(op, argnum, forward_mode):
    """A gradient of one operand compiles to the work of its own op, and of no other."""
    case = TINY[0]
    a, b = case.operands(op)
    # Of an implementation whose work XLA can count.
    options = {"implementation": "xla_taps"}
    run = functools.partial(case.run, op, forward_mode=forward_mode, **options)

    def gradient(a, b, u):
        operands = [a, b]

        def of_one(x):
            return run(*[*operands[:argnum], x, *operands[argnum + 1 :]])

        return jax.vjp(of_one, operands[argnum])[1](u)[0]

    u = case.run(op, a, b)
    flops = flop_count(gradient, a, b, u)
    known = dict(zip(OPERANDS[op], (a, b, u), strict=True))
    wanted = LEAVES_OUT[OPERANDS[op][argnum]]
    operands = [known[name] for name in OPERANDS[wanted][:2]]
    assert flops == flop_count(functools.partial(case.run, wanted, **options), *operands) > 0


@both_modes
@pytest.mark.parametrize("argnum", [0, 1])
@every_op
def test_only_requested_gradients_run_eagerly(monkeypatch, op, argnum, forward_mode):
    """Without a jit around it too, as calls from within the running programs tell."""
    ran = []

    def run(op, spec, target, a, b):
        def record(a, b):
            ran.append(op.name)
            return np.zeros(result.shape, result.dtype)

        shape = spec.result_shape(op, a.shape, b.shape)
        result = jax.ShapeDtypeStruct(shape, a.dtype)
        return jax.pure_callback(record, result, a, b)

    monkeypatch.setattr(_select, "run", run)
    jax.clear_caches()
    case = TINY[0]
    arguments = [jnp.asarray(x) for x in case.operands(op)]
    _, pullback = jax.vjp(
        lambda x: case.run(
            op, *[*arguments[:argnum], x, *arguments[argnum + 1 :]], forward_mode=forward_mode
        ),
        arguments[argnum],
    )
    u = jnp.zeros(jax.eval_shape(functools.partial(case.run, op), *arguments).shape, "float32")
    jax.block_until_ready(pullback(u))
    jax.clear_caches()  # of these programs
    assert ran == [op, LEAVES_OUT[OPERANDS[op][argnum]]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@every_op
def test_cotangents_keep_dtype_and_value(op, dtype):
    """A gradient in a half type is as good as the op itself: float32 sums, rounded once."""
    case = SMALL[1]
    a, b = case.operands(op, dtype)
    result, pullback = jax.vjp(functools.partial(case.run, op), a, b)
    u = uniform(7, result.shape, dtype)
    known = dict(zip(OPERANDS[op], (a, b, u), strict=True))
    for name, cotangent in zip(OPERANDS[op][:2], pullback(u), strict=True):
        derivative = LEAVES_OUT[name]
        operands = [known[operand] for operand in OPERANDS[derivative][:2]]
        case.check(derivative, cotangent, case.expected(derivative, *operands), dtype)


@every_op
def test_empty(op):
    for case in EMPTY:
        a, b = case.operands(op)
        result, pullback = jax.vjp(functools.partial(case.run, op), a, b)
        for cotangent, operand in zip(pullback(jnp.ones_like(result)), (a, b), strict=True):
            np.testing.assert_array_equal(cotangent, np.zeros_like(operand), strict=True)
