"""Random configurations: within TensorFlow's reach against TensorFlow, beyond it against the loops.

JAX_DWBP_FUZZ is how many of each kind, 60 by default. A failure names its configuration; `inside`
and the functions of `KINDS` draw it again from its seed.
"""

import contextlib
import os
from typing import Any

import jax
import numpy as np
import pytest
from cases import DEFAULT_ON_CPU, DTYPES, IMPLEMENTATIONS, OPS, Case

COUNT = int(os.environ.get("JAX_DWBP_FUZZ", "60"))
BATCH = 10

batches = pytest.mark.parametrize(
    "seeds",
    [range(start, min(start + BATCH, COUNT)) for start in range(0, COUNT, BATCH)],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}",
)


@pytest.fixture(autouse=True)
def clear_caches():
    """No configuration comes twice, so thousands of them would only fill the memory."""
    yield
    jax.clear_caches()


def inside(seed):
    """A case, dtype and layout out of TensorFlow's domain, half of them for Eigen's kernels."""
    rng = np.random.default_rng([1, seed])
    eigen = rng.random() < 0.5
    dtype = pick(rng, "float32", "float64") if eigen else pick(rng, *DTYPES)
    data_format = "NHWC" if eigen else pick(rng, "NHWC", "NCHW")
    while True:
        channels = integer(rng, 1, 6)
        case = Case(
            f"inside {seed}",
            (integer(rng, 1, 3), *pair(rng, 1, 12), channels),
            (*pair(rng, 1, 7), channels, integer(rng, 1, 4)),
            (integer(rng, 1, 4),) * 2 if eigen else pair(rng, 1, 4),
            padding(rng),
            (1, 1) if eigen else pair(rng, 1, 3),
        )
        # Of what is empty TensorFlow knows no more than we do.
        if 0 not in case.output:
            return case, dtype, data_format


def beyond(seed):
    """A case, dtype, layout and implementation, whatever this package allows."""
    rng = np.random.default_rng([2, seed])
    dtype, data_format = pick(rng, *DTYPES), pick(rng, "NHWC", "NCHW")
    implementation = pick(rng, None, *NAMES)
    while True:
        n, h, w, c, m = integer(rng, 1, 3), *pair(rng, 1, 14), *pair(rng, 1, 5)
        r, s = pair(rng, 1, 4)
        if rng.random() < 0.3:
            r, s = integer(rng, 8, 12), integer(rng, 1, 12)
        if rng.random() < 0.2:
            sizes = [n, h, w, c, m, r, s]
            sizes[rng.integers(len(sizes))] = 0
            n, h, w, c, m, r, s = sizes
        case = Case(
            f"beyond {seed}",
            (n, h, w, c),
            (r, s, c, m),
            pair(rng, 1, 5),
            padding(rng),
            pair(rng, 1, 4),
        )
        if legal(case):
            return case, dtype, data_format, implementation


def large(seed):
    """As `beyond`, with channels that fill vectors and columns that fill registers."""
    rng = np.random.default_rng([3, seed])
    dtype, data_format = pick(rng, *DTYPES), pick(rng, "NHWC", "NHWC", "NCHW")
    implementation = pick(rng, *NAMES, *[DEFAULT_ON_CPU] * 7)
    while True:
        c = pick(rng, 8, 16, 32, 48, integer(rng, 1, 70))
        m = pick(rng, 1, 1, 1, 2, 3, 4, 8)
        stride, dilation = integer(rng, 1, 2), pick(rng, 1, 1, 1, integer(rng, 2, 3))
        kernel = pick(rng, (3, 3), (5, 5), (7, 7), pair(rng, 1, 9), (1, integer(rng, 10, 80)))
        case = Case(
            f"large {seed}",
            (integer(rng, 1, 3), integer(rng, 1, 20), integer(rng, 1, 40), c),
            (*kernel, c, m),
            pick(rng, (stride, stride), pair(rng, 1, 4)),
            padding(rng),
            (dilation, dilation),
        )
        if legal(case):
            return case, dtype, data_format, implementation


def padded(seed):
    """As `beyond`, with pads above the filter, which a gradient's own convolution has to crop."""
    rng = np.random.default_rng([4, seed])
    dtype, data_format = pick(rng, "float32", "float32", *DTYPES), pick(rng, "NHWC", "NCHW")
    implementation = pick(rng, *NAMES)
    while True:
        c = integer(rng, 1, 8)
        m = integer(rng, 1, 16 // c)
        case = Case(
            f"padded {seed}",
            (integer(rng, 1, 2), integer(rng, 1, 20), integer(rng, 1, 90), c),
            (*pair(rng, 1, 5), c, m),
            pair(rng, 1, 2),
            (pair(rng, 0, 12), pair(rng, 0, 12)),
            pair(rng, 1, 2),
        )
        if legal(case):
            return case, dtype, data_format, implementation


def line(seed):
    """As `beyond`, of one spatial axis."""
    rng = np.random.default_rng([5, seed])
    return of_rank(rng, f"line {seed}", (integer(rng, 1, 200),), 64)


def volume(seed):
    """As `beyond`, of three spatial axes."""
    rng = np.random.default_rng([6, seed])
    sizes = integer(rng, 1, 9), integer(rng, 1, 12), integer(rng, 1, 20)
    return of_rank(rng, f"volume {seed}", sizes, 5)


def of_rank(rng, name, sizes, most_taps):
    dtype, data_format = pick(rng, *DTYPES), pick(rng, "NHWC", "NCHW")
    implementation = pick(rng, None, *NAMES)
    while True:
        c = pick(rng, integer(rng, 1, 6), integer(rng, 7, 40))
        some = (integer(rng, 0, 6), integer(rng, 0, 6))
        case = Case(
            name,
            (integer(rng, 1, 3), *sizes, c),
            (*(integer(rng, 1, most_taps) for _ in sizes), c, pick(rng, 1, 1, integer(rng, 2, 4))),
            tuple(integer(rng, 1, 3) for _ in sizes),
            pick(rng, "SAME", "VALID", tuple(some for _ in sizes)),
            tuple(pick(rng, 1, 1, integer(rng, 2, 4)) for _ in sizes),
        )
        if legal(case):
            return case, dtype, data_format, implementation


KINDS = (beyond, large, padded, line, volume)
# The taps don't do every filter, nor the input gradient of strides beyond a product of 16.
NAMES = [("xla_taps", "lax") if name == "xla_taps" else name for name in IMPLEMENTATIONS]


def legal(case):
    """Whether no window overhangs the padded input by a stride or more."""
    if case.padding == "SAME":
        return True
    pads = ((0, 0),) * case.rank if case.padding == "VALID" else case.padding
    return all(
        (kernel - 1) * dilation + 1 - size - sum(pad) < stride
        for size, kernel, stride, pad, dilation in zip(
            case.input[1:-1], case.filter[:-2], case.strides, pads, case.dilations, strict=True
        )
    )


def pick(rng, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def integer(rng, low, high):
    return int(rng.integers(low, high + 1))


def pair(rng, low, high):
    return integer(rng, low, high), integer(rng, low, high)


def padding(rng):
    return pick(rng, "SAME", "VALID", (pair(rng, 0, 6), pair(rng, 0, 6)))


@contextlib.contextmanager
def named(*configuration):
    try:
        yield
    except Exception as error:
        error.add_note(f"in {[repr(part) for part in configuration]}")
        raise


def results(case, dtype, data_format, implementation=None):
    """Each op with its operands and its result, all from one compilation."""
    operands = {op: case.operands(op, dtype) for op in OPS}

    @jax.jit
    def run(operands):
        return {
            op: case.run(op, a, b, data_format, implementation=implementation)
            for op, (a, b) in operands.items()
        }

    got = run(operands)
    return [(op, *operands[op], got[op]) for op in OPS]


@batches
def test_inside(seeds, record_property):
    pytest.importorskip("tensorflow", reason="TensorFlow is what this compares with")
    from test_tensorflow import check, tensorflow_op

    worst = 0.0
    for seed in seeds:
        case, dtype, data_format = inside(seed)
        with named(case, dtype, data_format):
            for op, a, b, got in results(case, dtype, data_format):
                want = tensorflow_op(case, op, a, b, data_format)
                worst = max(worst, check(case, op, got, want, dtype))
    record_property("worst", worst)


@pytest.mark.parametrize("draw", KINDS, ids=lambda draw: draw.__name__)
@batches
def test_beyond(seeds, draw, record_property):
    worst = 0.0
    for seed in seeds:
        case, dtype, data_format, implementation = draw(seed)
        with named(case, dtype, data_format, implementation):
            for op, a, b, got in results(case, dtype, data_format, implementation):
                worst = max(worst, case.check(op, got, case.expected(op, a, b), dtype))
    record_property("worst", worst)
