"""The Pallas kernels: values by NumPy, and in interpret mode the transformations by name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pallas_numpy
import pytest
from cases import KERNELS, OPS, SMALL, XLA, Case
from covering import covering
from jax.sharding import AxisType, PartitionSpec

import jax_dwbp
from jax_dwbp._impl import interpret, pallas_gpu, pallas_tpu

CASE = Case("kernel", (2, 5, 6, 2), (3, 3, 2, 2), (2, 1))
# Many channels or images, or large filters. Without the 6x6 filter, whose 36 products a kernel adds
# up in one chain: of 1.8 million of them the worst errs by more than the tolerance has for a chain.
LARGE = [case for case in XLA[4:9] if case.filter[0] != 6]
CALLS = {"pallas_tpu": ("tpu", "tpu_custom_call"), "pallas_gpu": ("cuda", "triton")}
MODULES: Any = {"pallas_tpu": vars(pallas_tpu), "pallas_gpu": pallas_gpu._KERNELS}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_op = pytest.mark.parametrize("op", OPS)
pytestmark = pytest.mark.usefixtures("interpreted")


def check(case, op, kernel, dtype="float32"):
    a, b = case.operands(op, dtype)
    [got] = pallas_numpy.run(functools.partial(MODULES[kernel][op], case.spec()), a[None], b[None])
    case.check(op, got, case.expected(op, a, b), dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
@every_kernel
@every_op
def test_values(case, op, kernel):
    check(case, op, kernel)


@covering(case=LARGE, kernel=list(KERNELS), op=OPS)
def test_values_in_interpret_mode(case, op, kernel):
    a, b = case.operands(op)
    got = case.run(op, a, b, implementation=kernel)
    case.check(op, got, case.expected(op, a, b), "float32")


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(kernel, dtype) for kernel in KERNELS for dtype in KERNELS[kernel] if dtype != "float32"],
)
@every_op
def test_half(op, kernel, dtype):
    check(CASE, op, kernel, dtype)


@every_kernel
@every_op
def test_channels_first_in_half(op, kernel):
    dtype, *_ = KERNELS[kernel]
    a, b = CASE.operands(op, dtype)
    got = CASE.run(op, a, b, data_format="NCHW", implementation=kernel)
    CASE.check(op, got, CASE.expected(op, a, b), dtype)


@covering(in_axes=[(0, 0), (1, None), (None, 2)], kernel=list(KERNELS), op=OPS)
def test_vmap(op, kernel, in_axes):
    run = functools.partial(CASE.run, op, implementation=kernel)
    problems = [CASE.operands(op, seed=seed) for seed in range(3)]
    stacked = [np.stack(operands) for operands in zip(*problems, strict=True)]
    operands = [
        x[0] if axis is None else np.moveaxis(x, 0, axis)
        for x, axis in zip(stacked, in_axes, strict=True)
    ]
    got = jax.vmap(run, in_axes)(*operands)
    for i, result in enumerate(got):
        a, b = (x[0 if axis is None else i] for x, axis in zip(stacked, in_axes, strict=True))
        CASE.check(op, result, CASE.expected(op, a, b), "float32")


# A second derivative has all three kernels.
@pytest.mark.parametrize(
    ("op", "kernel"),
    (("forward", "pallas_tpu"), ("input_grad", "pallas_gpu"), ("filter_grad", "pallas_gpu")),
)
def test_gradient_of_the_gradient(op, kernel):
    def twice(a, b, **options):
        def loss(a, b):
            return jnp.sum(jnp.sin(CASE.run(op, a, b, **options)))

        def inner(a, b):
            da, db = jax.grad(loss, argnums=(0, 1))(a, b)
            return jnp.sum(da**2) + jnp.sum(db**3)

        return jax.jit(jax.grad(inner, argnums=(0, 1)))(a, b)

    got = twice(*CASE.operands(op), implementation=kernel)
    want = twice(*(np.float64(x) for x in CASE.operands(op)), implementation="lax")
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(w))))


@pytest.mark.parametrize(
    ("shape", "check_vma"), [((8, 1), False), ((8, 1), True), ((2, 4), True)], ids=str
)
@every_kernel
def test_shard_map(kernel, shape, check_vma):
    """Values, and the gradients of a sharded input and of a replicated filter; also where an axis
    of the mesh is left to XLA."""
    case = Case("sharded", (8, 5, 6, 2), (3, 3, 2, 2), (2, 1))
    mesh = jax.make_mesh(shape, ("batch", "rest"), axis_types=(AxisType.Auto,) * 2)
    batch, whole = PartitionSpec("batch"), PartitionSpec()
    x, f = case.operands("forward")

    def run(x, f, implementation):
        return case.run("forward", x, f, implementation=implementation)

    def result_and_gradients(run, x, f):
        y, pullback = jax.vjp(run, x, f)
        return y, *pullback(jnp.cos(y))

    sharded = jax.shard_map(
        functools.partial(run, implementation=kernel),
        mesh=mesh,
        in_specs=(batch, whole),
        out_specs=batch,
        axis_names={"batch"} if shape[1] > 1 else set(mesh.axis_names),
        check_vma=check_vma,
    )
    y, *got = jax.jit(functools.partial(result_and_gradients, sharded))(x, f)
    case.check("forward", y, case.expected("forward", x, f), "float32")
    lax = functools.partial(run, implementation="lax")
    _, *want = result_and_gradients(lax, np.float64(x), np.float64(f))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


@every_kernel
@every_op
def test_lowered_gradient_calls_the_kernel(not_interpreted, op, kernel):
    """Forward and both gradients, without a convolution in their place."""
    platform, target = CALLS[kernel]
    a, b = CASE.operands(op)

    def value_and_gradients(a, b):
        y, pullback = jax.vjp(functools.partial(CASE.run, op, implementation=kernel), a, b)
        return y, pullback(y)

    lowered = jax.jit(value_and_gradients).trace(a, b).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert sum(target in line for line in text.splitlines() if "custom_call" in line) == 3
    assert "stablehlo.convolution" not in text


@every_kernel
def test_not_interpreted_unless_asked_for(not_interpreted, kernel):
    a, b = CASE.operands("forward")
    platform, _ = CALLS[kernel]
    case = Case("not_interpreted", (2, 5, 7, 2), (3, 3, 2, 2), (2, 1))
    with pytest.raises(NotImplementedError, match=f"{kernel}: it runs on a"):
        case.run("forward", *case.operands("forward"), implementation=kernel)
    [found] = jax_dwbp.implementations(
        functools.partial(CASE.run, "forward", implementation=kernel), a, b, platform=platform
    )
    assert found.runs == kernel


@every_kernel
def test_jit_tells_what_is_interpreted(kernel):
    """What was traced outside is traced again within, and the lowered program keeps to it."""
    a, b = CASE.operands("forward")
    traced = []

    @jax.jit
    def run(a, b):
        traced.append(None)
        return CASE.run("forward", a, b, implementation=(kernel, "lax"))

    for interpreted in (True, False, True, False):
        with interpret(interpreted):
            program = run.trace(a, b)
        text = program.lower().as_text()
        assert ("stablehlo.convolution" in text) == (not interpreted)
    assert len(traced) == 2


@every_kernel
def test_sizes_that_are_not_known_are_left_to_others(kernel):
    """An exported program with a symbolic batch takes the next implementation."""
    x, f = CASE.operands("forward")
    (n,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    platform, target = CALLS[kernel]
    run = functools.partial(CASE.run, "forward", implementation=(kernel, "lax"))
    [found] = jax_dwbp.implementations(run, x, f, platform=platform)
    assert found.reasons[kernel] == "it is compiled for one batch size, got n"
    exported = jax.export.export(jax.jit(run), platforms=(platform,))(x, f)
    assert target not in exported.mlir_module()
