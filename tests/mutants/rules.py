"""Faults of the rules, of the partition among devices and of the choice."""

from mutants.arguments import (
    BATCHING,
    CACHE,
    DERIVATIVES,
    ERRORS,
    IMPLEMENTATIONS,
    INSPECTORS,
    MESH,
    TRANSFORMATIONS,
    partition,
    rows,
    values,
)
from mutants.fault import Operator, faults

FAULTS = [
    *faults(
        "_rules.py",
        (
            "frozenset().union(*varying)",
            "frozenset.intersection(*varying)",
            "tests/test_sharding.py -k inside",
        ),
        ("PRECISIONS.get(str(default).lower())", "None", TRANSFORMATIONS),
        ("functools.partial(_cotangent, index=1)", Operator("NumberReplacer", 1), DERIVATIVES),
        ("dims[0] is None", Operator("Is_IsNot"), BATCHING),
        ("if not sharding.spec[0]", "if True", "tests/test_sharding.py -k vmap"),
        ("jax.disable_jit(False)", Operator("ReplaceFalseWithTrue"), TRANSFORMATIONS),
        (
            "jax.debug_nans(False)",
            Operator("ReplaceFalseWithTrue"),
            f"{ERRORS} -k nans",
            "JAX finds the NaN within what is run, and says the same",
        ),
        ("if alone != divided:", Operator("NotEq_Eq"), MESH),
        ("{op} {spec}", "{op}", CACHE),
        ("_compat.FORWARD_MODE_ERROR in str(error)", "False", INSPECTORS),
        ("dtype.itemsize == 8", Operator("NumberReplacer"), TRANSFORMATIONS),
        ("u, other = (_join(u), _join(other))", "u = _join(u)", BATCHING),
    ),
    *faults(
        "_partition.py",
        ("range(2, size + 1)", "range(2, size)", partition("forward")),
        ('if divisible and spec.channels > 1 else "k"', Operator("Gt_GtE"), partition("forward")),
        ("(out == 1 or not divisible)", "not divisible", partition("input_grad")),
        ('for factor in "npq"', 'for factor in "np"', partition("filter_grad")),
        ("max(left, right) > owned", Operator("Gt_GtE"), partition("forward and gathered")),
        ("part * rows // stride * stride for", "part * rows for", rows("input_grad")),
        ("[(right, left) for left, right in neighbours]", "neighbours", rows("forward")),
        (
            "summed and dtype.itemsize < 4",
            "summed and dtype.itemsize < 2",
            partition("rounded"),
        ),
        (" or used & set(mesh_axes)", "", partition("two_of_the_arrays")),
        ('{"p": "h", "q": "w"}', '{"p": "w", "q": "h"}', partition("input_grad")),
    ),
    *faults(
        "_dispatch.py",
        (
            '_ON_CPU = ("native_cpu", "xla_taps"',
            '_ON_CPU = ("xla_taps", "native_cpu"',
            IMPLEMENTATIONS,
        ),
        ("names.insert(0, names", Operator("NumberReplacer"), IMPLEMENTATIONS),
        ("(None, home) and (home", "(home,) and (home", values("native_cpu", "forward")),
        (
            "            if 4 in (a.ndim, b.ndim):\n                x",
            "            if x.ndim == 4:\n                x",
            f"{BATCHING} -k xla_taps",
        ),
        (
            "lax.optimization_barrier(canonical(*lax.optimization_barrier((a, b))))",
            "canonical(*lax.optimization_barrier((a, b)))",
            TRANSFORMATIONS,
        ),
        (
            "reasons[name] is None:\n            return name",
            "True:\n            return name",
            IMPLEMENTATIONS,
        ),
    ),
    *faults(
        "_compat.py",
        (
            "name not in axes.manual_axes",
            "name in axes.manual_axes",
            "tests/test_native_cpu.py -k shard",
        ),
        (
            "return ctx.module_context.lowering_parameters.for_export",
            "return False",
            "tests/test_export.py",
        ),
        ("(aval.sharding.mesh for aval in ctx.avals_in)", "()", MESH),
        ('("arg_attrs", "res_attrs")', '("arg_attrs",)', MESH),
        ('("arg_attrs", "res_attrs")', '("res_attrs",)', MESH),
        ("[jax.sharding.get_abstract_mesh()]", "[]", MESH),
        ('    call.attributes["backend_config"] = ir.StringAttr.get(digest)\n', "", CACHE),
        ('{"depthwise_conv2d": ir.StringAttr.get(digest)}', "{}", CACHE),
        ('config.error_checking_behavior_nan("ignore")', "config.debug_nans(False)", INSPECTORS),
        ("functools.partial(checkify.nan_error_check, primitive)", "print", INSPECTORS),
        ("jet.jet_rules[primitive] = ", "_ = ", INSPECTORS),
    ),
]
