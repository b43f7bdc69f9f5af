"""The table of implementations, and the one place that decides which of them runs.

Implementations see canonical data: layouts, empty operands, single problems and single spatial axes
end here.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, use_abstract_mesh

from jax_dwbp._compat import Target
from jax_dwbp._impl import Implementation
from jax_dwbp._impl.fft import IMPLEMENTATION as FFT
from jax_dwbp._impl.lax import IMPLEMENTATION as LAX
from jax_dwbp._impl.native_cpu import IMPLEMENTATION as NATIVE_CPU
from jax_dwbp._impl.pallas_gpu import IMPLEMENTATION as PALLAS_GPU
from jax_dwbp._impl.pallas_tpu import IMPLEMENTATION as PALLAS_TPU
from jax_dwbp._impl.xla_taps import IMPLEMENTATION as XLA_TAPS
from jax_dwbp._spec import ConvSpec, Op, SpatialAxis, brief

# In this order where they rank alike.
_TABLE = {i.name: i for i in (NATIVE_CPU, XLA_TAPS, FFT, LAX, PALLAS_TPU, PALLAS_GPU)}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_UNIT_AXIS = SpatialAxis(size=1, kernel=1, out=1, stride=1, pads=(0, 0), dilation=1)
OTHER = "other"  # one that JAX has by a plugin of someone else's


def resolve(
    op: Op, spec: ConvSpec, target: Target, a: Any, b: Any
) -> tuple[Implementation | None, dict[str, str | None]]:
    """The implementation that runs `op`, or None, and for each one asked the reason why it can't.

    Of the operands only the shape and the dtype are read. Without a platform these are the reasons
    that hold on any.
    """
    operands = _canonical_shapes(op, spec, a, b)
    if spec.implementation is None:
        requested = _ranked(spec, target)
    else:
        requested = [_named(name) for name in spec.implementation]
    reasons = {}
    for position, implementation in enumerate(requested, 1):
        reason = _why_not(implementation, op, spec, target, operands)
        others = requested[position:]
        if (
            reason is None
            and _is_compiled(implementation, spec, target)
            and any(_why_not(other, op, spec, target, operands) is None for other in others)
        ):
            reason = _why_not_lowered(implementation, op, spec, target, operands)
        reasons[implementation.name] = reason
        if reason is None:
            return implementation, reasons
    return None, reasons


def explain(
    op: Op, spec: ConvSpec, target: Target, a: Any, b: Any
) -> tuple[str | None, dict[str, str | None]]:
    """The name of what runs `op`, or None, and of all, best first, the reason why they can't."""
    operands = _canonical_shapes(op, spec, a, b)
    implementation, asked = resolve(op, spec, target, a, b)
    reasons = {
        i.name: asked[i.name] if i.name in asked else _why_not(i, op, spec, target, operands)
        for i in _ranked(spec, target)
    }
    return implementation and implementation.name, reasons


def able(op: Op, spec: ConvSpec, target: Target, a: Any, b: Any) -> list[str]:
    """The names of those that have no reason, if JAX can lower them."""
    operands = _canonical_shapes(op, spec, a, b)
    every = _TABLE.values()
    return [i.name for i in every if _why_not(i, op, spec, target, operands) is None]


def selected(op: Op, spec: ConvSpec, target: Target, a: Any, b: Any) -> Implementation:
    """The implementation that runs `op`, or NotImplementedError with the reasons."""
    implementation, reasons = resolve(op, spec, target, a, b)
    if implementation is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"`implementation` can't run {op}: {why}")
    return implementation


def _ranked(spec: ConvSpec, target: Target) -> list[Implementation]:
    """All of them, best first."""
    return sorted(_TABLE.values(), key=lambda i: i.rank(spec, target.platform))


def _named(name: str) -> Implementation:
    if name not in _TABLE:
        raise ValueError(f"`implementation` must be out of {', '.join(_TABLE)}, got {brief(name)}")
    return _TABLE[name]


def _why_not(
    implementation: Implementation,
    op: Op,
    spec: ConvSpec,
    target: Target,
    operands: list[jax.ShapeDtypeStruct],
) -> str | None:
    """The reason why an implementation can't run `op`, or None."""
    if _is_empty(op, _canonical(spec), *operands):
        return None
    home, is_pallas = implementation.platform, implementation.is_pallas
    if home and target.platform not in (None, home) and not (is_pallas and spec.interpret):
        return f"it runs on {implementation.device}"
    if spec.implementation is None:  # by name it runs all the same
        if target.partitioned and implementation.is_opaque:
            return "XLA divides the program among devices, and can't look into it"
        if target.exported and not implementation.is_stable:
            return "what is exported may run later, and where this package is not"
    sizes = [size for operand in operands for size in operand.shape]
    unknown = [size for size in sizes if not isinstance(size, int)]
    if is_pallas and unknown:
        return f"it is compiled for one batch size, got {unknown[0]}"
    return implementation.unsupported(op, _canonical(spec), target.platform, *operands)


def _is_compiled(implementation: Implementation, spec: ConvSpec, target: Target) -> bool:
    """Does JAX lower a kernel of it, which may fail?"""
    return implementation.is_pallas and target.platform is not None and not spec.interpret


def _why_not_lowered(
    implementation: Implementation,
    op: Op,
    spec: ConvSpec,
    target: Target,
    operands: list[jax.ShapeDtypeStruct],
) -> str | None:
    """The reason why JAX can't lower a kernel, or None."""
    spec = _canonical(spec)
    if _is_empty(op, spec, *operands):
        return None
    try:
        _lower(implementation, op, spec, target.platform, *operands)
    except (RecursionError, MemoryError):  # of now and here, not of the kernel
        raise
    except Exception as error:  # whatever JAX's compilers of kernels raise
        reason = f"JAX can't lower it: {brief(error)}"
        if spec.implementation is None:
            message = (
                f"{op} of a depthwise convolution is not run by {implementation.name}: {reason}"
            )
            warnings.warn(message, stacklevel=2)
        return reason
    return None


@functools.lru_cache(1024)  # of what succeeds
def _lower(
    implementation: Implementation,
    op: Op,
    spec: ConvSpec,
    platform: str,
    *operands: jax.ShapeDtypeStruct,
) -> None:
    run = jax.jit(functools.partial(getattr(implementation, op.name), spec))
    with use_abstract_mesh(AbstractMesh((), ())):
        run.trace(*operands).lower(lowering_platforms=(platform,))


def run(op: Op, spec: ConvSpec, target: Target, a: jax.Array, b: jax.Array) -> jax.Array:
    """Runs `op` on its two operands in the caller's layout, with or without a problem axis.

    A filter without one is shared by the problems of the other operand.
    """
    shape = spec.result_shape(op, a.shape, b.shape)
    if _is_empty(op, spec, a, b):
        return jnp.zeros(shape, a.dtype)
    implementation = selected(op, spec, target, a, b)
    function = getattr(implementation, op.name)
    if implementation.takes_any_layout:
        return function(spec, a, b)

    def canonical(a: jax.Array, b: jax.Array) -> jax.Array:
        shapes = _canonical_shapes(op, spec, a, b)
        operands = []
        for name, x, struct in zip(op.operands, (a, b), shapes, strict=True):
            if _is_channels_first(spec, name):
                x = jnp.moveaxis(x, -len(spec.axes) - 1, -1)
            operands.append(x.reshape(struct.shape))
        result = function(_canonical(spec), *operands)
        if _is_channels_first(spec, op.result):
            result = jnp.moveaxis(result, -1, 2)
        return result.reshape(shape)

    if implementation.is_opaque:
        return canonical(a, b)
    # Fused into the taps, what computes an operand would run once for each of them: the gradient of
    # eight layers took 316 ms so, and takes 11 ms.
    explicit = any(axis for x in (a, b) for axis in jax.typeof(x).sharding.spec)
    if target.platform == "cpu" and jax.__version_info__ < (0, 12) and not explicit:
        # There XLA drops the barriers before it fuses, but keeps a branch that it can't predict.
        # Of a shard one element travels, not the array.
        first = sum(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()) for x in (a, b))
        always = (first == first) | (first != first)
        return lax.cond(always, canonical, lambda a, b: lax.full_like(a, 0, shape=shape), a, b)
    return lax.optimization_barrier(canonical(*lax.optimization_barrier((a, b))))


def _is_empty(op: Op, spec: ConvSpec, a: Any, b: Any) -> bool:
    """Has an operand or the result no element? Then the result is zeros, and nobody is asked."""
    return 0 in (*a.shape, *b.shape, *spec.result_shape(op, a.shape, b.shape))


def _canonical_shapes(op: Op, spec: ConvSpec, a: Any, b: Any) -> list[jax.ShapeDtypeStruct]:
    """Those of the operands that an implementation would get."""
    rank = len(spec.axes)
    one_problem = rank + 2 in (a.ndim, b.ndim)
    structs = []
    for name, x in zip(op.operands, (a, b), strict=True):
        shape = x.shape
        if one_problem:
            # The images of all problems are the batch of one, or share the one filter.
            shape = (1, math.prod(shape[: -rank - 1]), *shape[-rank - 1 :])
        if _is_channels_first(spec, name):
            problems, batch, lanes, *spatial = shape
            shape = (problems, batch, *spatial, lanes)
        if rank == 1:
            first = 1 if name == "f" else 2
            shape = (*shape[:first], 1, *shape[first:])
        structs.append(jax.ShapeDtypeStruct(shape, x.dtype))
    return structs


def _canonical(spec: ConvSpec) -> ConvSpec:
    axes = (_UNIT_AXIS, *spec.axes) if len(spec.axes) == 1 else spec.axes
    return dataclasses.replace(spec, axes=axes, channels_first=False)


def _is_channels_first(spec: ConvSpec, operand: str) -> bool:
    return operand != "f" and spec.channels_first
