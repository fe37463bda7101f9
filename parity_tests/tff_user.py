"""What a user of TFF writes, with no jaxfed in it: runs in TFF's environment, as a case does."""

import json
import textwrap
from pathlib import Path

import numpy as np
import tensorflow as tf  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
import tensorflow_federated as tff  # pyright: ignore[reportMissingImports]

from tff_reference import recalibrate

CLIENTS, ROUNDS, RATE = 4, 12, 0.1


def run(folder: Path) -> None:
    """Trains on `data.npz`, follows the example in `recalibrate`'s docstring, writes scores."""
    with np.load(folder / "data.npz") as file:
        data = {name: array.astype(np.float32) for name, array in file.items()}

    def create_keras_model():
        layers = tf.keras.layers
        image = layers.Input(data["x_train"].shape[1:])
        x = layers.Conv2D(16, 3, use_bias=False)(image)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Conv2D(32, 3, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        inner = tf.keras.Model(image, layers.GlobalAveragePooling2D()(x))
        # Nested, where TFF's warning about BatchNorm does not look.
        return tf.keras.Sequential([inner, layers.Dense(10)])

    def model_fn():
        return tff.learning.models.from_keras_model(
            create_keras_model(),
            loss=loss,
            metrics=[tf.keras.metrics.SparseCategoricalAccuracy()],
            input_spec=clients[0].element_spec,
        )

    tf.keras.utils.set_random_seed(0)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    train_data = tf.data.Dataset.from_tensor_slices((data["x_train"], data["y_train"]))
    test_data = tf.data.Dataset.from_tensor_slices((data["x_test"], data["y_test"]))
    clients = [train_data.shard(CLIENTS, k).batch(20) for k in range(CLIENTS)]
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, tff.learning.optimizers.build_sgdm(RATE), tff.learning.optimizers.build_sgdm(1.0)
    )
    state = process.initialize()
    for _ in range(ROUNDS):
        state = process.next(state, clients).state
    evaluation = tff.learning.algorithms.build_fed_eval(model_fn)
    before = evaluation.set_model_weights(evaluation.initialize(), process.get_model_weights(state))
    printed = evaluation.next(before, [test_data.batch(200)]).metrics["client_work"]["eval"]
    names = {
        "process": process, "state": state, "loss": loss,
        "create_keras_model": create_keras_model, "train_data": train_data, "test_data": test_data,
    }  # fmt: skip
    exec(example(), names)
    model = names["model"]
    (norm, *_) = (m for m in model.submodules if isinstance(m, tf.keras.layers.BatchNormalization))
    scores = {
        "printed": float(printed["current_round_metrics"]["sparse_categorical_accuracy"]),
        "recalibrated": model.evaluate(test_data.batch(200), verbose=0)[1],
        "momentum": norm.momentum,
        "trained": all(
            np.array_equal(ours, theirs)
            for ours, theirs in zip(
                model.get_weights()[:1], process.get_model_weights(state).trainable[:1], strict=True
            )
        ),
    }
    (folder / "scores.json").write_text(json.dumps(scores))


def example() -> str:
    """The code in the docstring."""
    lines = (recalibrate.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
