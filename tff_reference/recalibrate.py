"""Honest BatchNorm statistics for what TFF has trained, without leaving TFF.

TFF averages trainable weights only, so the moving mean and variance of every BatchNormalization
layer are still the initial 0 and 1 when `build_fed_eval` or `model.evaluate` uses them. The weights
are good; only the statistics are missing, and one pass over images gives them back:

    from tff_reference.recalibrate import recalibrated

    weights = process.get_model_weights(state)
    model = recalibrated(create_keras_model(), weights, train_data.batch(200))
    model.compile(loss=loss, metrics=["accuracy"])
    model.evaluate(test_data.batch(200))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


def recalibrated(
    model: tf.keras.Model, weights: tff.learning.models.ModelWeights, batches: Iterable[Any]
) -> tf.keras.Model:
    """Gives a Keras model the weights of a TFF process, and statistics of real images.

    Every batch is normalised by its own moments, as in training; those of all batches are then
    combined by the law of total variance, each image counting once. Moving averages would not do:
    after n batches a momentum of 0.99 is still 0.99^n of the initial 0 and 1.

    Args:
      model: what the process's `model_fn` wraps; built, and changed here. BatchNormalization
        layers of nested models are found too.
      weights: `process.get_model_weights(state)`.
      batches: images [B, H, W, C], or pairs that begin with them. A few thousand training images
        are enough, in batches of a hundred or more.

    Returns:
      The same model. Without BatchNormalization it has the weights, and `batches` are not looked
      at.

    Raises:
      ValueError: if there are BatchNormalization layers and no batch.
    """
    weights.assign_weights_to(model)
    norms = [m for m in model.submodules if isinstance(m, tf.keras.layers.BatchNormalization)]
    if not norms:
        return model
    momenta = [layer.momentum for layer in norms]
    first, second, count = [0.0] * len(norms), [0.0] * len(norms), 0
    try:
        for layer in norms:
            layer.momentum = 0.0  # the moving statistics are then those of the last batch
        for batch in batches:
            images = batch[0] if isinstance(batch, tuple | list) else batch
            model(images, training=True)
            count += len(images)
            for place, layer in enumerate(norms):
                mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
                first[place] += len(images) * mean.astype(np.float64)
                second[place] += len(images) * (variance + mean.astype(np.float64) ** 2)
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
    if not count:
        raise ValueError("recalibrated: got no batch of images, expected some; pass training data")
    for layer, total, squares in zip(norms, first, second, strict=True):
        mean = total / count
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(np.maximum(squares / count - mean**2, 0))
    return model
