"""The ops around a convolution that tf2jax gets from here: what TensorFlow's give."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is what is converted")
os.environ["KERAS_BACKEND"] = "tensorflow"
tf2jax = pytest.importorskip("tf2jax")

import jax_dwbp.tf2jax  # noqa: E402

raw = tf.raw_ops


@pytest.fixture(autouse=True)
def registered():
    """And NumPy's promotion, which tf2jax relies on."""
    jax_dwbp.tf2jax.register()
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def check(function, *arrays, rtol=1e-5, atol=1e-5):
    """The converted function gives what it gives in TensorFlow, in its dtypes."""
    function = tf.function(function, autograph=False)
    converted = jax.jit(tf2jax.convert_functional(function, *(np.zeros_like(a) for a in arrays)))
    got, want = jax.tree.leaves(converted(*arrays)), tf.nest.flatten(function(*arrays))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        w = w.numpy()
        assert np.shape(g) == w.shape and jnp.asarray(g).dtype == w.dtype
        np.testing.assert_allclose(
            *(np.asarray(a, np.float64) for a in (g, w)), rtol=rtol, atol=atol
        )


def gradient(function):
    """By the first argument, of the second one."""

    def run(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return y, tape.gradient(y, x, output_gradients=dy)

    return run


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


ACTIVATIONS = {
    "elu": tf.nn.elu,
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, 0.3),
    "reciprocal": tf.math.reciprocal,
    "relu": tf.nn.relu,
    "relu6": lambda x: tf.nn.relu6(4 * x),
    "rsqrt": lambda x: tf.math.rsqrt(tf.abs(x) + 1),
    "selu": tf.nn.selu,
    "sigmoid": tf.sigmoid,
    "silu": lambda x: tf.nn.silu(tf.nn.silu(tf.tanh(x))),  # by custom gradients
    "softplus": tf.math.softplus,
    "softsign": tf.math.softsign,
    "sqrt": lambda x: tf.sqrt(tf.abs(x) + 1),
    "tanh": tf.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    x = np.append(normal(4, 20), [[0.0] * 20]).astype("float64")
    if name == "reciprocal":
        x = x + 10
    check(gradient(ACTIVATIONS[name]), x, normal(100, seed=1, dtype="float64"), rtol=1e-12)


@pytest.mark.parametrize("op", [raw.SqrtGrad, raw.RsqrtGrad, raw.ReciprocalGrad])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_gradient_by_result(op, dtype):
    """At infinite slopes, where nothing comes back; and of complex numbers."""
    y = np.array([0, 0, np.inf, 2, 1.5, 0.5] * 3, np.float32)
    dy = np.array([0, 0, 0, 1, -2, 3] * 3, np.float32)
    if dtype == "complex64":
        y, dy = np.where(y < 9, y, 1) * np.complex64(1 - 0.5j), dy * np.complex64(1 + 2j)
    function = tf.function(lambda y, dy: op(y=y, dy=dy), autograph=False)
    got = jax.jit(tf2jax.convert_functional(function, y, dy))(y, dy)
    np.testing.assert_allclose(got, function(y, dy), rtol=1e-6)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("size", "stride"), [((3, 3), (2, 2)), ((2, 3), (1, 2)), ((2, 2), (3, 3))])
@pytest.mark.parametrize("pool", [tf.nn.max_pool2d, tf.nn.avg_pool2d], ids=["max", "avg"])
def test_pooling(pool, size, stride, padding):
    """With equal numbers in a window: the first of them has the gradient of a maximum."""
    x = np.round(normal(2, 9, 10, 3))
    y = pool(x, size, stride, padding)
    check(gradient(lambda x: pool(x, size, stride, padding)), x, normal(*y.shape, seed=1))


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    ("version", "dtype"),
    [("", "float32"), ("V2", "float32"), ("V2", "bfloat16"), ("V3", "float32"), ("V3", "bfloat16")],
)
def test_normalization(version, dtype, is_training, factor):
    x, scale, offset = normal(2, 5, 6, 4), 1 + normal(4, seed=1), normal(4, seed=2)
    mean, variance = normal(4, seed=3), 1 + normal(4, seed=4) ** 2
    x = x.astype(jnp.dtype(dtype))

    def run(x, scale, offset, mean, variance, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            y, kept_mean, kept_variance, *_ = getattr(raw, f"FusedBatchNorm{version}")(
                x=x,
                scale=scale,
                offset=offset,
                mean=mean,
                variance=variance,
                epsilon=1e-2,
                exponential_avg_factor=factor,
                is_training=is_training,
            )
        return y, kept_mean, kept_variance, tape.gradient(y, [x, scale, offset], dy)

    dy = normal(*x.shape, seed=5).astype(x.dtype)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    arrays = (x, scale, offset, mean, variance, dy)
    check(run, *arrays, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("data_format", ["NCHW", "NDHWC", "NCDHW"])
def test_layouts_of_normalization(data_format):
    x = normal(*({"N": 2, "C": 3}.get(axis, 4) for axis in data_format))
    scale, offset, nothing = 1 + normal(3, seed=1), normal(3, seed=2), np.zeros(0, np.float32)
    options = {"data_format": data_format, "epsilon": 1e-2, "is_training": True}

    def run(x, scale, offset, mean, variance, dy):
        y, mean, variance, *reserved = raw.FusedBatchNormV3(
            x=x, scale=scale, offset=offset, mean=mean, variance=variance, **options
        )
        names = (f"reserve_space_{i}" for i in (1, 2, 3))
        gradients = raw.FusedBatchNormGradV3(
            y_backprop=dy, x=x, scale=scale, **dict(zip(names, reserved, strict=True)), **options
        )
        return y, mean, variance, *gradients[:3]

    arrays = (x, scale, offset, nothing, nothing, normal(*x.shape, seed=3))
    check(run, *arrays, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["REFLECT", "SYMMETRIC"])
def test_mirror_pad(mode):
    x, pads = normal(2, 5, 6), [(0, 0), (2, 3), (4, 0)]
    check(gradient(lambda x: tf.pad(x, pads, mode)), x, normal(2, 10, 10, seed=1))


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_blocks(data_format):
    """TensorFlow has NHWC alone on a CPU, so the other one is its transpose."""
    x = normal(2, 4, 6, 12)
    axes = (0, 3, 1, 2)

    def ops(x, data_format):
        return (
            raw.DepthToSpace(input=x, block_size=2, data_format=data_format),
            raw.SpaceToDepth(input=x, block_size=2, data_format=data_format),
        )

    want = ops(x, "NHWC")
    if data_format == "NCHW":
        x, want = x.transpose(axes), [tf.transpose(y, axes) for y in want]
    converted = tf2jax.convert_functional(
        tf.function(lambda x: ops(x, data_format), autograph=False), x
    )
    for g, w in zip(jax.jit(converted)(x), want, strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [(20, 24), (10, 12), (3, 2), (7, 25), (1, 1)])
@pytest.mark.parametrize(("align_corners", "half"), [(False, False), (True, False), (False, True)])
def test_resize_bilinear(align_corners, half, size, dtype):
    def run(x, dy):
        options = {"align_corners": align_corners, "half_pixel_centers": half}
        y = raw.ResizeBilinear(images=x, size=size, **options)
        return y, raw.ResizeBilinearGrad(grads=dy, original_image=x, **options)

    check(run, normal(2, 5, 6, 3, dtype=dtype), normal(2, *size, 3, seed=1))


def test_resizing_is_precise():
    """On accelerators too, which multiply in fewer bits by default."""
    x = normal(1, 2, 2, 1)

    def run(x):
        options = {"align_corners": False, "half_pixel_centers": False}
        y = raw.ResizeBilinear(images=x, size=(5, 5), **options)
        return raw.ResizeBilinearGrad(grads=y, original_image=x, **options)

    converted = tf2jax.convert_functional(tf.function(run, autograph=False), x)
    text = jax.jit(converted).lower(x).as_text()
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") > 0


@pytest.mark.parametrize(
    "index",
    [
        np.s_[1:, ::2],
        np.s_[..., 1:3],
        np.s_[:, 2, None, ::-1],
        np.s_[0],
    ],
    ids=str,
)
def test_strided_slice(index):
    x = normal(3, 5, 6)
    check(gradient(lambda x: x[index]), x, normal(*x[index].shape, seed=1))


@pytest.mark.parametrize("axis", [0, -1])
def test_concatenation(axis):
    """Of parts that differ in size."""
    x = normal(2, 3, 4)

    def concatenated(x):
        part = x[:1] if axis == 0 else x[..., :3]
        return tf.concat([2 * x, part, x], axis)

    dy = normal(*((5, 3, 4) if axis == 0 else (2, 3, 11)), seed=1)
    check(gradient(concatenated), x, dy)


@pytest.mark.parametrize(("data_format", "others"), [("NHWC", (0, 1, 2)), ("NCHW", (0, 2, 3))])
def test_bias_gradient(data_format, others):
    dy = normal(2, 3, 4, 5, dtype="float64")
    function = tf.function(
        lambda dy: raw.BiasAddGrad(out_backprop=dy, data_format=data_format), autograph=False
    )
    got = tf2jax.convert_functional(function, np.zeros_like(dy))(dy)
    np.testing.assert_allclose(got, dy.sum(others), rtol=1e-12)
    small = np.full((2, 3, 4, 5), 9, np.int8)
    got = tf2jax.convert_functional(function, small)(small)
    assert got.dtype == "int8"
    np.testing.assert_array_equal(got, small.sum(others, dtype=np.int8))


def test_cross_entropy():
    labels = np.abs(normal(6, 5, seed=1))
    check(
        gradient(lambda x: tf.nn.softmax_cross_entropy_with_logits(labels, x)),
        normal(6, 5),
        normal(6, seed=2),
    )
