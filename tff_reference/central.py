"""Ordinary training in plain Keras, on given batches: `compile` and `train_on_batch`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tff_reference import networks, weights
from tff_reference.batches import real
from tff_reference.optimizers import optimizer


class Stretch(NamedTuple):
    """The network after one round's batches, and Keras' mean loss and accuracy on the way."""

    params: dict
    stats: dict
    metrics: dict


def run(case: dict, params: dict, stats: dict, x: np.ndarray, y: np.ndarray, rows: np.ndarray):
    """Trains along `rows` [rounds, steps, batch] and yields a `Stretch` after each round.

    The optimizer's state goes on from round to round, as in Keras' `fit`.
    """
    model = networks.build(**case["network"])
    _set(model, params, stats)
    config = case["client"]
    make = optimizer(config["optimizer"], config["lr"], config["momentum"], "keras")
    model.compile(
        optimizer=make(),
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[tf.keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    for table in rows:
        count, loss, correct = 0, 0.0, 0.0
        for batch in real(table):
            # The values before the step, of this batch alone.
            batch_loss, accuracy = model.train_on_batch(x[batch], y[batch], reset_metrics=True)
            count += len(batch)
            loss += batch_loss * len(batch)
            correct += accuracy * len(batch)
        metrics = {"loss": loss / count, "accuracy": correct / count, "num_examples": count}
        yield Stretch(
            weights.read(model.trainable_variables, params),
            weights.read(model.non_trainable_variables, stats),
            metrics,
        )


def evaluate(network: dict, params: dict, stats: dict, x, y, batch: int) -> dict:
    """Keras' own `evaluate`: loss and accuracy in inference mode."""
    model = networks.build(**network)
    _set(model, params, stats)
    model.compile(
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[tf.keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    loss, accuracy = model.evaluate(x, y, batch_size=batch, verbose=0)
    return {"loss": loss, "accuracy": accuracy, "num_examples": len(y)}


def _set(model: tf.keras.Model, params: dict, stats: dict) -> None:
    weights.assign(model.trainable_variables, params)
    weights.assign(model.non_trainable_variables, stats)
