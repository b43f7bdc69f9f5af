"""An op of three spatial axes by one of two: planes of the depth are images, and what the taps of
the depth give is summed in float32 or better.

`of_planes` is the op of two axes, of one implementation.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_dwbp._impl.taps import Axis, Tap, axes, looped_sum, pairwise, strided, widen
from jax_dwbp._spec import FILTER_GRAD, FORWARD, INPUT_GRAD, ConvSpec

# Taps of the depth, of all phases, beyond which they are looped over, as XLA compiles each of them.
_UNROLLED = 3

OfPlanes = Callable[[ConvSpec, jax.Array, jax.Array], jax.Array]


def forward(of_planes: OfPlanes, spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    depth, wide_f = axes(FORWARD, spec)[0], widen(f)

    def term(k, planes):
        return of_planes(_of_plane(spec), planes, _tap(wide_f, k))

    shape = *x.shape[:2], *spec.out_spatial, spec.channels * spec.multiplier
    return _sum(depth, depth.phases[0], widen(x), term, shape).astype(x.dtype)


def input_grad(of_planes: OfPlanes, spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    depth, wide_f, wide_dy = axes(INPUT_GRAD, spec)[0], widen(f), widen(dy)

    def term(k, planes):
        return of_planes(_of_plane(spec), _tap(wide_f, k), planes)

    shape = *dy.shape[:2], depth.count, *spec.in_spatial[1:], spec.channels
    phases = [_sum(depth, taps, wide_dy, term, shape) for taps in depth.phases]
    dx = jnp.stack(phases, 3).reshape(*dy.shape[:2], -1, *shape[3:])
    return dx[:, :, : depth.result].astype(dy.dtype)


def filter_grad(of_planes: OfPlanes, spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    depth = axes(FILTER_GRAD, spec)[0]
    taps, wide_dy = depth.phases[0], _folded(widen(dy))
    size, *window = spec.kernel_spatial
    if not taps:
        return jnp.zeros((x.shape[0], size, *window, spec.channels, spec.multiplier), x.dtype)
    planes = _planes(depth, taps, widen(x))

    def term(i):
        return of_planes(_of_plane(spec), planes(i), wide_dy)

    if len(taps) <= _UNROLLED:
        df = jnp.stack([term(i) for i in range(len(taps))], 1)
    else:
        df = jnp.moveaxis(lax.map(term, jnp.arange(len(taps))), 0, 1)
    # Taps that only ever met the padding have no gradient.
    unused = (taps[0].k, size - 1 - taps[-1].k)
    pads = [unused if axis == 1 else (0, 0) for axis in range(df.ndim)]
    return jnp.pad(df, pads).astype(x.dtype)


def _of_plane(spec: ConvSpec) -> ConvSpec:
    return dataclasses.replace(spec, axes=spec.axes[1:])


def _tap(f: jax.Array, k) -> jax.Array:
    """[G,T,R,S,C,M] as [G,R,S,C,M]."""
    return strided(f, k, 1, 1, axis=1).reshape(f.shape[0], *f.shape[2:])


def _folded(x: jax.Array) -> jax.Array:
    """[G,N,D,H,W,C] as [G,N*D,H,W,C]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _planes(depth: Axis, taps: list[Tap], source: jax.Array) -> Callable:
    """What tap i, be it traced, reads of the source, as images: zeros where there is no plane."""
    span = (depth.count - 1) * depth.step + 1
    offsets = [tap.offset for tap in taps]
    low, high = max(0, -min(offsets)), max(0, max(offsets) + span - depth.source)
    config = [(low, high, 0) if axis == 2 else (0, 0, 0) for axis in range(source.ndim)]
    padded = lax.pad(source, jnp.zeros((), source.dtype), config)

    def planes(i) -> jax.Array:
        offset = _at(offsets, i) + low
        return _folded(strided(padded, offset, depth.count, depth.step, axis=2))

    return planes


def _sum(
    depth: Axis, taps: list[Tap], source: jax.Array, term: Callable, shape: tuple[int, ...]
) -> jax.Array:
    """The sum of term(k, planes) over the taps of a phase, with the images as planes again."""
    zeros = lax.full_like(source, 0, shape=shape)
    if not taps:
        return zeros
    planes, ks = _planes(depth, taps, source), [tap.k for tap in taps]

    def of_tap(i) -> jax.Array:
        return term(_at(ks, i), planes(i)).reshape(shape)

    if len(depth.phases) * len(taps) <= _UNROLLED:
        return pairwise([of_tap(i) for i in range(len(taps))])
    return looped_sum(len(taps), of_tap, zeros)


def _at(spaced: list[int], i):
    """The i-th of numbers that are evenly spaced."""
    return spaced[0] + i * (spaced[1] - spaced[0]) if len(spaced) > 1 else spaced[0]
