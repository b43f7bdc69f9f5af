"""Runs Pallas kernels with NumPy, in a tenth of the time that XLA takes to compile them for a CPU.

    got = run(function, *arrays)

The function is traced, and what it is made of, kernels included, is computed step by step. It is
stricter than Pallas' own interpreter, which moves an index that is out of bounds into them: here
that raises `OutOfBounds`. What no one has written yet, and what a block has beyond its array, is
NaN. Masked elements may lie out of bounds, and have no value.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class OutOfBounds(IndexError):
    """A kernel reads or writes what is not in its block."""


def run(function: Callable, *arrays) -> Any:
    """The one result of `function`, a function of jax.numpy and Pallas."""
    closed = jax.make_jaxpr(function)(*arrays)
    with np.errstate(all="ignore"):
        [result] = _evaluate(closed.jaxpr, [*closed.consts, *map(np.asarray, arrays)], ())
    return result


def _evaluate(jaxpr: Any, arguments: list[Any], ids: tuple[int, ...]) -> list[Any]:
    """The results of a jaxpr. References are the arrays that they are of."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

    def read(atom):
        return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in _NESTED:
            results = _NESTED[name](operands, ids, **eqn.params)
        elif name == "program_id":
            results = [np.int32(ids[eqn.params["axis"]])]
        elif name in _OPERATIONS:
            results = [_OPERATIONS[name](*operands, **eqn.params)]
        else:  # JAX knows
            results = eqn.primitive.bind(*operands, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
            results = [np.asarray(result) for result in results]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


# ---- What has programs within.


def _call(operands, ids, *, jaxpr, **_):
    return _evaluate(jaxpr.jaxpr, [*jaxpr.consts, *operands], ids)


def _scan(operands, ids, *, jaxpr, length, **_):
    """A loop: the results are those that are carried, and nothing is indexed by the trip."""
    if any(np.shape(a) != v.aval.shape for a, v in zip(operands, jaxpr.jaxpr.invars, strict=True)):
        raise NotImplementedError("a scan over arrays")
    first = len(operands) - len(jaxpr.out_avals)
    consts, carry = operands[:first], operands[first:]
    for _ in range(length):
        carry = _call([*consts, *carry], ids, jaxpr=jaxpr)
    return carry


def _cond(operands, ids, *, branches, **_):
    which, *operands = operands
    return _call(operands, ids, jaxpr=branches[int(np.clip(which, 0, len(branches) - 1))])


def _pallas_call(operands, _ids, *, jaxpr, grid_mapping, out_avals, **_):
    arrays = [*operands, *(_nothing(aval.shape, aval.dtype) for aval in out_avals)]
    blocks = [
        [getattr(dim, "block_size", 1) for dim in mapping.block_shape]
        for mapping in grid_mapping.block_mappings
    ]
    padded = [
        _padded(*each) for each in zip(arrays, blocks, grid_mapping.block_mappings, strict=True)
    ]
    scratch = [_nothing(v.aval.shape, v.aval.dtype) for v in jaxpr.invars[len(arrays) :]]
    for ids in itertools.product(*map(range, grid_mapping.grid)):
        refs = [
            array[tuple(_block(mapping, block, array, ids))]
            for array, block, mapping in zip(
                padded, blocks, grid_mapping.block_mappings, strict=True
            )
        ]
        _evaluate(jaxpr, [*refs, *scratch], ids)
    results = padded[len(operands) :]
    return [
        result[tuple(map(slice, aval.shape))]
        for result, aval in zip(results, out_avals, strict=True)
    ]


def _block(mapping, block, array, ids) -> Iterator[slice]:
    index_map = mapping.index_map_jaxpr
    starts = _call([np.int32(i) for i in ids], ids, jaxpr=index_map)
    for start, size, dim, whole in zip(
        starts, block, mapping.block_shape, array.shape, strict=True
    ):
        first = int(start) * (1 if hasattr(dim, "padding") else size)
        if not 0 <= first <= whole - size:
            raise OutOfBounds(f"a block from {first} to {first + size} of {whole}")
        yield slice(first, first + size)


def _padded(array, block, mapping):
    """To whole blocks, or as an `Element` of the block's shape has it."""
    widths = [
        getattr(dim, "padding", (0, -whole % size))
        for dim, size, whole in zip(mapping.block_shape, block, array.shape, strict=True)
    ]
    result = _nothing(
        [n + sum(width) for n, width in zip(array.shape, widths, strict=True)], array.dtype
    )
    inside = (slice(low, low + n) for n, (low, _) in zip(array.shape, widths, strict=True))
    result[tuple(inside)] = array
    return result


def _nothing(shape, dtype):
    return np.full(shape, np.nan, dtype)


_NESTED: dict[str, Callable] = {
    "jit": _call,
    "scan": _scan,
    "cond": _cond,
    "pallas_call": _pallas_call,
}


# ---- References.


def _get(ref, *indices, tree):
    return _view(ref, jax.tree.unflatten(tree, indices)).copy()


def _swap(ref, value, *indices, tree):
    view = _view(ref, jax.tree.unflatten(tree, indices))
    before = view.copy()
    view[...] = value
    return before


def _view(ref, indexers):
    """What some indexers, one of the result of another, select: integers and slices."""
    for indexer in indexers:
        at = []
        for index, size in zip(indexer.indices, ref.shape, strict=True):
            if not hasattr(index, "size") or isinstance(index, np.ndarray | np.integer):
                first = last = int(index)
                at.append(first)
            else:
                first, last = int(index.start), int(index.start) + (index.size - 1) * index.stride
                at.append(slice(first, last + 1, index.stride))
            if not 0 <= first <= last < size:
                raise OutOfBounds(f"from {first} to {last} of {size}")
        ref = ref[tuple(at)]
    return ref


def _masked_load(*operands, args_tree, **_):
    ref, indexers, mask, other = jax.tree.unflatten(args_tree, operands)
    index, mask = _masked(ref, indexers, mask)
    values = ref[index]
    return values if mask is None else np.where(mask, values, np.nan if other is None else other)


def _masked_swap(*operands, args_tree, **_):
    ref, indexers, values, mask = jax.tree.unflatten(args_tree, operands)
    index, mask = _masked(ref, indexers, mask)
    before = ref[index]
    ref[index if mask is None else index[mask]] = values if mask is None else values[mask]
    return before


def _masked(ref, indexers, mask):
    """The indices of elements of an array of one dimension, 0 where a mask is not set."""
    [indexer] = indexers
    [index] = indexer.indices
    if mask is not None:
        index = np.where(mask, index, 0)
    if np.any((index < 0) | (index >= ref.size)):
        raise OutOfBounds(f"from {np.min(index)} to {np.max(index)} of {ref.size}")
    return index, mask


# ---- Operations on arrays.


def _div(a, b):
    """Integers are rounded towards zero."""
    return a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b


def _broadcast_in_dim(a, *, shape, broadcast_dimensions, **_):
    aligned = np.ones(len(shape), int)
    aligned[list(broadcast_dimensions)] = np.shape(a)
    return np.broadcast_to(np.reshape(a, aligned), shape)


def _iota(*, dtype, shape, dimension, **_):
    return _broadcast_in_dim(
        np.arange(shape[dimension], dtype=dtype), shape=shape, broadcast_dimensions=[dimension]
    )


def _slice(a, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * a.ndim
    return a[tuple(map(slice, start_indices, limit_indices, strides))]


_OPERATIONS: dict[str, Callable] = {
    "get": _get,
    "swap": _swap,
    "masked_load": _masked_load,
    "masked_swap": _masked_swap,
    "add": lambda a, b, **_: a + b,
    "sub": lambda a, b, **_: a - b,
    "mul": lambda a, b, **_: a * b,
    "div": lambda a, b, **_: _div(a, b),
    "rem": lambda a, b, **_: np.fmod(a, b),
    "min": lambda a, b, **_: np.minimum(a, b),
    "max": lambda a, b, **_: np.maximum(a, b),
    "and": lambda a, b, **_: a & b,
    "eq": lambda a, b, **_: a == b,
    "lt": lambda a, b, **_: a < b,
    "ge": lambda a, b, **_: a >= b,
    "multiple_of": lambda a, **_: a,
    "reshape": lambda a, new_sizes, **_: np.reshape(a, new_sizes),
    "transpose": lambda a, permutation, **_: np.transpose(a, permutation),
    "concatenate": lambda *arrays, dimension: np.concatenate(arrays, dimension),
    "stack": lambda *arrays, axis: np.stack(arrays, axis),
    "select_n": lambda which, a, b, **_: np.where(which, b, a),
    "convert_element_type": lambda a, new_dtype, **_: a.astype(new_dtype),
    "reduce_sum": lambda a, axes, **_: np.sum(a, axes, a.dtype),
    "broadcast_in_dim": _broadcast_in_dim,
    "iota": _iota,
    "slice": _slice,
}
