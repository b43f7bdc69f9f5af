"""The three ops as loops over the taps in float64 or better, written from TensorFlow's rules alone.

It shares no code with the package: sizes and pads are worked out here, from the input's size, and
each tap lists, for each spatial axis, the pairs of an input's and an output's place that it joins.
"""

import itertools
import math

import numpy as np


def _wide(*operands):
    """The operands in a type that can judge theirs: float64, or what the platform has beyond it."""
    wider = np.longdouble if operands[0].dtype == np.float64 else np.float64
    return [np.asarray(operand).astype(wider) for operand in operands]


def geometry(size, kernel, stride, dilation, padding):
    """(output size, low padding) of one axis; padding is "SAME", "VALID" or (low, high)."""
    reach = (kernel - 1) * dilation + 1 if kernel else 0
    if padding == "SAME":
        out = (size + stride - 1) // stride
        return out, max((out - 1) * stride + reach - size, 0) // 2
    low, high = (0, 0) if padding == "VALID" else padding
    return max((size + low + high - reach) // stride + 1, 0), low


def _geometry(case):
    """That of each spatial axis."""
    rank = len(case.input) - 2
    padding = [case.padding] * rank if isinstance(case.padding, str) else case.padding
    return [
        geometry(*axis)
        for axis in zip(
            case.input[1:-1], case.filter[:-2], case.strides, case.dilations, padding, strict=True
        )
    ]


def output_shape(case):
    *_, c, m = case.filter
    return (case.input[0], *(out for out, _ in _geometry(case)), c * m)


def _taps(case):
    """For each tap of the filter: its index, what it reads of the input, and where that goes."""
    lists = []
    for axis, (out, low) in enumerate(_geometry(case)):
        taps = []
        for k in range(case.filter[axis]):
            outputs = np.arange(out)
            inputs = outputs * case.strides[axis] - low + k * case.dilations[axis]
            there = (0 <= inputs) & (inputs < case.input[1 + axis])
            taps.append((inputs[there], outputs[there]))
        lists.append(taps)
    for tap in itertools.product(*(range(len(taps)) for taps in lists)):
        pairs = [taps[k] for taps, k in zip(lists, tap, strict=True)]
        inputs, outputs = zip(*pairs, strict=True)
        yield tap, (slice(None), *np.ix_(*inputs)), (slice(None), *np.ix_(*outputs))


def forward(case, x, f):
    x, f = _wide(x, f)
    shape = output_shape(case)
    y = np.zeros((*shape[:-1], *f.shape[-2:]), x.dtype)
    for tap, read, written in _taps(case):
        y[written] += x[read][..., None] * f[tap]
    return y.reshape(shape)


def input_grad(case, f, dy):
    f, dy = _wide(f, dy)
    dy = dy.reshape(*dy.shape[:-1], *f.shape[-2:])
    dx = np.zeros(case.input, f.dtype)
    for tap, read, written in _taps(case):
        dx[read] += (dy[written] * f[tap]).sum(-1)
    return dx


def filter_grad(case, x, dy):
    x, dy = _wide(x, dy)
    dy = dy.reshape(*dy.shape[:-1], *case.filter[-2:])
    df = np.zeros(case.filter, x.dtype)
    for tap, read, written in _taps(case):
        u, v = x[read], dy[written]
        count, c, m = math.prod(u.shape[:-1]), *case.filter[-2:]
        df[tap] = np.einsum("kc,kcm->cm", u.reshape(count, c), v.reshape(count, c, m))
    return df
