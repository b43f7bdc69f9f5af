"""Times the ops on layers of networks and more, against other libraries and what a machine can do.

  python -m jax_dwbp.bench --filter='mobilenet|convnext' --ops=input_grad,step --batch=1,8,32
  python -m jax_dwbp.bench --groups=pictures,problems --peers=torch,torch_nchw

prints Markdown tables; progress goes to stderr. A step is one pass forward and backward, with all
three results.

Layers come in groups: those of networks, which are the default; pictures of few channels; sound;
"nchw", where the channels come before rows and columns; half and double precision; and problems,
many in one vmap, each with a filter of its own. A layer has its batch size and dtype, float32 where
no other is told, which --batch and --dtype replace.

The contestants of a row get the same arrays in one process, and their results are compared before
anything is timed. Then they take turns in blocks of consecutive calls: a library's threads spin on
after a call, and turns call by call would slow the next library threefold. A block warms up for a
tenth of --block_seconds and times calls for --block_seconds, at least one. Whoever takes ten times
as long for a call is called once a block, until that has taken the time of a hundred blocks. Cells
are the median of all calls and, in parentheses, the quartiles. Where those of two overlap, their
ratio has a "~" before it: it is in the noise, neither a win nor a loss. What shows that something
else runs on the machine is told on stderr: the load at the start, and calls that take the time
slice of a scheduler, 8, 16 or 32 ms, as those do whose threads wait for a core.

Contestants are the implementations of jax_dwbp, and "default", which runs the best of them for each
op and so shows the noise as well; and peers, on a CPU, where they are installed and compute the
same: the raw ops of TensorFlow, eagerly; PyTorch in channels_last ("torch"), in NCHW ("torch_nchw")
and forward with weights that are packed before ("torch_packed"); OpenCV's filter2D, of one channel;
forward XNNPACK by LiteRT's interpreter, on all cores; forward and for the input gradient OpenVINO.
Problems are one convolution of all their channels to them. A peer that sums in a half type itself
is left out. Precision is the highest, so that accelerators compute the same. There are two floors:
"copy", an elementwise pass in XLA over as many bytes as the operands and results have, and the rate
of multiply-adds in a large float32 matmul.

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
from absl import flags

import jax_dwbp
from jax_dwbp import _command_line
from jax_dwbp._spec import DTYPES
from jax_dwbp.bench import tables, timing
from jax_dwbp.bench.contestants import selections
from jax_dwbp.bench.layers import GROUPS, OPS, Mismatch, Task
from jax_dwbp.bench.peers import PEERS

_Figures = dict[str, Any]  # of --json: "rows", and "meta" on the machine and the contestants


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name included, and returns the exit status."""
    values = _flag_values()
    return _command_line.main("jax_dwbp.bench", __doc__, values, argv, lambda: _run(values))


def _flag_values() -> flags.FlagValues:
    """The flags. In a set of their own: absl's global one keeps values from call to call."""
    values = flags.FlagValues()
    options: Any = {"flag_values": values, "module_name": "flags"}
    text = functools.partial(flags.DEFINE_string, **options)
    names = functools.partial(flags.DEFINE_list, **options)
    names("groups", "networks", f"Of layers, out of {','.join(GROUPS)}.")
    text("filter", "", "A regular expression to be found in the layers' names.")
    names("ops", ",".join(OPS), "Out of these.")
    names(
        "batch",
        None,
        "Batch sizes, by default a layer's own: 8 for networks, and 1,8,32 tell more.",
    )
    flags.DEFINE_enum("dtype", None, DTYPES, "Of all arrays, by default a layer's own.", **options)
    names(
        "implementations",
        None,
        "By default those that can run, and fft where it does by default. The ratios are those of "
        "the first.",
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
    tasks = _tasks(values)
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


def _tasks(values: flags.FlagValues) -> list[Task]:
    groups = [GROUPS[name] for name in _command_line.chosen("groups", values.groups, list(GROUPS))]
    layers = _command_line.found(values.filter, "layers", sum(groups, ()))
    batches = [None] if values.batch is None else _batches(values.batch)
    return [
        Task(layer, op, batch or layer.batch, dtype)
        for group in groups
        for op in _command_line.chosen("ops", values.ops, OPS)
        for batch in batches
        for layer in group
        if layer in layers
        for dtype in ([values.dtype] if values.dtype else layer.dtypes)
    ]


def _shown(values: flags.FlagValues, figures: _Figures) -> tuple[str, bytes | None]:
    """The report and, if there is to be one, the picture."""
    meta, rate = figures["meta"], figures["meta"]["multiply_adds_per_second"]
    found = tables.collected(figures["rows"])
    report = [
        f"{meta['machine']}; {meta['device']}",
        ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        f"float32 matmul: {rate / 1e9:.3g} GFMA/s",
        *tables.report(found, meta["implementations"], meta["peers"], rate),
    ]
    picture = tables.plot(found, rate) if values.plot is not None and found else None
    return "\n".join(report), picture


def _timed(values: flags.FlagValues, tasks: Sequence[Task]) -> _Figures:
    device = _command_line.device()
    timing.warn_of_load()
    every = []
    for task in tasks:
        with _x64(task):
            every += selections(task)
    known = ["default", *every[0].reasons]
    if values.implementations is None:
        able = {name for s in every for name, reason in s.reasons.items() if reason is None}
        # Of small filters transforms err by more than sums may.
        able -= {"fft"} - {s.runs for s in every}
        names = [name for name in known if name == "default" or name in able]
    else:
        names = _command_line.chosen("implementations", values.implementations, known)
    peers = _peers(values.peers)
    rate = timing.fma_rate()
    rows, mismatches = [], []
    for i, task in enumerate(tasks, 1):
        print(f"{i}/{len(tasks)} {task}", file=sys.stderr)
        try:
            with _x64(task):
                rows += timing.measure(task, names, peers, values.blocks, values.block_seconds)
        except Mismatch as error:
            print(f"jax_dwbp.bench: {error}", file=sys.stderr)
            mismatches.append(str(error))
    results = {"multiply_adds_per_second": rate, "mismatches": mismatches}
    contestants = {"implementations": names, "peers": peers}
    return {"meta": _meta(device, peers) | contestants | results, "rows": rows}


def _x64(task: Task) -> Any:
    return jax.enable_x64(task.dtype == "float64")


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


def _peers(names: Sequence[str] | None) -> list[str]:
    """Those with these names, or else all that are installed, if they run where JAX does."""
    if names is None:
        peers = [name for name, peer in PEERS.items() if not peer.missing]
    else:
        peers = _command_line.chosen("peers", names, list(PEERS)) if names else []
    for peer in peers:
        for package in PEERS[peer].missing:
            raise flags.Error(f"--peers={peer}: {package} is not installed")
    if peers and jax.default_backend() != "cpu":
        print(f"without {', '.join(peers)}: they take part on a CPU", file=sys.stderr)
        return []
    return peers


def _meta(device: Any, peers: Sequence[str]) -> dict[str, Any]:
    packages = dict.fromkeys(
        ["jax", "jaxlib", "numpy", *sum((PEERS[peer].packages for peer in peers), ())]
    )
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
