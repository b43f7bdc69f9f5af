"""A Pallas kernel for TPUs: sums over taps on the vector unit, which no matrix unit can speed up.

A TPU tiles the two minor axes of an array, (8, 128) elements a register. XLA keeps the activations
of a convolution with N and C there, so that H and W are merely indices: taps, strides and dilation
cost nothing, and a transposition to the same axes around the kernel is a change of names, not a
copy. For small batches W and C are the tiled ones (`_views`).

Forward and input_grad sum the taps of each phase of `taps.axes`, and filter_grad sums products with
dy for each tap. The source is read in place, each row and column once for all results of a piece
(`_reader`), and no padded array is made: what meets a border is computed outside of the loops,
where the taps that meet nothing are left out. Where W is tiled, for a multiplier and for many taps,
a step of the grid copies its rows of the source to a float32 scratch with zeros around (`_fill`).

A multiplier makes lanes: x is repeated M times as it is copied, or the M lanes of each channel
are summed before they are stored, both by gathers along lanes.
"""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_dwbp._impl import Implementation
from jax_dwbp._spec import INPUT_GRAD, ConvSpec, Op

_MAX_COLUMNS = 128
# A stride of 16 x 16 has 256 phases, whose results a body computes one after the other.
_MAX_PHASES = 256
_MAX_CHUNKS = 32


def unsupported(
    op: Op,
    spec: ConvSpec,
    platform: str | None,
    a: jax.ShapeDtypeStruct,
    b: jax.ShapeDtypeStruct,
) -> str | None:
    if len(spec.axes) > 2:
        return f"it has kernels for one and two spatial axes, got {len(spec.axes)}"
    plan = _part("plan")
    if a.dtype not in (jnp.float32, jnp.bfloat16):
        return f"a TPU computes in float32 and bfloat16, got {a.dtype}"
    if spec.kernel_spatial[1] > _MAX_COLUMNS:
        return f"filters may have at most {_MAX_COLUMNS} columns, got {spec.kernel_spatial[1]}"
    if op == INPUT_GRAD and math.prod(spec.window_strides) > _MAX_PHASES:
        return f"strides may have a product of at most {_MAX_PHASES}, got {spec.window_strides}"
    lanes, most = min(spec.channels, plan.LANES) * spec.multiplier, _MAX_CHUNKS * plan.LANES
    if lanes > most:
        return (
            f"{plan.LANES} channels, or all, may have at most {most} outputs, got {lanes} by a "
            f"depth multiplier of {spec.multiplier}"
        )
    batch = (b if op == INPUT_GRAD else a).shape[1]
    if plan.best_plan(op, spec, batch, a.dtype) is None:
        return f"what a row of the result takes must fit {plan.VMEM[-1]} bytes of VMEM"
    return None


def forward(spec: ConvSpec, x: jax.Array, f: jax.Array) -> jax.Array:
    return _part("kernels").forward(spec, x, f)


def input_grad(spec: ConvSpec, f: jax.Array, dy: jax.Array) -> jax.Array:
    return _part("kernels").input_grad(spec, f, dy)


def filter_grad(spec: ConvSpec, x: jax.Array, dy: jax.Array) -> jax.Array:
    return _part("kernels").filter_grad(spec, x, dy)


def _part(name: str) -> Any:
    """Both import Pallas, which takes longer than all of this package."""
    return importlib.import_module(f"{__name__}.{name}")


def _rank(spec: ConvSpec, platform: str | None) -> int:
    # For a multiplier XLA computes a dense convolution there: 60 times the issue cycles in the
    # gradient by the input, and minutes to compile the other two. For the rest lax is first until a
    # device has timed both.
    return -1 if platform == "tpu" and spec.multiplier > 1 else 3


IMPLEMENTATION = Implementation(
    name="pallas_tpu",
    unsupported=unsupported,
    rank=_rank,
    forward=forward,
    input_grad=input_grad,
    filter_grad=filter_grad,
    platform="tpu",
    device="a TPU",
    is_pallas=True,
    is_opaque=True,
)
