"""One table of named cases for all tests, and the one function that says what rounding may do.

Shapes are NHWC and [R, S, C, M], with one spatial axis less or more too.

TensorFlow's own configurations are those of
`tensorflow/python/kernel_tests/nn_ops/depthwise_conv_op_base.py`, `compiler/tests` and
`nn_grad_test.py` in TensorFlow 2.21, XLA's of `conv_depthwise_test`, Keras' of its 3.15 tests,
PyTorch's of its OpInfo samples.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax.core import Tracer

import jax_dwbp
from jax_dwbp import _rules
from jax_dwbp._impl import interpret
from jax_dwbp._spec import FORWARD, Arguments, ConvSpec, canonicalize, spatial_axis
from jax_dwbp._spec import OPS as RECORDS
from jax_dwbp.bench import layers

OPS = ("forward", "input_grad", "filter_grad")
# native_cpu is there if it could be compiled where the package was installed.
[_selection] = jax_dwbp.implementations(
    jax_dwbp.depthwise_conv2d_native,
    *(jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), (1, 1), "VALID"),
    platform="cpu",
)
HAS_NATIVE = _selection.reasons["native_cpu"] is None
IMPLEMENTATIONS = ("lax", "xla_taps") + ("native_cpu",) * HAS_NATIVE
# By name and interpreted only, in a file of their own.
KERNELS = {
    "pallas_tpu": ("bfloat16", "float32"),
    "pallas_gpu": ("float16", "bfloat16", "float32"),
}
DEFAULT_ON_CPU = "native_cpu" if HAS_NATIVE else "xla_taps"
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    input: Any
    filter: Any
    strides: Any = None  # of 1 in all axes, as dilations
    padding: Any = "SAME"
    dilations: Any = None

    def __post_init__(self):
        for name in ("strides", "dilations"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, (1,) * self.rank)

    @property
    def rank(self):
        return len(self.input) - 2

    def __str__(self):
        return self.name

    @functools.cached_property
    def output(self):
        return reference.output_shape(self)

    def attributes(self, data_format="NHWC"):
        """The attributes as TensorFlow spells them."""
        explicit = ()
        padding = self.padding
        if not isinstance(padding, str):
            pads = [*padding[0], *padding[1]]
            explicit = [0, 0, *pads, 0, 0] if data_format == "NHWC" else [0, 0, 0, 0, *pads]
            padding = "EXPLICIT"
        return {
            "strides": spatial(self.strides, data_format),
            "padding": padding,
            "explicit_paddings": explicit,
            "data_format": data_format,
            "dilations": spatial(self.dilations, data_format),
        }

    def spec(self, data_format="NHWC", precision=None, implementation=None):
        """What implementations get."""
        if self.rank == 2:
            attributes = self.attributes()
            spec = canonicalize(FORWARD, Arguments(self.input, self.filter, None, **attributes))
            return dataclasses.replace(spec, interpret=interpret.value)
        pads = [self.padding] * self.rank if isinstance(self.padding, str) else self.padding
        sizes = (self.input[1:-1], self.filter[:-2], self.strides, self.dilations, pads)
        names = (implementation,) if isinstance(implementation, str) else implementation
        return ConvSpec(
            axes=tuple(spatial_axis(*axis, "filter") for axis in zip(*sizes, strict=True)),
            channels_first=data_format == "NCHW",
            channels=self.filter[-2],
            multiplier=self.filter[-1],
            precision=precision,
            implementation=names,
        )

    def operands(self, op, dtype="float32", seed=0):
        """Random operands of `op` in [-1, 1), the same for the same case, dtype and seed."""
        x, f, dy = (
            self._random(which, shape, dtype, seed)
            for which, shape in enumerate((self.input, self.filter, self.output))
        )
        return {"forward": (x, f), "input_grad": (f, dy), "filter_grad": (x, dy)}[op]

    def _random(self, which, shape, dtype, seed):
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), which, seed])
        return rng.uniform(-1, 1, shape).astype(jnp.dtype(dtype))

    def run(self, op, a, b, data_format: Any = "NHWC", **options):
        """The op of this package on NHWC operands, whatever layout it is run in.

        The public ones have two spatial axes. Of others it is what the stand-in for lax's calls.
        """
        if self.rank != 2:
            forward_mode = options.pop("forward_mode", False)
            spec = self.spec(data_format, **options)
            record = RECORDS[op]
            operands = [
                jnp.asarray(x if name == "f" else to_layout(x, data_format))
                for name, x in zip(record.operands, (a, b), strict=True)
            ]
            result = _rules.apply(*operands, op=record, spec=spec, forward_mode=forward_mode)
            return result if record.result == "f" else from_layout(result, data_format)
        options = {**self.attributes(data_format), **options}
        if op == "forward":
            y = jax_dwbp.depthwise_conv2d_native(to_layout(a, data_format), b, **options)
            return from_layout(y, data_format)
        if op == "input_grad":
            sizes = layout_shape((b.shape[0], *self.input[1:]), data_format)
            dx = jax_dwbp.depthwise_conv2d_native_backprop_input(
                sizes, a, to_layout(b, data_format), **options
            )
            return from_layout(dx, data_format)
        return jax_dwbp.depthwise_conv2d_native_backprop_filter(
            to_layout(a, data_format), self.filter, to_layout(b, data_format), **options
        )

    def expected(self, op, a, b):
        """The result without rounding errors to speak of, by loops."""
        return getattr(reference, op)(self, a, b)

    def tolerance(self, op, dtype):
        """The error allowed for operands in [-1, 1) before the result is rounded to its dtype.

        Sums are taken in float32 or better. The products err by eps each, a random walk of
        sqrt(terms). A running sum grows like sqrt(terms) too and errs by eps of that at each step,
        a walk of up to terms / 4 (5 sigma of a uniform distribution's) if it is one chain.
        """
        *window, _, m = self.filter
        taps = math.prod(window)
        outputs = math.prod(self.output[:-1])
        terms = {"forward": taps, "input_grad": taps * m, "filter_grad": outputs}[op]
        eps = jnp.finfo(dtype).eps if dtype == "float64" else jnp.finfo("float32").eps
        return float(eps) * (2 * math.sqrt(max(terms, 1)) + terms / 4)

    def check(self, op, got, want, dtype):
        """Fails unless `got` is `want`, from `expected`, to the tolerance of `op` and dtype.

        Half types are rounded once more, by at most one unit in the last place. Returns the worst
        error as a multiple of what is allowed.
        """
        assert got.dtype == jnp.dtype(dtype)
        assert got.shape == want.shape
        got = np.asarray(got).astype(want.dtype)
        allowed = np.full(want.shape, self.tolerance(op, dtype), np.float64)
        if jnp.finfo(dtype).bits < 32:
            allowed += float(jnp.finfo(dtype).eps) * np.abs(want).astype(np.float64)
            allowed += float(jnp.finfo(dtype).smallest_subnormal)
        worst = float(np.max(np.abs(got - want) / allowed, initial=0.0))
        assert worst <= 1, f"{self} {op} {dtype}: error is {worst:.3g} of what is allowed"
        return worst


def spatial(pair, data_format):
    return (1, *pair, 1) if data_format == "NHWC" else (1, 1, *pair)


def layout_shape(shape, data_format):
    n, *sizes, c = shape
    return tuple(shape) if data_format == "NHWC" else (n, c, *sizes)


def to_layout(x, data_format):
    return x if data_format == "NHWC" else x.transpose(0, x.ndim - 1, *range(1, x.ndim - 1))


def from_layout(x, data_format):
    if data_format == "NHWC":
        return x
    # A result on one device by NumPy, for which nothing is compiled.
    if isinstance(x, jax.Array) and not isinstance(x, Tracer) and len(x.devices()) == 1:
        x = np.asarray(x)
    return x.transpose(0, *range(2, x.ndim), 1)


# Small enough for every dtype, layout, implementation and transformation; together they have each
# feature and each edge at least once.
SMALL = (
    Case("plain", (2, 5, 6, 3), (3, 3, 3, 1)),
    Case("multiplier", (2, 5, 6, 3), (3, 3, 3, 2)),
    Case("one_channel", (1, 6, 5, 1), (3, 2, 1, 4)),
    Case("stride2", (2, 7, 8, 2), (3, 3, 2, 2), (2, 2)),
    Case("stride2_even", (1, 8, 7, 2), (2, 4, 2, 1), (2, 2)),
    Case("unequal_strides", (1, 7, 9, 2), (3, 4, 2, 1), (1, 3)),
    Case("stride_above_filter", (1, 9, 10, 2), (2, 3, 2, 1), (3, 5)),
    Case("valid", (1, 6, 7, 2), (3, 2, 2, 2), padding="VALID"),
    Case("valid_unused_rows", (1, 8, 9, 2), (3, 3, 2, 1), (3, 3), "VALID"),
    Case("explicit", (1, 5, 6, 2), (3, 3, 2, 2), (2, 1), ((2, 0), (1, 3))),
    Case("pads_above_filter", (1, 4, 5, 2), (2, 3, 2, 1), (1, 2), ((4, 1), (0, 6))),
    Case("dilated", (1, 8, 9, 2), (3, 2, 2, 2), dilations=(2, 3)),
    Case("dilated_strided", (1, 9, 8, 2), (3, 3, 2, 1), (2, 3), dilations=(2, 2)),
    Case("dilated_coprime", (1, 9, 11, 2), (3, 3, 2, 1), (3, 2), "VALID", (2, 3)),
    Case("filter_above_input", (1, 3, 2, 2), (7, 6, 2, 1)),
    Case("big_filter", (1, 9, 10, 2), (9, 8, 2, 1)),
    Case("big_filter_strided", (1, 12, 9, 2), (11, 6, 2, 2), (2, 3), dilations=(1, 2)),
    Case("one_row_of_many", (1, 2, 70, 2), (1, 60, 2, 1), (1, 2)),
    Case("one_column_of_phases", (1, 5, 7, 2), (3, 7, 2, 3), (2, 2), "VALID"),
    Case("pointwise", (2, 3, 4, 5), (1, 1, 5, 2)),
    Case("causal_1d", (2, 1, 12, 3), (1, 4, 3, 1), padding=((0, 0), (3, 0))),
    Case("long_1d", (2, 1, 300, 2), (1, 5, 2, 1)),
)
# The same of one spatial axis and of three.
OTHER_RANKS = (
    Case("line", (2, 11, 3), (4, 3, 2), (2,), ((1, 2),)),
    Case("dilated_line", (1, 12, 2), (3, 2, 1), dilations=(3,)),
    Case("line_of_many", (1, 70, 1), (60, 1, 4)),
    Case("volume", (2, 4, 5, 6, 3), (3, 3, 3, 3, 2)),
    Case("strided_volume", (1, 7, 6, 5, 2), (3, 2, 3, 2, 1), (2, 1, 2), ((1, 0), (0, 1), (2, 1))),
    Case("dilated_volume", (1, 8, 7, 6, 2), (3, 2, 2, 2, 2), (3, 1, 2), "VALID", (2, 3, 1)),
    Case("deep_volume", (1, 9, 3, 4, 2), (8, 2, 1, 2, 1)),
    Case("filter_above_volume", (2, 2, 3, 2, 4), (5, 4, 3, 4, 1)),
    Case("volume_of_one_channel", (1, 3, 6, 9, 1), (2, 3, 5, 1, 3)),
)
EMPTY = (
    Case("no_batch", (0, 5, 6, 3), (3, 3, 3, 2)),
    Case("no_channels", (2, 5, 6, 0), (3, 3, 0, 2)),
    Case("no_multiplier", (2, 5, 6, 3), (3, 3, 3, 0)),
    Case("no_rows", (2, 0, 6, 3), (3, 3, 3, 2)),
    Case("no_filter_rows", (2, 5, 6, 3), (0, 3, 3, 2)),
    Case("no_filter_rows_valid", (2, 5, 6, 3), (0, 3, 3, 2), padding="VALID"),
    Case("no_filter_rows_dilated", (2, 5, 6, 3), (0, 3, 3, 2), padding="VALID", dilations=(2, 1)),
    Case("no_line", (2, 0, 3), (3, 3, 2)),
    Case("no_depth", (2, 0, 5, 6, 3), (3, 3, 3, 3, 2)),
    Case("no_depth_of_the_filter", (2, 4, 5, 6, 3), (0, 3, 3, 3, 2)),
    Case("no_output", (2, 5, 6, 3), (6, 7, 3, 2), padding="VALID"),
    Case("overhang_below_stride", (2, 5, 6, 3), (7, 7, 3, 2), (3, 3), "VALID"),
    Case("overhang_below_two_strides", (2, 5, 6, 3), (9, 9, 3, 2), (3, 3), "VALID"),
)
# What lax's convolution for the input gradient would crop by negative pads.
CROPPED = (
    Case("cropped", (2, 7, 90, 2), (2, 2, 2, 2), padding=((1, 1), (3, 0))),
    Case("cropped_rows", (2, 15, 45, 5), (4, 3, 5, 2), padding=((11, 1), (12, 7))),
    Case("cropped_row_of_many", (2, 21, 90, 4), (1, 70, 4, 4), padding=((0, 0), (73, 68))),
    Case("cropped_strided", (2, 9, 30, 3), (2, 2, 3, 2), (3, 2), ((5, 2), (8, 1))),
    Case("cropped_to_nothing", (1, 1, 1, 2), (1, 1, 2, 2), (2, 2), ((1, 1), (1, 1))),
)
TENSORFLOW = tuple(
    Case(f"tf{i}_{'x'.join(map(str, case[1]))}", *case)
    for i, case in enumerate(
        (
            ((4, 5, 5, 48), (1, 1, 48, 2)),
            ((4, 8, 8, 84), (1, 3, 84, 1)),
            ((4, 17, 17, 48), (3, 1, 48, 4)),
            ((4, 9, 27, 8), (3, 3, 8, 1)),
            ((4, 31, 31, 7), (3, 3, 7, 1)),
            ((4, 35, 35, 2), (5, 5, 2, 1)),
            ((4, 147, 147, 2), (3, 3, 2, 8), (3, 3), "VALID"),
            ((3, 299, 299, 3), (3, 2, 3, 8), (2, 2)),
            ((5, 183, 183, 1), (5, 5, 1, 2), (2, 2)),
            ((5, 183, 183, 1), (5, 5, 1, 2), (1, 1), "SAME", (2, 2)),
            ((5, 41, 35, 2), (4, 7, 2, 2), (1, 1), "VALID", (3, 2)),
            ((4, 5, 5, 48), (1, 1, 48, 2), (1, 1), ((1, 2), (3, 4))),
            ((4, 1, 1, 3), (3, 3, 3, 2), (1, 1), ((10, 20), (15, 25))),
            ((4, 9, 27, 8), (3, 3, 8, 1), (1, 1), ((3, 4), (4, 2))),
            ((4, 31, 31, 7), (3, 3, 7, 1), (1, 1), ((0, 0), (0, 0))),
            ((3, 299, 299, 3), (3, 2, 3, 8), (2, 2), ((1, 2), (3, 5))),
            ((5, 183, 183, 1), (5, 5, 1, 2), (3, 3), ((3, 2), (1, 0))),
            ((5, 29, 31, 1), (5, 4, 1, 2), (1, 1), ((3, 2), (1, 0)), (2, 3)),
            ((4, 5, 5, 48), (3, 3, 48, 1), (1, 1), ((0, 2), (0, 2))),
            ((1, 8, 7, 2), (8, 7, 2, 1), (1, 1), ((0, 7), (3, 3))),
            ((2, 4, 3, 2), (3, 2, 2, 1), (1, 1), ((2, 0), (1, 0))),
            ((2, 5, 8, 1), (4, 4, 1, 2)),
            ((4, 5, 5, 1), (2, 2, 1, 2), (2, 2), "VALID"),
            ((2, 4, 4, 2), (3, 1, 2, 2)),
            ((1, 15, 15, 2), (1, 3, 2, 1)),
            ((2, 15, 16, 1), (3, 3, 1, 2), (3, 3), "VALID"),
            ((2, 5, 8, 1), (4, 3, 1, 2), (1, 1), "SAME", (1, 2)),
            ((1, 3, 1, 2), (2, 1, 2, 1)),
            ((2, 2, 3, 2), (2, 1, 2, 1)),
            ((2, 2, 3, 1), (2, 2, 1, 1)),
            ((2, 5, 8, 1), (4, 4, 1, 2), (1, 1), ((0, 1), (2, 3))),
            ((4, 5, 5, 1), (2, 2, 1, 2), (2, 2), ((3, 1), (5, 0))),
            ((2, 4, 4, 2), (3, 1, 2, 2), (1, 1), ((4, 1), (3, 4))),
            ((1, 15, 15, 2), (1, 3, 2, 1), (1, 1), ((3, 0), (2, 8))),
            ((2, 15, 16, 1), (3, 3, 1, 2), (3, 3), ((0, 0), (10, 0))),
            ((2, 5, 8, 1), (3, 4, 1, 2), (1, 1), ((3, 1), (2, 3)), (2, 1)),
            # compiler/tests, where they differ
            ((2, 5, 5, 48), (2, 2, 48, 8)),
            ((3, 299, 299, 3), (2, 2, 3, 8), (2, 2)),
            ((4, 6, 6, 48), (1, 1, 48, 2), (1, 1), "SAME", (2, 2)),
            ((4, 8, 8, 84), (1, 3, 84, 1), (1, 1), "SAME", (2, 2)),
            ((4, 36, 36, 2), (5, 5, 2, 1), (2, 2), "SAME", (4, 4)),
            ((4, 148, 148, 2), (4, 4, 2, 8), (2, 2), "SAME", (2, 2)),
            ((3, 300, 300, 3), (2, 2, 3, 8), (1, 1), "VALID", (4, 4)),
            # hand values, nn_grad_test
            ((1, 2, 3, 2), (2, 2, 2, 2), (1, 1), "VALID"),
            ((1, 4, 4, 3), (2, 2, 3, 2)),
        )
    )
)
# TensorFlow's determinism tests: 7x7, M=10 on 500x1000.
DETERMINISM = (
    Case("d9m_2_channels", (2, 500, 1000, 2), (7, 7, 2, 10)),
    Case("d9m_1_channel", (2, 500, 1000, 1), (7, 7, 1, 10)),
)
XLA = tuple(
    Case(f"xla{i}_{c}c_{k}x{k}", (n, hw, hw, c), (k, k, c, 1), padding=padding)
    for i, (c, hw, k, n, padding) in enumerate(
        (
            (128, 6, 3, 64, "VALID"),
            (256, 5, 3, 256, "VALID"),
            (256, 5, 2, 144, "VALID"),
            (144, 5, 3, 64, "VALID"),
            (144, 5, 2, 256, "VALID"),
            (8, 48, 17, 8, "VALID"),
            (128, 20, 6, 64, "VALID"),
            (64, 14, 12, 172, "VALID"),
            (16, 9, 4, 16, "VALID"),
            (128, 1, 2, 144, ((1, 1), (1, 1))),
            (256, 1, 2, 64, ((1, 1), (1, 1))),
            (256, 1, 2, 2, ((1, 1), (1, 1))),
            (144, 5, 3, 3, "VALID"),
            (8, 48, 17, 1, "VALID"),
            (16, 9, 5, 4, "VALID"),
        )
    )
)
FRAMEWORKS = (
    Case("keras_multiplier5", (2, 8, 8, 4), (2, 2, 4, 5), padding="VALID"),
    Case("keras_dilated", (2, 8, 8, 4), (2, 2, 4, 6), dilations=(2, 2)),
    Case("keras_strided", (2, 8, 8, 4), (2, 2, 4, 6), (2, 2), "VALID"),
    Case("torch_plain", (2, 6, 6, 4), (3, 3, 4, 1), padding="VALID"),
    Case("torch_multiplier", (2, 6, 6, 4), (3, 3, 4, 2), padding="VALID"),
    Case("torch_strides", (2, 6, 6, 4), (3, 3, 4, 1), (3, 2), "VALID"),
    Case("torch_padding", (2, 6, 6, 4), (3, 3, 4, 1), padding=((1, 1), (1, 1))),
    Case("torch_dilated", (2, 5, 5, 4), (2, 2, 4, 1), padding="VALID", dilations=(2, 2)),
    Case("torch_transposed", (2, 6, 6, 4), (3, 3, 4, 1), padding="VALID"),
    Case("torch_naive_groups", (2, 6, 6, 2), (3, 3, 2, 2), padding="VALID"),
    Case("torch_backward", (2, 4, 20, 2), (3, 5, 2, 1), padding="VALID"),
)
# Those of the benchmark, of a single image.
LAYERS = tuple(
    Case(
        layer.name,
        (1, *layer.sizes, layer.channels),
        (*layer.kernel, layer.channels, layer.multiplier),
        layer.strides,
        layer.padding,
    )
    for layer in layers.GROUPS["networks"]
)
