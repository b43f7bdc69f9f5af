"""What only a compiled kernel can get wrong: threads, instruction sets, indices, callers."""

import dataclasses
import functools
import itertools
import pathlib
import re
import shutil
from typing import Any

import fresh_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HAS_NATIVE, OPS, Case
from covering import covering
from jax import export
from jax.sharding import AxisType, PartitionSpec

import jax_dwbp
from jax_dwbp._impl import native_cpu

TARGET = "jax_dwbp_depthwise_conv2d"
CASE = Case("native", (8, 5, 6, 3), (3, 3, 3, 2), (2, 1))
every_op = pytest.mark.parametrize("op", OPS)
compiled = pytest.mark.skipif(not HAS_NATIVE, reason="native_cpu was not compiled")


def digest(*arguments, **environment):
    """That of native_digest.py, which checks the values too."""
    # XLA only moves the arrays, and compiles that in half the time if it needn't be optimal.
    quick = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    program = pathlib.Path(__file__).with_name("native_digest.py")
    return fresh_process.run(program, *arguments, **quick, **environment)


def program(run, *operands):
    """What XLA made of it."""
    return str(jax.jit(run).lower(*operands).compile().as_text())


@compiled
def test_same_bits_whatever_the_number_of_threads():
    assert digest(NPROC="1") == digest(NPROC="2") == digest(NPROC="5")


@compiled
@pytest.mark.parametrize("most", ["baseline", "avx2"])
def test_instruction_sets(most):
    """What runs on older CPUs; the other tests run what this one's CPU has."""
    digest("small", JAX_DWBP_MAX_ISA=most)


@compiled
def test_more_elements_than_32_bits_count():
    """The first and the last row of an input of more than 2**31 elements."""
    shape, stride = (1, 65536, 2049, 16), 65535
    assert np.prod(shape, dtype=np.int64) > 2**31
    f = jnp.ones((1, 1, 16, 1), "bfloat16")
    y = np.random.default_rng(0).integers(0, 8, (1, 2, 2049, 16)).astype(f.dtype)
    options = {"strides": (stride, 1), "padding": "VALID", "implementation": "native_cpu"}
    x = jax_dwbp.depthwise_conv2d_native_backprop_input(shape, f, y, **options)
    np.testing.assert_array_equal(np.asarray(x)[:, ::stride], y)
    assert not np.asarray(x)[:, 1:stride].any()
    np.testing.assert_array_equal(jax_dwbp.depthwise_conv2d_native(x, f, **options), y)
    df = jax_dwbp.depthwise_conv2d_native_backprop_filter(x, f.shape, y, **options)
    want = np.sum(y.astype("float64") ** 2, (0, 1, 2))
    np.testing.assert_array_equal(df.ravel(), want.astype(y.dtype))


@compiled
@pytest.mark.parametrize("channels", (3, 16))
def test_what_meets_only_padding_is_not_multiplied_with_it(channels):
    """Packed or in place: zero times infinity would be a NaN."""
    case = Case("padded", (1, 8, 8, channels), (3, 3, channels, 1), padding=((1, 1), (4, 4)))
    x, dy = case.operands("filter_grad")
    dy[:, :, [0, 1, -2, -1]] = np.inf
    df = case.run("filter_grad", x, dy, implementation="native_cpu")
    dy[:, :, [0, 1, -2, -1]] = 0
    case.check("filter_grad", df, case.expected("filter_grad", x, dy), "float32")


@compiled
@every_op
def test_a_filter_for_each_problem_is_one_call(op):
    """No copy and no transpose: the kernel takes the axis of problems."""
    a, b = (jnp.stack([jnp.asarray(x)] * 4) for x in CASE.operands(op))
    text = program(jax.vmap(functools.partial(CASE.run, op)), a, b)
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert not {"transpose", "copy", "fusion"} & set(text.replace("(", " ").split())


@compiled
@pytest.mark.parametrize("op", ("forward", "input_grad"))
def test_a_shared_filter_is_one_call(op):
    """Of single images too, where XLA would not see that a copy of the result changes nothing."""
    case = Case("single", (1, 5, 6, 3), (3, 3, 3, 2))
    a, b = case.operands(op)
    a, b, in_axes = (
        (np.stack([a] * 4), b, (0, None)) if op == "forward" else (a, np.stack([b] * 4), (None, 0))
    )
    text = program(jax.vmap(functools.partial(case.run, op), in_axes), a, b)
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert not {"transpose", "copy", "fusion"} & set(text.replace("(", " ").split())


@compiled
@every_op
def test_channels_first_is_one_call(op):
    """No transpose in this layout either."""
    x, f, y = (1, 3, 5, 6), (3, 3, 3, 2), (1, 6, 3, 6)
    run = {
        "forward": jax_dwbp.depthwise_conv2d_native,
        "input_grad": functools.partial(jax_dwbp.depthwise_conv2d_native_backprop_input, x),
        "filter_grad": lambda x, dy, **attributes: jax_dwbp.depthwise_conv2d_native_backprop_filter(
            x, f, dy, **attributes
        ),
    }[op]
    shapes = {"forward": (x, f), "input_grad": (f, y), "filter_grad": (x, y)}[op]
    run = functools.partial(run, strides=(2, 1), padding="SAME", data_format="NCHW")
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    text = program(run, *arrays)
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert not {"transpose", "copy", "fusion"} & set(text.replace("(", " ").split())


# Attributes or arrays that do not fit the others, and what is said of each.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no_such_op": ({"op": "backward"}, "`op` must be forward, input_grad or filter_grad"),
    "op_by_number": ({"op": np.int64(0)}, "Wrong attribute type"),
    "no_strides": ({"window_strides": []}, "`window_strides` must be one to three positive"),
    "four_strides": ({"window_strides": [1] * 4}, "`window_strides` must be one to three"),
    "no_stride": ({"window_strides": [1, 0]}, "`window_strides` must be one to three positive"),
    "one_low": ({"low": [1]}, "`low` must be as many integers as `window_strides`"),
    "three_lows": ({"low": [1, 1, 1]}, "`low` must be as many integers as `window_strides`"),
    "no_lows": ({"low": []}, "`low` must be as many integers as `window_strides`"),
    "one_dilation": ({"rhs_dilation": [1]}, "`rhs_dilation` must be as many positive integers as"),
    "backward_dilation": ({"rhs_dilation": [-1, 1]}, "`rhs_dilation` must be as many positive"),
    "integers": (dict.fromkeys("xfy", ((1, 2, 2, 1), "int32")), "x must be of float16, "),
    "dtype_of_f": ({"f": ((3, 3, 3, 2), "float16")}, "x, f and y must be of one dtype"),
    "dtype_of_y": ({"y": ((4, 2, 5, 6, 6), "bfloat16")}, "x, f and y must be of one dtype"),
    "rank_of_x": ({"x": ((5, 6, 3), "float32")}, "x must have two or three dimensions more than"),
    "one_axis": (
        {"window_strides": [1], "low": [1], "rhs_dilation": [1]},
        "x must have two or three dimensions more than `window_strides` has integers",
    ),
    "rank_of_y": ({"y": ((2, 5, 6, 6), "float32")}, "y must have as many dimensions as x"),
    "rank_of_f": ({"f": ((3, 3, 6), "float32")}, "f must have as many dimensions as x, but"),
    "problems_of_f": ({"f": ((3, 3, 3, 3, 2), "float32")}, "f must have the problems of x"),
    "problems_of_y": ({"y": ((3, 2, 5, 6, 6), "float32")}, "y must have the problems of x"),
    "batch_of_y": ({"y": ((4, 3, 5, 6, 6), "float32")}, "y must have the batch size of x"),
    "channels_of_f": ({"f": ((3, 3, 4, 2), "float32")}, "f must have the channels of x"),
    "channels_of_y": ({"y": ((4, 2, 5, 6, 5), "float32")}, "y must have the channels of x times"),
    "empty_x": ({"x": ((4, 2, 0, 6, 3), "float32")}, "no array may be empty"),
    "empty_f": ({"f": ((3, 3, 3, 0), "float32")}, "no array may be empty"),
    "empty_y": ({"y": ((4, 2, 5, 0, 6), "float32")}, "no array may be empty"),
    "layout": ({"channels_first": True}, "f must have the channels of x"),
}


def call_target(op, changes):
    """The C++ function, not as `native_cpu` calls it but with some changes."""
    arrays = {"x": (4, 2, 5, 6, 3), "f": (3, 3, 3, 2), "y": (4, 2, 5, 6, 6)}
    arrays = {name: jnp.ones(*changes.get(name, (arrays[name], "float32"))) for name in arrays}
    operands = {"forward": "xf", "input_grad": "fy", "filter_grad": "xy"}[op]
    [result] = set(arrays) - set(operands)
    pairs = {"window_strides": [1, 1], "low": [1, 1], "rhs_dilation": [1, 1]}
    attributes = {name: np.array(changes.get(name, pair), np.int64) for name, pair in pairs.items()}
    return jax.ffi.ffi_call(TARGET, jax.typeof(arrays[result]))(
        *(arrays[name] for name in operands),
        op=changes.get("op", op),
        channels_first=changes.get("channels_first", False),
        **attributes,
    )


# XLA calls nothing for a result that is empty.
@compiled
@pytest.mark.parametrize(
    "op, wrong",
    [
        (op, wrong)
        for op, result in {"forward": "y", "input_grad": "x", "filter_grad": "f"}.items()
        for wrong in WRONG
        if wrong != f"empty_{result}"
    ],
)
def test_what_does_not_fit_is_an_error(op, wrong):
    changes, message = WRONG[wrong]
    assert np.isfinite(call_target(op, {})).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT: .*{message}"):
        call_target(op, changes)


@compiled
def test_a_default_call_exports_code_that_needs_no_library():
    operands = CASE.operands("forward")
    exported = export.export(jax.jit(functools.partial(CASE.run, "forward")))(*operands)
    assert TARGET not in exported.mlir_module()
    assert TARGET in jax.jit(functools.partial(CASE.run, "forward")).lower(*operands).as_text()


@compiled
@every_op
def test_by_name_it_exports_for_those_who_ask_for_it(op):
    a, b = CASE.operands(op)
    run = jax.jit(functools.partial(CASE.run, op, implementation="native_cpu"))
    with pytest.raises(ValueError, match="custom calls .* no compatibility guarantees"):
        export.export(run)(a, b)
    allowed = [export.DisabledSafetyCheck.custom_call(TARGET)]
    exported = export.export(run, disabled_checks=allowed)(a, b)
    assert TARGET in exported.mlir_module()
    restored = export.deserialize(exported.serialize())
    CASE.check(op, restored.call(a, b), CASE.expected(op, a, b), "float32")


@compiled
@every_op
def test_shard_map_calls_it(op):
    mesh = jax.make_mesh((8,), ("problem",), axis_types=(AxisType.Auto,))
    operands = [jnp.stack([jnp.asarray(x)] * 8) for x in CASE.operands(op)]
    spec = PartitionSpec("problem")
    run = jax.jit(
        jax.shard_map(
            jax.vmap(functools.partial(CASE.run, op)), mesh=mesh, in_specs=spec, out_specs=spec
        )
    )
    assert TARGET in program(run, *operands)
    want = CASE.expected(op, *CASE.operands(op))
    for got in run(*operands):
        CASE.check(op, got, want, "float32")


@every_op
def test_scratch_is_bounded(op):
    """What would have to be packed at a time can be too much; then the next one serves."""
    case = Case("far", (1, 3001, 3001, 1), (31, 31, 1, 8), dilations=(100, 100))
    a, b = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.operands(op))
    [found] = jax_dwbp.implementations(functools.partial(case.run, op), a, b, platform="cpu")
    assert found.runs != "native_cpu"
    if HAS_NATIVE:
        assert "may take at most 8388608 bytes" in str(found.reasons["native_cpu"])


def scratch_is_too_much(case, op):
    a, b = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.operands(op))
    [found] = jax_dwbp.implementations(functools.partial(case.run, op), a, b, platform="cpu")
    return "may take at most" in str(found.reasons["native_cpu"])


@compiled
def test_scratch_is_of_a_tile_of_columns():
    """However long a row is; and of as many planes as dy has for a channel."""
    long = Case("long", (1, 1, 10**6, 1), (1, 5, 1, 1))
    assert not any(scratch_is_too_much(long, op) for op in OPS)
    far = Case("far", (1, 300, 300, 1), (11, 11, 1, 8), dilations=(20, 20))
    assert not scratch_is_too_much(far, "forward") and scratch_is_too_much(far, "input_grad")


@compiled
@pytest.mark.parametrize("stride", range(1, 7))
@pytest.mark.parametrize("dilation", range(1, 5))
def test_taps_of_each_phase(stride, dilation):
    """They come again after stride / gcd(stride, dilation), but for phases that are not there."""
    padding = ((2 * stride, 13), (11, 3 * stride))
    spacing = {"strides": (stride, 7 - stride), "dilations": (dilation, 5 - dilation)}
    for channels, op in itertools.product((1, 16), OPS):
        filter_shape = (5, 8, channels, 2)
        case = Case("phases", (2, 3, 11, channels), filter_shape, padding=padding, **spacing)
        a, b = case.operands(op)
        got = case.run(op, a, b, implementation="native_cpu")
        case.check(op, got, case.expected(op, a, b), "float32")


@compiled
@pytest.mark.parametrize("channels", (1, 16))
@pytest.mark.parametrize("stride", (1, 2))
def test_filters_longer_than_what_is_read(stride, channels):
    """Of which a tile of the result meets a part, of the gradient by the input too."""
    options = {"strides": (1, stride), "dilations": (1, 60)}
    shape, padding = (9, 10, channels, 1), ((4, 4), (540, 540))
    padded = Case("padded", (1, 9, 3, channels), shape, padding=padding, **options)
    valid = Case("valid", (1, 17, 543, channels), shape, padding="VALID", **options)
    for case, op in itertools.product((padded, valid), OPS):
        a, b = case.operands(op)
        got = case.run(op, a, b, implementation="native_cpu")
        case.check(op, got, case.expected(op, a, b), "float32")


def run_long_filters():
    """Of windows as long as the signal, a multiplication and a sum, in ten seconds of the CPU."""
    import functools
    import resource

    import jax
    from cases import OPS, Case

    case = Case("window", (1, 1, 2**15, 16), (1, 2**15, 16, 1), padding="VALID")
    runs = [
        (jax.jit(functools.partial(case.run, op, implementation="native_cpu")), case.operands(op))
        for op in OPS
    ]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    for run, operands in runs * 12:
        jax.block_until_ready(run(*operands))


@compiled
def test_work_is_linear_in_the_taps():
    """Work that grows with their square takes half a second at a time, and the limit ends it."""
    fresh_process.call(run_long_filters)


def growth(input, filter):
    """Prints the MB that a call takes at most, by which the process grows."""
    import pathlib

    import jax
    import jax.numpy as jnp

    import jax_dwbp

    def peak():
        status = pathlib.Path("/proc/self/status").read_text().split()
        return int(status[status.index("VmHWM:") + 1])

    x, f = jnp.ones(input), jnp.ones(filter)
    options = {"strides": (1, 1), "padding": "VALID", "implementation": "native_cpu"}
    run = jax.jit(lambda x, f: jax_dwbp.depthwise_conv2d_native(x, f, **options))
    compiled = run.lower(x, f).compile()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # a peak that is over
    before = peak()
    jax.block_until_ready(compiled(x, f))
    print((peak() - before) / 1024)


@compiled
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="asks Linux")
@pytest.mark.parametrize(
    ("input", "filter"),
    [
        # A row has 293 tiles, each of which meets all taps.
        ((1, 1, 2**15, 16), (1, 2**13, 16, 1)),
        # A thread that packed all rows that a band meets would take 16 MB.
        ((1, 1000, 4200, 4), (900, 1, 4, 1)),
    ],
    ids=str,
)
def test_memory_is_of_what_a_tile_meets(input, filter):
    assert float(fresh_process.call(growth, input, filter, XLA_FLAGS="")) < 32


@compiled
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("shape", [(1, 16, 16, 256), (1, 256, 256, 1)], ids=str)
def test_each_value_of_half_a_type_is_converted(shape, multiplier, dtype):
    """To the product's and back: infinities, NaNs, what overflows, and float16's subnormals.

    Those of bfloat16 are float32's, which XLA's threads take for 0.
    """
    x = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).reshape(shape)
    factors = np.array([1, 2, 1 / 3], x.dtype)
    options = {"strides": (1, 1), "padding": "SAME", "implementation": "native_cpu"}
    parts = [
        jax_dwbp.depthwise_conv2d_native(
            x, np.broadcast_to(some, (1, 1, shape[-1], multiplier)), **options
        ).reshape(*shape, multiplier)
        for some in np.split(factors, 3 // multiplier)
    ]
    y = np.concatenate(parts, -1).astype(np.float32)
    with np.errstate(all="ignore"):  # of NaNs that signal
        want = (x[..., None].astype(np.float32) * factors.astype(np.float32)).astype(dtype)
        want = want.astype(np.float32)
    if dtype == "bfloat16":
        want[np.abs(want) < 4 * np.finfo(np.float32).tiny] = 0
        y[want == 0] = 0
    np.testing.assert_array_equal(y, want)


@compiled
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_weight_of_half_a_type_is_converted(dtype):
    """By rows, of which each plane has its own."""
    f = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    x = np.ones((1, f.size, 8, 8), dtype)
    options = {"strides": (1, 1), "padding": "SAME", "data_format": "NCHW"}
    y = jax_dwbp.depthwise_conv2d_native(
        x, f.reshape(1, 1, -1, 1), **options, implementation="native_cpu"
    )
    with np.errstate(all="ignore"):  # of NaNs that signal
        got, want = np.asarray(y).astype(np.float32), f.astype(np.float32)
    if dtype == "bfloat16":  # subnormal ones are float32's, which XLA's threads take for 0
        want[np.abs(want) < np.finfo(np.float32).tiny] = 0
        got[:, want == 0] = 0
    np.testing.assert_array_equal(got, np.broadcast_to(want[:, None, None], got.shape))


@compiled
@every_op
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_that_are_packed(op, dtype):
    """Since large filters meet each line so often. Results are written in place."""
    case = Case("packed", (2, 12, 11, 40), (9, 8, 40, 1))
    a, b = case.operands(op, dtype)
    got = case.run(op, a, b, implementation="native_cpu")
    case.check(op, got, case.expected(op, a, b), dtype)


@compiled
@every_op
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        Case("input", (2, 1, 1, 40), (2, 2, 40, 1), padding=((1, 1), (1, 1))),
        Case("result", (2, 3, 4, 40), (3, 4, 40, 1), padding="VALID"),
    ],
    ids=str,
)
def test_half_types_of_which_one_array_has_single_pixels(op, case, dtype):
    """Channels lie side by side in its planes too, but not in those of the other array."""
    a, b = case.operands(op, dtype)
    got = case.run(op, a, b, "NCHW", implementation="native_cpu")
    case.check(op, got, case.expected(op, a, b), dtype)


@dataclasses.dataclass(frozen=True)
class Depth:
    """The first of three spatial axes."""

    size: int
    kernel: int
    stride: int = 1
    pads: tuple[int, int] = (0, 0)
    dilation: int = 1

    @property
    def out(self):
        reach = (self.kernel - 1) * self.dilation + 1
        return (self.size + sum(self.pads) - reach) // self.stride + 1

    def met(self):
        """(slice of x, tap, slice of y) of all that meet."""
        for out, k in itertools.product(range(self.out), range(self.kernel)):
            read = out * self.stride - self.pads[0] + k * self.dilation
            if 0 <= read < self.size:
                yield read, k, out


DEPTHS = (
    Depth(5, 3, pads=(1, 1)),
    Depth(6, 3, 2, (0, 1)),
    Depth(7, 4, 3, (2, 4), 2),
    Depth(3, 5, pads=(4, 3)),  # the first and the last slice meet one tap
    Depth(4, 1),
    Depth(5, 1, 2, (2, 2)),  # of which some meet nothing
)
# By channels in place and packed, by rows, by planes.
SLICES = (
    Case("lines", (2, 6, 7, 16), (3, 3, 16, 1)),
    Case("packed", (1, 5, 6, 35), (5, 3, 35, 2), (2, 2)),
    Case("large", (1, 9, 9, 32), (8, 8, 32, 1)),
    Case("rows", (2, 9, 20, 3), (3, 4, 3, 1), dilations=(2, 1)),
    Case("strided_rows", (1, 11, 30, 2), (3, 3, 2, 2), (2, 2)),
    Case("planes", (9, 8, 7, 2), (3, 3, 2, 1)),
    Case("pixels", (2, 5, 7, 6), (1, 1, 6, 2)),  # the depth alone has a kernel
)


@compiled
@every_op
@covering(
    together=("depth", "case", "data_format"),
    depth=DEPTHS,
    case=SLICES,
    dtype=("float32", "float16"),
    data_format=("NHWC", "NCHW"),
)
def test_depth(op, depth, case, dtype, data_format):
    """Each slice is a sum over the taps of the depth, rounded once: small integers are exact."""
    (n, *image), (*kernel, c, m), (_, *result) = case.input, case.filter, case.output
    shapes = {
        "x": (n, depth.size, *image),
        "f": (depth.kernel, *kernel, c, m),
        "y": (n, depth.out, *result),
    }
    operands, (which,) = {
        "forward": ("xf", "y"),
        "input_grad": ("fy", "x"),
        "filter_grad": ("xy", "f"),
    }[op]
    random = np.random.default_rng(0)
    a, b = (random.integers(-3, 4, shapes[name]).astype(dtype) for name in operands)
    want = np.zeros(shapes[which])
    for read, k, out in depth.met():
        at = {"x": (slice(None), read), "f": k, "y": (slice(None), out)}
        want[at[which]] += case.expected(op, a[at[operands[0]]], b[at[operands[1]]])

    channels_first = data_format == "NCHW"
    outside = [
        np.moveaxis(array, -1, 1) if channels_first and name != "f" else array
        for array, name in ((a, operands[0]), (b, operands[1]), (want, which))
    ]
    lows = [low for low, _ in case.spec().padding]
    got = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(outside[2].shape, dtype))(
        *outside[:2],
        op=op,
        window_strides=np.array((depth.stride, *case.strides)),
        low=np.array((depth.pads[0], *lows)),
        rhs_dilation=np.array((depth.dilation, *case.dilations)),
        channels_first=channels_first,
    )
    np.testing.assert_array_equal(np.asarray(got), outside[2].astype(dtype))


@compiled
@every_op
@pytest.mark.parametrize("shape", [(2, 40, 3), (2, 3, 40)], ids=str)
def test_one_axis_is_a_row(op, shape):
    """With or without an axis of size 1 before it."""
    results = []
    for more in ((), (1,)):
        n, size, c = shape
        arrays = {
            "x": (n, *more, size, c),
            "f": (*more, min(size, 5), c, 2),
            "y": (n, *more, size, 2 * c),
        }
        random = np.random.default_rng(0)
        made = {
            name: random.uniform(-1, 1, array).astype("float32") for name, array in arrays.items()
        }
        operands = {"forward": "xf", "input_grad": "fy", "filter_grad": "xy"}[op]
        [result] = set(arrays) - set(operands)
        got = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(arrays[result], "float32"))(
            *(made[name] for name in operands),
            op=op,
            window_strides=np.array((*more, 1)),
            low=np.array((*(0 for _ in more), 2)),
            rhs_dilation=np.array((*more, 1)),
            channels_first=False,
        )
        results.append(np.asarray(got).ravel())
    np.testing.assert_array_equal(*results)


@compiled
@every_op
@pytest.mark.parametrize("channels", (3, 16))
def test_long_sums_are_of_short_chains(op, channels):
    """The error grows with the logarithm of the terms. In one chain it is much larger."""
    case = Case("long_sums", (4, 64, 33, channels), (31, 31, channels, 1))
    a, b = case.operands(op)
    want = case.expected(op, a, b)
    error = np.asarray(case.run(op, a, b, implementation="native_cpu")) - want
    assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < 4 * 2**-24


@compiled
@pytest.mark.parametrize("op", ("forward", "input_grad"))
@pytest.mark.parametrize("shape", [(200, 16, 5, 1), (2, 28, 28, 1)], ids=("planes", "rows"))
def test_sums_of_few_taps_are_of_short_chains(op, shape):
    """In half ulps the mean error is 0.66. In one chain it is above the limit."""
    case = Case("few_taps", shape, (8, 8, 1, 1) if shape[2] < 16 else (7, 7, 1, 1))
    a, b = map(np.abs, case.operands(op))
    want = case.expected(op, a, b)
    error = np.asarray(case.run(op, a, b, implementation="native_cpu")) - want
    assert np.mean(np.abs(error) / want) < 0.9 * 2**-24


@compiled
@every_op
def test_dilated_rows_of_whole_lines(op):
    """Two rows of a result are summed together where they meet the same rows, and only there."""
    for dilation in (1, 2, 3):
        case = Case("lines", (1, 12, 11, 32), (3, 3, 32, 1), dilations=(dilation, dilation))
        a, b = case.operands(op)
        got = case.run(op, a, b, implementation="native_cpu")
        case.check(op, got, case.expected(op, a, b), "float32")


@compiled
@pytest.mark.parametrize("channels", (3, 16))
def test_long_sums_of_many_rows_are_of_short_chains(channels):
    """In the filter gradient of problems enough that each is one task."""
    case = Case("many_rows", (1, 4096, 1, channels), (1, 1, channels, 1))
    a, b = map(
        np.stack, zip(*(case.operands("filter_grad", seed=i) for i in range(32)), strict=True)
    )
    run = jax.vmap(functools.partial(case.run, "filter_grad", implementation="native_cpu"))
    want = np.einsum("gnhwc,gnhwc->gc", a, b, dtype=np.float64).reshape(32, *case.filter)
    error = np.asarray(run(a, b)) - want
    assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < 4 * 2**-24


@compiled
def test_errors_of_like_terms_do_not_add_up_over_rows():
    """In one chain they err alike. By chains of chains the error is a third."""
    case = Case("like_terms", (1, 2**16, 1, 3), (1, 1, 3, 1))
    a = np.full((32, *case.input), 0.3, np.float32)
    run = jax.vmap(functools.partial(case.run, "filter_grad", implementation="native_cpu"))
    got = np.asarray(run(a, np.ones_like(a)), np.float64)
    np.testing.assert_allclose(got, 2**16 * float(np.float32(0.3)), rtol=50 * 2**-24)


# What vectors of rows meet: rows shorter than a vector and longer, several tiles and bands of them,
# all numbers of rows that are computed together, filters that are known and not, borders wider than
# what is read, and filters that meet nothing.
BY_ROWS = (
    *(Case(f"rows_{rows}", (2, rows, 18, 1), (3, 3, 1, 1)) for rows in range(1, 14)),
    *(Case(f"width_{width}", (1, 3, width, 1), (3, 3, 1, 1)) for width in (1, 15, 16, 17, 48, 70)),
    Case("tall", (2, 300, 300, 1), (5, 4, 1, 1)),
    Case("dilated", (1, 23, 19, 3), (3, 4, 3, 1), dilations=(3, 2)),
    Case("dilated_apart", (1, 5, 19, 2), (3, 2, 2, 1), dilations=(7, 5)),
    Case("tiles", (1, 2, 9000, 1), (2, 5, 1, 1)),
    Case("bands", (1, 90, 1500, 1), (3, 3, 1, 1), padding="VALID"),
    Case("tiles_of_two_widths", (40, 1, 5000, 1), (1, 3, 1, 1)),
    Case("long_filter", (1, 1, 300, 2), (1, 64, 2, 1)),
    Case("many_groups", (1, 40, 20, 3), (33, 17, 3, 1)),
    Case("many_rows", (1, 30, 40, 1), (11, 6, 1, 1)),
    Case("wide_filter", (1, 5, 24, 1), (3, 11, 1, 1)),
    Case("wide_border", (1, 3, 5, 3), (3, 3, 3, 1), padding=((4, 6), (7, 9))),
    Case("cropped", (1, 9, 11, 3), (4, 3, 3, 1), padding=((0, 5), (8, 0))),
    Case("strided", (2, 23, 37, 3), (3, 4, 3, 1), (2, 2)),
    Case("strided_past_taps", (1, 20, 41, 2), (2, 3, 2, 1), (3, 5)),
    Case("strided_and_dilated", (1, 21, 39, 1), (4, 5, 1, 1), (2, 3), dilations=(3, 2)),
    Case("strided_rows", (1, 31, 50, 1), (7, 6, 1, 1), (2, 1)),
    Case("strided_columns", (1, 13, 31, 1), (3, 3, 1, 1), (1, 2)),
    Case("strided_column", (2, 13, 1, 1), (2, 3, 1, 1), (3, 2), ((5, 2), (6, 2))),
    Case("strided_bands", (1, 181, 700, 1), (3, 3, 1, 1), (2, 2)),
    Case("strided_tiles", (1, 3, 9001, 1), (3, 3, 1, 1), (2, 3)),
    Case("multiplied", (2, 9, 21, 3), (3, 3, 3, 5)),
    Case("multiplied_and_strided", (1, 15, 33, 2), (3, 3, 2, 4), (2, 2)),
    Case("wide_pixels", (1, 9, 31, 3), (3, 3, 3, 8), (2, 2)),
    Case("wide_pixels_apart", (1, 7, 19, 4), (3, 2, 4, 5)),
    Case("many_multiples", (1, 9, 12, 9), (3, 3, 9, 5)),
    Case("pairs", (2, 9, 21, 3), (3, 3, 3, 2)),
    Case("five_rows", (1, 19, 37, 2), (5, 4, 2, 3)),
    Case("seven_rows", (2, 19, 37, 3), (7, 6, 3, 1)),
    Case("multiplied_bands", (1, 200, 150, 1), (3, 3, 1, 16)),
    Case("many_planes", (3, 7, 19, 61), (3, 3, 61, 1)),
)


@compiled
@every_op
@covering(case=BY_ROWS, dtype=("float32", "bfloat16", "float64"), data_format=("NHWC", "NCHW"))
def test_by_rows(op, case, dtype, data_format):
    with jax.enable_x64(dtype == "float64"):
        a, b = case.operands(op, dtype)
        got = case.run(op, a, b, data_format, implementation="native_cpu")
    case.check(op, got, case.expected(op, a, b), dtype)


@compiled
@every_op
@pytest.mark.parametrize("case", [case for case in BY_ROWS if np.prod(case.input) < 5000], ids=str)
def test_by_channels(case, op):
    """The same, of channels that fill a vector, and of one more, read in place and packed."""
    for channels, dtype in ((16, "float32"), (17, "bfloat16")):
        multiplier = min(case.filter[3], 2)
        wide = dataclasses.replace(
            case,
            input=(*case.input[:3], channels),
            filter=(*case.filter[:2], channels, multiplier),
        )
        a, b = wide.operands(op, dtype)
        got = wide.run(op, a, b, implementation="native_cpu")
        wide.check(op, got, wide.expected(op, a, b), dtype)


# Planes that are narrower than a vector, with several rows in each vector, and what leaves out most
# of them. They are many, as of few the masks would take longer than their packing.
NARROW = (
    Case("square", (40, 8, 8, 5), (3, 3, 5, 1)),
    Case("odd", (40, 7, 7, 3), (5, 3, 3, 1)),
    Case("column", (40, 30, 1, 2), (4, 1, 2, 1)),
    Case("row", (40, 1, 13, 3), (1, 5, 3, 1)),
    Case("tall", (40, 41, 9, 2), (3, 4, 2, 1)),
    Case("multiplied", (40, 8, 10, 3), (3, 3, 3, 4)),
    Case("dilated", (40, 12, 11, 2), (3, 3, 2, 1), dilations=(3, 4)),
    Case("strided_rows", (200, 13, 7, 3), (3, 3, 3, 1), (2, 1)),
    Case("wide_filter", (40, 6, 3, 2), (3, 11, 2, 1)),
    Case("padded_below", (40, 6, 8, 3), (4, 3, 3, 1), padding=((0, 7), (0, 2))),
    Case("padded_above", (40, 5, 7, 2), (3, 3, 2, 1), padding=((9, 0), (2, 0))),
    Case("valid_rows", (40, 15, 6, 2), (7, 1, 2, 1), padding="VALID"),
    Case("valid", (40, 8, 9, 3), (3, 3, 3, 1), padding="VALID"),
)


@compiled
@every_op
@covering(case=NARROW, dtype=("float32", "bfloat16", "float16", "float64"))
def test_narrow_planes(op, case, dtype):
    with jax.enable_x64(dtype == "float64"):
        a, b = case.operands(op, dtype)
        got = case.run(op, a, b, "NCHW", implementation="native_cpu")
    case.check(op, got, case.expected(op, a, b), dtype)


# Planes that are turned to vectors of channels, and back: narrower than a vector, wider, and so
# narrow that each value is moved alone; strides whose columns are stored one beside the other.
TURNED = (
    Case("narrow", (2, 7, 7, 37), (5, 5, 37, 1)),
    Case("wide", (1, 6, 37, 20), (7, 7, 20, 1)),
    Case("few_columns", (1, 9, 8, 19), (3, 3, 19, 2), (2, 2)),
    Case("tiles", (1, 5, 1300, 17), (5, 5, 17, 1), (2, 2)),
    Case("strided", (2, 14, 15, 37), (5, 5, 37, 1), (2, 2)),
    Case("strided_wide", (1, 9, 70, 17), (5, 5, 17, 1), (2, 2), ((3, 2), (4, 1))),
    Case("strided_past_taps", (1, 12, 41, 21), (5, 2, 21, 1), (2, 3)),
    Case("dilated", (1, 11, 21, 18), (5, 4, 18, 1), (2, 2), dilations=(2, 3)),
    Case("multiplied", (1, 7, 9, 20), (5, 5, 20, 3)),
    Case("multiplied_and_strided", (1, 11, 21, 18), (5, 5, 18, 2), (2, 2)),
)


@compiled
@every_op
@covering(case=TURNED, dtype=("float32", "bfloat16", "float16", "float64"))
def test_planes_by_channels(op, case, dtype):
    with jax.enable_x64(dtype == "float64"):
        a, b = case.operands(op, dtype)
        got = case.run(op, a, b, "NCHW", implementation="native_cpu")
    case.check(op, got, case.expected(op, a, b), dtype)


@compiled
@every_op
@pytest.mark.parametrize("channels", range(1, 17))
def test_by_rows_of_each_period(op, channels):
    """Which divides a vector or not; lines of such a row overlap, or start within a pixel."""
    for dtype, stride in itertools.product(("float16", "bfloat16", "float32", "float64"), (1, 2)):
        case = Case("period", (1, 26, 23, channels), (3, 4, channels, 1), (stride, stride))
        with jax.enable_x64(dtype == "float64"):
            a, b = case.operands(op, dtype)
            got = case.run(op, a, b, implementation="native_cpu")
        case.check(op, got, case.expected(op, a, b), dtype)


@compiled
@every_op
@pytest.mark.parametrize("channels", (1, 3))
def test_by_rows_of_many_problems(op, channels):
    """Several of which are one task, and images that share a filter."""
    case = Case("problem", (3, 8, 8, channels), (3, 3, channels, 1))
    pairs = [case.operands(op, seed=seed) for seed in range(50)]
    a, b = map(np.stack, zip(*pairs, strict=True))
    run = jax.vmap(functools.partial(case.run, op, implementation="native_cpu"))
    for got, pair in zip(run(a, b), pairs, strict=True):
        case.check(op, got, case.expected(op, *pair), "float32")


@compiled
@pytest.mark.parametrize("data_format", ("NHWC", "NCHW"))
@pytest.mark.parametrize("op", ("forward", "input_grad"))
def test_by_rows_infinities_stay_in_their_windows(op, data_format):
    """Whatever lies beside them in memory, and whatever is computed in vain."""
    for channels, shape in itertools.product((1, 3, 5), ((9, 7), (6, 40))):
        for padding in ("SAME", "VALID", ((3, 2), (4, 5))):
            case = Case("infinite", (2, *shape, channels), (3, 3, channels, 1), padding=padding)
            pair = case.operands(op)
            data = pair[op == "input_grad"]
            rng = np.random.default_rng(0)
            marks = (rng.random(data.shape) < 0.02).astype(data.dtype)
            data[marks > 0] = np.inf
            ones = np.ones(case.filter, data.dtype)
            met = case.expected(op, *((marks, ones) if op == "forward" else (ones, marks)))
            got = case.run(op, *pair, data_format, implementation="native_cpu")
            np.testing.assert_array_equal(np.isfinite(got), met == 0)


@compiled
@pytest.mark.parametrize("width", (7, 16, 40))
def test_by_rows_a_filter_gradient_of_infinities(width):
    """Of the last column, which in this padding only the last column of the filter meets."""
    for channels in (1, 3, 5):
        case = Case("infinite", (2, 9, width, channels), (3, 3, channels, 1), padding="VALID")
        x, dy = case.operands("filter_grad")
        x[:, :, -1] = np.inf
        df = case.run("filter_grad", x, dy, implementation="native_cpu")
        assert np.isfinite(df[:, :2]).all() and not np.isfinite(df[:, 2]).any()


def refuse(*arguments, **options):
    raise RuntimeError("the API version of this target is too new")


# What can be wrong with the library, by what is put in the place of names, and the reason.
FAILURES = {
    "not_compiled": (native_cpu, "_LIBRARY", "nowhere.so", "its library was not compiled when"),
    "no_library": (native_cpu, "_LIBRARY", "native_cpu.py", "its library can't be loaded: .*py"),
    "no_symbol": (native_cpu, "_TARGET", "nothing", "its library can't be loaded: .*nothing"),
    "newer": (native_cpu, "_ffi_version", lambda: (0, 0), "its library was compiled for an FFI"),
    "refused": (jax.ffi, "register_ffi_target", refuse, "its library can't be loaded: the API"),
}


@pytest.fixture(params=FAILURES if HAS_NATIVE else ["not_compiled", "no_library"])
def failure(request, monkeypatch):
    *place, reason = FAILURES[request.param]
    monkeypatch.setattr(*place)
    native_cpu._load.cache_clear()
    jax.clear_caches()
    yield reason
    monkeypatch.undo()
    native_cpu._load.cache_clear()
    jax.clear_caches()


@every_op
def test_without_the_library(failure, op):
    a, b = CASE.operands(op)
    [found] = jax_dwbp.implementations(functools.partial(CASE.run, op), a, b, platform="cpu")
    assert found.runs == "xla_taps"
    assert re.match(failure, str(found.reasons["native_cpu"]))
    CASE.check(op, CASE.run(op, a, b), CASE.expected(op, a, b), "float32")
    with pytest.raises(NotImplementedError, match=f"native_cpu: {failure}"):
        CASE.run(op, a, b, implementation="native_cpu")


def huge_pages():
    """Prints for how many parts of the process's memory the system was asked for huge pages."""
    import pathlib

    import jax
    import jax.numpy as jnp

    import jax_dwbp

    x, f = jnp.ones((1, 1024, 1024, 16)), jnp.ones((1, 1, 16, 1))
    options = {"strides": (1, 1), "padding": "VALID", "implementation": "native_cpu"}
    y = jax.block_until_ready(jax_dwbp.depthwise_conv2d_native(x, f, **options))
    print(pathlib.Path("/proc/self/smaps").read_text().count(" hg"))
    assert (y == 1).all()


@compiled
@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="asks Linux")
def test_huge_pages():
    """For a large result, unless the environment says no."""
    assert int(fresh_process.call(huge_pages, XLA_FLAGS=""))
    assert not int(fresh_process.call(huge_pages, XLA_FLAGS="", JAX_DWBP_HUGE_PAGES="0"))


def test_version_of_the_ffi():
    """As it was when this was written, or newer."""
    assert (0, 3) <= native_cpu._ffi_version() < (1000,)


def import_copy(folder):
    """Prints what a copy of the package is, of which nothing is installed."""
    import importlib.metadata
    import sys

    of = importlib.metadata.distribution

    def distribution(name):
        if name == "jax_dwbp":
            raise importlib.metadata.PackageNotFoundError(name)
        return of(name)

    importlib.metadata.distribution = distribution
    sys.path.insert(0, folder)
    sys.meta_path = [
        finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__
    ]

    import jax_dwbp
    from jax_dwbp._impl import native_cpu

    print(jax_dwbp.__file__, jax_dwbp.__version__, native_cpu._load())


@pytest.mark.parametrize("has_library", [False, pytest.param(True, marks=compiled)])
def test_a_copy_of_the_package_needs_no_metadata(tmp_path, has_library):
    """As a project has it that keeps its requirements with itself."""
    copy = tmp_path / "jax_dwbp"
    ignored = shutil.ignore_patterns("__pycache__", native_cpu._LIBRARY)
    shutil.copytree(pathlib.Path(jax_dwbp.__file__).parent, copy, ignore=ignored)
    library = copy / "_impl" / native_cpu._LIBRARY
    if has_library:
        shutil.copy(next(place for place in native_cpu._places() if place.exists()), library)
    file, version, reason = fresh_process.call(import_copy, str(tmp_path)).split(maxsplit=2)
    assert file == str(copy / "__init__.py") and version == "unknown"
    assert reason.strip() == (
        "None"
        if has_library
        else f"its library was not compiled when the package was installed: there is no {library}"
    )
