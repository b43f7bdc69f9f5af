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
    if len(layer.sizes) > 2:
        return _of_volumes(task, implementation)
    options: Any = {
        "strides": layer.strides,
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


def _of_volumes(task: Task, implementation: str) -> Callable[..., list[jax.Array]]:
    """That by lax's convolution or the stand-in for it, which choose by themselves."""
    convolutions = {"default": jax_dwbp.conv_general_dilated, "lax": jax.lax.conv_general_dilated}
    if implementation not in convolutions:
        raise NotImplementedError("volumes are timed by default and by lax")
    layer, rank = task.layer, len(task.layer.sizes)
    spatial = "DHW"[-rank:]
    images = f"N{spatial}C" if layer.data_format == "NHWC" else f"NC{spatial}"

    def forward(x: jax.Array, f: jax.Array) -> jax.Array:
        return convolutions[implementation](
            x,
            f.reshape(*layer.kernel, 1, -1),
            layer.strides,
            layer.padding,
            dimension_numbers=(images, f"{spatial}IO", images),
            feature_group_count=layer.channels,
            precision="highest",
        )

    def pullback(x, f, dy):
        y, transposed = jax.vjp(forward, x, f)
        return y, *transposed(dy)

    wanted = {"forward": [0], "input_grad": [1], "filter_grad": [2], "step": [0, 1, 2]}[task.op]
    return lambda x, f, dy: [pullback(x, f, dy)[i] for i in wanted]


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
