"""The work in FedJAX: its federated averaging with Haiku networks, on its default backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.serve import Inputs, cohorts, serve


def run(folder: Path) -> None:
    """Answers one request."""
    serve(folder, build, ("fedjax", "jax", "dm-haiku", "numpy"))


def build(inputs: Inputs) -> Callable[[], dict[str, np.ndarray]]:
    """Makes the function that does the work once."""
    forward = {"cnn": _cnn, "mlp": _mlp}[inputs.case["network"]["name"]]
    model = fedjax.create_model_from_haiku(
        transformed_forward_pass=hk.transform(forward),
        sample_batch={"x": inputs.images[:1], "y": inputs.labels[:1]},
        train_loss=_loss,
    )
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model),
        client_optimizer=fedjax.optimizers.sgd(inputs.case["client"]["lr"]),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        # The order of the batches is part of the inputs.
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
            batch_size=inputs.rows.shape[-1], num_epochs=1, skip_shuffle=True
        ),
    )
    params: dict[str, dict[str, jax.Array]] = {}
    for name, array in inputs.params.items():
        layer, _, leaf = name.rpartition("/")
        params.setdefault(layer, {})[{"kernel": "w", "bias": "b"}[leaf]] = jnp.asarray(array)
    start = algorithm.init(params)
    rounds = [
        [
            (
                b"%d" % number,
                fedjax.ClientDataset({"x": inputs.images[rows], "y": inputs.labels[rows]}),
                jax.random.PRNGKey(number),
            )
            for number, rows in enumerate(clients)
        ]
        for clients in cohorts(inputs)
    ]

    def train() -> dict[str, np.ndarray]:
        state = start
        for clients in rounds:
            state, _ = algorithm.apply(state, clients)
        after = jax.block_until_ready(state.params)
        found = {}
        for name in inputs.params:
            layer, _, leaf = name.rpartition("/")
            found[name] = np.asarray(after[layer][{"kernel": "w", "bias": "b"}[leaf]])
        return found

    return train


def _loss(batch: dict, logits: jax.Array) -> jax.Array:
    return fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits)


def _cnn(batch: dict) -> jax.Array:
    x = jax.nn.relu(hk.Conv2D(32, 3, padding="VALID", name="conv1")(batch["x"]))
    x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(hk.Conv2D(64, 3, padding="VALID", name="conv2")(x))
    x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return hk.Linear(10, name="logits")(hk.Flatten()(x))


def _mlp(batch: dict) -> jax.Array:
    x = jax.nn.relu(hk.Linear(200, name="dense1")(hk.Flatten()(batch["x"])))
    return hk.Linear(10, name="logits")(jax.nn.relu(hk.Linear(200, name="dense2")(x)))
