"""One module per implementation; its stem is its name. `taps` is what those that sum taps share.

Each has `unsupported(op, spec, platform, a, b)`, the reason why it can't run or None, of which the
Pallas kernels have one for some dtypes and sizes of the operands too, and one function per op on
canonical data: C-order NHWC with a leading axis of G independent problems, no empty operand, any
dtype out of `_spec.DTYPES`.

    forward(spec, x[G,N,H,W,C], f[G,R,S,C,M])            -> [G,N,P,Q,C*M]
    input_grad(spec, f[G,R,S,C,M], dy[G,N,P,Q,C*M])      -> [G,N,H,W,C]
    filter_grad(spec, x[G,N,H,W,C], dy[G,N,P,Q,C*M])     -> [G,R,S,C,M]

native_cpu takes operands in the layout of `spec`, with a G or without.

None of them needs to be differentiable or to know a transformation: the rules stand above.
"""

import os


def interpreted() -> bool:
    """Whether Pallas kernels are interpreted, on any platform: slowly, to test or to debug them.

    What was compiled before the environment changed stays as it is.
    """
    return os.environ.get("JAX_DWBP_INTERPRET") == "1"
