"""Edge and bad inputs: what TensorFlow accepts has its values here, the rest is refused at the border.

Refused means ValueError, TypeError or NotImplementedError with the argument in backticks, the rule
and what was got, before anything is traced.
"""

import dataclasses
import enum
import re

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
    input: object = (2, 5, 6, 3)
    filter: object = (3, 3, 3, 2)
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


STRIDES = "`strides` must be 4 integers in the order of `data_format` 'NHWC', or the pair (H, W), got "
STRIDES_1 = "`strides` must be 1 in the batch and the channels, got "
DILATIONS = "`dilations` must be 4 integers in the order of `data_format` 'NHWC', or the pair (H, W), "
DILATIONS_1 = "`dilations` must be 1 in the batch and the channels, got "
POSITIVE = "must be positive and below 2**31, got "
PADDING = "`padding` must be 'SAME', 'VALID', 'EXPLICIT' or explicit pairs, got "
PADS = "`explicit_paddings` must be 8 integers, (before, after) for each dimension in the order of "
PADS += "`data_format`, when `padding` is 'EXPLICIT', got "
PADS_0 = "`explicit_paddings` must be 0 in the batch and the channels, got "
LAYOUT = "`data_format` must be 'NHWC' or 'NCHW', got "
DTYPE = "` must have a dtype out of float16, bfloat16, float32, float64, got "
OVERHANG = "` must not overhang the padded input by a stride or more, got a dilated size of "
SPAN = "` and the padded input must each span less than 2**31, got a dilated size of "
IMPLIED = ": implied by `input.. .., `filter.. .., `strides` .., `dilations` .., `padding` .. and .."

# Row i was tried on the gradient of the input as number i, on that of the filter as 41 + i and on
# the forward op as 82 + i.
ON_ALL = (
    row("baseline"),
    row("strides_3", ValueError, STRIDES + "[1, 1, 1]", strides=[1, 1, 1]),
    row("strides_5", ValueError, STRIDES + "[1, 1, 1, 1, 1]", strides=[1, 1, 1, 1, 1]),
    row("strides_none", ValueError, STRIDES + "[]", strides=[]),
    row("strides_unequal", strides=[1, 1, 2, 1], output=(2, 5, 3, 6)),
    row("stride_of_batch", ValueError, STRIDES_1 + "[2, 1, 1, 1]", strides=[2, 1, 1, 1]),
    row("stride_of_channels", ValueError, STRIDES_1 + "[1, 1, 1, 2]", strides=[1, 1, 1, 2]),
    row("stride_0", ValueError, "`strides` " + POSITIVE + "(0, 0)", strides=[1, 0, 0, 1]),
    row("stride_negative", ValueError, "`strides` " + POSITIVE + "(-1, -1)", strides=[1, -1, -1, 1]),
    row("stride_above_filter_same", strides=[1, 4, 4, 1], output=(2, 2, 2, 6)),
    row("stride_above_filter_valid", strides=[1, 4, 4, 1], padding="VALID", output=(2, 1, 1, 6)),
    row("padding_unknown", ValueError, PADDING + "'FOO'", padding="FOO"),
    row("padding_lower", ValueError, PADDING + "'same'; did you mean 'SAME'?", padding="same"),
    row("explicit_no_pads", ValueError, PADS + "()", padding="EXPLICIT"),
    row(
        "explicit_4_pads",
        ValueError,
        PADS + "(1, 1, 1, 1)",
        padding="EXPLICIT",
        explicit_paddings=[1, 1, 1, 1],
    ),
    row(
        "explicit_negative",
        ValueError,
        "`explicit_paddings` must be non-negative and below 2**31, got ((-1, 1), (1, 1))",
        padding="EXPLICIT",
        explicit_paddings=[0, 0, -1, 1, 1, 1, 0, 0],
        output=(2, 3, 6, 6),
    ),
    row(
        "explicit_of_batch",
        ValueError,
        PADS_0 + "[(1, 0), (1, 1), (1, 1), (0, 0)]",
        padding="EXPLICIT",
        explicit_paddings=[1, 0, 1, 1, 1, 1, 0, 0],
    ),
    row(
        "explicit_of_channels",
        ValueError,
        PADS_0 + "[(0, 0), (1, 1), (1, 1), (1, 0)]",
        padding="EXPLICIT",
        explicit_paddings=[0, 0, 1, 1, 1, 1, 1, 0],
    ),
    row("explicit", padding="EXPLICIT", explicit_paddings=[0, 0, 1, 1, 1, 1, 0, 0]),
    row(
        "explicit_pads_above_filter",
        padding="EXPLICIT",
        explicit_paddings=[0, 0, 4, 0, 0, 5, 0, 0],
        output=(2, 7, 9, 6),
    ),
    row(
        "explicit_with_same",
        ValueError,
        "`explicit_paddings` must be empty unless `padding` is 'EXPLICIT', got "
        "(0, 0, 1, 1, 1, 1, 0, 0) with `padding` 'SAME'",
        explicit_paddings=[0, 0, 1, 1, 1, 1, 0, 0],
    ),
    row("nchw", data_format="NCHW", input=(2, 3, 5, 6), output=(2, 6, 5, 6)),
    row("nhcw", ValueError, LAYOUT + "'NHCW'", data_format="NHCW"),
    row("nchw_vect_c", ValueError, LAYOUT + "'NCHW_VECT_C'", data_format="NCHW_VECT_C"),
    # TensorFlow's CPU kernels ignore the dilations of both gradients; these are XLA's outcomes.
    row("dilated", dilations=[1, 2, 2, 1]),
    row("dilated_valid", dilations=[1, 2, 2, 1], padding="VALID", output=(2, 1, 2, 6)),
    row(
        "dilated_valid_undilated_output",
        ValueError,
        "`out_backprop` must have shape (2, 1, 2, 6), got (2, 3, 4, 6)" + IMPLIED,
        dilations=[1, 2, 2, 1],
        padding="VALID",
        output=(2, 3, 4, 6),
    ),
    row("dilated_unequal", dilations=[1, 2, 1, 1]),
    row("dilated_strided", dilations=[1, 2, 2, 1], strides=[1, 2, 2, 1], output=(2, 3, 3, 6)),
    row(
        "dilated_explicit",
        dilations=[1, 2, 2, 1],
        padding="EXPLICIT",
        explicit_paddings=[0, 0, 2, 2, 2, 2, 0, 0],
    ),
    row("dilations_3", ValueError, DILATIONS + "got [1, 1, 1]", dilations=[1, 1, 1]),
    row("dilation_0", ValueError, "`dilations` " + POSITIVE + "(0, 0)", dilations=[1, 0, 0, 1]),
    row(
        "dilation_negative",
        ValueError,
        "`dilations` " + POSITIVE + "(-1, -1)",
        dilations=[1, -1, -1, 1],
    ),
    row("dilation_of_batch", ValueError, DILATIONS_1 + "[2, 1, 1, 1]", dilations=[2, 1, 1, 1]),
    row("dilation_of_channels", ValueError, DILATIONS_1 + "[1, 1, 1, 2]", dilations=[1, 1, 1, 2]),
    row("int32", TypeError, "`.." + DTYPE + "int32", dtype="int32"),
    row("complex64", TypeError, "`.." + DTYPE + "complex64", dtype="complex64"),
    row("float8_e4m3fn", TypeError, "`.." + DTYPE + "float8_e4m3fn", dtype="float8_e4m3fn"),
    row("float16", dtype="float16"),
    row("bfloat16", dtype="bfloat16"),
    row("float64", dtype="float64"),
)
# Where an op that takes no out_backprop has nothing to object to.
FORWARD_ONLY = {
    108: row("dilated_valid", dilations=[1, 2, 2, 1], padding="VALID", output=(2, 1, 2, 6))
}

SIZES = "`input_sizes` must be 4 integers, got "
RANGE = "_sizes` must hold sizes from 0 to 2**31 - 1, got "
SHARE = "must share a dtype, got "
CHANNELS = "[R, S, C, M] must have the C of `input"
VALID = {"padding": "VALID"}
OUTPUT = "`out_backprop` must have shape (2, 5, 6, 6), got "


def rows(op, first, *rows):
    return {first + i: (op, row) for i, row in enumerate(rows)}


TABLE = {
    **{i: ("input_grad", row) for i, row in enumerate(ON_ALL)},
    **{41 + i: ("filter_grad", row) for i, row in enumerate(ON_ALL)},
    **{82 + i: ("forward", FORWARD_ONLY.get(82 + i, row)) for i, row in enumerate(ON_ALL)},
    **rows(
        "input_grad",
        123,
        # TensorFlow converts NumPy arrays, to the first one's dtype and in eager mode only.
        row(
            "mixed_numpy",
            TypeError,
            "`filter` and `out_backprop` " + SHARE + "float64 for `filter`, float32 for `out_backprop`",
            dtype="float64 float32",
        ),
        row("sizes_int64", input=np.array([2, 5, 6, 3], np.int64)),
        row("sizes_float", input=np.array([2, 5, 6, 3], np.float32)),
        row("sizes_list", input=[2, 5, 6, 3]),
        row("sizes_scalar", TypeError, SIZES + "array(2, dtype=int32)", input=np.array(2, np.int32)),
        row(
            "sizes_2d",
            TypeError,
            SIZES + "array([[2, 5, 6, 3]], dtype=int32)",
            input=np.array([[2, 5, 6, 3]], np.int32),
        ),
        row("sizes_3", ValueError, SIZES + "(5, 6, 3)", input=(5, 6, 3)),
        row("sizes_5", ValueError, SIZES + "(2, 5, 6, 3, 1)", input=(2, 5, 6, 3, 1)),
        row("sizes_2", ValueError, SIZES + "(5, 6)", input=(5, 6)),
        row("sizes_none", ValueError, SIZES + "()", input=()),
        row("sizes_-1_rows", ValueError, "`input" + RANGE + "(2, -1, 6, 3)", input=(2, -1, 6, 3)),
        row("sizes_-1_batch", ValueError, "`input" + RANGE + "(-1, 5, 6, 3)", input=(-1, 5, 6, 3)),
        row("sizes_-2", ValueError, "`input" + RANGE + "(2, -2, 6, 3)", input=(2, -2, 6, 3)),
        row("no_batch", input=(0, 5, 6, 3), output=(0, 5, 6, 6)),
        row("no_rows", input=(2, 0, 6, 3), output=(2, 0, 6, 6)),
        row(
            "no_rows_valid",
            ValueError,
            "`filter" + OVERHANG + "3 with stride 1 on an input of 0 + 0 + 0",
            input=(2, 0, 6, 3),
            output=(2, 0, 4, 6),
            **VALID,
        ),
        row("no_channels", input=(2, 5, 6, 0), filter=(3, 3, 0, 2), output=(2, 5, 6, 0)),
        row("no_multiplier", filter=(3, 3, 3, 0), output=(2, 5, 6, 0)),
        row("no_filter_rows", filter=(0, 3, 3, 2)),
        row("no_filter_rows_valid", filter=(0, 3, 3, 2), output=(2, 6, 4, 6), **VALID),
        row(
            "filter_above_input_valid",
            ValueError,
            "`filter" + OVERHANG + "8 with stride 1 on an input of 0 + 5 + 0",
            filter=(8, 8, 3, 2),
            output=(2, 0, 0, 6),
            **VALID,
        ),
        row("no_output", filter=(6, 7, 3, 2), output=(2, 0, 0, 6), **VALID),
        row(
            "overhang_below_stride",
            filter=(9, 9, 3, 2),
            output=(2, 0, 0, 6),
            strides=[1, 3, 3, 1],
            **VALID,
        ),
        row("filter_above_input_same", filter=(9, 11, 3, 2)),
        row(
            "huge_sizes",
            ValueError,
            "`filter" + SPAN + "3 on an input of 1 + 2147483647 + 1",
            input=(2, 2**31 - 1, 6, 3),
        ),
        row(
            "huge_product",
            ValueError,
            "`filter" + SPAN + "3 on an input of 1 + 2147483647 + 1",
            input=(2**31 - 1, 2**31 - 1, 2**31 - 1, 3),
        ),
        row(
            "filter_3d",
            ValueError,
            "`filter` must be 4-dimensional, got shape (3, 3, 6)",
            filter=(3, 3, 6),
        ),
        row(
            "filter_5d",
            ValueError,
            "`filter` must be 4-dimensional, got shape (3, 3, 3, 2, 1)",
            filter=(3, 3, 3, 2, 1),
        ),
        row(
            "filter_channels",
            ValueError,
            "`filter` " + CHANNELS + "_sizes` [N, H, W, C], got (3, 3, 4, 2) and (2, 5, 6, 3)",
            filter=(3, 3, 4, 2),
        ),
        row(
            "output_3d",
            ValueError,
            "`out_backprop` must be 4-dimensional, got shape (5, 6, 6)",
            output=(5, 6, 6),
        ),
        row(
            "output_5d",
            ValueError,
            "`out_backprop` must be 4-dimensional, got shape (2, 5, 6, 6, 1)",
            output=(2, 5, 6, 6, 1),
        ),
        row("output_batch", ValueError, OUTPUT + "(3, 5, 6, 6)" + IMPLIED, output=(3, 5, 6, 6)),
        row("output_rows", ValueError, OUTPUT + "(2, 4, 6, 6)" + IMPLIED, output=(2, 4, 6, 6)),
        row("output_columns", ValueError, OUTPUT + "(2, 5, 7, 6)" + IMPLIED, output=(2, 5, 7, 6)),
        row("output_channels", ValueError, OUTPUT + "(2, 5, 6, 5)" + IMPLIED, output=(2, 5, 6, 5)),
        row("output_no_channels", ValueError, OUTPUT + "(2, 5, 6, 0)" + IMPLIED, output=(2, 5, 6, 0)),
        row(
            "output_strided",
            ValueError,
            "`out_backprop` must have shape (2, 3, 3, 6), got (2, 2, 3, 6)" + IMPLIED,
            output=(2, 2, 3, 6),
            strides=[1, 2, 2, 1],
        ),
        row("strided_odd", strides=[1, 2, 2, 1], output=(2, 3, 3, 6)),
        row("strided_even", input=(2, 6, 6, 3), strides=[1, 2, 2, 1], output=(2, 3, 3, 6)),
        row("one_channel", input=(2, 5, 6, 1), filter=(3, 3, 1, 4), output=(2, 5, 6, 4)),
        row("sizes_is_none", TypeError, SIZES + "None", input=None),
    ),
    **rows(
        "filter_grad",
        164,
        row("sizes_int64", filter=np.array([3, 3, 3, 2], np.int64)),
        row("sizes_float", filter=np.array([3, 3, 3, 2], np.float32)),
        row(
            "sizes_scalar",
            TypeError,
            "`filter_sizes` must be 4 integers, got array(3, dtype=int32)",
            filter=np.array(3, np.int32),
        ),
        row(
            "sizes_2d",
            TypeError,
            "`filter_sizes` must be 4 integers, got array([[3, 3, 3, 2]], dtype=int32)",
            filter=np.array([[3, 3, 3, 2]], np.int32),
        ),
        row(
            "sizes_3",
            ValueError,
            "`filter_sizes` must be 4 integers, got (3, 3, 6)",
            filter=(3, 3, 6),
        ),
        row(
            "sizes_5",
            ValueError,
            "`filter_sizes` must be 4 integers, got (3, 3, 3, 2, 1)",
            filter=(3, 3, 3, 2, 1),
        ),
        row("sizes_-1", ValueError, "`filter" + RANGE + "(3, -1, 3, 2)", filter=(3, -1, 3, 2)),
        row("no_batch", input=(0, 5, 6, 3), output=(0, 5, 6, 6)),
        row("no_multiplier", filter=(3, 3, 3, 0), output=(2, 5, 6, 0)),
        row("no_channels", input=(2, 5, 6, 0), filter=(3, 3, 0, 2), output=(2, 5, 6, 0)),
        row("no_rows", input=(2, 0, 6, 3), output=(2, 0, 6, 6)),
        row("no_filter_rows", filter=(0, 3, 3, 2)),
        row("no_output", filter=(6, 7, 3, 2), output=(2, 0, 0, 6), **VALID),
        row(
            "filter_above_input_valid",
            ValueError,
            "`filter_sizes" + OVERHANG + "8 with stride 1 on an input of 0 + 5 + 0",
            filter=(8, 8, 3, 2),
            output=(2, 0, 0, 6),
            **VALID,
        ),
        row(
            "sizes_channels",
            ValueError,
            "`filter_sizes` " + CHANNELS + "` [N, H, W, C], got (3, 3, 4, 2) and (2, 5, 6, 3)",
            filter=(3, 3, 4, 2),
        ),
        row(
            "input_3d",
            ValueError,
            "`input` must be 4-dimensional, got shape (5, 6, 3)",
            input=(5, 6, 3),
        ),
        row(
            "output_3d",
            ValueError,
            "`out_backprop` must be 4-dimensional, got shape (5, 6, 6)",
            output=(5, 6, 6),
        ),
        row("output_batch", ValueError, OUTPUT + "(3, 5, 6, 6)" + IMPLIED, output=(3, 5, 6, 6)),
        row("output_rows", ValueError, OUTPUT + "(2, 4, 6, 6)" + IMPLIED, output=(2, 4, 6, 6)),
        row("output_columns", ValueError, OUTPUT + "(2, 5, 7, 6)" + IMPLIED, output=(2, 5, 7, 6)),
        row("output_channels", ValueError, OUTPUT + "(2, 5, 6, 5)" + IMPLIED, output=(2, 5, 6, 5)),
        row(
            "huge_sizes",
            ValueError,
            "`filter_sizes" + SPAN + "2147483647 on an input of 1073741823 + 5 + 1073741823",
            filter=(2**31 - 1, 3, 3, 2),
        ),
    ),
    **rows(
        "forward",
        186,
        row(
            "input_3d",
            ValueError,
            "`input` must be 4-dimensional, got shape (5, 6, 3)",
            input=(5, 6, 3),
        ),
        row(
            "input_5d",
            ValueError,
            "`input` must be 4-dimensional, got shape (2, 5, 6, 3, 1)",
            input=(2, 5, 6, 3, 1),
        ),
        row(
            "filter_3d",
            ValueError,
            "`filter` must be 4-dimensional, got shape (3, 3, 6)",
            filter=(3, 3, 6),
        ),
        row(
            "filter_channels",
            ValueError,
            "`filter` " + CHANNELS + "` [N, H, W, C], got (3, 3, 4, 2) and (2, 5, 6, 3)",
            filter=(3, 3, 4, 2),
        ),
        row("no_batch", input=(0, 5, 6, 3), output=(0, 5, 6, 6)),
        row("no_rows", input=(2, 0, 6, 3), output=(2, 0, 6, 6)),
        row(
            "no_rows_valid",
            ValueError,
            "`filter" + OVERHANG + "3 with stride 1 on an input of 0 + 0 + 0",
            input=(2, 0, 6, 3),
            **VALID,
        ),
        row("no_channels", input=(2, 5, 6, 0), filter=(3, 3, 0, 2), output=(2, 5, 6, 0)),
        row("no_multiplier", filter=(3, 3, 3, 0), output=(2, 5, 6, 0)),
        row("no_filter_rows", filter=(0, 3, 3, 2)),
        row("no_filter_rows_valid", filter=(0, 3, 3, 2), output=(2, 6, 4, 6), **VALID),
        row(
            "filter_above_input_valid",
            ValueError,
            "`filter" + OVERHANG + "8 with stride 1 on an input of 0 + 5 + 0",
            filter=(8, 8, 3, 2),
            **VALID,
        ),
        row("no_output", filter=(6, 7, 3, 2), output=(2, 0, 0, 6), **VALID),
        row("filter_above_input_same", filter=(9, 11, 3, 2)),
        row("one_channel", input=(2, 5, 6, 1), filter=(3, 3, 1, 4), output=(2, 5, 6, 4)),
    ),
    # Tensors, which TensorFlow never converts. Vectors of sizes are not tensors here, arrays are.
    **rows(
        "input_grad",
        201,
        row("sizes_tensor_int64", input=jnp.array([2, 5, 6, 3], "int64")),
        row("sizes_tensor_float32", input=jnp.array([2, 5, 6, 3], "float32")),
        row(
            "mixed_float64_float32",
            TypeError,
            "`filter` and `out_backprop` " + SHARE + "float64 for `filter`, float32 for `out_backprop`",
            dtype="float64 float32",
        ),
        row(
            "mixed_float32_bfloat16",
            TypeError,
            "`filter` and `out_backprop` " + SHARE + "float32 for `filter`, bfloat16 for `out_backprop`",
            dtype="float32 bfloat16",
        ),
    ),
    **rows(
        "filter_grad",
        205,
        row("sizes_tensor_int64", filter=jnp.array([3, 3, 3, 2], "int64")),
        row(
            "mixed_float64_float32",
            TypeError,
            "`input` and `out_backprop` " + SHARE + "float64 for `input`, float32 for `out_backprop`",
            dtype="float64 float32",
        ),
    ),
    **rows(
        "forward",
        207,
        row(
            "mixed_float64_float32",
            TypeError,
            "`input` and `filter` " + SHARE + "float64 for `input`, float32 for `filter`",
            dtype="float64 float32",
        ),
    ),
    **rows(
        "input_grad",
        208,
        row(
            "output_above_input",
            ValueError,
            "`out_backprop` must have shape (2, 2, 4, 6), got (2, 3, 4, 6)" + IMPLIED,
            input=(2, 4, 6, 3),
            output=(2, 3, 4, 6),
            **VALID,
        ),
        row(
            "strided_unused_row",
            input=(2, 6, 6, 3),
            output=(2, 2, 2, 6),
            strides=[1, 2, 2, 1],
            **VALID,
        ),
        row("strided_exact", output=(2, 2, 2, 6), strides=[1, 2, 2, 1], **VALID),
        row("inf_in_filter"),
        row("nan_in_filter"),
    ),
}
NON_FINITE = {211: np.inf, 212: np.nan}


def by_id(ids):
    return pytest.mark.parametrize(
        "number", [pytest.param(i, id=f"{i}-{TABLE[i][0]}-{TABLE[i][1].what}") for i in ids]
    )


def matches(text):
    """A regular expression for `text`, which may have ".." for anything."""
    return "^" + ".*".join(re.escape(part) for part in text.split("..")) + "$"


@pytest.fixture
def untraced(monkeypatch):
    """Fails the test if anything is traced or compiled in it."""
    events = []

    def listen(event, *_, **__):
        events.append(event)

    def apply(*_, **__):
        pytest.fail("bad input went past the border")

    monkeypatch.setattr(_rules, "apply", apply)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in events if "compile" in event]


def test_table_is_complete():
    assert sorted(TABLE) == list(range(213))


@by_id([i for i, (_, row) in TABLE.items() if row.error])
def test_refused(number, request):
    op, row = TABLE[number]
    dtypes = row.dtype.split()
    a, b = (
        jnp.ones(shape, dtype)
        for shape, dtype in zip(row.shapes(op), (dtypes[0], dtypes[-1]), strict=True)
    )
    request.getfixturevalue("untraced")
    with pytest.raises(row.error, match=matches(row.message)) as raised:
        row.call(op, a, b)
    assert raised.type is row.error


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


def call(op, **changes):
    """`op` on ones of the shapes of the table, with some arguments changed."""
    ones = {"input": (2, 5, 6, 3), "filter": (3, 3, 3, 2), "out_backprop": (2, 5, 6, 6)}
    arrays = {"forward": 2, "input_grad": 3, "filter_grad": 3}[op]
    arguments = {name: np.ones(shape, np.float32) for name, shape in list(ones.items())[:arrays]}
    for op_of_sizes, name in (("input_grad", "input"), ("filter_grad", "filter")):
        if op == op_of_sizes:
            arguments[name + "_sizes"] = arguments.pop(name).shape
    return FUNCTIONS[op](**{**arguments, "strides": (1, 1), "padding": "SAME", **changes})


def refuses(error, message, op, **changes):
    with pytest.raises(error, match=matches(message)) as raised:
        call(op, **changes)
    assert raised.type is error


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
}
VECTORS = [
    *((name, op) for name in ("strides", "dilations", "explicit_paddings") for op in OPS),
    ("input_sizes", "input_grad"),
    ("filter_sizes", "filter_grad"),
]


@pytest.mark.parametrize("value", NO_VECTORS.values(), ids=NO_VECTORS)
@pytest.mark.parametrize("name, op", VECTORS)
def test_no_vector(name, op, value, untraced):
    refuses(TypeError, f"`{name}` must be .. integers.., got ..", op, **{name: value})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["strides", "dilations", "explicit_paddings"])
def test_attributes_take_no_floats(name, op, untraced):
    refuses(TypeError, f"`{name}` must be .., got [1.0, 1.0]", op, **{name: [1.0, 1.0]})
    refuses(TypeError, f"`{name}` must be .., got [1.0, 1.0]", op, **{name: np.ones(2)})


@pytest.mark.parametrize("huge", [2**31, 2**63, 2**200, -(2**200)])
def test_huge_integers(huge, untraced):
    refuses(ValueError, f"`strides` {POSITIVE}({huge}, 1)", "forward", strides=(huge, 1))
    refuses(ValueError, f"`dilations` {POSITIVE}({huge}, 1)", "forward", dilations=(huge, 1))
    pads = "`padding` must be non-negative and below 2**31, got "
    refuses(ValueError, f"{pads}(({huge}, 0), (0, 0))", "forward", padding=((huge, 0), (0, 0)))
    sizes = (huge, 3, 3, 2)
    refuses(ValueError, f"`filter{RANGE}{sizes}", "filter_grad", filter_sizes=sizes)


def test_spans_beyond_int32(untraced):
    largest = 2**31 - 1
    message = f"`filter{SPAN}"
    refuses(ValueError, message + "4294967295 on ..", "forward", dilations=(largest, 1))
    refuses(ValueError, message + f"3 on ..{largest} + 5 + 0", "forward", padding=((largest, 0),) * 2)


@pytest.mark.parametrize(
    "twos",
    [
        [2, 2],
        np.array([2, 2], np.uint8),
        np.array([2, 2], object),
        jnp.array([2, 2]),
        [np.array(2), np.int64(2)],
        [jnp.array(2), Two.TWO],
        [Index(), 2],
        (Two.TWO, Index()),
        [1, 2, 2, 1],
    ],
    ids=str,
)
def test_vectors_of_any_kind(twos):
    got = call("forward", strides=twos, dilations=twos)
    np.testing.assert_array_equal(got, call("forward", strides=(2, 2), dilations=(2, 2)))


PAIRS = "a string, ((top, bottom), (left, right)) or 4 pairs in the order of `data_format`, got "


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "padding, error, message",
    [
        (None, TypeError, PAIRS + "None"),
        (1, TypeError, PAIRS + "1"),
        (b"SAME", TypeError, PAIRS + "b'SAME'"),
        ({(1, 1), (1, 2)}, TypeError, PAIRS + ".."),
        ({0: (1, 1), 1: (1, 1)}, TypeError, PAIRS + ".."),
        (iter([(1, 1), (1, 1)]), TypeError, PAIRS + ".."),
        (((1.0, 1), (1, 1)), TypeError, PAIRS + ".."),
        (((True, 1), (1, 1)), TypeError, PAIRS + ".."),
        ((), ValueError, PAIRS + "()"),
        (((1, 1),), ValueError, PAIRS + "((1, 1),)"),
        (((1, 1),) * 3, ValueError, PAIRS + "((1, 1), (1, 1), (1, 1))"),
        (((1, 1, 1),) * 2, ValueError, PAIRS + "((1, 1, 1), (1, 1, 1))"),
        (((1,), (1, 1)), ValueError, PAIRS + "((1,), (1, 1))"),
        (((-1, 1), (1, 1)), ValueError, "non-negative and below 2**31, got ((-1, 1), (1, 1))"),
        (
            ((0, 0), (1, 1), (1, 1), (0, 1)),
            ValueError,
            "0 in the batch and the channels, got [(0, 0), (1, 1), (1, 1), (0, 1)]",
        ),
        ("", ValueError, "'SAME', 'VALID', 'EXPLICIT' or explicit pairs, got ''"),
        (" SAME", ValueError, "'SAME', 'VALID', 'EXPLICIT' or explicit pairs, got ' SAME'"),
        ("CAUSAL", ValueError, "'SAME', 'VALID', 'EXPLICIT' or explicit pairs, got 'CAUSAL'"),
        ("SAME_LOWER", ValueError, "'SAME', 'VALID', 'EXPLICIT' or explicit pairs, got 'SAME_LOWER'"),
    ],
    ids=repr,
)
def test_no_padding(padding, error, message, op, untraced):
    refuses(error, "`padding` must be " + message, op, padding=padding)


@pytest.mark.parametrize(
    "padding",
    [
        ((0, 2), (1, 0)),
        [[0, 2], [1, 0]],
        np.array([[0, 2], [1, 0]]),
        jnp.array([[0, 2], [1, 0]]),
        ((0, 0), (0, 2), (1, 0), (0, 0)),
        np.array([[0, 0], [0, 2], [1, 0], [0, 0]]),
    ],
)
def test_pairs_are_explicit(padding):
    explicit = call("forward", padding="EXPLICIT", explicit_paddings=[0, 0, 0, 2, 1, 0, 0, 0])
    np.testing.assert_array_equal(call("forward", padding=padding), explicit)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 1), (1, 1)), np.ones((2, 2), int)])
@pytest.mark.parametrize("length", [1, 8, 9])
def test_explicit_paddings_with_another_padding(length, padding, untraced):
    message = "`explicit_paddings` must be empty unless `padding` is 'EXPLICIT', got .. with `padding` "
    refuses(
        ValueError,
        message + "..",
        "forward",
        padding=padding,
        explicit_paddings=[0] * length,
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("data_format", [None, [], "nhwc", "NCHWC", b"NHWC", 0, ("NHWC",)], ids=repr)
def test_no_data_format(data_format, op, untraced):
    refuses(ValueError, LAYOUT + repr(data_format), op, data_format=data_format)


@pytest.mark.parametrize("op", OPS)
def test_attributes_follow_the_layout(op, untraced):
    # As if the arrays alone had been transposed.
    refuses(ValueError, "`filter.. must have the C of ..[N, C, H, W]..", op, data_format="NCHW")
    nchw = row("", data_format="NCHW", input=(2, 3, 5, 6), output=(2, 6, 5, 6))
    for name in ("strides", "dilations"):
        changed = dataclasses.replace(nchw, attributes={**nchw.attributes, name: [1, 2, 2, 1]})
        with pytest.raises(ValueError, match=f"`{name}` must be 1 in the batch and the channels"):
            changed.call(op, *(np.ones(shape, np.float32) for shape in nchw.shapes(op)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "precision",
    ["", "foo", 0, True, (), ("highest",) * 3, (None, None), ("highest", None), int, {"high"}],
    ids=repr,
)
def test_no_precision(precision, op, untraced):
    message = f"`precision` must be None, a `jax.lax.Precision`, one out of .., got {precision!r}"
    refuses(ValueError, message, op, precision=precision)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [[], (), 1, True, b"lax", {"lax"}, [["lax"]], ("lax", None), jnp])
def test_no_implementation(value, op, untraced):
    message = f"`implementation` must be None, a name or a sequence of names, got {value!r}"
    refuses(TypeError, message, op, implementation=value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [0, 1, None, "yes", np.True_, [True]], ids=repr)
def test_no_forward_mode(value, op, untraced):
    refuses(TypeError, f"`forward_mode` must be True or False, got {value!r}", op, forward_mode=value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [0, b"name", ["name"], object], ids=repr)
def test_no_name(value, op, untraced):
    refuses(TypeError, f"`name` must be a string or None, got {value!r}", op, name=value)


@pytest.mark.parametrize("name", ["", "a/b", "%s\n", "é" * 1000])
def test_any_string_is_a_name(name):
    np.testing.assert_array_equal(call("forward", name=name), call("forward"))


@pytest.mark.parametrize(
    "implementation", ["lax", ("lax", "lax"), ["xla_taps", "lax"], np.str_("lax")], ids=repr
)
def test_implementation_in_every_notation(implementation):
    np.testing.assert_array_equal(call("forward", implementation=implementation), call("forward"))


def test_implementation_that_cannot_run_this():
    message = "`implementation` can't run input_grad: xla_taps: strides may have a product of .."
    changes = {"strides": (8, 8), "out_backprop": np.ones((2, 1, 1, 6), np.float32)}
    refuses(NotImplementedError, message, "input_grad", implementation="xla_taps", **changes)
    call("input_grad", implementation=("xla_taps", "lax"), **changes)


ARRAYS = [(op, name) for op in OPS for name in ("input", "filter", "out_backprop")]
ARRAYS = [pair for pair in ARRAYS if pair not in {("forward", "out_backprop")}]
ARRAYS = [pair for pair in ARRAYS if pair not in {("input_grad", "input"), ("filter_grad", "filter")}]


@pytest.mark.parametrize("op, name", ARRAYS)
@pytest.mark.parametrize(
    "value",
    [
        None,
        "ones",
        [[1.0, 2.0], [3.0]],
        np.array([None, 1.0], object),
        {1.0},
        {"input": 1.0},
        (i for i in (1.0, 1.0)),
        jax.ShapeDtypeStruct((2, 5, 6, 3), np.float32),
        jnp.ones,
        ...,
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_array(value, op, name, untraced):
    refuses(TypeError, f"`{name}` must be an array, got {value!r}", op, **{name: value})


@pytest.mark.parametrize("op, name", ARRAYS)
@pytest.mark.parametrize("dtype", ["bool", "int4", "uint8", "int64", "float8_e5m2", "complex128"])
def test_no_dtype(dtype, op, name, untraced):
    # Also where the shape is wrong, and that of the other array is right.
    for shape in ((2, 5, 6, 3), (), (2,)):
        value = np.ones(shape, jnp.dtype(dtype))
        refuses(TypeError, f"`{name}{DTYPE}{dtype}", op, **{name: value})


@pytest.mark.parametrize("op, name", ARRAYS)
def test_arrays_without_numbers(op, name, untraced):
    for value in (np.zeros((2, 5, 6, 3), jax.dtypes.float0), jax.random.key(0)):
        refuses(TypeError, f"`{name}{DTYPE}..", op, **{name: value})


@pytest.mark.parametrize("op, name", ARRAYS)
@pytest.mark.parametrize("shape", [(), (1,), (5, 6), (5, 6, 3), (1, 2, 5, 6, 3)], ids=str)
def test_no_4d_array(shape, op, name, untraced):
    value = np.ones(shape, np.float32)
    refuses(ValueError, f"`{name}` must be 4-dimensional, got shape {shape}", op, **{name: value})


@pytest.mark.parametrize("op, name", ARRAYS)
def test_weak_types_give_way(op, name):
    strong = call(op)
    shape = {"input": (2, 5, 6, 3), "filter": (3, 3, 3, 2), "out_backprop": (2, 5, 6, 6)}[name]
    for one in (1, 1.0):
        got = call(op, **{name: jnp.full(shape, one)})
        assert got.dtype == strong.dtype == jnp.float32
        np.testing.assert_array_equal(got, strong)


def test_float64_without_x64():
    with jax.enable_x64(False):
        got = call("forward", input=np.ones((2, 5, 6, 3)))
    assert got.dtype == jnp.float32


@pytest.mark.parametrize(
    "op, name, shape",
    [
        ("input_grad", "input_sizes", (2, 5, 6, 3)),
        ("filter_grad", "filter_sizes", (3, 3, 3, 2)),
        ("forward", "strides", (1, 1)),
        ("forward", "dilations", (1, 1)),
        ("forward", "explicit_paddings", (0,) * 8),
        ("forward", "padding", ((1, 1), (1, 1))),
    ],
)
def test_traced_attributes(op, name, shape, untraced):
    def traced(value):
        return call(op, **{name: value})

    message = f"`{name}` must be .., got ..Tracer..static_argnums.."
    for value in (shape, np.array(shape), [shape[0], *shape[1:]]):
        with pytest.raises(TypeError, match=matches(message)):
            jax.eval_shape(traced, value)


def test_traced_flags(untraced):
    for name, error in (
        ("data_format", ValueError),
        ("precision", ValueError),
        ("implementation", TypeError),
        ("forward_mode", TypeError),
        ("name", TypeError),
    ):
        with pytest.raises(error, match=f"`{name}` must be .*, got .*Tracer"):
            jax.eval_shape(lambda value: call("forward", **{name: value}), True)


def symbolic(shape, scope):
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), np.float32)


@pytest.mark.parametrize(
    "op, shapes, error, message",
    [
        ("forward", {"input": "n, h, 6, 3"}, NotImplementedError, "`input` may have a symbolic .."),
        ("forward", {"filter": "3, 3, 3, m"}, NotImplementedError, "`filter` may have a symbolic .."),
        (
            "filter_grad",
            {"input": "n, 5, 6, 3", "out_backprop": "m, 5, 6, 6"},
            ValueError,
            "`out_backprop` must have shape (n, 5, 6, 6), got (m, 5, 6, 6): ..",
        ),
        (
            "input_grad",
            {"input_sizes": "n, 5, 6, 3", "out_backprop": "m, 5, 6, 6"},
            ValueError,
            "`input_sizes` must start with the batch size m, got n",
        ),
        (
            "input_grad",
            {"input_sizes": "n, h, 6, 3", "out_backprop": "n, 5, 6, 6"},
            TypeError,
            "`input_sizes` must be 4 integers, got ..h..",
        ),
        (
            "input_grad",
            {"out_backprop": "n, 5, 6, 6"},
            ValueError,
            "`out_backprop` must have shape (2, 5, 6, 6), got (n, 5, 6, 6): ..",
        ),
    ],
)
def test_symbolic_sizes(op, shapes, error, message, untraced):
    scope = jax.export.SymbolicScope()
    structs = {name: symbolic(shape, scope) for name, shape in shapes.items()}

    def fun(arrays):
        sizes = {name: x.shape for name, x in arrays.items() if name.endswith("_sizes")}
        return call(op, **{**arrays, **sizes})

    with pytest.raises(error, match=matches(message)):
        jax.eval_shape(fun, structs)


@pytest.mark.parametrize("platform", ["CPU", "metal", 1, True, ["cpu"], ("cpu", "tpu"), b"cpu"])
def test_no_platform(platform, untraced):
    x, f = np.ones((2, 5, 6, 3), np.float32), np.ones((3, 3, 3, 2), np.float32)
    message = f"`platform` must be one of cpu, cuda, rocm, tpu, got {platform!r}"
    with pytest.raises(ValueError, match=matches(message)):
        jax_dwbp.implementations(FUNCTIONS["forward"], x, f, (1, 1), "SAME", platform=platform)


def test_implementations_passes_errors_on():
    x, f = jax.ShapeDtypeStruct((2, 5, 6, 3), np.float32), np.ones((3, 3, 3, 2), np.float32)
    forward = FUNCTIONS["forward"]
    with pytest.raises(ValueError, match=r"`strides` must be .*, got \[1\]"):
        jax_dwbp.implementations(forward, x, f, (1,), "SAME")
    with pytest.raises(TypeError, match="`filter` must be an array, got None"):
        jax_dwbp.implementations(forward, x, None, (1, 1), "SAME")
    with pytest.raises(ValueError, match="`implementation` must be out of .*, got 'foo'"):
        jax_dwbp.implementations(forward, x, f, (1, 1), "SAME", implementation="foo")
    assert jax_dwbp.implementations(jnp.sin, 1.0) == []


# Attributes far beyond the arrays: as fast as others, and in no more memory.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "case",
    [
        Case("stride_1e9", (1, 5, 6, 2), (3, 3, 2, 1), (10**9, 10**9)),
        Case("dilation_1e9", (1, 5, 6, 2), (2, 2, 2, 1), (1, 1), "SAME", (10**9, 10**9)),
        Case("middle_tap", (1, 5, 6, 2), (3, 1, 2, 1), (1, 1), ((10**9,) * 2, (0, 0)), (10**9, 1)),
        Case("rows_1e4", (1, 5, 6, 1), (10**4, 1, 1, 1)),
        Case("columns_1e4", (1, 5, 6, 1), (1, 10**4, 1, 1)),
    ],
    ids=str,
)
def test_extreme_attributes(case, op):
    a, b = case.operands(op)
    case.check(op, case.run(op, a, b), case.expected(op, a, b), "float32")


LAX = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 3}
LAX["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("window_strides", "rhs_dilation") for value in (
            "ab", [[1, 2], [3]], {1, 2}, 1, np.array(1), (1,), (1, 1, 1), (-1, 1), (1.5, 1), (2**63, 1),
            [2, 1], np.array([2, 1]), (np.int8(2), 1), (Two.TWO, 1), (10**9, 10**9),
        )),
        *({"padding": value} for value in (
            "same", "EXPLICIT", "", 1, None, ((1, 1),), ((1, 1),) * 3, (1, 1), ((1, 1, 1),) * 2, b"SAME",
            ((1.5, 1), (1, 1)), ((-1, 1), (1, 1)), ((-9, 0), (0, 0)), [[1, 2], [0, 1]], "SAME_LOWER",
        )),
        *({"feature_group_count": value} for value in (0, -3, 1, 2, 6, "3", None, 3.5, (3,), np.int64(3))),
        *({"batch_group_count": value} for value in (0, 2, "1", None)),
        *({"precision": value} for value in ("foo", 1, (), (None, None), "highest", ("high", "default"))),
        *({"dimension_numbers": value} for value in (
            None, "NHWC", ("NHWC", "HWIO"), ("NHWC", "HWIO", "NHWD"), ("NCHW", "OIHW", "NCHW"),
            ("NWHC", "WHIO", "NWHC"),
        )),
        *({"preferred_element_type": value} for value in ("foo", 1, np.int32, np.float64)),
        *({"lhs_dilation": value} for value in ((2, 1), "ab", 1, (1, 1))),
        *({"rhs": np.ones(shape, np.float32)} for shape in (
            (3, 3, 1, 3), (3, 3, 1, 4), (3, 3, 3, 6), (3, 3, 1, 0), (3, 3, 6), (9, 9, 1, 6), (0, 3, 1, 3),
        )),
        *({"lhs": np.ones(shape, np.float32)} for shape in (
            (0, 5, 6, 3), (2, 0, 6, 3), (2, 5, 6, 0), (5, 6, 3), (2, 5, 6, 3, 1), (2, 5, 6, 4),
        )),
        *({"lhs": np.ones((2, 5, 6, 3), dtype)} for dtype in (int, complex, bool, np.float64)),
        {"lhs": None},
        {"lhs": jax.ShapeDtypeStruct((2, 5, 6, 3), np.float32)},
        {"unknown": 1},
    ],
    ids=str,
)
def test_same_outcome_as_lax(changes):
    lhs, rhs = np.ones((2, 5, 6, 3), np.float32), np.ones((3, 3, 1, 6), np.float32)
    arguments = {"lhs": lhs, "rhs": rhs, **LAX, **changes}
    try:
        want = jax.lax.conv_general_dilated(**arguments)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            jax_dwbp.conv_general_dilated(**arguments)
        assert raised.type is type(error)
        return
    got = jax_dwbp.conv_general_dilated(**arguments)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-6)
