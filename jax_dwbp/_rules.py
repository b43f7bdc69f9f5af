"""The rules that make the three ops compose: derivatives, batching, lowering.

The depthwise convolution of x by f, paired with dy, is one trilinear form:

    T(x, f, dy) = sum over n,p,q,r,s,c,m of x[n,h,w,c] * f[r,s,c,m] * dy[n,p,q,c*M+m]
        with h = p*stride - low + r*dilation, w = q*stride - low + s*dilation

Fewer spatial axes, or one more, change nothing in what follows.
Each of the three ops is the derivative of T by one argument, which is linear in the other two:

    forward(x, f) = dT/d(dy)      input_grad(f, dy) = dT/dx      filter_grad(x, dy) = dT/df

So the derivatives of an op need nothing new. Let an op leave out the argument v of T and take a
and b, and let u be the cotangent of its result, shaped like v. Then <u, op(a, b)> = T(a, b, u), and

    the cotangent of a is the op that leaves out a, at (b, u);
    the cotangent of b is the op that leaves out b, at (a, u), each in the order (x, f, dy).

The set is closed, hence derivatives of every order. The same holds if arrays have a leading axis of
independent problems, which is what `vmap` adds; a filter without one is shared by all problems.

The call is jit > custom_vjp > primitive. Without the jit an eager gradient would compute cotangents
that nobody asked for, and an eager call would pay for custom_vjp. The primitive keeps tracing
cheap: its implementation is traced only for the platforms that are lowered for. (Ten layers with
the taps in the jaxpr take 16 times as long to trace, forward and gradient.)
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxprs_in_params
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jax_dwbp import _compat, _partition, _select
from jax_dwbp._compat import Target
from jax_dwbp._impl import interpret
from jax_dwbp._spec import LEFT_TO_LAX, OPS, PRECISIONS, ConvSpec, Op
from jax_dwbp._version import sources

# The op that leaves out each argument of T.
_LEAVES_OUT = {op.result: op for op in OPS.values()}


def apply(a: jax.Array, b: jax.Array, *, op: Op, spec: ConvSpec, forward_mode: bool) -> jax.Array:
    """Runs `op`: forward(x, f), input_grad(f, dy) or filter_grad(x, dy)."""
    run = _applied[op]
    if _explicitly_sharded(a, b):
        # As they are, for the sake of their cotangents, which this gives the operand's type. Those
        # that shard_map returns for an array from before the mesh have another.
        a, b = (_resharded(x) for x in (a, b))
        run = _explicit
    try:
        return run(a, b, op=op, spec=spec, forward_mode=forward_mode)
    except TypeError as error:
        if _compat.FORWARD_MODE_ERROR in str(error):  # not where a function around this is jitted
            raise TypeError(f"{error} `forward_mode=True` makes the op one that can.") from error
        raise


def _explicitly_sharded(*operands: jax.Array) -> bool:
    return any(axis for operand in operands for axis in jax.typeof(operand).sharding.spec)


def _resharded(x: jax.Array) -> jax.Array:
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.empty:
        return jax.sharding.reshard(x, sharding)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, sharding.spec)


def _apply(a: jax.Array, b: jax.Array, *, op: Op, spec: ConvSpec, forward_mode: bool) -> jax.Array:
    # These are read when an op is called; by the time it is lowered they may have changed.
    precision = spec.precision
    if precision is None:
        default = jax.config.jax_default_matmul_precision  # pyright: ignore
        precision = PRECISIONS.get(str(default).lower())
    spec = dataclasses.replace(
        spec, precision=precision, interpret=spec.interpret or interpret.value
    )
    a, b = _same_varying_axes(a, b)
    return (_bind if forward_mode else _reverse_mode)(op, spec, a, b)


def _jitted(name: str) -> Callable[..., jax.Array]:
    """`_apply` by the name that jaxprs and profiles show."""

    def function(a: jax.Array, b: jax.Array, *, op: Op, spec: ConvSpec, forward_mode: bool):
        return _apply(a, b, op=op, spec=spec, forward_mode=forward_mode)

    function.__name__ = function.__qualname__ = name
    return jax.jit(function, static_argnames=("op", "spec", "forward_mode"))


_applied = {op: _jitted(op.function) for op in OPS.values()}


@functools.partial(jax.jit, static_argnames=("op", "spec", "forward_mode"))
def _explicit(
    a: jax.Array, b: jax.Array, *, op: Op, spec: ConvSpec, forward_mode: bool
) -> jax.Array:
    def part(spec, a, b):
        return _applied[op](a, b, op=op, spec=spec, forward_mode=forward_mode)

    return _partition.explicit(op, spec, part, a, b)


Found = tuple[Op, ConvSpec, Any, Any] | str


def ops_in(function: Callable, of_lax: Callable[..., Found], *args: Any) -> list[Found]:
    """What each depthwise convolution in `function` is bound with, but for unused results. For each
    of lax's own, what `of_lax(lhs, rhs, params)` says, or why the stand-in for lax's left it."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)

    def walk(jaxpr: Any) -> Iterator[Found]:
        for eqn in jaxpr.eqns:
            avals = [v.aval for v in eqn.invars]
            if eqn.primitive is _primitive:
                yield eqn.params["op"], eqn.params["spec"], *avals
            elif eqn.primitive is lax.conv_general_dilated_p:
                found = of_lax(*avals, eqn.params)
                for scope in _compat.scopes_of(eqn):
                    if isinstance(found, str) and scope.startswith(LEFT_TO_LAX):
                        found = scope.removeprefix(LEFT_TO_LAX)
                yield found
            for inner in jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return list(walk(jaxpr))


def _same_varying_axes(*operands: jax.Array) -> list[jax.Array]:
    """The operands, varying over the same axes of a `shard_map` so that their cotangents do."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    every = frozenset().union(*varying)
    return [
        lax.pcast(x, tuple(every - axes), to="varying") if axes != every else x
        for x, axes in zip(operands, varying, strict=True)
    ]


def _bind(op: Op, spec: ConvSpec, a: Any, b: Any) -> Any:
    return _primitive.bind(a, b, op=op, spec=spec)


def _cotangent(u: Any, a: Any, b: Any, *, index: int, op: Op, spec: ConvSpec) -> Any:
    """The cotangent of a or b, the operand `index` of `op`, from the other operand and u."""
    operand, other = (a, b)[index], (b, a)[index]
    if operand.aval.ndim < u.ndim:
        # A filter that problems share has the gradient of one problem with the images of all.
        u, other = (_join(u), _join(other))
    known = {op.operands[1 - index]: other, op.result: u}
    derivative = _LEAVES_OUT[op.operands[index]]
    return _bind(derivative, spec, *(known[name] for name in derivative.operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reverse_mode(op: Op, spec: ConvSpec, a: jax.Array, b: jax.Array) -> jax.Array:
    return _bind(op, spec, a, b)


def _fwd(op: Op, spec: ConvSpec, a: jax.Array, b: jax.Array):
    return _bind(op, spec, a, b), (a, b)


def _bwd(op: Op, spec: ConvSpec, residuals: tuple[jax.Array, jax.Array], u: jax.Array):
    return (
        _cotangent(u, *residuals, index=0, op=op, spec=spec),
        _cotangent(u, *residuals, index=1, op=op, spec=spec),
    )


_reverse_mode.defvjp(_fwd, _bwd)


# The primitive under the custom_vjp, with the rules of its own that JAX's transformations look up:
# batching, and the derivatives of a bilinear function, for forward_mode and for higher orders.
_primitive = Primitive("depthwise_conv2d")


@_primitive.def_impl
def _eager(a, b, *, op, spec):
    # Under `disable_jit` and, to find the culprit of a NaN, `debug_nans` JAX runs op by op. This is
    # one op: what is in it can only be run compiled.
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        return apply(a, b, op=op, spec=spec, forward_mode=True)


@_primitive.def_abstract_eval
def _abstract_eval(a, b, *, op, spec):
    return a.update(shape=spec.result_shape(op, a.shape, b.shape), weak_type=False)


def _batch(operands, dims, *, op, spec):
    """Adds the new axis to the axis of problems. A filter without one is shared by all of them."""
    operands = [
        jnp.moveaxis(operand, dim, 0) if dim is not None else operand
        for operand, dim in zip(operands, dims, strict=True)
    ]
    mapped = operands[dims[0] is None]
    ranks = [operand.ndim for operand in operands]
    rank = len(spec.axes) + 2  # without problems
    shared = ("f", None, rank) in zip(op.operands, dims, ranks, strict=True)
    if not shared:
        operands = [
            _repeated(operand, mapped) if dim is None else operand
            for operand, dim in zip(operands, dims, strict=True)
        ]
    shape = spec.result_shape(op, *(operand.shape for operand in operands))
    axis = 0
    if {operand.ndim for operand in operands} == {rank + 1, rank + 2}:
        axis = 1  # inner problems share each of the filters
    operands = [_join(x, axis) if x.ndim == rank + 2 else x for x in operands]
    if _explicitly_sharded(*operands):
        result = apply(*operands, op=op, spec=spec, forward_mode=True)
    else:
        result = _bind(op, spec, *operands)
    return (result if result.ndim == len(shape) else _split(result, axis, shape)), 0


def _repeated(x: Any, mapped: Any) -> Any:
    """x for each index of the first axis of `mapped`, with its sharding."""
    y = jnp.broadcast_to(x, (mapped.shape[0], *x.shape))
    sharding, own = (jax.typeof(a).sharding for a in (mapped, x))
    if not sharding.spec[0]:
        return y
    spec = PartitionSpec(sharding.spec[0], *own.spec)
    return jax.sharding.reshard(y, NamedSharding(sharding.mesh, spec))


def _join(x: Any, axis: int = 0) -> Any:
    """x with `axis` and the next one as one, sharded as the first of them."""
    size = x.shape[axis] * x.shape[axis + 1]
    spec = jax.typeof(x).sharding.spec
    return _reshaped(
        x,
        (*x.shape[:axis], size, *x.shape[axis + 2 :]),
        (*spec[: axis + 1], *spec[axis + 2 :]),
    )


def _split(x: Any, axis: int, shape: tuple[int, ...]) -> Any:
    """x in `shape`, with `axis` as two of which the first has its sharding."""
    spec = jax.typeof(x).sharding.spec
    return _reshaped(x, shape, (*spec[: axis + 1], None, *spec[axis + 1 :]))


def _reshaped(x: Any, shape: tuple[int, ...], spec: tuple[Any, ...]) -> Any:
    if not any(spec):
        return x.reshape(shape)
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
    return lax.reshape(x, shape, out_sharding=sharding)


def _lower(ctx, a, b, *, op, spec, platform):
    target = _compat.target_of(ctx, platform)
    with contextlib.ExitStack() as contexts:
        if _compat.in_place.value is not None:
            # What an implementation asks of lax is lax's.
            contexts.enter_context(_compat.in_place(None))
            ctx = _compat.without_cache(ctx)
        if ctx.avals_in[0].dtype.itemsize == 8:
            # Where this is lowered float64 may be off, though it was on where the op was called.
            contexts.enter_context(jax.enable_x64(True))
        if target.partitioned and not target.exported:
            lowered = _lower_partitioned(ctx, a, b, op, spec, target)
            if not isinstance(lowered, str):
                return lowered
            _warn_of_lost_kernel(lowered, op, spec, target, *ctx.avals_in)
        # The implementations know nothing of the mesh of a `shard_map` around them.
        ctx = ctx.replace(avals_in=list(map(_compat.plain, ctx.avals_in)))
        contexts.enter_context(use_abstract_mesh(AbstractMesh((), ())))
        run = functools.partial(_select.run, op, spec, target)
        return _compat.lower(ctx, run, a, b)


def _lower_partitioned(ctx: Any, a: Any, b: Any, op: Op, spec: ConvSpec, target: Target) -> Any:
    """What XLA divides by the rules of `_partition`, or why it can't."""
    if isinstance(target.meshes, str):
        return target.meshes
    mesh, *others = (_partition.fine_mesh(mesh) for mesh in target.meshes)
    if any(other.axis_sizes != mesh.axis_sizes for other in others):
        return "and by meshes that cut them differently"
    able = _select.able(op, spec, Target(target.platform), *ctx.avals_in)
    content = f"{sources()} {op} {spec} {target.platform} {ctx.avals_in} {able}"
    run = functools.partial(_partition.run, op, spec, target)
    return _compat.lower_partitioned(ctx, run, mesh, content, a, b)


def _warn_of_lost_kernel(
    reason: str, op: Op, spec: ConvSpec, target: Target, a: Any, b: Any
) -> None:
    """If XLA now does without the kernel that each device would have run."""
    alone, divided = (
        _select.selected(op, spec, t, a, b).name for t in (Target(target.platform), target)
    )
    if alone != divided:
        warnings.warn(
            f"{op} of a depthwise convolution is run by {divided} and not by {alone}: it is "
            f"divided among devices, {reason}",
            stacklevel=2,
        )


_compat.let_inspectors_see(_primitive)
batching.primitive_batchers[_primitive] = _batch
ad.defbilinear(
    _primitive,
    functools.partial(_cotangent, index=0),
    functools.partial(_cotangent, index=1),
)
# What is registered for no platform is for any other.
mlir.register_lowering(_primitive, functools.partial(_lower, platform=_select.OTHER))
for _platform in _select.PLATFORMS:
    mlir.register_lowering(
        _primitive, functools.partial(_lower, platform=_platform), platform=_platform
    )
