"""lax's convolution and its gradients as loops over the taps in float64, from XLA's definition.

It shares no code with the package. Of arrays in lax's default layout: lhs [N, C, spatial], rhs
[O, I, window] and the result [N, O, spatial].
"""

import itertools

import numpy as np


def _taps(lhs, rhs, u, options):
    """For each tap of the window: what it reads of lhs, and where that goes in the result."""
    axes = []
    for i in range(2, lhs.ndim):
        taps = []
        for k in range(rhs.shape[i]):
            out = np.arange(u.shape[i])
            at = out * options["window_strides"][i - 2] + k * options["rhs_dilation"][i - 2]
            at -= options["padding"][i - 2][0]
            step = options["lhs_dilation"][i - 2]
            there = (at >= 0) & (at % step == 0) & (at // step < lhs.shape[i])
            taps.append((at[there] // step, out[there]))
        axes.append(taps)
    for window in itertools.product(*(range(n) for n in rhs.shape[2:])):
        read, written = zip(*(axes[i][k] for i, k in enumerate(window)), strict=True)
        yield window, (..., *np.ix_(*read)), (..., *np.ix_(*written))


def result_and_gradients(lhs, rhs, u, options):
    """The result, and the gradients of its product with u by lhs and rhs."""
    lhs, rhs, u = (np.asarray(x, np.float64) for x in (lhs, rhs, u))
    groups, batch_groups = options["feature_group_count"], options["batch_group_count"]
    group = max(groups, batch_groups)

    def grouped(x, axis):
        return x.reshape(*x.shape[:axis], group, -1, *x.shape[axis + 1 :])

    x, f, v = grouped(lhs, int(batch_groups == 1)), grouped(rhs, 0), grouped(u, 1)
    if batch_groups > 1:  # a group reads a part of the batch, and all of the channels
        x = x.swapaxes(0, 1)
    y, dx, df = np.zeros(v.shape), np.zeros(x.shape), np.zeros(f.shape)
    s = "opq"[: lhs.ndim - 2]
    for window, read, written in _taps(lhs, rhs, u, options):
        tap = (..., *window)
        y[written] += np.einsum(f"ngi{s},gji->ngj{s}", x[read], f[tap])
        dx[read] += np.einsum(f"ngj{s},gji->ngi{s}", v[written], f[tap])
        df[tap] += np.einsum(f"ngj{s},ngi{s}->gji", v[written], x[read])
    if batch_groups > 1:
        dx = dx.swapaxes(0, 1)
    return y.reshape(u.shape), dx.reshape(lhs.shape), df.reshape(rhs.shape)
