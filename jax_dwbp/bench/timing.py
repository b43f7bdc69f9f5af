"""How it is timed: in blocks of calls, after the results are compared."""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dwbp.bench.contestants import PEERS, compiled, function, selections
from jax_dwbp.bench.layers import Task

Row = dict[str, Any]  # the figures of one contestant, for --json
_SLOW, _PATIENCE = 10, 100  # blocks: a call of a slow contestant, all its calls


def measure(
    task: Task, names: Sequence[str], peers: Sequence[str], blocks: int, seconds: float
) -> list[Row]:
    operands = [jnp.asarray(operand) for operand in task.operands()]
    chosen = selections(task)
    contestants = []
    for name in names:
        runs = [str(s.runs) if name == "default" else name for s in chosen]
        if reasons := [r for s, run in zip(chosen, runs, strict=True) if (r := s.reasons[run])]:
            print(f"  without {name}: {reasons[0]}", file=sys.stderr)
        else:
            contestants.append(compiled(name, function(task, name), *operands, runs=runs))
    contestants += [PEERS[peer][1](task, *operands) for peer in peers]

    reference, first = None, {"copy": 0.0}
    for contestant in contestants:
        start = time.perf_counter()
        results = contestant.call()
        first[contestant.name] = time.perf_counter() - start
        arrays = contestant.arrays(results)
        reference = reference or (contestant.name, arrays)
        task.check(contestant.name, arrays, *reference)
    # It reads half of the bytes and writes half.
    half = jnp.ones(task.bytes // 2 // operands[0].itemsize, task.dtype)
    contestants.append(compiled("copy", jnp.negative, half))

    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(blocks):
        for contestant in contestants:
            name, taken = contestant.name, times[contestant.name]
            if first[name] <= _SLOW * seconds:
                consecutive(contestant.call, seconds / 10)
                taken += consecutive(contestant.call, seconds)
            elif not taken or sum(taken) < _PATIENCE * seconds:
                taken += consecutive(contestant.call, 0)
    return [
        {
            **dataclasses.asdict(task),
            "layer": task.layer.name,
            "contestant": contestant.name,
            "median": statistics.median(times[contestant.name]),
            "low": float(np.quantile(times[contestant.name], 0.25)),
            "high": float(np.quantile(times[contestant.name], 0.75)),
            "calls": len(times[contestant.name]),
            "bytes": task.bytes,
            "multiply_adds": task.multiply_adds,
            **contestant.compilation,
        }
        for contestant in contestants
    ]


def consecutive(call: Callable[[], Any], seconds: float) -> list[float]:
    """The duration of each of the calls that start within `seconds`, at least one."""
    durations = []
    start = now = time.perf_counter()
    while not durations or now - start < seconds:
        before = now
        call()
        now = time.perf_counter()
        durations.append(now - before)
    return durations


def fma_rate() -> float:
    """Multiply-adds per second of a matmul, which is nothing but these and tuned by everyone.

    Clock rates and vector units would tell what the machine could do, this tells what it does.
    """
    n = 2048
    a = np.full((n, n), 0.5, np.float32)
    b, product = jnp.asarray(a), jax.jit(functools.partial(jnp.matmul, precision="highest"))
    calls: list[Callable] = [lambda: jax.block_until_ready(product(b, b))]
    if jax.default_backend() == "cpu":
        calls.append(lambda: a @ a)
    return n**3 / min(min(consecutive(call, 0)[0] for _ in range(4)) for call in calls)
