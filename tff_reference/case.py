"""One case, from its folder to its trace: `case.json` and `inputs.npz` in, `trace.npz` out.

| in the trace | is |
|---|---|
| `parameters`, `statistics` | names and shapes, as JSON |
| `logits/...`, `loss`, `gradient/...`, `moved/...` | of the first batch, in plain Keras |
| `step/<k>/...` | update by batch k of `walk` alone, from the start minus the updates before it |
| `client/<seat>/...`, `client_weights` | update and weight of every client of the first round |
| `round/<r>/mean/...` | the aggregated update, which the server's optimizer is given |
| `round/<r>/params/...`, `round/<r>/stats/...` | the server's network after round r, from 1 |
| `round/<r>/train/...`, `round/<r>/test/...` | loss, accuracy, num_examples |

An update is weights before minus weights after. All but the first batch comes from TFF's own
processes, or, for central training, from Keras' `train_on_batch` and `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from tff_reference import batches, central, federated, forward, networks, weights

TEST_BATCH = 500


def run(folder: Path) -> None:
    """Computes the trace of the case in `folder`."""
    serve(folder, compute)


def serve(folder: Path, compute: Callable[[dict, dict], dict]) -> None:
    """Writes `compute(case, inputs)` for the case in `folder`, in its type of numbers."""
    case = json.loads((folder / "case.json").read_text())
    with np.load(folder / "inputs.npz") as file:
        inputs = dict(file)
    tf.keras.backend.clear_session()
    tf.keras.backend.set_floatx(case["dtype"])
    trace = compute(case, inputs)
    partial = folder / "trace.tmp.npz"
    np.savez(partial, **{name: np.asarray(value) for name, value in trace.items()})
    partial.replace(folder / "trace.npz")


def compute(case: dict, inputs: dict) -> dict:
    """The trace of a case."""
    params, stats = under(inputs, "params/"), under(inputs, "stats/")
    x = batches.scaled(inputs["images"], case["dtype"])
    y, rows = inputs["labels"], inputs["rows"]
    first = rows[0, 0, 0]
    first = first[first >= 0]
    model = networks.build(**case["network"])
    trace = _shapes(model, params, stats)
    trace.update(forward.run(model, params, stats, x[first], y[first]))
    if case["forward_only"]:
        return trace
    if case["algorithm"] == "central":
        trace.update(_central(case, inputs, params, stats, x, y, rows))
    else:
        trace.update(_federated(case, inputs, model, params, stats, x, y, rows))
    return trace


def under(arrays: dict, prefix: str) -> dict:
    """The arrays whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}


def _shapes(model: tf.keras.Model, params: dict, stats: dict) -> dict:
    found = {
        "parameters": weights.read(model.trainable_variables, params),
        "statistics": weights.read(model.non_trainable_variables, stats),
    }
    return {
        kind: json.dumps({name: array.shape for name, array in sorted(arrays.items())})
        for kind, arrays in found.items()
    }


def _prefixed(prefix: str, arrays: dict) -> dict:
    return {prefix + name: value for name, value in arrays.items()}


def _difference(before: dict, after: dict) -> dict:
    return {name: before[name] - after[name] for name in before}


def _update(alone: federated.Round) -> dict:
    """What the client of a cohort of one sent: the mean, or zero where its weight is zero."""
    return {name: np.where(alone.weight > 0, a, 0) for name, a in alone.mean.items()}


def _federated(case, inputs, model, params, stats, x, y, rows) -> dict:
    process = federated.build(case, model, list(params), list(stats))
    test = batches.dataset(
        batches.scaled(inputs["test_images"], case["dtype"]),
        inputs["test_labels"],
        batches.in_order(len(inputs["test_labels"]), TEST_BATCH),
    )

    def client(table):
        return batches.dataset(x, y, table)

    trace, here = {}, params
    for number, batch in enumerate(inputs["walk"]):
        _, one = process.next(process.start(here, stats), [client(batch[None])])
        trace.update(_prefixed(f"step/{number}/", _update(one)))
        here = _difference(here, _update(one))
    start, weight = process.start(params, stats), []
    for seat, table in enumerate(rows[0]):
        _, alone = process.next(start, [client(table)])
        trace.update(_prefixed(f"client/{seat}/", _update(alone)))
        weight.append(alone.weight)
    trace["client_weights"] = np.asarray(weight)
    state = start
    for number, tables in enumerate(rows, start=1):
        seats = [client(table) for table in tables if (table >= 0).any()]
        state, done = process.next(state, seats)
        here = f"round/{number}/"
        trace.update(_prefixed(here + "mean/", done.mean))
        trace.update(_prefixed(here + "params/", done.params))
        trace.update(_prefixed(here + "stats/", done.stats))
        trace.update(_prefixed(here + "train/", done.metrics))
        scores = process.evaluate(done.params, done.stats, test)
        trace.update(_prefixed(here + "test/", scores))
    return trace


def _central(case, inputs, params, stats, x, y, rows) -> dict:
    test = batches.scaled(inputs["test_images"], case["dtype"]), inputs["test_labels"]
    trace, here = {}, params
    for number, batch in enumerate(inputs["walk"]):
        one = next(central.run(case, here, stats, x, y, batch[None, None]))
        update = _difference(here, one.params)
        trace.update(_prefixed(f"step/{number}/", update))
        here = _difference(here, update)
    for number, done in enumerate(central.run(case, params, stats, x, y, rows[:, 0]), start=1):
        here = f"round/{number}/"
        trace.update(_prefixed(here + "params/", done.params))
        trace.update(_prefixed(here + "stats/", done.stats))
        trace.update(_prefixed(here + "train/", done.metrics))
        scores = central.evaluate(case["network"], done.params, done.stats, *test, TEST_BATCH)
        trace.update(_prefixed(here + "test/", scores))
    return trace
