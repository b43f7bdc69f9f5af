"""Says what the GPU kernels cost on NVIDIA's GPUs, none of which needs to be there.

  python tests/figures gpu --filter='56x56x144 k[35]' --ops=input_grad --targets=sm_90a

prints a Markdown table; progress goes to stderr. It needs jax-cuda13-plugin and NVIDIA's ptxas and
nvdisasm, as wheels, and says which are missing.

The kernels are compiled for each target. Some of their blocks are then executed, as PTX and with
NumPy, to see how often the loops run and where the memory is that they access. The figure is the
time that the scarcest resource takes, as a multiple of the time that the operands and results take
between memory and a cache of unlimited size. It is 1 where memory is what limits it. The resources:

  memory  operands and results once, what XLA stores between kernels twice
  l2      what blocks load, each 32 bytes once a block, and store
  l1      wavefronts, of 128 bytes from L1 or shared memory
  issue   instructions, of which a multiprocessor issues four a cycle
  fp32    multiply-adds, and whatever else runs there
  alu     integer arithmetic, logic, comparisons, conversions of half types

The figure is a bound and not a time: it knows of no latencies, which warps are there to hide. So
there are columns for what decides on that, registers and the warps that fit on a multiprocessor.
Rates are those that NVIDIA publishes, at the clock of a GPU under load; that of L2 is assumed.

xla_taps is in the table for comparison where its filters are small enough to compile in seconds,
and "fails" where XLA can't compile it; --noxla_taps leaves it out. XLA's own convolution is not: it
calls cuDNN, and that can't compile anything without a GPU.

--check is of an H100; for another GPU each case and each op is only compiled, in turn. The exit
status is 1 if a case fails or, with --check, is beyond what is accepted, and 2 if the command line
can't run.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import covering
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from figures import cuda, ptx, sass, workers
from jax_dwbp import _command_line
from jax_dwbp._spec import FORWARD, OPS, Arguments, ConvSpec, canonicalize
from jax_dwbp.bench import layers

_Row = dict[str, Any]  # the figures of one kernel on one target, for --json
_BATCH = 32
_SAMPLE = 6  # blocks that are executed
_MAX_TAPS = 49  # beyond which xla_taps is not compiled
_CHECKED = "sm_90a"
_MIN_WARPS = 12
_MAX_COMPILE_SECONDS = 10.0
_TIMEOUT = 900  # seconds


@dataclasses.dataclass(frozen=True)
class Case:
    layer: layers.Layer
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.layer.name} {self.dtype}"

    @property
    def spec(self) -> ConvSpec:
        layer = self.layer
        given = Arguments(
            input=(_BATCH, *layer.sizes, layer.channels),
            filter=(*layer.kernel, layer.channels, layer.multiplier),
            out_backprop=None,
            strides=layer.strides,
            padding=layer.padding,
        )
        return canonicalize(FORWARD, given)

    def limit(self) -> float | None:
        """The figure that is accepted."""
        size = max(self.layer.kernel)
        if size <= 3 or self.layer.strides == (2, 2):
            return 1.2
        return {5: 1.3, 7: 1.5}.get(size) if self.dtype == "float32" else None


def _layer(kernel: int, stride: int = 1, multiplier: int = 1) -> layers.Layer:
    name = f"56x56x144 k{kernel} s{stride}" + f" m{multiplier}" * (multiplier > 1)
    pads = (kernel // 2, kernel // 2)
    return layers.Layer(
        name, (56, 56), 144, multiplier, (kernel, kernel), (stride, stride), (pads, pads)
    )


_NETWORKS = ("mobilenetv2 7x7x960", "mamba", "odd")
CASES = (
    *(Case(_layer(k), dtype) for k in (3, 5, 7) for dtype in ("float32", "bfloat16")),
    *(Case(_layer(3, stride=2), dtype) for dtype in ("float32", "bfloat16")),
    Case(_layer(3, multiplier=2), "float32"),
    Case(_layer(13), "float32"),
    Case(_layer(31), "float32"),
    *(
        Case(layer, "float32")
        for layer in layers.GROUPS["networks"]
        if layer.name.startswith(_NETWORKS)
    ),
)


# ---- The cost of a program.


class _Traffic(ptx.Memory):
    """Counts the accesses of blocks of so many threads, of which none moves any data."""

    def __init__(self, count: int, threads: int):
        super().__init__([], [])
        self._threads = threads
        self.addresses = [(i + 1) * self._SPACING for i in range(count)]
        self.wavefronts = 0
        self.stored = 0  # bytes, in sectors
        self._loaded: list[np.ndarray] = []

    def load(self, addresses, active, count: int, dtype: Any):
        sectors = self._access(addresses, active, count * dtype.itemsize)
        self._loaded.append(np.unique(sectors))
        return [np.zeros(addresses.shape, dtype)] * count

    def store(self, addresses, active, values):
        sectors = self._access(addresses, active, sum(value.itemsize for value in values))
        self.stored += _SECTOR * np.unique(sectors).size

    def loaded(self) -> int:
        """Bytes, in sectors, each once."""
        return _SECTOR * np.unique(np.concatenate([np.empty(0, np.int64), *self._loaded])).size

    def _access(self, addresses, active, width: int) -> np.ndarray:
        """Adds up the wavefronts, and returns the sectors, each block's as others."""
        # A warp's threads are served by as many at a time as access 128 bytes together.
        lines = np.where(active, addresses // _LINE, -1).reshape(-1, min(32, _LINE // width))
        lines = np.sort(lines, 1)
        starts = np.diff(lines, axis=1, prepend=-1) != 0
        self.wavefronts += int(np.count_nonzero(starts))
        block = np.arange(addresses.size) // self._threads
        return (addresses // _SECTOR + block * _SECTORS)[active]


_SECTORS = 1 << 48  # more than the addresses of all arrays have
_LINE, _SECTOR = 128, 32


def _cost(program: cuda.Program, target: cuda.Target, moved: int) -> _Row:
    """The figures of a program that moves `moved` bytes of operands and results."""
    costs: dict[Any, _Row] = {}
    kernels = []
    for launch in program.launches:  # many of them may be the same
        key = (launch.kernel.name, launch.grid)
        costs[key] = costs.get(key) or _kernel_cost(launch, target)
        kernels.append(costs[key])
    memory = {"memory": (moved + 2 * program.temporary_bytes) / target.memory_rate}
    # One after the other, each takes as long as the resource that it needs longest.
    totals = memory | {
        name: sum(kernel["seconds"][name] for kernel in kernels) for name in kernels[0]["seconds"]
    }
    busy = sum(max(kernel["seconds"].values()) for kernel in kernels)
    slowest = max(kernels, key=lambda kernel: max(kernel["seconds"].values()))
    return {
        "figure": max(memory["memory"], busy) / (moved / target.memory_rate),
        "binding": max(totals, key=lambda name: totals[name]),
        "seconds": totals,
        "kernels": len(kernels),
        "instructions": sum(kernel["instructions"] for kernel in kernels),
        "spilled_bytes": sum(kernel["spilled_bytes"] for kernel in kernels),
        "registers": slowest["registers"],
        "warps": slowest["warps"],
        "compile_seconds": program.compile_seconds,
    }


def _kernel_cost(launch: cuda.Launch, target: cuda.Target) -> _Row:
    kernel, blocks = launch.kernel, math.prod(launch.grid)
    sample = np.unique(np.linspace(0, blocks - 1, _SAMPLE + 2).astype(int)[1:-1])
    traffic = _Traffic(len(kernel.parameters), kernel.threads)
    counts = ptx.run(
        kernel, launch.grid, traffic.addresses, traffic, launch.shared_bytes, sample.tolist()
    )
    wavefronts = traffic.wavefronts + _shared_wavefronts(kernel, counts)
    bytes_ = traffic.loaded() + traffic.stored
    warps = blocks * kernel.threads / 32
    executed = counts / (len(sample) * kernel.threads / 32)
    listing, report = cuda.assemble(launch.module, target.arch)
    per_warp = sass.count(sass.parse(listing)[kernel.name], kernel, executed)
    registers, spilled = sass.registers_and_spills(report, kernel.name)
    cycle = 1 / (target.clock * min(blocks, target.multiprocessors))
    scale = blocks / len(sample)
    return {
        "seconds": {
            "l2": bytes_ * scale / target.l2_rate,
            "l1": wavefronts * scale / target.wavefronts * cycle,
            "issue": per_warp.issue * warps * 32 / target.issue_lanes * cycle,
            "fp32": per_warp.fp32 * warps * 32 / target.fp32_lanes * cycle,
            "alu": per_warp.alu * warps * 32 / target.alu_lanes * cycle,
        },
        "instructions": per_warp.issue * warps * 32,
        "registers": registers,
        "spilled_bytes": spilled,
        "warps": _resident_warps(
            kernel.threads, registers, kernel.shared_bytes + launch.shared_bytes, target
        ),
    }


def _shared_wavefronts(kernel: ptx.Kernel, executed: np.ndarray) -> int:
    """As if there were no conflicts between banks."""
    total = 0
    for instruction, warps in zip(kernel.instructions, executed, strict=True):
        if re.search(r"\bshared\b", instruction.opcode):
            vector = re.search(r"\.[vx](\d)", instruction.opcode)
            total += int(warps) * (int(vector[1]) if vector else 1)
    return total


def _resident_warps(threads: int, registers: int, shared: int, target: cuda.Target) -> int:
    """How many fit on a multiprocessor, in whole blocks."""
    warps = threads // 32
    by_registers = target.registers // (-(-registers // 8) * 8 * 32) // warps
    by_shared = target.shared_kib * 1024 // (shared + 1024)  # a KiB is the system's
    return min(by_registers, by_shared, target.warps // warps, target.blocks) * warps


# ---- A case, in a process that a compiler may abort.

_Job = tuple[Case, str, str, bool, bool]


def _measure(case: Case, op: str, arch: str, is_costed: bool, xla_taps: bool) -> _Row | None:
    """Compiles for a target, and says what it costs there if it `is_costed`."""
    spec, target = case.spec, cuda.TARGETS[arch]
    dtype = jnp.dtype(case.dtype)
    channels, multiplier = spec.channels, spec.multiplier
    shapes = {
        "x": (1, _BATCH, *spec.in_spatial, channels),
        "f": (1, *spec.kernel_spatial, channels, multiplier),
        "dy": (1, _BATCH, *spec.out_spatial, channels * multiplier),
    }
    operands = [jax.ShapeDtypeStruct(shapes[name], dtype) for name in OPS[op].operands]
    compiled = functools.partial(
        cuda.compile_program, _function("pallas_gpu", op, spec), operands, target
    )
    program = compiled()
    if not is_costed:
        return None
    if program.compile_seconds >= _MAX_COMPILE_SECONDS:
        # What else runs, and what a process does once, only add to it.
        program = min(program, compiled(), key=lambda program: program.compile_seconds)
    moved = sum(map(math.prod, shapes.values())) * dtype.itemsize
    outputs = math.prod(shapes[{"forward": "dy", "input_grad": "x", "filter_grad": "dy"}[op]])
    costs = _cost(program, target, moved)
    per_output = costs.pop("instructions") / outputs
    return {
        "case": case.name,
        "op": op,
        "target": arch,
        "batch": _BATCH,
        **costs,
        "instructions_per_output": per_output,
        "xla_taps": _peer(op, spec, operands, target, moved) if xla_taps else None,
    }


def _peer(op: str, spec: ConvSpec, operands, target: cuda.Target, moved: int) -> float | str | None:
    """The figure of xla_taps, or why XLA does not compile it."""
    if math.prod(spec.kernel_spatial) > _MAX_TAPS:
        return None
    try:
        program = cuda.compile_program(_function("xla_taps", op, spec), operands, target)
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return _cost(program, target, moved)["figure"]


def _function(implementation: str, op: str, spec: ConvSpec) -> Callable[..., jax.Array]:
    module = importlib.import_module(f"jax_dwbp._impl.{implementation}")
    return functools.partial(getattr(module, op), spec)


# ---- The report.


def _violations(row: _Row) -> list[str]:
    """What is not accepted of a kernel on the target that is checked."""
    [case] = (case for case in CASES if case.name == row["case"])
    limit, found = case.limit(), []
    if limit is not None and row["figure"] > limit:
        found.append(f"{row['figure']:.2f} times the roofline, at most {limit} is accepted")
    if row["spilled_bytes"]:
        found.append(f"{row['spilled_bytes']} bytes of registers spilled")
    if row["warps"] < _MIN_WARPS:
        found.append(f"{row['warps']} warps, at least {_MIN_WARPS} are accepted")
    if row["compile_seconds"] >= _MAX_COMPILE_SECONDS:
        found.append(f"{row['compile_seconds']:.0f} s to compile")
    return found


def _print_table(rows: Sequence[_Row]) -> None:
    header = (
        "case, op, target, x roofline, binding, SASS / output, registers, spilled bytes, warps, "
        "kernels, compile s, xla_taps"
    ).split(", ")
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        cells = [
            row["case"],
            row["op"],
            row["target"],
            f"{row['figure']:.2f}",
            row["binding"],
            f"{row['instructions_per_output']:.1f}",
            row["registers"],
            row["spilled_bytes"],
            row["warps"],
            row["kernels"],
            f"{row['compile_seconds']:.1f}",
            _peer_cell(row["xla_taps"]),
        ]
        print(f"| {' | '.join(map(str, cells))} |")


def _peer_cell(figure: float | str | None) -> str:
    if isinstance(figure, str):
        return "fails"
    return "-" if figure is None else f"{figure:.2f}"


# ---- The command line.


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name included, and returns the exit status."""
    values = _flag_values()
    return _command_line.main("figures gpu", __doc__, values, argv, functools.partial(_run, values))


def _flag_values() -> flags.FlagValues:
    """The flags. In a set of their own: absl's global one keeps values from call to call."""
    values = flags.FlagValues()
    options: Any = {"flag_values": values, "module_name": "flags"}
    text = functools.partial(flags.DEFINE_string, **options)
    names = functools.partial(flags.DEFINE_list, **options)
    text("filter", "", "A regular expression to be found in the cases' names.")
    names("ops", ",".join(OPS), "Out of these.")
    names("targets", ",".join(cuda.TARGETS), "Out of these: an A100, an H100 and a B200.")
    text("json", None, "A file for all figures.")
    flags.DEFINE_bool("xla_taps", True, "Compile it too, for comparison.", **options)
    check = f"Fail if {_CHECKED} is beyond what is accepted. Only compile for the others."
    flags.DEFINE_bool("check", False, check, **options)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", **options)
    return values


def _jobs(values: flags.FlagValues, cases, ops, targets) -> list[_Job]:
    """What is not checked is only compiled: each case for one of the targets, in turn."""
    if not values.check:
        every = itertools.product(cases, ops, targets)
        return [(*job, True, values.xla_taps) for job in every]
    others = [target for target in targets if target != _CHECKED]
    apart = [("case", "op"), ("case", "target")]
    compiled = covering.sample(apart=apart, case=cases, op=ops, target=others)
    jobs = [(*job, _CHECKED, True, values.xla_taps) for job in itertools.product(cases, ops)]
    return jobs + [(*job, False, False) for job in compiled]


def _run(values: flags.FlagValues) -> int:
    cases = _command_line.found(values.filter, "cases", CASES)
    ops = _command_line.chosen("ops", values.ops, list(OPS))
    targets = _command_line.chosen("targets", values.targets, list(cuda.TARGETS))
    if values.check and _CHECKED not in targets:
        raise flags.Error(f"--check: is of {_CHECKED}, which is not among the --targets")
    _command_line.check_output("json", values.json)
    if reason := cuda.missing():
        raise flags.Error(reason)

    jobs = _jobs(values, cases, ops, targets)
    rows: list[_Row] = []
    failures = []
    results = workers.run(_measure, jobs, {"JAX_PLATFORMS": "cpu"}, _TIMEOUT)
    for i, ((case, op, arch, *_), (row, error)) in enumerate(zip(jobs, results, strict=True), 1):
        print(f"{i}/{len(jobs)} {op}, {case.name}, {arch}", file=sys.stderr)
        if error is not None:
            failures.append(f"{op}, {case.name}, {arch}: {error}")
        elif row is not None:
            rows.append(row)
    if values.check:
        for row in rows:
            failures += [f"{row['op']}, {row['case']}: {text}" for text in _violations(row)]

    _print_table(rows)
    for failure in failures:
        print(f"figures gpu: {failure}", file=sys.stderr)
    if values.json is not None:
        versions = {"jax": jax.__version__, **cuda.versions()}
        meta = {"versions": versions, "failures": failures}
        text = json.dumps({"meta": meta, "rows": rows}, indent=1)
        _command_line.save("json", values.json, lambda file: file.write(text.encode()))
    return 1 if failures else 0
