"""A stand-in for `jax.lax.conv_general_dilated`: an argument for code that takes the function as
one, and a context for code that does not."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_dwbp import _rules
from jax_dwbp._spec import (
    DTYPES,
    FORWARD,
    LEFT_TO_LAX,
    Arguments,
    ConvSpec,
    Pair,
    brief,
    canonicalize,
)

_LAX = lax.conv_general_dilated
# Whether `in_place_of_lax` is entered, in this thread. The caches of `jit` look at it too.
_in_place = jax.make_user_context(False)
_lock = threading.Lock()


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
    `lhs_dilation`, `batch_group_count`, explicit sharding of the channels or the filter, nor
    `out_sharding` of an input without explicit sharding; and no empty dimension. Any other call,
    also one with an error in it, goes to lax unchanged: `jax_dwbp.implementations` says why, and so
    does the name of its scope in a profile.

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
    call = _depthwise(lhs, rhs, *arguments)
    if isinstance(call, str):
        with jax.named_scope(f"{LEFT_TO_LAX}{call}"):
            return _LAX(lhs, rhs, *arguments)
    spec, dtype, numbers, crop = call
    lhs, rhs = (x if isinstance(x, jax.Array) else jnp.asarray(x) for x in (lhs, rhs))
    compute_dtype = dtype
    if dtype != lhs.dtype:
        compute_dtype = max(dtype, jnp.dtype("float32"), key=lambda dtype: dtype.itemsize)

    # Ours is [N,H,W,C] by [R,S,C,M], or [N,C,H,W] where that is lax's layout already.
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
    if any(pad for pads in crop for pad in pads):
        none, axes = [(0, 0, 0)], [(*pads, 0) for pads in crop]
        config = none + axes + none if spec.data_format == "NHWC" else none * 2 + axes
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
    y = _rules.apply(
        _converted(x, compute_dtype),
        _converted(f, compute_dtype).reshape(*spec.kernel_spatial, spec.channels, spec.multiplier),
        op=FORWARD,
        spec=spec,
        forward_mode=True,
    )
    y = _converted(y, dtype)
    if lhs.ndim == 3:
        y = lax.squeeze(y, (1,))
    if y_axes is not None:
        y = lax.transpose(y, y_axes)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _converted(x: jax.Array, dtype: Any) -> jax.Array:
    """x.astype(dtype), which takes time where there is nothing to do."""
    return x if x.dtype == dtype and not x.weak_type else x.astype(dtype)


@contextlib.contextmanager
def in_place_of_lax() -> Iterator[None]:
    """Within it, `jax.lax.conv_general_dilated` is the function of this package.

    For layers that call it without a choice: Equinox, Haiku and Keras look it up in `jax.lax` when
    they are called. It counts for what this thread traces meanwhile, and is part of what `jax.jit`
    caches by: what was traced outside is traced again within, and the other way round. Who takes
    `jax.lax.conv_general_dilated` within it and keeps it has lax's outside.

    >>> x, f = jnp.ones((1, 4, 8, 8)), jnp.ones((4, 1, 3, 3))
    >>> with in_place_of_lax():
    ...     y = jax.lax.conv_general_dilated(x, f, (1, 1), "SAME", feature_group_count=4)
    """
    _install()
    with _in_place(True):
        yield


def _install() -> None:
    """Puts in lax's place what chooses, for good: who has patched it meanwhile keeps the patch."""
    with _lock:
        before = lax.conv_general_dilated
        if hasattr(before, "chooses"):
            return

        @functools.wraps(before)
        def chosen(*args: Any, **kwargs: Any) -> jax.Array:
            return (conv_general_dilated if _in_place.value else before)(*args, **kwargs)

        chosen.chooses = True  # pyright: ignore[reportAttributeAccessIssue]
        chosen.__module__ = "jax.lax"  # where a pickle finds it, and lax's own in another process
        lax.conv_general_dilated = chosen


class _Depthwise(NamedTuple):
    spec: ConvSpec
    dtype: Any  # of the result
    numbers: Any
    crop: list[Pair]  # what negative padding takes off the height and the width, as pads


class _Call(NamedTuple):
    """The arguments of a call, understood."""

    types: tuple[Any, Any]  # of lhs and rhs
    dtype: Any  # of the result
    numbers: Any
    lhs: tuple[Any, ...]  # sizes: batch, channels, spatial
    rhs: tuple[Any, ...]  # sizes: features, channels of a group, spatial
    strides: tuple[int, ...]
    padding: Any  # in capitals, or pairs
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    batch_groups: int
    precision: Any
    out_sharding: Any

    @property
    def is_explicit(self) -> bool:
        return any(self.types[0].sharding.spec)


def _depthwise(lhs: Any, rhs: Any, *arguments: Any) -> _Depthwise | str:
    """What a depthwise call asks for. Of another, or a wrong one, why lax has the say."""
    try:
        call = _understood(lhs, rhs, *arguments)
    except (AttributeError, TypeError, ValueError) as error:  # the caller's
        return f"an argument can't be understood: {error}"
    return _why_not(call) or _canonicalized(call)


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
) -> _Call:
    types = jax.typeof(lhs), jax.typeof(rhs)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    strides, lhs_dilation, rhs_dilation = (
        (1,) * (lhs.ndim - 2) if vector is None else _integers(vector)
        for vector in (window_strides, lhs_dilation, rhs_dilation)
    )
    if isinstance(padding, str):
        padding = padding.upper()
    else:
        padding = [(low, high) for low, high in map(_integers, padding)]
    groups, batch_groups = _integers((feature_group_count, batch_group_count))
    return _Call(
        types,
        jnp.dtype(preferred_element_type or types[0].dtype),
        numbers,
        tuple(lhs.shape[i] for i in numbers.lhs_spec),
        tuple(rhs.shape[i] for i in numbers.rhs_spec),
        strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        groups,
        batch_groups,
        precision,
        out_sharding,
    )


def _integers(values: Any) -> tuple[int, ...]:
    """Of the kinds that lax takes."""
    if not isinstance(values, tuple | list | np.ndarray) or not all(
        isinstance(value, int | np.integer) for value in values
    ):
        raise TypeError(f"{brief(values)} is no vector of integers")
    return tuple(map(int, values))


def _why_not(call: _Call) -> str | None:
    """Why it is not depthwise, or is written in a way that lax would not take, or None."""
    _, channels, *spatial = call.lhs
    features, group, *_ = call.rhs
    rank = len(spatial)
    vectors = [call.strides, call.lhs_dilation, call.rhs_dilation]
    vectors += [] if isinstance(call.padding, str) else [call.padding]
    dtypes = (*(x.dtype for x in call.types), call.dtype)
    # Written out where one applies: this is asked at every call.
    reasons = {
        "one or two spatial dimensions are depthwise here, not {rank}": rank not in (1, 2),
        "feature_group_count is {call.groups} of {channels} channels": (
            call.groups != channels or group != 1
        ),
        "one channel is an ordinary convolution": channels == 1,
        "batch_group_count is {call.batch_groups}": call.batch_groups != 1,
        "{channels} channels do not divide {features} features": (
            not channels or features % channels
        ),
        "a size is 0 or symbolic": not all(
            type(size) is int and size > 0 for size in (*spatial, *call.rhs)
        ),
        "not all attributes have {rank} entries": any(len(vector) != rank for vector in vectors),
        "lhs_dilation is {call.lhs_dilation}": any(step != 1 for step in call.lhs_dilation),
        "padding is {call.padding!r}": (
            isinstance(call.padding, str) and call.padding not in ("SAME", "SAME_LOWER", "VALID")
        ),
        "dtypes are {dtypes}": (
            dtypes[0] != dtypes[1]
            or not {dtype.name for dtype in dtypes} <= set(DTYPES)
            or dtypes[0].itemsize > call.dtype.itemsize
            # lax warns of float64 without x64
            or call.dtype != jax.dtypes.canonicalize_dtype(call.dtype)
        ),
        "the dtypes of both operands are weak": all(x.weak_type for x in call.types),
        "precision is written in another way": not (
            call.precision is None
            or isinstance(call.precision, lax.Precision | str)
            or (isinstance(call.precision, tuple) and len({type(p) for p in call.precision}) == 1)
        ),
        "out_sharding is of an input without explicit sharding": (
            call.out_sharding is not None
            and not (
                call.is_explicit and isinstance(call.out_sharding, PartitionSpec | NamedSharding)
            )
        ),
        "the filter or the channels have explicit sharding": (
            any(call.types[1].sharding.spec)
            or (call.is_explicit and call.types[0].sharding.spec[call.numbers.lhs_spec[1]])
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            return reason.format(
                call=call,
                rank=rank,
                channels=channels,
                features=features,
                dtypes=", ".join(map(str, dtypes)),
            )
    return None


def _canonicalized(call: _Call) -> _Depthwise | str:
    n, channels, *spatial = call.lhs
    features, _, *window = call.rhs
    strides, dilation, padding = call.strides, call.rhs_dilation, call.padding
    if padding == "SAME_LOWER":
        windows = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
        padding = lax.padtype_to_pads(spatial, windows, strides, padding)
    if len(spatial) == 1:
        spatial, window = [1, *spatial], [1, *window]
        strides, dilation = (1, *strides), (1, *dilation)
        padding = padding if isinstance(padding, str) else [(0, 0), *padding]
    crop = [(0, 0), (0, 0)]
    if not isinstance(padding, str):
        crop = [(min(low, 0), min(high, 0)) for low, high in padding]
        padding = [(max(low, 0), max(high, 0)) for low, high in padding]
        spatial = [size + sum(pads) for size, pads in zip(spatial, crop, strict=True)]
        if min(spatial) < 1:
            return "negative padding leaves nothing"
        if call.is_explicit and any(pad for pads in crop for pad in pads):
            return "negative padding crops an input with explicit sharding"
    channels_first = call.numbers.lhs_spec == call.numbers.out_spec == (0, 1, 2, 3)
    given = Arguments(
        input=(n, channels, *spatial) if channels_first else (n, *spatial, channels),
        filter=(*window, channels, features // channels),
        out_backprop=None,
        strides=strides,
        padding=padding,
        data_format="NCHW" if channels_first else "NHWC",
        dilations=dilation,
        precision=call.precision,
    )
    try:
        spec = canonicalize(FORWARD, given)
    except ValueError as error:  # sizes beyond what the ops take, a precision that is none
        return str(error)
    return (
        "the output is empty"
        if 0 in spec.out_spatial
        else _Depthwise(spec, call.dtype, call.numbers, crop)
    )
