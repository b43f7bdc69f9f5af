"""What JAX does not promise to keep, in one place.

When JAX changes, look here at the fields of a lowering's `ModuleContext` and its axis contexts, at
`mlir.lower_fun`, at the tables of lowering rules, and at what `custom_partitioning` writes into a
module. What is not recognised is no mesh, of which `_rules` warns, or an error. What is relied on
is held by tests/test_partition.py, tests/test_in_place_of_lax.py and tests/test_fresh_process.py.
What registers the rules of the primitive is in `_rules`.
"""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax import core
from jax._src import checkify, config, custom_partitioning
from jax._src.interpreters import mlir as mlir_rules
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.extend.core.primitives import conv_general_dilated_p
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType

_lock = threading.Lock()
# What JAX says of a `jvp` of a custom_vjp.
FORWARD_MODE_ERROR = "forward-mode autodiff"


# What `_in_place_of_lax` puts in the place of lax's convolutions, if it is not None.
in_place = jax.make_user_context(None)


def plain(x: Any) -> core.ShapedArray:
    """The shape and the dtype of x, and no sharding but that of no axis."""
    return core.ShapedArray(x.shape, x.dtype)


def is_deleted(x: jax.Array) -> bool:
    return not isinstance(x, core.Tracer) and x.is_deleted()


class Target(NamedTuple):
    """What an op is lowered for, as far as it is known."""

    platform: str | None  # the name of one, `_select.OTHER` if it is none of ours, None for any
    partitioned: bool = False  # XLA divides the program among devices
    exported: bool = False  # it has to run where this package is not installed, and later
    # Where it is partitioned and not exported: the meshes that it is divided over, or why none is.
    meshes: tuple[AbstractMesh, ...] | str = ()


def target_of(ctx: Any, platform: str) -> Target:
    partitioned = _is_partitioned(ctx.module_context.axis_context)
    exported = ctx.module_context.lowering_parameters.for_export
    meshes = _meshes_of(ctx) if partitioned and not exported else ()
    return Target(platform, partitioned, exported, meshes)


def _is_partitioned(axes: Any) -> bool:
    """Not if there is one device, nor if a `shard_map` has all axes of the mesh in its hands that
    divide anything."""
    if hasattr(axes, "manual_axes"):
        sizes = axes.mesh.shape.items()
        return any(size > 1 for name, size in sizes if name not in axes.manual_axes)
    return getattr(axes, "num_devices", 1) != 1


def _meshes_of(ctx: Any) -> tuple[AbstractMesh, ...] | str:
    """Those of the types of the operands, of the shardings of the program's own arguments and
    results, or of the context: of the first of these that have any."""
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return "by GSPMD and not by Shardy"
    axes = ctx.module_context.axis_context
    if hasattr(axes, "manual_axes"):
        return "along those axes of their mesh that are not in the hands of a `jax.shard_map`"
    if len(ctx.module_context.platforms) > 1:
        return "and lowered for several platforms"
    places: tuple[Callable[[], Iterable[AbstractMesh]], ...] = (
        lambda: (aval.sharding.mesh for aval in ctx.avals_in),
        lambda: _meshes_of_main(ctx.module_context.module),
        lambda: [jax.sharding.get_abstract_mesh()],
    )
    for place in places:
        meshes = [mesh for mesh in place() if not mesh.empty and mesh.size == axes.num_devices]
        if meshes:
            return tuple(meshes)
    return (
        "and no mesh of them was found: give the operands, or `jax.jit`, shardings of the kind "
        "`jax.sharding.NamedSharding`"
    )


def _meshes_of_main(module: Any) -> list[AbstractMesh]:
    """Those that the arguments and the results of the program are sharded over."""
    found = []
    for function in module.body.operations:
        attributes = function.operation.attributes
        if "sym_name" not in attributes or ir.StringAttr(attributes["sym_name"]).value != "main":
            continue
        for name in ("arg_attrs", "res_attrs"):
            for values in attributes[name] if name in attributes else ():
                if "sdy.sharding" in values:
                    mesh = sdy.MeshAttr(sdy.TensorShardingAttr(values["sdy.sharding"]).mesh_or_ref)
                    axes = [sdy.MeshAxisAttr(axis) for axis in mesh.axes]
                    sizes, names = ((axis.size for axis in axes), (axis.name for axis in axes))
                    found.append(AbstractMesh(tuple(sizes), tuple(names)))
    return found


def is_partly_manual(x: Any) -> bool:
    """Whether x is in a `shard_map` that leaves axes of its mesh to XLA."""
    mesh = x.sharding.mesh
    divided = {kind for kind, n in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if n > 1}
    return AxisType.Manual in mesh.axis_types and bool(divided - {AxisType.Manual})


def scopes_of(eqn: Any) -> list[str]:
    """The names of the `jax.named_scope`s and the transformations around it, outermost first."""
    return [scope.name for scope in eqn.source_info.name_stack.stack]


def default_platform() -> str:
    """That of the default devices, by the names that lowering rules are registered for."""
    [client] = {device.client for device in jax.devices()}
    if client.platform != "gpu":
        return client.platform
    return "rocm" if "rocm" in client.platform_version.lower() else "cuda"


def let_inspectors_see(primitive: Primitive) -> None:
    """Tells `checkify` to look for NaN in the results, and `jet` that they are bilinear."""
    checkify.error_checks[primitive] = functools.partial(checkify.nan_error_check, primitive)
    jet.jet_rules[primitive] = functools.partial(jet._bilinear_taylor_rule, primitive)


def partitioned(whole: Callable, partition: Callable, rule: Any) -> Callable:
    """`whole`, of which XLA runs parts that `partition` makes, as by `rule` shardings propagate."""
    function = custom_partitioning.custom_partitioning(whole)
    function.def_partition(partition, sharding_rule=rule)
    return function


def replace_lowering_of_convolutions(lower: Callable, platforms: Iterable[str]) -> None:
    """Registers `lower(before, platform, ctx, lhs, rhs, **params)`, unless that is the rule, where
    `before` is the rule that was there."""
    with _lock:
        for platform in platforms:
            rules = mlir_rules._platform_specific_lowerings[platform]
            entry = (
                rules.get(conv_general_dilated_p) or mlir_rules._lowerings[conv_general_dilated_p]
            )
            if getattr(entry.rule, "func", None) is not lower:
                rule = functools.partial(lower, entry.rule, platform)
                mlir.register_lowering(
                    conv_general_dilated_p, rule, platform=platform, inline=entry.inline
                )


def without_cache(ctx: Any) -> Any:
    """For a rule that lowers a primitive in another way than the rest of the program does."""
    return ctx.replace(module_context=ctx.module_context.replace(lowering_cache={}))


def lower(ctx: Any, run: Callable, *operands: Any) -> Any:
    # What JAX would look at for NaN within is an array outside of the program.
    with config.error_checking_behavior_nan("ignore"):
        return mlir.lower_fun(run, multiple_results=False)(ctx, *operands)


def lower_partitioned(
    ctx: Any, run: Callable, mesh: AbstractMesh, content: str, *operands: Any
) -> Any:
    """Lowers `run`, a call of a `custom_partitioning`, for the devices of `mesh`, or says why not.

    `content` says all that the partition depends on.
    """
    axes = ctx.module_context.axis_context
    [platform] = ctx.module_context.platforms
    try:
        devices = tuple(jax.devices(platform)[: mesh.size])
    except RuntimeError:
        devices = ()
    if len(devices) < mesh.size:
        return f"and {len(devices)} of the {mesh.size} devices are here"
    # JAX has a mesh and the devices there for primitives of its own. Of the devices nothing but
    # their number is compiled in.
    axes = dataclasses.replace(axes, device_assignment=devices, abstract_mesh=mesh)
    module = ctx.module_context.replace(axis_context=axes)
    [result] = lower(ctx.replace(module_context=module), run, *operands)
    _name_by_content(module, result.owner, f"{content} {mesh}")
    return [result]


def _name_by_content(module: Any, call: Any, content: str) -> None:
    """Lets a program find its rule of partitioning by what the rule is made of.

    JAX puts a pointer there. With it no other process finds the compiled program in the compilation
    cache; without it, by JAX's flag, programs that differ only in the rule would be taken for one.
    """
    known = custom_partitioning._sharding_callbacks
    digest = hashlib.sha256(content.encode()).hexdigest()
    pointer = ir.StringAttr(call.attributes["backend_config"]).value
    # Rules of the same content are alike, so that of another program does for this one.
    with _lock:
        rule = known.setdefault(digest.encode(), known[pointer.encode()])
    module.add_keepalive(rule)
    call.attributes["backend_config"] = ir.StringAttr.get(digest)
    call.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(
        {"depthwise_conv2d": ir.StringAttr.get(digest)}
    )
