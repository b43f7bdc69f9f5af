"""Checks native_cpu on a few cases that are worth several threads and, asked to, on all small ones.

  python native_digest.py [small]

Prints a digest of the results of the former. A program of its own, since both the instruction set
and the number of threads are settled when a process starts.
"""

import dataclasses
import hashlib
import sys

import jax
import numpy as np
from cases import DTYPES, OPS, SMALL, Case
from covering import sample

LARGER = (
    Case("rows", (2, 29, 28, 51), (3, 3, 51, 1)),
    Case("strided", (3, 30, 31, 24), (5, 5, 24, 2), (2, 2)),
    Case("strided_rows", (1, 19, 21, 35), (3, 3, 35, 1), (2, 2)),
    Case("big_filter", (1, 28, 28, 16), (13, 13, 16, 1)),
    Case("tiles", (1, 3, 2500, 16), (3, 9, 16, 1)),
    Case("one_row", (2, 1, 4096, 16), (1, 5, 16, 1)),
    Case("wide_filter", (1, 2, 90, 32), (1, 70, 32, 1)),
    Case("picture", (1, 97, 210, 3), (5, 5, 3, 1)),
    Case("dilated_picture", (1, 85, 61, 5), (3, 3, 5, 1), dilations=(3, 2)),
    Case("strided_picture", (1, 97, 211, 3), (5, 4, 3, 1), (2, 2)),
    Case("multiplied_picture", (1, 61, 70, 3), (3, 3, 3, 8), (2, 2)),
    Case("plane", (1, 129, 400, 1), (3, 3, 1, 1)),
    Case("sound", (1, 1, 30000, 1), (1, 20, 1, 1)),
    Case("small_planes", (40, 9, 8, 5), (3, 3, 5, 1)),
)


def with_channels(case, channels):
    (n, h, w, _), (r, s, _, m) = case.input, case.filter
    return dataclasses.replace(case, input=(n, h, w, channels), filter=(r, s, channels, m))


def run(case, dtype, data_format):
    """The results of all ops, which are checked."""
    operands = {op: case.operands(op, dtype) for op in OPS}

    @jax.jit
    def program(operands):
        options = {"data_format": data_format, "implementation": "native_cpu"}
        return {op: case.run(op, a, b, **options) for op, (a, b) in operands.items()}

    results = program(operands)
    for op, got in results.items():
        case.check(op, got, case.expected(op, *operands[op]), dtype)
    return results


def main():
    jax.config.update("jax_enable_x64", True)
    layouts = ("NHWC", "NCHW")
    if sys.argv[1:] == ["small"]:
        # Channels that fill vectors, one and several, and some that are left over.
        for case, channels, dtype, data_format in sample(
            case=SMALL, channels=(None, 16, 35), dtype=DTYPES, data_format=layouts
        ):
            run(with_channels(case, channels) if channels else case, dtype, data_format)
    digest = hashlib.sha256()
    for case in LARGER:
        for data_format in layouts:
            for result in run(case, "float32", data_format).values():
                digest.update(np.asarray(result).tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
