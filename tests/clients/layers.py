"""Layers of Flax, Equinox, Haiku and Keras with 64 channels, and functions that convolve."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import equinox
import flax.linen as nn
import flax.nnx as nnx
import haiku
import jax
import jax.numpy as jnp
import keras
import numpy as np

C = 64
KEY = jax.random.key(0)
IMAGES, SIGNALS, VOLUMES = (8, 28, 28, C), (8, 1024, C), (2, 8, 14, 14, C)
ONE_CHANNEL = (8, 128, 128, 1)


def rows() -> Iterator[tuple[str, Callable]]:
    """Each layer by its name, and what makes its step: a function and what it takes."""
    for name, shape, layer in (*_flax(), *_equinox(), *_haiku(), *_keras(), *_functions()):
        yield name, functools.partial(_step, shape, layer)


def _step(shape: tuple[int, ...], layer: Callable) -> tuple[Any, ...]:
    """The layer and its gradients by its parameters and by what it gets, as in a network."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), "float32")
    apply, parameters = layer(x)

    def loss(parameters: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(apply(parameters, x) ** 2)

    return jax.value_and_grad(loss, (0, 1)), parameters, x


def _flax() -> Iterator[tuple[str, Any, Callable]]:
    def linen(module: Any) -> Callable:
        return lambda x: (module.apply, module.init(KEY, x))

    def of_nnx(build: Callable) -> Callable:
        def layer(x: jax.Array) -> tuple[Callable, Any]:
            definition, state = nnx.split(build(nnx.Rngs(0)))
            return lambda state, x: nnx.merge(definition, state)(x), state

        return layer

    for name, shape, module in (
        ("`nn.Conv`, 3x3", IMAGES, nn.Conv(C, (3, 3), feature_group_count=C)),
        ("`nn.Conv`, 1-D, 4", SIGNALS, nn.Conv(C, (4,), feature_group_count=C)),
        ("`nn.Conv`, 3-D, 3x3x3", VOLUMES, nn.Conv(C, (3, 3, 3), feature_group_count=C)),
        ("`nn.Conv`, groups of 4", IMAGES, nn.Conv(C, (3, 3), feature_group_count=C // 4)),
        ("`nn.Conv`, 1 to 8 channels", ONE_CHANNEL, nn.Conv(8, (5, 5))),
        ("`nn.ConvTranspose`, 1 channel", ONE_CHANNEL, nn.ConvTranspose(1, (4, 4), (2, 2))),
        ("`nn.ConvTranspose`", IMAGES, nn.ConvTranspose(C, (4, 4), (2, 2))),
    ):
        yield f"Flax {name}", shape, linen(module)
    yield (
        "Flax `nnx.Conv`, 3x3",
        IMAGES,
        of_nnx(lambda rngs: nnx.Conv(C, C, (3, 3), feature_group_count=C, rngs=rngs)),
    )
    yield (
        "Flax `nnx.Conv`, 1-D, 4",
        SIGNALS,
        of_nnx(lambda rngs: nnx.Conv(C, C, (4,), feature_group_count=C, rngs=rngs)),
    )


def _equinox() -> Iterator[tuple[str, Any, Callable]]:
    def of_equinox(module: Any) -> Callable:
        parameters, static = equinox.partition(module, equinox.is_array)

        def apply(parameters: Any, images: jax.Array) -> jax.Array:
            return jax.vmap(equinox.combine(parameters, static))(images)

        return lambda x: (apply, parameters)

    images, signals, volumes = (8, C, 28, 28), (8, C, 1024), (2, C, 8, 14, 14)
    layers, options = equinox.nn, {"groups": C, "key": KEY}
    yield "Equinox `Conv2d`, 3x3", images, of_equinox(layers.Conv2d(C, C, 3, **options))
    yield "Equinox `Conv1d`, 4", signals, of_equinox(layers.Conv1d(C, C, 4, **options))
    yield "Equinox `Conv3d`, 3x3x3", volumes, of_equinox(layers.Conv3d(C, C, 3, **options))
    yield (
        "Equinox `ConvTranspose3d`, 4x4x4, stride 2",
        (2, C, 4, 7, 7),
        of_equinox(layers.ConvTranspose3d(C, C, 4, 2, **options)),
    )
    yield (
        "Equinox `ConvTranspose2d`, 4x4, stride 2",
        (8, C, 14, 14),
        of_equinox(layers.ConvTranspose2d(C, C, 4, 2, **options)),
    )
    yield (
        "Equinox `ConvTranspose1d`, 8, stride 4",
        signals,
        of_equinox(layers.ConvTranspose1d(C, C, 8, 4, **options)),
    )


def _haiku() -> Iterator[tuple[str, Any, Callable]]:
    def of_haiku(build: Callable) -> Callable:
        network = haiku.without_apply_rng(haiku.transform(lambda x: build()(x)))
        return lambda x: (network.apply, network.init(KEY, x))

    yield "Haiku `DepthwiseConv2D`, 3x3", IMAGES, of_haiku(lambda: haiku.DepthwiseConv2D(1, 3))
    yield "Haiku `DepthwiseConv1D`, 4", SIGNALS, of_haiku(lambda: haiku.DepthwiseConv1D(1, 4))
    separable = of_haiku(lambda: haiku.SeparableDepthwiseConv2D(1, 3))  # pyright: ignore[reportPrivateImportUsage]
    yield "Haiku `SeparableDepthwiseConv2D`", IMAGES, separable
    grouped = of_haiku(lambda: haiku.Conv2D(C, 3, feature_group_count=C))
    yield "Haiku `Conv2D`, 3x3", IMAGES, grouped


def _keras() -> Iterator[tuple[str, Any, Callable]]:
    def of_keras(module: Any) -> Callable:
        def layer(x: jax.Array) -> tuple[Callable, Any]:
            module.build(x.shape)

            def apply(parameters: Any, x: jax.Array) -> jax.Array:
                return module.stateless_call(parameters, [], x)[0]

            return apply, [weight.value for weight in module.trainable_variables]

        return layer

    layers = keras.layers
    for module, shape in (
        (layers.DepthwiseConv2D(3, padding="same"), IMAGES),
        (layers.DepthwiseConv1D(4, padding="same"), SIGNALS),
        (layers.SeparableConv2D(C, 3, padding="same"), IMAGES),
        (layers.SeparableConv1D(C, 4, padding="same"), SIGNALS),
        (layers.Conv2D(C, 3, groups=C, padding="same"), IMAGES),
        (layers.Conv1D(C, 4, groups=C, padding="causal"), SIGNALS),
        (layers.Conv3D(C, 3, groups=C, padding="same"), VOLUMES),
        (layers.Conv2DTranspose(C, 4, 2, padding="same"), IMAGES),
    ):
        groups = ", groups" if getattr(module, "groups", 1) > 1 else ""
        yield f"Keras `{type(module).__name__}`{groups}", shape, of_keras(module)


def _functions() -> Iterator[tuple[str, Any, Callable]]:
    patches = functools.partial(
        jax.lax.conv_general_dilated_patches, filter_shape=(3, 3), window_strides=(1, 1)
    )
    yield (
        "`lax.conv_general_dilated_patches`, 3x3",
        (8, 16, 28, 28),
        lambda x: (lambda _, x: patches(x, padding="SAME"), ()),
    )

    def filters(x: jax.Array) -> tuple[Callable, Any]:
        def one(image: jax.Array, f: jax.Array) -> jax.Array:
            return jax.lax.conv(image[None, None], f[None, None], (1, 1), "SAME")[0, 0]

        return lambda f, x: jax.vmap(one)(x, f), jnp.ones((len(x), 5, 5))

    yield "`vmap` of `lax.conv`, a filter each", (64, 64, 64), filters
    if importlib.util.find_spec("dm_pix"):
        dm_pix = importlib.import_module("dm_pix")

        def blur(x: jax.Array) -> tuple[Callable, Any]:
            return lambda _, x: dm_pix.gaussian_blur(x, 2.0, 11), ()

        yield "dm_pix `gaussian_blur`, 11", (8, 64, 64, 3), blur
