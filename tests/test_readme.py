"""The README: its snippets, as they are written, one after the other, and its table of speeds."""

import importlib.util
import json
import re
import statistics
from pathlib import Path

import jax

from jax_dwbp.bench import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PEERS = ("tensorflow", "torch", "torch_nchw")


@jax.enable_x64(False)
@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_snippets():
    """Those that need packages that are not here are left out, but two run with `.[test]` alone."""
    names, ran = {}, 0
    for snippet in SNIPPETS:
        packages = re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE)
        if all(importlib.util.find_spec(package) for package in packages):
            exec(snippet, names)
            ran += 1
    assert ran >= 2
    assert names["per_example"].shape == (8, 3, 3, 144, 1)


def test_speeds():
    """The table has the figures of the benchmark's file."""
    medians = {}
    for row in json.loads((ROOT / ".github" / "speed.json").read_text())["rows"]:
        layer = medians.setdefault(row["layer"], {})
        layer[row["op"], row["contestant"]] = row["median"]
    gains = []
    for name, times in medians.items():
        columns = [times["input_grad", run] for run in ("native_cpu", "xla_taps", "lax", PEERS[0])]
        columns.append(min(times["input_grad", run] for run in PEERS[1:]))
        shown = [tables.number(1e3 * seconds) for seconds in columns]
        ops = ("input_grad", "forward", "filter_grad", "step")
        gains.append([min(times[op, run] for run in PEERS) / times[op, "native_cpu"] for op in ops])
        shown += [f"{gain:.2f}" if gain < 10 else f"{gain:.0f}" for gain in gains[-1]]
        assert f"\n| {name} | {' | '.join(shown)} |\n" in README
    means = [f"{statistics.geometric_mean(column):.2f}" for column in zip(*gains, strict=True)]
    assert f"\n| geometric mean | | | | | | {' | '.join(means)} |\n" in README
