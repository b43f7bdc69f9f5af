"""What is timed: rows of layers by groups, and what the contestants of a row compute."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

# What each op has as results, out of x, f and y or the gradients by them.
_RESULTS = {"forward": "y", "input_grad": "x", "filter_grad": "f", "step": "yxf"}
OPS = tuple(_RESULTS)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A depthwise convolution, and with what it is timed unless the command line says otherwise.

    The pad after may not be larger than the pad before, of which PyTorch is told.
    """

    name: str
    sizes: tuple[int, ...]  # of two spatial axes, or of three
    channels: int
    multiplier: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    batch: int = 8
    dtypes: tuple[str, ...] = ("float32",)
    data_format: Literal["NHWC", "NCHW"] = "NHWC"
    problems: int = 1  # of a vmap, each with a filter of its own


def _layer(
    prefix: str,
    image: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    multiplier: int = 1,
    **options: Any,
) -> Layer:
    """A layer, padded alike at both ends by default: PyTorch lacks "SAME" with a stride."""
    *sizes, channels = image
    strides = (stride,) * len(sizes) if isinstance(stride, int) else stride
    window, steps = (
        values[0] if len(set(values)) == 1 else "x".join(map(str, values))
        for values in (kernel, strides)
    )
    name = f"{prefix} {'x'.join(map(str, image))} k{window} s{steps}"
    if multiplier > 1:
        name += f" m{multiplier}"
    options = {"padding": tuple(((k - 1) // 2,) * 2 for k in kernel), **options}
    return Layer(name, tuple(sizes), channels, multiplier, kernel, strides, **options)


def _square(prefix: str, size: int, channels: int, kernel: int, **options: Any) -> Layer:
    return _layer(prefix, (size, size, channels), (kernel, kernel), **options)


_HALF: Any = {"dtypes": ("bfloat16", "float16")}
_NCHW: Any = {"data_format": "NCHW"}
_CAUSAL: Any = {"padding": ((0, 0), (3, 0))}
GROUPS = {
    "networks": (
        _square("mobilenetv2", 112, 32, 3),
        _square("mobilenetv2", 112, 96, 3, stride=2),
        _square("mobilenetv2", 56, 144, 3),
        _square("mobilenetv2", 14, 576, 3),
        _square("mobilenetv2", 7, 960, 3),
        _square("efficientnet-b0", 56, 144, 5, stride=2),
        _square("efficientnet-b0", 28, 240, 5),
        _square("efficientnet-b0", 14, 672, 5),
        _square("efficientnet-b0", 7, 1152, 5),
        _square("convnext-t", 56, 96, 7),
        _square("convnext-t", 28, 192, 7),
        _square("convnext-t", 14, 384, 7),
        _square("convnext-t", 7, 768, 7),
        _square("replknet-31b", 28, 128, 31),  # 56x56 there, four times the work
        _square("replknet-31b", 7, 1024, 13),
        _layer("mamba", (1, 1024, 1536), (1, 4), **_CAUSAL),
        _square("strided", 28, 192, 5, stride=2),
        _square("odd", 28, 67, 3),
        _square("multiplier", 56, 32, 3, multiplier=2),
        _square("multiplier", 28, 16, 3, multiplier=8),
    ),
    "pictures": (
        _square("picture", 512, 3, 11, batch=1),
        _square("picture", 1024, 1, 5, batch=1),
        _layer("picture", (256, 256, 3), (1, 21)),
        _square("picture", 256, 3, 3),
        _square("picture", 256, 3, 3, stride=2),
        _square("picture", 224, 3, 3, stride=2, multiplier=8, batch=1),
        _square("picture", 128, 1, 5, multiplier=16),
        _square("picture", 64, 8, 3, batch=16),
    ),
    "sound": (
        _layer("sound", (1, 16000, 8), (1, 16), stride=2, batch=16),
        _layer("sound", (1, 4096, 64), (1, 64), batch=4, padding=((0, 0), (32, 31))),
        _layer("sound", (1, 1024, 1536), (1, 4), **_CAUSAL),
    ),
    "nchw": (
        _square("nchw", 56, 144, 3, **_NCHW),
        _square("nchw", 28, 192, 5, stride=2, **_NCHW),
        _square("nchw", 112, 32, 3, batch=1, **_NCHW),
        _square("nchw", 112, 96, 3, stride=2, **_NCHW),
    ),
    "half": (
        _square("half", 56, 144, 3, **_HALF),
        _square("half", 14, 576, 3, **_HALF),
        _square("half", 28, 192, 7, **_HALF),
    ),
    "volumes": (
        _layer("volume", (8, 28, 28, 32), (3, 3, 3), batch=2),
        _layer("volume", (16, 56, 56, 24), (3, 3, 3), (1, 2, 2), batch=1),
        _layer("volume", (8, 14, 14, 192), (5, 5, 5), batch=2),
        _layer("volume", (32, 32, 32, 8), (3, 3, 3), batch=1),
        _layer("volume", (64, 64, 64, 1), (5, 5, 5), batch=1),
        _layer("nchw volume", (8, 28, 28, 32), (3, 3, 3), batch=2, **_NCHW),
    ),
    "double": (_square("double", 512, 1, 3, batch=1, dtypes=("float64",)),),
    "problems": (
        _square("64 problems", 32, 1, 3, batch=1, problems=64),
        _square("256 problems", 16, 3, 5, batch=1, problems=256),
        _square("1000 problems", 8, 1, 3, batch=1, problems=1000),
    ),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What the contestants of one row compute."""

    layer: Layer
    op: str
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}, batch {self.batch}, {self.dtype}, {self.layer.name}"

    @functools.cached_property
    def output(self) -> tuple[int, ...]:
        layer = self.layer
        axes = zip(layer.sizes, layer.padding, layer.kernel, layer.strides, strict=True)
        return tuple((n + sum(pads) - kernel) // step + 1 for n, pads, kernel, step in axes)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of x, f and dy."""
        layer, c, m = self.layer, self.layer.channels, self.layer.multiplier
        x, dy = (*layer.sizes, c), (*self.output, c * m)
        if layer.data_format == "NCHW":
            x, dy = (x[-1:] + x[:-1], dy[-1:] + dy[:-1])
        shapes = (self.batch, *x), (*layer.kernel, c, m), (self.batch, *dy)
        return tuple((layer.problems, *s) for s in shapes) if layer.problems > 1 else shapes

    @property
    def terms(self) -> list[int]:
        """The length of the sum in an element, for each of the results."""
        taps = math.prod(self.layer.kernel)
        terms = {
            "y": taps,
            "x": taps * self.layer.multiplier,
            "f": self.batch * math.prod(self.output),
        }
        return [terms[name] for name in _RESULTS[self.op]]

    # Each op works on arrays of the shapes of x, f and dy, in one role or another, and multiplies
    # each element of dy once for each tap: so the floors of the three are the same.

    @property
    def bytes(self) -> int:
        return len(self.terms) * sum(map(math.prod, self.shapes)) * jnp.dtype(self.dtype).itemsize

    @property
    def multiply_adds(self) -> int:
        return len(self.terms) * math.prod(self.shapes[2]) * math.prod(self.layer.kernel)

    def operands(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [rng.uniform(-1, 1, shape).astype(jnp.dtype(self.dtype)) for shape in self.shapes]

    def folded_operands(self, arrays: Iterable[Any]) -> list[np.ndarray]:
        """x, f and dy as peers get them: see `_folded`."""
        return list(map(self._folded, "xfy", arrays))

    def folded_results(self, arrays: Iterable[Any]) -> list[np.ndarray]:
        return list(map(self._folded, _RESULTS[self.op], arrays))

    def _folded(self, name: str, array: Any) -> np.ndarray:
        """`array` in NHWC or [R, S, C, M], or these of three spatial axes, where the channels are
        those of all problems.

        For problems with filters of their own are what channels are: one convolution of them all.
        """
        array = np.asarray(array)
        array = array.reshape(self.layer.problems, *array.shape[-len(self.layer.sizes) - 2 :])
        if name == "f":
            array = np.moveaxis(array, 0, -3)
            return array.reshape(*array.shape[:-3], -1, array.shape[-1])
        if self.layer.data_format == "NCHW":
            array = np.moveaxis(array, 2, -1)
        array = np.moveaxis(array, 0, -2)
        return array.reshape(*array.shape[:-2], -1)

    def check(self, name: str, got: list[np.ndarray], reference: str, want: list[np.ndarray]):
        """Raises `Mismatch` unless the results are equal to rounding.

        The products are below 1 and err by eps each, their sum grows like a random walk, and as one
        chain of additions errs by eps of that at each step: with 5 sigma, in all at most
        2 sqrt(terms) + terms / 4. Each of the two results is rounded to its dtype once more.
        """
        last = float(jnp.finfo(self.dtype).eps)
        eps = min(last, float(jnp.finfo(jnp.float32).eps))
        for a, b, terms in zip(got, want, self.terms, strict=True):
            a, b = a.astype(np.float64), b.astype(np.float64)
            allowed = eps * (2 * math.sqrt(terms) + terms / 4) + last * abs(b)
            worst = np.max(abs(a - b) / (2 * allowed)) if a.shape == b.shape else math.inf
            if not worst <= 1:  # nor is NaN
                raise Mismatch(f"{self}: {name} - {reference} is {worst:.3g} of what is allowed")


class Mismatch(Exception):
    pass
