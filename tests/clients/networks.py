"""A training step of each kind of depthwise network in keras.applications, by Keras on JAX."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

BATCH, SIZE, CLASSES = 4, 96, 10
NAMES = (
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "MobileNetV3Large",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "Xception",
    "NASNetMobile",
    "ConvNeXtTiny",
)


def network(name: str) -> Any:
    keras.utils.set_random_seed(0)
    return getattr(keras.applications, name)(
        weights=None,
        input_shape=(SIZE, SIZE, 3),
        classes=CLASSES,
        classifier_activation=None,
    )


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32)
    return images, rng.integers(CLASSES, size=BATCH).astype(np.int32)


def rows() -> Iterator[tuple[str, Callable]]:
    for name in NAMES:
        yield name, functools.partial(_step, name)


def _step(name: str) -> tuple[Any, ...]:
    """The loss and its gradients by all weights. What drops out is left out, so that the two ways
    to convolve can be compared."""
    model = network(name)
    trained, others = (
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )

    def loss(trained: Any, others: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits, _ = model.stateless_call(trained, others, images, training=False)
        rates = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(rates, labels[:, None], 1))

    images, labels = map(jnp.asarray, batch())
    return jax.value_and_grad(loss), trained, others, images, labels
