"""A case as its user would run it: trained from beginning to end, and evaluated now and then.

| in the trace | is |
|---|---|
| `round/<r>/train/...`, `round/<r>/test/...` | loss, accuracy, num_examples |
| `params/...`, `stats/...` | the network after the last round |
| `versions` | of TFF, TensorFlow and NumPy, as JSON |
| `recalibrated/...` | test metrics of these weights with the statistics of `recalibrated` |
| `batch/...` | and with each test batch's own |

The last two only where there are statistics. What is between is the business of `case`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_reference import batches, central, federated, networks, weights
from tff_reference.case import TEST_BATCH, serve, under
from tff_reference.recalibrate import recalibrated

VERSIONS = ("tensorflow-federated", "tensorflow", "numpy")
BATCH = 200
"""Images whose moments are taken together."""


def run(folder: Path) -> None:
    """Trains the case in `folder`; `eval_every` in its `case.json` says how often to test it."""
    serve(folder, train)


def train(case: dict, inputs: dict) -> dict:
    """The trace of a case."""
    params, stats = under(inputs, "params/"), under(inputs, "stats/")
    x = batches.scaled(inputs["images"], case["dtype"])
    test = batches.scaled(inputs["test_images"], case["dtype"]), inputs["test_labels"]
    go = _central if case["algorithm"] == "central" else _federated
    trace, rounds = {}, len(inputs["rows"])
    for number, (done, evaluate) in enumerate(go(case, inputs, params, stats, x, test), start=1):
        here = f"round/{number}/"
        trace.update({f"{here}train/{name}": value for name, value in done.metrics.items()})
        params, stats = done.params, done.stats
        if number % case["eval_every"] == 0 or number == rounds:
            scores = evaluate(params, stats)
            trace.update({f"{here}test/{name}": value for name, value in scores.items()})
    trace.update({f"params/{name}": value for name, value in params.items()})
    trace.update({f"stats/{name}": value for name, value in stats.items()})
    trace["versions"] = json.dumps({name: importlib.metadata.version(name) for name in VERSIONS})
    if stats:
        trace.update(_honest(case, params, stats, x, test))
    return trace


def _federated(case, inputs, params, stats, x, test) -> Iterator[tuple[Any, Any]]:
    process = federated.build(case, networks.build(**case["network"]), list(params), list(stats))
    held_out = batches.dataset(*test, batches.in_order(len(test[1]), TEST_BATCH))
    state = process.start(params, stats)
    for tables in inputs["rows"]:
        seats = [batches.dataset(x, inputs["labels"], t) for t in tables if (t >= 0).any()]
        state, done = process.next(state, seats)
        yield done, lambda params, stats: process.evaluate(params, stats, held_out)


def _central(case, inputs, params, stats, x, test) -> Iterator[tuple[Any, Any]]:
    rows = inputs["rows"][:, 0]
    for done in central.run(case, params, stats, x, inputs["labels"], rows):
        yield (
            done,
            lambda params, stats: central.evaluate(
                case["network"], params, stats, *test, TEST_BATCH
            ),
        )


def _honest(case, params, stats, x, test) -> dict:
    model = networks.build(**case["network"])
    trained = tff.learning.models.ModelWeights(
        weights.to_keras(model.trainable_variables, params),
        weights.to_keras(model.non_trainable_variables, stats),
    )
    recalibrated(model, trained, (x[at : at + BATCH] for at in range(0, len(x), BATCH)))
    model.compile(
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[tf.keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    loss, accuracy = model.evaluate(*test, batch_size=TEST_BATCH, verbose=0)
    images, labels = test
    right = [
        np.argmax(model(images[at : at + BATCH], training=True), axis=-1) == labels[at : at + BATCH]
        for at in range(0, len(labels), BATCH)
    ]
    return {
        "recalibrated/loss": loss,
        "recalibrated/accuracy": accuracy,
        "batch/accuracy": np.concatenate(right).mean(),
    }
