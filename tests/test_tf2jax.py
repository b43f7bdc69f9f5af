"""A TensorFlow graph that holds a training step, converted to JAX by tf2jax."""

import os
import sys

import fresh_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, SMALL, TENSORFLOW

tf = pytest.importorskip("tensorflow", reason="TensorFlow is what is converted")
os.environ["KERAS_BACKEND"] = "tensorflow"
keras = pytest.importorskip("keras")
tf2jax = pytest.importorskip("tf2jax")

import jax_dwbp.tf2jax  # noqa: E402

STEPS, RATE = 20, 0.05


@pytest.fixture(autouse=True)
def registered():
    jax_dwbp.tf2jax.register()


def network(size):
    """Each layer with a depthwise convolution that Keras has, and what stands around them: swish
    has a custom gradient."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(size),
            layers.Conv2D(8, 3, strides=2, padding="same"),
            layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2),
            layers.ReLU(),
            layers.Conv2D(6, 3, strides=2, padding="same"),
            layers.DepthwiseConv2D((5, 3), padding="same"),
            layers.BatchNormalization(),
            layers.Activation("silu"),
            layers.MaxPooling2D(2, 1),
            layers.Conv2D(12, 3, groups=6, padding="same", activation="silu"),
            layers.AveragePooling2D(2, 1, "same"),
            layers.ReLU(6.0),
            layers.SeparableConv2D(6, 3, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_training_step():
    """Losses and gradients of 20 steps are TensorFlow's. The graph relies on NumPy's promotion."""
    keras.utils.set_random_seed(0)
    keras.config.set_floatx("float64")
    try:
        model = network((27, 22, 3))
    finally:
        keras.config.set_floatx("float32")
    weights = model.trainable_variables

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
            )
        return loss, tape.gradient(loss, [weight.value for weight in weights])

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 27, 22, 3)), rng.integers(10, size=8)
    function, parameters = tf2jax.convert(step, np.zeros_like(x), np.zeros_like(y))
    names = [weight.path for weight in weights]
    assert set(names) <= set(parameters)
    ops = [selection.op for selection in jax_dwbp.implementations(function, parameters, x, y)]
    assert sorted(op for op in ops if op != "conv_general_dilated") == sorted(4 * OPS)

    function = jax.jit(function)
    losses = []
    for _ in range(STEPS):
        wanted, wanted_gradients = step(x, y)
        (loss, gradients), parameters = function(parameters, x, y)
        np.testing.assert_allclose(loss, wanted, rtol=1e-10)
        for name, weight, got, want in zip(
            names, weights, gradients, wanted_gradients, strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-11)
            parameters[name] = parameters[name] - RATE * got
            weight.assign_sub(RATE * want)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("case", SMALL[:11] + TENSORFLOW[11:20], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_attribute(case, op):
    """Strides, padding and, where TensorFlow has them, dilations reach the op."""
    attributes = case.attributes()
    a, b = case.operands(op, "float64")
    raw = {
        "forward": lambda a, b: tf.raw_ops.DepthwiseConv2dNative(input=a, filter=b, **attributes),
        "input_grad": lambda a, b: tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
            input_sizes=case.input, filter=a, out_backprop=b, **attributes
        ),
        "filter_grad": lambda a, b: tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=a, filter_sizes=case.filter, out_backprop=b, **attributes
        ),
    }[op]
    function = tf2jax.convert_functional(tf.function(raw), np.zeros_like(a), np.zeros_like(b))
    got = jax.jit(function)(a, b)
    case.check(op, got, case.expected(op, a, b), "float64")


@pytest.mark.parametrize("size", [9, 10, 11])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 0), (2, 1), (0, 3), (0, 0))])
def test_dense_gradients(padding, size):
    """Of each input size that belongs to one output size."""
    rng = np.random.default_rng(0)
    x, f = rng.normal(size=(2, size, 9, 4)), rng.normal(size=(3, 2, 4, 5))
    y = tf.nn.conv2d(x, f, 3, padding)

    def gradients(x, f, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, f])
            y = tf.nn.conv2d(x, f, 3, padding)
        return tape.gradient(y, [x, f], output_gradients=dy)

    dy = rng.normal(size=y.shape)
    function = tf2jax.convert_functional(
        tf.function(gradients), *(np.zeros_like(a) for a in (x, f, dy))
    )
    want = gradients(*map(tf.constant, (x, f, dy)))
    for g, w in zip(jax.jit(function)(x, f, dy), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


def test_dilated_dense_gradients():
    """Which TensorFlow has on no CPU."""
    rng = np.random.default_rng(0)
    x, f = rng.normal(size=(2, 9, 10, 4)), rng.normal(size=(3, 2, 4, 5))
    dy = rng.normal(size=(2, 5, 7, 5))
    attributes = {"strides": (1,) * 4, "padding": "VALID", "dilations": (1, 2, 3, 1)}

    def gradients(x, f, dy):
        dx = tf.raw_ops.Conv2DBackpropInput(
            input_sizes=x.shape, filter=f, out_backprop=dy, **attributes
        )
        df = tf.raw_ops.Conv2DBackpropFilter(
            input=x, filter_sizes=f.shape, out_backprop=dy, **attributes
        )
        return dx, df

    function = tf2jax.convert_functional(
        tf.function(gradients), *(np.zeros_like(a) for a in (x, f, dy))
    )
    want = np.zeros_like(x), np.zeros_like(f)
    for r, s in np.ndindex(3, 2):
        window = (slice(None), slice(2 * r, 2 * r + 5), slice(3 * s, 3 * s + 7))
        want[0][window] += dy @ f[r, s].T
        want[1][r, s] = np.einsum("npqc,npqm->cm", x[window], dy)
    for g, w in zip(jax.jit(function)(x, f, dy), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


@tf.custom_gradient
def tripled(x):
    return x * x, lambda dy: 3.0 * dy


def test_custom_gradients():
    """Of a forward graph they are converted, as without `register`, however often that was called;
    in one that has gradients they stand already."""

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.tanh(tripled(x))
        return tape.gradient(y, x)

    before = sys.modules["tf2jax._src.tf2jax"]._extract_subgraphs
    jax_dwbp.tf2jax.register()
    assert sys.modules["tf2jax._src.tf2jax"]._extract_subgraphs is before
    x = np.float32(0.5)
    function = tf2jax.convert_functional(tf.function(tripled, autograph=False), x)
    assert jax.grad(function)(x) == 3
    got = tf2jax.convert_functional(tf.function(gradient, autograph=False), x)(x)
    np.testing.assert_allclose(got, 3 * (1 - np.tanh(0.25) ** 2), rtol=1e-6)


def test_custom_gradients_around_a_normalization():
    """Whose gradient is the only one in the graph with an op of its own."""

    def gradient(x, scale):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tripled(tripled(x))
            y = tf.raw_ops.FusedBatchNormV3(
                x=y, scale=scale, offset=scale, mean=[], variance=[], is_training=True
            )
            y = tripled(tripled(y[0]))
        return tape.gradient(y, x, output_gradients=x)

    gradient = tf.function(gradient, autograph=False)
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    arrays = x, np.ones(4, np.float32)
    got = jax.jit(tf2jax.convert_functional(gradient, *arrays))(*arrays)
    np.testing.assert_allclose(got, gradient(*arrays), rtol=1e-3, atol=1e-3)


def test_explicit_padding_of_conv2d():
    """Which tf2jax's own refuses."""
    x, f = (np.random.default_rng(0).normal(size=size) for size in ((2, 7, 8, 6), (3, 3, 2, 9)))
    pads = ((0, 0), (2, 1), (0, 3), (0, 0))
    convolve = tf.function(lambda x, f: tf.nn.conv2d(x, f, 2, pads, dilations=1), autograph=False)
    got = tf2jax.convert_functional(convolve, x, f)(x, f)
    np.testing.assert_allclose(got, convolve(x, f), rtol=1e-12, atol=1e-12)


def test_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2jax._src.ops", None)
    with pytest.raises(ImportError, match="`register` needs tf2jax"):
        jax_dwbp.tf2jax.register()


def test_import_changes_nothing():
    program = (
        "import jax_dwbp.tf2jax, tf2jax._src.ops as ops;"
        "assert 'DepthwiseConv2dNativeBackpropInput' not in ops._jax_ops;"
        "jax_dwbp.tf2jax.register();"
        "assert 'DepthwiseConv2dNativeBackpropInput' in ops._jax_ops"
    )
    fresh_process.run("-c", program)


def test_results_are_jax_arrays():
    case = SMALL[0]
    x, f = case.operands("forward")
    function = tf2jax.convert_functional(
        tf.function(lambda x, f: tf.nn.depthwise_conv2d(x, f, (1, 1, 1, 1), "SAME")), x, f
    )
    y = jax.vmap(function, (0, None))(jnp.stack([x, x]), jnp.asarray(f))
    assert isinstance(y, jax.Array) and y.shape == (2, *case.output)
    _, tangent = jax.jvp(lambda f: function(x, f), (f,), (f,))  # forward mode, as with tf2jax's own
    np.testing.assert_allclose(tangent, y[0], rtol=1e-6)
