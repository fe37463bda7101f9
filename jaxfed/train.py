"""The front door: `python -m jaxfed.train`.

Exit codes: 0 done; 1 the run failed; 2 bad input; 130 or 143 interrupted, state saved.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from jaxfed import folder, report, screen
from jaxfed.data import DataError, format_label_table, label_table
from jaxfed.experiment import ConfigError, Experiment, dotted_keys, expected, from_json
from jaxfed.prepare import Task, prepare
from jaxfed.program import compile_tasks
from jaxfed.resume import find_start, finished, run_program
from jaxfed.run import name_of
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
    """Save the state every so many rounds (default: every minute); always at the end."""
    labels: bool = False
    """Print how many images of each class every client holds, and stop."""
    quiet: bool = False
    """Print nothing but errors."""


def parse(arguments: Sequence[str]) -> Command:
    """Reads the command line.

    Raises:
      ConfigError: for a flag or a value that is not understood.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="?")
    known, _ = early.parse_known_args(arguments)
    base = Experiment() if known.config is None else from_json(known.config)
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
        raise _refusal(errors.getvalue(), list(arguments)) from None


def _refusal(text: str, arguments: list[str]) -> ConfigError:
    """One line instead of a box."""
    _, _, text = text.partition("\n")  # the first line is the box's title
    text = re.sub(r"[╭╮╰╯─│\s]+|-{5,}", " ", text)
    text = re.sub(r" (Argument helptext:|For full helptext,).*", "", text).strip()
    flag = next(iter(re.findall(r"--([\w.]+)", text)), "")
    if flag in dotted_keys() and f"--{flag}" in arguments:
        given = arguments[arguments.index(f"--{flag}") + 1 :][:1]
        got = repr(given[0]) if given and not given[0].startswith("--") else "nothing"
        wanted = expected(flag).replace("true or false", "True or False").replace("null", "None")
        return ConfigError(f"--{flag}: got {got}, expected {wanted}")
    if unknown := re.match(r"Unrecognized options: --([\w.-]+)", text):
        near = difflib.get_close_matches(unknown[1], dotted_keys(), n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}?" if near else "see python -m jaxfed.train --help"
        return ConfigError(f"--{unknown[1]}: unknown flag; {hint}")
    return ConfigError(f"{text}; see python -m jaxfed.train --help")


def write_results(
    path: Path, task: Task, history: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Writes what is made at the end: `curves.png`, `report.html`, `summary.json`."""
    title = name_of(task.experiment)
    folder.write_atomically(path / "curves.png", report.curves_png({title: history}))
    shown = {key: value for key, value in summary.items() if key != "versions"}
    page = report.report_html(title, {title: history}, [shown], task.experiment)
    folder.write_atomically(path / "report.html", page)
    folder.write_json(path / folder.SUMMARY, summary)  # the last: it says that all is done


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
    if command.resume and command.out and not (command.out / folder.CONFIG).exists():
        raise ConfigError(
            f"--resume: got --out {str(command.out)!r}, which holds no run; leave --resume out to "
            "start one"
        )
    todo = points(command.experiment, command.sweep)
    with screen.host_work(console) as progress:
        tasks = _prepare_all(todo, progress)
    if command.labels:
        first = tasks[0]
        table = label_table(first.partition, first.dataset.y_train, first.dataset.num_classes)
        console.print(format_label_table(table), highlight=False, soft_wrap=True)
        return 0
    with folder.locked(command.out) if command.out else contextlib.nullcontext():
        return _run(command, console, todo, tasks)


def _run(command: Command, console: Console, todo: Sequence[Point], tasks: Sequence[Task]) -> int:
    folders = _folders(command, todo, tasks)
    groups = programs([task.experiment for task in tasks])
    screen.header(console, tasks[0], len(todo), len(groups))
    total = sum(tasks[group[0]].experiment.rounds for group in groups)
    outcomes: dict[int, tuple[list, dict]] = {}
    caught, done = 0, 0
    with screen.rounds_bar(console, total) as update:
        for group in groups:
            members, homes = [tasks[i] for i in group], [folders[i] for i in group]
            rounds = members[0].experiment.rounds
            old = [
                finished(home, task.experiment) for home, task in zip(homes, members, strict=True)
            ]
            if all(old):
                outcomes |= {i: one for i, one in zip(group, old, strict=True) if one}
                done += rounds
                continue
            update(done, None)
            start = find_start(members, homes, resume=command.resume)
            program = compile_tasks(members, command.checkpoint_every, start.round)

            def on_rounds(rows: list[dict[str, Any]], before: int = done) -> None:
                for row in rows:
                    update(before + row["round"], row)

            outcome = run_program(program, start, homes, on_rounds, command.checkpoint_every)
            done += rounds
            for i, history, summary in zip(
                group, outcome.histories, outcome.summaries, strict=True
            ):
                outcomes[i] = (history, summary)
                if path := folders[i]:
                    write_results(path, tasks[i], history, summary)
            caught = outcome.signal
            if caught:
                break
    ended = [(i, *outcomes[i]) for i in sorted(outcomes)]
    rows = [{**todo[i].changes, **_short(summary)} for i, _, summary in ended]
    if command.out and command.sweep:
        folder.write_csv(
            command.out / "sweep.csv",
            [{**todo[i].changes, **_flat(summary)} for i, _, summary in ended],
        )
        curves = {_label(todo[i]): history for i, history, _ in ended}
        folder.write_atomically(command.out / "curves.png", report.curves_png(curves))
        page = report.report_html("sweep", curves, rows, tasks[0].experiment)
        folder.write_atomically(command.out / "report.html", page)
    screen.results(console, rows)
    for i, history, _ in ended:
        for line in _dropped(_label(todo[i]), history):
            console.print(line, highlight=False)
    if command.out:
        console.print(f"results in {command.out}", highlight=False)
    if caught:
        saved = (
            f"state saved, go on with --out {command.out} --resume"
            if command.out
            else "not saved (no --out)"
        )
        print(f"jaxfed: interrupted after round {ended[-1][2]['rounds']}; {saved}", file=sys.stderr)
        return 128 + caught
    failed = [(i, history[-1], summary) for i, history, summary in ended if _failed(summary)]
    for i, row, summary in failed:
        print(
            f"jaxfed: {_label(todo[i])}: diverged in round {row['round']}: {row['diverged']}; the "
            f"weights of round {summary['weights_of_round']} are kept; lower --client.lr or "
            "--server.lr, or look at the data",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _failed(summary: dict[str, Any]) -> bool:
    return summary["diverged_in_round"] is not None


def _dropped(label: str, history: list[dict[str, Any]]) -> list[str]:
    """What is to be said of clients whose updates were not finite: at most a line."""
    rounds = [row["round"] for row in history if row["dropped_clients"]]
    if not rounds:
        return []
    clients = sum(row["dropped_clients"] for row in history)
    empty = sum(row["dropped_clients"] > 0 and row["num_examples"] == 0 for row in history)
    unchanged = f"; {empty} of them had no other and changed nothing" if empty else ""
    return [
        f"{label}: {clients} client update(s) were not finite and were dropped, in "
        f"{len(rounds)} round(s), first in round {rounds[0]}{unchanged}"
    ]


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
    names = [folder_name(i, point.changes) for i, point in enumerate(todo)]
    folder.begin(command.out, command.experiment, names, resume=command.resume)
    for name, task in zip(names, tasks, strict=True):
        folder.begin(command.out / name, task.experiment, resume=command.resume)
    return [command.out / name for name in names]


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
        command = parse(sys.argv[1:] if arguments is None else arguments)
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
    except MemoryError as error:
        print(f"jaxfed: not enough memory ({error}); take smaller images or less", file=sys.stderr)
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"jaxfed: {error.strerror or error}{where}; the files written before are whole: mend "
            "that and go on with --resume",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
