"""Trains a Keras network on its JAX backend, with lax's convolution and with this package's."""

from typing import Any

import keras
import numpy as np
from sklearn import datasets

import jax_dwbp

images, labels = datasets.load_digits(return_X_y=True)
images, labels = (images / 16).reshape(-1, 8, 8, 1)[:128].astype("float32"), labels[:128]


def losses():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 1),
            layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2),
            layers.SeparableConv2D(8, 3, padding="same", activation="relu"),
            layers.Reshape((16, 8)),
            layers.DepthwiseConv1D(4, padding="valid"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    quiet: Any = 0
    history = model.fit(images, labels, batch_size=32, epochs=5, shuffle=False, verbose=quiet)
    return history.history["loss"], model


with_lax, _ = losses()
with jax_dwbp.in_place_of_lax():
    here, model = losses()
    ops = [op.op for op in jax_dwbp.implementations(lambda x: model(x), images)]
assert ops.count("forward") == 3, ops
np.testing.assert_allclose(here, with_lax, rtol=1e-4)
assert with_lax[-1] < with_lax[0]
