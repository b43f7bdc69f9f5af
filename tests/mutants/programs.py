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
        ('array.astype(array.dtype.newbyteorder("="))', "array", MAIN),
        (
            'attributes.setdefault(name, value) != value:\n            raise flags.Error(f"--',
            Operator("NotEq_Eq"),
            MAIN,
        ),
        ("name is None and len(names) == 1", "name is None", MAIN),
        ("* math.sqrt(terms)", "* terms", MAIN),
        ("match[2]", Operator("NumberReplacer", 1), MAIN),
    ),
    *faults(
        "_command_line.py",
        ("list(dict.fromkeys(names))", "list(names)", "tests/test_bench.py -k ratios"),
        ("                os.remove(temporary)", "                pass", f"{MAIN} -k output"),
        ("_replace(os.path.realpath(path), ", "_replace(path, ", f"{MAIN} -k output"),
        ("if os.path.exists(path):", "if False:", f"{MAIN} -k output"),
        (" if signal.getsignal(s) == signal.SIG_DFL]", "]", f"{MAIN} -k output"),
        ('print(end="", flush=True)', 'print(end="")', f"{MAIN} -k standard"),
        ("not names or not set(names)", Operator("ReplaceOrWithAnd"), BENCH_ERRORS),
        ("RuntimeError, MemoryError) as", "RuntimeError) as", BENCH_ERRORS),
        ("os.path.dirname(os.path.realpath(path))", "os.path.dirname(path)", BENCH_ERRORS),
    ),
    *faults(
        "bench/layers.py",
        ("if not worst <= 1:", "if worst > 1:", BENCH),
    ),
    *faults(
        "bench/timing.py",
        ("sum(taken) < _PATIENCE * seconds", "sum(taken) < _SLOW * seconds", BENCH),
        ("task.bytes // 2 //", "task.bytes //", BENCH),
    ),
    *faults(
        "bench/tables.py",
        ("min(medians) / cells", "max(medians) / cells", BENCH),
    ),
    *faults(
        "bench/command.py",
        ("bits < 32", Operator("Lt_LtE"), BENCH_PEERS),
    ),
]
