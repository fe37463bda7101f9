"""Interruptible runs: continued, they give the same numbers as if never stopped.

A run's folder is the truth about it: what a point of a sweep has done so far stands in that
point's own folder, in `metrics.jsonl` and `checkpoints/`, just as for a run.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed import checkpoint, distributed, folder, tensorboard
from jaxfed.config import ConfigError
from jaxfed.core.federated import State
from jaxfed.core.model import Variables
from jaxfed.precision import precision
from jaxfed.prepare import Task
from jaxfed.program import Program, replicated, state_like
from jaxfed.run import summarize
from jaxfed.segments import Best, is_over, no_best, segments

SAVE_SECONDS = 60.0
"""After so long the state is saved, unless the user has said when."""


class Start(NamedTuple):
    """Where the points of one program go on."""

    round: int
    """Rounds that are done."""
    state: State | None
    """After them, a leading axis `[points]` on every leaf; None for the initial one."""
    histories: list[list[dict[str, Any]]]
    spent: dict[str, float]
    """Seconds, of the processes before this one."""
    best: Best | None = None
    """The best networks so far; None before the first round."""


class Outcome(NamedTuple):
    """What became of the points of one program."""

    histories: list[list[dict[str, Any]]]
    summaries: list[dict[str, Any]]
    state: State
    """After the last round; a leading axis `[points]` on every leaf."""
    best: Best
    signal: int
    """The signal that ended it, or 0."""


NOTHING_SPENT = {
    "seconds": 0.0, "compile_seconds": 0.0, "train_seconds": 0.0, "evaluate_seconds": 0.0
}  # fmt: skip


def finished(path: Path | None, task: Task) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """History and summary of a run that has nothing left to do, or None."""
    summary = folder.read_summary(path) if path else None
    if path is None or summary is None:
        return None
    history = folder.read_rows(path)
    if summary.get("rounds") == task.experiment.rounds or is_over(task, history):
        return history, summary
    return None


def find_start(tasks: Sequence[Task], paths: Sequence[Path | None], *, resume: bool) -> Start:
    """Where to begin: after the newest state that all points have saved, or at the beginning.

    Raises:
      ConfigError: if what is there is of another experiment, or incomplete.
    """
    homes = [path for path in paths if path]
    found = checkpoint.newest(homes, _saved_like(tasks[0])) if resume and homes else None
    if found is None:
        return Start(0, None, [[] for _ in tasks], NOTHING_SPENT)
    number, saved = found
    histories = [folder.read_rows(home)[:number] for home in homes]
    for home, history in zip(homes, histories, strict=True):
        if len(history) < number and not is_over(tasks[0], history):
            raise ConfigError(
                f"--resume: {home / folder.METRICS} holds {len(history)} rounds, expected "
                f"{number}, as many as the saved state; put it back, or name another --out"
            )
    with precision(tasks[0].experiment):
        state, variables = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(trees for trees, _ in saved)
        )
    notes = [notes for _, notes in saved]
    best = Best(
        np.array([each["best_round"] for each in notes]),
        np.array([np.nan if (s := each["best_score"]) is None else s for each in notes], float),
        variables,
    )
    return Start(number, state, histories, notes[0]["spent"], best)


def _saved_like(task: Task) -> tuple[State, Variables]:
    """Shapes and dtypes of a checkpoint: the state, and the best network so far."""
    state = state_like(task)
    return state, state.variables


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], int]]:
    """Notes SIGINT and SIGTERM instead of dying in the middle of a round; the second one kills.

    What it gives is asked by all processes together, and tells each what any of them has caught.
    """
    caught: list[int] = []

    def note(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: distributed.largest(caught[0] if caught else 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_program(
    program: Program,
    start: Start,
    paths: Sequence[Path | None],
    on_rounds: Callable[[list[dict[str, Any]]], None],
    checkpoint_every: int | None,
    boards: bool,
) -> Outcome:
    """Runs all points of one program, writing their rounds as they come.

    Args:
      program: compiled, for `start.round` rounds done.
      start: where to go on.
      paths: a folder for each point, or None.
      on_rounds: called with the rows of the first point after every dispatch.
      checkpoint_every: rounds between checkpoints; None for every minute.
      boards: also write TensorBoard's files.
    """
    tasks, histories = program.tasks, [list(history) for history in start.histories]
    spent = dict(start.spent)
    spent["seconds"] += program.compile_seconds
    spent["compile_seconds"] += program.compile_seconds
    number, saved, began = start.round, start.round, time.perf_counter()
    last_save = began
    state = program.state
    if start.state is not None:
        with precision(tasks[0].experiment):
            state = replicated(start.state, program.mesh)

    best = start.best or no_best(program.state.variables, len(tasks))

    def save() -> None:
        host = jax.device_get((state, best.variables))
        so_far = {**spent, "seconds": spent["seconds"] + time.perf_counter() - began}
        for point, path in enumerate(paths):
            if path:
                mine = jax.tree.map(lambda leaf, point=point: leaf[point], host)
                score = float(best.score[point])
                notes = {
                    "spent": so_far,
                    "best_round": int(best.round[point]),
                    "best_score": None if np.isnan(score) else score,
                }
                checkpoint.save(path, number, mine, notes)

    for path, history in zip(paths, histories, strict=True):
        if path:
            folder.rewrite_rows(path, history)
            folder.keep_clients(path, number)
    if number:
        on_rounds(histories[0])
    with contextlib.ExitStack() as stack:
        adders = [
            stack.enter_context(tensorboard.board(path)) if boards and path else None
            for path in paths
        ]
        for add, history in zip(adders, histories, strict=True):
            if add:
                add(history)
        stop = stack.enter_context(listening())
        for segment in segments(program, state, histories, number, start.best):
            number, state, best = segment.last_round, segment.state, segment.best
            for history, rows, clients, path, add in zip(
                histories, segment.rows, segment.clients, paths, adders, strict=True
            ):
                history.extend(rows)
                if path:
                    folder.append_clients(path, clients)
                    folder.append_rows(path, rows)
                if add:
                    add(rows)
            spent["train_seconds"] += segment.train_seconds
            spent["evaluate_seconds"] += segment.evaluate_seconds
            on_rounds(segment.rows[0])
            if checkpoint_every:
                due = number % checkpoint_every == 0
            else:
                due = time.perf_counter() - last_save > SAVE_SECONDS
            if due:
                save()
                saved, last_save = number, time.perf_counter()
            if stop():
                break
        if number > saved:
            save()
        caught = stop()
    spent["seconds"] += time.perf_counter() - began
    pairs = zip(tasks, histories, strict=True)
    summaries = [summarize(task, history, spent) for task, history in pairs]
    return Outcome(histories, summaries, state, best, caught)
