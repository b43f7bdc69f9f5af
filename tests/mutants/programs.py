"""Faults of the command lines."""

from mutants.arguments import BENCH, BENCH_ALL, BENCH_ERRORS, MAIN
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
        ("list(dict.fromkeys(names))", "list(names)", f"{BENCH_ALL} -k ratios"),
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
        (
            "array = np.moveaxis(array, 2, -1)",
            "array = np.moveaxis(array, 2, 3)",
            f"{BENCH_ALL} -k folded",
        ),
    ),
    *faults(
        "bench/timing.py",
        ("sum(taken) < _PATIENCE * seconds", "sum(taken) < _SLOW * seconds", BENCH),
        ("task.bytes // 2 //", "task.bytes //", BENCH),
        ("bits >= 32", Operator("GtE_Gt"), f"{BENCH_ALL} -k rounds"),
        ("len(times) / 4", "len(times) / 3", f"{BENCH_ALL} -k wait"),
        ("min(times) < turn / 2", "min(times) < turn", f"{BENCH_ALL} -k wait"),
    ),
    *faults(
        "bench/tables.py",
        ("min(rows, key", "max(rows, key", f"{BENCH_ALL} -k ratio"),
        ("noise = max(", "noise = min(", f"{BENCH_ALL} -k noise"),
    ),
    *faults(
        "bench/peers.py",
        (
            "layer.multiplier, *task.output)",
            "layer.multiplier, *plane[2:])",
            f"{BENCH_ALL} -k lacks",
        ),
    ),
    *faults(
        "bench/command.py",
        ("batch or layer.batch", "layer.batch", f"{BENCH_ALL} -k replaced"),
        ('!= "cpu"', Operator("NotEq_Eq"), f"{BENCH_ALL} -k accelerators"),
    ),
]
