"""That NumPy runs Pallas kernels as they are meant, and lets nothing pass that is undefined."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as triton
import jax.numpy as jnp
import numpy as np
import pallas_numpy
import pytest

X = np.arange(15, dtype=np.float32).reshape(5, 3)


def run(kernel, *operands, block=(2, 3), grid=(3,), shape=(5, 3)):
    spec = pl.BlockSpec(block, lambda i: (i, 0)[: len(block)])
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, np.float32),
        grid=grid,
        in_specs=[spec] * len(operands),
        out_specs=spec,
    )
    return pallas_numpy.run(lambda *arrays: call(*arrays) + 1, *operands)


def test_blocks():
    """The last of them is not a whole one. NumPy has no tanh here, so JAX computes it."""

    def kernel(x_ref, y_ref):
        def add(j, total):
            return total + x_ref[:, pl.ds(j, 1)]

        total = jax.lax.fori_loop(0, 3, add, jnp.zeros((2, 1), jnp.float32))
        y_ref[...] = jnp.tanh(total) * x_ref[...]

        @pl.when(pl.program_id(0) == 1)
        def _():
            y_ref[1, pl.ds(0, 2, stride=2)] = x_ref[0, 1:]

    expected = np.tanh(X.sum(1, keepdims=True)) * X + 1
    expected[3, ::2] = X[2, 1:] + 1
    np.testing.assert_allclose(run(kernel, X), expected, rtol=1e-6)


def test_what_is_not_written_is_nan():
    def kernel(y_ref):
        y_ref[0] = jnp.zeros(3, jnp.float32)

    np.testing.assert_array_equal(np.isnan(run(kernel))[:, 0], [False, True] * 2 + [False])


@pytest.mark.parametrize("first", (-1, 1))
@pytest.mark.parametrize("stores", (False, True))
def test_slices_out_of_bounds(first, stores):
    def kernel(x_ref, y_ref):
        start = pl.program_id(0) * 0 + first
        from_, to = (0, start) if stores else (start, 0)
        y_ref[pl.ds(to, 2)] = x_ref[pl.ds(from_, 2)]

    with pytest.raises(pallas_numpy.OutOfBounds, match=f"from {first} to {first + 1} of 2"):
        run(kernel, X)


@pytest.mark.parametrize("stores", (False, True))
def test_masked_elements_may_be_out_of_bounds(stores):
    def masked(bound):
        def kernel(x_ref, y_ref):
            index = jnp.arange(8, dtype=jnp.int32)
            mask = index < bound
            y_ref[...] = jnp.zeros(6, jnp.float32)
            if stores:
                triton.store(y_ref.at[index], jnp.ones(8, jnp.float32), mask=mask)
            else:
                other = jnp.zeros((), jnp.float32)
                value = triton.load(x_ref.at[index], mask=mask, other=other)
                y_ref[...] = value[:6]

        return run(kernel, np.ones(6, np.float32), block=(6,), grid=(1,), shape=(6,))

    np.testing.assert_array_equal(masked(4), [2, 2, 2, 2, 1, 1])
    with pytest.raises(pallas_numpy.OutOfBounds, match="from 0 to 6 of 6"):
        masked(7)
