"""`jax.export`: one artifact for several platforms, symbolic batch sizes, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, SMALL, Case
from covering import covering
from jax import export

pytestmark = pytest.mark.usefixtures("unoptimized")
CASE = SMALL[3]
every_op = pytest.mark.parametrize("op", OPS)


@every_op
def test_one_artifact_for_all_platforms(op):
    a, b = CASE.operands(op, "float64")

    def gradient(a, b):
        return jax.grad(lambda a, b: jnp.sum(CASE.run(op, a, b) ** 2), argnums=(0, 1))(a, b)

    exported = export.export(jax.jit(gradient), platforms=("cpu", "tpu", "cuda"))(a, b)
    restored = export.deserialize(exported.serialize())
    assert restored.platforms == ("cpu", "tpu", "cuda")
    for got, want in zip(restored.call(a, b), gradient(a, b), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


@every_op
def test_exported_function_has_gradients(op):
    a, b = CASE.operands(op, "float64")
    run = functools.partial(CASE.run, op)
    exported = export.export(jax.jit(run))(a, b)
    restored = export.deserialize(exported.serialize(vjp_order=1))
    got = jax.grad(lambda a: jnp.sum(restored.call(a, b) ** 2))(a)
    np.testing.assert_allclose(got, jax.grad(lambda a: jnp.sum(run(a, b) ** 2))(a), atol=1e-12)


@covering(op=OPS, data_format=["NHWC", "NCHW"], dtype=["float32", "float64"])
def test_symbolic_batch(op, data_format, dtype):
    """One artifact for every batch size; `input_sizes` takes its batch from out_backprop's."""
    a, b = CASE.operands(op, dtype)
    (n,) = export.symbolic_shape("n")

    def symbolic(x, is_filter):
        return jax.ShapeDtypeStruct(x.shape if is_filter else (n, *x.shape[1:]), x.dtype)

    shapes = symbolic(a, op == "input_grad"), symbolic(b, op == "forward")
    run = functools.partial(CASE.run, op, data_format=data_format)
    exported = export.export(jax.jit(run))(*shapes)
    for size in (1, 3):
        operands = [
            x if is_filter else np.concatenate([x] * 3)[:size]
            for x, is_filter in zip((a, b), (op == "input_grad", op == "forward"), strict=True)
        ]
        atol = 100 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(exported.call(*operands), run(*operands), atol=atol, rtol=atol)


def test_symbolic_height_is_refused():
    a, b = CASE.operands("forward")
    (h,) = export.symbolic_shape("h")
    shape = jax.ShapeDtypeStruct((a.shape[0], h, *a.shape[2:]), a.dtype)
    with pytest.raises(
        NotImplementedError, match="`input` must have static sizes, but for a batch"
    ):
        export.export(jax.jit(functools.partial(CASE.run, "forward")))(shape, b)


@pytest.mark.parametrize(
    ("platform", "runs"),
    [
        ("cpu", None),
        ("cuda", "stablehlo.convolution"),
        ("rocm", "stablehlo.convolution"),
        ("tpu", "tpu_custom_call"),
    ],
)
@every_op
def test_lowering_without_the_hardware(op, platform, runs):
    """Each platform gets its own choice, made when it is lowered for."""
    a, b = CASE.operands(op)
    lowered = (
        jax.jit(functools.partial(CASE.run, op)).trace(a, b).lower(lowering_platforms=(platform,))
    )
    text = lowered.as_text()
    for choice in ("__gpu$xla.gpu.triton", "stablehlo.convolution", "tpu_custom_call"):
        assert (choice in text) == (choice == runs)


@every_op
def test_export_has_what_stays_stable(op):
    """One artifact: the kernel of TPUs, which JAX promises to keep, but no other kernel."""
    a, b = CASE.operands(op)
    exported = export.export(
        jax.jit(functools.partial(CASE.run, op)), platforms=("cpu", "tpu", "cuda")
    )(a, b)
    text = exported.mlir_module()
    assert "tpu_custom_call" in text and "stablehlo.convolution" in text
    assert "triton" not in text and "jax_dwbp_depthwise_conv2d" not in text
    restored = export.deserialize(exported.serialize())
    CASE.check(op, restored.call(a, b), CASE.expected(op, a, b), "float32")


@pytest.mark.parametrize("width", (1, 17))
def test_lanes_of_one_column_more(width):
    """The kernel of TPUs computes what is left over of a row as well."""
    case = Case("lanes", (1, 17, width, 8), (3, 3, 8, 2))
    f, dy = case.operands("input_grad")
    run = jax.jit(functools.partial(case.run, "input_grad"))
    exported = export.export(run, platforms=("cpu", "tpu"))(f, dy)
    assert "tpu_custom_call" in exported.mlir_module()
    got = export.deserialize(exported.serialize()).call(f, dy)
    case.check("input_grad", got, case.expected("input_grad", f, dy), "float32")
