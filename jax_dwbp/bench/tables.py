"""What is shown of the figures: Markdown tables and a picture."""

import importlib
import io
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from jax_dwbp.bench.layers import GROUPS
from jax_dwbp.bench.timing import Row

Tables = dict[str, dict[str, dict[str, Row]]]  # by title, label and contestant


def collected(rows: Sequence[Row]) -> Tables:
    """Networks have a table for each op and batch; the rows of other groups tell their batch."""
    found: Tables = {}
    for row in rows:
        name, op, batch, dtype = (row[key] for key in ("layer", "op", "batch", "dtype"))
        [group] = [g for g, layers in GROUPS.items() if name in [layer.name for layer in layers]]
        title, label = f"{group}, {op}", f"{name}, batch {batch}"
        if group == "networks":
            title, label = f"{op}, batch {batch}", name
        if dtype != "float32":
            label += f", {dtype}"
        found.setdefault(title, {}).setdefault(label, {})[row["contestant"]] = row
    return found


def report(
    tables: Tables, names: Sequence[str], peers: Sequence[str], rate: float
) -> Iterator[str]:
    """The lines of the tables. The ratios are those of the first of `names`."""
    ours, compilation = names[0], []
    for title, rows in tables.items():
        yield f"\n### {title}, in milliseconds\n"
        taking_part = [peer for peer in peers if any(peer in cells for cells in rows.values())]
        contestants, table = [*names, *taking_part, "copy"], []
        for label, cells in rows.items():
            share = "-"
            if ours in cells:
                share = f"{cells[ours]['multiply_adds'] / cells[ours]['median'] / rate:.1%}"
            ratios = (_shown(cells, peers, ours), _shown(cells, [ours], "copy"))
            times = [_milliseconds(cells.get(name)) for name in contestants]
            table.append([label, *times, *ratios, share])
            runs = ", ".join(dict.fromkeys(cells[ours]["runs"])) if ours in cells else "-"
            costs = [_compilation(cells.get(name)) for name in names]
            row = next(iter(cells.values()))
            compilation.append([label, row["op"], str(row["batch"]), *costs, runs])
        ratios = (f"best peer / {ours}", f"{ours} / copy", f"{ours}, share of FMA rate")
        yield from _table(["layer", *contestants, *ratios], table)
        for what, others in (("best peer", peers), ("lax", ["lax"])):
            means = {label: r for label in rows if (r := _ratio(rows[label], others, ours))}
            if means and ours not in others:
                mean = number(statistics.geometric_mean(means.values()))
                worst = min(means, key=lambda label: means[label])
                least = _shown(rows[worst], others, ours)
                yield (
                    f"\n{what} / {ours}: {mean}, the geometric mean of {len(means)}; "
                    f"the least is {least}, of {worst}"
                )
    yield "\n### Compilation in seconds, temporary memory in MiB\n"
    yield from _table(["layer", "op", "batch", *names, f"{ours} runs"], compilation)


def _ratio(cells: dict[str, Row], others: Sequence[str], name: str) -> float | None:
    """How many times as long as `name` the fastest of the others takes."""
    other = _fastest(cells, others)
    return other["median"] / cells[name]["median"] if other and name in cells else None


def _fastest(cells: dict[str, Row], others: Sequence[str]) -> Row | None:
    rows = [cells[other] for other in others if other in cells]
    return min(rows, key=lambda row: row["median"], default=None)


def _shown(cells: dict[str, Row], others: Sequence[str], name: str) -> str:
    """The ratio, with a sign where it is in the noise: where the quartiles overlap."""
    ratio, other = number(_ratio(cells, others, name)), _fastest(cells, others)
    if other is None or name not in cells:
        return ratio
    pair = (other, cells[name])
    noise = max(row["low"] for row in pair) <= min(row["high"] for row in pair)
    return f"~{ratio}" if noise else ratio


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


def plot(tables: Tables, rate: float) -> bytes:
    """A PNG of the speed of each contestant, as a share of what the slower of the floors allows."""
    figure_module = importlib.import_module("matplotlib.figure")
    every = [cells for rows in tables.values() for cells in rows.values()]
    names = dict.fromkeys(name for cells in every for name in cells if name != "copy")
    labels = dict.fromkeys(label for rows in tables.values() for label in rows)
    figure = figure_module.Figure(
        (3 + 4 * len(tables), 1.5 + 0.25 * len(labels)), layout="constrained"
    )
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for panel, (title, rows) in zip(panels, tables.items(), strict=True):
        for name, marker in zip(names, itertools.cycle("o^svDP*X")):
            shares = [_share(cells, name, rate) for cells in rows.values()]
            panel.plot(shares, list(rows), marker, label=name, alpha=0.7)
        panel.set(title=title, xlabel="share of the floor", xscale="log")
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
