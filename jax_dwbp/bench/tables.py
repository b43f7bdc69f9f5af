"""What is shown of the figures: Markdown tables and a picture."""

import importlib
import io
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from jax_dwbp.bench.timing import Row

Tables = dict[tuple[str, int], dict[str, dict[str, Row]]]  # by op and batch, layer, contestant


def report(
    groups: Tables, names: Sequence[str], peers: Sequence[str], rate: float
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
            table.append([layer, *times, *map(number, ratios), share])
            runs = ", ".join(dict.fromkeys(cells[ours]["runs"])) if ours in cells else "-"
            costs = [_compilation(cells.get(name)) for name in names]
            compilation.append([layer, op, str(batch), *costs, runs])
        ratios = (f"best peer / {ours}", f"{ours} / copy", f"{ours}, share of FMA rate")
        yield from _table(["layer", *contestants, *ratios], table)
        for label, others in (("best peer", peers), ("lax", ["lax"])):
            means = [r for cells in group.values() if (r := _ratio(cells, others, ours))]
            if means and ours not in others:
                mean = number(statistics.geometric_mean(means))
                yield f"\n{label} / {ours}: {mean}, the geometric mean of {len(means)}"
    yield "\n### Compilation in seconds, temporary memory in MiB\n"
    yield from _table(["layer", "op", "batch", *names, f"{ours} runs"], compilation)


def _ratio(cells: dict[str, Row], others: Sequence[str], name: str) -> float | None:
    """How many times as long as `name` the fastest of the others takes."""
    medians = [cells[other]["median"] for other in others if other in cells]
    return min(medians) / cells[name]["median"] if medians and name in cells else None


def _table(header: list[str], table: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *table)]


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return "-"
    median, low, high = (number(1e3 * row[name]) for name in ("median", "low", "high"))
    return f"{median} ({low}..{high})"


def _compilation(row: Row | None) -> str:
    if row is None:
        return "-"
    memory = row["temp_bytes"]
    return f"{number(row['compile_seconds'])}, {number(memory and memory / 2**20)}"


def number(value: float | None) -> str:
    """Three digits, or all of those before the point."""
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def plot(groups: Tables, rate: float) -> bytes:
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


def _share(cells: dict[str, Row], name: str, rate: float) -> float:
    if name not in cells:
        return math.nan
    floor = max(cells["copy"]["median"], cells[name]["multiply_adds"] / rate)
    return floor / cells[name]["median"]
