"""How an op is divided among devices: what each of them computes, and what they send each other.

XLA can't look into a kernel, and of lax's own convolutions it gathers some that it need not. So
where a program is partitioned, this tells it how. The factors that may be divided are the problems
g, the batch n, the channels c and the planes, rows and columns of the output, o, p and q, with
which those of the input go, d, h and w:

    forward, input_grad     each device has its part of the result and nothing is sent, but for
                            planes, rows and columns of the source that windows of a neighbour's
                            part meet
    filter_grad             likewise, and the sums of the devices that divide n, o, p and q are
                            added

Of two spatial axes there are no d and o, of one no h and p either.

A division that does not come out even, or that would need rows from beyond the neighbour, is not
made along that axis: there XLA gathers the operand, and the result is the same.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_dwbp import _compat, _select
from jax_dwbp._compat import Target
from jax_dwbp._spec import FILTER_GRAD, INPUT_GRAD, ConvSpec, Op, SpatialAxis

AnyMesh = Mesh | AbstractMesh

# The letters of the spatial axes of x, f and dy, and of what a stride leaves out of them.
_IN, _KERNEL, _OUT, _REST = "dhw", "trs", "opq", "zuv"
_SUMMED = f"n{_OUT}"  # by a filter gradient
# The factor that is divided with each axis; the others are not divided.
_FACTORS = {
    **{axis: axis for axis in f"gnc{_OUT}"},
    **dict(zip(_IN, _OUT, strict=True)),
    "k": "c",
}


def run(op: Op, spec: ConvSpec, target: Target, a: jax.Array, b: jax.Array) -> jax.Array:
    """`_select.run` in a program that XLA divides among several devices of one mesh."""

    def whole(a, b):
        return _select.run(op, spec, target, a, b)

    def part(spec, a, b):
        return _select.run(op, spec, Target(target.platform), a, b)

    axes = _all_axes(op, spec, a, b)

    def partition(mesh: Mesh, operands: Any, result: Any) -> tuple:
        given = [array.sharding.spec for array in (*operands, result)]
        divided = _divided(op, spec, axes, given, mesh)
        shardings = [NamedSharding(mesh, _spec(letters, divided)) for letters in axes.values()]

        def local(a: jax.Array, b: jax.Array) -> jax.Array:
            # XLA asks for the parts when it compiles, where float64 may be off.
            is_double = a.dtype.itemsize == 8
            with jax.enable_x64(True) if is_double else contextlib.nullcontext():
                return _local(op, spec, part, axes, divided, mesh, a, b)

        return mesh, local, shardings[-1], tuple(shardings[:-1])

    return _compat.partitioned(whole, partition, _rule(op, spec, axes))(a, b)


def fine_mesh(mesh: AbstractMesh) -> AbstractMesh:
    """`mesh` with each axis cut into axes of prime sizes, for Shardy may use a part of one."""
    axes = []
    for name, size in zip(mesh.axis_names, mesh.axis_sizes, strict=True):
        for prime in range(2, size + 1):
            while size % prime == 0:
                axes.append((f"{name}:{len(axes)}", prime))
                size //= prime
    names, sizes = zip(*axes, strict=True)
    return AbstractMesh(sizes, names)


def _primes(mesh: Mesh) -> dict[str, set[int]]:
    """Those that each axis of what `fine_mesh` was made of is a product of."""
    primes: dict[str, set[int]] = {}
    for name, prime in mesh.shape.items():
        primes.setdefault(name.rpartition(":")[0], set()).add(prime)
    return primes


def explicit(op: Op, spec: ConvSpec, part: Callable, a: jax.Array, b: jax.Array) -> jax.Array:
    """What `run` does where the types of a and b say how they are divided, or an error.

    A device calls `part(spec, a, b)` with what it has.
    """
    axes = _all_axes(op, spec, a, b)
    shardings = [jax.typeof(x).sharding for x in (a, b)]
    mesh, *others = {sharding.mesh for sharding in shardings if any(sharding.spec)}
    if others:
        raise ValueError(
            f"the operands of an op must be sharded over one mesh, got {mesh} and {others[0]}"
        )
    given = [sharding.spec for sharding in shardings]
    divided = _divided(op, spec, axes, given, mesh)
    *in_specs, out_spec = (_spec(letters, divided) for letters in axes.values())
    for have, needed in zip(given, in_specs, strict=True):
        if [*have] != [*needed]:
            raise NotImplementedError(
                f"the operands of an op may have explicit sharding of the batch, the channels and "
                f"the spatial axes, alike in both operands, in parts of one size that are not "
                f"smaller than what they need of each other; got {jax.typeof(a)} and "
                f"{jax.typeof(b)}. `jax.shard_map` and mesh axes of `AxisType.Auto` take any"
            )
    local = functools.partial(_local, op, spec, part, axes, divided, mesh)
    names = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = {name for name, kind in names if kind == AxisType.Explicit}
    return jax.shard_map(
        local, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_spec, axis_names=manual
    )(a, b)


def _all_axes(op: Op, spec: ConvSpec, a: jax.Array, b: jax.Array) -> dict[str, str]:
    """Those of the two operands and of the result."""
    result = len(spec.result_shape(op, a.shape, b.shape))
    arrays = zip((*op.operands, op.result), (a.ndim, b.ndim, result), strict=True)
    return {name: _axes(name, ndim, spec) for name, ndim in arrays}


def _spec(axes: str, divided: dict[str, tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(divided.get(_FACTORS.get(axis, "")) for axis in axes))


def _axes(name: str, ndim: int, spec: ConvSpec) -> str:
    """A letter for each axis of x, f or dy; k is c*M + m."""
    rank = len(spec.axes)
    if name == "f":
        axes = f"{_KERNEL[-rank:]}cm"
    else:
        spatial, lanes = (_IN, "c") if name == "x" else (_OUT, "k")
        axes = f"n{lanes}{spatial[-rank:]}" if spec.channels_first else f"n{spatial[-rank:]}{lanes}"
    return "g" * (ndim - len(axes)) + axes


def _factor(spec: ConvSpec, axis: int) -> str:
    """That of a spatial axis."""
    return _OUT[axis - len(spec.axes)]


def _rule(op: Op, spec: ConvSpec, axes: dict[str, str]) -> Callable[..., tuple[str, dict]]:
    """What makes shardings propagate: which axes of the three arrays go together."""

    def rule(mesh: Mesh, *types: Any) -> tuple[str, dict[str, Any]]:
        # Of an axis that a factor is but a part of, Shardy may divide the factor by part of a mesh
        # axis: the outer part, which `fine_mesh` has as axes if all its primes are the same. It
        # takes no part of size 1.
        divisible = all(len(primes) == 1 for primes in _primes(mesh).values())
        rank = len(spec.axes)
        factors = {axis: axis for axis in f"gn{_KERNEL}cm"}
        lanes = "(c m)" if divisible and spec.channels > 1 else "k"
        factors["k"] = "c" if spec.multiplier == 1 else lanes
        sizes = {}
        letters = (_IN[-rank:], _OUT[-rank:], _REST[-rank:])
        for axis, source, target, rest in zip(spec.axes, *letters, strict=True):
            factors[target] = factors[source] = target
            stride = axis.stride
            if axis.size != axis.out * stride or (stride > 1 and (axis.out == 1 or not divisible)):
                factors[source] = source  # parts of the two are not alike
            elif stride > 1:
                factors[source] = f"({target} {rest})"
                sizes[rest] = stride
        terms = [" ".join(factors[axis] for axis in letters) for letters in axes.values()]
        # In the order in which they first appear, as Shardy has them.
        present = dict.fromkeys(factor for factor in " ".join(terms) if factor.isalpha())
        return f"{terms[0]}, {terms[1]} -> {terms[2]}", {
            "reduction_factors": tuple(f for f in present if f in _SUMMED and op == FILTER_GRAD),
            "need_replication_factors": tuple(f for f in present if f in f"{_KERNEL}m{_REST}"),
            **sizes,
        }

    return rule


def _divided(
    op: Op, spec: ConvSpec, axes: dict[str, str], given: list[PartitionSpec], mesh: AnyMesh
) -> dict[str, tuple[str, ...]]:
    """The mesh axes that divide each factor: of what the arrays are given, those of the result
    first, what can be divided so."""
    divided: dict[str, tuple[str, ...]] = {}
    for letters, entries in reversed([*zip(axes.values(), given, strict=False)]):
        for axis, entry in zip(letters, entries, strict=False):
            factor = _FACTORS.get(axis)
            mesh_axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
            used = {used for others in divided.values() for used in others}
            if factor is None or factor in divided or not mesh_axes or used & set(mesh_axes):
                continue
            parts = _parts(mesh, mesh_axes)
            if factor == "c" and spec.channels % parts:
                continue
            if factor in _OUT:
                spatial_axis = spec.axes[_OUT.index(factor) - len(_OUT)]
                if _Window.of(op, spatial_axis, parts) is None:
                    continue
            divided[factor] = mesh_axes
    return divided


def _parts(mesh: AnyMesh, mesh_axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes)


class _Window(NamedTuple):
    """What the parts of a divided axis read of the source, and compute from it.

    Part d owns the rows d*owned, ... of the source, reads `count` of them from starts[d] on, zeros
    where there are none, and computes a result of which the first skipped[d] rows are another's.
    """

    owned: int
    left: int  # rows of the neighbours on either side, at most
    right: int
    starts: list[int]
    count: int
    skipped: list[int]
    rows: int  # of the result, or 0 if it is not divided
    axis: SpatialAxis  # what a part computes

    @classmethod
    def of(cls, op: Op, axis: SpatialAxis, parts: int) -> "_Window | None":
        """None if the axis can't be divided into so many parts."""
        size, out, stride, reach, (low, _) = axis.size, axis.out, axis.stride, axis.reach, axis.pads
        if size % parts or out % parts:
            return None
        if op == INPUT_GRAD:
            rows, owned, total = size // parts, out // parts, out
            # Every part starts at the same phase, so that one program serves all of them.
            firsts = [part * rows // stride * stride for part in range(parts)]
            skipped = [part * rows - first for part, first in enumerate(firsts)]
            computed = rows + max(skipped)
            starts = [(first + low - reach) // stride for first in firsts]
            low -= stride * ((low - reach) // stride)
            count = (low + computed - 1) // stride + 1
            high = max(0, (count - 1) * stride + reach + 1 - computed - low)
            local = axis._replace(size=computed, out=count, pads=(low, high))
        else:
            rows, owned, total = out // parts, size // parts, size
            starts = [part * rows * stride - low for part in range(parts)]
            count = (rows - 1) * stride + reach + 1
            skipped = [0] * parts
            local = axis._replace(size=count, out=rows, pads=(0, 0))
        ends = [min(start + count, total) for start in starts]
        left = max(part * owned - max(start, 0) for part, start in enumerate(starts))
        right = max(end - (part + 1) * owned for part, end in enumerate(ends))
        if max(left, right) > owned:
            return None
        return cls(owned, max(left, 0), max(right, 0), starts, count, skipped, rows, local)

    def read(self, x: jax.Array, axis: int, mesh_axes: tuple[str, ...], mesh: AnyMesh) -> jax.Array:
        """The rows that this device reads, of those that it owns and its neighbours'."""
        # `ppermute` numbers devices in the order of the mesh, whatever that of its axes.
        ordered = tuple(name for name in mesh.axis_names if name in mesh_axes)
        numbers = np.arange(len(self.starts)).reshape([mesh.shape[name] for name in ordered])
        devices = numbers.transpose([ordered.index(name) for name in mesh_axes]).ravel().tolist()
        own, neighbours = x, list(itertools.pairwise(devices))
        if self.left:
            rows = lax.slice_in_dim(own, self.owned - self.left, self.owned, axis=axis)
            rows = lax.ppermute(rows, ordered, neighbours)
            x = lax.concatenate([rows, x], axis)
        if self.right:
            rows = lax.slice_in_dim(own, 0, self.right, axis=axis)
            rows = lax.ppermute(rows, ordered, [(right, left) for left, right in neighbours])
            x = lax.concatenate([x, rows], axis)
        # Rows that a device was sent by nobody are zeros, and so are those beyond the neighbours'.
        offsets = [start - part * self.owned + self.left for part, start in enumerate(self.starts)]
        before = max(0, -min(offsets))
        after = max(0, max(offsets) + self.count - x.shape[axis])
        config = [(0, 0, 0)] * x.ndim
        config[axis] = (before, after, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
        return _slice(x, axis, mesh_axes, [offset + before for offset in offsets], self.count)


def _slice(
    x: jax.Array, axis: int, mesh_axes: tuple[str, ...], starts: list[int], count: int
) -> jax.Array:
    """`count` rows of x from the one on that `starts` has for this device."""
    if len(set(starts)) == 1:
        return lax.slice_in_dim(x, starts[0], starts[0] + count, axis=axis)
    start = jnp.asarray(starts, "int32")[lax.axis_index(mesh_axes)]
    return lax.dynamic_slice_in_dim(x, start, count, axis)


def _position(axes: str, factor: str) -> int:
    """That of the axis that is divided with a factor."""
    return next(i for i, axis in enumerate(axes) if _FACTORS.get(axis) == factor)


def _local(
    op: Op,
    spec: ConvSpec,
    part: Callable,
    axes: dict[str, str],
    divided: dict[str, tuple[str, ...]],
    mesh: AnyMesh,
    a: jax.Array,
    b: jax.Array,
) -> jax.Array:
    """The part of the result that a device has, from its parts of the operands."""
    operands = dict(zip(op.operands, (a, b), strict=True))
    windows = {}
    spatial_axes = list(spec.axes)
    for i in range(len(spec.axes)):
        factor = _factor(spec, i)
        if factor not in divided:
            continue
        window = _Window.of(op, spec.axes[i], _parts(mesh, divided[factor]))
        assert window is not None  # or it would not be divided
        windows[factor], spatial_axes[i] = window, window.axis
        source = op.source
        position = _position(axes[source], factor)
        operands[source] = window.read(operands[source], position, divided[factor], mesh)
    spec = dataclasses.replace(
        spec,
        channels=spec.channels // _parts(mesh, divided.get("c", ())),
        axes=tuple(spatial_axes),
    )
    summed = [axis for factor in _SUMMED for axis in divided.get(factor, ())]
    dtype = a.dtype
    if op == FILTER_GRAD and summed and dtype.itemsize < 4:
        # So that the sum of the devices is rounded once.
        operands = {name: x.astype("float32") for name, x in operands.items()}
    result = part(spec, *operands.values())
    if op == FILTER_GRAD:
        return (lax.psum(result, tuple(summed)) if summed else result).astype(dtype)
    for factor, window in windows.items():
        position = _position(axes[op.result], factor)
        result = _slice(result, position, divided[factor], window.skipped, window.rows)
    return result
