"""The work in TensorFlow Federated: its own learning process, datasets made beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from benchmarks.peers.serve import Inputs, cohorts, serve
from tff_reference import networks, weights

EVAL_BATCH = 200


def run(folder: Path) -> None:
    """Answers one request."""
    serve(folder, build, ("tensorflow-federated", "tensorflow", "numpy"))


def build(inputs: Inputs) -> Callable[[], dict[str, np.ndarray]]:
    """Makes the function that does the work once."""
    network = inputs.case["network"]
    model = networks.build(**network)
    initial = tff.learning.models.ModelWeights(
        weights.to_keras(model.trainable_variables, inputs.params),
        weights.to_keras(model.non_trainable_variables, inputs.stats),
    )

    def model_fn() -> Any:
        return tff.learning.models.from_keras_model(
            networks.build(**network),
            loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            input_spec=(
                tf.TensorSpec([None, *network["input_shape"]], tf.float32),
                tf.TensorSpec([None], tf.int32),
            ),
            metrics=[tf.keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        )

    if inputs.work["kind"] == "evaluation":
        return _evaluation(inputs, model_fn, initial)
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(inputs.case["client"]["lr"]),
        server_optimizer_fn=tff.learning.optimizers.build_sgdm(1.0),
    )
    start = process.set_model_weights(process.initialize(), initial)
    rounds = [
        [
            tf.data.Dataset.from_tensor_slices((inputs.images[rows], inputs.labels[rows])).batch(
                inputs.rows.shape[-1]
            )
            for rows in clients
        ]
        for clients in cohorts(inputs)
    ]

    def train() -> dict[str, np.ndarray]:
        state = start
        for clients in rounds:
            state = process.next(state, clients).state
        after = process.get_model_weights(state).trainable
        return weights.to_jaxfed(model.trainable_variables, list(after), list(inputs.params))

    return train


def _evaluation(
    inputs: Inputs, model_fn: Callable[[], Any], initial: Any
) -> Callable[[], dict[str, np.ndarray]]:
    process = tff.learning.algorithms.build_fed_eval(model_fn)
    start = process.set_model_weights(process.initialize(), initial)
    test = tf.data.Dataset.from_tensor_slices((inputs.test_images, inputs.test_labels))
    test = test.batch(EVAL_BATCH)

    def evaluate() -> dict[str, np.ndarray]:
        metrics = process.next(start, [test]).metrics["client_work"]["eval"]
        scores = metrics["current_round_metrics"]
        return {name: np.asarray(scores[name]) for name in ("loss", "accuracy")}

    return evaluate
