"""Running a compiled program: the rounds between two evaluations are a dispatch, a `Segment`."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.algorithm import RoundMetrics, State
from jaxfed.model import Variables
from jaxfed.prepare import Task, precision
from jaxfed.program import Program, plans_of, replicated


class Segment(NamedTuple):
    """What one dispatch brought: its rounds, for every point."""

    last_round: int
    rows: list[list[dict[str, Any]]]
    """`[points][rounds]`, as they stand in `metrics.jsonl`; up to the round that it diverged in."""
    state: State
    """Of a point that has diverged, the one that was last evaluated to a number."""
    variables: Variables
    """As they were last evaluated to a number (statistics recalibrated)."""
    train_seconds: float
    evaluate_seconds: float


def segments(
    program: Program,
    state: State | None = None,
    histories: Sequence[Sequence[dict[str, Any]]] | None = None,
    done: int = 0,
) -> Iterator[Segment]:
    """Runs round after round, evaluating where the experiment says so.

    A point that diverges (see `divergence`) has no more rounds; when all have, it is over.

    Args:
      program: from `compile_tasks`.
      state: to go on from; None for the initial state.
      histories: rows of the rounds that were run before, for every point.
      done: how many those are.
    """
    tasks, experiment = program.tasks, program.tasks[0].experiment
    state = good = program.state if state is None else state
    variables = state.variables
    pasts = [list(rows) for rows in histories or [[] for _ in tasks]]
    plans = plans_of(tasks, done + 1, program.length)
    for start in range(done + 1, experiment.rounds + 1, program.length):
        if all(_is_over(past) for past in pasts):
            return
        with precision(experiment):
            before = time.perf_counter()
            last = start + program.length - 1
            placed = replicated(plans, program.mesh)
            state, metrics = program.train(program.knobs, state, program.train_set, placed)
            if last < experiment.rounds:  # the next rounds are planned while these are computed
                plans = plans_of(tasks, last + 1, program.length)
            metrics = jax.device_get(metrics)
            trained = time.perf_counter()
            scores, evaluated = None, variables
            if last % experiment.eval_every == 0 or last == experiment.rounds:
                scores, evaluated = program.evaluate(
                    state, program.test_set, program.test_index,
                    program.train_set, program.train_index,
                )  # fmt: skip
                scores = jax.device_get(scores)
            tested = time.perf_counter()
            seconds = (trained - before) / program.length
            rows = [
                _rows(task, past, metrics, scores, point, range(start, last + 1), seconds)
                for point, (task, past) in enumerate(zip(tasks, pasts, strict=True))
            ]
            alive = [bool(new) and not new[-1]["diverged"] for new in rows]
            if not all(alive):
                state, evaluated = _where(alive, (state, evaluated), (good, variables))
            variables = evaluated
            if scores is not None:
                good = state
        for past, new in zip(pasts, rows, strict=True):
            past.extend(new)
        assert state is not None
        yield Segment(last, rows, state, variables, trained - before, tested - trained)


def _is_over(history: Sequence[dict[str, Any]]) -> bool:
    return bool(history) and bool(history[-1]["diverged"])


def _rows(
    task: Task,
    past: Sequence[dict[str, Any]],
    metrics: RoundMetrics,
    scores: Any,
    point: int,
    rounds: range,
    seconds: float,
) -> list[dict[str, Any]]:
    """The rows of a dispatch, up to the one in which the run diverged; none if it had before."""
    rows: list[dict[str, Any]] = []
    if _is_over(past):
        return rows
    for place, number in enumerate(rounds):
        tested = scores if number == rounds[-1] else None
        rows.append(_row(metrics, tested, point, place, number, seconds))
        finite = bool(metrics.finite[point, place])
        reason = divergence(task, [*past, *rows], finite=finite, tested=tested is not None)
        rows[-1]["diverged"] = reason
        if reason:  # what may have been evaluated is the state before
            rows[-1] |= {"test_loss": None, "test_accuracy": None}
            break
    return rows


def divergence(
    task: Task, history: Sequence[dict[str, Any]], *, finite: bool, tested: bool
) -> str | None:
    """Why a run ends with the newest row of its history, or None if it need not.

    A client that is dropped, or a whole cohort, is no reason: the state stays as it was, and the
    next cohort may do better. It is one when as many seats as there are clients gave nothing.

    Args:
      task: of the run.
      history: its rows so far.
      finite: whether the newest round gave a finite state.
      tested: whether that was evaluated.
    """
    experiment, row = task.experiment, history[-1]
    if not finite:
        return "the new weights are not finite"
    if tested and row["test_loss"] is None:
        return "the test loss is not finite"
    empty = 0
    for each in reversed(history):
        if each["num_examples"] or not each["dropped_clients"]:
            break
        empty += 1
    if empty and empty * (experiment.clients_per_round or 1) >= task.partition.num_clients:
        return f"no client's update was finite in {empty} round(s)"
    return None


def _where(alive: Sequence[bool], new: Any, old: Any) -> Any:
    """Of every leaf `[points, ...]` the new rows of the points that are alive."""
    mask = np.asarray(alive)
    return jax.tree.map(
        lambda n, o: jnp.where(mask.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old
    )


def _row(
    metrics: RoundMetrics, scores: Any, point: int, place: int, number: int, seconds: float
) -> dict[str, Any]:
    at = (point, place)
    loss = None if scores is None else _number(scores.loss[point])
    # The class of NaN is 0, right one time in ten: a number that says nothing.
    accuracy = _number(scores.accuracy[point]) if scores is not None and loss is not None else None
    return {
        "round": number,
        "train_loss": _number(metrics.train_loss[at]),
        "train_accuracy": _number(metrics.train_accuracy[at]),
        "test_loss": loss,
        "test_accuracy": accuracy,
        "num_examples": int(metrics.num_examples[at]),
        "seconds": round(seconds, 6),
        "dropped_clients": int(metrics.dropped[at]),
        "delta_norm": _number(metrics.delta_norm[at]),
        "client_delta_norm": _client_mean(metrics, at),
    }


def _client_mean(metrics: RoundMetrics, at: tuple[int, int]) -> float | None:
    """Mean norm of one client's update, over those that took part and were not dropped."""
    clients = metrics.clients
    kept = (clients.num_examples[at] > 0) & ~clients.dropped[at]
    return _number(np.mean(clients.delta_norm[at][kept])) if kept.any() else None


def _number(value: Any) -> float | None:
    """A float for JSON, which has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None
