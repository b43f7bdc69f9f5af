"""TensorFlow's graph of a training step of each network, converted to JAX by tf2jax."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tensorflow as tf
import tf2jax

import jax_dwbp.tf2jax
from clients.networks import NAMES, batch, network


def rows() -> Iterator[tuple[str, Callable]]:
    jax_dwbp.tf2jax.register()
    for name in NAMES:
        yield name, functools.partial(_step, name)


def _step(name: str) -> tuple[Any, ...]:
    model = network(name)
    weights = [variable.value for variable in model.trainable_variables]

    @tf.function(autograph=False)
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(images, training=False)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            loss = tf.reduce_mean(losses)
        return loss, tape.gradient(loss, weights)

    arrays = batch()
    function, parameters = tf2jax.convert(  # pyright: ignore[reportPrivateImportUsage]
        step, *map(np.zeros_like, arrays)
    )
    (loss, gradients), _ = jax.jit(function)(parameters, *arrays)
    # Of a network at its start in float32: it amplifies rounding.
    for got, want in zip(
        jax.tree.leaves((loss, gradients)), tf.nest.flatten(step(*arrays)), strict=True
    ):
        scale = np.abs(want.numpy()).max() + 1e-30
        np.testing.assert_allclose(np.asarray(got) / scale, want.numpy() / scale, atol=5e-3)
    return lambda *operands: function(*operands)[0], parameters, *arrays
