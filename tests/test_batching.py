"""`vmap` against a loop over the problems: every combination of axes, nested, with gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IMPLEMENTATIONS, OPS, OTHER_RANKS, SMALL, Case

pytestmark = pytest.mark.usefixtures("unoptimized")
CASE = Case("batched", (2, 4, 5, 2), (3, 2, 2, 2), (2, 1))
every_op = pytest.mark.parametrize("op", OPS)


def stacked(case, op, size, dtype="float64"):
    """Operands with a leading axis of `size` different problems."""
    problems = [case.operands(op, dtype, seed) for seed in range(max(size, 1))]
    return [np.stack(operand)[:size] for operand in zip(*problems, strict=True)]


def loop(function, in_axes, operands, size):
    """What `vmap` means."""

    def problem(i):
        return [
            x if axis is None else np.take(x, i, axis)
            for x, axis in zip(operands, in_axes, strict=True)
        ]

    results = [function(*problem(i)) for i in range(size)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def with_axes(operands, in_axes):
    return [
        x[0] if axis is None else np.moveaxis(x, 0, axis)
        for x, axis in zip(operands, in_axes, strict=True)
    ]


def assert_close(got, want):
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12, strict=True),
        jax.tree.map(np.asarray, got),
        want,
    )


def check_axes(case, op, pairs, size, **options):
    """`vmap` over each pair of axes of the operands, all compiled as one program."""
    run = functools.partial(case.run, op, **options)
    arguments = {in_axes: with_axes(stacked(case, op, size), in_axes) for in_axes in pairs}

    @jax.jit
    def mapped(*arguments):
        return [jax.vmap(run, axes)(*arrays) for axes, arrays in zip(pairs, arguments, strict=True)]

    found = mapped(*arguments.values())
    for (in_axes, operands), got in zip(arguments.items(), found, strict=True):
        assert_close(got, loop(functools.partial(case.run, op), in_axes, operands, size))


@every_op
def test_every_axis(op):
    pairs = itertools.product((None, 0, 1, 2, 3, 4), repeat=2)
    check_axes(CASE, op, [axes for axes in pairs if axes != (None, None)], 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_op
def test_each_axis_by_name(op, implementation):
    """Each once for either operand."""
    pairs = [(None, 0), (0, None), (1, 4), (2, 3), (3, 1), (4, 2)]
    check_axes(CASE, op, pairs, 3, implementation=implementation)


@pytest.mark.parametrize("case", SMALL + OTHER_RANKS[::4], ids=str)
@every_op
def test_every_case(case, op):
    check_axes(case, op, [(0, 0), (0, None), (None, 0)], 2)


@pytest.mark.parametrize("size", [0, 1])
@every_op
def test_batches_of_none_and_one(op, size):
    run = functools.partial(CASE.run, op)
    result = run(*CASE.operands(op, "float64"))
    for in_axes in ((0, 0), (0, None), (None, 0)):
        arguments = with_axes(stacked(CASE, op, 1), in_axes)
        arguments = [
            x if axis is None else x[:size] for x, axis in zip(arguments, in_axes, strict=True)
        ]
        got = jax.vmap(run, in_axes)(*arguments)
        assert got.shape == (size, *result.shape)
        np.testing.assert_allclose(got, np.broadcast_to(result, got.shape), atol=1e-12)


@every_op
def test_channels_first(op):
    run = functools.partial(CASE.run, op, data_format="NCHW")
    arguments = with_axes(stacked(CASE, op, 3), (1, 0))
    assert_close(jax.vmap(run, (1, 0))(*arguments), loop(run, (1, 0), arguments, 3))


@every_op
def test_nested(op):
    """Two axes of 2 and 3 problems, each on both operands or on one of them."""
    run = functools.partial(CASE.run, op)
    problems = [stacked(CASE, op, 6)[i].reshape(2, 3, *CASE.operands(op)[i].shape) for i in (0, 1)]
    levels = ((0, 0), (0, None), (None, 0))
    for outer, inner in itertools.product(levels, repeat=2):
        operands = []
        for x, o, i in zip(problems, outer, inner, strict=True):
            x = x if i == 0 else x[:, 0]
            operands.append(x if o == 0 else x[0])

        def inner_loop(*operands, inner=inner):
            return loop(run, inner, operands, 3)

        got = jax.vmap(jax.vmap(run, inner), outer)(*operands)
        assert_close(got, loop(inner_loop, outer, operands, 2))


@pytest.mark.parametrize("forward_mode", [False, True])
@every_op
def test_vmap_of_grad_and_grad_of_vmap(op, forward_mode):
    run = functools.partial(CASE.run, op, forward_mode=forward_mode)

    def loss(a, b):
        return jnp.sum(run(a, b) ** 2)

    gradient = jax.grad(loss, argnums=(0, 1))
    for in_axes in ((0, 0), (0, None), (None, 0)):
        arguments = with_axes(stacked(CASE, op, 3), in_axes)
        assert_close(jax.vmap(gradient, in_axes)(*arguments), loop(gradient, in_axes, arguments, 3))

        def total(a, b, in_axes=in_axes):
            return jnp.sum(jax.vmap(loss, in_axes)(a, b))

        def total_by_hand(a, b, in_axes=in_axes):
            pick = [lambda x, i, axis=axis: x if axis is None else x[i] for axis in in_axes]
            return sum(loss(pick[0](a, i), pick[1](b, i)) for i in range(3))

        got = jax.grad(total, argnums=(0, 1))(*arguments)
        assert_close(got, jax.tree.map(np.asarray, jax.grad(total_by_hand, (0, 1))(*arguments)))


def test_per_example_filter_gradients():
    """The classic: one gradient of the filter for each example of a batch."""
    x, dy = CASE.operands("filter_grad", "float64")

    def one(x, dy):
        return CASE.run("filter_grad", x[None], dy[None])

    each = jax.vmap(one)(x, dy)
    assert each.shape == (2, *CASE.filter)
    np.testing.assert_allclose(each.sum(0), CASE.run("filter_grad", x, dy), atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_filter_is_one_call_on_the_folded_batch(implementation):
    """No copy of the filter, and all P*N images at once."""
    f, dy = CASE.operands("input_grad")
    batch = np.stack([dy] * 3)
    run = jax.vmap(functools.partial(CASE.run, "input_grad", f, implementation=implementation))
    jaxpr = str(jax.make_jaxpr(run)(batch))
    assert jaxpr.count("depthwise_conv2d[") == 1
    assert f"f32[3,{','.join(map(str, CASE.filter))}]" not in jaxpr
    lowered = jax.jit(run).lower(batch).as_text()
    assert ("tensor<1x6x2x5x4xf32>" in lowered) == (implementation != "native_cpu")


def test_batched_filter_is_one_call():
    f, dy = stacked(CASE, "input_grad", 3, "float32")
    jaxpr = str(jax.make_jaxpr(jax.vmap(functools.partial(CASE.run, "input_grad")))(f, dy))
    assert jaxpr.count("depthwise_conv2d[") == 1
    assert "transpose" not in jaxpr


@pytest.mark.parametrize("outer", [(0, 0), (0, None), (None, 0)], ids=str)
@pytest.mark.parametrize("inner", [(0, 0), (0, None)], ids=str)
def test_no_problems(outer, inner):
    """A map over nothing, of maps."""
    sizes = [
        (*[0][: axis == 0], *[3][: inner_axis == 0])
        for axis, inner_axis in zip(outer, inner, strict=True)
    ]
    x, f = np.ones((*sizes[0], 2, 5, 6, 2), "f"), np.ones((*sizes[1], 3, 3, 2, 1), "f")
    run = functools.partial(Case("no_problems", (2, 5, 6, 2), (3, 3, 2, 1)).run, "forward")
    mapped = jax.vmap(jax.vmap(run, inner), outer)
    assert mapped(x, f).shape == (0, 3, 2, 5, 6, 2)
    gradients = jax.grad(lambda x, f: mapped(x, f).sum(), argnums=(0, 1))(x, f)
    assert [g.shape for g in gradients] == [x.shape, f.shape]
    assert not any(np.any(g) for g in gradients)
