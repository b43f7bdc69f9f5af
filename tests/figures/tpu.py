"""Static figures of the ops on TPUs: what libtpu compiles to, without a TPU.

  python tests/figures tpu --filter='mobilenet|convnext' --ops=input_grad --chips=v5e,v6e

prints a Markdown table. The unit is issue cycles for a register of the result, (8, 128) elements of
float32 (of dy in filter_grad): the bundles of the program times the trips of the loops that they
are in, without stalls for memory. Beside the implementations stand two floors: "VALU", for the
multiplications and additions, which are two instructions on every chip, four of them a bundle; and
"HBM", the cycles that the operands and the result take at the nominal bandwidth. The ratio is that
of the cycles or HBM, whichever is greater. Every implementation gets its operands in the layouts
that it likes.

--check also compiles a matrix of diverse specs and a network of three layers, and fails unless the
limits that this package states hold. It takes a sample, which has each layer with each op and on
each chip, and what has a limit on the first chip; --all is for the whole product. The exit status
is 1 if a limit or a compilation fails, and 2 if the command line can't run. libtpu has to be
installed; it may abort, which fails what it was compiling and nothing else.
"""

import dataclasses
import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import covering
import jax
import jax.numpy as jnp
from absl import flags

from figures import workers
from jax_dwbp import _command_line
from jax_dwbp._impl import lax, pallas_tpu, xla_taps
from jax_dwbp._spec import FORWARD, OPS, Arguments, ConvSpec, canonicalize

_IMPLEMENTATIONS = {"pallas_tpu": pallas_tpu, "lax": lax, "xla_taps": xla_taps}
# The bandwidth in bytes/s and the clock in Hz: nominal ones, of a core.
CHIPS = {"v5e": (820e9, 1.5e9), "v6e": (1640e9, 1.75e9), "tpu7x": (3690e9, 1.9e9)}
_REGISTER = 8 * 128
_TIMEOUT = 900  # seconds


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    input: tuple[int, int, int, int]
    kernel: tuple[int, int]
    multiplier: int = 1
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    dtype: str = "bfloat16"
    # The ops for which XLA compiles its own convolution in seconds, not in minutes.
    lax: tuple[str, ...] = tuple(OPS)

    @property
    def filter(self) -> tuple[int, int, int, int]:
        return (*self.kernel, self.input[3], self.multiplier)

    @property
    def spec(self) -> ConvSpec:
        given = Arguments(
            input=self.input,
            filter=self.filter,
            out_backprop=None,
            strides=self.strides,
            padding=self.padding,
            dilations=self.dilations,
            precision="highest",
        )
        return canonicalize(FORWARD, given)


def _square(
    name, batch, size, channels, kernel, stride=1, multiplier=1, dilation=1, **options
) -> Layer:
    return Layer(
        f"{name} {batch}x{size}x{size}x{channels} k{kernel}"
        + f" s{stride}" * (stride > 1)
        + f" m{multiplier}" * (multiplier > 1)
        + f" d{dilation}" * (dilation > 1)
        + " f32" * ("dtype" in options),
        (batch, size, size, channels),
        (kernel, kernel),
        multiplier,
        (stride, stride),
        (dilation, dilation),
        **options,
    )


# A row for each kind of layer: what differs is the view of the kernel and the taps of a phase.
# Where there is no reason for another batch they have one that does not fit the VMEM, as in
# training: what does may be moved there by XLA, where the copies of blocks cost instructions.
TABLE = (
    _square("mobilenetv2", 128, 28, 256, 3),
    _square("mobilenetv2", 128, 28, 256, 3, dtype="float32"),
    _square("mobilenetv2", 128, 7, 960, 3),
    _square("mobilenetv2", 128, 56, 128, 3, stride=2),
    _square("mobilenetv2", 128, 56, 128, 3, stride=2, dtype="float32"),
    _square("efficientnet-b0", 128, 56, 128, 5, stride=2),
    _square("efficientnet-b0", 128, 28, 256, 5),
    _square("convnext-t", 128, 28, 256, 7),
    _square("convnext-t", 128, 14, 384, 7, dtype="float32"),
    _square("replknet-31b", 128, 28, 128, 31, lax=()),
    _square("few channels", 256, 56, 32, 3),
    _square("few images", 2, 56, 4096, 3),
    _square("one image", 1, 28, 2048, 7),
    _square("multiplier", 8, 28, 128, 3, multiplier=2, lax=("input_grad",)),
)
# More batches for the network of three layers, whose layouts depend on it.
NETWORKS = (
    _square("network", 8, 28, 128, 3),
    _square("network", 16, 14, 576, 5),
    _square("network", 31, 28, 128, 3, stride=2),
    _square("network", 32, 28, 128, 3),
)
# Every kind of spec, compiled for each chip, dtype and op.
MATRIX = (
    _square("even stride", 16, 14, 256, 4, stride=2),
    _square("odd channels", 12, 13, 67, 3),
    _square("one image", 1, 28, 144, 5),
    _square("two images", 2, 17, 96, 3, stride=2),
    _square("images as lanes", 100, 14, 40, 3, stride=2),
    _square("dilated", 8, 14, 128, 3, dilation=2),
    Layer("unequal", (16, 13, 14, 130), (2, 3), 1, (1, 2), (2, 1), ((4, 1), (0, 6))),
    _square("multiplier 8", 2, 28, 16, 3, multiplier=8),
    _square("multiplier 3 s2", 8, 9, 200, 3, stride=2, multiplier=3),
    _square("31x31", 8, 28, 128, 31),
    _square("31x31, one image", 1, 56, 128, 31),
    _square("rows in tiles", 8, 112, 96, 3, stride=2),
    Layer("causal", (1, 1, 1024, 1536), (1, 4), padding=((0, 0), (3, 0))),
    Layer("columns in tiles", (8, 1, 20000, 128), (1, 4)),
    _square("three channels", 3, 299, 3, 3, stride=2, multiplier=8),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    layer: Layer
    op: str
    chip: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.layer.name}, {self.op}, {self.chip}, {self.dtype}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        spec = self.layer.spec
        lanes = spec.channels * spec.multiplier
        return {
            "x": (1, *self.layer.input),
            "f": (1, *self.layer.filter),
            "dy": (1, self.layer.input[0], *spec.out_spatial, lanes),
        }

    @property
    def operands(self) -> list[jax.ShapeDtypeStruct]:
        shapes = self.shapes
        return [
            jax.ShapeDtypeStruct(shapes[n], jnp.dtype(self.dtype)) for n in OPS[self.op].operands
        ]

    @property
    def registers(self) -> float:
        return math.prod(self.shapes["x" if self.op == "input_grad" else "dy"]) / _REGISTER

    @property
    def valu_floor(self) -> float:
        multiplications = math.prod(self.shapes["dy"]) * math.prod(self.layer.kernel)
        additions = 0 if self.op == "filter_grad" else 1  # less than multiplications
        return (2 * multiplications / _REGISTER / self.registers - additions) / 4

    @property
    def hbm_floor(self) -> float:
        bandwidth, clock = CHIPS[self.chip]
        size = sum(map(math.prod, self.shapes.values())) * jnp.dtype(self.dtype).itemsize
        return size / bandwidth * clock / self.registers


# ---- The measure.

_LOOP_EXIT = r"{} = scmp\.\S+ (?:\(\S+\), )?\S+, (\d+) /\* loop exit test"
_BACK = r"sbr\.rel \(!?(%\w+)\),? target = \$region(?:{})\b"


def issue_cycles(listing: str) -> int:
    """The bundles of libtpu's `listing`, each times the trips of the loops around it.

    A line starts a bundle: its address, perhaps labels, a ">" for each loop around it and its
    instructions. The body of a loop starts at a label LB, with the region that the branch at its
    end returns to, and ends with the bundles that the branch delays. Both sides of a forward branch
    count.
    """
    bundle = re.compile(r"^ *(?:0x)?[0-9a-f]+ +([A-Z ]*): ([> ]*)\{", re.MULTILINE)
    starts = list(bundle.finditer(listing))
    ends = [start.start() for start in starts[1:]] + [len(listing)]
    texts = [listing[s.end() : end] for s, end in zip(starts, ends, strict=True)]
    labels = [start[1].split() for start in starts]
    depths = [start[2].count(">") for start in starts]
    trips = [1] * len(starts)
    for first in (i for i, label in enumerate(labels) if "LB" in label):
        back = re.compile(_BACK.format("|".join(re.findall(r"Start region (\d+)", texts[first]))))
        last, predicate = next(
            (i, match[1])
            for i, text in enumerate(texts[first:], first)
            if (match := back.search(text))
        )
        body = "".join(texts[first : last + 1])
        count = re.search(_LOOP_EXIT.format(predicate), body)
        if not count:
            raise ValueError("a loop's trips are not static")
        # The loop over the grid runs once more at either end, where it only copies.
        pipelined = "iteration index, stage" in texts[first]
        times = max(1, int(count[1]) - 2 * pipelined)
        while last + 1 < len(texts) and depths[last + 1] >= depths[first] and not labels[last + 1]:
            last += 1
        trips[first : last + 1] = [t * times for t in trips[first : last + 1]]
    return sum(trips)


def _compile(function, operands: Sequence[jax.ShapeDtypeStruct], chip: str) -> Any:
    """For a chip that is not there, with operands and results in the layouts that XLA likes."""
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout

    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2x1")
    layout = Format(Layout.AUTO, jax.sharding.SingleDeviceSharding(topology.devices[0]))
    jitted = jax.jit(function, in_shardings=layout, out_shardings=layout)
    return jitted.lower(*operands).compile()


def _compile_op(problem: Problem, name: str) -> Any:
    function = getattr(_IMPLEMENTATIONS[name], problem.op)
    function = functools.partial(function, problem.layer.spec)
    return _compile(function, problem.operands, problem.chip)


def _measure(problem: Problem, name: str, dump: str) -> float:
    """Issue cycles of all kernels of the program, for a register of the result."""
    for path in glob.glob(f"{dump}/*"):
        os.remove(path)
    compiled = _compile_op(problem, name)
    if " while(" in compiled.as_text():
        raise ValueError("a loop of XLA's has trips that the listings don't tell")
    # Besides them there are the program's frame and its calls, a constant.
    listings = [
        path
        for path in glob.glob(f"{dump}/*final_bundles.txt")
        if not re.search("-(<late|TLP-)|analysis", path)
    ]
    if not listings:
        raise RuntimeError("libtpu listed no bundles")
    cycles = 0
    for path in listings:
        with open(path) as file:
            cycles += issue_cycles(file.read())
    return cycles / problem.registers


def _network_copies(problem: Problem) -> list[str]:
    """The copies, pads and transpositions of activations in conv1x1 -> the op -> conv1x1."""
    function = getattr(pallas_tpu, problem.op)
    spec = problem.layer.spec
    inputs = problem.shapes["x" if problem.op == "forward" else "dy"]
    result = problem.shapes["dy" if problem.op == "forward" else "x"]
    dtype = jnp.dtype(problem.dtype)

    def network(x, before, f, after):
        hidden = jax.nn.relu(jnp.einsum("gnhwc,cd->gnhwd", x, before))
        operands = (hidden, f) if problem.op == "forward" else (f, hidden)
        return jnp.einsum("gnhwc,cd->gnhwd", function(spec, *operands), after)

    shapes = (inputs, (inputs[-1],) * 2, problem.shapes["f"], (result[-1],) * 2)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    text = _compile(network, operands, problem.chip).as_text()
    return _moved(text, min(math.prod(inputs), math.prod(result)))


def _moved(text: str, activation: int) -> list[str]:
    """What else than the three layers makes an array of an activation's size in the program.

    The pointwise convolutions are fusions of the kind kOutput. XLA prefetches its parameters.
    """
    entry = text[text.index("\nENTRY ") :]
    found = []
    for array, sizes, opcode, rest in re.findall(r"= (\w+\[([\d,]*)\]\S*) ([\w-]+)\((.*)", entry):
        if math.prod(map(int, filter(None, sizes.split(",")))) < activation // 2:
            continue
        known = opcode in ("parameter", "bitcast", "custom-call", "convolution", "copy-done")
        if not known and "kind=kOutput" not in rest:
            found.append(f"{opcode} {array}")
    return found


# ---- What the processes do, which libtpu may abort.

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # What a machine with TPUs tells libtpu of itself.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.cache
def _dump(directory: str) -> str:
    """Where this process has its listings. libtpu reads what it does as it is loaded."""
    dump = tempfile.mkdtemp(dir=directory)
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    )
    return dump


def _figure(kind: str, problem: Problem, name: str, directory: str) -> dict[str, Any]:
    dump = _dump(directory)
    try:
        if kind == "table":
            return {"value": _measure(problem, name, dump)}
        if kind == "network":
            return {"value": _network_copies(problem)}
        _compile_op(problem, name)
        return {"value": None}
    except ValueError as error:
        return {"unknown": f"ValueError: {' '.join(str(error).split())[:300]}"}


_Job = tuple[str, Problem, str]  # the kind, and the name of the implementation


def _run_jobs(jobs: Sequence[_Job]) -> Iterator[dict[str, Any]]:
    """A row for each, with a value or with an error."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [(*job, directory) for job in jobs]
        found = workers.run(_figure, arguments, _ENVIRONMENT, _TIMEOUT)
        for i, ((kind, problem, name), (row, error)) in enumerate(zip(jobs, found, strict=True), 1):
            print(f"{i}/{len(jobs)} {kind} {problem}", file=sys.stderr)
            yield {
                "layer": problem.layer,
                "chip": problem.chip,
                "dtype": problem.dtype,
                "op": problem.op,
                "implementation": name,
                **({"error": error} if error else row),
            }


# ---- What the figures are checked against.


def _table_failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What does not hold of the rows of the table."""
    failures = []
    for problem, figures in _by_problem(rows).items():
        ours, lax_cycles = (figures.get(name, {}).get("value") for name in ("pallas_tpu", "lax"))
        if ours is None:
            continue
        limits: dict[str, float] = {}
        if factor := _factor(problem):
            limits[f"{factor} times the VALU floor"] = factor * problem.valu_floor
        if problem.layer.multiplier > 1 and problem.op == "input_grad" and lax_cycles:
            limits["a 20th of lax"] = lax_cycles / 20
        failures += [
            f"{problem}: {ours:.2f} issue cycles are more than {limit:.2f}, {what}"
            for what, limit in limits.items()
            if limit is not None and ours > limit
        ]
    return failures


def _factor(problem: Problem) -> float | None:
    """The multiple of the VALU floor that is accepted."""
    if problem.layer.strides != (1, 1) or problem.layer.multiplier > 1:
        return None
    factor = {(3, 3): 1.5, (7, 7): 1.25}.get(problem.layer.kernel)
    return None if problem.op == "filter_grad" else factor


def _by_problem(rows: Sequence[dict[str, Any]]) -> dict[Problem, dict[str, dict[str, Any]]]:
    problems: dict[Problem, dict[str, dict[str, Any]]] = {}
    for row in rows:
        problem = Problem(row["layer"], row["op"], row["chip"], row["dtype"])
        problems.setdefault(problem, {})[row["implementation"]] = row
    return problems


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    names = list(_IMPLEMENTATIONS)
    header = ["chip", "op", "layer", *names, "VALU", "HBM", "lax / pallas_tpu"]
    for cells in (header, ["---"] * len(header)):
        print(f"| {' | '.join(cells)} |")
    for problem, figures in sorted(_by_problem(rows).items(), key=lambda p: (p[0].chip, p[0].op)):
        values = [figures.get(name, {}).get("value") for name in names]
        ratio = None
        if values[0] and values[1]:
            ratio = max(values[1], problem.hbm_floor) / max(values[0], problem.hbm_floor)
        cells = [problem.chip, problem.op, problem.layer.name]
        numbers = [*values, problem.valu_floor, problem.hbm_floor, ratio]
        cells += ["-" if v is None else f"{v:.2f}" for v in numbers]
        print(f"| {' | '.join(cells)} |")


# ---- The command line.


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name included, and returns the exit status."""
    values = _flag_values()
    return _command_line.main("figures tpu", __doc__, values, argv, lambda: _run(values))


def _flag_values() -> flags.FlagValues:
    values = flags.FlagValues()
    options: Any = {"flag_values": values, "module_name": "flags"}
    flags.DEFINE_string("filter", "", "A regular expression to be found in the names.", **options)
    flags.DEFINE_list("ops", list(OPS), "Out of these.", **options)
    flags.DEFINE_list("chips", list(CHIPS), "Out of these.", **options)
    names = ["pallas_tpu", "lax"]
    flags.DEFINE_list(
        "implementations",
        names,
        f"Out of {','.join(_IMPLEMENTATIONS)}; XLA's compile slowly.",
        **options,
    )
    check = "Check the limits, of a sample of the problems, and compile a matrix."
    flags.DEFINE_bool("check", False, check, **options)
    flags.DEFINE_bool("all", False, "Check all the problems instead.", **options)
    flags.DEFINE_string("json", None, "A file for all figures.", **options)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", **options)
    return values


def _jobs(values: flags.FlagValues) -> list[_Job]:
    """A check is of a sample of the table, and of a matrix and networks."""
    found = [layer for layer in TABLE if re.search(values.filter, layer.name)]
    table = _problems(values, TABLE, values.ops)
    if values.check:
        table += _limited(values, table, found)
    jobs: list[_Job] = [
        ("table", problem, name)
        for problem in table
        for name in values.implementations
        if name != "lax" or problem.op in problem.layer.lax
    ]
    if values.check:
        both = [op for op in values.ops if op != "filter_grad"]
        networks = _problems(values, NETWORKS, both)
        # Each chip has had those, so that one has to have each of the others, and one op.
        large = (layer for layer in found if layer.input[0] >= 8)
        for layer, chip, op in zip(large, itertools.cycle(values.chips), itertools.cycle(both)):
            ops = both if values.all else [op]
            networks += [Problem(layer, op, chip, layer.dtype) for op in ops]
        matrix = _problems(values, MATRIX, values.ops, ("float32", "bfloat16"))
        jobs += [("matrix", problem, "pallas_tpu") for problem in matrix]
        jobs += [("network", problem, "pallas_tpu") for problem in networks]
    return jobs


def _problems(values: flags.FlagValues, layers, ops, dtypes=(None,)) -> list[Problem]:
    """Of the layers that are asked for; if some are checked, a sample that has each pair."""
    layers = [layer for layer in layers if re.search(values.filter, layer.name)]
    axes = {"layer": layers, "op": ops, "chip": values.chips, "dtype": dtypes}
    whole = values.all or not values.check
    rows: Any = itertools.product(*axes.values()) if whole else covering.sample(**axes)
    return [Problem(layer, op, chip, dtype or layer.dtype) for layer, op, chip, dtype in rows]


def _limited(values: flags.FlagValues, known: list[Problem], layers) -> list[Problem]:
    """What has a limit on the first chip, and one of each kind on each of the others."""

    def has_limit(problem: Problem) -> bool:
        beside_lax = "lax" in values.implementations and problem.op in problem.layer.lax
        return _factor(problem) is not None or (beside_lax and problem.layer.multiplier > 1)

    more: list[Problem] = []
    kinds = {(problem.chip, problem.layer.kernel) for problem in known if has_limit(problem)}
    for layer, op, chip in itertools.product(layers, values.ops, values.chips):
        problem, kind = Problem(layer, op, chip, layer.dtype), (chip, layer.kernel)
        if has_limit(problem) and (chip == values.chips[0] or kind not in kinds):
            kinds.add(kind)
            more.append(problem)
    return [problem for problem in more if problem not in known]


def _run(values: flags.FlagValues) -> int:
    known_names = {"ops": OPS, "chips": CHIPS, "implementations": _IMPLEMENTATIONS}
    for flag, known in known_names.items():
        names: list[str] = values[flag].value or []
        if not names or not set(names) <= set(known):
            raise flags.Error(f"--{flag}={','.join(names)}: must be out of {', '.join(known)}")
    if importlib.util.find_spec("libtpu") is None:
        raise flags.Error("libtpu, which compiles for TPUs, is not installed")

    jobs = _jobs(values)
    if not jobs:
        raise flags.Error(f"--filter={values.filter}: found in none of the layers")
    rows: dict[str, list[dict[str, Any]]] = {"table": [], "matrix": [], "network": []}
    for (kind, *_), row in zip(jobs, _run_jobs(jobs), strict=True):
        rows[kind].append(row)

    _print_table(rows["table"])
    every = [row for figures in rows.values() for row in figures]
    # XLA's loops may have trips that are not static, and its compilation may take too long.
    failures = [
        f"{row['layer'].name}, {row['op']}, {row['chip']}, {row['dtype']}: {row[key]}"
        for row in every
        for key in ("error", "unknown")
        if key in row and row["implementation"] == "pallas_tpu"
    ]
    if values.check:
        failures += _table_failures(rows["table"])
        failures += [
            f"{row['layer'].name}, {row['op']}, {row['chip']}: XLA moves {', '.join(row['value'])}"
            for row in rows["network"]
            if row.get("value")
        ]
    for failure in failures:
        print(f"figures tpu: {failure}", file=sys.stderr)
    if values.json is not None:
        text = json.dumps([{**row, "layer": row["layer"].name} for row in every], indent=1)
        _command_line.save("json", values.json, lambda file: file.write(text.encode()))
    return 1 if failures else 0
