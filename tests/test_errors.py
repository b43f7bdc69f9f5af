"""Edge and bad inputs: what TensorFlow accepts has its values, the rest is refused at the border.

Refused means ValueError, TypeError or NotImplementedError with the argument in backticks, the rule
and what was got, before anything is traced.
"""

import contextlib
import dataclasses
import enum
import re
import reprlib
import types
from typing import Any
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, Case, from_layout, to_layout

import jax_dwbp
from jax_dwbp import _rules

FUNCTIONS = {
    "forward": jax_dwbp.depthwise_conv2d_native,
    "input_grad": jax_dwbp.depthwise_conv2d_native_backprop_input,
    "filter_grad": jax_dwbp.depthwise_conv2d_native_backprop_filter,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One input that was tried on TensorFlow, with what becomes of it here: values or an error.

    Shapes are in the row's layout. `output` is what TensorFlow returned or was given as
    out_backprop. `input` or `filter` may be anything where they are the vector of sizes.
    """

    what: str
    error: type[Exception] | None = None
    message: str = ""  # ".." stands for any text
    input: Any = (2, 5, 6, 3)
    filter: Any = (3, 3, 3, 2)
    output: tuple = (2, 5, 6, 6)
    dtype: str = "float32"  # of both arrays, or "first second"
    attributes: dict = dataclasses.field(default_factory=dict)

    def shapes(self, op):
        return {
            "forward": (self.input, self.filter),
            "input_grad": (self.filter, self.output),
            "filter_grad": (self.input, self.output),
        }[op]

    def call(self, op, a, b):
        sizes = {"forward": None, "input_grad": self.input, "filter_grad": self.filter}[op]
        sizes = np.array(sizes, np.int32) if isinstance(sizes, tuple) else sizes
        arguments = {"forward": (a, b), "input_grad": (sizes, a, b), "filter_grad": (a, sizes, b)}
        return FUNCTIONS[op](
            *arguments[op], **{"strides": [1, 1, 1, 1], "padding": "SAME", **self.attributes}
        )

    @property
    def data_format(self):
        return self.attributes.get("data_format", "NHWC")

    def case(self):
        """The same in the terms of the reference: tuples, pairs and NHWC."""
        n, h, w, c = (self.data_format.index(axis) for axis in "NHWC")
        padding = self.attributes.get("padding", "SAME")
        if padding == "EXPLICIT":
            pads = self.attributes["explicit_paddings"]
            padding = tuple(tuple(pads[2 * axis : 2 * axis + 2]) for axis in (h, w))
        input, filter = (tuple(int(size) for size in v) for v in (self.input, self.filter))
        strides, dilations = (
            tuple(self.attributes.get(name, (1, 1, 1, 1))[axis] for axis in (h, w))
            for name in ("strides", "dilations")
        )
        input = tuple(input[axis] for axis in (n, h, w, c))
        return Case(self.what, input, filter, strides, padding, dilations)


def row(what, error=None, message="", **fields):
    """A row, with what is no field of it as its attributes."""
    names = {field.name for field in dataclasses.fields(Row)}
    attributes = {name: fields.pop(name) for name in list(fields) if name not in names}
    return Row(what, error, message, attributes=attributes, **fields)


def numbered(first, op, *rows):
    return [(first + i, op, row) for i, row in enumerate(rows)]


def bad(what, message, error: type[Exception] = ValueError, **fields):
    return row(what, error, message, **fields)


def explicit(what, pads, message="", **fields):
    error = ValueError if message else None
    return row(what, error, message, padding="EXPLICIT", explicit_paddings=pads, **fields)


def rank(name, shape):
    argument = "out_backprop" if name == "output" else name
    message = f"`{argument}` must be 4-dimensional, got shape {shape}"
    return bad(f"{name}_{len(shape)}d", message, **{name: shape})


def output(what, expected, got, **fields):
    implied = "`input.. .., `filter.. .., `strides` .., `dilations` .., `padding` .. and .."
    message = f"`out_backprop` must have shape {expected}, got {got}: implied by {implied}"
    return bad(what, message, output=got, **fields)


def channels(filter, input):
    rule = f"`{filter}` [R, S, C, M] must have the C of `{input}` [N, H, W, C]"
    return bad("channels", f"{rule}, got (3, 3, 4, 2) and (2, 5, 6, 3)", filter=(3, 3, 4, 2))


def overhang(what, name, window, size, **fields):
    got = f"{window} with stride 1 on an input of 0 + {size} + 0"
    return bad(what, f"`{name}{OVERHANG}{got}", padding="VALID", **fields)


def span(name, got, **fields):
    rule = f"`{name}` and the padded input must each span less than 2**31"
    return bad("huge_sizes", f"{rule}, got a dilated size of {got}", **fields)


def mixed(first, second, dtypes):
    a, b = dtypes.split()
    message = (
        f"`{first}` and `{second}` must share a dtype, got {a} for `{first}`, {b} for `{second}`"
    )
    return bad(f"mixed_{a}_{b}", message, TypeError, dtype=dtypes)


LAYOUT = "`data_format` must be 'NHWC' or 'NCHW', got "
DTYPE = "` must have a dtype out of float16, bfloat16, float32, float64, got "
POSITIVE = "must be positive and below 2**31, got "
FOUR = "must be 4 integers in the order of `data_format` 'NHWC', or the pair (H, W), got "
ONE = "must be 1 in the batch and the channels, got "
PADDING = "`padding` must be 'SAME', 'VALID', 'EXPLICIT', in capitals, or explicit pairs, got "
EIGHT = "`explicit_paddings` must be 8 integers when `padding` is 'EXPLICIT', got "
ZERO = "`explicit_paddings` must be 0 in the batch and the channels, got "
EMPTY = "`explicit_paddings` must be empty unless `padding` is 'EXPLICIT', got "
SIZES = "_sizes` must be 4 integers, got "
RANGE = "_sizes` must hold sizes from 0 to 2**31 - 1, got "
OVERHANG = "` must overhang the padded input by less than two strides, got a dilated size of "
ARRAY = "an array of shape "
LIMIT = "`.. must have less than 2**60 elements, got sizes "
LARGEST = 2**31 - 1

# Row i was tried on the gradient of the input as number i, on that of the filter as 41 + i and on
# the forward op as 82 + i.
ON_ALL = (
    row("baseline"),
    bad("strides_3", f"`strides` {FOUR}[1, 1, 1]", strides=[1, 1, 1]),
    bad("strides_5", f"`strides` {FOUR}[1, 1, 1, 1, 1]", strides=[1, 1, 1, 1, 1]),
    bad("strides_0", f"`strides` {FOUR}[]", strides=[]),
    row("strides_unequal", strides=[1, 1, 2, 1], output=(2, 5, 3, 6)),
    bad("stride_of_batch", f"`strides` {ONE}[2, 1, 1, 1]", strides=[2, 1, 1, 1]),
    bad("stride_of_channels", f"`strides` {ONE}[1, 1, 1, 2]", strides=[1, 1, 1, 2]),
    bad("stride_zero", f"`strides` {POSITIVE}(0, 0)", strides=[1, 0, 0, 1]),
    bad("stride_negative", f"`strides` {POSITIVE}(-1, -1)", strides=[1, -1, -1, 1]),
    row("stride_above_filter_same", strides=[1, 4, 4, 1], output=(2, 2, 2, 6)),
    row("stride_above_filter_valid", strides=[1, 4, 4, 1], padding="VALID", output=(2, 1, 1, 6)),
    bad("padding_unknown", PADDING + "'FOO'", padding="FOO"),
    bad("padding_lower", PADDING + "'same'", padding="same"),
    bad("explicit_no_pads", EIGHT + "[]", padding="EXPLICIT"),
    explicit("explicit_4", [1, 1, 1, 1], EIGHT + "[1, 1, 1, 1]"),
    explicit(
        "explicit_negative",
        [0, 0, -1, 1, 1, 1, 0, 0],
        "`explicit_paddings` must be non-negative and below 2**31, got ((-1, 1), (1, 1))",
        output=(2, 3, 6, 6),
    ),
    explicit(
        "explicit_of_batch", [1, 0, 1, 1, 1, 1, 0, 0], ZERO + "[(1, 0), (1, 1), (1, 1), (0, 0)]"
    ),
    explicit(
        "explicit_of_channels", [0, 0, 1, 1, 1, 1, 1, 0], ZERO + "[(0, 0), (1, 1), (1, 1), (1, 0)]"
    ),
    explicit("explicit", [0, 0, 1, 1, 1, 1, 0, 0]),
    explicit("explicit_above_filter", [0, 0, 4, 0, 0, 5, 0, 0], output=(2, 7, 9, 6)),
    bad(
        "explicit_with_same",
        EMPTY + "[0, 0, 1, 1, 1, 1, ...] with `padding` 'SAME'",
        explicit_paddings=[0, 0, 1, 1, 1, 1, 0, 0],
    ),
    row("nchw", data_format="NCHW", input=(2, 3, 5, 6), output=(2, 6, 5, 6)),
    bad("nhcw", LAYOUT + "'NHCW'", data_format="NHCW"),
    bad("nchw_vect_c", LAYOUT + "'NCHW_VECT_C'", data_format="NCHW_VECT_C"),
    # TensorFlow's CPU kernels ignore the dilations of both gradients; these are XLA's outcomes.
    row("dilated", dilations=[1, 2, 2, 1]),
    row("dilated_valid", dilations=[1, 2, 2, 1], padding="VALID", output=(2, 1, 2, 6)),
    output(
        *("dilated_valid_undilated_output", (2, 1, 2, 6), (2, 3, 4, 6)),
        dilations=[1, 2, 2, 1],
        padding="VALID",
    ),
    row("dilated_unequal", dilations=[1, 2, 1, 1]),
    row("dilated_strided", dilations=[1, 2, 2, 1], strides=[1, 2, 2, 1], output=(2, 3, 3, 6)),
    explicit("dilated_explicit", [0, 0, 2, 2, 2, 2, 0, 0], dilations=[1, 2, 2, 1]),
    bad("dilations_3", f"`dilations` {FOUR}[1, 1, 1]", dilations=[1, 1, 1]),
    bad("dilation_zero", f"`dilations` {POSITIVE}(0, 0)", dilations=[1, 0, 0, 1]),
    bad("dilation_negative", f"`dilations` {POSITIVE}(-1, -1)", dilations=[1, -1, -1, 1]),
    bad("dilation_of_batch", f"`dilations` {ONE}[2, 1, 1, 1]", dilations=[2, 1, 1, 1]),
    bad("dilation_of_channels", f"`dilations` {ONE}[1, 1, 1, 2]", dilations=[1, 1, 1, 2]),
    bad("int32", f"`..{DTYPE}int32", TypeError, dtype="int32"),
    bad("complex64", f"`..{DTYPE}complex64", TypeError, dtype="complex64"),
    bad("float8_e4m3fn", f"`..{DTYPE}float8_e4m3fn", TypeError, dtype="float8_e4m3fn"),
    row("float16", dtype="float16"),
    row("bfloat16", dtype="bfloat16"),
    row("float64", dtype="float64"),
)
NO_BATCH = row("no_batch", input=(0, 5, 6, 3), output=(0, 5, 6, 6))
NO_ROWS = row("no_rows", input=(2, 0, 6, 3), output=(2, 0, 6, 6))
NO_CHANNELS = row("no_channels", input=(2, 5, 6, 0), filter=(3, 3, 0, 2), output=(2, 5, 6, 0))
NO_MULTIPLIER = row("no_multiplier", filter=(3, 3, 3, 0), output=(2, 5, 6, 0))
NO_TAPS = row("no_taps", filter=(0, 3, 3, 2))
NO_TAPS_VALID = row("no_taps_valid", filter=(0, 3, 3, 2), output=(2, 6, 4, 6), padding="VALID")
NO_OUTPUT = row("no_output", filter=(6, 7, 3, 2), output=(2, 0, 0, 6), padding="VALID")
ONE_CHANNEL = row("one_channel", input=(2, 5, 6, 1), filter=(3, 3, 1, 4), output=(2, 5, 6, 4))
BIG_FILTER = row("big_filter", filter=(9, 11, 3, 2))
ROWS = [
    *numbered(0, "input_grad", *ON_ALL),
    *numbered(41, "filter_grad", *ON_ALL),
    # The forward op is given no output that could be undilated.
    *numbered(82, "forward", *(ON_ALL[25] if i == 26 else row for i, row in enumerate(ON_ALL))),
    *numbered(
        *(123, "input_grad"),
        mixed("filter", "out_backprop", "float64 float32"),
        row("sizes_int64", input=np.array([2, 5, 6, 3], np.int64)),
        row("sizes_float", input=np.array([2, 5, 6, 3], np.float32)),
        row("sizes_list", input=[2, 5, 6, 3]),
        bad("sizes_0d", f"`input{SIZES}{ARRAY}() ..", TypeError, input=np.array(2, np.int32)),
        bad(
            "sizes_2d", f"`input{SIZES}{ARRAY}(1, 4) ..", TypeError, input=np.array([[2, 5, 6, 3]])
        ),
        bad("sizes_3", f"`input{SIZES}(5, 6, 3)", input=(5, 6, 3)),
        bad("sizes_5", f"`input{SIZES}(2, 5, 6, 3, 1)", input=(2, 5, 6, 3, 1)),
        bad("sizes_2", f"`input{SIZES}(5, 6)", input=(5, 6)),
        bad("sizes_0", f"`input{SIZES}()", input=()),
        bad("sizes_-1_rows", f"`input{RANGE}(2, -1, 6, 3)", input=(2, -1, 6, 3)),
        bad("sizes_-1_batch", f"`input{RANGE}(-1, 5, 6, 3)", input=(-1, 5, 6, 3)),
        bad("sizes_-2", f"`input{RANGE}(2, -2, 6, 3)", input=(2, -2, 6, 3)),
        NO_BATCH,
        NO_ROWS,
        overhang("no_rows_valid", "filter", 3, 0, input=(2, 0, 6, 3), output=(2, 0, 4, 6)),
        NO_CHANNELS,
        NO_MULTIPLIER,
        NO_TAPS,
        NO_TAPS_VALID,
        overhang("big_filter_valid", "filter", 8, 5, filter=(8, 8, 3, 2), output=(2, 0, 0, 6)),
        NO_OUTPUT,
        row(
            "overhang_below_two_strides",
            filter=(9, 9, 3, 2),
            output=(2, 0, 0, 6),
            strides=[1, 3, 3, 1],
            padding="VALID",
        ),
        BIG_FILTER,
        span("filter", f"3 on an input of 1 + {LARGEST} + 1", input=(2, LARGEST, 6, 3)),
        span("filter", f"3 on an input of 1 + {LARGEST} + 1", input=(LARGEST, LARGEST, LARGEST, 3)),
        rank("filter", (3, 3, 6)),
        rank("filter", (3, 3, 3, 2, 1)),
        channels("filter", "input_sizes"),
        rank("output", (5, 6, 6)),
        rank("output", (2, 5, 6, 6, 1)),
        output("output_batch", (2, 5, 6, 6), (3, 5, 6, 6)),
        output("output_rows", (2, 5, 6, 6), (2, 4, 6, 6)),
        output("output_columns", (2, 5, 6, 6), (2, 5, 7, 6)),
        output("output_channels", (2, 5, 6, 6), (2, 5, 6, 5)),
        output("output_no_channels", (2, 5, 6, 6), (2, 5, 6, 0)),
        output("output_strided", (2, 3, 3, 6), (2, 2, 3, 6), strides=[1, 2, 2, 1]),
        row("strided_odd", strides=[1, 2, 2, 1], output=(2, 3, 3, 6)),
        row("strided_even", input=(2, 6, 6, 3), strides=[1, 2, 2, 1], output=(2, 3, 3, 6)),
        ONE_CHANNEL,
        bad("sizes_none", f"`input{SIZES}None", TypeError, input=None),
    ),
    *numbered(
        *(164, "filter_grad"),
        row("sizes_int64", filter=np.array([3, 3, 3, 2], np.int64)),
        row("sizes_float", filter=np.array([3, 3, 3, 2], np.float32)),
        bad("sizes_0d", f"`filter{SIZES}{ARRAY}() ..", TypeError, filter=np.array(3, np.int32)),
        bad(
            "sizes_2d",
            f"`filter{SIZES}{ARRAY}(1, 4) ..",
            TypeError,
            filter=np.array([[3, 3, 3, 2]]),
        ),
        bad("sizes_3", f"`filter{SIZES}(3, 3, 6)", filter=(3, 3, 6)),
        bad("sizes_5", f"`filter{SIZES}(3, 3, 3, 2, 1)", filter=(3, 3, 3, 2, 1)),
        bad("sizes_-1", f"`filter{RANGE}(3, -1, 3, 2)", filter=(3, -1, 3, 2)),
        NO_BATCH,
        NO_MULTIPLIER,
        NO_CHANNELS,
        NO_ROWS,
        NO_TAPS,
        NO_OUTPUT,
        overhang(
            "big_filter_valid", "filter_sizes", 8, 5, filter=(8, 8, 3, 2), output=(2, 0, 0, 6)
        ),
        channels("filter_sizes", "input"),
        rank("input", (5, 6, 3)),
        rank("output", (5, 6, 6)),
        output("output_batch", (2, 5, 6, 6), (3, 5, 6, 6)),
        output("output_rows", (2, 5, 6, 6), (2, 4, 6, 6)),
        output("output_columns", (2, 5, 6, 6), (2, 5, 7, 6)),
        output("output_channels", (2, 5, 6, 6), (2, 5, 6, 5)),
        span("filter_sizes", f"{LARGEST} on an input of ..", filter=(LARGEST, 3, 3, 2)),
    ),
    *numbered(
        *(186, "forward"),
        rank("input", (5, 6, 3)),
        rank("input", (2, 5, 6, 3, 1)),
        rank("filter", (3, 3, 6)),
        channels("filter", "input"),
        NO_BATCH,
        NO_ROWS,
        overhang("no_rows_valid", "filter", 3, 0, input=(2, 0, 6, 3)),
        NO_CHANNELS,
        NO_MULTIPLIER,
        NO_TAPS,
        NO_TAPS_VALID,
        overhang("big_filter_valid", "filter", 8, 5, filter=(8, 8, 3, 2)),
        NO_OUTPUT,
        BIG_FILTER,
        ONE_CHANNEL,
    ),
    # Given as tensors, which TensorFlow doesn't convert. Here sizes are never tensors.
    *numbered(
        *(201, "input_grad"),
        row("sizes_tensor_int64", input=jnp.array([2, 5, 6, 3], "int64")),
        row("sizes_tensor_float32", input=jnp.array([2, 5, 6, 3], "float32")),
        mixed("filter", "out_backprop", "float64 float32"),
        mixed("filter", "out_backprop", "float32 bfloat16"),
    ),
    *numbered(
        *(205, "filter_grad"),
        row("sizes_tensor_int64", filter=jnp.array([3, 3, 3, 2], "int64")),
        mixed("input", "out_backprop", "float64 float32"),
    ),
    *numbered(207, "forward", mixed("input", "filter", "float64 float32")),
    *numbered(
        *(208, "input_grad"),
        output(
            *("output_unstrided", (2, 2, 4, 6), (2, 3, 4, 6)), input=(2, 4, 6, 3), padding="VALID"
        ),
        row(
            "strided_unused_row",
            input=(2, 6, 6, 3),
            output=(2, 2, 2, 6),
            strides=[1, 2, 2, 1],
            padding="VALID",
        ),
        row("strided_exact", output=(2, 2, 2, 6), strides=[1, 2, 2, 1], padding="VALID"),
        row("inf_in_filter"),
        row("nan_in_filter"),
    ),
]
TABLE = {number: (op, row) for number, op, row in ROWS}
NON_FINITE = {211: np.inf, 212: np.nan}


def by_id(ids):
    return pytest.mark.parametrize(
        "number", [pytest.param(i, id=f"{i}-{TABLE[i][0]}-{TABLE[i][1].what}") for i in ids]
    )


def matches(text):
    """A regular expression for `text`, which may have ".." for anything."""
    return "(?s)^" + ".*".join(re.escape(part) for part in text.split("..")) + "$"


@contextlib.contextmanager
def refused(error, message, what):
    """Fails unless this is raised in it, in few words and before anything is compiled or run."""
    events = []

    def listen(event, *_, **__):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with mock.patch.object(_rules, "apply", side_effect=AssertionError("past the border")):
            yield
    except Exception as got:
        if type(got) is not error or not re.search(matches(message), str(got)):
            pytest.fail(f"{what}: got {got!r}, want {error.__name__}: {message}")
        assert len(str(got)) < 700, what
    else:
        pytest.fail(f"{what}: accepted")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in events if "backend_compile" in event], what


def test_table_is_complete():
    assert sorted(number for number, _, _ in ROWS) == list(range(213))


@by_id([i for i, (_, row) in TABLE.items() if row.error])
def test_refused(number):
    op, row = TABLE[number]
    dtypes = row.dtype.split()
    a, b = (
        jnp.ones(shape, dtype)
        for shape, dtype in zip(row.shapes(op), (dtypes[0], dtypes[-1]), strict=True)
    )
    with refused(row.error, row.message, row.what):
        row.call(op, a, b)


@by_id([i for i, (_, row) in TABLE.items() if not row.error and i not in NON_FINITE])
def test_accepted(number):
    op, row = TABLE[number]
    case = row.case()
    a, b = case.operands(op, row.dtype)
    arrays = [
        x if shape is row.filter else to_layout(x, row.data_format)
        for x, shape in zip((a, b), row.shapes(op), strict=True)
    ]
    got = row.call(op, *arrays)
    if op != "filter_grad":
        got = from_layout(got, row.data_format)
    # The reference, which TensorFlow's shapes check in turn.
    assert to_layout(np.empty(case.output), row.data_format).shape == row.output
    case.check(op, got, case.expected(op, a, b), row.dtype)


@by_id(NON_FINITE)
def test_not_finite(number):
    # Where a tap meets only zeros, of the padding or between strides, implementations differ.
    op, row = TABLE[number]
    case = row.case()
    f, dy = case.operands(op, row.dtype)
    f[0, 2, 1, 0] = NON_FINITE[number]
    got = np.asarray(row.call(op, f, dy))
    want = case.expected(op, f, dy)
    assert not np.isfinite(got[~np.isfinite(want)]).any()
    assert np.isnan(got[np.isnan(want)]).all()
    np.testing.assert_allclose(got[..., ::2], want[..., ::2], atol=case.tolerance(op, row.dtype))
    assert not np.isfinite(want[..., 1]).all()


class Two(enum.IntEnum):
    TWO = 2


class Index:
    def __index__(self):
        return 2


SHAPES = {"input": (2, 5, 6, 3), "filter": (3, 3, 3, 2), "out_backprop": (2, 5, 6, 6)}
# What each op takes of these, and whose shape instead.
TAKES = {
    "forward": ("input", "filter"),
    "input_grad": ("input_sizes", "filter", "out_backprop"),
    "filter_grad": ("input", "filter_sizes", "out_backprop"),
}
# Who takes each vector.
VECTORS = {
    "input_sizes": ("input_grad",),
    "filter_sizes": ("filter_grad",),
    "strides": OPS,
    "dilations": OPS,
    "explicit_paddings": OPS,
}
every_op = pytest.mark.parametrize("op", OPS)
every_array = pytest.mark.parametrize(
    "op, name", [(op, name) for op in OPS for name in TAKES[op] if name in SHAPES]
)


def ones(shape, dtype: Any = "float32"):
    return np.ones(shape, jnp.dtype(dtype))


def call(op, **changes):
    """`op` on ones of these shapes, with some arguments changed."""
    arguments = {
        name: ones(SHAPES[name]) if name in SHAPES else SHAPES[name.removesuffix("_sizes")]
        for name in TAKES[op]
    }
    return FUNCTIONS[op](**{**arguments, "strides": (1, 1), "padding": "SAME", **changes})


def refuses(error, message, op, **changes):
    with refused(error, message, f"{op}, {reprlib.repr(changes)}"):
        call(op, **changes)


def accepts(op, *changes):
    """All of these give the same."""
    want = call(op, **changes[0])
    for change in changes[1:]:
        np.testing.assert_array_equal(call(op, **change), want, reprlib.repr(change))


# ---- Vectors: strides, dilations, explicit_paddings and the sizes.

# Not 4 integers, nor 2, nor 8: what no vector argument takes.
NO_VECTORS = {
    "none": None,
    "string": "1111",
    "bytes": b"\1\1\1\1",
    "scalar": 1,
    "numpy_scalar": np.int32(1),
    "0d": np.array(1),
    "bools": [True, True],
    "numpy_bools": np.ones(2, bool),
    "complex": [1j, 1j],
    "nan": [float("nan"), 1],
    "inf": [1, float("inf")],
    "fraction": [2.5, 1],
    "strings": ["1", "1"],
    "ragged": [[1, 2], [3]],
    "nested": [[1, 1]],
    "with_none": [None, 1],
    "objects": np.array([None, 1], object),
    "set": {1, 2},
    "dict": {1: 1, 2: 2},
    "generator": (i for i in (1, 1)),
    "key": jax.random.key(0),
    "struct": jax.ShapeDtypeStruct((2,), np.int32),
    "matrix": np.ones((2, 2), int),
    "dates": np.zeros(2, "M8[s]"),
    "long": (1.5,) * 10**5,
    "long_array": np.full(10**5, 1.5),
    "long_nested": [[1.5] * 10**5],
}


@pytest.mark.parametrize("value", NO_VECTORS.values(), ids=NO_VECTORS)
def test_no_vector(value):
    for name, ops in VECTORS.items():
        for op in ops:
            refuses(TypeError, f"`{name}` must be .. integers.., got ..", op, **{name: value})


def test_vector_of_no_length():
    for name in ("strides", "dilations", "explicit_paddings"):
        for length in (1, 3, 5, 7, 9, 10**5):
            for value in ([1] * length, ones(length, int)):
                changes = {"padding": "EXPLICIT", name: value}
                got = reprlib.repr([1] * length)
                refuses(
                    ValueError, f"`{name}` must be .. integers.., got {got}", "forward", **changes
                )


def test_attributes_take_no_floats():
    for name in ("strides", "dilations", "explicit_paddings"):
        for value in ([1.0, 1.0], np.ones(2)):
            refuses(TypeError, f"`{name}` must be .., got [1.0, 1.0]", "forward", **{name: value})


@pytest.mark.parametrize("huge", [2**31, 2**63, 2**200, -(2**200)])
def test_huge_integers(huge):
    short = reprlib.repr(huge)
    refuses(ValueError, f"`strides` {POSITIVE}({short}, 1)", "forward", strides=(huge, 1))
    refuses(ValueError, f"`dilations` {POSITIVE}({short}, 1)", "forward", dilations=(huge, 1))
    pads = "`padding` must be non-negative and below 2**31, got "
    refuses(ValueError, f"{pads}(({short}, 0), (0, 0))", "forward", padding=((huge, 0), (0, 0)))
    sizes = (huge, 3, 3, 2)
    refuses(ValueError, f"`filter{RANGE}({short}, 3, 3, 2)", "filter_grad", filter_sizes=sizes)


def test_vectors_of_any_kind():
    twos = (
        [2, 2],
        np.array([2, 2], np.uint8),
        np.array([2, 2], object),
        jnp.array([2, 2]),
        [np.array(2), np.int64(2)],
        [jnp.array(2), Two.TWO],
        (Two.TWO, Index()),
        [1, 2, 2, 1],
    )
    accepts("forward", *({"strides": v, "dilations": v} for v in ((2, 2), *twos)))


# ---- Padding.

PAIRS = "a string, ((top, bottom), (left, right)) or 4 pairs in the order of `data_format`, got "
NO_PADDINGS = (
    *(
        (value, TypeError, PAIRS + reprlib.repr(value))
        for value in (
            *(None, 1, b"SAME", (), (1, 1, 1), ((1, 1),), ((1, 1),) * 3, [(1, 1)] * 10**5),
            *({(1, 1), (1, 2)}, frozenset({(1, 1), (1, 2)}), {0: (1, 1), 1: (1, 1)}, Two.TWO),
        )
    ),
    *(
        (value, TypeError, f"{PAIRS}an array of shape {value.shape} and dtype int64")
        for value in (ones((), int), ones(2, int), ones((3, 2), int), ones((2, 3), int))
    ),
    *(
        (value, TypeError, PAIRS + f"{value[0]!r} in {value!r}")
        for value in ((1, 1), (1, 1, 1, 1), (1, (1, 1)), ("SAME", "VALID"), (None, (1, 1)))
    ),
    (iter([(1, 1), (1, 1)]), TypeError, PAIRS + ".."),
    ({(1, 1): 0, (1, 2): 0}.keys(), TypeError, PAIRS + ".."),
    (jnp.array(1), TypeError, PAIRS + ".."),
    (jax.random.key(0), TypeError, PAIRS + ".."),
    (((1.0, 1), (1, 1)), TypeError, PAIRS + "[1.0, 1] in ((1.0, 1), (1, 1))"),
    (((True, 1), (1, 1)), TypeError, PAIRS + "[True, 1] in .."),
    (np.ones((2, 2)), TypeError, PAIRS + "[1.0, 1.0] in an array of shape (2, 2) .."),
    (((1, 1, 1),) * 2, ValueError, PAIRS + "((1, 1, 1), (1, 1, 1))"),
    (((1,), (1, 1)), ValueError, PAIRS + "((1,), (1, 1))"),
    ([[1] * 10**5] * 2, ValueError, PAIRS + "[[1, 1, 1, 1, 1, 1, ...], ..]"),
    (((-1, 1), (1, 1)), ValueError, "non-negative and below 2**31, got ((-1, 1), (1, 1))"),
    (
        ((0, 0), (1, 1), (1, 1), (0, 1)),
        ValueError,
        "0 in the batch and the channels, got [(0, 0), (1, 1), (1, 1), (0, 1)]",
    ),
    *(
        (value, ValueError, PADDING.removeprefix("`padding` must be ") + repr(value))
        for value in ("", " SAME", "CAUSAL", "SAME_LOWER", "Same")
    ),
)


@every_op
def test_padding_with_another_shape(op):
    for shape in (np.array([2, 2]), [2, 2], 2, None, "22"):
        padding = types.SimpleNamespace(shape=shape, dtype=np.dtype(int))
        refuses(TypeError, "`padding` must be " + PAIRS + "an array of ..", op, padding=padding)


@every_op
def test_nested_padding(op):
    itself, nested = [], 1
    itself += [itself, itself]
    for _ in range(8):
        nested = [nested] * 4
    for padding in (itself, nested):
        refuses(TypeError, "`padding` must be " + PAIRS + "..", op, padding=padding)


@every_op
def test_no_padding(op):
    for padding, error, message in NO_PADDINGS:
        refuses(error, "`padding` must be " + message, op, padding=padding)


def test_pairs_are_explicit():
    pairs = (
        ((0, 2), (1, 0)),
        [[0, 2], [1, 0]],
        np.array([[0, 2], [1, 0]]),
        jnp.array([[0, 2], [1, 0]]),
        (np.array([0, 2]), jnp.array([1, 0])),
        ((0, 0), (0, 2), (1, 0), (0, 0)),
        np.array([[0, 0], [0, 2], [1, 0], [0, 0]]),
    )
    explicit = {"padding": "EXPLICIT", "explicit_paddings": [0, 0, 0, 2, 1, 0, 0, 0]}
    accepts("forward", explicit, *({"padding": value} for value in pairs))


def test_explicit_paddings_with_another_padding():
    for padding in ("SAME", "VALID", ((1, 1), (1, 1)), ones((2, 2), int)):
        for pads in ([0], [0] * 8, (0,) * 10**5):
            message = f"{EMPTY}{reprlib.repr(list(pads))} with `padding` .."
            refuses(ValueError, message, "forward", padding=padding, explicit_paddings=pads)


# ---- The other attributes.

PRECISION = (
    "`precision` must be None, a `jax.lax.Precision`, one out of .., or a pair of these, got "
)
NO_FLAGS = {
    "data_format": (ValueError, LAYOUT, (None, [], "nhwc", "NCHWC", b"NHWC", 0, ("NHWC",))),
    "precision": (
        *(ValueError, PRECISION),
        (
            *("", "foo", "Highest", 0, True, (), ("highest",) * 3, ("highest",), (None, None)),
            *(("highest", None), int, {"high"}, np.dtype("float32"), [["high"]] * 10**5),
            jax.lax.DotAlgorithmPreset.F32_F32_F32,
        ),
    ),
    "implementation": (
        *(TypeError, "`implementation` must be None, a name or a sequence of names, got "),
        ([], (), 1, True, b"lax", {"lax"}, [["lax"]], ("lax", None), object, [1] * 10**5),
    ),
    "forward_mode": (
        *(TypeError, "`forward_mode` must be True or False, got "),
        (0, 1, None, "yes", [True], [True] * 10**5),
    ),
    "name": (
        *(TypeError, "`name` must be a string or None, got "),
        (0, b"name", ["name"], object, ["name"] * 10**5),
    ),
}


@pytest.mark.parametrize("name", NO_FLAGS)
def test_no_flag(name):
    error, message, values = NO_FLAGS[name]
    for op in OPS:
        for value in values:
            refuses(error, message + reprlib.repr(value), op, **{name: value})
        array = ones(10**5)
        refuses(error, f"{message}an array of shape (100000,) ..", op, **{name: array})


def test_flags_of_any_kind():
    for name, values in {
        "data_format": ("NHWC", np.str_("NHWC")),
        "precision": (
            *("highest", "float32", np.str_("highest"), ("highest", "float32"), ["high"] * 2),
            *(jax.lax.Precision.HIGH, (jax.lax.Precision.HIGH, "default"), None),
        ),
        "implementation": ("lax", ("lax", "lax"), ["xla_taps", "lax"], np.str_("lax"), None),
        "name": ("", "a/b", "%s\n", "é" * 1000, np.str_("name"), None),
    }.items():
        accepts("forward", {}, *({name: value} for value in values))


@every_op
def test_attributes_follow_the_layout(op):
    # As if the arrays alone had been transposed.
    refuses(ValueError, "`filter.. must have the C of ..[N, C, H, W]..", op, data_format="NCHW")
    nchw = row("", data_format="NCHW", input=(2, 3, 5, 6), output=(2, 6, 5, 6))
    for name in ("strides", "dilations"):
        changed = dataclasses.replace(nchw, attributes={**nchw.attributes, name: [1, 2, 2, 1]})
        with refused(ValueError, f"`{name}` {ONE}[1, 2, 2, 1]", name):
            changed.call(op, *map(ones, nchw.shapes(op)))


@every_op
def test_unknown_implementation(op):
    names = "native_cpu, xla_taps, fft, lax, pallas_tpu, pallas_gpu"
    message = f"`implementation` must be out of {names}, got "
    for value in ("foo", "", "LAX", " lax"):
        refuses(ValueError, message + repr(value), op, implementation=value)
        refuses(ValueError, message + repr(value), op, implementation=["lax", value])


def test_implementation_that_cannot_run_this():
    message = "`implementation` can't run input_grad: xla_taps: .. at most 16, got (8, 8)"
    changes = {"strides": (8, 8), "out_backprop": ones((2, 1, 1, 6))}
    refuses(NotImplementedError, message, "input_grad", implementation="xla_taps", **changes)
    accepts("input_grad", changes, {**changes, "implementation": ("xla_taps", "lax")})


# ---- Arrays.


@every_array
def test_no_array(op, name):
    for value in (
        *(None, "ones", {1.0}, {"input": 1.0}, (i for i in (1.0, 1.0)), jnp.ones, object, ...),
        [[1.0, 2.0], [3.0]],
    ):
        got = reprlib.repr(value)
        refuses(TypeError, f"`{name}` must be an array, got {got}: ..", op, **{name: value})
    # JAX's own message has all of the bytes.
    for value in (jax.ShapeDtypeStruct((2, 5, 6, 3), np.float32), b"\xff" * 10**5):
        refuses(TypeError, f"`{name}` must be an array, got ..", op, **{name: value})
    with pytest.raises(TypeError, match=f"^`{name}` must be an array, got "):
        call(op, **{name: jax.new_ref(jnp.ones(SHAPES[name]))})


@every_array
def test_no_dtype(op, name):
    # Also where the shape is wrong, and where the other array would give way to this one.
    weak = {other: jnp.full(SHAPES[other], 1.0) for other in TAKES[op] if other in SHAPES}
    for shape in (SHAPES[name], (), (2,)):
        for dtype in ("bool", "int4", "uint8", "int64", "float8_e5m2", "complex128"):
            value = ones(shape, dtype)
            for others in ({}, weak):
                refuses(TypeError, f"`{name}{DTYPE}{dtype}", op, **{**others, name: value})
    for value in (
        *(ones(SHAPES[name], dtype) for dtype in (object, np.longdouble, "S4", "M8[s]")),
        np.zeros(SHAPES[name], jax.dtypes.float0),
        np.zeros(SHAPES[name], [("x", "f4")]),
        np.zeros(SHAPES[name], [(f"x{i}", "f4") for i in range(100)]),
        jax.random.key(0),
        *(jnp.full(SHAPES[name], 1j), 1, 1j, [[True]]),
    ):
        refuses(TypeError, f"`{name}{DTYPE}..", op, **{**weak, name: value})
    refuses(TypeError, f"`{name}` must ..", op, **{name: [2**63, 2**200]})


@every_array
def test_no_4d_array(op, name):
    for shape in ((), (1,), (5, 6), (5, 6, 3), (1, 2, 5, 6, 3)):
        message = f"`{name}` must be 4-dimensional, got shape {shape}"
        refuses(ValueError, message, op, **{name: ones(shape)})


@every_array
def test_arrays_of_any_kind(op, name):
    array = np.random.default_rng(0).uniform(size=SHAPES[name]).astype(np.float32)
    strided = np.stack([array, -array], axis=-1)[..., 0]
    values = (array, strided, array[:, ::-1].copy()[:, ::-1], jnp.asarray(array), list(array))
    accepts(op, *({name: value} for value in values))


@every_array
def test_weak_types_give_way(op, name):
    strong = call(op)
    got = call(op, **{name: jnp.full(SHAPES[name], 1.0)})
    assert got.dtype == strong.dtype == jnp.float32 and not got.weak_type
    np.testing.assert_array_equal(got, strong)


def test_weak_types_alone():
    one = {name: jnp.full(SHAPES[name], 1.0) for name in ("input", "filter")}
    assert call("forward", **one).dtype == jnp.float64


def test_numpy_dtypes_are_not_converted():
    message = (
        "`input` and `filter` must share a dtype, got float64 for `input`, float32 for `filter`"
    )
    refuses(TypeError, message, "forward", input=np.ones((2, 5, 6, 3)))


def test_float64_without_x64():
    with jax.enable_x64(False):
        got = call("forward", input=np.ones((2, 5, 6, 3)))
    assert got.dtype == jnp.float32


def test_checked_before_anything_is_copied():
    # Of a shape that nothing else has, as making a JAX array of it would compile a program.
    arrays = {"input": ones((2, 5, 6, 31)), "filter": ones((3, 3, 31, 2))}
    refuses(ValueError, f"`strides` {FOUR}[1]", "forward", **arrays, strides=(1,))


# ---- Objects of the caller that fail when asked what they are.


PROTOCOLS = ("__array__", "__jax_array__", "__index__", "__iter__", "__len__", "dtype", "shape")


def unwilling(protocol, error):
    """An object that raises this when it is asked for one part of what NumPy and JAX look for."""

    def fail(self, *_, **__):
        raise error

    return type("Unwilling", (), {protocol: fail if "__" in protocol else property(fail)})()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unwilling_objects(protocol):
    for error in (RuntimeError("no"), KeyError("no"), AttributeError("no"), RecursionError()):
        value = unwilling(protocol, error)
        for each in (value, [value, value]):
            for op in OPS:
                for name in (name for name in TAKES[op] if name in SHAPES):
                    refuses(TypeError, f"`{name}` must ..", op, **{name: each})
            for name, ops in VECTORS.items():
                message = f"`{name}` must be .. integers.., got .."
                refuses(TypeError, message, ops[0], **{name: each})
        for each in (value, [value, value], [[value, value]] * 2):
            refuses(TypeError, f"`padding` must be {PAIRS}..", "forward", padding=each)
        for name, (kind, message, _) in NO_FLAGS.items():
            refuses(kind, message + "..", "forward", **{name: value})


def test_interrupts_are_not_errors():
    for protocol in ("__array__", "__jax_array__"):
        value = unwilling(protocol, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            call("forward", input=value)
    with pytest.raises(KeyboardInterrupt):
        call("forward", strides=unwilling("__array__", KeyboardInterrupt))


def test_deleted_arrays():
    def deleted(shape, dtype: Any = "float32"):
        array = jnp.ones(shape, dtype)
        array.delete()
        return array

    for op in OPS:
        for name in (name for name in TAKES[op] if name in SHAPES):
            message = f"`{name}` must have its data, got {ARRAY}.. that was deleted or donated"
            refuses(ValueError, message, op, **{name: deleted(SHAPES[name])})
    for name, ops in VECTORS.items():
        for value in (deleted(4, int), [deleted((), int)] * 4):
            refuses(TypeError, f"`{name}` must be ..", ops[0], **{name: value})
    refuses(TypeError, f"`padding` must be {PAIRS}..", "forward", padding=[deleted(2, int)] * 2)
    with pytest.raises(TypeError, match="^`padding` must be"):  # JAX compiles what takes it apart
        call("forward", padding=deleted((2, 2), int))


# ---- Under transformations.


def test_traced_attributes():
    def trace(op, name, value, rest):
        jax.eval_shape(lambda value: call(op, **{name: [value, *rest] if rest else value}), value)

    for name, shape in {
        "input_sizes": (2, 5, 6, 3),
        "filter_sizes": (3, 3, 3, 2),
        "strides": (1, 1),
        "dilations": (1, 1),
        "explicit_paddings": (0,) * 8,
        "padding": ((1, 1), (1, 1)),
    }.items():
        op = VECTORS.get(name, OPS)[0]
        message = f"`{name}` must be .., got ..; it must be static, known when the op is traced.."
        for value in (shape, list(shape), np.array(shape)):
            with refused(TypeError, message, f"{name}, {value}"):
                trace(op, name, value, ())
        for first in (shape[0], np.array(shape[0]), 2.0):
            with refused(TypeError, message, f"{name}, {first} and {shape[1:]}"):
                trace(op, name, first, shape[1:])


def test_traced_flags():
    for name, (error, message, _) in NO_FLAGS.items():
        with refused(error, message + "..", name):
            jax.eval_shape(lambda value, name=name: call("forward", **{name: value}), True)


def symbolic(shape, scope):
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), np.float32)


STATIC = "` must have static sizes, but for a batch, got shape "
SYMBOLIC = {
    "rows": ("forward", {"input": "n, h, 6, 3"}, f"`input{STATIC}(n, h, 6, 3)"),
    "filter_rows": ("forward", {"filter": "r, 3, 3, 2"}, f"`filter{STATIC}(r, 3, 3, 2)"),
    "multiplier": ("forward", {"filter": "3, 3, 3, m"}, f"`filter{STATIC}(3, 3, 3, m)"),
    "grad_rows": ("input_grad", {"out_backprop": "n, p, 6, 6"}, f"`out_backprop{STATIC}(n, p, ..)"),
    "two_batches": (
        *("filter_grad", {"input": "n, 5, 6, 3", "out_backprop": "m, 5, 6, 6"}),
        "`out_backprop` must have shape (n, 5, 6, 6), got (m, 5, 6, 6): ..",
    ),
    "batch_in_sizes": (
        *("input_grad", {"input_sizes": "n, 5, 6, 3", "out_backprop": "m, 5, 6, 6"}),
        "`input_sizes` must start with the batch size m, got n..",
    ),
    "rows_in_sizes": (
        *("input_grad", {"input_sizes": "n, h, 6, 3", "out_backprop": "n, 5, 6, 6"}),
        "`input_sizes` must be 4 integers, got ..h..",
    ),
    "filter_in_sizes": (
        *("filter_grad", {"filter_sizes": "r, 3, 3, 2"}),
        "`filter_sizes` must be 4 integers, got ..r..",
    ),
    "static_sizes": (
        *("input_grad", {"out_backprop": "n, 5, 6, 6"}),
        "`out_backprop` must have shape (2, 5, 6, 6), got (n, 5, 6, 6): ..",
    ),
}


@pytest.mark.parametrize("what", SYMBOLIC)
def test_symbolic_sizes(what):
    op, shapes, message = SYMBOLIC[what]
    scope = jax.export.SymbolicScope()
    structs = {name: symbolic(shape, scope) for name, shape in shapes.items()}

    def fun(arrays):
        sizes = {name: x.shape for name, x in arrays.items() if name.endswith("_sizes")}
        return call(op, **{**arrays, **sizes})

    error = NotImplementedError if STATIC in message else ValueError
    error = TypeError if "4 integers" in message else error
    with refused(error, message, what):
        jax.eval_shape(fun, structs)


@every_op
def test_debug_nans(op):
    nan = {name: np.full(SHAPES[name], np.nan, np.float32) for name in TAKES[op] if name in SHAPES}
    with jax.debug_nans(True):
        assert np.isfinite(call(op)).all()
        for run in (call, jax.jit(call, static_argnums=0)):
            with pytest.raises(FloatingPointError, match="nan"):
                run(op, **nan)


# ---- implementations().


def test_arguments_of_implementations():
    x, f = (jax.ShapeDtypeStruct(SHAPES[name], np.float32) for name in ("input", "filter"))
    forward = FUNCTIONS["forward"]
    platforms = "`platform` must be one of cpu, cuda, rocm, tpu, got "
    platform: Any
    for platform in ("", "CPU", "metal", "gpu", 0, 1, True, [], ["cpu"], ("cpu", "tpu"), b"cpu"):
        with refused(ValueError, platforms + repr(platform), platform):
            jax_dwbp.implementations(forward, x, f, (1, 1), "SAME", platform=platform)
    with refused(ValueError, platforms + "an array of shape (2,) ..", "array"):
        jax_dwbp.implementations(forward, platform=np.array(["cpu", "tpu"]))  # pyright: ignore
    for fun in (None, "forward", jnp.float32(1)):
        with refused(TypeError, "`fun` must be a function, got ..", fun):
            jax_dwbp.implementations(fun, 1.0)  # pyright: ignore
    assert jax_dwbp.implementations(jnp.sin, 1.0) == []


def test_implementations_passes_errors_on():
    x, f = (jax.ShapeDtypeStruct(SHAPES[name], np.float32) for name in ("input", "filter"))
    strings = jax.ShapeDtypeStruct(SHAPES["input"], np.int32)
    options: Any
    for error, message, arguments, options in (
        (ValueError, f"`strides` {FOUR}[1]", (x, f, (1,), "SAME"), {}),
        (TypeError, "`filter` must be an array, got None..", (x, None, (1, 1), "SAME"), {}),
        (TypeError, f"`input{DTYPE}int32", (strings, f, (1, 1), "SAME"), {}),
        (
            *(ValueError, "`implementation` must be out of .., got 'foo'"),
            *((x, f, (1, 1), "SAME"), {"implementation": "foo"}),
        ),
    ):
        with refused(error, message, message):
            jax_dwbp.implementations(FUNCTIONS["forward"], *arguments, **options)


def test_implementations_passes_dtypes_on():
    x, f = (jax.ShapeDtypeStruct(SHAPES[name], np.float32) for name in ("input", "filter"))

    def run(dtype, x, f):
        return FUNCTIONS["forward"](x.astype(dtype), f.astype(dtype), (1, 1), "SAME")

    for dtype in (np.float32, jnp.float32, np.dtype("float32"), "float32"):
        assert len(jax_dwbp.implementations(run, dtype, x, f)) == 1


# ---- The limits of the geometry.


def test_spans_beyond_int32():
    message = "`filter` and the padded input must each span less than 2**31, got a dilated size of "
    for got, changes in {
        "4294967295 on ..": {"dilations": (LARGEST, 1)},
        f"3 on ..{LARGEST} + 5 + 0": {"padding": ((LARGEST, 0),) * 2},
    }.items():
        refuses(ValueError, message + got, "forward", **changes)


def test_arrays_beyond_int64():
    # XLA aborts the process at arrays of 2**63 bytes.
    huge = LARGEST - 5
    for n, c in ((1, 1), (4, 0)):
        sizes = (n, huge, huge, c)
        operands = {"filter": ones((1, 1, c, 1)), "out_backprop": ones((n, 1, 1, c))}
        changes = {**operands, "input_sizes": sizes, "strides": (LARGEST, LARGEST)}
        refuses(ValueError, f"..`input_sizes{LIMIT}{sizes}", "input_grad", **changes)
    sizes = (2**30, 2**30, 1, 1)
    operands = {"input": ones((0, 5, 5, 1)), "out_backprop": ones((0, 5, 5, 1))}
    refuses(
        ValueError, f"`filter_sizes{LIMIT}{sizes}", "filter_grad", filter_sizes=sizes, **operands
    )
    shapes = {"input": (1, 2**20, 2**20, 1), "filter": (1, 1, 1, 2**20)}
    structs = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    with refused(ValueError, "the output must have less than 2**60 elements, got ..", "output"):
        jax.eval_shape(lambda arrays: call("forward", **arrays), structs)
    pads = ((2**30, 0), (2**30, 0))
    refuses(ValueError, f"..`input{LIMIT}(2, {2**30 + 5}, {2**30 + 6}, 3)", "forward", padding=pads)


@pytest.mark.parametrize("stride", [1, 3])
def test_overhang(stride):
    # C++ division truncates towards zero, so only here does the output's size become negative.
    least = 5 + 2 * stride
    message = f"`filter{OVERHANG}{least} with stride {stride} on an input of 0 + 5 + 0"
    changes = {"strides": (stride, 1), "padding": "VALID"}
    refuses(ValueError, message, "forward", filter=ones((least, 3, 3, 2)), **changes)
    assert call("forward", filter=ones((least - 1, 3, 3, 2)), **changes).shape == (2, 0, 4, 6)


# Attributes far beyond the arrays: as fast as others, and in no more memory.
@pytest.mark.parametrize(
    "case",
    [
        Case("one_row_50_columns", (1, 1, 70, 2), (1, 50, 2, 1)),
        Case("one_row_meets_x", (1, 1, 70, 2), (3, 63, 2, 1)),
        Case("one_row_per_phase", (1, 16, 70, 1), (5, 63, 1, 1), (4, 1)),
        Case("rows_1e4", (1, 5, 6, 1), (10**4, 1, 1, 1)),
        Case("columns_1e4", (1, 5, 6, 1), (1, 10**4, 1, 1)),
        Case("stride_1e9", (1, 5, 6, 2), (3, 3, 2, 1), (10**9, 10**9)),
        Case("dilation_1e8", (1, 5, 6, 2), (2, 2, 2, 1), (1, 1), "SAME", (10**8, 10**8)),
        Case("multiplier_8192", (1, 3, 3, 1), (2, 2, 1, 8192)),
        Case("far_apart", (1, 5, 5, 8), (3, 3, 8, 1), (2**20,) * 2, ((2**20, 0),) * 2),
        Case("pads_1e5", (1, 5, 6, 2), (3, 1, 2, 1), (1, 1), ((10**5,) * 2, (0, 0)), (10**5, 1)),
    ],
    ids=str,
)
def test_extreme_attributes(case):
    for op in OPS:
        a, b = case.operands(op)
        case.check(op, case.run(op, a, b), case.expected(op, a, b), "float32")


def test_filter_far_beyond_the_input():
    rows = 10**5
    got = call("filter_grad", filter_sizes=(rows, 1, 3, 2))
    assert got.shape == (rows, 1, 3, 2)
    middle = (rows - 1) // 2
    x, dy = ones((2, 5, 6, 3)), ones((2, 5, 6, 6))
    want = call("filter_grad", input=x, out_backprop=dy, filter_sizes=(9, 1, 3, 2))
    np.testing.assert_array_equal(got[middle - 4 : middle + 5], want)
    assert not got[: middle - 4].any() and not got[middle + 5 :].any()


# ---- conv_general_dilated: all that is wrong with a call, lax says.

PAIR_CHANGES = (
    ("ab", [[1, 2], [3]], {1, 2}, 1, np.array(1), (1,), (1, 1, 1), (-1, 1), (1.5, 1), (2**63, 1)),
    ([2, 1], np.array([2, 1]), (np.int8(2), 1), (Two.TWO, 1), (10**9, 10**9)),
    (jnp.array([1, 1]),),
)
LAX_CHANGES = {
    "window_strides": [value for values in PAIR_CHANGES for value in values],
    "rhs_dilation": [value for values in PAIR_CHANGES for value in values],
    "lhs_dilation": [(2, 1), "ab", 1, (1, 1), (1,), (1, 1, 1), "", np.ones(2), {1}],
    "padding": [
        *("same", "SAME_LOWER", "EXPLICIT", "", b"SAME", None, 1, (1, 1), ((1, 1),)),
        *(((1, 1),) * 3, ((1, 1, 1),) * 2, ((1.5, 1), (1, 1)), [[1, 2], [0, 1]]),
        *(((-1, 1), (1, 1)), ((-9, 0), (0, 0))),
    ],
    "feature_group_count": [
        *(0, -3, 1, 2, 6, "3", None, 3.5, (3,), np.int64(3), np.array(3), np.array([3])),
    ],
    "batch_group_count": [0, 2, "1", None, jnp.array(1)],
    "precision": [
        *("foo", 1, (), (None, None), "highest", ("high", "default"), "Highest", ("highest",)),
        np.dtype("float32"),
    ],
    "preferred_element_type": ["foo", 1, np.int32, np.float64],
    "dimension_numbers": [
        *(None, "NHWC", ("NHWC", "HWIO"), ("NHWC", "HWIO", "NHWD")),
        *(("NCHW", "OIHW", "NCHW"), ("NWHC", "WHIO", "NWHC")),
    ],
    "lhs": [
        *(ones(s) for s in ((0, 5, 6, 3), (2, 0, 6, 3), (2, 5, 6, 0))),
        *(ones(s) for s in ((5, 6, 3), (2, 5, 6, 3, 1), (2, 5, 6, 4))),
        *(ones((2, 5, 6, 3), dtype) for dtype in (int, complex, bool, np.float64)),
        *(None, jax.ShapeDtypeStruct((2, 5, 6, 3), np.float32), "a", 2.0),
        np.ones((2, 5, 6, 3)).tolist(),
    ],
    "rhs": [
        *(ones(s) for s in ((3, 3, 1, 3), (3, 3, 1, 4), (3, 3, 3, 6), (3, 3, 1, 0))),
        *(ones(s) for s in ((3, 3, 6), (9, 9, 1, 6), (0, 3, 1, 3))),
        np.ones((3, 3, 1, 6)).tolist(),
    ],
    "unknown": [1],
}


def same_as_lax(**changes):
    """A result, or an exception of the same type."""
    arguments = {
        "lhs": ones((2, 5, 6, 3)),
        "rhs": ones((3, 3, 1, 6)),
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": 3,
        **changes,
    }
    outcomes: list[Any] = []
    for function in (jax.lax.conv_general_dilated, jax_dwbp.conv_general_dilated):
        try:
            outcomes.append(function(**arguments))
        except Exception as error:
            outcomes.append(error)
    want, got = outcomes
    if isinstance(want, Exception) or isinstance(got, Exception):
        if type(got) is not type(want):
            pytest.fail(f"{reprlib.repr(changes)}: {got!r:.200} instead of {want!r:.200}")
        return
    assert (got.dtype, got.weak_type) == (want.dtype, want.weak_type)
    np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=reprlib.repr(changes))


@pytest.mark.parametrize("name", LAX_CHANGES)
def test_same_outcome_as_lax(name):
    for value in LAX_CHANGES[name]:
        same_as_lax(**{name: value})


def test_weak_types_as_in_lax():
    lhs, rhs = jnp.full((2, 5, 6, 3), 1.0), jnp.full((3, 3, 1, 6), 1.0)
    for changes in ({"lhs": lhs, "rhs": rhs}, {"lhs": lhs}, {"rhs": rhs}):
        same_as_lax(**changes)


def test_byte_order_and_masks():
    # Both pass through NumPy's buffer protocol as plain data, which they are not.
    for op in OPS:
        case = Case("swapped", (1, 5, 6, 2), (3, 3, 2, 1))
        operands = case.operands(op)
        want = case.run(op, *operands)
        swapped = [x.astype(x.dtype.newbyteorder()) for x in operands]
        np.testing.assert_array_equal(case.run(op, *swapped), want)
    with pytest.raises(TypeError, match="`filter` must be an array"):
        jax_dwbp.depthwise_conv2d_native(
            np.ones((1, 3, 3, 1), np.float32), np.ma.ones((1, 1, 1, 1)), (1, 1), "SAME"
        )


def test_caller_may_overwrite_numpy_operands():
    # Before the gradient needs them again. Whether JAX shares them or copies them, now or later,
    # depends on version, platform and alignment, so it is given copies.
    x, f = ones(SHAPES["input"]), ones(SHAPES["filter"])
    with mock.patch.object(jnp, "asarray", wraps=jnp.asarray) as asarray:
        y, gradient = jax.vjp(lambda f: call("forward", input=x, filter=f), f)
    given = [made.args[0] for made in asarray.call_args_list]
    assert given and not any(np.shares_memory(x, array) for array in given)
    want = call("filter_grad", out_backprop=y)
    x[:] = 0
    [got] = gradient(y)
    np.testing.assert_array_equal(got, want)
