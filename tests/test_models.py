"""Networks of Flax, Equinox, Haiku and Keras with the ops of this package: what lax gives.

Small ones in the styles of MobileNetV2 and ConvNeXt, trained on scikit-learn's handwritten digits.
"""

import functools
from pathlib import Path

import fresh_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_dwbp

equinox = pytest.importorskip("equinox")
haiku = pytest.importorskip("haiku")
optax = pytest.importorskip("optax")
sklearn_datasets = pytest.importorskip("sklearn.datasets")
nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

STEPS = 8
CONVOLUTIONS = {"here": jax_dwbp.conv_general_dilated, "lax": jax.lax.conv_general_dilated}


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        with jax.numpy_rank_promotion("allow"):
            yield


@functools.cache
def digits():
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)[:64]
    return np.repeat(np.repeat(images, 2, 1), 2, 2), labels[:64].astype(np.int32)


def train(apply, parameters, *, dtype=jnp.float32):
    """The losses of some steps of Adam, and the function that makes one."""
    optimizer = optax.adam(3e-3)
    images, labels = digits()

    @jax.jit
    def step(parameters, state):
        def loss(parameters):
            low = jax.tree.map(lambda a: a.astype(dtype), parameters)
            logits = apply(low, images.astype(dtype)).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, value

    state, losses = optimizer.init(parameters), []
    for _ in range(STEPS):
        parameters, state, value = step(parameters, state)
        losses.append(float(value))
    return losses, parameters


def check(ours, lax, rtol=2e-4):
    np.testing.assert_allclose(ours, lax, rtol=rtol)
    assert lax[-1] < lax[0] - 5e-3  # it learns


class InvertedResidual(nn.Module):
    features: int
    stride: int
    convolution: str

    @nn.compact
    def __call__(self, x):
        wide = 4 * x.shape[-1]
        y = nn.relu6(nn.GroupNorm(4)(nn.Conv(wide, (1, 1), use_bias=False)(x)))
        y = nn.Conv(
            wide,
            (3, 3),
            self.stride,
            feature_group_count=wide,
            conv_general_dilated=CONVOLUTIONS[self.convolution],
        )(y)
        y = nn.Conv(self.features, (1, 1))(nn.relu6(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    convolution: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), dtype=x.dtype)(x)
        for features, stride in ((8, 1), (16, 2), (16, 1)):
            block = nn.checkpoint(InvertedResidual)
            x = block(features, stride, self.convolution)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    convolution: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (2, 2), (2, 2))(x)
        for _ in range(2):
            y = nn.Conv(
                *(16, (7, 7)),
                feature_group_count=16,
                conv_general_dilated=CONVOLUTIONS[self.convolution],
            )(x)
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(y))))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.mark.parametrize(("network", "dtype"), [(MobileNet, "bfloat16"), (ConvNeXt, "float32")])
def test_flax_linen(network, dtype):
    """Training steps with optax and `jax.checkpoint`, in mixed precision too."""
    parameters = network("lax").init(jax.random.key(0), digits()[0])
    losses, trained = {}, {}
    for name in CONVOLUTIONS:
        losses[name], trained[name] = train(network(name).apply, parameters, dtype=jnp.dtype(dtype))
    check(losses["here"], losses["lax"], 2e-4 if dtype == "float32" else 2e-2)
    # The parameters are those of lax's network, whose checkpoints fit.
    assert jax.tree.map(jnp.shape, trained["here"]) == jax.tree.map(jnp.shape, trained["lax"])
    ops = jax_dwbp.implementations(
        jax.grad(lambda p: network("here").apply(p, digits()[0]).sum()), parameters
    )
    assert {op.op for op in ops} >= {"forward", "input_grad", "filter_grad"}


def test_parameters_survive_a_round_trip():
    from flax import serialization

    parameters = ConvNeXt("here").init(jax.random.key(0), digits()[0])
    restored = serialization.from_bytes(parameters, serialization.to_bytes(parameters))
    np.testing.assert_array_equal(
        ConvNeXt("here").apply(restored, digits()[0]),
        ConvNeXt("here").apply(parameters, digits()[0]),
    )


def test_flax_nnx():
    class Network(nnx.Module):
        def __init__(self, convolution):
            rngs = nnx.Rngs(0)
            self.stem = nnx.Conv(1, 16, (2, 2), (2, 2), rngs=rngs)
            self.depthwise = nnx.Conv(
                *(16, 32, (5, 5)),
                feature_group_count=16,
                conv_general_dilated=CONVOLUTIONS[convolution],
                rngs=rngs,
            )
            self.head = nnx.Linear(32, 10, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.gelu(self.depthwise(self.stem(x))).mean((1, 2)))

    images, labels = digits()
    losses = {}
    for name in CONVOLUTIONS:
        network = Network(name)
        optimizer = nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(network, optimizer):
            def loss(network):
                logits = network(images)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            value, gradient = nnx.value_and_grad(loss)(network)
            optimizer.update(network, gradient)
            return value

        losses[name] = [float(step(network, optimizer)) for _ in range(STEPS)]
    check(losses["here"], losses["lax"])


def counted(function, *args):
    ops = (op.op for op in jax_dwbp.implementations(function, *args))
    return sorted(op for op in ops if op != "conv_general_dilated")  # lax's own


def test_equinox():
    """Which has no argument for it: `in_place_of_lax` around the calls."""
    keys = jax.random.split(jax.random.key(0), 3)
    network = equinox.nn.Sequential(
        [
            equinox.nn.Conv2d(1, 8, 1, key=keys[0]),
            equinox.nn.Conv2d(8, 16, 3, 2, 1, groups=8, key=keys[1]),
            equinox.nn.Lambda(lambda x: jax.nn.relu(x).mean((1, 2))),
            equinox.nn.Linear(16, 10, key=keys[2]),
        ]
    )
    parameters, static = equinox.partition(network, equinox.is_array)

    def apply(parameters, images):
        model = equinox.combine(parameters, static)
        return jax.vmap(model)(images.transpose(0, 3, 1, 2))

    def here(parameters, images):
        with jax_dwbp.in_place_of_lax():
            return apply(parameters, images)

    gradient = jax.grad(lambda p, x: here(p, x).sum())
    assert counted(gradient, parameters, digits()[0]) == ["filter_grad", "forward", "input_grad"]
    check(train(here, parameters)[0], train(apply, parameters)[0])
    assert counted(apply, parameters, digits()[0]) == []  # lax is back


def test_haiku():
    def model(x):
        x = haiku.Conv2D(8, 1)(x)
        x = haiku.DepthwiseConv2D(2, 3, 2)(x)
        x = haiku.SeparableDepthwiseConv2D(1, 3)(jax.nn.relu(x))
        return haiku.Linear(10)(x.mean((1, 2)))

    network = haiku.without_apply_rng(haiku.transform(model))
    parameters = network.init(jax.random.key(0), digits()[0])

    def here(parameters, images):
        with jax_dwbp.in_place_of_lax():
            return network.apply(parameters, images)

    assert counted(here, parameters, digits()[0])
    check(train(here, parameters)[0], train(network.apply, parameters)[0])


def test_causal_convolution_of_one_dimension():
    """As in Mamba: kernel 4, each output of what came before."""
    rng = np.random.default_rng(0)
    x, f = rng.normal(size=(2, 32, 6)).astype("f"), rng.normal(size=(4, 1, 6)).astype("f")
    y = jax_dwbp.conv_general_dilated(
        *(jnp.asarray(x), jnp.asarray(f), (1,), [(3, 0)]),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=6,
    )
    padded = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    want = sum(f[k, 0] * padded[:, k : k + 32] for k in range(4))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_keras():
    """On its JAX backend, in a process of its own: a process has one backend."""
    pytest.importorskip("keras")
    program = Path(__file__).parent / "keras_on_jax.py"
    fresh_process.run(program, KERAS_BACKEND="jax", XLA_FLAGS="")
