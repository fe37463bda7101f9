"""A whole run: prepare, compile, run, sum up.

prepare(experiment) -> Task             refuses what cannot work
compile_tasks([task]) -> Program        once
segments(program) -> Segment, ...       round after round
run(experiment) -> Result               all of it
"""

import importlib.metadata
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxfed import data
from jaxfed.experiment import Experiment
from jaxfed.model import Model, Variables
from jaxfed.prepare import MakeAlgorithm, Task, prepare
from jaxfed.program import compile_tasks
from jaxfed.segments import segments


class Result(NamedTuple):
    """A finished run."""

    experiment: Experiment
    history: list[dict[str, Any]]
    """One row a round: round, train_loss, train_accuracy, test_loss, test_accuracy, ..."""
    summary: dict[str, Any]
    variables: Variables
    """The server's final weights, with the statistics that were evaluated."""
    model: Model


def summarize(task: Task, history: list[dict[str, Any]], seconds: dict[str, float]) -> dict:
    """The contents of `summary.json`.

    A run that has diverged has no final result; its weights are those that were last evaluated.
    """
    tested = [row["test_accuracy"] for row in history if row["test_accuracy"] is not None]
    rounds = history[-1]["round"] if history else 0
    diverged = bool(history) and bool(history[-1]["diverged"])
    final = history[-1] if history and not diverged else {}
    names = ("jaxfed", "jax", "flax", "optax", "numpy")
    return {
        "name": name_of(task.experiment),
        "final_test_accuracy": final.get("test_accuracy"),
        "best_test_accuracy": max(tested, default=None),
        "final_test_loss": final.get("test_loss"),
        "rounds": rounds,
        "diverged_in_round": rounds if diverged else None,
        "weights_of_round": last_tested(history) if diverged else rounds,
        "dropped_clients": sum(row["dropped_clients"] for row in history),
        **{key: round(value, 3) for key, value in seconds.items()},
        "device": device_name(),
        "parameters": task.parameters,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def last_tested(history: list[dict[str, Any]]) -> int:
    """The last round that was evaluated to a number; 0 if there is none."""
    return max((row["round"] for row in history if row["test_loss"] is not None), default=0)


def name_of(experiment: Experiment) -> str:
    """The experiment's name, or one made from its dataset and model."""
    config = experiment.data
    return experiment.name or f"{config.dataset} {config.partition} {experiment.model.name}"


def device_name() -> str:
    """For example `cpu x1 (cpu)` or `gpu x1 (NVIDIA H200)`."""
    devices = jax.devices()
    return f"{devices[0].platform} x{len(devices)} ({devices[0].device_kind})"


def run(
    experiment: Experiment,
    *,
    dataset: data.Dataset | None = None,
    build: Callable[[nnx.Rngs], nnx.Module] | None = None,
    model: Model | None = None,
    algorithm: MakeAlgorithm | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Runs an experiment from beginning to end.

    Args:
      experiment: what to run.
      dataset: your own images instead of `experiment.data.dataset`.
      build: your own NNX module, `rngs -> module`, instead of `experiment.model.name`.
      model: any other network as a `Model(init, apply)`.
      algorithm: your own, `(model, mesh) -> FedAlgorithm`, instead of `experiment.algorithm`.
      on_round: called with every row of the history.

    Raises:
      ConfigError: if the experiment cannot run. DataError: if its data cannot be used.

    Example:
      >>> from jaxfed import Experiment, ModelConfig, run
      >>> result = run(Experiment(rounds=2, model=ModelConfig(name="logistic")))
      >>> [row["round"] for row in result.history]
      [1, 2]
    """
    task = prepare(experiment, dataset=dataset, build=build, model=model, algorithm=algorithm)
    started = time.perf_counter()
    program = compile_tasks([task])
    history, variables = [], None
    spent = {"train_seconds": 0.0, "evaluate_seconds": 0.0}
    for segment in segments(program):
        history += segment.rows[0]
        variables = segment.variables
        spent["train_seconds"] += segment.train_seconds
        spent["evaluate_seconds"] += segment.evaluate_seconds
        if on_round:
            for row in segment.rows[0]:
                on_round(row)
    seconds = {
        "seconds": time.perf_counter() - started,
        "compile_seconds": program.compile_seconds,
        **spent,
    }
    final = jax.tree.map(lambda leaf: leaf[0], variables)
    return Result(task.experiment, history, summarize(task, history, seconds), final, task.model)
