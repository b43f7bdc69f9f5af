"""How it is timed: in blocks of calls, after the results are compared."""

import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dwbp.bench.contestants import Contestant, compiled, function, selections
from jax_dwbp.bench.layers import Mismatch, Task
from jax_dwbp.bench.peers import PEERS

Row = dict[str, Any]  # the figures of one contestant, for --json
_SLOW, _PATIENCE = 10, 100  # blocks: a call of a slow contestant, all its calls
_TURNS = (0.008, 0.016, 0.032)  # seconds that a scheduler gives to one process on a core


def measure(
    task: Task, names: Sequence[str], peers: Sequence[str], blocks: int, seconds: float
) -> list[Row]:
    contestants = _contestants(task, names, peers)
    first = _compared(task, contestants)
    contestants = [contestant for contestant in contestants if contestant.name in first]
    # It reads half of the bytes and writes half.
    half = jnp.ones(task.bytes // 2 // jnp.dtype(task.dtype).itemsize, task.dtype)
    contestants.append(compiled("copy", list, jnp.negative, half))

    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(blocks):
        for contestant in contestants:
            name, taken = contestant.name, times[contestant.name]
            if first.get(name, 0) <= _SLOW * seconds:
                consecutive(contestant.call, seconds / 10)
                taken += consecutive(contestant.call, seconds)
            elif not taken or sum(taken) < _PATIENCE * seconds:
                taken += consecutive(contestant.call, 0)
    for name, taken in times.items():
        if at := stands_at(taken):
            print(
                f"  {name}: many calls take {1e3 * at:.0f} ms, and others less than half of that: "
                "something else seems to hold a core",
                file=sys.stderr,
            )
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


def _contestants(task: Task, names: Sequence[str], peers: Sequence[str]) -> list[Contestant]:
    """Those that can run it. Why others can't is told."""
    operands = [jnp.asarray(operand) for operand in task.operands()]
    chosen = selections(task)
    contestants = []
    for name in names:
        runs = [str(s.runs) if name == "default" else name for s in chosen]
        if reasons := [r for s, run in zip(chosen, runs, strict=True) if (r := s.reasons[run])]:
            print(f"  without {name}: {reasons[0]}", file=sys.stderr)
        else:
            run = function(task, name)
            contestants.append(compiled(name, task.folded_results, run, *operands, runs=runs))
    folded = list(map(jnp.asarray, task.folded_operands(operands)))
    for peer in peers:
        reason = PEERS[peer].lacks(task)
        if reason is None:
            try:
                contestants.append(PEERS[peer].contestant(task, *folded))
            except (RuntimeError, AttributeError) as error:  # of a kernel that it lacks
                reason = " ".join(str(error).split())
        if reason is not None:
            print(f"  without {peer}: {reason}", file=sys.stderr)
    return contestants


def _compared(task: Task, contestants: Sequence[Contestant]) -> dict[str, float]:
    """The duration of the first call of each whose results are those of the first of them.

    A peer may sum in a half type itself, which is another function, and is left out.
    """
    durations, reference = {}, None
    for contestant in contestants:
        start = time.perf_counter()
        results = contestant.call()
        duration = time.perf_counter() - start
        arrays = contestant.arrays(results)
        reference = reference or (contestant.name, arrays)
        try:
            task.check(contestant.name, arrays, *reference)
        except Mismatch as error:
            if contestant.name not in PEERS or jnp.finfo(task.dtype).bits >= 32:
                raise
            print(f"  without {contestant.name}: {error}", file=sys.stderr)
        else:
            durations[contestant.name] = duration
    return durations


def stands_at(times: Sequence[float]) -> float | None:
    """The turn, if one, that a quarter of the calls take though others take less than half of it.

    So calls look whose threads wait until another process has had its turn on a core.
    """
    for turn in _TURNS:
        waited = sum(abs(seconds - turn) <= 0.03 * turn for seconds in times)
        if waited >= max(3, len(times) / 4) and min(times) < turn / 2:
            return turn
    return None


def warn_of_load() -> None:
    if not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        message = f"the load of the last minute is {load:.1f} on {cores} cores"
        print(f"{message}: something else seems to run, and to slow the peers", file=sys.stderr)


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
