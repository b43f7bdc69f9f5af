"""Times the ops on layers of networks, against TensorFlow, PyTorch and what the machine can do.

  python -m jax_dwbp.bench --filter='mobilenet|convnext' --ops=input_grad,step --batch=1,8,32

prints Markdown tables; progress goes to stderr. A step is one pass forward and backward, with all
three results.

The contestants of a row get the same arrays in one process, and their results are compared before
anything is timed. Then they take turns in blocks of consecutive calls: a library's threads spin on
after a call, and turns call by call would slow the next library threefold. A block warms up for a
tenth of --block_seconds and times calls for --block_seconds, at least one. Whoever takes ten times
as long for a call is called once a block, until that has taken the time of a hundred blocks. Cells
are the median of all calls and, in parentheses, the quartiles.

Contestants are the implementations of jax_dwbp, and "default", which runs the best of them for each
op and so shows the noise as well; the raw ops of TensorFlow, eagerly; PyTorch in channels_last
("torch") and in NCHW ("torch_nchw"), these on a CPU in float32 and float64. Precision is the
highest, so that accelerators compute the same. There are two floors: "copy", an elementwise pass in
XLA over as many bytes as the operands and results have, and the rate of multiply-adds in a large
float32 matmul.

The exit status is 1 if results differ (that row is not timed) and 2 if the command line can't run.
JAX's environment variables apply, as JAX_PLATFORMS=cpu.
"""

import functools
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import jax_dwbp
from jax_dwbp import _command_line
from jax_dwbp._spec import DTYPES
from jax_dwbp.bench import layers, tables, timing
from jax_dwbp.bench.contestants import PEERS, selections
from jax_dwbp.bench.layers import OPS, Mismatch, Task

_Figures = dict[str, Any]  # of --json: "rows", and "meta" on the machine and the contestants


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name included, and returns the exit status."""
    values = _flag_values()

    def run() -> int:
        with jax.enable_x64(values.dtype == "float64"):
            return _run(values)

    return _command_line.main("jax_dwbp.bench", __doc__, values, argv, run)


def _flag_values() -> flags.FlagValues:
    """The flags. In a set of their own: absl's global one keeps values from call to call."""
    values = flags.FlagValues()
    options: Any = {"flag_values": values, "module_name": "flags"}
    text = functools.partial(flags.DEFINE_string, **options)
    names = functools.partial(flags.DEFINE_list, **options)
    text("filter", "", "A regular expression to be found in the layers' names.")
    names("ops", ",".join(OPS), "Out of these.")
    names("batch", "8", "Batch sizes; 1,8,32 tell the most.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of all arrays.", **options)
    names(
        "implementations", None, "By default those that can run. The ratios are those of the first."
    )
    names("peers", None, f"Out of {','.join(PEERS)}; by default those installed.")
    flags.DEFINE_integer("blocks", 7, "Of calls, for each contestant.", 1, **options)
    flags.DEFINE_float("block_seconds", 0.1, "The duration of a block.", 0, **options)
    text("json", None, "A file for all figures, in seconds and bytes; low and high are quartiles.")
    text("plot", None, "A file for a PNG of the speeds against the floors.")
    text("read", None, "Show the rows of an earlier --json instead of timing.")
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", **options)
    return values


def _run(values: flags.FlagValues) -> int:
    tasks = [
        Task(layer, op, batch, values.dtype)
        for op in _command_line.chosen("ops", values.ops, OPS)
        for batch in _batches(values.batch)
        for layer in _command_line.found(values.filter, "layers", layers.LAYERS)
    ]
    for name in ("json", "plot"):
        _command_line.check_output(name, values[name].value)
    if values.json is not None and values.json == values.plot:
        raise flags.Error(f"--plot={values.plot}: is the file of --json too")
    if not math.isfinite(values.block_seconds):
        raise flags.Error(f"--block_seconds={values.block_seconds}: must be finite")
    if values.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise flags.Error(f"--plot={values.plot}: matplotlib is not installed")
    if values.read is None:
        figures = _timed(values, tasks)
        report, picture = _shown(values, figures)
    else:
        try:
            figures = _read(values, tasks)
            report, picture = _shown(values, figures)
        except OSError as error:
            raise flags.Error(f"--read={values.read}: {_command_line.reason(error)}") from error
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise flags.Error(f"--read={values.read}: not a file of --json") from error
    print(report)
    if values.json is not None:
        text = json.dumps(figures, indent=1)
        _command_line.save("json", values.json, lambda file: file.write(text.encode()))
    if values.plot is not None and picture is not None:
        _command_line.save("plot", values.plot, lambda file: file.write(picture))
    return 1 if figures["meta"]["mismatches"] else 0


def _shown(values: flags.FlagValues, figures: _Figures) -> tuple[str, bytes | None]:
    """The report and, if there is to be one, the picture."""
    meta, rate = figures["meta"], figures["meta"]["multiply_adds_per_second"]
    groups: tables.Tables = {}
    for row in figures["rows"]:
        group = groups.setdefault((row["op"], row["batch"]), {})
        group.setdefault(row["layer"], {})[row["contestant"]] = row
    report = [
        f"{meta['machine']}; {meta['device']}",
        ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        f"{values.dtype}; float32 matmul: {rate / 1e9:.3g} GFMA/s",
        *tables.report(groups, meta["implementations"], meta["peers"], rate),
    ]
    picture = tables.plot(groups, rate) if values.plot is not None and groups else None
    return "\n".join(report), picture


def _timed(values: flags.FlagValues, tasks: Sequence[Task]) -> _Figures:
    device = _command_line.device()
    every = [selection for task in tasks for selection in selections(task)]
    known = ["default", *every[0].reasons]
    if values.implementations is None:
        runs = {name for s in every for name, reason in s.reasons.items() if reason is None}
        names = [name for name in known if name == "default" or name in runs]
    else:
        names = _command_line.chosen("implementations", values.implementations, known)
    peers = _peers(values.peers, values.dtype)
    rate = timing.fma_rate()
    rows, mismatches = [], []
    for i, task in enumerate(tasks, 1):
        print(f"{i}/{len(tasks)} {task}", file=sys.stderr)
        try:
            rows += timing.measure(task, names, peers, values.blocks, values.block_seconds)
        except Mismatch as error:
            print(f"jax_dwbp.bench: {error}", file=sys.stderr)
            mismatches.append(str(error))
    results = {"multiply_adds_per_second": rate, "mismatches": mismatches}
    contestants = {"implementations": names, "peers": peers}
    return {"meta": _meta(device, peers) | contestants | results, "rows": rows}


def _read(values: flags.FlagValues, tasks: Sequence[Task]) -> _Figures:
    """Of `tasks`, what the file of an earlier --json has."""
    for name in ("implementations", "peers", "blocks", "block_seconds"):
        if values[name].present:
            raise flags.Error(f"--{name}: says how to time, and with --read nothing is timed")
    wanted = {(p.layer.name, p.op, p.batch, p.dtype): f"{p}: " for p in tasks}
    keys = ("layer", "op", "batch", "dtype")
    with open(values.read, encoding="utf-8") as file:
        figures = json.load(file)
    rows = [row for row in figures["rows"] if tuple(row[key] for key in keys) in wanted]
    of_these = tuple(wanted.values())
    mismatches = [text for text in figures["meta"]["mismatches"] if text.startswith(of_these)]
    for mismatch in mismatches:
        print(f"jax_dwbp.bench: {mismatch}", file=sys.stderr)
    if not rows and not mismatches:
        raise flags.Error(f"--read={values.read}: has none of the rows that are asked for")
    return {"meta": figures["meta"] | {"mismatches": mismatches}, "rows": rows}


def _batches(texts: Sequence[str]) -> list[int]:
    if not texts or not all(re.fullmatch("[1-9][0-9]{,8}", text) for text in texts):
        raise flags.Error(f"--batch={','.join(texts)}: must be positive integers, as 1,8,32")
    return list(dict.fromkeys(map(int, texts)))


def _peers(names: Sequence[str] | None, dtype: str) -> list[str]:
    """Those with these names, or else all that are installed, where they compute the same."""
    missing = {p: m for p, (m, _) in PEERS.items() if importlib.util.find_spec(m) is None}
    if names is None:
        peers = [peer for peer in PEERS if peer not in missing]
    else:
        peers = _command_line.chosen("peers", names, list(PEERS)) if names else []
    for peer in missing.keys() & peers:
        raise flags.Error(f"--peers={peer}: {missing[peer]} is not installed")
    # In half types they may sum in the dtype itself, which is another function.
    if peers and (jax.default_backend() != "cpu" or jnp.finfo(dtype).bits < 32):
        reason = "they take part on a CPU in float32 and float64"
        print(f"without {', '.join(peers)}: {reason}", file=sys.stderr)
        return []
    return peers


def _meta(device: Any, peers: Sequence[str]) -> dict[str, Any]:
    packages = dict.fromkeys(["jax", "jaxlib", "numpy", *(PEERS[peer][0] for peer in peers)])
    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} logical cores",
        "device": f"{device.platform}, {device.device_kind}",
        "versions": {
            "jax_dwbp": jax_dwbp.__version__,
            **{name: importlib.import_module(name).__version__ for name in packages},
            "Python": platform.python_version(),
        },
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            [model, *_] = re.findall(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)
            return model
    except (OSError, ValueError):  # not Linux, or not x86
        return platform.processor() or platform.machine()
