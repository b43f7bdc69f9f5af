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

import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import jax_dwbp
from jax_dwbp import _command_line
from jax_dwbp._spec import DTYPES

_Row = dict[str, Any]  # the figures of one contestant, for --json
_Figures = dict[str, Any]  # of --json: "rows", and "meta" on the machine and the contestants
_Groups = dict[tuple[str, int], dict[str, dict[str, _Row]]]  # by op and batch, layer, contestant
OPS = ("forward", "input_grad", "filter_grad", "step")
_SLOW, _PATIENCE = 10, 100  # blocks: a call of a slow contestant, all its calls


@dataclasses.dataclass(frozen=True)
class Layer:
    """A depthwise convolution of a network, for any batch.

    The pad after may not be larger than the pad before, of which PyTorch is told.
    """

    name: str
    height: int
    width: int
    channels: int
    multiplier: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]


def _square(network: str, size: int, channels: int, kernel: int, stride=1, multiplier=1) -> Layer:
    """A square layer, padded alike at both ends: PyTorch lacks "SAME" with a stride."""
    name = f"{network} {size}x{size}x{channels} k{kernel} s{stride}"
    if multiplier > 1:
        name += f" m{multiplier}"
    pads = (kernel // 2, kernel // 2)
    return Layer(name, size, size, channels, multiplier, (kernel, kernel), stride, (pads, pads))


LAYERS = (
    _square("mobilenetv2", 112, 32, 3),
    _square("mobilenetv2", 112, 96, 3, stride=2),
    _square("mobilenetv2", 56, 144, 3),
    _square("mobilenetv2", 14, 576, 3),
    _square("mobilenetv2", 7, 960, 3),
    _square("efficientnet-b0", 56, 144, 5, stride=2),
    _square("efficientnet-b0", 28, 240, 5),
    _square("efficientnet-b0", 14, 672, 5),
    _square("efficientnet-b0", 7, 1152, 5),
    _square("convnext-t", 56, 96, 7),
    _square("convnext-t", 28, 192, 7),
    _square("convnext-t", 14, 384, 7),
    _square("convnext-t", 7, 768, 7),
    _square("replknet-31b", 28, 128, 31),  # 56x56 there, four times the work
    _square("replknet-31b", 7, 1024, 13),
    Layer("mamba 1x1024x1536 k1x4 s1", 1, 1024, 1536, 1, (1, 4), 1, ((0, 0), (3, 0))),
    _square("strided", 28, 192, 5, stride=2),
    _square("odd", 28, 67, 3),
    _square("multiplier", 56, 32, 3, multiplier=2),
    _square("multiplier", 28, 16, 3, multiplier=8),
)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What the contestants of one row compute."""

    layer: Layer
    op: str
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}, batch {self.batch}, {self.dtype}, {self.layer.name}"

    @functools.cached_property
    def output(self) -> tuple[int, int]:
        layer = self.layer
        sizes = zip((layer.height, layer.width), layer.padding, layer.kernel, strict=True)
        p, q = ((size + sum(pads) - kernel) // layer.stride + 1 for size, pads, kernel in sizes)
        return p, q

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of x, f and dy."""
        layer, c, m = self.layer, self.layer.channels, self.layer.multiplier
        x = (self.batch, layer.height, layer.width, c)
        return x, (*layer.kernel, c, m), (self.batch, *self.output, c * m)

    @property
    def terms(self) -> list[int]:
        """The length of the sum in an element, for each of the results."""
        r, s, _, m = self.shapes[1]
        terms = {
            "forward": r * s,
            "input_grad": r * s * m,
            "filter_grad": self.batch * math.prod(self.output),
        }
        return list(terms.values()) if self.op == "step" else [terms[self.op]]

    # Each op works on arrays of the shapes of x, f and dy, in one role or another, and multiplies
    # each element of dy once for each tap: so the floors of the three are the same.

    @property
    def bytes(self) -> int:
        return len(self.terms) * sum(map(math.prod, self.shapes)) * jnp.dtype(self.dtype).itemsize

    @property
    def multiply_adds(self) -> int:
        return len(self.terms) * math.prod(self.shapes[2]) * math.prod(self.layer.kernel)

    def operands(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [rng.uniform(-1, 1, shape).astype(jnp.dtype(self.dtype)) for shape in self.shapes]

    def check(self, name: str, got: list[np.ndarray], reference: str, want: list[np.ndarray]):
        """Raises `_Mismatch` unless the results are equal to rounding.

        The products are below 1 and err by eps each, their sum grows like a random walk, and as one
        chain of additions errs by eps of that at each step: with 5 sigma, in all at most
        2 sqrt(terms) + terms / 4. Each of the two results is rounded to its dtype once more.
        """
        last = float(jnp.finfo(self.dtype).eps)
        eps = min(last, float(jnp.finfo(jnp.float32).eps))
        for a, b, terms in zip(got, want, self.terms, strict=True):
            a, b = a.astype(np.float64), b.astype(np.float64)
            allowed = eps * (2 * math.sqrt(terms) + terms / 4) + last * abs(b)
            worst = np.max(abs(a - b) / (2 * allowed)) if a.shape == b.shape else math.inf
            if not worst <= 1:  # nor is NaN
                raise _Mismatch(f"{self}: {name} - {reference} is {worst:.3g} of what is allowed")


class _Mismatch(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class _Contestant:
    name: str
    call: Callable[[], Any]  # runs to the end
    arrays: Callable[[Any], list[np.ndarray]]  # the results of a call in NHWC and [R, S, C, M]
    compilation: dict[str, Any] = dataclasses.field(default_factory=dict)  # for --json


# ---- The contestants.


def _function(problem: _Problem, implementation: str) -> Callable[..., list[jax.Array]]:
    """The op of `problem` by this package, of x, f and dy."""
    layer = problem.layer
    options: Any = {
        "strides": (layer.stride, layer.stride),
        "padding": layer.padding,
        "precision": "highest",
        "implementation": None if implementation == "default" else implementation,
    }
    forward = functools.partial(jax_dwbp.depthwise_conv2d_native, **options)

    def step(x, f, dy):
        y, pullback = jax.vjp(forward, x, f)
        return [y, *pullback(dy)]

    backprop_input = jax_dwbp.depthwise_conv2d_native_backprop_input
    backprop_filter = jax_dwbp.depthwise_conv2d_native_backprop_filter
    return {
        "forward": lambda x, f, dy: [forward(x, f)],
        "input_grad": lambda x, f, dy: [backprop_input(x.shape, f, dy, **options)],
        "filter_grad": lambda x, f, dy: [backprop_filter(x, f.shape, dy, **options)],
        "step": step,
    }[problem.op]


def _selections(problem: _Problem) -> list[jax_dwbp.Selection]:
    shapes = [jax.ShapeDtypeStruct(shape, problem.dtype) for shape in problem.shapes]
    return jax_dwbp.implementations(_function(problem, "default"), *shapes)


def _compiled(name: str, function: Callable, *args: jax.Array, **notes: Any) -> _Contestant:
    jax.clear_caches()  # else one implementation finds what another one traced
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    notes["compile_seconds"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    notes["temp_bytes"] = memory and memory.temp_size_in_bytes
    return _Contestant(
        name,
        lambda: jax.block_until_ready(compiled(*args)),
        lambda results: list(map(np.asarray, results)),
        notes,
    )


def _tensorflow(problem: _Problem, *operands: jax.Array) -> _Contestant:
    tf = importlib.import_module("tensorflow")
    tf.config.set_visible_devices([], "GPU")  # where it would run if it found one
    (x, f, dy), layer = (tf.constant(np.asarray(operand)) for operand in operands), problem.layer
    attributes = {
        "strides": [1, layer.stride, layer.stride, 1],
        "padding": "EXPLICIT",
        "explicit_paddings": [0, 0, *layer.padding[0], *layer.padding[1], 0, 0],
    }
    input_sizes, filter_sizes = tf.constant(x.shape), tf.constant(f.shape)
    ops = {
        "forward": lambda: tf.raw_ops.DepthwiseConv2dNative(input=x, filter=f, **attributes),
        "input_grad": lambda: tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
            input_sizes=input_sizes, filter=f, out_backprop=dy, **attributes
        ),
        "filter_grad": lambda: tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=x, filter_sizes=filter_sizes, out_backprop=dy, **attributes
        ),
    }
    run = list(ops.values()) if problem.op == "step" else [ops[problem.op]]
    return _Contestant(
        "tensorflow", lambda: [op() for op in run], lambda results: [y.numpy() for y in results]
    )


def _torch(name: str, layout: str, problem: _Problem, *operands: jax.Array) -> _Contestant:
    torch = importlib.import_module("torch")
    layer, (p, q) = problem.layer, problem.output
    c, strides, pads = layer.channels, [layer.stride] * 2, [low for low, _ in layer.padding]
    x, f, dy = map(torch.from_dlpack, operands)
    f = f.permute(2, 3, 0, 1).reshape(c * layer.multiplier, 1, *layer.kernel)
    x, dy = (tensor.permute(0, 3, 1, 2) for tensor in (x, dy))
    x, f, dy = (t.contiguous(memory_format=getattr(torch, layout)) for t in (x, f, dy))
    # It pads both ends alike. What this makes too much of a causal convolution is cut off, as in
    # Mamba, and there the gradient is zero.
    surplus = [
        (size + 2 * pad - kernel) // layer.stride + 1 - out
        for size, pad, kernel, out in zip(x.shape[2:], pads, layer.kernel, (p, q), strict=True)
    ]

    def forward():
        y = torch.nn.functional.conv2d(x, f, None, strides, pads, 1, c)
        return y[:, :, :p, :q] if any(surplus) else y

    def backward(*wanted: bool):
        h, w = surplus
        full = torch.nn.functional.pad(dy, (0, w, 0, h)) if any(surplus) else dy
        return torch.ops.aten.convolution_backward(
            full, x, f, None, strides, pads, [1, 1], False, [0, 0], c, [*wanted, False]
        )

    def arrays(results):
        """`results` in the order y, dx, df, None where it was not wanted."""
        channels_last = [t.permute(0, 2, 3, 1) for t in results[:2] if t is not None]
        shape = (c, layer.multiplier, *layer.kernel)
        filters = [t.reshape(shape).permute(2, 3, 0, 1) for t in results[2:3] if t is not None]
        return [t.double().numpy() for t in channels_last + filters]

    call = {
        "forward": lambda: [forward()],
        "input_grad": lambda: [None, *backward(True, False)],
        "filter_grad": lambda: [None, *backward(False, True)],
        "step": lambda: [forward(), *backward(True, True)],
    }[problem.op]
    return _Contestant(name, call, arrays)


_PEERS: dict[str, tuple[str, Callable[..., _Contestant]]] = {
    "tensorflow": ("tensorflow", _tensorflow),
    "torch": ("torch", functools.partial(_torch, "torch", "channels_last")),
    "torch_nchw": ("torch", functools.partial(_torch, "torch_nchw", "contiguous_format")),
}


# ---- The measurement.


def _measure(
    problem: _Problem, names: Sequence[str], peers: Sequence[str], blocks: int, seconds: float
) -> list[_Row]:
    operands = [jnp.asarray(operand) for operand in problem.operands()]
    selections = _selections(problem)
    contestants = []
    for name in names:
        runs = [str(s.runs) if name == "default" else name for s in selections]
        if reasons := [r for s, run in zip(selections, runs, strict=True) if (r := s.reasons[run])]:
            print(f"  without {name}: {reasons[0]}", file=sys.stderr)
        else:
            contestants.append(_compiled(name, _function(problem, name), *operands, runs=runs))
    contestants += [_PEERS[peer][1](problem, *operands) for peer in peers]

    reference, first = None, {"copy": 0.0}
    for contestant in contestants:
        start = time.perf_counter()
        results = contestant.call()
        first[contestant.name] = time.perf_counter() - start
        arrays = contestant.arrays(results)
        reference = reference or (contestant.name, arrays)
        problem.check(contestant.name, arrays, *reference)
    # It reads half of the bytes and writes half.
    half = jnp.ones(problem.bytes // 2 // operands[0].itemsize, problem.dtype)
    contestants.append(_compiled("copy", jnp.negative, half))

    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(blocks):
        for contestant in contestants:
            name, taken = contestant.name, times[contestant.name]
            if first[name] <= _SLOW * seconds:
                _consecutive(contestant.call, seconds / 10)
                taken += _consecutive(contestant.call, seconds)
            elif not taken or sum(taken) < _PATIENCE * seconds:
                taken += _consecutive(contestant.call, 0)
    return [
        {
            **dataclasses.asdict(problem),
            "layer": problem.layer.name,
            "contestant": contestant.name,
            "median": statistics.median(times[contestant.name]),
            "low": float(np.quantile(times[contestant.name], 0.25)),
            "high": float(np.quantile(times[contestant.name], 0.75)),
            "calls": len(times[contestant.name]),
            "bytes": problem.bytes,
            "multiply_adds": problem.multiply_adds,
            **contestant.compilation,
        }
        for contestant in contestants
    ]


def _consecutive(call: Callable[[], Any], seconds: float) -> list[float]:
    """The duration of each of the calls that start within `seconds`, at least one."""
    durations = []
    start = now = time.perf_counter()
    while not durations or now - start < seconds:
        before = now
        call()
        now = time.perf_counter()
        durations.append(now - before)
    return durations


def _fma_rate() -> float:
    """Multiply-adds per second of a matmul, which is nothing but these and tuned by everyone.

    Clock rates and vector units would tell what the machine could do, this tells what it does.
    """
    n = 2048
    a = np.full((n, n), 0.5, np.float32)
    b, product = jnp.asarray(a), jax.jit(functools.partial(jnp.matmul, precision="highest"))
    calls: list[Callable] = [lambda: jax.block_until_ready(product(b, b))]
    if jax.default_backend() == "cpu":
        calls.append(lambda: a @ a)
    return n**3 / min(min(_consecutive(call, 0)[0] for _ in range(4)) for call in calls)


# ---- The report.


def _report(
    groups: _Groups, names: Sequence[str], peers: Sequence[str], rate: float
) -> Iterator[str]:
    """The lines of the tables. The ratios are those of the first of `names`."""
    ours, contestants = names[0], [*names, *peers, "copy"]
    compilation = []
    for (op, batch), group in groups.items():
        yield f"\n### {op}, batch {batch}, in milliseconds\n"
        table = []
        for layer, cells in group.items():
            share = "-"
            if ours in cells:
                share = f"{cells[ours]['multiply_adds'] / cells[ours]['median'] / rate:.1%}"
            ratios = (_ratio(cells, peers, ours), _ratio(cells, [ours], "copy"))
            times = [_milliseconds(cells.get(name)) for name in contestants]
            table.append([layer, *times, *map(_number, ratios), share])
            runs = ", ".join(dict.fromkeys(cells[ours]["runs"])) if ours in cells else "-"
            costs = [_compilation(cells.get(name)) for name in names]
            compilation.append([layer, op, str(batch), *costs, runs])
        ratios = (f"best peer / {ours}", f"{ours} / copy", f"{ours}, share of FMA rate")
        yield from _table(["layer", *contestants, *ratios], table)
        for label, others in (("best peer", peers), ("lax", ["lax"])):
            means = [r for cells in group.values() if (r := _ratio(cells, others, ours))]
            if means and ours not in others:
                mean = _number(statistics.geometric_mean(means))
                yield f"\n{label} / {ours}: {mean}, the geometric mean of {len(means)}"
    yield "\n### Compilation in seconds, temporary memory in MiB\n"
    yield from _table(["layer", "op", "batch", *names, f"{ours} runs"], compilation)


def _ratio(cells: dict[str, _Row], others: Sequence[str], name: str) -> float | None:
    """How many times as long as `name` the fastest of the others takes."""
    medians = [cells[other]["median"] for other in others if other in cells]
    return min(medians) / cells[name]["median"] if medians and name in cells else None


def _table(header: list[str], table: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *table)]


def _milliseconds(row: _Row | None) -> str:
    if row is None:
        return "-"
    median, low, high = (_number(1e3 * row[name]) for name in ("median", "low", "high"))
    return f"{median} ({low}..{high})"


def _compilation(row: _Row | None) -> str:
    if row is None:
        return "-"
    memory = row["temp_bytes"]
    return f"{_number(row['compile_seconds'])}, {_number(memory and memory / 2**20)}"


def _number(value: float | None) -> str:
    """Three digits, or all of those before the point."""
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _plot(groups: _Groups, rate: float) -> bytes:
    """A PNG of the speed of each contestant, as a share of what the slower of the floors allows."""
    figure_module = importlib.import_module("matplotlib.figure")
    tables = [list(group.values()) for group in groups.values()]
    names = dict.fromkeys(name for cells in sum(tables, []) for name in cells if name != "copy")
    figure = figure_module.Figure(
        (3 + 4 * len(groups), 1.5 + 0.25 * max(map(len, tables))), layout="constrained"
    )
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, ((op, batch), group) in zip(panels, groups.items(), strict=True):
        for name, marker in zip(names, itertools.cycle("o^svDP*X")):
            shares = [_share(cells, name, rate) for cells in group.values()]
            panel.plot(shares, list(group), marker, label=name, alpha=0.7)
        panel.set(title=f"{op}, batch {batch}", xlabel="share of the floor", xscale="log")
        panel.axvline(1, color="black", linewidth=0.5)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    panels[0].invert_yaxis()  # of all
    figure.savefig(file := io.BytesIO(), format="png", dpi=150)
    return file.getvalue()


def _share(cells: dict[str, _Row], name: str, rate: float) -> float:
    if name not in cells:
        return math.nan
    floor = max(cells["copy"]["median"], cells[name]["multiply_adds"] / rate)
    return floor / cells[name]["median"]


def _meta(device: Any, peers: Sequence[str]) -> dict[str, Any]:
    packages = dict.fromkeys(["jax", "jaxlib", "numpy", *(_PEERS[peer][0] for peer in peers)])
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


# ---- The command line.


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
    names("peers", None, f"Out of {','.join(_PEERS)}; by default those installed.")
    flags.DEFINE_integer("blocks", 7, "Of calls, for each contestant.", 1, **options)
    flags.DEFINE_float("block_seconds", 0.1, "The duration of a block.", 0, **options)
    text("json", None, "A file for all figures, in seconds and bytes; low and high are quartiles.")
    text("plot", None, "A file for a PNG of the speeds against the floors.")
    text("read", None, "Show the rows of an earlier --json instead of timing.")
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", **options)
    return values


def _run(values: flags.FlagValues) -> int:
    problems = [
        _Problem(layer, op, batch, values.dtype)
        for op in _command_line.chosen("ops", values.ops, OPS)
        for batch in _batches(values.batch)
        for layer in _command_line.found(values.filter, "layers", LAYERS)
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
        figures = _timed(values, problems)
        report, picture = _shown(values, figures)
    else:
        try:
            figures = _read(values, problems)
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
    groups: _Groups = {}
    for row in figures["rows"]:
        group = groups.setdefault((row["op"], row["batch"]), {})
        group.setdefault(row["layer"], {})[row["contestant"]] = row
    report = [
        f"{meta['machine']}; {meta['device']}",
        ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        f"{values.dtype}; float32 matmul: {rate / 1e9:.3g} GFMA/s",
        *_report(groups, meta["implementations"], meta["peers"], rate),
    ]
    return "\n".join(report), _plot(groups, rate) if values.plot is not None and groups else None


def _timed(values: flags.FlagValues, problems: Sequence[_Problem]) -> _Figures:
    device = _command_line.device()
    selections = [selection for problem in problems for selection in _selections(problem)]
    known = ["default", *selections[0].reasons]
    if values.implementations is None:
        runs = {name for s in selections for name, reason in s.reasons.items() if reason is None}
        names = [name for name in known if name == "default" or name in runs]
    else:
        names = _command_line.chosen("implementations", values.implementations, known)
    peers = _peers(values.peers, values.dtype)
    rate = _fma_rate()
    rows, mismatches = [], []
    for i, problem in enumerate(problems, 1):
        print(f"{i}/{len(problems)} {problem}", file=sys.stderr)
        try:
            rows += _measure(problem, names, peers, values.blocks, values.block_seconds)
        except _Mismatch as error:
            print(f"jax_dwbp.bench: {error}", file=sys.stderr)
            mismatches.append(str(error))
    results = {"multiply_adds_per_second": rate, "mismatches": mismatches}
    contestants = {"implementations": names, "peers": peers}
    return {"meta": _meta(device, peers) | contestants | results, "rows": rows}


def _read(values: flags.FlagValues, problems: Sequence[_Problem]) -> _Figures:
    """Of `problems`, what the file of an earlier --json has."""
    for name in ("implementations", "peers", "blocks", "block_seconds"):
        if values[name].present:
            raise flags.Error(f"--{name}: says how to time, and with --read nothing is timed")
    wanted = {(p.layer.name, p.op, p.batch, p.dtype): f"{p}: " for p in problems}
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
    missing = {p: m for p, (m, _) in _PEERS.items() if importlib.util.find_spec(m) is None}
    if names is None:
        peers = [peer for peer in _PEERS if peer not in missing]
    else:
        peers = _command_line.chosen("peers", names, list(_PEERS)) if names else []
    for peer in missing.keys() & peers:
        raise flags.Error(f"--peers={peer}: {missing[peer]} is not installed")
    # In half types they may sum in the dtype itself, which is another function.
    if peers and (jax.default_backend() != "cpu" or jnp.finfo(dtype).bits < 32):
        reason = "they take part on a CPU in float32 and float64"
        print(f"without {', '.join(peers)}: {reason}", file=sys.stderr)
        return []
    return peers


if __name__ == "__main__":
    sys.exit(main(sys.argv))
