"""Products of spectra, for filters that are so large that sums over their taps take longer.

Along an axis windows reach n = (P - 1) * stride + reach + 1 places, those of the padded input. With
the filter and dy stretched by zeros to steps of one, each op is a convolution or a correlation of
which n places determine what is wanted, so transforms of n points or more do not wrap around:

    forward       y[p]  = (x * f~)[stride * p]        x as it is padded, f~ the filter reversed
    input_grad    dx[h] = (dy * f)[h + low]
    filter_grad   df[k] = (x * dy~)[dilation * k]     summed over the images, as spectra

A last axis that is much longer than the filter is cut to blocks of the output, which are images of
their own. What they read of the input overlaps.

The error is that of a sum in which all of an image counts, be it near or far: relative to the
largest values of the image and of the filter, it grows with the logarithm of n. An infinity or a
NaN in an image, or in a filter, is one in all that comes of it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_dwbp._impl import Implementation
from jax_dwbp._impl.taps import widen
from jax_dwbp._spec import ConvSpec, Op, SpatialAxis

# Points of a transform, all axes together, at most: a spectrum of 4 GB in float32.
_MOST_POINTS = 2**30
# Points of a block for each that the filter spans, and at least: of 65,536 places with 1,024 taps
# the transforms take 0.4 of the time so, with 16 channels 0.65.
_BLOCK, _LEAST_BLOCK = 4, 1024
# Where it is as fast as native_cpu, on 2 cores with AVX-512, in float32: forward and input gradient
# from 40 to 65 on with few channels (4,096 places with 512 to 1,024 taps, 64x64 with 33x33), from
# 80 to 150 on with 16 to 256 (4,096 places with 3,000 taps, 64x64 with 50x50); the filter gradient
# from half of that on. xla_taps takes 10 times as long as native_cpu, or more.
_FEW_CHANNELS = 8
_GAIN_OF_FEW, _GAIN = 45, 100
_GAIN_OF_TAPS = 5


def unsupported(
    op: Op, spec: ConvSpec, platform: str | None, *operands: jax.ShapeDtypeStruct
) -> str | None:
    if spec.are_integers:
        return "it rounds, and sums of integers are exact"
    blocks = _blocks(spec)
    points = _all_points(blocks.spec if blocks else spec)
    if points > _MOST_POINTS:
        return f"its transforms have at most 2**30 points, got {points}"
    return None


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    if blocks := _blocks(spec):
        return blocks.joined(forward(blocks.spec, blocks.read(x), f))
    images = _of_images(spec, x)
    filters = _of_filters(spec, f)
    y = _places(spec, images * jnp.conj(filters), spec.out_spatial, spec.window_strides)
    y = y.reshape(*y.shape[:2], -1, *y.shape[4:])
    return jnp.moveaxis(y, 2, -1).astype(x.dtype)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    if blocks := _blocks(spec):
        dx = input_grad(blocks.spec, widen(f), widen(blocks.cut(dy)))
        return blocks.added(dx).astype(dy.dtype)
    filters = _of_filters(spec, f)
    gradients = _of_gradients(spec, dy)
    steps = (1,) * len(spec.axes)
    sizes = [_reached(axis) for axis in spec.axes]
    dx = _places(spec, jnp.sum(gradients * filters, 3), sizes, steps)
    config = [(0, 0, 0)] * 3 + [
        (-axis.pads[0], axis.size + axis.pads[0] - _reached(axis), 0) for axis in spec.axes
    ]
    dx = lax.pad(dx, jnp.zeros((), dx.dtype), config)
    return jnp.moveaxis(dx, 2, -1).astype(dy.dtype)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    if blocks := _blocks(spec):
        return filter_grad(blocks.spec, blocks.read(x), blocks.cut(dy))
    images = _of_images(spec, x)
    gradients = _of_gradients(spec, dy)
    sums = jnp.sum(images * jnp.conj(gradients), 1)
    df = _places(spec, sums, spec.kernel_spatial, spec.rhs_dilation)
    return jnp.moveaxis(df, (1, 2), (-2, -1)).astype(x.dtype)


class _Blocks(NamedTuple):
    """How the last axis of an op is cut, and the op of a block. An image is `count` of them."""

    whole: SpatialAxis
    count: int
    spec: ConvSpec

    @property
    def step(self) -> int:
        """From what a block reads to what the next one does."""
        return self.spec.axes[-1].out * self.whole.stride

    @property
    def length(self) -> int:
        """Of what a block reads, which may be less than a step, but is at most two."""
        return self.spec.axes[-1].size

    def read(self, x: jax.Array) -> jax.Array:
        """The places that each block reads of the input."""
        low, size = self.whole.pads[0], (self.count + 1) * self.step
        x = _resized(x, low, size)
        own, others = (
            self._rows(lax.slice_in_dim(x, first, first + self.count * self.step, axis=-2))
            for first in (0, self.step)
        )
        both = lax.concatenate([own, others], own.ndim - 2)
        return self._images(lax.slice_in_dim(both, 0, self.length, axis=-2))

    def cut(self, dy: jax.Array) -> jax.Array:
        """The part of the output that is each block's."""
        return self._images(self._rows(_resized(dy, 0, self.count * self.spec.axes[-1].out)))

    def joined(self, y: jax.Array) -> jax.Array:
        """The output, of which each block has a part."""
        return lax.slice_in_dim(self._joined(y), 0, self.whole.out, axis=-2)

    def added(self, dx: jax.Array) -> jax.Array:
        """The sum of what the blocks say of the places that they read."""
        dx = _resized(dx, 0, 2 * self.step)
        own, others = (
            self._joined(lax.slice_in_dim(dx, first, first + self.step, axis=-2))
            for first in (0, self.step)
        )
        size = (self.count + 1) * self.step
        dx = _resized(own, 0, size) + _resized(others, self.step, size)
        return _resized(dx, -self.whole.pads[0], self.whole.size)

    def _rows(self, x: jax.Array) -> jax.Array:
        """[..., count * L, C] as [..., count, L, C]."""
        return x.reshape(*x.shape[:-2], self.count, -1, x.shape[-1])

    def _images(self, x: jax.Array) -> jax.Array:
        """[G, N, ..., count, L, C] as [G, N * count, ..., L, C]."""
        x = jnp.moveaxis(x, -3, 2)
        return x.reshape(x.shape[0], x.shape[1] * self.count, *x.shape[3:])

    def _joined(self, x: jax.Array) -> jax.Array:
        """[G, N * count, ..., L, C] as [G, N, ..., count * L, C]."""
        x = x.reshape(x.shape[0], x.shape[1] // self.count, self.count, *x.shape[2:])
        x = jnp.moveaxis(x, 2, -3)
        return x.reshape(*x.shape[:-3], self.count * x.shape[-2], x.shape[-1])


def _blocks(spec: ConvSpec) -> _Blocks | None:
    """If there are several."""
    *others, axis = spec.axes
    points = max(_BLOCK * (axis.reach + 1), _LEAST_BLOCK)
    out = (points - axis.reach - 1) // axis.stride + 1
    count = -(-axis.out // out)
    if count < 3:
        return None
    block = axis._replace(size=(out - 1) * axis.stride + axis.reach + 1, out=out, pads=(0, 0))
    return _Blocks(axis, count, dataclasses.replace(spec, axes=(*others, block)))


def _resized(x: jax.Array, before: int, size: int) -> jax.Array:
    """With so many zeros before the last axis but one, or less of it, and of that size."""
    config = [(0, 0, 0)] * x.ndim
    config[-2] = (before, size - before - x.shape[-2], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _all_points(spec: ConvSpec) -> int:
    return math.prod(_points(axis) for axis in spec.axes)


def _reached(axis: SpatialAxis) -> int:
    """The places that windows reach."""
    return (axis.out - 1) * axis.stride + axis.reach + 1


def _points(axis: SpatialAxis) -> int:
    """Of its transforms: a product of twos, threes and fives, for which they are quick."""
    needed = max(_reached(axis), 1)
    points, five = 1 << (needed - 1).bit_length(), 1
    while five < points:
        three = five
        while three < points:
            twos = (-(-needed // three) - 1).bit_length()
            points = min(points, three << twos)
            three *= 3
        five *= 5
    return points


def _of_images(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """Spectra [G,N,C,1,points], from the first place that windows reach, with zeros behind x."""
    x = jnp.moveaxis(widen(x), -1, 2)
    config = [(0, 0, 0)] * 3 + [(axis.pads[0], 0, 0) for axis in spec.axes]
    return _spectra(spec, lax.pad(x, jnp.zeros((), x.dtype), config))[:, :, :, None]


def _of_filters(spec: ConvSpec, f: jax.Array) -> jax.Array:
    """Spectra [G,1,C,M,points]."""
    f = jnp.moveaxis(widen(f), (-2, -1), (1, 2))
    return _spectra(spec, _stretched(f, spec.rhs_dilation))[:, None]


def _of_gradients(spec: ConvSpec, dy: jax.Array) -> jax.Array:
    """Spectra [G,N,C,M,points]."""
    dy = widen(dy).reshape(*dy.shape[:-1], spec.channels, spec.multiplier)
    dy = jnp.moveaxis(dy, (-2, -1), (2, 3))
    return _spectra(spec, _stretched(dy, spec.window_strides))


def _stretched(x: jax.Array, steps: Sequence[int]) -> jax.Array:
    """With zeros between the places of its last axes."""
    others = [(0, 0, 0)] * (x.ndim - len(steps))
    return lax.pad(x, jnp.zeros((), x.dtype), others + [(0, 0, step - 1) for step in steps])


def _spectra(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """Of the last axes."""
    return jnp.fft.rfftn(x, *_transform(spec))


def _places(
    spec: ConvSpec, spectra: jax.Array, sizes: Sequence[int], steps: Sequence[int]
) -> jax.Array:
    """So many places of what has the spectra, in such steps from the first."""
    x = jnp.fft.irfftn(spectra, *_transform(spec))
    others = x.ndim - len(spec.axes)
    ends = [(size - 1) * step + 1 for size, step in zip(sizes, steps, strict=True)]
    return lax.slice(x, (0,) * x.ndim, (*x.shape[:others], *ends), (*(1,) * others, *steps))


def _transform(spec: ConvSpec) -> tuple[list[int], list[int]]:
    """The points and the axes of it, without the axes that have one point, if there are others."""
    points = {axis - len(spec.axes): _points(sizes) for axis, sizes in enumerate(spec.axes)}
    axes = [axis for axis in points if points[axis] > 1] or [-1]
    return [points[axis] for axis in axes], axes


def _products(axis: SpatialAxis) -> int:
    """Of a row, less those that meet padding: a tap meets so many places, a place so many taps."""
    places = min(axis.out, -(-axis.size // axis.stride))
    taps = min(axis.kernel, -(-axis.size // axis.dilation))
    return min(axis.kernel * places, axis.out * taps)


def _rank(spec: ConvSpec, platform: str | None) -> int:
    if platform != "cpu":
        return 5
    if "highest" in (spec.precision if isinstance(spec.precision, tuple) else (spec.precision,)):
        return 2
    count, block = 1, spec
    if blocks := _blocks(spec):
        count, block = blocks.count, blocks.spec
    points = _all_points(block)
    # What a sum over the taps multiplies, for each point and each halving of the transform.
    products = math.prod(map(_products, spec.axes))
    gain = products / (count * points * max(math.log2(points), 1))
    are_few = spec.channels < _FEW_CHANNELS and not spec.channels_first
    if gain > (_GAIN_OF_FEW if are_few else _GAIN):
        return -1
    return 1 if gain > _GAIN_OF_TAPS else 2


IMPLEMENTATION = Implementation(
    name="fft",
    unsupported=unsupported,
    rank=_rank,
    forward=forward,
    input_grad=input_grad,
    filter_grad=filter_grad,
    is_opaque=True,  # XLA gathers what it transforms
)
