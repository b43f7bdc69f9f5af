"""Faults of the implementations that JAX compiles, and of the call of the native one."""

from mutants.arguments import BATCHING, IMPLEMENTATIONS, TRANSFORMATIONS, values
from mutants.fault import Operator, faults

FFT = "tests/test_fft.py"
CROPPED = 'tests/test_values.py -k "test_cropped and lax"'

FAULTS = [
    *faults(
        "_impl/lax.py",
        ("positions > _MAX_POSITIONS", Operator("Gt_GtE"), IMPLEMENTATIONS),
        (
            "(axis.reach - low, axis.size",
            "(axis.reach + low, axis.size",
            values("lax", "input_grad"),
        ),
        ("precision=spec.precision", "precision=None", TRANSFORMATIONS),
        ("before, lhs.shape[axis] - after,", "0, lhs.shape[axis],", CROPPED),
        ("low + before * step,", "low + before,", CROPPED),
        ("high + is_mistaken", "high", f"{IMPLEMENTATIONS} -k swapped"),
        ("-1 if is_mistaken else None", "None", f"{IMPLEMENTATIONS} -k swapped"),
        ("before + after >= ", Operator("GtE_Gt"), CROPPED),
        ("problems, channels), -2, 0)", "channels, problems), -1, 0)", f"{BATCHING} -k lax"),
        ('2 if platform == "cpu" else 0', "2", IMPLEMENTATIONS),
    ),
    *faults(
        "_impl/xla_taps.py",
        ("s > _MAX_COLUMNS", Operator("Gt_GtE"), IMPLEMENTATIONS),
        ("_MAX_RUN, _RUN = 128", "_MAX_RUN, _RUN = 10**9", values("xla_taps", "filter_grad")),
        (
            ":h, :w, m :: spec.multiplier",
            ":h, :w, m * spec.channels : (m + 1) * spec.channels",
            values("xla_taps", "input_grad"),
        ),
        ("len(rows) == 1 or", Operator("ReplaceOrWithAnd"), values("xla_taps", "forward")),
        (
            "max(0, -min(offsets))",
            "max(0, -max(offsets))",
            values("xla_taps", "forward"),
        ),
    ),
    *faults(
        "_impl/fft.py",
        ("images * jnp.conj(filters)", "images * filters", f"{FFT} -k large"),
        (
            "spec.rhs_dilation)\n    return jnp.moveaxis(df",
            "spec.window_strides)\n    return jnp.moveaxis(df",
            f"{FFT} -k large",
        ),
        ("[(axis.pads[0], 0, 0) for", "[(0, 0, 0) for", f"{FFT} -k large"),
        ("_resized(others, self.step, size)", "_resized(others, 0, size)", f"{FFT} -k large"),
        (
            "points = max(_BLOCK * (axis.reach + 1), _LEAST_BLOCK)",
            "points = 2**40",
            f"{FFT} -k cut",
        ),
        ("if spec.are_integers:", "if False:", f"{FFT} -k integers"),
        ('if "highest" in (', 'if "high" in (', f"{FFT} -k highest"),
        ("axis.out * taps)", "axis.out * axis.kernel)", f"{FFT} -k padding"),
        ("    is_opaque=True,", "    is_opaque=False,", f"{FFT} -k divides"),
        ("spec.channels < _FEW_CHANNELS", "spec.channels <= 16", f"{FFT} -k changes"),
        ("return 1 if gain", "return 2 if gain", f"{FFT} -k slower"),
        ("points > _MOST_POINTS", "points > 2 * _MOST_POINTS", f"{FFT} -k points"),
    ),
    *faults(
        "_impl/depth.py",
        ("_at(offsets, i) + low", "_at(offsets, i)", values("xla_taps", "forward")),
        ("i * (spaced[1] - spaced[0])", "i", values("xla_taps", "input_grad")),
        (
            "(taps[0].k, size - 1 - taps[-1].k)",
            "(0, size - len(taps))",
            values("xla_taps", "filter_grad"),
        ),
        ("phases, 3)", "phases, 2)", values("xla_taps", "input_grad")),
    ),
    *faults(
        "_impl/taps.py",
        ("if a.dtype.itemsize < 4", "if a.dtype.itemsize < 2", values("xla_taps", "forward")),
        ("(axis.size - 1 +", Operator("NumberReplacer"), values("xla_taps", "forward")),
        (
            "- count * stride) // dilation) - 1",
            Operator("NumberReplacer"),
            values("xla_taps", "input_grad"),
        ),
        ("if (a + low) % common:", "if False:", values("xla_taps", "input_grad")),
        (
            "count = -(-size // stride)",
            "count = size // stride",
            values("xla_taps", "input_grad"),
        ),
    ),
    *faults(
        "_impl/native_cpu.py",
        (
            "packed = spec.multiplier if op",
            "packed = 1 if op",
            "tests/test_native_cpu.py -k scratch",
        ),
        (
            "except Exception as error",
            "except OSError as error",
            "tests/test_native_cpu.py -k library",
        ),
        (
            "_impl.__path__]",
            "_impl.__path__[:0]]",
            "tests/test_native_cpu.py -k copy",
        ),
        ("min(written, _TILE) + reach", "written + reach", "tests/test_native_cpu.py -k scratch"),
    ),
]
