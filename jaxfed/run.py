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

from jaxfed import data
from jaxfed.config import Experiment
from jaxfed.core.model import Model, Variables
from jaxfed.core.problem import Problem
from jaxfed.prepare import Build, MakeProblem, Task, prepare
from jaxfed.program import compile_tasks
from jaxfed.segments import reached, segments


class Result(NamedTuple):
    """A finished run."""

    experiment: Experiment
    history: list[dict[str, Any]]
    """One dict per round: round, train_loss, test_loss, and so on for every metric."""
    summary: dict[str, Any]
    variables: Variables
    """The server's final weights, with the statistics that were evaluated."""
    problem: Problem
    best: Variables
    """The weights of the round with the best test score, `summary["best_round"]`."""
    clients: list[dict[str, Any]]
    """Who took part: one dict per round and client; `pandas.DataFrame(result.clients)`."""

    def __repr__(self) -> str:
        """One line."""
        score = self.summary["score"]
        return (
            f"Result({self.summary['name']!r}, {self.summary['rounds']} rounds, "
            f"test {score} {self.summary[f'final_test_{score}']})"
        )


def summarize(task: Task, history: list[dict[str, Any]], seconds: dict[str, float]) -> dict:
    """The contents of `summary.json`.

    A run that has diverged has no final result; its weights are those that were last evaluated.
    """
    problem = task.problem
    score = problem.score
    tested = [row for row in history if row[f"test_{score}"] is not None]
    choose = max if problem.maximize else min
    best = choose(tested, key=lambda row: row[f"test_{score}"], default={})
    rounds = history[-1]["round"] if history else 0
    diverged = bool(history) and bool(history[-1]["diverged"])
    final = history[-1] if history and not diverged else {}
    metrics = [key for key in (history[-1] if history else {}) if key.startswith("test_")]
    names = ("jaxfed", "jax", "flax", "optax", "numpy")
    first = [f"test_{score}", "test_loss"]
    return {
        "name": name_of(task.experiment),
        "score": score,
        "maximize": problem.maximize,
        f"final_test_{score}": final.get(f"test_{score}"),
        f"best_test_{score}": best.get(f"test_{score}"),
        "best_round": best.get("round"),
        "final_test_loss": final.get("test_loss"),
        **{f"final_{key}": final.get(key) for key in metrics if key not in first},
        "rounds": rounds,
        "diverged_in_round": rounds if diverged else None,
        "stopped_in_round": rounds if history and reached(task, history[-1]) else None,
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
    build: Build | None = None,
    model: Model | None = None,
    algorithm: Any = None,
    problem: Problem | MakeProblem | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Runs an experiment from beginning to end.

    Args:
      experiment: what to run.
      dataset: your own data instead of `experiment.data.dataset`.
      build: your own NNX module, `rngs -> module`, instead of `experiment.model.name`.
      model: any other network as a `Model(init, apply)`.
      algorithm: your own `Spec`, or its build function `(problem, experiment, federation) ->
        FedAlgorithm`, instead of `experiment.algorithm`.
      problem: your own loss and metrics instead of `experiment.task`: a `Problem`, or a function
        `model -> Problem`.
      on_round: called with every dict of the history.

    Raises:
      ConfigError: if the experiment cannot run. DataError: if its data cannot be used.

    Example:
      >>> from jaxfed import Experiment, ModelConfig, run
      >>> result = run(Experiment(rounds=2, model=ModelConfig(name="logistic")))
      >>> [row["round"] for row in result.history]
      [1, 2]
    """
    task = prepare(
        experiment, dataset=dataset, build=build, model=model, algorithm=algorithm, problem=problem
    )
    started = time.perf_counter()
    program = compile_tasks([task])
    history, clients, variables, best = [], [], None, None
    spent = {"train_seconds": 0.0, "evaluate_seconds": 0.0}
    for segment in segments(program):
        history += segment.rows[0]
        clients += segment.clients[0]
        variables, best = segment.variables, segment.best.variables
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
    final, best = jax.tree.map(lambda leaf: leaf[0], (variables, best))
    summary = summarize(task, history, seconds)
    return Result(task.experiment, history, summary, final, task.problem, best, clients)
