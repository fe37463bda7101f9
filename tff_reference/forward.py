"""One batch in plain Keras: logits, loss, gradient and the moved statistics of BatchNorm."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tff_reference import weights


def run(model: tf.keras.Model, params: dict, stats: dict, x: np.ndarray, y: np.ndarray) -> dict:
    """Values of the network with these weights on images `x` and labels `y`, by name."""
    weights.assign(model.trainable_variables, params)
    weights.assign(model.non_trainable_variables, stats)
    loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    inference = model(x, training=False)
    with tf.GradientTape() as tape:
        logits = model(x, training=True)
        loss = loss_of(y, logits)
    gradient = tape.gradient(loss, model.trainable_variables)
    gradient = weights.to_jaxfed(model.trainable_variables, gradient, params)
    moved = weights.read(model.non_trainable_variables, stats)
    return {
        "logits/inference": inference.numpy(),
        "logits/training": logits.numpy(),
        "loss": loss.numpy(),
        **{"gradient/" + name: value for name, value in gradient.items()},
        **{"moved/" + name: value for name, value in moved.items()},
    }
