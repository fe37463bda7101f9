"""The front door: `python -m jaxfed.train`.

Exit codes: 0 done; 1 the run failed; 2 bad input; 130 or 143 interrupted, state saved.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from jaxfed import folder, manual, report, saved, screen, tensorboard
from jaxfed.algorithm import State
from jaxfed.data import DataError, format_label_table, label_table
from jaxfed.experiment import ConfigError, Experiment, from_json, to_json
from jaxfed.prepare import Task, precision, prepare
from jaxfed.program import Final, Program, compile_tasks, finish, segments
from jaxfed.run import summarize
from jaxfed.sweep import Point, folder_name, points, programs


@dataclass(frozen=True)
class Command:
    """Trains a network by federated averaging, many clients at once."""

    experiment: tyro.conf.FlagConversionOff[Annotated[Experiment, tyro.conf.arg(name="")]] = field(
        default_factory=Experiment
    )
    config: Path | None = None
    """JSON file of an experiment; flags win over it."""
    sweep: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """key=value,value,... runs every combination; may be repeated."""
    out: Path | None = None
    """Folder for the results (default: none are written)."""
    resume: bool = False
    """Go on with the run that is in --out."""
    checkpoint_every: int | None = None
    """Save the state every so many rounds (default: at the end, and when interrupted)."""
    tensorboard: bool = False
    """Also write the rounds to OUT/tensorboard as they come (needs the extra tensorboard)."""
    labels: bool = False
    """Print how many images of each class every client holds, and stop."""
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the datasets, partitions, models, optimizers and algorithms there are, and stop."""
    quiet: bool = False
    """Print nothing but errors."""


class Outcome(NamedTuple):
    """What became of the points of one program."""

    histories: list[list[dict[str, Any]]]
    summaries: list[dict[str, Any]]
    state: State
    """After the last round."""
    signal: int
    """The signal that ended it, or 0."""


def parse(arguments: Sequence[str]) -> Command:
    """Reads the command line.

    Raises:
      ConfigError: for a flag or a value that is not understood.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="?")
    known, _ = early.parse_known_args(arguments)
    base = from_json(known.config) if known.config else Experiment()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                Command, prog="python -m jaxfed.train", args=list(arguments),
                default=Command(experiment=base), use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:
            raise
        _, _, text = errors.getvalue().partition("\n")  # the first line is a box's title
        text = re.sub(r"[╭╮╰╯─│\s]+", " ", text)
        text = re.sub(r" For full helptext,.*", "", text).strip()
        raise ConfigError(f"{text}; see python -m jaxfed.train --help") from None


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], int]]:
    """Notes SIGINT and SIGTERM instead of dying in the middle of a round; the second one kills."""
    caught: list[int] = []

    def note(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_program(
    program: Program,
    home: Path | None,
    folders: Sequence[Path | None],
    on_rounds: Callable[[list[dict[str, Any]]], None],
    *,
    resume: bool,
    checkpoint_every: int | None,
    boards: bool,
) -> Outcome:
    """Runs all points of one program, writing their rounds as they come.

    Args:
      program: compiled.
      home: folder of the checkpoints, or None to write nothing.
      folders: one for each point, or None.
      on_rounds: called with the rows of the first point after every dispatch.
      resume: go on from the newest checkpoint.
      checkpoint_every: rounds between checkpoints.
      boards: also write TensorBoard's files.
    """
    tasks = program.tasks
    histories: list[list[dict[str, Any]]] = [[] for _ in tasks]
    started, spent = time.perf_counter(), {"train_seconds": 0.0, "evaluate_seconds": 0.0}
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(folder.checkpoints(home)) if home else None
        with precision(tasks[0].experiment):  # or float64 comes back as float32
            found = folder.restore(manager, program.state) if manager and resume else None
        last_round, state = found or (0, program.state)
        for point, path in enumerate(folders):
            if path:
                histories[point] = folder.read_rows(path, last_round)
                folder.rewrite_rows(path, histories[point])
        if last_round:
            on_rounds(histories[0])
        adders = [
            stack.enter_context(tensorboard.board(path)) if boards and path else None
            for path in folders
        ]
        for add, history in zip(adders, histories, strict=True):
            if add:
                add(history)
        stop = stack.enter_context(listening())
        for segment in segments(program, state, last_round + 1):
            last_round, state = segment.rows[0][-1]["round"], segment.state
            pairs = zip(histories, segment.rows, folders, adders, strict=True)
            for history, rows, path, add in pairs:
                history.extend(rows)
                if path:
                    folder.append_rows(path, rows)
                if add:
                    add(rows)
            spent["train_seconds"] += segment.train_seconds
            spent["evaluate_seconds"] += segment.evaluate_seconds
            on_rounds(segment.rows[0])
            if manager and checkpoint_every and last_round % checkpoint_every == 0:
                folder.save(manager, last_round, state)
            if stop() or all(_diverged(history) for history in histories):
                break
        if manager and last_round:
            folder.save(manager, last_round, state)
        caught = stop()
    seconds = {
        "seconds": program.compile_seconds + time.perf_counter() - started,
        "compile_seconds": program.compile_seconds,
        **spent,
    }
    pairs = zip(tasks, histories, strict=True)
    summaries = [summarize(task, history, seconds) for task, history in pairs]
    return Outcome(histories, summaries, state, caught)


def _diverged(history: list[dict[str, Any]]) -> bool:
    """True if the newest evaluation gave no number."""
    tested = [row for row in history if row["test_accuracy"] is not None]
    return bool(tested) and tested[-1]["test_loss"] is None


def write_results(
    path: Path, task: Task, history: list[dict[str, Any]], summary: dict[str, Any], final: Final
) -> None:
    """Writes what is made at the end: `summary.json`, the weights, the clients, the pictures."""
    folder.write_json(path / folder.SUMMARY, summary)
    saved.write_weights(path / saved.WEIGHTS, final.variables)
    table = label_table(task.partition, task.dataset.y_train, task.dataset.num_classes)
    rows = saved.client_rows(
        task.partition.sizes, table, final.clients.accuracy, final.clients.loss
    )
    folder.write_csv(path / saved.CLIENTS, rows)
    # From the files, so that a page can be made again from a folder, and is the same.
    folder.write_atomically(path / "report.html", report.run_page(saved.load_run(path)))
    folder.write_atomically(path / "curves.png", report.curves_png({summary["name"]: history}))


def write_sweep(home: Path, base: Experiment, runs: Sequence[report.SweepPoint]) -> None:
    """Writes the files that compare the points of a sweep."""
    rows = [{**run.changes, **_flat(run.summary)} for run in runs]
    folder.write_csv(home / "sweep.csv", rows)
    folder.write_atomically(home / "report.html", report.sweep_page(base, runs))
    curves = {run.label: run.history for run in runs}
    folder.write_atomically(home / "curves.png", report.curves_png(curves))


def train(command: Command, console: Console) -> int:
    """Carries out a command and returns its exit code.

    Raises:
      ConfigError, DataError: for bad input.
    """
    if command.resume and command.out is None:
        raise ConfigError("--resume: got no --out, expected the folder of the run to go on with")
    if command.checkpoint_every is not None and command.checkpoint_every < 1:
        raise ConfigError(f"--checkpoint_every: got {command.checkpoint_every}, expected 1 or more")
    if command.checkpoint_every and command.out is None:
        raise ConfigError("--checkpoint_every: got no --out, expected a folder to save in")
    if command.tensorboard:
        tensorboard.require()
        if command.out is None:
            raise ConfigError("--tensorboard: got no --out, expected a folder to write in")
    todo = points(command.experiment, command.sweep)
    with screen.host_work(console) as progress:
        tasks = _prepare_all(todo, progress)
    if command.labels:
        first = tasks[0]
        table = label_table(first.partition, first.dataset.y_train, first.dataset.num_classes)
        console.print(format_label_table(table), highlight=False, soft_wrap=True)
        return 0
    groups = programs([task.experiment for task in tasks])
    screen.header(console, tasks[0], len(todo), len(groups))
    folders = _folders(command, todo, tasks)
    total = sum(tasks[group[0]].experiment.rounds for group in groups)
    outcomes: dict[int, tuple[list, dict]] = {}
    caught, done = 0, 0
    with screen.rounds_bar(console, total) as update:
        for number, group in enumerate(groups):
            members = [tasks[i] for i in group]
            update(done, None)
            program = compile_tasks(members, command.checkpoint_every)
            home = command.out
            if home and command.sweep:
                home = home / folder.CHECKPOINTS / f"program_{number:03d}"

            def on_rounds(rows: list[dict[str, Any]], before: int = done) -> None:
                for row in rows:
                    update(before + row["round"], row)

            outcome = run_program(
                program, home, [folders[i] for i in group], on_rounds,
                resume=command.resume, checkpoint_every=command.checkpoint_every,
                boards=command.tensorboard,
            )  # fmt: skip
            done += members[0].experiment.rounds
            for i, history, summary in zip(
                group, outcome.histories, outcome.summaries, strict=True
            ):
                outcomes[i] = (history, summary)
            if home:
                for i, final in zip(group, finish(program, outcome.state), strict=True):
                    path, (history, summary) = folders[i], outcomes[i]
                    assert path is not None
                    write_results(path, tasks[i], history, summary, final)
            caught = outcome.signal
            if caught:
                break
    finished = [(i, *outcomes[i]) for i in sorted(outcomes)]
    rows = [{**todo[i].changes, **_short(summary)} for i, _, summary in finished]
    if command.out and command.sweep:
        runs = [
            report.SweepPoint(todo[i].changes, tasks[i].experiment, history, summary)
            for i, history, summary in finished
        ]
        write_sweep(command.out, command.experiment, runs)
    screen.results(console, rows)
    if command.out:
        console.print(f"results in {command.out}", highlight=False)
    if caught:
        saved = (
            f"state saved, go on with --out {command.out} --resume"
            if command.out
            else "not saved (no --out)"
        )
        print(
            f"jaxfed: interrupted after round {finished[-1][2]['rounds']}; {saved}", file=sys.stderr
        )
        return 128 + caught
    failed = [i for i, history, _ in finished if _diverged(history)]
    for i in failed:
        history = outcomes[i][0]
        print(
            f"jaxfed: {_label(todo[i])}: the loss is not finite after round "
            f"{history[-1]['round']}; lower --client.lr or --server.lr",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _prepare_all(todo: Sequence[Point], progress: Callable[[str, int, int], None]) -> list[Task]:
    """Prepares all points, reading a dataset once for those that share it."""
    first = prepare(todo[0].experiment, progress=progress)
    tasks = [first]
    for point in todo[1:]:
        config, ours = point.experiment.data, first.experiment.data
        same = (config.dataset, config.image_size) == (ours.dataset, ours.image_size)
        shared = (
            first.dataset
            if same and point.experiment.model.name == first.experiment.model.name
            else None
        )
        tasks.append(prepare(point.experiment, dataset=shared, progress=progress))
    return tasks


def _folders(command: Command, todo: Sequence[Point], tasks: Sequence[Task]) -> list[Path | None]:
    if command.out is None:
        return [None] * len(todo)
    if not command.sweep:
        folder.begin(command.out, tasks[0].experiment, resume=command.resume)
        return [command.out]
    paths = [command.out / folder_name(i, point.changes) for i, point in enumerate(todo)]
    for path, task in zip(paths, tasks, strict=True):
        folder.begin(path, task.experiment, resume=command.resume)
    config = to_json(dataclasses.replace(command.experiment))
    folder.write_atomically(command.out / folder.CONFIG, config)
    return list(paths)


def _label(point: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in point.changes.items()) or "run"


def _short(summary: dict[str, Any]) -> dict[str, Any]:
    keys = ("final_test_accuracy", "best_test_accuracy", "rounds", "seconds", "compile_seconds")
    return {key: summary[key] for key in keys}


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    versions = " ".join(f"{name}={version}" for name, version in summary["versions"].items())
    return {**summary, "versions": versions}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, and turns every foreseen failure into one line and an exit code."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        asks_help = bool({"-h", "--help"} & set(given))
        command = Command() if asks_help else parse(given)
        if asks_help or command.list_:
            width = manual.terminal_width()
            print(
                manual.help_text(command, width) if asks_help else manual.list_text(width), end=""
            )
            return 0
        return train(command, Console(quiet=command.quiet))
    except (ConfigError, DataError) as error:
        print(f"jaxfed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxfed: interrupted before the first round; nothing to save", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, head perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"jaxfed: {error}; the files written before are whole", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
