"""Who is timed: the implementations of this package. Its peers are in peers.py."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jax_dwbp
from jax_dwbp.bench.layers import Task


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    call: Callable[[], Any]  # runs to the end
    arrays: Callable[[Any], list[np.ndarray]]  # the results of a call, as `Task.folded_results`
    compilation: dict[str, Any] = dataclasses.field(default_factory=dict)  # for --json


def function(task: Task, implementation: str) -> Callable[..., list[jax.Array]]:
    """The op of `task` by this package, of x, f and dy."""
    layer = task.layer
    options: Any = {
        "strides": (layer.stride, layer.stride),
        "padding": layer.padding,
        "data_format": layer.data_format,
        "precision": "highest",
        "implementation": None if implementation == "default" else implementation,
    }
    forward = functools.partial(jax_dwbp.depthwise_conv2d_native, **options)

    def step(x, f, dy):
        y, pullback = jax.vjp(forward, x, f)
        return [y, *pullback(dy)]

    backprop_input = jax_dwbp.depthwise_conv2d_native_backprop_input
    backprop_filter = jax_dwbp.depthwise_conv2d_native_backprop_filter
    op = {
        "forward": lambda x, f, dy: [forward(x, f)],
        "input_grad": lambda x, f, dy: [backprop_input(x.shape, f, dy, **options)],
        "filter_grad": lambda x, f, dy: [backprop_filter(x, f.shape, dy, **options)],
        "step": step,
    }[task.op]
    return jax.vmap(op) if layer.problems > 1 else op


def selections(task: Task) -> list[jax_dwbp.Selection]:
    shapes = [jax.ShapeDtypeStruct(shape, task.dtype) for shape in task.shapes]
    return jax_dwbp.implementations(function(task, "default"), *shapes)


def compiled(
    name: str, arrays: Callable, function: Callable, *args: jax.Array, **notes: Any
) -> Contestant:
    jax.clear_caches()  # else one implementation finds what another one traced
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    notes["compile_seconds"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    notes["temp_bytes"] = memory and memory.temp_size_in_bytes
    return Contestant(name, lambda: jax.block_until_ready(compiled(*args)), arrays, notes)
