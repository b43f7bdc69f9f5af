"""Who else is timed: libraries that compute the same, where they are installed.

Each gets the operands of a task folded, as `Task.folded_operands` does, and lays them out as it
likes before it is timed.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_dwbp._spec import DTYPES
from jax_dwbp.bench.contestants import Contestant
from jax_dwbp.bench.layers import OPS, Task


@dataclasses.dataclass(frozen=True)
class Peer:
    packages: tuple[str, ...]
    contestant: Callable[..., Contestant]  # of a task and its operands
    ops: tuple[str, ...] = OPS
    dtypes: tuple[str, ...] = DTYPES
    data_formats: tuple[str, ...] = ("NHWC", "NCHW")
    planes: bool = False  # filters one channel to a result of the same size, and nothing else
    volumes: bool = False  # has three spatial axes too

    @property
    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def lacks(self, task: Task) -> str | None:
        """Why it does not compute `task`, if so."""
        layer = task.layer
        for value, known in (
            (task.op, self.ops),
            (task.dtype, self.dtypes),
            (layer.data_format, self.data_formats),
        ):
            if value not in known:
                return f"it computes {', '.join(known)}, not {value}"
        if len(layer.sizes) > 2 and not self.volumes:
            return "it has two spatial axes"
        plane = (1, 1, *layer.sizes)
        if self.planes and (layer.channels, layer.multiplier, *task.output) != plane:
            return "it filters one channel to a result of the same size"
        return None


def _tensorflow(task: Task, *operands: jax.Array) -> Contestant:
    tf, layer = _import_tensorflow(), task.layer
    x, f, dy = (tf.constant(np.asarray(operand)) for operand in operands)
    attributes = {
        "strides": [1, *layer.strides, 1],
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


def _import_tensorflow() -> Any:
    tf = importlib.import_module("tensorflow")
    tf.config.set_visible_devices([], "GPU")  # where it would run if it found one
    return tf


def _torch(
    name: str, layout: str, task: Task, *operands: jax.Array, packed: bool = False
) -> Contestant:
    torch = importlib.import_module("torch")
    layer, rank = task.layer, len(task.layer.sizes)
    strides, pads, dilations = list(layer.strides), [low for low, _ in layer.padding], [1] * rank
    x, f, dy = map(torch.from_dlpack, operands)
    c, m = f.shape[rank:]
    f = f.permute(rank, rank + 1, *range(rank)).reshape(c * m, 1, *layer.kernel)
    x, dy = (tensor.movedim(-1, 1) for tensor in (x, dy))
    if rank == 3 and layout == "channels_last":
        layout = "channels_last_3d"
    x, f, dy = (t.contiguous(memory_format=getattr(torch, layout)) for t in (x, f, dy))
    # It pads both ends alike. What this makes too much of a causal convolution is cut off, as in
    # Mamba, and there the gradient is zero.
    surplus = [
        (size + 2 * pad - kernel) // step + 1 - out
        for size, pad, kernel, step, out in zip(
            x.shape[2:], pads, layer.kernel, strides, task.output, strict=True
        )
    ]
    convolve = functools.partial(
        getattr(torch.nn.functional, f"conv{rank}d"), x, f, None, strides, pads, dilations, c
    )
    if packed:
        pack, convolution = (
            getattr(torch.ops.mkldnn, op)
            for op in ("_reorder_convolution_weight", "_convolution_pointwise")
        )
        packed_f = pack(f, pads, strides, dilations, c, x.shape)
        convolve = functools.partial(
            convolution, x, packed_f, None, pads, strides, dilations, c, "none", [], ""
        )

    def forward():
        y = convolve()
        return y[:, :, *(slice(out) for out in task.output)] if any(surplus) else y

    def backward(*wanted: bool):
        after = [pad for rows in reversed(surplus) for pad in (0, rows)]
        full = torch.nn.functional.pad(dy, after) if any(surplus) else dy
        return torch.ops.aten.convolution_backward(
            full, x, f, None, strides, pads, dilations, False, [0] * rank, c, [*wanted, False]
        )

    def arrays(results):
        """`results` in the order y, dx, df, None where it was not wanted."""
        channels_last = [t.movedim(1, -1) for t in results[:2] if t is not None]
        shape, last = (c, m, *layer.kernel), (*range(2, rank + 2), 0, 1)
        filters = [t.reshape(shape).permute(last) for t in results[2:3] if t is not None]
        return [t.double().numpy() for t in channels_last + filters]

    call = {
        "forward": lambda: [forward()],
        "input_grad": lambda: [None, *backward(True, False)],
        "filter_grad": lambda: [None, *backward(False, True)],
        "step": lambda: [forward(), *backward(True, True)],
    }[task.op]
    return Contestant(name, call, arrays)


def _opencv(task: Task, *operands: jax.Array) -> Contestant:
    """`filter2D` on one plane after the other; the input gradient is that by the turned filter."""
    cv2 = importlib.import_module("cv2")
    x, f, dy = map(np.asarray, operands)
    filters = np.moveaxis(f[..., 0], -1, 0)
    anchor = [low for low, _ in task.layer.padding]
    if task.op == "input_grad":
        x, filters = dy, filters[:, ::-1, ::-1]
        anchor = [size - 1 - low for size, low in zip(task.layer.kernel, anchor, strict=True)]
    planes = np.ascontiguousarray(np.moveaxis(x, -1, 0))  # by problem and image
    convolve = functools.partial(
        cv2.filter2D, ddepth=-1, anchor=anchor[::-1], borderType=cv2.BORDER_CONSTANT
    )
    pairs = list(zip(planes, np.ascontiguousarray(filters), strict=True))
    return Contestant(
        "opencv",
        lambda: [[convolve(plane, kernel=f) for plane in images] for images, f in pairs],
        lambda results: [np.moveaxis(np.asarray(results), 0, -1)],
    )


def _xnnpack(task: Task, *operands: jax.Array) -> Contestant:
    """By LiteRT's interpreter, which runs on one thread unless it is told of others."""
    tf, layer = _import_tensorflow(), task.layer
    interpreters = importlib.import_module("ai_edge_litert.interpreter")
    x, f, _ = map(np.asarray, operands)

    @tf.function(input_signature=[tf.TensorSpec(x.shape)])
    def forward(x):
        padded = tf.pad(x, [(0, 0), *layer.padding, (0, 0)])
        strides = [1, *layer.strides, 1]
        return tf.nn.depthwise_conv2d(padded, tf.constant(f), strides, "VALID")

    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [forward.get_concrete_function()], tf.Module()
    )
    interpreter = interpreters.Interpreter(
        model_content=converter.convert(), num_threads=os.cpu_count()
    )
    interpreter.allocate_tensors()
    [source], [result] = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(source["index"], x)
    return Contestant(
        "xnnpack", interpreter.invoke, lambda _: [interpreter.get_tensor(result["index"])]
    )


def _openvino(task: Task, *operands: jax.Array) -> Contestant:
    """In NHWC its model has transpositions, which it merges with its own choice of a layout."""
    openvino, opset = map(importlib.import_module, ("openvino", "openvino.opset13"))
    layer, nchw = task.layer, task.layer.data_format == "NCHW"
    x, f, dy = map(np.asarray, operands)
    x = x if task.op == "forward" else dy
    x = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if nchw else x
    source = node = opset.parameter(x.shape, openvino.Type.f32)
    node = node if nchw else opset.transpose(node, [0, 3, 1, 2])
    weights = np.transpose(f, (2, 3, 0, 1))[:, :, None]  # a group for each of C, of M to one
    low, high = zip(*layer.padding, strict=True)
    strides = list(layer.strides)
    if task.op == "forward":
        node = opset.group_convolution(node, weights, strides, low, high, [1, 1])
    else:
        rest = [
            (size + sum(pads) - kernel) % step  # which no window reaches
            for size, pads, kernel, step in zip(
                layer.sizes, layer.padding, layer.kernel, strides, strict=True
            )
        ]
        node = opset.group_convolution_backprop_data(
            node, weights, strides, None, low, high, [1, 1], output_padding=rest
        )
    node = node if nchw else opset.transpose(node, [0, 2, 3, 1])
    model = openvino.Core().compile_model(
        openvino.Model([node], [source]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    request = model.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x))

    def arrays(_):
        y = request.get_output_tensor().data.copy()
        return [np.moveaxis(y, 1, -1) if nchw else y]

    return Contestant("openvino", lambda: request.infer(share_outputs=True), arrays)


_TORCH = ("torch",)
PEERS = {
    "tensorflow": Peer(("tensorflow",), _tensorflow, data_formats=("NHWC",)),
    "torch": Peer(_TORCH, functools.partial(_torch, "torch", "channels_last"), volumes=True),
    "torch_nchw": Peer(
        _TORCH, functools.partial(_torch, "torch_nchw", "contiguous_format"), volumes=True
    ),
    "torch_packed": Peer(
        _TORCH,
        functools.partial(_torch, "torch_packed", "channels_last", packed=True),
        ops=("forward",),
        dtypes=("bfloat16", "float32"),
    ),
    "opencv": Peer(
        ("cv2",), _opencv, ("forward", "input_grad"), ("float32", "float64"), planes=True
    ),
    "xnnpack": Peer(
        ("ai_edge_litert", "tensorflow"), _xnnpack, ("forward",), ("float32",), ("NHWC",)
    ),
    "openvino": Peer(("openvino",), _openvino, ("forward", "input_grad"), ("float32",)),
}
