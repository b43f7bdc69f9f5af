"""Faults of what checks arguments and stands in for others."""

from mutants.arguments import (
    DERIVATIVES,
    ERRORS,
    EXPLICIT,
    FORMS,
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
        ("sizes[1] != groups * filter_sizes[1] or", "", STAND_IN),
        ("groups > 1 and batch_groups > 1", "False", STAND_IN),
        ("all(x.weak_type for x in types)", "False", ERRORS),
        (
            "types[0].sharding.spec[numbers.lhs_spec[1]]",
            "types[0].sharding.spec[numbers.lhs_spec[0]]",
            EXPLICIT,
        ),
        (
            "        precision=precision,\n",
            "        precision=None,\n",
            f"{STAND_IN} {TRANSFORMATIONS}",
        ),
        ("{LEFT_TO_LAX}{found}", "{found}", STAND_IN),
    ),
    *faults(
        "_in_place_of_lax.py",
        ('hasattr(before, "chooses")', "before is not conv_general_dilated", IN_PLACE),
        ("if ours else before", "if True else before", IN_PLACE),
        ("with _compat.in_place(_FUNCTION):", "with _compat.in_place(None):", IN_PLACE),
        ("in_place.set_global(None)", "in_place.set_global(_LOWERING)", IN_PLACE),
        ("in_place.set_global(_LOWERING)", "in_place(_LOWERING).__enter__()", IN_PLACE),
        ('tuple(params["lhs_dilation"])', 'tuple(params["rhs_dilation"])', FORMS),
        ('params["preferred_element_type"] or', "", IN_PLACE),
    ),
    *faults(
        "_depthwise.py",
        ("low = reach - low + before", "low = reach - low", FORMS),
        ("size -= before + after", "size -= before", FORMS),
        ("f.swapaxes(-1, -2).reshape(*spec", "f.reshape(*spec", FORMS),
        ("[reach - low for reach, low", "[low for reach, low", FORMS),
        ("is_large and conv.groups == 1 and", "conv.groups == 1 and", FORMS),
        ("lax.transpose(f, np.argsort(", "lax.transpose(f, (", FORMS),
        ("lax.transpose(images, np.argsort(", "lax.transpose(images, (", f"{FORMS} {STAND_IN}"),
        ("            f = lax.rev(f, (0, 1))\n", "            pass\n", FORMS),
        ("none * 2 + axes if channels_first", "none + axes + none if channels_first", FORMS),
        ("dtypes[0].itemsize > dtypes[2].itemsize", "False", STAND_IN),
        ("_DENSE_CHANNELS = 16", "_DENSE_CHANNELS = 17", STAND_IN),
    ),
    *faults(
        "tf2jax.py",
        ("forward_mode=True", Operator("ReplaceTrueWithFalse"), "tests/test_tf2jax.py"),
        ("1 if channels_first", Operator("NumberReplacer"), "tests/test_tf2jax.py"),
        ('attributes.get("dilations") or (1,) * 4', "(1,) * 4", "tests/test_tf2jax.py"),
        ("table.update(_OPS)", "table.update(_OPS | table)", "tests/test_tf2jax.py"),
    ),
]
