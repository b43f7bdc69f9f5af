"""The kernels of `pallas_gpu` as they are compiled for GPUs, executed without one.

test_pallas_gpu runs what the kernels say. This runs what XLA, Triton and LLVM make of it, with the
masks, the vectors and the inline assembly that only the GPU has, and finds accesses out of bounds.
A compiler may abort: pytest-xdist then reports the test, and goes on in another process.
"""

import functools
import math
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, SMALL, Case
from covering import covering
from figures import cuda, ptx

from jax_dwbp._impl import pallas_gpu
from jax_dwbp._spec import OPS as RECORDS

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
every_op = pytest.mark.parametrize("op", OPS)

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
_PROBLEMS = ("wide", "wide_stride2", "wide_13x13")


# The longest, so they come first.
@pytest.mark.parametrize("name", LARGE)
@every_op
def test_large(name, op):
    """Arrays just below the size where indices overflow, without any data.

    Some blocks of the kernels run, among them the first and the last. Those of the filter gradient
    are long loops each.
    """
    case, dtype, memories = LARGE[name], jnp.dtype("bfloat16"), []
    count = 2 if op == "filter_grad" else 5
    spec = case.spec()
    shapes = {"x": case.input, "f": case.filter, "dy": case.output}
    operands = [jax.ShapeDtypeStruct((1, *shapes[name]), dtype) for name in RECORDS[op].operands]
    assert pallas_gpu.unsupported(RECORDS[op], spec, "cuda", *operands) is None

    def launch(kernel, *operands, result):
        memory = _Nothing([o.size * o.dtype.itemsize for o in (*operands, result)])
        memories.append(memory)
        blocks = np.linspace(0, math.prod(kernel.grid) - 1, count).astype(int).tolist()
        ptx.run(kernel.kernel, kernel.grid, memory.addresses, memory, kernel.shared_bytes, blocks)
        return jnp.zeros(result.shape, result.dtype)

    with _launched(launch, "sm_90a"):
        jax.jit(functools.partial(pallas_gpu._KERNELS[op], spec)).lower(*operands)
    [memory] = memories
    if op != "filter_grad":  # of which the last block may have nothing to do
        np.testing.assert_array_equal(memory.reached, memory.sizes)


@pytest.mark.parametrize("name", CASES)
@every_op
def test_values(name, op):
    _check(name, op)


@covering(name=_HALVES, dtype=("bfloat16", "float16"), op=OPS, apart=[("name", "op")])
def test_halves(name, dtype, op):
    _check(name, op, dtype)


@covering(
    name=_ELSEWHERE,
    target=("sm_80", "sm_100a"),
    dtype=("float32", "bfloat16"),
    op=OPS,
    apart=[("name", "op")],
)
def test_other_targets(name, target, dtype, op):
    _check(name, op, dtype, target)


@covering(name=_PROBLEMS, op=OPS, problems=(2,), apart=[("name", "op")])
def test_problems(name, op, problems):
    _check(name, op, problems=problems)


def _check(name, op, dtype="float32", target="sm_90a", problems=1):
    """Runs the kernel as it is compiled for `target`, and what is around it on the CPU."""
    case, kernels = CASES[name], []
    operands = [case.operands(op, dtype, seed) for seed in range(problems)]

    def launch(kernel, *operands, result):
        kernels.append(kernel.kernel.name)
        stored = np.empty(result.shape, result.dtype)
        memory = ptx.Memory([np.asarray(o) for o in operands], [stored])
        ptx.run(kernel.kernel, kernel.grid, memory.addresses, memory, kernel.shared_bytes)
        return jnp.asarray(memory.outputs()[0])

    with _launched(launch, target):
        stacked = (jnp.asarray(np.stack(arrays)) for arrays in zip(*operands, strict=True))
        got = pallas_gpu._KERNELS[op](case.spec(), *stacked)
    assert len(kernels) == 1, kernels
    for i, (a, b) in enumerate(operands):
        case.check(op, got[i], case.expected(op, a, b), dtype)


def _launched(launch, target: str):
    """Within it a `pallas_call` is compiled for the target and is what `launch` makes of that."""
    pallas_call = pl.pallas_call

    def replaced(kernel, *, out_shape, **options):
        def call(*operands):
            shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands]
            function = pallas_call(kernel, out_shape=out_shape, **options)
            [compiled] = cuda.compile_program(function, shapes, cuda.TARGETS[target]).launches
            return launch(compiled, *operands, result=out_shape)

        return call

    return mock.patch.object(pl, "pallas_call", replaced)


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
