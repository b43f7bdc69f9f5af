"""The table of implementations, and which of them runs: decided per platform, at lowering.

Implementations see canonical data: layouts, empty operands and single problems end here.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_dwbp._impl import lax as lax_convolution
from jax_dwbp._impl import native_cpu, xla_taps
from jax_dwbp._spec import OPERANDS, ConvSpec, Op, brief

_IMPLEMENTATIONS = {"lax": lax_convolution, "xla_taps": xla_taps, "native_cpu": native_cpu}
# Best first. On a CPU (2 cores, AVX-512, float32, layers of networks at batch 8), native_cpu takes
# a half to a 50th of the time of xla_taps, but for one result of 38 MB, where the memory is what
# takes the time; xla_taps takes a third to a 450th of lax's, and more than that only for a single
# channel with a multiplier of 64 or more, which is a dense convolution. Nothing has been timed on
# an accelerator, where lax has the vendors' kernels.
_PREFERENCE = {"cpu": ("native_cpu", "xla_taps", "lax")}
_DEFAULT_PREFERENCE = ("lax", "xla_taps", "native_cpu")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Program(NamedTuple):
    """What the program that an op is lowered into has to allow."""

    partitioned: bool = False  # XLA divides it among devices
    exported: bool = False  # it has to run where this package is not installed, and later


_ANY = Program()


# What XLA can't look into, so that it can't partition it.
_KERNELS = {"native_cpu"}
# Calls that JAX does not promise to keep stable, or that need this package.
_UNSTABLE = {"native_cpu"}


def explain(
    op: Op, spec: ConvSpec, platform: str | None, a: Any, b: Any, program: Program = _ANY
) -> tuple[str | None, dict[str, str | None]]:
    """The implementation that runs `op`, if any, and for each in the order of preference why not.

    Of the operands only the shape and the dtype are read. A platform of None stands for any, so
    what it can't run nobody can. What `program` rules out runs only where it is asked for by name.
    """
    names = _PREFERENCE.get(platform or "", _DEFAULT_PREFERENCE)
    operands = _canonical_shapes(op, spec, a, b)
    reasons = {
        name: _IMPLEMENTATIONS[name].unsupported(op, spec, platform, *operands) for name in names
    }
    ruled_out = (_KERNELS if program.partitioned else set()) | (
        _UNSTABLE if program.exported else set()
    )
    requested = spec.implementation or [name for name in names if name not in ruled_out]
    for name in requested:
        if name not in reasons:
            raise ValueError(
                f"`implementation` must be out of {', '.join(names)}, got {brief(name)}"
            )
    return next((name for name in requested if reasons[name] is None), None), reasons


def select(
    op: Op, spec: ConvSpec, platform: str | None, a: Any, b: Any, program: Program = _ANY
) -> str:
    """The name of the implementation that runs `op`, or NotImplementedError with the reasons."""
    runs, reasons = explain(op, spec, platform, a, b, program)
    if runs is None:
        requested = dict.fromkeys(spec.implementation or reasons)
        why = "; ".join(f"{name}: {reasons[name]}" for name in requested)
        raise NotImplementedError(f"`implementation` can't run {op}: {why}")
    return runs


def run(
    op: Op, spec: ConvSpec, platform: str | None, program: Program, a: jax.Array, b: jax.Array
) -> jax.Array:
    """Runs `op` on its two operands in the caller's layout, with or without a problem axis.

    A filter without one is shared by the problems of the other operand.
    """
    shape = spec.result_shape(op, a.shape, b.shape)
    if 0 in (*shape, *a.shape, *b.shape):
        return jnp.zeros(shape, a.dtype)
    selected = select(op, spec, platform, a, b, program)
    implementation = getattr(_IMPLEMENTATIONS[selected], op)
    if selected == "native_cpu":
        # It takes operands as they come.
        return implementation(spec, a, b)

    def canonical(a: jax.Array, b: jax.Array) -> jax.Array:
        operands = []
        for name, x in zip(OPERANDS[op], (a, b), strict=True):
            if 4 in (a.ndim, b.ndim):
                x = x.reshape(_one_problem(x.shape))
            operands.append(jnp.moveaxis(x, 2, 4) if _channels_first(spec, name) else x)
        result = implementation(spec, *operands)
        if op != "filter_grad" and spec.data_format == "NCHW":
            result = jnp.moveaxis(result, 4, 2)
        return result.reshape(shape)

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


def _channels_first(spec: ConvSpec, operand: str) -> bool:
    return operand != "f" and spec.data_format == "NCHW"
