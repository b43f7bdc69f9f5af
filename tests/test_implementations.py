"""Which implementation runs, on which platform, and how it is asked for."""

import contextlib
import dataclasses
import functools
import itertools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DEFAULT_ON_CPU, IMPLEMENTATIONS, KERNELS, OPS, Case
from jax.extend.core import Primitive
from jax.sharding import AxisType, PartitionSpec

import jax_dwbp
from jax_dwbp import _select, _spec

CASE = Case("selected", (1, 5, 6, 2), (3, 3, 2, 1))
MANY_COLUMNS = Case("many_columns", (1, 3, 80, 2), (2, 64, 2, 1))
MANY_PHASES = Case("many_phases", (1, 9, 9, 2), (3, 3, 2, 1), (5, 4))
TAPS_OR_LAX = ("xla_taps", "lax")
MOST = 2**31 - 1
EXTREME = (
    Case("rows of a filter", (1, 10**6, 1, 16), (10**5, 1, 16, 1)),
    Case("rows of a filter that fits", (1, 10**6, 10**6, 1), (57_344, 1, 1, 1)),
    Case("columns of a filter", (1, 1, 10**6, 16), (1, 10**5, 16, 1)),
    Case("a filter of the largest size", (1, MOST, 1, 1), (MOST, 1, 1, 1), padding="VALID"),
    Case("taps of many phases", (8, 10**7, 8, 3), (50_000, 1, 3, 1), (256, 1), dilations=(255, 1)),
    Case("rows", (8, MOST - 5, 1, 8), (3, 3, 8, 1)),
    Case("rows of few images", (1, MOST - 5, 2, 8), (3, 3, 8, 2)),
    Case("columns", (8, 1, MOST - 5, 8), (3, 3, 8, 1)),
    Case("columns of few images", (1, 1, 10**6, 16), (1, 128, 16, 1)),
    Case("images", (MOST, 8, 8, 3), (3, 3, 3, 1)),
    Case("channels", (1, 8, 8, MOST), (3, 3, MOST, 1)),
    Case("multiplier", (1, 8, 8, 1), (3, 3, 1, MOST)),
    Case("pads of rows", (1, 8, 8, 3), (3, 3, 3, 1), padding=((10**8, 10**8), (1, 1))),
    Case("pads of columns", (9, 8, 8, 3), (3, 3, 3, 1), padding=((1, 1), (10**8, 10**8))),
    Case("pads", (9, 8, 8, 3), (3, 3, 3, 1), (10**6, 10**6), ((10**8, 10**8), (10**8, 10**8))),
    Case("strides", (1, 8, 8, 3), (3, 3, 3, 1), (10**6, 10**6)),
    Case("strides that are met", (1, 10**8, 8, 3), (3, 3, 3, 1), (10**6, 1)),
    Case("largest strides", (1, 8, 8, 3), (3, 3, 3, 1), (MOST, MOST)),
    Case("dilations", (8, 8, 8, 3), (3, 3, 3, 1), dilations=(10**6, 10**6)),
    Case("largest dilations", (8, 8, 1, 3), (2, 1, 3, 1), dilations=(MOST - 9, MOST)),
)
EMPTY = (
    Case("no images", (0, 5, 6, 2), (3, 3, 2, 2)),
    Case("no rows", (1, 0, 6, 2), (3, 3, 2, 1)),
    Case("no columns", (1, 5, 0, 2), (3, 3, 2, 1), (2, 2)),
    Case("padding alone", (1, 0, 6, 2), (2, 3, 2, 1), padding=((2, 2), (1, 1))),
    Case("no channels", (1, 5, 6, 0), (3, 3, 0, 2)),
    Case("multiplier of 0", (1, 5, 6, 2), (3, 3, 2, 0)),
    Case("no rows of the filter", (1, 5, 6, 2), (0, 3, 2, 1), padding="VALID"),
    Case("no columns of the filter", (9, 5, 6, 2), (3, 0, 2, 1), padding="VALID"),
    Case("no rows of the output", (1, 1, 8, 3), (4, 3, 3, 1), (4, 4), "VALID"),
    Case("no columns of the output", (9, 8, 1, 3), (3, 4, 3, 2), (4, 4), "VALID"),
)


def shapes(case, op):
    x, f, dy = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (case.input, case.filter, case.output)
    )
    return {"forward": (x, f), "input_grad": (f, dy), "filter_grad": (x, dy)}[op]


def selection(case, op, platform="cpu", **options):
    a, b = case.operands(op)
    [found] = jax_dwbp.implementations(
        lambda a, b: case.run(op, a, b, **options), a, b, platform=platform
    )
    return found


@pytest.mark.parametrize("op", OPS)
def test_defaults(op):
    found = selection(CASE, op, "cpu")
    assert found[:2] == (op, DEFAULT_ON_CPU)
    assert list(found.reasons) == [
        "native_cpu",
        "xla_taps",
        "fft",
        "lax",
        "pallas_tpu",
        "pallas_gpu",
    ]
    assert [name for name, reason in found.reasons.items() if reason is None] == [
        name for name in found.reasons if name in (*IMPLEMENTATIONS, "fft")
    ]
    # No accelerator has timed the kernels: they run by name, but for a multiplier on a TPU.
    for platform, multiplier in itertools.product(("cuda", "rocm", "tpu"), (1, 2)):
        case = dataclasses.replace(CASE, filter=(3, 3, CASE.input[3], multiplier))
        is_hopeless = platform == "tpu" and multiplier == 2
        assert selection(case, op, platform).runs == ("pallas_tpu" if is_hopeless else "lax")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("platform", "kernel"), (("tpu", "pallas_tpu"), ("cuda", "pallas_gpu")))
@pytest.mark.parametrize("op", OPS)
def test_accelerators_run_lax_and_kernels_by_name(op, platform, kernel):
    """The lowered program says so, alone and in a sequence of names."""
    case = Case("accelerated", (8, 14, 14, 128), (3, 3, 128, 1))
    called = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}[platform]
    for requested in (None, kernel, (kernel, "lax")):
        run = jax.jit(functools.partial(case.run, op, implementation=requested))
        lowered = run.trace(*shapes(case, op)).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in lowered) == (requested is None)
        assert (called in lowered) == (requested is not None)


@contextlib.contextmanager
def steps(most):
    """Fails what takes more than so many lines of this package, when it does."""
    package = str(Path(jax_dwbp.__file__).parent)
    taken = 0

    def trace(frame, event, argument):
        nonlocal taken
        if not frame.f_code.co_filename.startswith(package):
            return None
        taken += event == "line"
        assert taken <= most, f"{frame.f_code.co_qualname} takes too long"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("case", EXTREME, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_who_runs_is_known_soon(op, case):
    """What is planned is bounded by what fits a device, not by the sizes."""
    for platform in _select.PLATFORMS:
        with steps(10**6):
            [found] = jax_dwbp.implementations(
                functools.partial(case.run, op), *shapes(case, op), platform=platform
            )
        # Of the largest the other two refuse some on a CPU, where native_cpu may not be compiled.
        assert found.runs is not None or platform == "cpu"


def test_vectors_are_static():
    """Sizes in floats too, as TensorFlow takes them: an array of one dimension is never traced."""
    f, dy = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in CASE.operands("input_grad"))
    backprop_input = jax_dwbp.depthwise_conv2d_native_backprop_input
    sizes = np.array(CASE.input, np.float32)
    [found] = jax_dwbp.implementations(backprop_input, sizes, f, dy, (1, 1), "SAME")
    assert found.op == "input_grad"


def test_limits_of_xla_taps():
    most = dataclasses.replace(MANY_COLUMNS, filter=(2, 63, 2, 1))
    for op in OPS:
        found = selection(MANY_COLUMNS, op, implementation=TAPS_OR_LAX)
        assert found.runs == "lax"
        assert "at most 63 columns, got 64" in str(found.reasons["xla_taps"])
        assert selection(most, op, implementation=TAPS_OR_LAX).runs == "xla_taps"
    found = selection(MANY_PHASES, "input_grad", implementation=TAPS_OR_LAX)
    assert found.runs == "lax" and "at most 16, got (5, 4)" in str(found.reasons["xla_taps"])
    assert selection(MANY_PHASES, "forward", implementation=TAPS_OR_LAX).runs == "xla_taps"
    most = dataclasses.replace(MANY_PHASES, strides=(4, 4))
    assert selection(most, "input_grad", implementation=TAPS_OR_LAX).runs == "xla_taps"


def many_positions(op, positions):
    """In the convolution that lax runs, along the rows and before strides."""
    case = Case("many_positions", (1, 2, 1, 2), (2, 1, 2, 1), (4096, 1))
    pads = ((0, positions - 1), (0, 0))
    return {
        "forward": dataclasses.replace(case, padding=pads),
        "input_grad": dataclasses.replace(case, input=(1, positions, 1, 2)),
        "filter_grad": dataclasses.replace(case, padding=pads, dilations=(positions - 1, 1)),
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_limit_of_lax_on_a_cpu(op):
    def reason(positions, platform):
        case = many_positions(op, positions)
        run = functools.partial(case.run, op)
        [found] = jax_dwbp.implementations(run, *shapes(case, op), platform=platform)
        return found.reasons["lax"]

    assert reason(2**24, "cpu") is reason(2**24 + 1, "tpu") is None
    assert "at most 2**24 positions along an axis, before strides, got 16777217" in str(
        reason(2**24 + 1, "cpu")
    )


@pytest.mark.parametrize(
    "case",
    [
        Case("two_rows", (2, 4, 12, 1), (3, 2, 1, 3), (1, 2), ((2, 0), (1, 1)), (2, 1)),
        Case("one_column", (1, 6, 4, 1), (2, 4, 1, 1), (2, 3), ((1, 2), (1, 2)), (1, 2)),
        Case("channels", (2, 1, 6, 4), (3, 2, 4, 1), (2, 2), ((5, 5), (1, 4))),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swapped_operands_by_lax(case, dtype):
    """XLA aborts on convolutions like these: of one group, and in float64 of any number."""
    f, dy = case.operands("input_grad", dtype)
    dx = case.run("input_grad", f, dy, implementation="lax")
    case.check("input_grad", dx, case.expected("input_grad", f, dy), dtype)


def test_beyond_every_limit():
    """The last row is right or it is an error: beyond the limit XLA leaves it uninitialised."""
    case = many_positions("forward", 2**24)
    a, b = case.operands("forward")
    case.check("forward", case.run("forward", a, b), case.expected("forward", a, b), "float32")
    case = many_positions("forward", 2**24 + 1)
    for implementation, message in (
        ("lax", r"forward: lax: .*2\*\*24"),
        (TAPS_OR_LAX, "xla_taps: .*; lax: "),
    ):
        with pytest.raises(NotImplementedError, match=message):
            case.run("forward", a, b, implementation=implementation)


def test_a_name_runs_that_one_or_raises():
    assert selection(CASE, "forward", implementation="lax").runs == "lax"
    a, b = MANY_COLUMNS.operands("forward")
    with pytest.raises(NotImplementedError, match="xla_taps: .* at most 63 columns, got 64"):
        MANY_COLUMNS.run("forward", a, b, implementation="xla_taps")
    a, b = MANY_PHASES.operands("forward")
    with pytest.raises(NotImplementedError, match="at most 16"):
        # The gradient is asked of the same implementation.
        jax.grad(lambda a: jnp.sum(MANY_PHASES.run("forward", a, b, implementation="xla_taps")))(a)


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_what_is_empty_is_empty_before_anybody_is_asked(op, case, monkeypatch):
    for name, known in _select._TABLE.items():
        refused = functools.partial(pytest.fail, f"{name} was asked")
        unasked = dataclasses.replace(known, unsupported=lambda *_, refused=refused: refused())
        monkeypatch.setitem(_select._TABLE, name, unasked)
    a, b = case.operands(op)
    for platform in _select.PLATFORMS:
        found = selection(case, op, platform)
        names = list(found.reasons)
        assert found == (op, names[0], dict.fromkeys(names))
        assert set(names) == {*TAPS_OR_LAX, "fft", "native_cpu", *KERNELS}
        for requested in (*names, ("pallas_tpu", "lax"), ("pallas_gpu", "lax")):
            first = requested if isinstance(requested, str) else requested[0]
            assert selection(case, op, platform, implementation=requested).runs == first
            run = jax.jit(functools.partial(case.run, op, implementation=requested))
            lowered = run.trace(a, b).lower(lowering_platforms=(platform,))
            assert "custom_call" not in lowered.as_text()
    for name in names:
        got = case.run(op, a, b, implementation=name)
        np.testing.assert_array_equal(got, case.expected(op, a, b))
    with pytest.raises(ValueError, match="`implementation` must be out of"):
        case.run(op, a, b, implementation="fast")


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_can_not_be_compiled_is_left_to_others(op, monkeypatch):
    """The reason says so. By name alone the error is JAX's."""
    unknown = Primitive("unknown")
    unknown.def_abstract_eval(lambda a, *_, shape: a.update(shape=shape))

    def broken(spec, a, b):
        shape = spec.result_shape(_spec.OPS[op], a.shape, b.shape)
        return unknown.bind(a, b, shape=shape)

    kernel = dataclasses.replace(_select.PALLAS_TPU, **{op: broken})
    monkeypatch.setitem(_select._TABLE, "pallas_tpu", kernel)
    case = Case("multiplied", (8, 5, 6, 2), (3, 3, 2, 2))

    def lowered(requested):
        run = jax.jit(functools.partial(case.run, op, implementation=requested))
        return run.trace(*shapes(case, op)).lower(lowering_platforms=("tpu",)).as_text()

    for requested in (None, ("pallas_tpu", "lax"), ("pallas_tpu", "pallas_gpu", "lax")):
        says = contextlib.nullcontext()
        if requested is None:
            says = pytest.warns(match=f"{op} of .* not run by pallas_tpu: JAX can't lower it")
        with says:
            found = selection(case, op, "tpu", implementation=requested)
        assert found.runs == "lax"
        assert re.match("JAX can't lower it: .*'unknown'", str(found.reasons["pallas_tpu"]))
        with says:
            assert "stablehlo.convolution" in lowered(requested)
    for requested in ("pallas_tpu", ("pallas_tpu", "pallas_gpu")):
        assert selection(case, op, "tpu", implementation=requested).runs == "pallas_tpu"
        with pytest.raises(NotImplementedError, match="'unknown' not found for platform tpu"):
            lowered(requested)


def test_what_fails_for_want_of_room_is_tried_again(monkeypatch):
    """It says nothing about the kernel."""
    case, errors = Case("multiplied", (8, 5, 6, 2), (3, 3, 2, 2)), [RecursionError("deep")]
    right = _select.PALLAS_TPU

    def deep(spec, x, f):
        if errors:
            raise errors.pop()
        return right.forward(spec, x, f)

    kernel = dataclasses.replace(right, forward=deep)
    monkeypatch.setitem(_select._TABLE, "pallas_tpu", kernel)
    with pytest.raises(RecursionError, match="deep"):
        selection(case, "forward", "tpu")
    assert selection(case, "forward", "tpu").runs == "pallas_tpu"


@pytest.mark.parametrize("op", OPS)
def test_exported(op):
    """Where arguments are sharded too: of what is exported each device has no part of its own."""
    a, b = CASE.operands(op)
    for platform, name in (("cpu", "native_cpu"), ("cuda", "pallas_gpu")):
        explain = functools.partial(jax_dwbp.implementations, platform=platform, exported=True)
        [found] = explain(functools.partial(CASE.run, op), a, b)
        assert found.runs == ("xla_taps" if platform == "cpu" else "lax")
        assert "exported" in str(found.reasons[name])
        if name in IMPLEMENTATIONS:
            [found] = explain(functools.partial(CASE.run, op, implementation=name), a, b)
            assert found.runs == name
    mesh = jax.make_mesh((2,), ("i",), devices=jax.devices()[:2])
    case = dataclasses.replace(CASE, filter=(3, 3, 2, 2))
    shared = jax.sharding.NamedSharding(mesh, PartitionSpec())
    sharded = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared) for x in shapes(case, op)]
    for operands, runs in ((shapes(case, op), "pallas_tpu"), (sharded, "lax")):
        [found] = jax_dwbp.implementations(
            functools.partial(case.run, op), *operands, platform="tpu", exported=True
        )
        assert found.runs == runs


@pytest.mark.parametrize("axes", ({"i"}, {"i", "j"}))
def test_axes_that_shard_map_leaves_to_xla(axes):
    """With them XLA divides what is in it, and kernels it can't."""
    mesh = jax.make_mesh((2, 4), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    case = Case("sharded", (8, 5, 6, 2), (3, 3, 2, 1))
    run = jax.shard_map(
        functools.partial(case.run, "forward"),
        mesh=mesh,
        in_specs=(PartitionSpec("i"), PartitionSpec()),
        out_specs=PartitionSpec("i"),
        axis_names=axes,
    )
    [found] = jax_dwbp.implementations(run, *shapes(case, "forward"), platform="cpu")
    assert found.runs == ("xla_taps" if axes == {"i"} else DEFAULT_ON_CPU)
    if axes == {"i"}:
        assert "XLA divides the program" in str(found.reasons["native_cpu"])


def test_a_sequence_is_tried_in_order():
    for names, runs in ((("lax", "xla_taps"), "lax"), (list(TAPS_OR_LAX), "xla_taps")):
        assert selection(CASE, "forward", implementation=names).runs == runs
    found = selection(MANY_COLUMNS, "forward", implementation=TAPS_OR_LAX)
    assert found.runs == "lax"


def test_a_requested_implementation_is_what_runs():
    """The lowered program says so, not a table."""
    a, b = CASE.operands("input_grad")
    for name in ("lax", "xla_taps"):
        run = jax.jit(lambda a, b, name=name: CASE.run("input_grad", a, b, implementation=name))
        assert ("stablehlo.convolution" in run.lower(a, b).as_text()) == (name == "lax")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_lax_is_told_to_sum_in_float32(op, dtype):
    """XLA does so on a CPU anyway, so results here can't tell."""
    a, b = CASE.operands(op, dtype)
    run = jax.jit(lambda a, b: CASE.run(op, a, b, implementation="lax"))
    lowered = run.trace(a, b).lower(lowering_platforms=("tpu",))
    [convolution] = [x for x in lowered.as_text().splitlines() if "stablehlo.convolution" in x]
    assert convolution.endswith("xf32>")


def test_looks_into_whole_functions():
    """Gradients, control flow and containers of arguments included."""
    x, f = CASE.operands("forward")

    def loss(parameters, x):
        def body(x, f):
            return CASE.run("forward", x, f), None

        return jnp.sum(jax.lax.scan(body, x, parameters["filters"])[0])

    parameters = {"filters": jnp.stack([jnp.asarray(f)] * 2)}
    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    ops = [s.op for s in jax_dwbp.implementations(jax.grad(loss), parameters, x, platform="cpu")]
    assert sorted(ops) == ["filter_grad", "forward", "input_grad"]
    gradient = jax.grad(lambda f: jnp.sum(CASE.run("forward", *CASE.operands("forward")[:1], f)))
    [only] = jax_dwbp.implementations(gradient, f, platform="cpu")
    assert only.op == "filter_grad"  # neither the unused value nor a gradient that nobody asked for
    assert jax_dwbp.implementations(jnp.sin, x) == []


def test_sizes_stay_static():
    f, dy = CASE.operands("input_grad")
    [found] = jax_dwbp.implementations(
        jax_dwbp.depthwise_conv2d_native_backprop_input, CASE.input, f, dy, (1, 1), "SAME"
    )
    assert found.op == "input_grad"


def test_unknown_platform():
    with pytest.raises(ValueError, match="`platform` must be one of cpu, .* got 'abacus'"):
        jax_dwbp.implementations(jnp.sin, jnp.ones(3), platform="abacus")
