"""The table of implementations, and which of them runs: decided per platform, at lowering.

Implementations see canonical data: layouts, empty operands and single problems end here.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_dwbp._impl import lax as lax_convolution
from jax_dwbp._impl import native_cpu, xla_taps
from jax_dwbp._spec import OPERANDS, ConvSpec, Op, brief

_IMPLEMENTATIONS = {"lax": lax_convolution, "xla_taps": xla_taps, "native_cpu": native_cpu}
# Calls that XLA can't look into: it can neither partition them nor export them to where this
# package is not installed. They take operands as they come.
_OPAQUE = {"native_cpu"}
# Best first. On a CPU (2 cores, AVX-512, float32, layers of networks at batch 8), native_cpu takes
# a half to a 50th of the time of xla_taps, but for one result of 38 MB, where the memory is what
# takes the time; xla_taps takes a third to a 450th of lax's, and more than that only for a single
# channel with a multiplier of 64 or more, which is a dense convolution. Nothing has been timed on
# an accelerator, where lax has the vendors' kernels.
_PREFERENCE = {"cpu": ("native_cpu", "xla_taps", "lax")}
_DEFAULT_PREFERENCE = ("lax", "xla_taps", "native_cpu")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def explain(
    op: Op, spec: ConvSpec, platform: str | None, transparent: bool = False
) -> tuple[str | None, dict[str, str | None]]:
    """The implementation that runs `op`, if any, and for each in the order of preference why not.

    A platform of None stands for any, so what it can't run nobody can. If the program has to be
    `transparent` to XLA, opaque calls are made only where they are asked for by name.
    """
    names = _PREFERENCE.get(platform or "", _DEFAULT_PREFERENCE)
    reasons = {name: _IMPLEMENTATIONS[name].unsupported(op, spec, platform) for name in names}
    requested = spec.implementation or [n for n in names if not (transparent and n in _OPAQUE)]
    for name in requested:
        if name not in reasons:
            raise ValueError(
                f"`implementation` must be out of {', '.join(names)}, got {brief(name)}"
            )
    return next((name for name in requested if reasons[name] is None), None), reasons


def select(op: Op, spec: ConvSpec, platform: str | None, transparent: bool = False) -> str:
    """The name of the implementation that runs `op`, or NotImplementedError with the reasons."""
    runs, reasons = explain(op, spec, platform, transparent)
    if runs is None:
        requested = dict.fromkeys(spec.implementation or reasons)
        why = "; ".join(f"{name}: {reasons[name]}" for name in requested)
        raise NotImplementedError(f"`implementation` can't run {op}: {why}")
    return runs


def run(
    op: Op,
    spec: ConvSpec,
    platform: str | None,
    transparent: bool,
    a: jax.Array,
    b: jax.Array,
) -> jax.Array:
    """Runs `op` on its two operands in the caller's layout, with or without a problem axis.

    A filter without one is shared by the problems of the other operand.
    """
    shape = spec.result_shape(op, a.shape, b.shape)
    if 0 in (*shape, *a.shape, *b.shape):
        return jnp.zeros(shape, a.dtype)
    selected = select(op, spec, platform, transparent)
    implementation = getattr(_IMPLEMENTATIONS[selected], op)
    if selected in _OPAQUE:
        return implementation(spec, a, b)

    def canonical(a: jax.Array, b: jax.Array) -> jax.Array:
        channels_first = spec.data_format == "NCHW"
        single = 4 in (a.ndim, b.ndim)
        operands = []
        for name, x in zip(OPERANDS[op], (a, b), strict=True):
            if single:
                x = x.reshape(1, math.prod(x.shape[:-3]), *x.shape[-3:])
            operands.append(jnp.moveaxis(x, 2, 4) if channels_first and name != "f" else x)
        result = implementation(spec, *operands)
        if channels_first and op != "filter_grad":
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
