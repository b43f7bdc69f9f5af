"""Every check and every default, made once at the border.

`canonicalize` turns the arguments of any of the three ops into one `ConvSpec`, from there on the
only description of the convolution. NumPy and the standard library only.

Shape legend, used in the whole package: N batch, H W input, P Q output, R S filter, C channels,
M depth multiplier. The public ops are TensorFlow's, of two spatial axes. Below them there may be
one, or three: then D is the depth of the input, O that of the output and T that of the filter.
"""

import contextlib
import dataclasses
import enum
import math
import operator
import reprlib
from typing import Any, NamedTuple

import numpy as np

Pair = tuple[int, int]
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Op(NamedTuple):
    """One of the three derivatives of the form that `_rules` is about."""

    name: str
    function: str  # the public one
    operands: tuple[str, str]  # in the order in which all of the package passes them
    result: str
    source: str  # the operand of which a part of the result needs more than the same part
    arguments: tuple[str, str, str]  # what the public function calls input, filter and output

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__  # in a jaxpr too


FORWARD = Op(
    name="forward",
    function="depthwise_conv2d_native",
    operands=("x", "f"),
    result="dy",
    source="x",
    arguments=("input", "filter", "output"),
)
INPUT_GRAD = Op(
    name="input_grad",
    function="depthwise_conv2d_native_backprop_input",
    operands=("f", "dy"),
    result="x",
    source="dy",
    arguments=("input_sizes", "filter", "out_backprop"),
)
FILTER_GRAD = Op(
    name="filter_grad",
    function="depthwise_conv2d_native_backprop_filter",
    operands=("x", "dy"),
    result="f",
    source="x",
    arguments=("input", "filter_sizes", "out_backprop"),
)
OPS = {op.name: op for op in (FORWARD, INPUT_GRAD, FILTER_GRAD)}

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


class SpatialAxis(NamedTuple):
    """The convolution along the depth, the height or the width."""

    size: int  # D, H or W
    kernel: int  # T, R or S
    out: int  # O, P or Q
    stride: int
    pads: Pair  # low, high
    dilation: int

    @property
    def reach(self) -> int:
        """From the first tap of the filter to the last."""
        return (self.kernel - 1) * self.dilation


@dataclasses.dataclass(frozen=True, slots=True)
class ConvSpec:
    """A depthwise convolution less its batch size and dtype: the static half of all three ops."""

    axes: tuple[SpatialAxis, ...]  # one to three: depth, height, width
    channels_first: bool  # are they before these axes, or behind
    channels: int  # C
    multiplier: int  # M
    precision: str | tuple[str, str] | None
    implementation: tuple[str, ...] | None  # names to try in order; None leaves the choice to us
    interpret: bool = False  # Pallas kernels, on any platform
    are_integers: bool = False  # in floating point, of which every sum is exact

    # Of all axes, by lax's names.

    @property
    def in_spatial(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def kernel_spatial(self) -> tuple[int, ...]:
        return tuple(axis.kernel for axis in self.axes)

    @property
    def out_spatial(self) -> tuple[int, ...]:
        return tuple(axis.out for axis in self.axes)

    @property
    def window_strides(self) -> tuple[int, ...]:
        return tuple(axis.stride for axis in self.axes)

    @property
    def padding(self) -> tuple[Pair, ...]:
        return tuple(axis.pads for axis in self.axes)

    @property
    def rhs_dilation(self) -> tuple[int, ...]:
        return tuple(axis.dilation for axis in self.axes)

    def result_shape(
        self, op: Op, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The shape of what `op` computes, with the problem axis of x or dy if they have one."""
        rank = len(self.axes)
        if op.result == "f":
            problems = a_shape[: -rank - 2]
            return (*problems, *self.kernel_spatial, self.channels, self.multiplier)
        if op.result == "dy":
            shape, spatial, lanes = a_shape, self.out_spatial, self.channels * self.multiplier
        else:
            shape, spatial, lanes = b_shape, self.in_spatial, self.channels
        batch = shape[: -rank - 1]
        return (*batch, lanes, *spatial) if self.channels_first else (*batch, *spatial, lanes)


class Arguments(NamedTuple):
    """Those of a public function, as its caller gave them.

    `input` and `filter` are the shape of the array where the op takes one, else the sizes;
    `out_backprop` is its shape, None for the forward op.
    """

    input: Any
    filter: Any
    out_backprop: tuple[Any, ...] | None
    strides: Any
    padding: Any
    explicit_paddings: Any = ()
    data_format: Any = "NHWC"
    dilations: Any = (1, 1)
    precision: Any = None
    implementation: Any = None


def canonicalize(op: Op, given: Arguments) -> ConvSpec:
    """Checks the arguments of `op` and resolves every default."""
    data_format = given.data_format
    if not isinstance(data_format, str) or data_format not in _AXES:
        raise ValueError(f"`data_format` must be 'NHWC' or 'NCHW', got {brief(data_format)}")
    input_sizes, filter_sizes, out_sizes = _shapes(op, given)
    height, width, channel = _AXES[data_format]
    input_name, filter_name, out_name = op.arguments
    batch, channels = input_sizes[0], input_sizes[channel]
    if filter_sizes[2] != channels:
        raise ValueError(
            f"`{filter_name}` [R, S, C, M] must have the C of `{input_name}` "
            f"[{', '.join(data_format)}], got {filter_sizes} and {input_sizes}"
        )
    strides = _spatial_attribute("strides", given.strides, data_format)
    dilations = _spatial_attribute("dilations", given.dilations, data_format)
    padding = _padding(given.padding, given.explicit_paddings, data_format)
    axes = tuple(
        spatial_axis(
            input_sizes[i], filter_sizes[k], strides[k], dilations[k], padding[k], filter_name
        )
        for k, i in enumerate((height, width))
    )
    implied = [batch] * 4
    implied[height], implied[width] = (axis.out for axis in axes)
    implied[channel] = channels * filter_sizes[3]
    if out_sizes is not None and out_sizes != tuple(implied):
        raise ValueError(
            f"`{out_name}` must have shape {tuple(implied)}, got {out_sizes}: implied by "
            f"`{input_name}` {input_sizes}, `{filter_name}` {filter_sizes}, `strides` {strides}, "
            f"`dilations` {dilations}, `padding` {brief(given.padding)} and `data_format` "
            f"{data_format!r}"
        )
    spec = ConvSpec(
        axes=axes,
        channels_first=data_format == "NCHW",
        channels=channels,
        multiplier=filter_sizes[3],
        precision=canonical_precision(given.precision),
        implementation=_implementation(given.implementation),
    )
    check_sizes(spec, batch, input_name, filter_name)
    return spec


def check_sizes(spec: ConvSpec, batch: Any, input_name: str, filter_name: str) -> None:
    """XLA aborts the process at arrays of 2**63 bytes, also where a size of 0 makes them empty."""
    padded = (axis.size + sum(axis.pads) for axis in spec.axes)
    for what, sizes in (
        (f"`{filter_name}`", (*spec.kernel_spatial, spec.channels, spec.multiplier)),
        (f"`{input_name}`, padded,", (batch, *padded, spec.channels)),
        ("the output", (batch, *spec.out_spatial, spec.channels * spec.multiplier)),
    ):
        if math.prod(size for size in sizes if type(size) is int and size) >= 2**60:
            raise ValueError(f"{what} must have less than 2**60 elements, got sizes {sizes}")


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


def _shapes(
    op: Op, given: Arguments
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...] | None]:
    """Those of the input, of the filter and, if it was given, of the output, else None."""
    input_name, filter_name, out_name = op.arguments
    batch, out_sizes = None, None
    if given.out_backprop is not None:
        out_sizes = _array_shape(out_name, given.out_backprop, batched=True)
        batch = out_sizes[0]
    if op.result == "x":
        input_sizes = _sizes(input_name, given.input, batch)
    else:
        input_sizes = _array_shape(input_name, given.input, batched=True)
    if op.result == "f":
        filter_sizes = _sizes(filter_name, given.filter)
    else:
        filter_sizes = _array_shape(filter_name, given.filter, batched=False)
    return input_sizes, filter_sizes, out_sizes


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
            if type(entry) is int:  # nearly always, and this is asked at each call
                integers.append(entry)
                continue
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
        height, width, channel = _AXES[data_format]
        if values[0] != 1 or values[channel] != 1:
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
        height, width, channel = _AXES[data_format]
        if any(pairs[0]) or any(pairs[channel]):
            raise ValueError(
                f"`{name}` must be 0 in the batch and the channels, got {brief(pairs)}"
            )
        pairs = [pairs[height], pairs[width]]
    if not all(0 <= pad <= _INT32_MAX for pair in pairs for pad in pair):
        raise ValueError(
            f"`{name}` must be non-negative and below 2**31, got {brief(tuple(pairs))}"
        )
    return pairs[0], pairs[1]


def spatial_axis(
    size: int, kernel: int, stride: int, dilation: int, pads: str | Pair, filter_name: str
) -> SpatialAxis:
    """With the output size and the padding by TensorFlow's rules."""
    if max(stride, dilation) > _INT32_MAX:
        raise ValueError(f"strides and dilations must be below 2**31, got {stride} and {dilation}")
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
                f"`{filter_name}` must overhang the padded input by less than two strides, got a "
                f"dilated size of {window} with stride {stride} on an input of "
                f"{low} + {size} + {high}"
            )
        out = max(room, 0) // stride
    if max(window, size + low + high) > _INT32_MAX:
        raise ValueError(
            f"`{filter_name}` and the padded input must each span less than 2**31, got a dilated "
            f"size of {window} on an input of {low} + {size} + {high}"
        )
    return SpatialAxis(size, kernel, out, stride, (low, high), dilation)


def canonical_precision(value: Any) -> str | tuple[str, str] | None:
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
