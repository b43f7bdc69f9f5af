"""A stand-in for `jax.lax.conv_general_dilated`, for code that takes it as an argument."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import conv_general_dilated as _lax  # others may put theirs in jax.lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_dwbp._depthwise import Convolution, Depthwise, op_of
from jax_dwbp._spec import FORWARD, LEFT_TO_LAX, brief


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with depthwise convolutions run by this package.

    Same signature, same results to rounding, same derivatives of every order and in both modes.
    With one to three spatial dimensions and operands of one dtype, depthwise are

    - convolutions with `feature_group_count` groups of one input channel each;
    - their transposes, with `lhs_dilation`; with strides as well it is written out with its zeros,
      if these make it at most 16 times as large;
    - their gradients by the filter, with `batch_group_count`.

    These run here, also if each group has up to 8 input or output channels, and without groups
    those from one channel to 16 at most, or the other way round, if neither the window nor the
    result is of one element and strides are 1 or 2. Any other call, also one with an error in it,
    goes to lax unchanged, and so does one with an empty operand, or with an explicit sharding of
    the channels or of the filter: `jax_dwbp.implementations` says why, and so does the name of its
    scope in a profile.

    Filters that are large against the signal run by Fourier transforms on a CPU: with few channels
    from about 1,000 places or 45x45 pixels on, with 8 or more from twice as many. The error is then
    relative to the largest values of an image and of the filter, so that sums of what is positive
    may be negative near zero, and an infinity or a NaN reaches all of its image. Integers and calls
    with `precision="highest"` are summed in any case.

    Integers run here where floating-point numbers hold each sum exactly: float32 those of 8 bits
    and 1,024 terms, of unsigned ones 258; with 64-bit types float64 nearly all those of 16 bits.
    As in lax's own, the result keeps the lowest bits of what is beyond its type.

    Padding may be negative, if it leaves something of an input without explicit sharding. On a CPU
    lax's own convolution reads out of bounds for some of that (openxla/xla issue 48713); this one
    does not.

    Args: see `jax.lax.conv_general_dilated`.

    >>> x, f = jnp.ones((1, 8, 4)), jnp.ones((3, 1, 4))
    >>> conv_general_dilated(
    ...     x, f, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4
    ... ).shape
    (1, 8, 4)
    """
    arguments = (
        *(window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers),
        *(feature_group_count, batch_group_count, precision, preferred_element_type, out_sharding),
    )
    found = _found(lhs, rhs, *arguments)
    if isinstance(found, str):
        with jax.named_scope(f"{LEFT_TO_LAX}{found}"):
            return _lax(lhs, rhs, *arguments)
    y = found.apply(*(x if isinstance(x, jax.Array) else jnp.asarray(x) for x in (lhs, rhs)))
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _found(lhs: Any, rhs: Any, *arguments: Any) -> Depthwise | str:
    """What a depthwise call asks for. Of another, or a wrong one, why lax has the say."""
    try:
        conv = _understood(lhs, rhs, *arguments)
    except (AttributeError, TypeError, ValueError) as error:  # the caller's
        return f"an argument can't be understood: {error}"
    if isinstance(conv, str):
        return conv
    found = op_of(conv)
    if isinstance(found, Depthwise) and found.op is not FORWARD:
        if any(jax.typeof(lhs).sharding.spec):
            return "a transpose or a gradient has explicit sharding"
    return found


def _understood(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: Any,
    batch_group_count: Any,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
) -> Convolution | str:
    """The arguments of a call, or what is written in a way that lax has to judge."""
    types = jax.typeof(lhs), jax.typeof(rhs)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    strides, lhs_dilation, rhs_dilation = (
        (1,) * (lhs.ndim - 2) if vector is None else _integers(vector)
        for vector in (window_strides, lhs_dilation, rhs_dilation)
    )
    groups, batch_groups = _integers((feature_group_count, batch_group_count))
    dtype = jnp.dtype(preferred_element_type or types[0].dtype)
    sizes = tuple(lhs.shape[i] for i in numbers.lhs_spec)
    filter_sizes = tuple(rhs.shape[i] for i in numbers.rhs_spec)
    rank = lhs.ndim - 2
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            return f"padding is {padding!r}"
        if any(step != 1 for step in lhs_dilation):
            return f"padding is {padding!r} and lhs_dilation is {lhs_dilation}"
        windows = [(k - 1) * d + 1 for k, d in zip(filter_sizes[2:], rhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(sizes[2:], windows, strides, padding.upper())
    padding = tuple((low, high) for low, high in map(_integers, padding))
    if any(len(vector) != rank for vector in (strides, lhs_dilation, rhs_dilation, padding)):
        return f"not all attributes have {rank} entries"
    if min((*strides, *lhs_dilation, *rhs_dilation, groups, batch_groups), default=1) < 1:
        return "an attribute is not positive"
    if sizes[1] != groups * filter_sizes[1] or filter_sizes[0] % (groups * batch_groups):
        return f"{groups} groups do not fit {sizes[1]} channels and {filter_sizes[0]} features"
    if groups > 1 and batch_groups > 1:
        return "feature_group_count and batch_group_count are both more than 1"
    if dtype != jax.dtypes.canonicalize_dtype(dtype):  # lax warns of float64 without x64
        return f"preferred_element_type is {dtype}"
    if all(x.weak_type for x in types):
        return "the dtypes of both operands are weak"
    if not (
        precision is None
        or isinstance(precision, lax.Precision | str)
        or (isinstance(precision, tuple) and len({type(p) for p in precision}) == 1)
    ):
        return "precision is written in another way"
    is_explicit = any(types[0].sharding.spec)
    if out_sharding is not None and not (
        is_explicit and isinstance(out_sharding, PartitionSpec | NamedSharding)
    ):
        return "out_sharding is of an input without explicit sharding"
    if any(types[1].sharding.spec) or (is_explicit and types[0].sharding.spec[numbers.lhs_spec[1]]):
        return "the filter or the channels have explicit sharding"
    if is_explicit and min((pad for pads in padding for pad in pads), default=0) < 0:
        return "negative padding crops an input with explicit sharding"
    return Convolution(
        lhs=sizes,
        rhs=filter_sizes,
        numbers=numbers,
        strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        groups=groups,
        batch_groups=batch_groups,
        precision=precision,
        dtypes=(types[0].dtype, types[1].dtype, dtype),
    )


def _integers(values: Any) -> tuple[int, ...]:
    """Of the kinds that lax takes."""
    if not isinstance(values, tuple | list | np.ndarray) or not all(
        isinstance(value, int | np.integer) for value in values
    ):
        raise TypeError(f"{brief(values)} is no vector of integers")
    return tuple(map(int, values))
