"""The public functions: what a caller means, checked and handed to the rules.

The three ops share their attributes; `depthwise_conv2d_native` has the text on them.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_dwbp import _compat, _rules, _select
from jax_dwbp._compat import Target
from jax_dwbp._in_place_of_lax import ops_of_lax
from jax_dwbp._spec import (
    DTYPES,
    FILTER_GRAD,
    FORWARD,
    INPUT_GRAD,
    Arguments,
    Op,
    brief,
    canonicalize,
    check_dtype,
    check_same_dtype,
)

Precision = str | jax.lax.Precision | tuple[str, str] | None


def depthwise_conv2d_native(
    input: ArrayLike,
    filter: ArrayLike,
    strides: Sequence[int],
    padding: str | Sequence[Sequence[int]],
    *,
    explicit_paddings: Sequence[int] = (),
    data_format: str = "NHWC",
    dilations: Sequence[int] = (1, 1, 1, 1),
    name: str | None = None,
    precision: Precision = None,
    implementation: str | Sequence[str] | None = None,
    forward_mode: bool = False,
) -> jax.Array:
    """TensorFlow's `DepthwiseConv2dNative`: each channel convolved with its own M filters.

        y[n,p,q,c*M+m] = sum over r,s of
            x[n, p*stride - low + r*dilation, q*stride - low + s*dilation, c] * f[r,s,c,m]

    with zeros for x outside of its bounds (the formula of TensorFlow's documentation of
    `tf.nn.depthwise_conv2d`, with the padding written out; stride, low and dilation of each axis).

    Shapes: N batch, H W input, P Q output, R S filter, C channels, M depth multiplier. Any of them
    may be 0, and the filter may be larger than the input: what is empty is empty, what sums over
    nothing is zero.

    Holds under `jit`, `vmap` over any axes of any argument, `grad` of any order, `checkpoint`,
    `scan`, `shard_map` and `jax.export` (with a symbolic batch size too), on every platform.

    Args:
      input: `[N, H, W, C]`, or `[N, C, H, W]` for "NCHW": float16, bfloat16, float32 or float64.
      filter: `[R, S, C, M]` of the same dtype, for both layouts.
      strides: the step of the window: 4 integers in the order of `data_format`, 1 for batch and
        channels, or the pair (H, W). The two may differ.
      padding: "SAME", "VALID", "EXPLICIT", or the pads: ((top, bottom), (left, right)), or 4 pairs
        in the order of `data_format`. SAME makes P = ceil(H / stride), an odd row of zeros at the
        end.
      explicit_paddings: for "EXPLICIT", 8 non-negative integers: (before, after) for each dimension
        in the order of `data_format`, 0 for batch and channels. Else empty.
      data_format: "NHWC" or "NCHW".
      dilations: the distance between the taps of the filter, written like `strides`.
      name: a `jax.named_scope` for the op.
      precision: a `jax.lax.Precision`, its name, or a pair of them. For "lax" on accelerators;
        "highest" also rules out Fourier transforms. The other implementations are exact to their
        accumulation.
      implementation: None for the best. There always is one, but on a CPU for windows of more than
        2**24 positions along an axis. A name ("lax", "xla_taps", "fft", "native_cpu",
        "pallas_tpu", "pallas_gpu") runs that one or raises; of a sequence of names, the first that
        can. Gradients follow it.
        `jax_dwbp.implementations` tells what runs and why the others don't.
      forward_mode: True for `jvp`, `jacfwd`, `hessian`, `linearize` and `linear_transpose`. By
        default the op is a `jax.custom_vjp`, which rules these out.

    Returns:
      `[N, P, Q, C*M]` (or `[N, C*M, P, Q]`) in the dtype of the arguments. Sums are taken in
      float32, for float64 in float64, and rounded once. On a CPU, where the filter is so large that
      it is faster, they are taken by Fourier transforms ("fft"): the error is then relative to the
      largest values of an image and of the filter, and an infinity or a NaN reaches all of its
      image. `precision="highest"` rules these out.

    Raises:
      TypeError: an argument of the wrong kind, dtypes that differ or that TensorFlow's op lacks.
      ValueError: shapes or attributes that don't fit together.
      NotImplementedError: the `implementation` asked for, or with None any, can't run this.

    >>> x, f = jnp.ones((1, 4, 4, 2), "float32"), jnp.ones((3, 3, 2, 1), "float32")
    >>> depthwise_conv2d_native(x, f, strides=(1, 2, 2, 1), padding="SAME")[0, :, :, 0]
    Array([[9., 6.],
           [6., 4.]], dtype=float32)
    """
    input, filter = _operands(input=input, filter=filter)
    given = Arguments(
        input=input.shape,
        filter=filter.shape,
        out_backprop=None,
        strides=strides,
        padding=padding,
        explicit_paddings=explicit_paddings,
        data_format=data_format,
        dilations=dilations,
        precision=precision,
        implementation=implementation,
    )
    return _apply(FORWARD, given, input, filter, name, forward_mode)


def depthwise_conv2d_native_backprop_input(
    input_sizes: Sequence[int] | np.ndarray | jax.Array,
    filter: ArrayLike,
    out_backprop: ArrayLike,
    strides: Sequence[int],
    padding: str | Sequence[Sequence[int]],
    *,
    explicit_paddings: Sequence[int] = (),
    data_format: str = "NHWC",
    dilations: Sequence[int] = (1, 1, 1, 1),
    name: str | None = None,
    precision: Precision = None,
    implementation: str | Sequence[str] | None = None,
    forward_mode: bool = False,
) -> jax.Array:
    """TensorFlow's `DepthwiseConv2dNativeBackpropInput`: the gradient with respect to the input.

        dx[n,h,w,c] = sum over r,s,m of
            dy[n, (h+low-r*dilation)/stride, (w+low-s*dilation)/stride, c*M+m] * f[r,s,c,m]

    over the terms where the divisions are exact and dy is within its bounds: the adjoint of
    `depthwise_conv2d_native`, <dx, x> = <dy, depthwise_conv2d_native(x, f)> for every x.

    Shapes, transformations, accumulation, the other arguments and the errors are those of
    `depthwise_conv2d_native`. Unlike TensorFlow's CPU kernel, `dilations` count.

    Args:
      input_sizes: the shape of the result, 4 integers in the order of `data_format`: a tuple, list,
        NumPy or concrete JAX vector. Static: under `jit` take it from a `.shape`. It decides
        between the inputs of one output shape; rows that no window touched get zeros.
      filter: `[R, S, C, M]`, float16, bfloat16, float32 or float64.
      out_backprop: `[N, P, Q, C*M]` (or `[N, C*M, P, Q]`) of the same dtype, dy.

    Returns:
      `[N, H, W, C]` (or `[N, C, H, W]`), which is `input_sizes`, in the dtype of the arguments.

    >>> f, dy = jnp.ones((3, 3, 2, 1), "float32"), jnp.ones((1, 2, 2, 2), "float32")
    >>> dx = depthwise_conv2d_native_backprop_input(
    ...     (1, 4, 4, 2), f, dy, strides=(1, 2, 2, 1), padding="SAME"
    ... )
    >>> dx[0, :, :, 0]
    Array([[1., 1., 2., 1.],
           [1., 1., 2., 1.],
           [2., 2., 4., 2.],
           [1., 1., 2., 1.]], dtype=float32)
    """
    filter, out_backprop = _operands(filter=filter, out_backprop=out_backprop)
    given = Arguments(
        input=input_sizes,
        filter=filter.shape,
        out_backprop=out_backprop.shape,
        strides=strides,
        padding=padding,
        explicit_paddings=explicit_paddings,
        data_format=data_format,
        dilations=dilations,
        precision=precision,
        implementation=implementation,
    )
    return _apply(INPUT_GRAD, given, filter, out_backprop, name, forward_mode)


def depthwise_conv2d_native_backprop_filter(
    input: ArrayLike,
    filter_sizes: Sequence[int] | np.ndarray | jax.Array,
    out_backprop: ArrayLike,
    strides: Sequence[int],
    padding: str | Sequence[Sequence[int]],
    *,
    explicit_paddings: Sequence[int] = (),
    data_format: str = "NHWC",
    dilations: Sequence[int] = (1, 1, 1, 1),
    name: str | None = None,
    precision: Precision = None,
    implementation: str | Sequence[str] | None = None,
    forward_mode: bool = False,
) -> jax.Array:
    """TensorFlow's `DepthwiseConv2dNativeBackpropFilter`: the gradient with respect to the filter.

        df[r,s,c,m] = sum over n,p,q of
            x[n, p*stride - low + r*dilation, q*stride - low + s*dilation, c] * dy[n,p,q,c*M+m]

    with zeros for x outside of its bounds: the adjoint by f, <df, f> = <dy,
    depthwise_conv2d_native(x, f)> for every f.

    Shapes, transformations, accumulation, the other arguments and the errors are those of
    `depthwise_conv2d_native`. Unlike TensorFlow's CPU kernel, `dilations` count.

    Args:
      input: `[N, H, W, C]` (or `[N, C, H, W]`), float16, bfloat16, float32 or float64.
      filter_sizes: the shape of the result, [R, S, C, M]: a tuple, list, NumPy or concrete JAX
        vector. Static: under `jit` take it from a `.shape`.
      out_backprop: `[N, P, Q, C*M]` (or `[N, C*M, P, Q]`) of the same dtype, dy.

    Returns:
      `[R, S, C, M]`, which is `filter_sizes`, in the dtype of the arguments.

    >>> x, dy = jnp.ones((1, 4, 4, 2), "float32"), jnp.ones((1, 2, 2, 2), "float32")
    >>> df = depthwise_conv2d_native_backprop_filter(
    ...     x, (3, 3, 2, 1), dy, strides=(1, 2, 2, 1), padding="SAME"
    ... )
    >>> df[:, :, 0, 0]
    Array([[4., 4., 2.],
           [4., 4., 2.],
           [2., 2., 1.]], dtype=float32)
    """
    input, out_backprop = _operands(input=input, out_backprop=out_backprop)
    given = Arguments(
        input=input.shape,
        filter=filter_sizes,
        out_backprop=out_backprop.shape,
        strides=strides,
        padding=padding,
        explicit_paddings=explicit_paddings,
        data_format=data_format,
        dilations=dilations,
        precision=precision,
        implementation=implementation,
    )
    return _apply(FILTER_GRAD, given, input, out_backprop, name, forward_mode)


class Selection(NamedTuple):
    """What `implementations` says about one op of a function."""

    op: str  # "forward", "input_grad", "filter_grad" or "conv_general_dilated", which is lax's
    runs: str | None  # the name of the implementation that runs, None if none of the requested can
    # In order of preference: why each can't run, or None. Whether JAX can lower a kernel is known
    # of those that were tried, of which the one that runs is the last.
    reasons: dict[str, str | None]


def implementations(
    fun: Callable,
    *args: Any,
    platform: str | None = None,
    exported: bool = False,
    **kwargs: Any,
) -> list[Selection]:
    """Tells which implementation runs for each depthwise convolution in `fun(*args, **kwargs)`.

    Nothing is run: `fun`, one of the functions of this package or any function that calls them, its
    gradient included, is traced for the shapes of its arguments. Of a sharded program the answer is
    that for whole arrays, though each device decides by its part. Where an operand or the result is
    empty nobody has a reason: it is zeros, by whatever name and on any platform.

    Args:
      fun: the function.
      *args: its arguments. `jax.ShapeDtypeStruct` and arrays of floats, also in containers, are
        traced. Vectors, which may be sizes, and anything else are passed on as they are.
      platform: "cpu", "cuda", "rocm" or "tpu"; by default that of `jax.default_backend()`.
      exported: whether it is for `jax.export`, which leaves out native_cpu and pallas_gpu, and
        pallas_tpu where arguments are sharded; by name they run all the same.
      **kwargs: its keyword arguments, likewise.

    Returns:
      One `Selection` for each depthwise convolution that the result needs, in traced order. Those
      of lax's that do not run here are listed too, as run by "lax", with the reason of "jax_dwbp".

    >>> x, f = jnp.ones((1, 4, 4, 2), "float32"), jnp.ones((3, 3, 2, 1), "float32")
    >>> [op] = implementations(
    ...     depthwise_conv2d_native, x, f, strides=(1, 1), padding="SAME", platform="rocm"
    ... )
    >>> op.runs
    'lax'
    """
    if not callable(fun):
        raise TypeError(f"`fun` must be a function, got {brief(fun)}")
    if platform is None:
        platform = _compat.default_platform()
        platform = platform if platform in _select.PLATFORMS else _select.OTHER
    elif not isinstance(platform, str) or platform not in _select.PLATFORMS:
        raise ValueError(
            f"`platform` must be one of {', '.join(_select.PLATFORMS)}, got {brief(platform)}"
        )
    if not isinstance(exported, bool):
        raise TypeError(f"`exported` must be True or False, got {brief(exported)}")
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [
        isinstance(leaf, jax.ShapeDtypeStruct)
        or (
            isinstance(leaf, jax.Array | np.ndarray)
            and leaf.ndim != 1
            and leaf.dtype.name in DTYPES
        )
        for leaf in leaves
    ]

    def call(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        filled = [next(remaining) if t else x for x, t in zip(leaves, traced, strict=True)]
        full_args, full_kwargs = jax.tree.unflatten(tree, filled)
        return fun(*full_args, **full_kwargs)

    arrays = [x for x, t in zip(leaves, traced, strict=True) if t]
    # What is exported is not divided by the rules of this package.
    shardings = (getattr(x, "sharding", None) for x in arrays)
    sharded_export = exported and any(s is not None and s.num_devices > 1 for s in shardings)
    selections = []
    for found in _rules.ops_in(call, ops_of_lax, arrays):
        if isinstance(found, str):
            reasons: dict[str, str | None] = {"jax_dwbp": found, "lax": None}
            selections.append(Selection("conv_general_dilated", "lax", reasons))
        else:
            op, spec, a, b = found
            target = Target(platform, sharded_export or _compat.is_partly_manual(a), exported)
            selections.append(Selection(op.name, *_select.explain(op, spec, target, a, b)))
    return selections


def _operands(**operands: Any) -> list[jax.Array]:
    """The operands as arrays of one dtype. NumPy's are not copied to a device before all checks."""
    arrays: dict[str, Any] = {}
    dtypes: dict[str, np.dtype] = {}
    for name, operand in operands.items():
        if isinstance(operand, jax.Array):
            if _compat.is_deleted(operand):
                raise ValueError(
                    f"`{name}` must have its data, got {brief(operand)} that was deleted or donated"
                )
            arrays[name], dtypes[name] = operand, operand.dtype
        else:
            arrays[name] = _as_array(name, operand)
            dtypes[name] = jax.dtypes.canonicalize_dtype(arrays[name].dtype)
        check_dtype(name, dtypes[name])
    if len(set(dtypes.values())) > 1:
        # A weak type gives way to the other operand's, as everywhere in JAX.
        weak = {name for name, x in arrays.items() if jax.typeof(x).weak_type}
        strong = {dtypes[name] for name in dtypes if name not in weak}
        if weak and strong:
            [dtype] = strong
            arrays |= {name: arrays[name].astype(dtype) for name in weak}
        else:
            check_same_dtype(dtypes)
    return list(arrays.values())


def _as_array(name: str, value: Any) -> Any:
    if isinstance(value, tuple | list):
        with contextlib.suppress(Exception):  # of tracers, say, which JAX can stack
            value = np.asarray(value)
    if type(value) is np.ndarray:
        return value.astype(value.dtype.newbyteorder("="), copy=False)
    try:
        return jnp.asarray(value)
    except Exception as error:  # also what the caller's object raises
        raise TypeError(f"`{name}` must be an array, got {brief(value)}: {brief(error)}") from error


def _apply(
    op: Op, given: Arguments, a: jax.Array, b: jax.Array, name: Any, forward_mode: Any
) -> jax.Array:
    spec = canonicalize(op, given)
    if spec.implementation is not None:
        _select.selected(op, spec, Target(None), a, b)  # what no platform can do is refused here
    if not isinstance(forward_mode, bool):
        raise TypeError(f"`forward_mode` must be True or False, got {brief(forward_mode)}")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`name` must be a string or None, got {brief(name)}")
    # A copy of NumPy's: the caller may change them while the op still runs.
    a, b = (x if isinstance(x, jax.Array) else jnp.asarray(x.copy()) for x in (a, b))
    with jax.named_scope(name) if name else contextlib.nullcontext():
        return _rules.apply(a, b, op=op, spec=spec, forward_mode=forward_mode)
