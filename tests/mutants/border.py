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
        ('    _check_elements("the output", implied)\n', "", ERRORS),
        (">= 2**60", Operator("GtE_Gt"), ERRORS),
        ("any(pairs[0]) or any(pairs[depth])", Operator("ReplaceOrWithAnd"), ERRORS),
        ("value[0] != batch", "value[0] is None", ERRORS),
        ('"bfloat16_3x": "high"', '"bfloat16_3x": "default"', TRANSFORMATIONS),
        ("len(set(dtypes.values())) > 1", Operator("NumberReplacer"), ERRORS),
    ),
    *faults(
        "_version.py",
        ("if entry.is_dir():", "if False:", "tests/test_layers.py"),
    ),
    *faults(
        "_api.py",
        ("leaf.ndim != 1", Operator("NotEq_Eq"), IMPLEMENTATIONS),
        ("_compat.is_deleted(operand)", "False", ERRORS),
        ("exported and any(s is not None", "False and any(s is not None", IMPLEMENTATIONS),
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
        ("call.batch_groups != 1,", "False,", f"{ERRORS} {STAND_IN}"),
        ("any(step != 1 for step in call.lhs_dilation)", "False", STAND_IN),
        ("all(x.weak_type for x in call.types)", "False", ERRORS),
        ("[(0, 0), *padding]", "[*padding, (0, 0)]", STAND_IN),
        (
            "sharding.spec[call.numbers.lhs_spec[1]]",
            "sharding.spec[call.numbers.lhs_spec[0]]",
            EXPLICIT,
        ),
        (
            "        precision=call.precision,\n",
            "",
            f"{STAND_IN} {TRANSFORMATIONS}",
        ),
        ("(max(low, 0), max(high, 0))", "(abs(low), abs(high))", STAND_IN),
        ("none + axes + none if", "none + axes[::-1] + none if", STAND_IN),
        ("{LEFT_TO_LAX}{call}", "{call}", STAND_IN),
        ('hasattr(before, "chooses")', "before is not _LAX", IN_PLACE),
        ("_in_place.value else before", "True else before", IN_PLACE),
        ("with _in_place(True):", "with _in_place(False):", IN_PLACE),
    ),
    *faults(
        "tf2jax.py",
        ("forward_mode=True", Operator("ReplaceTrueWithFalse"), "tests/test_tf2jax.py"),
        ("1 if channels_first", Operator("NumberReplacer"), "tests/test_tf2jax.py"),
        ('attributes.get("dilations") or (1,) * 4', "(1,) * 4", "tests/test_tf2jax.py"),
        ("table.update(_OPS)", "table.update(_OPS | table)", "tests/test_tf2jax.py"),
    ),
]
