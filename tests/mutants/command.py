"""Plants faults in a copy of the package one by one, and tells which of them no test sees.

  python tests/mutants --filter=_partition

runs the tests that ought to see each fault of the tables, prints what came of it and, in the end,
the counts by file and the survivors. --check runs the tests of the same faults without planting any
of them: only where these pass a failure tells something. It needs cosmic-ray (the dependency group
`mutants`), a C++ compiler for the faults of the native kernel, and the package installed as for the
tests.

cosmic-ray makes the mutations of Python, for its operators work on any source, one occurrence at a
time and without its own runner; so the tables name a few hundred of what would be tens of thousands
of mutants. mutmut mutates whole modules to functions that choose a mutant at run time and forks a
process for each, which does not go with JAX's threads and finds no fault at a module's top level.

The exit status is 1 if a fault survives of which the table does not say why, or if the table is
wrong about the source or the tests, and 2 if the command line can't run.
"""

import collections
import concurrent.futures
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from jax_dwbp import _command_line
from mutants import border, implementations, native, pallas, programs, rules
from mutants.arguments import SANITIZERS
from mutants.fault import Fault, NotPlanted, planted

_ROOT = Path(__file__).parents[2]
_FAULTS = [
    *border.FAULTS,
    *rules.FAULTS,
    *implementations.FAULTS,
    *pallas.FAULTS,
    *native.FAULTS,
    *programs.FAULTS,
]
_COPIED = ("jax_dwbp", "tests", "pyproject.toml", "README.md", ".github", "notebooks")
# What Python runs when it starts: what an editable package puts before all paths is not the copy.
_NOT_EDITABLE = """import sys
sys.meta_path = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
"""
# What parses Python loads its grammar once, and not from two threads.
_PLANTING = threading.Lock()
_OUTCOMES = ("killed", "survived", "passed", "error")


class _Result(NamedTuple):
    fault: Fault
    what: str  # was done
    outcome: str  # out of _OUTCOMES
    detail: str  # the test that failed, or what the error is
    seconds: float

    def __str__(self) -> str:
        return f"{self.outcome:<9}{self.seconds:>5.0f}s  {self.what}  {self.detail}"


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name included, and returns the exit status."""
    values = flags.FlagValues()
    options: Any = {"flag_values": values, "module_name": "flags"}
    flags.DEFINE_string("filter", "", "A regular expression to be found in a fault.", **options)
    flags.DEFINE_integer("jobs", 2, "Faults at a time.", 1, **options)
    flags.DEFINE_integer(
        "timeout", 900, "Seconds that the tests of a fault may take.", 1, **options
    )
    flags.DEFINE_bool("dry_run", False, "Plant all of them, without running anything.", **options)
    flags.DEFINE_bool("check", False, "Run the tests without planting anything.", **options)
    flags.DEFINE_string("json", None, "A file for the results.", **options)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", **options)
    return _command_line.main("mutants", __doc__, values, argv, lambda: _run(values))


def _run(values: flags.FlagValues) -> int:
    every = _command_line.found(values.filter, "faults", _FAULTS)
    _command_line.check_output("json", values.json)
    if values.check:
        every = list({(f.tests, f.file in native.FILES): f for f in every}.values())
    with tempfile.TemporaryDirectory() as directory:
        run = functools.partial(_result, values, Path(directory))
        if not values.dry_run and any(fault.file in native.FILES for fault in every):
            native.compile_all(_ROOT, Path(directory))
        results = []
        with concurrent.futures.ThreadPoolExecutor(values.jobs) as pool:
            for task in concurrent.futures.as_completed(pool.submit(run, f) for f in every):
                results.append(task.result())
                print(results[-1], flush=True)
    if values.json is not None:
        rows = [{**r._asdict(), "fault": r.fault._asdict()} for r in results]
        text = json.dumps(rows, indent=1)
        _command_line.save("json", values.json, lambda file: file.write(text.encode()))
    return _report(results)


def _report(results: Sequence[_Result]) -> int:
    print(f"\n| file | faults | {' | '.join(_OUTCOMES)} |\n| --- | --- | --- | --- | --- | --- |")
    counts: Any = collections.defaultdict(collections.Counter)
    for result in results:
        for file in (result.fault.file, "all"):
            counts[file][result.outcome] += 1
    for file in sorted(counts, key=lambda file: (file == "all", file)):
        each = [counts[file][outcome] for outcome in _OUTCOMES]
        print(f"| {file} | {sum(each)} | {' | '.join(map(str, each))} |")
    survivors = [result.fault for result in results if result.outcome == "survived"]
    for fault in survivors:
        print(f"survived: {fault.name}\n  {fault.equivalent or f'not seen by {fault.tests}'}")
    return 1 if counts["all"]["error"] or not all(f.equivalent for f in survivors) else 0


def _result(values: flags.FlagValues, directory: Path, fault: Fault) -> _Result:
    start = time.perf_counter()
    try:
        source = (_ROOT / "jax_dwbp" / fault.file).read_text()
        with _PLANTING:
            text = source if values.check else planted(source, fault)
        outcome, detail = "passed", ""
        if not values.dry_run:
            outcome, detail = _tested(directory, values.timeout, fault, text)
        if values.check:
            outcome = "passed" if outcome == "survived" else "error"
    except (NotPlanted, OSError, SyntaxError) as error:
        outcome, detail = "error", str(error)
    what = fault.tests if values.check else fault.name
    return _Result(fault, what, outcome, detail, time.perf_counter() - start)


def _tested(directory: Path, timeout: int, fault: Fault, text: str) -> tuple[str, str]:
    """The outcome of the tests in a copy of the checkout where the fault's file has this text."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        copy = Path(name)
        for entry in _COPIED:
            source = _ROOT / entry
            if source.is_dir():
                shutil.copytree(source, copy / entry, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / entry)
        (copy / "jax_dwbp" / fault.file).write_text(text)
        (copy / "sitecustomize.py").write_text(_NOT_EDITABLE)
        program = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(fault.tests)]
        if fault.tests == SANITIZERS:  # which compile on their own
            program = [fault.tests, native.sanitized(fault.file, copy, directory)]
        elif fault.file in native.FILES:
            native.install(fault.file, copy, directory)
        path = os.pathsep.join(filter(None, [name, os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(
                [sys.executable, *program],
                cwd=copy,
                env=os.environ | {"PYTHONPATH": path},  # for the processes that tests start
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return "killed", "by the time"
    if done.returncode < 0:
        return "killed", f"by signal {-done.returncode}"
    lines = [line for line in done.stdout.splitlines() if line.strip()] or done.stderr.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    outcome = {0: "survived", 1: "killed"}.get(done.returncode, "error")
    return outcome, (failed or lines or [""])[-1][:160]
