"""The kernels of `pallas_gpu` as they are compiled for GPUs, executed without one.

Interpret mode runs what the kernels say. This runs what XLA, Triton and LLVM make of it, with the
masks, the vectors and the inline assembly that only the GPU has, and finds accesses out of bounds.
Each case has a process of its own, which a compiler may abort.
"""

import sys

import fresh_process
import pytest
from cases import OPS, SMALL, Case

# Channels enough for vectors, more than one block, and the edges of tiles.
WIDE = (
    Case("wide", (2, 9, 7, 40), (3, 3, 40, 1)),
    Case("many_blocks", (3, 21, 18, 33), (3, 3, 33, 1)),
    Case("wide_5x5", (2, 10, 13, 24), (5, 5, 24, 1)),
    Case("wide_7x7", (1, 12, 11, 16), (7, 7, 16, 1)),
    Case("wide_13x13", (1, 15, 14, 16), (13, 13, 16, 1)),
    Case("wide_31x31", (1, 28, 25, 8), (31, 31, 8, 1)),
    Case("wide_stride2", (2, 15, 13, 40), (3, 3, 40, 1), (2, 2)),
    Case("wide_5x5_stride2", (2, 14, 15, 16), (5, 5, 16, 1), (2, 2)),
    Case("wide_unequal_strides", (1, 9, 14, 12), (4, 3, 12, 1), (1, 3)),
    Case("wide_dilated", (1, 17, 15, 16), (3, 5, 16, 1), dilations=(2, 3)),
    Case("wide_multiplier2", (2, 9, 10, 16), (3, 3, 16, 2)),
    Case("wide_multiplier3", (1, 9, 10, 7), (3, 3, 7, 3)),
    Case("wide_multiplier16", (1, 8, 9, 4), (3, 3, 4, 16)),
    Case("wide_large_pads", (1, 9, 8, 16), (3, 3, 16, 1), (1, 2), ((9, 4), (7, 12))),
    Case("wide_filter_above_input", (1, 4, 3, 16), (9, 8, 16, 1)),
    Case("mamba", (1, 1, 130, 48), (1, 4, 48, 1), padding=((0, 0), (3, 0))),
)
# Almost 2**31 elements of the input, of the output or of both.
LARGE = {
    case.name: case
    for case in (
        Case("large", (16, 1024, 1023, 127), (3, 3, 127, 1)),
        Case("large_vectors", (63, 511, 511, 128), (5, 5, 128, 1)),
        Case("large_strided", (16, 1024, 1023, 127), (3, 3, 127, 1), (2, 2)),
        Case("large_multiplied", (4, 1024, 1023, 127), (3, 3, 127, 4)),
    )
}
CASES = {case.name: case for case in (*WIDE, *SMALL)}
_HALVES = ("wide", "wide_7x7", "wide_multiplier2", "wide_5x5_stride2", "many_blocks", "one_channel")
_ELSEWHERE = ("wide", "wide_5x5", "wide_stride2", "wide_multiplier2", "wide_13x13")
RUNS = (
    *((name, "float32", "sm_90a", 1) for name in CASES),
    *((name, dtype, "sm_90a", 1) for name in _HALVES for dtype in ("bfloat16", "float16")),
    *((name, dtype, "sm_80", 1) for name in _ELSEWHERE for dtype in ("float32", "bfloat16")),
    *((name, dtype, "sm_100a", 1) for name in _ELSEWHERE for dtype in ("float32", "bfloat16")),
    *((name, "float32", "sm_90a", 2) for name in ("wide", "wide_stride2", "wide_13x13")),
)


# The longest, so they come first.
@pytest.mark.parametrize("name", LARGE)
def test_large(name):
    """Arrays just below the size where indices overflow, without any data."""
    _run("large", name, "bfloat16", "sm_90a", "1")


@pytest.mark.parametrize(("name", "dtype", "target", "problems"), RUNS)
def test_values(name, dtype, target, problems):
    _run("values", name, dtype, target, str(problems))


def _run(*arguments):
    fresh_process.run(__file__, *arguments, JAX_PLATFORMS="cpu")


# ---- What runs in the process.


def _check_values(case, dtype, target, problems):
    """Runs all on the CPU, but for the kernels, and those as they are compiled for `target`."""
    for op in OPS:
        operands = [case.operands(op, dtype, seed) for seed in range(problems)]
        a, b = (np.stack(arrays) for arrays in zip(*operands, strict=True))
        function = functools.partial(getattr(pallas_gpu, op), _spec(case, op))
        kernels = []
        pallas_call = functools.partial(_pallas_call, pl.pallas_call, target, kernels)
        with mock.patch.object(pl, "pallas_call", pallas_call):
            got = jax.jit(function)(a, b)
        for i, (a, b) in enumerate(operands):
            case.check(op, got[i], case.expected(op, a, b), dtype)
        assert len(kernels) == 1, kernels


def _check_large(case, dtype, target, problems):
    """Runs some blocks of the kernels, among them the first and the last, on no data."""
    for op in OPS:
        spec = _spec(case, op)
        shapes = {"x": case.input, "f": case.filter, "dy": case.output}
        operands = [jax.ShapeDtypeStruct((problems, *shapes[name]), dtype) for name in OPERANDS[op]]
        assert pallas_gpu.unsupported(op, spec, "cuda", *operands) is None
        memories = []
        pallas_call = functools.partial(_pallas_call_on_nothing, pl.pallas_call, target, memories)
        with mock.patch.object(pl, "pallas_call", pallas_call):
            jax.jit(functools.partial(getattr(pallas_gpu, op), spec)).lower(*operands)
        [memory] = memories
        if op != "filter_grad":  # of which the last block may have nothing to do
            np.testing.assert_array_equal(memory.reached, memory.sizes)


def _spec(case, op):
    return canonicalize(
        op,
        case.input,
        case.filter,
        None if op == "forward" else case.output,
        case.strides,
        case.padding,
        (),
        "NHWC",
        case.dilations,
        None,
        None,
    )


def _pallas_call(pallas_call, target, kernels, kernel, *, out_shape, **options):
    """Instead of `pallas_call`: a call back to the interpreter of what it is compiled to."""

    def call(*operands):
        launch = _compile(pallas_call(kernel, out_shape=out_shape, **options), operands, target)
        kernels.append(launch.kernel.name)

        def run(*operands):
            result = np.empty(out_shape.shape, out_shape.dtype)
            memory = ptx.Memory([np.asarray(o) for o in operands], [result])
            ptx.run(launch.kernel, launch.grid, memory.addresses, memory, launch.shared_bytes)
            return memory.outputs()[0]

        shape = jax.ShapeDtypeStruct(out_shape.shape, out_shape.dtype)
        return jax.pure_callback(run, shape, *operands)

    return call


def _pallas_call_on_nothing(pallas_call, target, memories, kernel, *, out_shape, **options):
    def call(*operands):
        launch = _compile(pallas_call(kernel, out_shape=out_shape, **options), operands, target)
        memory = _Nothing([o.size * o.dtype.itemsize for o in (*operands, out_shape)])
        memories.append(memory)
        blocks = np.linspace(0, math.prod(launch.grid) - 1, 5).astype(int).tolist()
        ptx.run(launch.kernel, launch.grid, memory.addresses, memory, launch.shared_bytes, blocks)
        return jnp.zeros(out_shape.shape, out_shape.dtype)

    return call


def _compile(function, operands, target):
    shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands]
    [launch] = cuda.compile_program(function, shapes, target).launches
    return launch


if __name__ == "__main__":
    import functools
    import math
    from unittest import mock

    import conftest  # noqa: F401  as in all tests
    import jax
    import jax.experimental.pallas as pl
    import jax.numpy as jnp
    import numpy as np
    from figures import cuda, ptx

    from jax_dwbp._impl import pallas_gpu
    from jax_dwbp._spec import OPERANDS, canonicalize

    class _Nothing(ptx.Memory):
        """Arrays of these sizes, the last of them the result, that there is no memory for."""

        def __init__(self, sizes):
            super().__init__([], [])
            self.sizes = self._sizes = np.array(sizes)
            self.reached = np.zeros(len(sizes), np.int64)  # the end of what was accessed
            self._first_output, self._starts = len(sizes) - 1, np.zeros(len(sizes), np.int64)
            self.addresses = [(i + 1) * self._SPACING for i in range(len(sizes))]

        def load(self, addresses, active, count, dtype):
            self._access(addresses[active], count, dtype, first=0)
            return [np.zeros(active.shape, dtype)] * count

        def store(self, addresses, active, values):
            self._access(addresses[active], len(values), values[0].dtype, self._first_output)

        def _access(self, addresses, count, dtype, first):
            self._index(addresses, np.ones(addresses.shape, bool), count, dtype, first)
            buffers, offsets = np.divmod(addresses, self._SPACING)
            np.maximum.at(self.reached, buffers - 1, offsets + count * dtype.itemsize)

    what, name, dtype, target, problems = sys.argv[1:]
    check = {"values": _check_values, "large": _check_large}[what]
    check((CASES | LARGE)[name], dtype, cuda.TARGETS[target], int(problems))
