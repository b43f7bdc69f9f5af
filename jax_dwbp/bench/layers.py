"""What is timed: layers of networks, and what the contestants of a row compute."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np

OPS = ("forward", "input_grad", "filter_grad", "step")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A depthwise convolution of a network, for any batch.

    The pad after may not be larger than the pad before, of which PyTorch is told.
    """

    name: str
    height: int
    width: int
    channels: int
    multiplier: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]


def _square(network: str, size: int, channels: int, kernel: int, stride=1, multiplier=1) -> Layer:
    """A square layer, padded alike at both ends: PyTorch lacks "SAME" with a stride."""
    name = f"{network} {size}x{size}x{channels} k{kernel} s{stride}"
    if multiplier > 1:
        name += f" m{multiplier}"
    pads = (kernel // 2, kernel // 2)
    return Layer(name, size, size, channels, multiplier, (kernel, kernel), stride, (pads, pads))


LAYERS = (
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
    Layer("mamba 1x1024x1536 k1x4 s1", 1, 1024, 1536, 1, (1, 4), 1, ((0, 0), (3, 0))),
    _square("strided", 28, 192, 5, stride=2),
    _square("odd", 28, 67, 3),
    _square("multiplier", 56, 32, 3, multiplier=2),
    _square("multiplier", 28, 16, 3, multiplier=8),
)


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
    def output(self) -> tuple[int, int]:
        layer = self.layer
        sizes = zip((layer.height, layer.width), layer.padding, layer.kernel, strict=True)
        p, q = ((size + sum(pads) - kernel) // layer.stride + 1 for size, pads, kernel in sizes)
        return p, q

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of x, f and dy."""
        layer, c, m = self.layer, self.layer.channels, self.layer.multiplier
        x = (self.batch, layer.height, layer.width, c)
        return x, (*layer.kernel, c, m), (self.batch, *self.output, c * m)

    @property
    def terms(self) -> list[int]:
        """The length of the sum in an element, for each of the results."""
        r, s, _, m = self.shapes[1]
        terms = {
            "forward": r * s,
            "input_grad": r * s * m,
            "filter_grad": self.batch * math.prod(self.output),
        }
        return list(terms.values()) if self.op == "step" else [terms[self.op]]

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
