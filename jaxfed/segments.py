"""Running a compiled program: the rounds between two evaluations are a dispatch, a `Segment`."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.federated import ClientReport, Report, State
from jaxfed.core.model import Variables
from jaxfed.precision import precision
from jaxfed.prepare import Task
from jaxfed.program import Program, plans_of, replicated


class Best(NamedTuple):
    """The best evaluated network of every point."""

    round: np.ndarray
    """int [points]; 0: none yet."""
    score: np.ndarray
    """Its test score [points]; NaN: none yet."""
    variables: Variables
    """A leading axis `[points]` on every leaf."""


class Segment(NamedTuple):
    """What one dispatch brought: its rounds, for every point."""

    last_round: int
    rows: list[list[dict[str, Any]]]
    """`[points][rounds]`, as they stand in `metrics.jsonl`; up to the round that it diverged in."""
    state: State
    """Of a point that has diverged, the one that was last evaluated to a number."""
    variables: Variables
    """As they were last evaluated to a number (statistics recalibrated)."""
    best: Best
    clients: list[list[dict[str, Any]]]
    """`[points][clients]`, who took part in the rounds of `rows`; see `participation`."""
    train_seconds: float
    evaluate_seconds: float


def segments(
    program: Program,
    state: State | None = None,
    histories: Sequence[Sequence[dict[str, Any]]] | None = None,
    done: int = 0,
    best: Best | None = None,
) -> Iterator[Segment]:
    """Runs round after round, evaluating where the experiment says so.

    A point that diverges (see `divergence`) or reaches `stop_at` has no more rounds; when that is
    so of all points, the run is over.

    Args:
      program: from `compile_tasks`.
      state: to go on from; None for the initial state.
      histories: rows of the rounds that were run before, for every point.
      done: how many those are.
      best: of those rounds.
    """
    tasks, experiment = program.tasks, program.tasks[0].experiment
    state = good = program.state if state is None else state
    variables = state.variables
    if best is None:
        best = no_best(variables, len(tasks))
    pasts = [list(rows) for rows in histories or [[] for _ in tasks]]
    plans = plans_of(tasks, done + 1, program.length)
    for start in range(done + 1, experiment.rounds + 1, program.length):
        if all(is_over(task, past) for task, past in zip(tasks, pasts, strict=True)):
            return
        with precision(experiment):
            before = time.perf_counter()
            last = start + program.length - 1
            placed, ids = replicated(plans, program.mesh), np.asarray(plans.clients)
            state, metrics = program.train(program.numbers, state, program.train_set, placed)
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
                best = _better(tasks[0], best, rows, last, variables)
        for past, new in zip(pasts, rows, strict=True):
            past.extend(new)
        clients = [
            [
                each
                for place, row in enumerate(new)
                for each in participation(metrics.clients, ids, (point, place), row["round"])
            ]
            for point, new in enumerate(rows)
        ]
        assert state is not None
        yield Segment(
            last, rows, state, variables, best, clients, trained - before, tested - trained
        )


def no_best(variables: Variables, points: int) -> Best:
    """Before the first evaluation."""
    return Best(np.zeros(points, int), np.full(points, np.nan), variables)


def _better(
    task: Task, best: Best, rows: Sequence[Sequence[dict[str, Any]]], number: int,
    variables: Variables,
) -> Best:  # fmt: skip
    """The best networks after an evaluation; of equals, the first."""
    problem = task.problem
    sign = 1 if problem.maximize else -1
    tested = [row[-1][f"test_{problem.score}"] if row else None for row in rows]
    values = np.array([np.nan if value is None else value for value in tested])
    better = ~np.isnan(values) & ~(sign * values <= sign * best.score)
    if not better.any():
        return best
    return Best(
        np.where(better, number, best.round), np.where(better, values, best.score),
        _where(better.tolist(), variables, best.variables),
    )  # fmt: skip


def is_over(task: Task, history: Sequence[dict[str, Any]]) -> bool:
    """Whether a run has diverged, or reached `stop_at`."""
    return bool(history) and (bool(history[-1]["diverged"]) or reached(task, history[-1]))


def reached(task: Task, row: dict[str, Any]) -> bool:
    """Whether the score of a round is what the experiment stops at."""
    goal = task.experiment.stop_at
    if goal is None:
        return False
    problem = task.problem
    value = row[f"test_{problem.score}"]
    if value is None:
        return False
    return value >= goal if problem.maximize else value <= goal


def participation(
    reports: ClientReport, ids: np.ndarray, at: tuple[int, int], number: int
) -> list[dict[str, Any]]:
    """Who took part in a round: one dict per client, with the means of its training metrics.

    Args:
      reports: of a dispatch, `[points, rounds, clients]`.
      ids: the clients' ids, likewise.
      at: point and round.
      number: of the round.
    """
    names = _ordered(reports.metrics)
    return [
        {
            "round": number,
            "client": int(id_),
            "examples": int(reports.num_examples[at][seat]),
            **{name: _mean(reports.metrics[name], (*at, seat)) for name in names},
            "drift": _number(reports.drift[at][seat]),
            "dropped": int(reports.dropped[at][seat]),
        }
        for seat, id_ in enumerate(ids[at])
        if id_ >= 0
    ]


def _rows(
    task: Task,
    past: Sequence[dict[str, Any]],
    metrics: Report,
    scores: Any,
    point: int,
    rounds: range,
    seconds: float,
) -> list[dict[str, Any]]:
    """The rows of a dispatch, up to the one in which the run diverged; none if it had before."""
    rows: list[dict[str, Any]] = []
    if is_over(task, past):
        return rows
    for place, number in enumerate(rounds):
        tested = scores if number == rounds[-1] else None
        rows.append(_row(metrics, tested, point, place, number, seconds))
        finite = bool(metrics.finite[point, place])
        reason = divergence(task, [*past, *rows], finite=finite, tested=tested is not None)
        rows[-1]["diverged"] = reason
        if reason:  # what may have been evaluated is the state before
            rows[-1] |= {key: None for key in rows[-1] if key.startswith("test_")}
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
    metrics: Report, scores: Any, point: int, place: int, number: int, seconds: float
) -> dict[str, Any]:
    at = (point, place)
    tested: dict[str, float | None] = dict.fromkeys(_ordered(metrics.metrics))
    # argmax of NaN logits is class 0, so accuracy would be meaningless without a finite loss.
    if scores is not None and np.isfinite(scores["loss"][point]):
        tested = {name: _number(scores[name][point]) for name in tested}
    return {
        "round": number,
        **{f"train_{name}": _mean(metrics.metrics[name], at) for name in tested},
        **{f"test_{name}": value for name, value in tested.items()},
        "num_examples": int(metrics.num_examples[at]),
        "seconds": round(seconds, 6),
        "dropped_clients": int(metrics.dropped[at]),
        "delta_norm": _number(metrics.delta_norm[at]),
        "client_delta_norm": _drift(metrics, at),
        **{name: _number(value[at]) for name, value in metrics.measurements.items()},
    }


def _ordered(metrics: Iterable[str]) -> list[str]:
    """The loss first; jit has sorted the names."""
    return list(dict.fromkeys(["loss", *metrics]))


def _drift(metrics: Report, at: tuple[int, int]) -> float | None:
    """Mean norm of one client's update, over those that took part and were not dropped."""
    clients = metrics.clients
    kept = (clients.num_examples[at] > 0) & ~clients.dropped[at]
    return _number(np.mean(clients.drift[at][kept])) if kept.any() else None


def _mean(mean: Any, at: tuple[int, ...]) -> float | None:
    count = mean.count[at]
    return _number(mean.total[at] / count) if count else None


def _number(value: Any) -> float | None:
    """A float for JSON, which has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None
