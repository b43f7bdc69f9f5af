"""A C++ kernel, called through `jax.ffi`; native/native_cpu.cc says how it works.

It is compiled when the package is installed, for all instruction sets that it has code for, and
takes the best one that the CPU has. Operands have either layout, and an axis of problems or not.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import re
from pathlib import Path

import jax
import numpy as np

from jax_dwbp import _impl
from jax_dwbp._spec import ConvSpec, Op

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
            f"the rows that a dilated filter meets may take at most {_MAX_SCRATCH} bytes for each "
            f"16 channels, got a filter of {spec.kernel_spatial} with dilations {spec.rhs_dilation}"
            f" and a depth multiplier of {spec.multiplier}"
        )
    return None


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    return _call("forward", spec, x, f)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    return _call("input_grad", spec, f, dy)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    return _call("filter_grad", spec, x, dy)


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
    for size, kernel, out, stride, _, dilation in spec.axes():
        phases = 1 if op == "input_grad" else min(stride, kernel)
        positions = out if op == "input_grad" else -(-size // stride)
        written = -(-size // stride) if op == "input_grad" else out
        written_phases += min(stride, size) if op == "input_grad" else 1
        reach = (kernel - 1) * dilation // stride + 2
        spans.append((phases * min(reach, positions), phases * (min(written, _TILE) + reach)))
    (rows, _), (_, columns) = spans
    r, s = spec.kernel_spatial
    packed = spec.multiplier if op == "input_grad" else 1
    lines = packed * rows * columns + spec.multiplier * (r * s + _TILE)
    return _LINE * lines + _TAP * (packed * r + s) + _PHASE * written_phases


def _call(op: Op, spec: ConvSpec, a: jax.Array, b: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct(spec.result_shape(op, a.shape, b.shape), a.dtype)
    return jax.ffi.ffi_call(_TARGET, result)(
        a,
        b,
        op=op,
        window_strides=np.array(spec.window_strides, np.int64),
        low=np.array([low for low, _ in spec.padding], np.int64),
        rhs_dilation=np.array(spec.rhs_dilation, np.int64),
        channels_first=spec.data_format == "NCHW",
    )


# Programs that another process compiled or exported call the library without asking for it.
_load()
