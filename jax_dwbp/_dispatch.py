"""The table of implementations, and which of them runs: decided per platform, at lowering.

Implementations see canonical data: layouts, empty operands and single problems end here.
"""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_dwbp._impl import interpreted, native_cpu
from jax_dwbp._spec import OPERANDS, RESULTS, ConvSpec, Op, brief

# Best first. On a CPU (2 cores, AVX-512, float32, layers of networks at batch 8), native_cpu takes
# a half to a 50th of the time of xla_taps, but for one result of 38 MB, where the memory is what
# takes the time; xla_taps takes a third to a 450th of lax's, and more than that only for a single
# channel with a multiplier of 64 or more, which is a dense convolution. Nothing has been timed on
# an accelerator: there lax runs, and a kernel by name, but where what XLA compiles to is hopeless.
_ON_CPU = ("native_cpu", "xla_taps", "lax", "pallas_tpu", "pallas_gpu")
_ELSEWHERE = ("lax", "xla_taps", "pallas_tpu", "pallas_gpu", "native_cpu")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
OTHER = "other"  # one that JAX has by a plugin of someone else's
# What XLA can't look into, so that it can't partition it, and where it runs.
_KERNELS = {
    "native_cpu": ("cpu", "a CPU"),
    "pallas_tpu": ("tpu", "a TPU"),
    "pallas_gpu": ("cuda", "an NVIDIA GPU"),
}
# Calls that JAX does not promise to keep stable, or that need this package.
_UNSTABLE = {"native_cpu", "pallas_gpu"}


class Program(NamedTuple):
    """What the program that an op is lowered into has to allow."""

    partitioned: bool = False  # XLA divides it among devices
    exported: bool = False  # it has to run where this package is not installed, and later


_ANY = Program()


def explain(
    op: Op, spec: ConvSpec, platform: str | None, a: Any, b: Any
) -> tuple[str | None, dict[str, str | None]]:
    """The implementation that runs `op`, if any, and for each in the order of preference why not.

    Of the operands only the shape and the dtype are read. A platform of None stands for any, so
    what it can't run nobody can.
    """
    operands = _canonical_shapes(op, spec, a, b)
    reasons = {
        name: _why_not(name, op, spec, platform, operands) for name in _names(spec, platform)
    }
    requested = _requested(spec, list(reasons))
    return next((name for name in requested if reasons[name] is None), None), reasons


def select(
    op: Op, spec: ConvSpec, platform: str | None, a: Any, b: Any, program: Program = _ANY
) -> str:
    """The name of the implementation that runs `op`, or NotImplementedError with the reasons.

    What `program` rules out runs only where it is asked for by name.
    """
    operands = _canonical_shapes(op, spec, a, b)
    ruled_out = {
        *(_KERNELS if program.partitioned else ()),
        *(_UNSTABLE if program.exported else ()),
    }
    names = [name for name in _names(spec, platform) if name not in ruled_out]
    reasons = {}
    for name in _requested(spec, names):
        reasons[name] = _why_not(name, op, spec, platform, operands)
        if reasons[name] is None:
            return name
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"`implementation` can't run {op}: {why}")


def _names(spec: ConvSpec, platform: str | None) -> list[str]:
    """All implementations, best first."""
    names: list[str] = [*(_ON_CPU if platform == "cpu" else _ELSEWHERE)]
    if platform == "tpu" and spec.multiplier > 1:
        # There XLA computes a dense convolution: 60 times the issue cycles in the gradient by the
        # input, and minutes to compile the other two.
        names.insert(0, names.pop(names.index("pallas_tpu")))
    return names


def _requested(spec: ConvSpec, names: list[str]) -> Sequence[str]:
    for name in spec.implementation or ():
        if name not in _ELSEWHERE:
            known = ", ".join(_ELSEWHERE)
            raise ValueError(f"`implementation` must be out of {known}, got {brief(name)}")
    return spec.implementation or names


def _why_not(
    name: str,
    op: Op,
    spec: ConvSpec,
    platform: str | None,
    operands: list[jax.ShapeDtypeStruct],
) -> str | None:
    """The reason why an implementation can't run `op`, or None."""
    if _is_empty(op, _channels_last(spec), *operands):
        return None
    if name in _KERNELS:
        home, device = _KERNELS[name]
        if platform not in (None, home) and (home == "cpu" or not interpreted()):
            return f"it runs on {device}"
        sizes = [size for operand in operands for size in operand.shape]
        unknown = [size for size in sizes if not isinstance(size, int)]
        if home != "cpu" and unknown:
            return f"it is compiled for one batch size, got {unknown[0]}"
    return _module(name).unsupported(op, _channels_last(spec), platform, *operands)


def _module(name: str) -> ModuleType:
    # Imported when it is asked about: Pallas takes longer than all of this package.
    return importlib.import_module(f"jax_dwbp._impl.{name}")


def run(
    op: Op, spec: ConvSpec, platform: str | None, program: Program, a: jax.Array, b: jax.Array
) -> jax.Array:
    """Runs `op` on its two operands in the caller's layout, with or without a problem axis.

    A filter without one is shared by the problems of the other operand.
    """
    shape = spec.result_shape(op, a.shape, b.shape)
    if _is_empty(op, spec, a, b):
        return jnp.zeros(shape, a.dtype)
    selected = select(op, spec, platform, a, b, program)
    implementation = getattr(_module(selected), op)
    if implementation is getattr(native_cpu, op):  # which takes operands as they come
        return implementation(spec, a, b)

    def canonical(a: jax.Array, b: jax.Array) -> jax.Array:
        operands = []
        for name, x in zip(OPERANDS[op], (a, b), strict=True):
            if 4 in (a.ndim, b.ndim):
                x = x.reshape(_one_problem(x.shape))
            operands.append(jnp.moveaxis(x, 2, 4) if _channels_first(spec, name) else x)
        result = implementation(_channels_last(spec), *operands)
        if _channels_first(spec, RESULTS[op]):
            result = jnp.moveaxis(result, 4, 2)
        return result.reshape(shape)

    if selected in _KERNELS:
        return canonical(a, b)
    # Fused into the taps, what computes an operand would run once for each of them: the gradient of
    # eight layers took 316 ms so, and takes 11 ms.
    explicit = any(axis for x in (a, b) for axis in jax.typeof(x).sharding.spec)
    if platform == "cpu" and jax.__version_info__ < (0, 12) and not explicit:
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
    structs = []
    for name, x in zip(OPERANDS[op], (a, b), strict=True):
        shape = _one_problem(x.shape) if 4 in (a.ndim, b.ndim) else x.shape
        if _channels_first(spec, name):
            problems, batch, depth, *spatial = shape
            shape = (problems, batch, *spatial, depth)
        structs.append(jax.ShapeDtypeStruct(shape, x.dtype))
    return structs


def _one_problem(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The images of all problems as the batch of one, or the one filter that they share."""
    return (1, math.prod(shape[:-3]), *shape[-3:])


def _channels_last(spec: ConvSpec) -> ConvSpec:
    return dataclasses.replace(spec, data_format="NHWC")


def _channels_first(spec: ConvSpec, operand: str) -> bool:
    return operand != "f" and spec.data_format == "NCHW"
