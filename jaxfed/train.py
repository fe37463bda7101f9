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

import jax
import tyro
from rich.console import Console

from jaxfed import distributed, folder, machine, manual, report, saved, screen, tensorboard
from jaxfed.config import ConfigError, Experiment, dotted_keys, expected, from_json
from jaxfed.config.codec import ALIASES
from jaxfed.config.sweep import Point, folder_name, points, programs
from jaxfed.core.model import Variables
from jaxfed.data import DataError, format_label_table, label_table
from jaxfed.final import Final, finish
from jaxfed.prepare import Task, prepare
from jaxfed.program import compile_tasks
from jaxfed.resume import find_start, finished, run_program


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
    tensorboard: bool = False
    """Also write the rounds to OUT/tensorboard as they come (needs the extra tensorboard)."""
    labels: bool = False
    """Print how many images of each class every client holds, and stop."""
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the datasets, partitions, models, optimizers and algorithms there are, and stop."""
    distributed: str | None = None
    """One of several processes: auto (SLURM, TPU pods, Open MPI), or HOST:PORT,PROCESSES,NUMBER."""
    quiet: bool = False
    """Print nothing but errors."""


def parse(arguments: Sequence[str]) -> Command:
    """Reads the command line.

    Raises:
      ConfigError: for a flag or a value that is not understood.
    """
    arguments = [_renamed(argument) for argument in arguments]
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


def _renamed(argument: str) -> str:
    """A flag under its present name."""
    flag, equals, value = argument.partition("=")
    key = flag.removeprefix("--")
    return (
        f"--{ALIASES[key]}{equals}{value}" if flag.startswith("--") and key in ALIASES else argument
    )


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
    path: Path, task: Task, history: list[dict[str, Any]], summary: dict[str, Any], final: Final,
    best: Variables,
) -> None:  # fmt: skip
    """Writes what is made at the end: the weights, the clients, the pictures, `summary.json`."""
    saved.write_weights(path / saved.WEIGHTS, final.variables)
    saved.write_weights(path / saved.BEST, best)
    table = label_table(task.partition, task.dataset.y_train, task.dataset.num_classes)
    rows = saved.client_rows(task.partition.sizes, table, final.clients)
    folder.write_csv(path / saved.CLIENTS, rows)
    # From the files, so that a page can be made again from a folder, and is the same.
    folder.write_atomically(path / "report.html", report.run_page(saved.read(path, summary)))
    folder.write_atomically(
        path / "curves.png", report.curves_png({summary["name"]: history}, summary["score"])
    )
    folder.write_json(path / folder.SUMMARY, summary)  # the last: it says that all is done


def write_sweep(home: Path, base: Experiment, runs: Sequence[report.SweepPoint]) -> None:
    """Writes the files that compare the points of a sweep."""
    rows = [{**run.changes, **_flat(run.summary)} for run in runs]
    folder.write_csv(home / "sweep.csv", rows)
    folder.write_atomically(home / "report.html", report.sweep_page(base, runs))
    curves = {run.label: run.history for run in runs}
    folder.write_atomically(
        home / "curves.png", report.curves_png(curves, runs[0].summary["score"])
    )


def train(command: Command, console: Console) -> int:
    """Carries out a command and returns its exit code.

    Raises:
      ConfigError, DataError: for bad input.
    """
    todo, tasks = distributed.agreed(lambda: _prepare(command, console))
    if command.labels:
        first = tasks[0]
        table = label_table(first.partition, first.dataset.y_train, first.dataset.num_classes)
        console.print(format_label_table(table), highlight=False, soft_wrap=True)
        return 0
    with contextlib.ExitStack() as stack:

        def opened() -> list[Path | None]:
            if command.out and distributed.leads():
                stack.enter_context(folder.locked(command.out))
            return _folders(command, todo, tasks)

        return _run(command, console, todo, tasks, distributed.agreed(opened))


def _prepare(command: Command, console: Console) -> tuple[list[Point], list[Task]]:
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
    if command.tensorboard:
        tensorboard.require()
        if command.out is None:
            raise ConfigError("--tensorboard: got no --out, expected a folder to write in")
    todo = points(command.experiment, command.sweep)
    with screen.host_work(console) as progress:
        return todo, _prepare_all(todo, progress)


def _run(
    command: Command,
    console: Console,
    todo: Sequence[Point],
    tasks: Sequence[Task],
    folders: Sequence[Path | None],
) -> int:
    # All processes read; what the others are not to write, they have no path for.
    leads = distributed.leads()
    out = command.out if leads else None
    groups = programs([task.experiment for task in tasks])
    screen.header(console, tasks[0], len(todo), len(groups))
    total = sum(tasks[group[0]].experiment.rounds for group in groups)
    outcomes: dict[int, tuple[list, dict]] = {}
    caught, done = 0, 0
    with screen.rounds_bar(console, total) as update:
        for group in groups:
            members, homes = [tasks[i] for i in group], [folders[i] for i in group]
            rounds = members[0].experiment.rounds
            old = [finished(home, task) for home, task in zip(homes, members, strict=True)]
            if all(old):
                outcomes |= {i: one for i, one in zip(group, old, strict=True) if one}
                done += rounds
                continue
            update(done, None)
            start = distributed.agreed(
                lambda members=members, homes=homes: find_start(
                    members, homes, resume=command.resume
                )
            )
            distributed.same(start.round, "--out", "saved states of rounds")
            homes = homes if leads else [None] * len(homes)
            program = compile_tasks(members, command.checkpoint_every, start.round)

            def on_rounds(rows: list[dict[str, Any]], before: int = done) -> None:
                for row in rows:
                    update(before + row["round"], row)

            outcome = run_program(
                program, start, homes, on_rounds, command.checkpoint_every, command.tensorboard
            )
            done += rounds
            for i, history, summary in zip(
                group, outcome.histories, outcome.summaries, strict=True
            ):
                outcomes[i] = (history, summary)
            if command.out:  # all processes compute, one writes
                bests = jax.device_get(outcome.best.variables)
                for place, final in enumerate(finish(program, outcome.state)):
                    i = group[place]
                    path, (history, summary) = folders[i], outcomes[i]
                    best = jax.tree.map(lambda leaf, at=place: leaf[at], bests)
                    if leads and path:
                        write_results(path, tasks[i], history, summary, final, best)
            caught = outcome.signal
            if caught:
                break
    ended = [(i, *outcomes[i]) for i in sorted(outcomes)]
    rows = [{**todo[i].changes, **_short(summary)} for i, _, summary in ended]
    if out and command.sweep:
        runs = [
            report.SweepPoint(todo[i].changes, tasks[i].experiment, history, summary)
            for i, history, summary in ended
        ]
        write_sweep(out, command.experiment, runs)
    screen.results(console, rows)
    for i, history, _ in ended:
        for line in _dropped(_label(todo[i]), history):
            console.print(line, highlight=False)
    if command.out:
        console.print(f"results in {command.out}", highlight=False)
    if caught and not leads:
        return 128 + caught
    if caught:
        saved = (
            f"state saved, go on with --out {command.out} --resume"
            if command.out
            else "not saved (no --out)"
        )
        print(f"jaxfed: interrupted after round {ended[-1][2]['rounds']}; {saved}", file=sys.stderr)
        return 128 + caught
    failed = [(i, history[-1], summary) for i, history, summary in ended if _failed(summary)]
    for i, row, summary in failed if leads else ():
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
    leads = distributed.leads()
    if not command.sweep:
        if leads:
            folder.begin(command.out, tasks[0].experiment, resume=command.resume)
        return [command.out]
    names = [folder_name(i, point.changes) for i, point in enumerate(todo)]
    if not leads:
        return [command.out / name for name in names]
    folder.begin(command.out, command.experiment, names, resume=command.resume)
    for name, task in zip(names, tasks, strict=True):
        folder.begin(command.out / name, task.experiment, resume=command.resume)
    return [command.out / name for name in names]


def _label(point: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in point.changes.items()) or "run"


def _short(summary: dict[str, Any]) -> dict[str, Any]:
    score = summary["score"]
    keys = (f"final_test_{score}", f"best_test_{score}", "rounds", "seconds", "compile_seconds")
    return {key: summary[key] for key in keys}


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    versions = " ".join(f"{name}={version}" for name, version in summary["versions"].items())
    return {**summary, "versions": versions}


def _carried_out(given: Sequence[str]) -> int:
    asks_help = bool({"-h", "--help"} & set(given))
    command = Command() if asks_help else parse(given)
    if asks_help or command.list_:
        width = manual.terminal_width()
        print(manual.help_text(command, width) if asks_help else manual.list_text(width), end="")
        return 0
    if command.distributed is None:
        machine.use_all_cores()
    distributed.start(command.distributed)
    with machine.kept_programs():
        code = train(command, Console(quiet=command.quiet or not distributed.leads()))
    distributed.stop()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, and turns every foreseen failure into one line and an exit code."""
    try:
        return _carried_out(sys.argv[1:] if arguments is None else arguments)
    except (ConfigError, DataError) as error:
        code, line = 2, f"{error}"
    except KeyboardInterrupt:
        code, line = 130, "interrupted before the first round; nothing to save"
    except BrokenPipeError:  # the reader of our output, head perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, line = 1, ""
    except MemoryError as error:
        code, line = 1, f"not enough memory ({error}); take smaller images or less"
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        code = 1
        line = (
            f"{error.strerror or error}{where}; the files written before are whole: mend that and "
            "go on with --resume"
        )
    if line:
        print(f"jaxfed: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    distributed.leave(main)
