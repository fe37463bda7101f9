"""What each optimizer of TFF and of Keras makes of the same gradients.

`python -m tff_reference.optimizer_table FOLDER`, in TFF's environment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from tff_reference.optimizers import LIBRARIES, optimizer

Leaves = dict[str, np.ndarray]


def run(folder: Path) -> None:
    """Reads FOLDER/inputs.npz, writes FOLDER/trace.npz.

    inputs.npz: `lr` and `momentum`, and for each leaf `weights/<leaf>`, of the shape of the leaf,
    and `gradients/<leaf>` [steps, ...].
    trace.npz: `<library>/<optimizer>/<leaf>` [steps, ...], the weights after each step.
    """
    with np.load(folder / "inputs.npz") as inputs:
        lr, momentum = float(inputs["lr"]), float(inputs["momentum"])
        names = [key.partition("/")[2] for key in inputs.files if key.startswith("weights/")]
        weights = {name: inputs[f"weights/{name}"] for name in names}
        gradients = {name: inputs[f"gradients/{name}"] for name in names}
    tf.keras.backend.set_floatx(str(weights[names[0]].dtype))
    traces = {
        f"{library}/{name}/{leaf}": steps
        for library, table in LIBRARIES.items()
        for name in table
        for leaf, steps in PATHS[library](
            optimizer(name, lr, momentum, library), weights, gradients
        ).items()
    }
    np.savez(folder / "trace.npz", **traces)


def tff_path(tff_optimizer, weights: Leaves, gradients: Leaves) -> Leaves:
    """The weights after each step [steps, ...] of a `tff.learning.optimizers.Optimizer`."""
    current = {name: tf.constant(value) for name, value in weights.items()}
    state = tff_optimizer.initialize(tf.nest.map_structure(tf.TensorSpec.from_tensor, current))
    path = []
    for step in range(_steps(gradients)):
        now = {name: tf.constant(values[step]) for name, values in gradients.items()}
        state, current = tff_optimizer.next(state, current, now)
        path.append({name: value.numpy() for name, value in current.items()})
    return _stacked(path)


def keras_path(make: Callable, weights: Leaves, gradients: Leaves) -> Leaves:
    """The weights after each step [steps, ...] of the Keras optimizer that `make()` gives."""
    variables = {name: tf.Variable(value, name=name) for name, value in weights.items()}
    keras_optimizer = make()
    path = []
    for step in range(_steps(gradients)):
        pairs = [(tf.constant(gradients[name][step]), v) for name, v in variables.items()]
        keras_optimizer.apply_gradients(pairs)
        path.append({name: variable.numpy() for name, variable in variables.items()})
    return _stacked(path)


PATHS = {"tff": tff_path, "keras": keras_path}


def _steps(gradients: Leaves) -> int:
    return len(next(iter(gradients.values())))


def _stacked(path: list[Leaves]) -> Leaves:
    return {name: np.stack([step[name] for step in path]) for name in path[0]}


if __name__ == "__main__":
    run(Path(sys.argv[1]))
