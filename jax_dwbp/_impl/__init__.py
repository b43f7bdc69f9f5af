"""One file, or folder, for each implementation, with an `Implementation` at its foot that says what
it can. `taps` is what those that sum taps share.

An implementation has one function for each op, on canonical data: C-order NHWC with a leading axis
of G independent problems, no empty operand, any dtype out of `_spec.DTYPES`. There are two spatial
axes or three, of which the first is the depth.

    forward(spec, x[G,N,H,W,C], f[G,R,S,C,M])            -> [G,N,P,Q,C*M]
    input_grad(spec, f[G,R,S,C,M], dy[G,N,P,Q,C*M])      -> [G,N,H,W,C]
    filter_grad(spec, x[G,N,H,W,C], dy[G,N,P,Q,C*M])     -> [G,R,S,C,M]

None of them needs to be differentiable or to know a transformation: the rules stand above.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from jax_dwbp._spec import ConvSpec, Op

# Whether Pallas kernels are interpreted, on any platform: slowly, to test or to debug them. The
# environment is looked at here and not later, and the caches of `jit` look at this.
interpret = jax.make_user_context(os.environ.get("JAX_DWBP_INTERPRET") == "1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """What the choice knows of an implementation. Of operands it sees the shape and the dtype."""

    name: str  # of its file, without the suffix, or of its folder
    # Why it can't run an op on a platform, or None. A platform of None stands for any.
    unsupported: Callable[[Op, ConvSpec, str | None, Any, Any], str | None]
    rank: Callable[[ConvSpec, str | None], int]  # of those that can, the least runs by default
    forward: Callable[[ConvSpec, jax.Array, jax.Array], jax.Array]
    input_grad: Callable[[ConvSpec, jax.Array, jax.Array], jax.Array]
    filter_grad: Callable[[ConvSpec, jax.Array, jax.Array], jax.Array]
    platform: str | None = None  # the only one that it runs on
    device: str = ""  # that in words
    is_pallas: bool = False  # JAX compiles it, for one batch size, or interprets it anywhere
    is_opaque: bool = False  # XLA can't look into it, so it can't divide it among devices
    is_stable: bool = True  # JAX promises that what is exported runs later and without this package
    # That of `spec`, with one to three spatial axes, with an axis of problems or without.
    takes_any_layout: bool = False
