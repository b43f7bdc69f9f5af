"""Faults of what checks arguments and stands in for others."""

from mutants.arguments import (
    DERIVATIVES,
    ERRORS,
    EXPLICIT,
    IMPLEMENTATIONS,
    IN_PLACE,
    STAND_IN,
    TRANSFORMATIONS,
    values,
)
from mutants.fault import Operator, faults

FAULTS = [
    *faults(
        "_spec.py",
        ("room <= -stride", Operator("LtE_Lt"), ERRORS),
        (
            "total // 2, total - total // 2",
            "total - total // 2, total // 2",
            values("xla_taps", "forward"),
        ),
        ("* dilation + 1 if kernel else 0", "* dilation + 1", "tests/test_values.py -k empty"),
        ('    _check_elements("the output", out_sizes)\n', "", ERRORS),
        (">= 2**60", Operator("GtE_Gt"), ERRORS),
        ("any(pairs[0]) or any(pairs[depth])", Operator("ReplaceOrWithAnd"), ERRORS),
        ("value[0] != batch", "value[0] is None", ERRORS),
        ('"bfloat16_3x": "high"', '"bfloat16_3x": "default"', TRANSFORMATIONS),
        ("len(set(dtypes.values())) > 1", Operator("NumberReplacer"), ERRORS),
    ),
    *faults(
        "_api.py",
        ("leaf.ndim != 1", Operator("NotEq_Eq"), IMPLEMENTATIONS),
        ("not isinstance(operand, Tracer) and operand.is_deleted()", "False", ERRORS),
        ("if weak and strong", Operator("ReplaceAndWithOr"), ERRORS),
        ("type(value) is np.ndarray", "isinstance(value, np.ndarray)", ERRORS),
        (
            "out_backprop, name, forward_mode)\n\n\nclass",
            "out_backprop, name, False)\n\n\nclass",
            DERIVATIVES,
        ),
        (
            "dtypes[name] = jax.dtypes.canonicalize_dtype(arrays[name].dtype)",
            "dtypes[name] = arrays[name].dtype",
            ERRORS,
        ),
    ),
    *faults(
        "_conv_general_dilated.py",
        ("np.argsort((n, *spatial, c))", "(n, *spatial, c)", STAND_IN),
        ("group == 1 == batch_group_count", "group == 1", f"{ERRORS} -k lax"),
        ("        and tuple(lhs_dilation) == ones\n", "", STAND_IN),
        ("not (types[0].weak_type and types[1].weak_type)", "True", ERRORS),
        ("((0, 0), *padding)", "(*padding, (0, 0))", STAND_IN),
        ("sharding.spec[numbers.lhs_spec[1]]", "sharding.spec[numbers.lhs_spec[0]]", EXPLICIT),
        (
            "        precision,\n        None,\n    )",
            "        None,\n        None,\n    )",
            f"{STAND_IN} {TRANSFORMATIONS}",
        ),
        ("            _entered -= 1\n", "            _entered = 0\n", IN_PLACE),
    ),
    *faults(
        "tf2jax.py",
        ("forward_mode=True", Operator("ReplaceTrueWithFalse"), "tests/test_tf2jax.py"),
        ("1 if channels_first", Operator("NumberReplacer"), "tests/test_tf2jax.py"),
        ('attributes.get("dilations") or (1,) * 4', "(1,) * 4", "tests/test_tf2jax.py"),
        ("table.update(_OPS)", "table.update(_OPS | table)", "tests/test_tf2jax.py"),
    ),
]
