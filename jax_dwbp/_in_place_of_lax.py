"""Lets lax's own convolutions run here, whoever calls them.

`install` replaces how JAX lowers the primitive: so it does not matter where a program has the
function from, and what is traced, differentiated and batched is lax's own. Derivatives and `vmap`
write other forms of it, which `_depthwise` knows.

`in_place_of_lax` may be left before anything is lowered, where it is entered in a function that is
traced. So it also replaces the function that is called.
"""

import contextlib
import functools
import operator
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from jax_dwbp import _compat, _select
from jax_dwbp._compat import Target
from jax_dwbp._conv_general_dilated import conv_general_dilated
from jax_dwbp._depthwise import Convolution, Depthwise, op_of
from jax_dwbp._rules import Found
from jax_dwbp._spec import brief

# What is replaced: nothing, the lowering, or the function too. The caches of `jit` look at it.
_LOWERING, _FUNCTION = "lowering", "function"
_lock = threading.Lock()


def install() -> None:
    """Lets depthwise convolutions of lax's run here from now on, in all threads of the process.

    For programs that have them by libraries: call it once, before anything is traced. Each
    `jax.lax.conv_general_dilated` that is lowered afterwards is looked at, and those that
    `jax_dwbp.conv_general_dilated` takes run by the implementation that is the best for them:
    convolutions, what `jax.grad` and `jax.vmap` make of them, and transposed convolutions. The
    others are lowered as before, bit for bit, but for complex ones on a CPU: of these lax makes
    real ones, which run here. Results are the same to rounding.

    It is part of what `jax.jit` caches by: functions are traced again that were before. What is
    compiled already and kept stays as it was, as that of a Keras model: call `compile` again. What
    XLA can't look into has no FLOPs in `cost_analysis`. Filters that are large against the signal
    run by Fourier transforms, which round otherwise, but for `precision="highest"`: see
    `jax_dwbp.conv_general_dilated`.

    >>> import jax_dwbp
    >>> jax_dwbp.install()
    >>> jax_dwbp.uninstall()
    """
    _compat.replace_lowering_of_convolutions(_lower, _select.PLATFORMS)
    _compat.in_place.set_global(_LOWERING)


def uninstall() -> None:
    """Takes `install` back: jitted functions are traced again that were meanwhile."""
    _compat.in_place.set_global(None)


@contextlib.contextmanager
def in_place_of_lax() -> Iterator[None]:
    """Within it depthwise convolutions of lax's run here, of what this thread traces.

    It is `install` for a part of a program, and it may be entered in a function that is traced. For
    that, `jax.lax.conv_general_dilated` is `jax_dwbp.conv_general_dilated` within it, for layers
    that look it up when they are called, as those of Equinox, Haiku and Keras do. Who takes the
    function within it and keeps it has lax's outside. For a layer that has bound it before, as that
    of Flax' nnx, the context must be around the call of what is jitted.

    It is part of what `jax.jit` caches by: what was traced outside is traced again within, and the
    other way round.

    >>> x, f = jnp.ones((1, 4, 8, 8)), jnp.ones((4, 1, 3, 3))
    >>> with in_place_of_lax():
    ...     y = jax.lax.conv_general_dilated(x, f, (1, 1), "SAME", feature_group_count=4)
    """
    _compat.replace_lowering_of_convolutions(_lower, _select.PLATFORMS)
    _replace_function()
    with _compat.in_place(_FUNCTION):
        yield


def _replace_function() -> None:
    """Puts in lax's place what chooses, for good: who has patched it meanwhile keeps the patch."""
    with _lock:
        before = lax.conv_general_dilated
        if hasattr(before, "chooses"):
            return

        @functools.wraps(before)
        def chosen(*args: Any, **kwargs: Any) -> jax.Array:
            ours = _compat.in_place.value == _FUNCTION
            return (conv_general_dilated if ours else before)(*args, **kwargs)

        chosen.chooses = True  # pyright: ignore[reportAttributeAccessIssue]
        chosen.__module__ = "jax.lax"  # where a pickle finds it, and lax's own in another process
        lax.conv_general_dilated = chosen


def ops_of_lax(lhs: Any, rhs: Any, params: dict[str, Any]) -> Found:
    """The op that is bound in place of one of lax's convolutions, or why none is."""
    found = _found(lhs, rhs, params)
    if isinstance(found, str):
        return found
    with use_abstract_mesh(lhs.sharding.mesh):  # of a `shard_map` around it
        a, b = found.op_operands(lhs, rhs)
    return found.op, found.spec, a, b


def _found(lhs: Any, rhs: Any, params: dict[str, Any]) -> Depthwise | str:
    if _compat.in_place.value is None:
        return "it is lax's own: neither `install` was called, nor is this `in_place_of_lax`"
    shardings = (lhs.sharding, rhs.sharding, params["out_sharding"])
    if any(sharding is not None and any(sharding.spec) for sharding in shardings):
        return "an operand or the result has explicit sharding"
    numbers = params["dimension_numbers"]
    # NumPy's integers are lax's too.
    strides, lhs_dilation, rhs_dilation = (
        tuple(map(operator.index, params[name]))
        for name in ("window_strides", "lhs_dilation", "rhs_dilation")
    )
    conv = Convolution(
        lhs=tuple(lhs.shape[i] for i in numbers.lhs_spec),
        rhs=tuple(rhs.shape[i] for i in numbers.rhs_spec),
        numbers=numbers,
        strides=strides,
        padding=tuple(params["padding"]),
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        groups=operator.index(params["feature_group_count"]),
        batch_groups=operator.index(params["batch_group_count"]),
        precision=params["precision"],
        dtypes=(lhs.dtype, rhs.dtype, jnp.dtype(params["preferred_element_type"] or lhs.dtype)),
    )
    return op_of(conv)


def _lower(before: Any, platform: str, ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    with contextlib.ExitStack() as contexts:
        if AxisType.Manual in ctx.avals_in[0].sharding.mesh.axis_types:
            # To a device its part is whole.
            contexts.enter_context(use_abstract_mesh(AbstractMesh((), ())))
        if max(x.dtype.itemsize for x in (*ctx.avals_in, *ctx.avals_out)) == 8:
            contexts.enter_context(jax.enable_x64(True))
        try:
            found = _taken(ctx, platform, params)
        except (RecursionError, MemoryError):  # of now and here, not of the convolution
            raise
        except Exception as error:  # a program that never named this package shall not end by it
            warnings.warn(f"a convolution of lax's is not looked at: {brief(error)}", stacklevel=2)
            found = None
        if found is not None:
            avals = list(map(_compat.plain, ctx.avals_in))
            return _compat.lower(ctx.replace(avals_in=avals), found.apply, lhs, rhs)
    return before(ctx, lhs, rhs, **params)


def _taken(ctx: Any, platform: str, params: dict[str, Any]) -> Depthwise | None:
    found = _found(ctx.avals_in[0], ctx.avals_in[1], params)
    if isinstance(found, str):
        return None
    target = _compat.target_of(ctx, platform)
    if not target.exported and not isinstance(target.meshes, str):
        target = Target(platform)  # as each device chooses for its part
    operands = found.op_operands(*map(_compat.plain, ctx.avals_in))
    name = _select.selected(found.op, found.spec, target, *operands).name
    # What is fast without groups is a kernel, or a transform.
    slow = ("lax", "xla_taps") if found.is_dense else ("lax",)
    return None if name in slow else found
