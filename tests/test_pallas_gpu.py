"""What is in the GPU kernels, run by NumPy; that they can be lowered without a GPU.

Values in general are in test_pallas, the kernels as they are compiled in test_pallas_gpu_ptx.
"""

import dataclasses
import functools
import itertools
import types
from typing import Any

import fresh_process
import jax
import jax.numpy as jnp
import numpy as np
import pallas_numpy
import pytest
from cases import OPS, Case

from jax_dwbp._impl import interpret, pallas_gpu
from jax_dwbp._impl.taps import Axis, Tap, axes
from jax_dwbp._spec import INPUT_GRAD
from jax_dwbp._spec import OPS as RECORDS

every_op = pytest.mark.parametrize("op", OPS)
pytestmark = pytest.mark.usefixtures("interpreted")
CASE = Case("pallas_gpu", (2, 5, 6, 3), (3, 2, 3, 2), (2, 1))


def run(case, op, a, b):
    """On arrays with an axis of problems."""
    return pallas_numpy.run(functools.partial(pallas_gpu._KERNELS[op], case.spec()), a, b)


def check(case, op, dtype="float32"):
    a, b = case.operands(op, dtype)
    case.check(op, run(case, op, a[None], b[None])[0], case.expected(op, a, b), dtype)


def reason(case, op="forward", platform: Any = "cuda", dtype="float32", height=(), width=()) -> Any:
    """Why `op` can't run, with changes of the two axes."""
    spec = case.spec()
    axes = zip(spec.axes, (height, width), strict=True)
    spec = dataclasses.replace(spec, axes=tuple(axis._replace(**dict(new)) for axis, new in axes))
    shapes = {"x": case.input, "f": case.filter, "dy": case.output}
    names = {"forward": "xf", "input_grad": ("f", "dy"), "filter_grad": ("x", "dy")}[op]
    operands = [jax.ShapeDtypeStruct((1, *shapes[name]), jnp.dtype(dtype)) for name in names]
    return pallas_gpu.unsupported(RECORDS[op], spec, platform, *operands)


# ---- Tiles, vectors, loops.


@pytest.mark.parametrize("size", [3, 5])
@every_op
def test_tiles_as_they_are_compiled(monkeypatch, size, op):
    """4x4 results and 3x3 taps, 2x8 results and a loop over rows of taps, and their edges."""
    monkeypatch.setattr(pallas_gpu, "_INTERPRETED", pallas_gpu._COMPILED)
    check(Case(f"tiles{size}", (1, 7, 9, 4), (size, size, 4, 1)), op)


@pytest.mark.parametrize(
    ("channels", "multiplier", "width", "of_channels"),
    [
        (7, 1, 1, 1),
        (6, 1, 2, 2),
        (12, 1, 4, 4),
        (6, 2, 4, 2),
        (3, 2, 2, 1),
        (4, 3, 1, 1),
        (2, 6, 2, 1),
        (3, 4, 4, 1),
        (1, 12, 4, 1),
    ],
)
def test_vectors(channels, multiplier, width, of_channels):
    """As wide as the lanes of one channel or of several can be; sums of one vector or several."""
    case = Case("vectors", (1, 3, 2, channels), (2, 1, channels, multiplier))
    assert pallas_gpu._vectors(case.spec()) == (width, of_channels, multiplier)
    for op in OPS:
        check(case, op)


def test_halves():
    for dtype in ("float16", "bfloat16"):
        for op in OPS:
            check(Case("halves", (1, 3, 4, 4), (2, 2, 4, 1)), op, dtype)


@every_op
def test_tiles_that_meet_nothing_but_padding(op):
    check(Case("padding", (1, 3, 2, 2), (2, 3, 2, 1), (1, 1), ((9, 8), (10, 7))), op)


@pytest.mark.parametrize("size", [3, 8])
def test_phases_without_taps(size):
    """A dilation by the stride leaves every other row and column of the input without any."""
    case = Case("phases", (1, 8, 6, 2), (size, size, 2, 1), (2, 2), dilations=(2, 2))
    rows, cols = axes(INPUT_GRAD, case.spec())
    assert [bool(taps) for taps in rows.phases] in ([True, False], [False, True])
    check(case, "input_grad")


@every_op
def test_problems_have_filters_of_their_own(op):
    operands = [CASE.operands(op, seed=seed) for seed in range(3)]
    got = run(CASE, op, *(np.stack(arrays) for arrays in zip(*operands, strict=True)))
    for i, (a, b) in enumerate(operands):
        CASE.check(op, got[i], CASE.expected(op, a, b), "float32")


@pytest.mark.parametrize("most", [None, 1, 8])
def test_loops_have_each_tap_once(most):
    for kernel, stride, dilation in itertools.product(
        (1, 2, 5, 8, 9, 13, 31), (1, 2, 3), (1, 2, 3)
    ):
        shapes = (1, 40, 40, 1), (kernel, kernel, 1, 1)
        case = Case("loops", *shapes, (stride, stride), dilations=(dilation, dilation))
        for op in ("forward", "input_grad"):
            axis, _ = axes(RECORDS[op], case.spec())
            loop = pallas_gpu._looped(axis, most)
            shifts = [loop.shift(trip) for trip in range(loop.trips)]
            for taps, body, rest in zip(
                axis.phases, loop.body.phases, loop.rest.phases, strict=True
            ):
                looped = [Tap(k + s.k, at + s.offset) for s in shifts for k, at in body]
                assert looped + rest == taps
                # Phases differ by one tap.
                assert most is None or len(rest) <= most + 1
                assert most is None or loop.trips == 0 or len(body) <= most


def test_tile_sizes():
    def sizes(rows, cols, phases=(1, 1), taps=3, by_rows=False):
        row_axis, col_axis = [
            Axis(99, size, 1, [[Tap(k, k) for k in range(taps)]] * count)
            for size, count in zip((rows, cols), phases, strict=True)
        ]
        with interpret(False):
            return pallas_gpu._tile_sizes(row_axis, col_axis, by_rows)

    assert sizes(56, 56) == (4, 4, True)
    assert sizes(56, 56, taps=5) == (2, 8, False)
    assert sizes(28, 28, taps=5) == (2, 7, False)
    assert sizes(28, 28, taps=13, by_rows=True) == (1, 15, False)
    assert sizes(1, 1024) == (1, 16, True)
    assert sizes(3, 2) == (3, 2, True)
    assert sizes(56, 56, (2, 2), taps=2) == (4, 4, True)
    assert sizes(56, 56, (3, 5), taps=1) == (3, 5, True)
    assert sizes(99, 99, (1, 16), taps=1) == (1, 16, True)
    assert sizes(99, 99, (16, 1), taps=1) == (16, 1, True)


# ---- The filter gradient.


def test_filter_grad_adds_up_in_two_stages_without_atomics():
    case = Case("stages", (3, 24, 20, 2), (2, 2, 2, 1))
    a, b = case.operands("filter_grad")
    kernel = pallas_gpu._KERNELS["filter_grad"]
    jaxpr = jax.make_jaxpr(lambda a, b: kernel(case.spec(), a, b))(a[None], b[None])
    [call] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    assert call.outvars[0].aval.size > 2 * np.prod(case.filter)
    assert "atomic" not in str(call)
    check(case, "filter_grad")


def test_infinity_of_x_stays_in_its_windows(monkeypatch):
    """Also where the last tiles have pixels beyond the output, which windows would cover."""
    sizes = pallas_gpu._INTERPRETED._replace(tile=16, height=4)
    monkeypatch.setattr(pallas_gpu, "_INTERPRETED", sizes)
    case = Case("infinity", (1, 6, 6, 1), (2, 2, 1, 1), padding="VALID")
    x, dy = case.operands("filter_grad")
    x[0, 5, 5, 0] = np.inf
    got = run(case, "filter_grad", x[None], dy[None])[0, :, :, 0, 0]
    np.testing.assert_array_equal(np.isfinite(got), [[True, True], [True, False]])


def test_many_pixels_are_shared_evenly():
    """Among threads and blocks: a sum of 73728 products errs as one of hundreds does."""
    case = Case("pixels", (8, 96, 96, 1), (1, 2, 1, 1))
    a, b = case.operands("filter_grad")
    got = run(case, "filter_grad", a[None], b[None])[0]
    assert case.check("filter_grad", got, case.expected("filter_grad", a, b), "float32") < 0.01


# ---- Where it runs.


def test_reasons():
    assert all(reason(CASE, op) is None for op in OPS)
    assert reason(CASE, platform=None) is None
    assert "got float64" in reason(CASE, dtype="float64")
    assert "2**30" in reason(CASE, width={"dilation": 2**29})
    assert "2**30" in reason(CASE, width={"size": 2**30})
    assert "2**31 elements" in reason(CASE, height={"out": 2**15}, width={"out": 2**15})
    of_eights = dataclasses.replace(CASE, input=(2, 5, 6, 4), filter=(3, 2, 4, 2))
    assert "2**31 elements" in reason(of_eights, height={"out": 2**14}, width={"out": 2**13})
    assert reason(of_eights, height={"out": 2**14}, width={"out": 2**13 - 1}) is None
    strided = dataclasses.replace(CASE, input=(1, 20, 20, 3), strides=(5, 4))
    assert "got (5, 4)" in reason(strided, "input_grad")
    assert reason(strided, "forward") is None
    with interpret(False):
        assert reason(CASE) is None


@pytest.mark.parametrize(("capability", "runs"), [("7.5", False), ("8.0", True), ("12.1", True)])
def test_compute_capability(not_interpreted, monkeypatch, capability, runs):
    new = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H100")
    device = types.SimpleNamespace(compute_capability=capability, device_kind="NVIDIA T4")
    monkeypatch.setattr(pallas_gpu, "_devices", lambda: [new, device])
    assert reason(CASE) == (
        None if runs else "it needs a compute capability of 8.0, got 7.5 of NVIDIA T4"
    )


def test_without_pallas(monkeypatch):
    def missing():
        raise ImportError("no module")

    monkeypatch.setattr(pallas_gpu, "_pallas", missing)
    pallas_gpu._load.cache_clear()
    assert reason(CASE) == "this JAX has no Pallas for Triton: no module"
    pallas_gpu._load.cache_clear()


def test_pallas_is_imported_when_it_is_needed():
    """It takes longer than the rest of this package."""
    program = (
        "import sys, jax_dwbp, numpy as np; x = np.ones((1, 2, 2, 1), np.float32);"
        "jax_dwbp.depthwise_conv2d_native(x, x[0, :, :, None], (1, 1), 'SAME');"
        "sys.exit('jax.experimental.pallas' in sys.modules)"
    )
    fresh_process.run("-c", program, JAX_DWBP_INTERPRET="", JAX_PLATFORMS="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_op
def test_lowered_without_a_gpu(not_interpreted, op, dtype):
    """And without the warning that JAX deprecates Triton, which would be an error here."""
    a, b = (operand[None] for operand in CASE.operands(op, dtype))
    function = jax.jit(lambda a, b: getattr(pallas_gpu, op)(CASE.spec(), a, b))
    lowered = function.trace(a, b).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton") == 1
