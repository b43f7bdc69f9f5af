"""Which rows of its source each row of a result meets: what implementations that sum taps share.

Strides need no zero-dilated dy. Of the input rows i = a + stride*t, phase a meets only the filter
rows k with (a + low - dilation*k) divisible by the stride, at the output row
t + (a + low - dilation*k) / stride. So each phase is a dense sum of its own taps, and the phases
are interleaved at the end.
"""

import math
from typing import NamedTuple

from jax_dwbp._spec import INPUT_GRAD, ConvSpec, Op, SpatialAxis


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


def axes(op: Op, spec: ConvSpec) -> tuple[Axis, Axis]:
    """Of height and width: from x for forward and filter_grad, from dy for input_grad."""
    rows, columns = map(_input_grad if op == INPUT_GRAD else _forward, spec.axes)
    return rows, columns


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
