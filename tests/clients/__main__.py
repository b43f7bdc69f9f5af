"""Depthwise convolutions in layers and networks of other libraries: which run here, and what it
gains. Prints tables in Markdown.

python tests/clients layers [regular expression]     a layer each: forward and all gradients
python tests/clients networks [regular expression]   keras.applications on JAX: a training step
python tests/clients graphs [regular expression]     TensorFlow's graphs of the same, by tf2jax

A step is timed by lax and with `jax_dwbp.install`, in alternating blocks of calls: the medians in
milliseconds. A graph, which calls the ops here by itself, is not timed.
"""

import importlib
import os
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TABLES = {"layers": "jax", "networks": "jax", "graphs": "tensorflow"}
BLOCKS, SECONDS = 5, 0.2
DENSE = "without groups"


def main(table: str, wanted: str = "") -> None:
    os.environ["KERAS_BACKEND"] = TABLES[table]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import jax_dwbp

    header = ["", "here", *(["lax", "installed"] if table != "graphs" else [])]
    print("|", " | ".join(header), "|")
    print("|---" * len(header) + "|")
    for name, build in importlib.import_module(f"clients.{table}").rows():
        if not re.search(wanted, name):
            continue
        step, *operands = build()
        if table == "graphs":
            cells = counted(step, *operands)
        else:
            by_lax = compiled(step, *operands)
            jax_dwbp.install()
            cells = counted(step, *operands)
            installed = compiled(step, *operands)
            jax_dwbp.uninstall()
            cells += timed((by_lax, installed), operands)
        print("|", " | ".join([name, *cells]), "|", flush=True)


def counted(step: Callable, *operands: Any) -> list[str]:
    """How many of its convolutions run here, and why others don't."""
    import jax_dwbp

    selections = jax_dwbp.implementations(step, *operands)
    ours = [selection for selection in selections if selection.op != "conv_general_dilated"]
    reasons = {str(selection.reasons.get("jax_dwbp")) for selection in selections} - {"None"}
    if ours:  # then nobody asks about what is dense beside them
        reasons = {reason for reason in reasons if not reason.startswith(DENSE)}
    return ["; ".join([f"{len(ours)} of {len(selections)}", *sorted(reasons)])]


def compiled(step: Callable, *operands: Any) -> Any:
    import jax

    return jax.jit(step).lower(*operands).compile()


def timed(programs: tuple[Any, Any], operands: list[Any]) -> list[str]:
    import jax
    import numpy as np

    from jax_dwbp.bench.timing import consecutive

    by_lax, installed = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(program(*operands))])
        for program in programs
    )
    # Networks at their start amplify rounding: this is to see that it is the same function.
    assert np.linalg.norm(installed - by_lax) <= 1e-2 * np.linalg.norm(by_lax)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(BLOCKS):
        for program, taken in zip(programs, times, strict=True):
            taken += consecutive(lambda p=program: jax.block_until_ready(p(*operands)), SECONDS)
    return [f"{1e3 * statistics.median(taken):.3g}" for taken in times]


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1] not in TABLES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
