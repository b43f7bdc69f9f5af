"""One of some processes that train a network together, or the only one.

  python two_processes.py PROCESSES INDEX PORT

prints the losses, and what the program sends. The images are sharded over eight devices, by rows
over the processes and by batch within each.
"""

import json
import sys
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_dwbp

processes, index, port = map(int, sys.argv[1:])
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, index)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features, kernel, stride in ((16, 3, 1), (32, 5, 2), (32, 7, 1)):
            x = nn.Conv(features, (1, 1))(x)
            x = nn.Conv(
                features,
                (kernel, kernel),
                stride,
                feature_group_count=features,
                conv_general_dilated=jax_dwbp.conv_general_dilated,
            )(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.mean((1, 2)))


mesh = jax.make_mesh((2, 2, 2), ("rows", "batch", "channels"), (AxisType.Auto,) * 3)
sharding = NamedSharding(mesh, PartitionSpec("batch", "rows", None, None))
whole = NamedSharding(mesh, PartitionSpec())
rng = np.random.default_rng(0)
images = rng.uniform(size=(8, 24, 24, 3)).astype(np.float32)
labels = rng.integers(10, size=8)
network, optimizer = Network(), optax.sgd(0.05)
parameters = jax.jit(network.init)(jax.random.key(0), images[:1])
state = optimizer.init(parameters)


def place(tree, sharding):
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, lambda part: a[part]),
        jax.tree.map(np.asarray, tree),
    )


@jax.jit
def step(parameters, state, images, labels):
    def loss(parameters):
        logits: Any = network.apply(parameters, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradient = jax.value_and_grad(loss)(parameters)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(parameters, updates), state, value


images, labels = place(images, sharding), place(labels, whole)
parameters, state = place(parameters, whole), place(state, whole)
text = str(step.lower(parameters, state, images, labels).compile().as_text())
losses = []
for _ in range(10):
    parameters, state, value = step(parameters, state, images, labels)
    losses.append(float(value))
kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
print(
    json.dumps({"losses": losses, "collectives": [kind for kind in kinds if f" {kind}(" in text]})
)
