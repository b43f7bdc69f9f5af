"""Faults of the command lines."""

from mutants.arguments import BENCH, BENCH_ERRORS, BENCH_PEERS, MAIN
from mutants.fault import Operator, faults

FAULTS = [
    *faults(
        "__main__.py",
        (
            "return abs(self.left - self.right) <= self.allowed",
            "return not abs(self.left - self.right) > self.allowed",
            MAIN,
        ),
        ("array.view(jnp.bfloat16)", "array.view(jnp.float16)", MAIN),
        ('array.astype(array.dtype.newbyteorder("="))', "array", MAIN),
        ('is_archive = output.endswith(".npz")', 'is_archive = not output.endswith(".npz")', MAIN),
        (
            'attributes.setdefault(name, value) != value:\n            raise flags.Error(f"--',
            Operator("NotEq_Eq"),
            MAIN,
        ),
        ("jax.enable_x64(True)", Operator("ReplaceTrueWithFalse"), MAIN),
        ("name is None and len(names) == 1", "name is None", MAIN),
        ("0 if all(check.passes()", "0 if any(check.passes()", MAIN),
        ("* math.sqrt(terms)", "* terms", MAIN),
        ('"precision": "highest"}', '"precision": "default"}', MAIN),
        ("match[2]", Operator("NumberReplacer", 1), MAIN),
        ("values[name] is None]", "not values[name]]", MAIN),
    ),
    *faults(
        "_command_line.py",
        ("            os.remove(temporary)", "            pass", f"{MAIN} -k disk"),
        ("not writable or os.path.isdir(path)", Operator("ReplaceOrWithAnd"), BENCH_ERRORS),
        ("not names or not set(names)", Operator("ReplaceOrWithAnd"), BENCH_ERRORS),
        ("list(dict.fromkeys(names))", "list(names)", BENCH_ERRORS),
        ("RuntimeError, MemoryError) as", "RuntimeError) as", BENCH_ERRORS),
        ("file=sys.stderr)\n        return 2", Operator("NumberReplacer", 1), MAIN),
        ('os.path.dirname(path) or "."', "os.path.dirname(path)", BENCH_ERRORS),
        ('getattr(error, "strerror", None) or error', "error", MAIN),
    ),
    *faults(
        "bench.py",
        ("if not worst <= 1:", "if worst > 1:", BENCH),
        (
            "np.quantile(times[contestant.name], 0.25)",
            "np.quantile(times[contestant.name], 0.75)",
            BENCH,
        ),
        ("sum(taken) < _PATIENCE * seconds", "sum(taken) < _SLOW * seconds", BENCH),
        (
            "len(self.terms) * math.prod(self.shapes[2])",
            "len(self.terms) * math.prod(self.shapes[0])",
            BENCH,
        ),
        ("min(medians) / cells", "max(medians) / cells", BENCH),
        ("cells[ours]['median'] / rate", Operator("Div_Mul"), BENCH),
        ("bits < 32", Operator("Lt_LtE"), BENCH_PEERS),
        ('1 if figures["meta"]["mismatches"] else 0', "0", BENCH),
        ("problem.bytes // 2 //", "problem.bytes //", BENCH),
        ("if first[name] <= _SLOW * seconds", "if True", BENCH),
    ),
]
