"""A C++ kernel, called through `jax.ffi`; native/native_cpu.cc is where it starts.

It is compiled when the package is installed, for all instruction sets that it has code for, and
takes the best one that the CPU has. Operands have either layout, and an axis of problems or not.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import math
import re
from pathlib import Path

import jax
import numpy as np

from jax_dwbp import _impl
from jax_dwbp._impl import Implementation
from jax_dwbp._spec import FILTER_GRAD, FORWARD, INPUT_GRAD, ConvSpec, Op

_TARGET = "jax_dwbp_depthwise_conv2d"
_LIBRARY = "_native_cpu.so"
# What a thread may pack at a time; layers of networks need less than 2**20.
_MAX_SCRATCH = 2**23
_LINE = 64
_TILE = 128  # columns, at most, if more don't fit
# Bytes of what is known of a tap of a row or a column, and of a phase that is written.
_TAP = 96
_PHASE = 16


def unsupported(
    op: Op, spec: ConvSpec, platform: str | None, *operands: jax.ShapeDtypeStruct
) -> str | None:
    if reason := _load():
        return reason
    if _scratch(op, spec) > _MAX_SCRATCH:
        return (
            f"the rows that a filter meets may take at most {_MAX_SCRATCH} bytes for each "
            f"16 channels, got a filter of {spec.kernel_spatial} with dilations {spec.rhs_dilation}"
            f" and a depth multiplier of {spec.multiplier}"
        )
    return None


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    return _call(FORWARD, spec, x, f)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    return _call(INPUT_GRAD, spec, f, dy)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    return _call(FILTER_GRAD, spec, x, dy)


@functools.cache
def _load() -> str | None:
    """Loads and registers the library, or says why not."""
    places = _places()
    path = next((place for place in places if place.exists()), None)
    if path is None:
        found = ", ".join(map(str, places))
        return f"its library was not compiled when the package was installed: there is no {found}"
    try:
        library = ctypes.CDLL(str(path))
        handler = jax.ffi.pycapsule(getattr(library, _TARGET))
        # JAX looks at it when its CPU backend starts, and if that refuses it, has none.
        compiled_for = tuple((ctypes.c_int * 2).in_dll(library, "jax_dwbp_ffi_version"))
        if compiled_for > (here := _ffi_version()):
            compiled_for, here = (".".join(map(str, version)) for version in (compiled_for, here))
            return (
                f"its library was compiled for an FFI of version {compiled_for}, jaxlib has {here}"
            )
        jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")
    except Exception as error:  # of the loader, of ctypes, or whatever jaxlib refuses it with
        return f"its library can't be loaded: {error}"
    return None


def _ffi_version() -> tuple[int, ...]:
    """That of jaxlib's FFI, (major, minor), which only its headers tell."""
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    found = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header.read_text())
    return tuple(map(int, found))


def _places() -> list[Path]:
    """Where the library may be: beside the package or, of an editable one, what is installed."""
    places = [Path(folder) / _LIBRARY for folder in _impl.__path__]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution("jax_dwbp")
        places.append(Path(str(installed.locate_file(f"jax_dwbp/_impl/{_LIBRARY}"))))
    return list(dict.fromkeys(places))


def _scratch(op: Op, spec: ConvSpec) -> int:
    """A bound of the bytes that a thread packs for one line of channels, and of its lists."""
    spans = []
    written_phases = 0
    for axis in spec.axes:
        size, out, stride = axis.size, axis.out, axis.stride
        phases = 1 if op == INPUT_GRAD else min(stride, axis.kernel)
        positions = out if op == INPUT_GRAD else -(-size // stride)
        written = -(-size // stride) if op == INPUT_GRAD else out
        written_phases += min(stride, size) if op == INPUT_GRAD else 1
        reach = axis.reach // stride + 2
        spans.append((phases * min(reach, positions), phases * (min(written, _TILE) + reach)))
    *_, (rows, _), (_, columns) = spans
    # Of the depth only what its taps meet.
    for axis in spec.axes[:-2]:
        rows *= min(axis.kernel, axis.out if op == INPUT_GRAD else axis.size)
    *outer, s = spec.kernel_spatial
    r = math.prod(outer)
    packed = spec.multiplier if op == INPUT_GRAD else 1
    lines = packed * rows * columns + spec.multiplier * (r * s + _TILE)
    return _LINE * lines + _TAP * (packed * r + s) + _PHASE * written_phases


def _call(op: Op, spec: ConvSpec, a: jax.Array, b: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct(spec.result_shape(op, a.shape, b.shape), a.dtype)
    return jax.ffi.ffi_call(_TARGET, result)(
        a,
        b,
        op=op.name,
        window_strides=np.array(spec.window_strides, np.int64),
        low=np.array([low for low, _ in spec.padding], np.int64),
        rhs_dilation=np.array(spec.rhs_dilation, np.int64),
        channels_first=spec.channels_first,
    )


def _rank(spec: ConvSpec, platform: str | None) -> int:
    # On a CPU (2 cores, AVX-512, float32, layers of networks at batch 8) it takes a half to a 50th
    # of the time of xla_taps, but for one result of 38 MB, where the memory is what takes the time.
    return 0 if platform == "cpu" else 4


IMPLEMENTATION = Implementation(
    name="native_cpu",
    unsupported=unsupported,
    rank=_rank,
    forward=forward,
    input_grad=input_grad,
    filter_grad=filter_grad,
    platform="cpu",
    device="a CPU",
    is_opaque=True,
    is_stable=False,
    takes_any_layout=True,
)
# Programs that another process compiled or exported call the library without asking for it.
_load()
