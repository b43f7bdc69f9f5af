"""Which rows of its source each row of a result meets: what implementations that sum taps share.

Strides need no zero-dilated dy. Of the input rows i = a + stride*t, phase a meets only the filter
rows k with (a + low - dilation*k) divisible by the stride, at the output row
t + (a + low - dilation*k) / stride. So each phase is a dense sum of its own taps, and the phases
are interleaved at the end.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_dwbp._spec import INPUT_GRAD, ConvSpec, Op, SpatialAxis

# Terms of a running sum in a loop.
_RADIX = 4


class Tap(NamedTuple):
    k: int  # index into the filter
    offset: int  # where the tap's slice of the source starts, before padding


class Axis(NamedTuple):
    """The result row a + len(phases)*t sums, for each tap of phases[a], f[tap.k] times the source
    row tap.offset + step*t, which is zero where there is none."""

    source: int  # rows
    result: int
    step: int
    phases: list[list[Tap]]  # without the taps that meet no source at all

    @property
    def count(self) -> int:
        """The rows of the longest phase."""
        return -(-self.result // len(self.phases))


def axes(op: Op, spec: ConvSpec) -> list[Axis]:
    """Of the spatial axes: from x for forward and filter_grad, from dy for input_grad."""
    return list(map(_input_grad if op == INPUT_GRAD else _forward, spec.axes))


def meeting(axis: SpatialAxis) -> tuple[int, int]:
    """The first and the last tap that meet the input, in a filter larger by any factor."""
    # -(out - 1) * stride <= k * dilation - low < size
    low, dilation = axis.pads[0], axis.dilation
    first = max(0, -(((axis.out - 1) * axis.stride - low) // dilation))
    return first, min(axis.kernel - 1, (axis.size - 1 + low) // dilation)


def _forward(axis: SpatialAxis) -> Axis:
    first, last = meeting(axis)
    taps = [Tap(k, k * axis.dilation - axis.pads[0]) for k in range(first, last + 1)]
    return Axis(axis.size, axis.out, axis.stride, [taps])


def _input_grad(axis: SpatialAxis) -> Axis:
    size, kernel, out, stride, (low, _), dilation = axis
    count = -(-size // stride)
    # The taps k of a phase, where dilation*k = a + low modulo the stride, are `step` apart.
    common = math.gcd(stride, dilation)
    step = stride // common
    inverse = pow(dilation // common, -1, step)
    phases = []
    for a in range(stride):
        if (a + low) % common:
            phases.append([])
            continue
        # -count < offset < out, in a filter that may be larger by any factor
        first = max(0, (a + low - out * stride) // dilation + 1)
        last = min(kernel - 1, -((-(a + low) - count * stride) // dilation) - 1)
        first += ((a + low) // common * inverse - first) % step
        ks = range(first, last + 1, step)
        phases.append([Tap(k, (a + low - k * dilation) // stride) for k in ks])
    return Axis(out, size, 1, phases)


def widen(a: jax.Array) -> jax.Array:
    """In the type that sums are taken in."""
    return a.astype(jnp.float32) if a.dtype.itemsize < 4 else a


def strided(a: jax.Array, start, count: int, stride: int, axis: int) -> jax.Array:
    """a[start : : stride] along `axis`, `count` elements; only the start may be traced."""
    span = (count - 1) * stride + 1
    if not isinstance(start, int):
        a, start = lax.dynamic_slice_in_dim(a, start, span, axis), 0
    return lax.slice_in_dim(a, start, start + span, stride, axis)


def pairwise(terms: list[jax.Array]) -> jax.Array:
    """Their sum."""
    while len(terms) > 1:
        pairs = [lax.add(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def looped_sum(count: int, term: Callable[..., jax.Array], zeros: jax.Array) -> jax.Array:
    """The sum of term(i) for all i below `count`, where i may be traced: by loops in loops, so that
    no running sum has more than `_RADIX` terms at any level."""

    def add(total, start, span):
        """total + term(start) + ... + term(start + span - 1)."""
        if span == 1:
            return total + term(start)
        part = span // _RADIX
        parts = jnp.minimum(_RADIX, -((start - count) // part))
        return total + lax.fori_loop(
            0, parts, lambda i, partial: add(partial, start + i * part, part), zeros
        )

    span = _RADIX
    while span < count:
        span *= _RADIX
    return add(zeros, 0, span)
