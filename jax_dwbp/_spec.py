"""Every check and every default, made once at the border.

`canonicalize` turns the arguments of any of the three ops into one `ConvSpec`, from there on the
only description of the convolution. NumPy and the standard library only.

Shape legend, used in the whole package: N batch, H W input, P Q output, R S filter, C channels,
M depth multiplier.
"""

import contextlib
import dataclasses
import enum
import math
import operator
import reprlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Op = Literal["forward", "input_grad", "filter_grad"]
Pair = tuple[int, int]

# The names of the public functions.
OP_NAMES: dict[Op, str] = {
    "forward": "depthwise_conv2d_native",
    "input_grad": "depthwise_conv2d_native_backprop_input",
    "filter_grad": "depthwise_conv2d_native_backprop_filter",
}
# The operands of each op, in the order in which all of the package passes them.
OPERANDS: dict[Op, tuple[str, str]] = {
    "forward": ("x", "f"),
    "input_grad": ("f", "dy"),
    "filter_grad": ("x", "dy"),
}
# And what it computes.
RESULTS: dict[Op, str] = {"forward": "dy", "input_grad": "x", "filter_grad": "f"}
DTYPES = ("float16", "bfloat16", "float32", "float64")

# What the caller of each op calls its input, its filter and its output.
_NAMES: dict[Op, tuple[str, str, str]] = {
    "forward": ("input", "filter", "output"),
    "input_grad": ("input_sizes", "filter", "out_backprop"),
    "filter_grad": ("input", "filter_sizes", "out_backprop"),
}
# Where data_format puts the height, the width and the channels.
_AXES = {"NHWC": (1, 2, 3), "NCHW": (2, 3, 1)}
# lax's precision by the names that `jax.lax.Precision` and the configuration go by.
PRECISIONS = {
    "default": "default",
    "bfloat16": "default",
    "fastest": "default",
    "high": "high",
    "bfloat16_3x": "high",
    "tensorfloat32": "high",
    "highest": "highest",
    "float32": "highest",
}
# The name of the scope of a convolution that the stand-in for lax's leaves to lax, before why.
LEFT_TO_LAX = "left to lax, "
_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class ConvSpec:
    """A depthwise convolution less its batch size and dtype: the static half of all three ops."""

    data_format: Literal["NHWC", "NCHW"]
    in_spatial: Pair  # H, W
    kernel_spatial: Pair  # R, S
    out_spatial: Pair  # P, Q
    channels: int  # C
    multiplier: int  # M
    window_strides: Pair
    padding: tuple[Pair, Pair]
    rhs_dilation: Pair
    precision: str | tuple[str, str] | None
    implementation: tuple[str, ...] | None  # names to try in order; None leaves the choice to us

    def axes(self) -> list[tuple[int, int, int, int, Pair, int]]:
        """(input, filter, output, stride, padding, dilation) of the height, then of the width."""
        return list(
            zip(
                self.in_spatial,
                self.kernel_spatial,
                self.out_spatial,
                self.window_strides,
                self.padding,
                self.rhs_dilation,
                strict=True,
            )
        )

    def result_shape(
        self, op: Op, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The shape of what `op` computes, with the problem axis of x or dy if they have one."""
        if op == "filter_grad":
            return (*a_shape[:-4], *self.kernel_spatial, self.channels, self.multiplier)
        if op == "forward":
            batch, spatial, depth = a_shape[:-3], self.out_spatial, self.channels * self.multiplier
        else:
            batch, spatial, depth = b_shape[:-3], self.in_spatial, self.channels
        if self.data_format == "NHWC":
            return (*batch, *spatial, depth)
        return (*batch, depth, *spatial)


def canonicalize(
    op: Op,
    input_sizes: Any,
    filter_sizes: Any,
    out_backprop_shape: tuple[Any, ...] | None,
    strides: Any,
    padding: Any,
    explicit_paddings: Any,
    data_format: Any,
    dilations: Any,
    precision: Any,
    implementation: Any,
) -> ConvSpec:
    """Checks the arguments of `op` and resolves every default.

    `input_sizes` and `filter_sizes` are the shape of the array where `op` takes one, else what
    the caller gave for it. The forward op has no `out_backprop_shape`.
    """
    if not isinstance(data_format, str) or data_format not in _AXES:
        raise ValueError(f"`data_format` must be 'NHWC' or 'NCHW', got {brief(data_format)}")
    input_name, filter_name, out_name = _NAMES[op]
    batch = None
    if out_backprop_shape is not None:
        out_backprop_shape = _array_shape(out_name, out_backprop_shape, batched=True)
        batch = out_backprop_shape[0]
    if op == "input_grad":
        input_sizes = _sizes(input_name, input_sizes, batch)
    else:
        input_sizes = _array_shape(input_name, input_sizes, batched=True)
    if op == "filter_grad":
        filter_sizes = _sizes(filter_name, filter_sizes)
    else:
        filter_sizes = _array_shape(filter_name, filter_sizes, batched=False)
    height, width, depth = _AXES[data_format]
    batch, channels = input_sizes[0], input_sizes[depth]
    if filter_sizes[2] != channels:
        raise ValueError(
            f"`{filter_name}` [R, S, C, M] must have the C of `{input_name}` "
            f"[{', '.join(data_format)}], got {filter_sizes} and {input_sizes}"
        )

    in_spatial, kernel_spatial = (input_sizes[height], input_sizes[width]), filter_sizes[:2]
    window_strides = _spatial_attribute("strides", strides, data_format)
    rhs_dilation = _spatial_attribute("dilations", dilations, data_format)
    pads = _padding(padding, explicit_paddings, data_format)
    (rows, row_pads), (cols, col_pads) = (
        _geometry(filter_name, *axis)
        for axis in zip(in_spatial, kernel_spatial, window_strides, rhs_dilation, pads, strict=True)
    )
    out_sizes = [batch] * 4
    out_sizes[height], out_sizes[width], out_sizes[depth] = rows, cols, channels * filter_sizes[3]
    if out_backprop_shape is not None and out_backprop_shape != tuple(out_sizes):
        raise ValueError(
            f"`{out_name}` must have shape {tuple(out_sizes)}, got {out_backprop_shape}: implied "
            f"by `{input_name}` {input_sizes}, `{filter_name}` {filter_sizes}, `strides` "
            f"{window_strides}, `dilations` {rhs_dilation}, `padding` {brief(padding)} and "
            f"`data_format` {data_format!r}"
        )
    padded_sizes = (
        batch,
        sum((in_spatial[0], *row_pads)),
        sum((in_spatial[1], *col_pads)),
        channels,
    )
    _check_elements(f"`{filter_name}`", filter_sizes)
    _check_elements(f"`{input_name}`, padded,", padded_sizes)
    _check_elements("the output", out_sizes)
    return ConvSpec(
        data_format=data_format,  # pyright: ignore[reportArgumentType]
        in_spatial=in_spatial,
        kernel_spatial=kernel_spatial,
        out_spatial=(rows, cols),
        channels=channels,
        multiplier=filter_sizes[3],
        window_strides=window_strides,
        padding=(row_pads, col_pads),
        rhs_dilation=rhs_dilation,
        precision=_precision(precision),
        implementation=_implementation(implementation),
    )


def check_dtype(name: str, dtype: Any) -> None:
    """It is one that TensorFlow's op takes."""
    if getattr(dtype, "name", None) not in DTYPES:
        got = _cut(str(dtype))
        raise TypeError(f"`{name}` must have a dtype out of {', '.join(DTYPES)}, got {got}")


def check_same_dtype(dtypes: dict[str, np.dtype]) -> None:
    """The operands of one op share one dtype."""
    if len(set(dtypes.values())) > 1:
        got = ", ".join(f"{dtype} for `{name}`" for name, dtype in dtypes.items())
        raise TypeError(f"{' and '.join(f'`{n}`' for n in dtypes)} must share a dtype, got {got}")


def brief(value: Any) -> str:
    """`value` for an error message, of an exception its own: short, whatever it is."""
    try:
        is_array = hasattr(value, "shape") and hasattr(value, "dtype")
        if is_array and not isinstance(value, np.generic | type):
            return _cut(f"an array of shape {value.shape} and dtype {value.dtype}")
        return _cut(str(value) if isinstance(value, Exception) else reprlib.repr(value))
    except Exception:  # an integer that is too long to print, or a broken class
        return f"a {type(value).__name__}"


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_elements(what: str, sizes: Sequence[Any]) -> None:
    """XLA aborts the process at arrays of 2**63 bytes, also where a size of 0 makes them empty."""
    if math.prod(size or 1 for size in sizes if type(size) is int) >= 2**60:
        raise ValueError(f"{what} must have less than 2**60 elements, got sizes {tuple(sizes)}")


def _array_shape(name: str, shape: tuple[Any, ...], *, batched: bool) -> tuple[Any, ...]:
    """The shape of an array argument: four sizes, static but for a batch."""
    if len(shape) != 4:
        raise ValueError(f"`{name}` must be 4-dimensional, got shape {shape}")
    if any(type(size) is not int for size in shape[batched:]):
        raise NotImplementedError(
            f"`{name}` must have static sizes, but for a batch, got shape {shape}"
        )
    return shape


def _sizes(name: str, value: Any, batch: Any = None) -> tuple[Any, ...]:
    """A shape given as a vector. Its batch size may be symbolic, if it is that of out_backprop."""
    symbolic: list[Any] = []
    is_symbolic = batch is not None and type(batch) is not int
    if (
        is_symbolic
        and isinstance(value, tuple | list)
        and value[:1]
        and type(value[0]) is type(batch)
    ):
        if value[0] != batch:
            raise ValueError(f"`{name}` must start with the batch size {batch}, got {value[0]}")
        symbolic, value = [batch], value[1:]
    static = _integers(name, "4 integers", value, integral_floats=True)
    sizes = (*symbolic, *static)
    if len(sizes) != 4:
        raise ValueError(f"`{name}` must be 4 integers, got {brief(sizes)}")
    if not all(0 <= size <= _INT32_MAX for size in static):
        raise ValueError(f"`{name}` must hold sizes from 0 to 2**31 - 1, got {brief(sizes)}")
    return sizes


def _integers(name: str, rule: str, value: Any, *, integral_floats: bool = False) -> list[int]:
    """`value` as a list of integers, from any vector that NumPy understands.

    TensorFlow converts float sizes, so these pass `integral_floats`; attributes it does not.
    """
    try:
        if not isinstance(value, tuple | list):
            array = np.asarray(value)
            if array.ndim != 1:
                raise TypeError
            value = array.tolist()
        value = list(value)
        integers = []
        for entry in value:
            if integral_floats and isinstance(entry, float | np.floating) and entry == int(entry):
                entry = int(entry)
            if isinstance(entry, bool | np.bool_):
                raise TypeError
            integers.append(operator.index(entry))  # pyright: ignore[reportArgumentType]
        return integers
    except Exception as error:  # also what the caller's objects raise, and arrays that are deleted
        message = f"`{name}` must be {rule}, got {brief(value)}"
        entries = value if type(value) is list else [value]
        if any("Tracer" in type(entry).__name__ for entry in (error, *entries)):
            message += (
                "; it must be static, known when the op is traced: under `jax.jit` mark it with "
                "`static_argnums`, or take it from the `.shape` of an array"
            )
        raise TypeError(message) from error


def _spatial_attribute(name: str, value: Any, data_format: str) -> Pair:
    """`strides` or `dilations`: TensorFlow's vector in the order of data_format, or (H, W)."""
    rule = f"4 integers in the order of `data_format` {data_format!r}, or the pair (H, W)"
    values = _integers(name, rule, value)
    if len(values) == 4:
        height, width, depth = _AXES[data_format]
        if values[0] != 1 or values[depth] != 1:
            raise ValueError(
                f"`{name}` must be 1 in the batch and the channels, got {brief(values)}"
            )
        values = [values[height], values[width]]
    if len(values) != 2:
        raise ValueError(f"`{name}` must be {rule}, got {brief(values)}")
    if not all(1 <= v <= _INT32_MAX for v in values):
        raise ValueError(f"`{name}` must be positive and below 2**31, got {brief(tuple(values))}")
    return values[0], values[1]


def _padding(
    padding: Any, explicit_paddings: Any, data_format: str
) -> tuple[str, str] | tuple[Pair, Pair]:
    """For the height and the width: 'SAME', 'VALID' or the pads (low, high)."""
    rule = "empty, or 8 integers: (before, after) for each dimension as in `data_format`"
    explicit = _integers("explicit_paddings", rule, explicit_paddings)
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID", "EXPLICIT"):
            raise ValueError(
                f"`padding` must be 'SAME', 'VALID', 'EXPLICIT', in capitals, or explicit pairs, "
                f"got {brief(padding)}"
            )
        if padding == "EXPLICIT":
            if len(explicit) != 8:
                raise ValueError(
                    f"`explicit_paddings` must be 8 integers when `padding` is 'EXPLICIT', got "
                    f"{brief(explicit)}"
                )
            pairs = list(zip(explicit[::2], explicit[1::2], strict=True))
            return _spatial_pads("explicit_paddings", pairs, data_format)
    if explicit:
        raise ValueError(
            f"`explicit_paddings` must be empty unless `padding` is 'EXPLICIT', got "
            f"{brief(explicit)} with `padding` {brief(padding)}"
        )
    if isinstance(padding, str):
        return padding, padding
    rule = "a string, ((top, bottom), (left, right)) or 4 pairs in the order of `data_format`"
    pairs = []
    with contextlib.suppress(Exception):  # whatever the caller's object raises
        if isinstance(padding, tuple | list) or tuple(padding.shape) in ((2, 2), (4, 2)):
            pairs = list(padding)
    if len(pairs) not in (2, 4):
        raise TypeError(f"`padding` must be {rule}, got {brief(padding)}")
    try:
        pairs = [tuple(_integers("padding", rule, pair)) for pair in pairs]
    except TypeError as error:
        raise TypeError(f"{error} in {brief(padding)}") from error
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"`padding` must be {rule}, got {brief(padding)}")
    return _spatial_pads("padding", pairs, data_format)


def _spatial_pads(name: str, pairs: list[Any], data_format: str) -> tuple[Pair, Pair]:
    if len(pairs) == 4:
        height, width, depth = _AXES[data_format]
        if any(pairs[0]) or any(pairs[depth]):
            raise ValueError(
                f"`{name}` must be 0 in the batch and the channels, got {brief(pairs)}"
            )
        pairs = [pairs[height], pairs[width]]
    if not all(0 <= pad <= _INT32_MAX for pair in pairs for pad in pair):
        raise ValueError(
            f"`{name}` must be non-negative and below 2**31, got {brief(tuple(pairs))}"
        )
    return pairs[0], pairs[1]


def _geometry(
    name: str, size: int, kernel: int, stride: int, dilation: int, pads: str | Pair
) -> tuple[int, Pair]:
    """The output size and the padding (low, high) of one axis, by TensorFlow's rules."""
    window = (kernel - 1) * dilation + 1 if kernel else 0
    if pads == "SAME":
        out = -(-size // stride)
        total = max((out - 1) * stride + window - size, 0)
        low, high = total // 2, total - total // 2
    else:
        low, high = (0, 0) if isinstance(pads, str) else pads
        # C++ division truncates towards zero: a window that overhangs by less than two strides
        # gives an empty output, one that overhangs further is an error.
        room = size + low + high - window + stride
        if room <= -stride:
            raise ValueError(
                f"`{name}` must overhang the padded input by less than two strides, got a dilated "
                f"size of {window} with stride {stride} on an input of {low} + {size} + {high}"
            )
        out = max(room, 0) // stride
    if max(window, size + low + high) > _INT32_MAX:
        raise ValueError(
            f"`{name}` and the padded input must each span less than 2**31, got a dilated size of "
            f"{window} on an input of {low} + {size} + {high}"
        )
    return out, (low, high)


def _precision(value: Any) -> str | tuple[str, str] | None:
    """lax's precision, by the names that it has in both of lax's notations."""
    if value is None:
        return None
    pair = isinstance(value, tuple | list) and len(value) == 2
    names = [
        name.name.lower() if isinstance(name, enum.Enum) else name
        for name in (value if pair else [value])
    ]
    if not all(isinstance(name, str) and name in PRECISIONS for name in names):
        raise ValueError(
            f"`precision` must be None, a `jax.lax.Precision`, one out of "
            f"{', '.join(PRECISIONS)}, or a pair of these, got {brief(value)}"
        )
    known = [PRECISIONS[str(name)] for name in names]
    return (known[0], known[1]) if pair else known[0]


def _implementation(value: Any) -> tuple[str, ...] | None:
    names = (value,) if isinstance(value, str) else value
    if names is None:
        return None
    if (
        not isinstance(names, tuple | list)
        or not names
        or not all(isinstance(n, str) for n in names)
    ):
        raise TypeError(
            f"`implementation` must be None, a name or a sequence of names, got {brief(value)}"
        )
    return tuple(names)
