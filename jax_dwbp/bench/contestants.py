"""Who is timed: the implementations of this package, and its peers."""

import dataclasses
import functools
import importlib
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
    arrays: Callable[[Any], list[np.ndarray]]  # the results of a call in NHWC and [R, S, C, M]
    compilation: dict[str, Any] = dataclasses.field(default_factory=dict)  # for --json


def function(task: Task, implementation: str) -> Callable[..., list[jax.Array]]:
    """The op of `task` by this package, of x, f and dy."""
    layer = task.layer
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
    }[task.op]


def selections(task: Task) -> list[jax_dwbp.Selection]:
    shapes = [jax.ShapeDtypeStruct(shape, task.dtype) for shape in task.shapes]
    return jax_dwbp.implementations(function(task, "default"), *shapes)


def compiled(name: str, function: Callable, *args: jax.Array, **notes: Any) -> Contestant:
    jax.clear_caches()  # else one implementation finds what another one traced
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    notes["compile_seconds"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    notes["temp_bytes"] = memory and memory.temp_size_in_bytes
    return Contestant(
        name,
        lambda: jax.block_until_ready(compiled(*args)),
        lambda results: list(map(np.asarray, results)),
        notes,
    )


def tensorflow(task: Task, *operands: jax.Array) -> Contestant:
    tf = importlib.import_module("tensorflow")
    tf.config.set_visible_devices([], "GPU")  # where it would run if it found one
    (x, f, dy), layer = (tf.constant(np.asarray(operand)) for operand in operands), task.layer
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
    run = list(ops.values()) if task.op == "step" else [ops[task.op]]
    return Contestant(
        "tensorflow", lambda: [op() for op in run], lambda results: [y.numpy() for y in results]
    )


def _torch(name: str, layout: str, task: Task, *operands: jax.Array) -> Contestant:
    torch = importlib.import_module("torch")
    layer, (p, q) = task.layer, task.output
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
    }[task.op]
    return Contestant(name, call, arrays)


PEERS: dict[str, tuple[str, Callable[..., Contestant]]] = {
    "tensorflow": ("tensorflow", tensorflow),
    "torch": ("torch", functools.partial(_torch, "torch", "channels_last")),
    "torch_nchw": ("torch", functools.partial(_torch, "torch_nchw", "contiguous_format")),
}
