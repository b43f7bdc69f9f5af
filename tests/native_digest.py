"""Checks native_cpu on all small cases and on a few that are worth several threads.

Prints the instruction set's name and a digest of the results. A program of its own, since both the
instruction set and the number of threads are settled when a process starts.
"""

import dataclasses
import hashlib

import jax
import numpy as np
from cases import DTYPES, OPS, SMALL, Case

LARGER = (
    Case("rows", (2, 29, 28, 51), (3, 3, 51, 1)),
    Case("strided", (3, 30, 31, 24), (5, 5, 24, 2), (2, 2)),
    Case("strided_rows", (1, 19, 21, 35), (3, 3, 35, 1), (2, 2)),
    Case("big_filter", (1, 28, 28, 16), (13, 13, 16, 1)),
    Case("tiles", (1, 3, 2500, 16), (3, 9, 16, 1)),
    Case("one_row", (2, 1, 4096, 16), (1, 5, 16, 1)),
    Case("wide_filter", (1, 2, 90, 32), (1, 70, 32, 1)),
)


def with_channels(case, channels):
    (n, h, w, _), (r, s, _, m) = case.input, case.filter
    return dataclasses.replace(case, input=(n, h, w, channels), filter=(r, s, channels, m))


def main():
    jax.config.update("jax_enable_x64", True)
    digest = hashlib.sha256()
    for case, dtypes in (
        *((case, DTYPES) for case in SMALL),
        # Channels that fill vectors, one and several, and some that are left over.
        *((with_channels(case, 16), ["float32"]) for case in SMALL),
        *((with_channels(case, 35), ["float32", "float64"]) for case in SMALL),
        *((case, ["float32"]) for case in LARGER),
    ):
        for dtype in dtypes:
            operands = {op: case.operands(op, dtype) for op in OPS}
            run = jax.jit(
                lambda operands, case=case: {
                    (op, data_format): case.run(
                        op, a, b, data_format=data_format, implementation="native_cpu"
                    )
                    for op, (a, b) in operands.items()
                    for data_format in ("NHWC", "NCHW")
                }
            )
            for (op, _), got in run(operands).items():
                case.check(op, got, case.expected(op, *operands[op]), dtype)
                digest.update(np.asarray(got).tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
