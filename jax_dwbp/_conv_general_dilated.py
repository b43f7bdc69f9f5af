"""A stand-in for `jax.lax.conv_general_dilated`: an argument for code that takes the function as
one, and a context for code that does not."""

import contextlib
import importlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_dwbp import _rules
from jax_dwbp._spec import DTYPES, ConvSpec, canonicalize

_LAX = lax.conv_general_dilated
_entered, _lock = 0, threading.Lock()  # how often `in_place_of_lax` is entered


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

    Same signature, same results to rounding, same derivatives of every order and in both modes. A
    call is depthwise if it has one or two spatial dimensions, more than one input channel and
    `feature_group_count` equal to their number; floating-point operands of one dtype; no
    `lhs_dilation`, `batch_group_count`, negative padding, explicit sharding of the channels or the
    filter, nor `out_sharding` of an input without explicit sharding; and no empty dimension. Any
    other call, also one with an error in it, goes to lax unchanged.

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
    spec = _depthwise_spec(lhs, rhs, *arguments)
    if spec is None:
        return _LAX(lhs, rhs, *arguments)
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    dtype = compute_dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    if dtype != lhs.dtype:
        compute_dtype = max(dtype, jnp.dtype("float32"), key=lambda dtype: dtype.itemsize)

    # Ours is [N,H,W,C] by [R,S,C,M], or [N,C,H,W] where that is lax's layout already.
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    x, y_axes = lhs, None
    if spec.data_format == "NHWC":
        n, c, *spatial = numbers.lhs_spec
        x = lax.transpose(lhs, (n, *spatial, c))
        n, c, *spatial = numbers.out_spec
        y_axes = np.argsort((n, *spatial, c))
    o, i, *window = numbers.rhs_spec
    f = lax.transpose(rhs, (*window, i, o))
    if lhs.ndim == 3:
        x = lax.expand_dims(x, (1,))
    y = _rules.apply(
        x.astype(compute_dtype),
        f.astype(compute_dtype).reshape(*spec.kernel_spatial, spec.channels, spec.multiplier),
        op="forward",
        spec=spec,
        forward_mode=True,
    ).astype(dtype)
    if lhs.ndim == 3:
        y = lax.squeeze(y, (1,))
    if y_axes is not None:
        y = lax.transpose(y, y_axes)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


@contextlib.contextmanager
def in_place_of_lax() -> Iterator[None]:
    """While it is entered, `jax.lax.conv_general_dilated` is the function of this package.

    For layers that call it without a choice: Equinox, Haiku and Keras look it up in `jax.lax` when
    they are called. It counts where a function is traced: enter it inside of what is jitted, or
    around the first call. What was compiled before stays as it is. All threads see it.

    >>> x, f = jnp.ones((1, 4, 8, 8)), jnp.ones((4, 1, 3, 3))
    >>> with in_place_of_lax():
    ...     y = jax.lax.conv_general_dilated(x, f, (1, 1), "SAME", feature_group_count=4)
    """
    global _entered
    # It calls lax's own, which it has to find first.
    importlib.import_module("jax_dwbp._impl.lax")
    with _lock:
        _entered += 1
        lax.conv_general_dilated = conv_general_dilated
    try:
        yield
    finally:
        # Contexts of several threads may end in any order: the last one puts lax's back.
        with _lock:
            _entered -= 1
            if _entered == 0:
                lax.conv_general_dilated = _LAX


def _depthwise_spec(lhs: Any, rhs: Any, *arguments: Any) -> ConvSpec | None:
    """The spec of a depthwise call. None if it is another, or wrong: lax has the say on both."""
    try:
        return _canonicalize(lhs, rhs, *arguments)
    except (TypeError, ValueError, NotImplementedError):
        return None


def _canonicalize(
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
) -> ConvSpec | None:
    types = [jax.typeof(x) for x in (lhs, rhs)]
    dtype = jnp.dtype(preferred_element_type or types[0].dtype)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    rank = lhs.ndim - 2
    n, channels, *spatial = (lhs.shape[i] for i in numbers.lhs_spec)
    features, group, *window = (rhs.shape[i] for i in numbers.rhs_spec)
    ones = (1,) * rank
    lhs_dilation = ones if lhs_dilation is None else lhs_dilation
    rhs_dilation = ones if rhs_dilation is None else rhs_dilation
    if isinstance(padding, str):
        padding = padding.upper()
    # Also what is written in a way that lax would not take: what is left is safe to interpret.
    if not (
        rank in (1, 2)
        and all(type(count) is int for count in (feature_group_count, batch_group_count))
        and feature_group_count == channels > group == 1 == batch_group_count
        and features % channels == 0
        and all(type(size) is int and size > 0 for size in (*spatial, *rhs.shape))
        and all(
            isinstance(attribute, tuple | list) and len(attribute) == rank
            for attribute in (window_strides, lhs_dilation, rhs_dilation)
        )
        and tuple(lhs_dilation) == ones
        and (padding in ("SAME", "VALID") if isinstance(padding, str) else len(padding) == rank)
        and (
            precision is None
            or isinstance(precision, lax.Precision | str)
            or (isinstance(precision, tuple) and len({type(p) for p in precision}) == 1)
        )
        and types[0].dtype == types[1].dtype
        and {types[0].dtype.name, dtype.name} <= set(DTYPES)
        and types[0].dtype.itemsize <= dtype.itemsize
        and dtype == jax.dtypes.canonicalize_dtype(dtype)  # not float64 without x64: lax warns
        and not (types[0].weak_type and types[1].weak_type)
        and (
            out_sharding is None
            or (
                isinstance(out_sharding, PartitionSpec | NamedSharding)
                and any(types[0].sharding.spec)
            )
        )
        and not any(types[1].sharding.spec)
        and not types[0].sharding.spec[numbers.lhs_spec[1]]
    ):
        return None
    if rank == 1:
        spatial, window = [1, *spatial], [1, *window]
        window_strides, rhs_dilation = (1, *window_strides), (1, *rhs_dilation)
        padding = padding if isinstance(padding, str) else ((0, 0), *padding)
    channels_first = numbers.lhs_spec == numbers.out_spec == (0, 1, 2, 3)
    spec = canonicalize(
        "forward",
        (n, channels, *spatial) if channels_first else (n, *spatial, channels),
        (*window, channels, features // channels),
        None,
        window_strides,
        padding,
        (),
        "NCHW" if channels_first else "NHWC",
        rhs_dilation,
        precision,
        None,
    )
    return None if 0 in spec.out_spatial else spec
