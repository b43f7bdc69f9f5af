"""Faults of the implementations that JAX compiles, and of the call of the native one."""

from mutants.arguments import BATCHING, ERRORS, IMPLEMENTATIONS, TRANSFORMATIONS, values
from mutants.fault import Operator, faults

FAULTS = [
    *faults(
        "_impl/lax.py",
        ("positions > _MAX_POSITIONS", Operator("Gt_GtE"), IMPLEMENTATIONS),
        (
            "before = (kernel - 1) * dilation - low",
            "before = (kernel - 1) * dilation + low",
            values("lax", "input_grad"),
        ),
        ("[::-1, ::-1].transpose", "[::-1].transpose", values("lax", "input_grad")),
        ("if groups == 1", "if groups == 0", IMPLEMENTATIONS),
        ("precision=spec.precision", "precision=None", TRANSFORMATIONS),
        ('"float32" if lhs.dtype.itemsize < 4 else None', "None", IMPLEMENTATIONS),
        ("problems, channels), 3, 0)", "channels, problems), 4, 0)", f"{BATCHING} -k lax"),
        ("window - size - low))", "window - size + low))", values("lax", "filter_grad")),
    ),
    *faults(
        "_impl/xla_taps.py",
        ("s > _MAX_COLUMNS", Operator("Gt_GtE"), IMPLEMENTATIONS),
        ('op != "input_grad" and padded', Operator("NotEq_Eq"), f"{ERRORS} {IMPLEMENTATIONS}"),
        ("if a.dtype.itemsize < 4", "if a.dtype.itemsize < 2", values("xla_taps", "forward")),
        ("_CHAIN = 5", "_CHAIN = 500", values("xla_taps", "forward")),
        ("_MAX_RUN, _RUN = 128", "_MAX_RUN, _RUN = 10**9", values("xla_taps", "filter_grad")),
        (
            "jnp.minimum(_RADIX, -((start - len(rows)) // part))",
            "_RADIX",
            values("xla_taps", "forward"),
        ),
        (
            ":h, :w, m :: spec.multiplier",
            ":h, :w, m * spec.channels : (m + 1) * spec.channels",
            values("xla_taps", "input_grad"),
        ),
        (
            "if not rows or not cols:\n        return jnp.zeros(shape, a.dtype)",
            Operator("ReplaceOrWithAnd"),
            values("xla_taps", "input_grad"),
        ),
        ("len(rows) == 1 or", Operator("ReplaceOrWithAnd"), values("xla_taps", "forward")),
        (
            "(taps[0].k, size - 1 - taps[-1].k)",
            "(size - 1 - taps[-1].k, taps[0].k)",
            values("xla_taps", "filter_grad"),
        ),
        ("max(0, -min(offsets))", "-min(offsets)", values("xla_taps", "forward")),
    ),
    *faults(
        "_impl/taps.py",
        (
            "first = max(0, -(((out - 1) * stride - pads[0]) // dilation))",
            "first = -(((out - 1) * stride - pads[0]) // dilation)",
            values("xla_taps", "forward"),
        ),
        ("(size - 1 +", Operator("NumberReplacer"), values("xla_taps", "forward")),
        (
            "out * stride) // dilation + 1",
            Operator("NumberReplacer"),
            values("xla_taps", "input_grad"),
        ),
        (
            "- count * stride) // dilation) - 1",
            Operator("NumberReplacer"),
            values("xla_taps", "input_grad"),
        ),
        ("low - k * dilation) // stride)", Operator("Sub_Add"), values("xla_taps", "input_grad")),
        (
            "low, count = pads[0], -(-size // stride)",
            "low, count = pads[0], size // stride",
            values("xla_taps", "input_grad"),
        ),
        ("k * dilation - pads[0]", "k * dilation - pads[1]", values("xla_taps", "filter_grad")),
    ),
    *faults(
        "_impl/native_cpu.py",
        (
            'packed = spec.multiplier if op == "input_grad"',
            "packed = 1 if op",
            "tests/test_native_cpu.py -k scratch",
        ),
        (
            "[low for low, _ in spec.padding]",
            "[high for _, high in spec.padding]",
            values("native_cpu", "forward"),
        ),
        ("except OSError", Operator("ExceptionReplacer"), "tests/test_native_cpu.py -k library"),
        (
            "np.array(spec.rhs_dilation",
            "np.array(spec.window_strides",
            values("native_cpu", "input_grad"),
        ),
        ("min(written, _TILE) + reach", "written + reach", "tests/test_native_cpu.py -k scratch"),
        (
            "_scratch(op, spec) > _MAX_SCRATCH",
            "_scratch(op, spec) > 2 * _MAX_SCRATCH",
            "tests/test_native_cpu.py -k scratch",
        ),
    ),
]
