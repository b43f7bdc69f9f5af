"""The three ops as loops over the taps in float64 or better, written from TensorFlow's rules alone.

It shares no code with the package: sizes and pads are worked out here, from the input's size, and
each tap lists the pairs of rows and of columns that it joins.
"""

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


def output_shape(case):
    n, h, w, c = case.input
    r, s, _, m = case.filter
    padding = [case.padding] * 2 if isinstance(case.padding, str) else case.padding
    return (
        n,
        geometry(h, r, case.strides[0], case.dilations[0], padding[0])[0],
        geometry(w, s, case.strides[1], case.dilations[1], padding[1])[0],
        c * m,
    )


def _taps(case):
    """For each tap (r, s): the rows and columns of the input, and those of the output they meet."""
    padding = [case.padding] * 2 if isinstance(case.padding, str) else case.padding
    lists = []
    for axis in range(2):
        size, kernel = case.input[1 + axis], case.filter[axis]
        stride, dilation = case.strides[axis], case.dilations[axis]
        out, low = geometry(size, kernel, stride, dilation, padding[axis])
        taps = []
        for k in range(kernel):
            outputs = np.arange(out)
            inputs = outputs * stride - low + k * dilation
            there = (0 <= inputs) & (inputs < size)
            taps.append((inputs[there], outputs[there]))
        lists.append(taps)
    for r, (h, p) in enumerate(lists[0]):
        for s, (w, q) in enumerate(lists[1]):
            yield r, s, np.ix_(h, w), np.ix_(p, q)


def forward(case, x, f):
    x, f = _wide(x, f)
    n, p, q, _ = output_shape(case)
    y = np.zeros((n, p, q, *f.shape[2:]), x.dtype)
    for r, s, (h, w), (p, q) in _taps(case):
        y[:, p, q] += x[:, h, w, :, None] * f[r, s]
    return y.reshape(output_shape(case))


def input_grad(case, f, dy):
    f, dy = _wide(f, dy)
    dy = dy.reshape(*dy.shape[:3], *f.shape[2:])
    dx = np.zeros(case.input, f.dtype)
    for r, s, (h, w), (p, q) in _taps(case):
        dx[:, h, w] += (dy[:, p, q] * f[r, s]).sum(-1)
    return dx


def filter_grad(case, x, dy):
    x, dy = _wide(x, dy)
    dy = dy.reshape(*dy.shape[:3], *case.filter[2:])
    df = np.zeros(case.filter, x.dtype)
    for r, s, (h, w), (p, q) in _taps(case):
        df[r, s] = np.einsum("npqc,npqcm->cm", x[:, h, w], dy[:, p, q])
    return df
