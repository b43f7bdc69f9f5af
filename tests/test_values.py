"""Each implementation, dtype and layout against float64 loops."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, EMPTY, FRAMEWORKS, IMPLEMENTATIONS, LAYERS, OPS, SMALL, TENSORFLOW, XLA

by_name = pytest.mark.parametrize("case", SMALL, ids=str)


@by_name
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_small(case, op, dtype, implementation):
    a, b = case.operands(op, dtype)
    got = case.run(op, a, b, implementation=implementation)
    case.check(op, got, case.expected(op, a, b), dtype)
