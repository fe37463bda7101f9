"""Runs one experiment in jaxfed and in TFF, and prints how far apart they are, rung by rung.

    python -m parity_tests.compare exp.json [--rounds N] [--dtype float64] [--json FILE]

Exit codes: 0 they agree, 1 they do not, 2 the experiment is none, or TFF cannot express it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxfed import ConfigError, DataError, Experiment, from_json
from jaxfed.config import override
from parity_tests.case import Case, NotComparable, make_case
from parity_tests.ladder import climb
from parity_tests.measure import Rung
from parity_tests.reference import live
from tff_reference import environment
from tff_reference.process import CaseRefused, Worker, WorkerError

ROUNDS = 3
"""Compared at most, unless asked for otherwise: they cost TFF's time."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    try:
        experiment = from_json(options.experiment)
        case = prepared(experiment, options.rounds, options.dtype)
        python = environment.ensure()
    except (ConfigError, DataError, NotComparable, environment.NoPython) as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    for line in headline(case, experiment.dtype):
        console.print(line, markup=False, highlight=False)
    with tempfile.TemporaryDirectory() as logs, Worker(python, Path(logs)) as worker:
        try:
            with console.status("TFF computes its side"):
                trace = live(case, worker, "compare", options.deadline)
        except CaseRefused as error:
            errors.print(str(error), style="red", markup=False, highlight=False)
            return 2
        except WorkerError as error:
            errors.print(str(error), style="red", markup=False, highlight=False)
            return 1
    rungs = []
    for rung in climb(case, trace):
        rungs.append(rung)
        console.print(f"  {rung.name:24} {rung.error:9.2e}", highlight=False)
    console.print(table(rungs))
    agree = all(rung.holds for rung in rungs)
    if options.json:
        options.json.write_text(json.dumps(report(case, rungs), indent=2) + "\n")
    console.print("jaxfed and TFF agree" if agree else "jaxfed and TFF differ", style="bold")
    return 0 if agree else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.compare",
        description="Runs one experiment in jaxfed and in TFF, and compares rung by rung.",
        epilog="exit codes: 0 they agree, 1 they do not, 2 TFF cannot express the experiment",
    )
    parser.add_argument("experiment", help="a JSON file as jaxfed.train takes it")
    parser.add_argument("--rounds", type=_positive, help=f"default: the file's, at most {ROUNDS}")
    parser.add_argument(
        "--dtype", choices=("float64", "float32"),
        help="default: float64 (float32 for fedsgd, which TFF cannot do in float64)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE too")
    parser.add_argument(
        "--deadline", type=float, default=3600.0, metavar="SECONDS", help="for TFF (default: 3600)"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, 1 or more")
    return int(text)


def prepared(experiment: Experiment, rounds: int | None, dtype: str | None) -> Case:
    """The case of an experiment as the command runs it."""
    if dtype is None:
        dtype = "float32" if experiment.algorithm == "fedsgd" else "float64"
    experiment = override(experiment, {"dtype": dtype})
    return make_case(experiment, rounds=rounds or min(experiment.rounds, ROUNDS))


def headline(case: Case, dtype: str) -> list[str]:
    """What is compared, in words; `dtype` is the file's own."""
    task, rows = case.task, case.plans[0].rows
    experiment = task.experiment
    lines = [
        f"{task.dataset.name}, {experiment.model.name}, {task.parameters:,} parameters, "
        f"{experiment.algorithm}, {experiment.dtype}",
        f"{len(case.plans)} rounds of {len(rows)} clients, up to {rows.shape[1]} steps of "
        f"{rows.shape[2]} images; {len(case.test.targets)} test images",
    ]
    if experiment.dtype != dtype:
        lines.append(
            f"in {experiment.dtype}, which tells rounding from a difference; the experiment's own "
            f"is {dtype} (--dtype {dtype})"
        )
    if case.dropout:
        lines.append("dropout is off on both sides: its random numbers cannot be matched")
    if experiment.model.batch_stats == "frozen":
        lines.append("BatchNorm's statistics are frozen on the server, as TFF has it")
    if experiment.algorithm == "fedprox":
        lines.append(
            "TFF 0.87 has the proximal term with the wrong sign; jaxfed runs with "
            f"-{experiment.client.mu:g} to be comparable"
        )
    return lines


def table(rungs: list[Rung]) -> Table:
    """The rungs for the screen."""
    shown = Table("rung", "error", "tolerance", "noise", "", title="jaxfed against TFF, relative")
    for rung in rungs:
        verdict = "[green]agree" if rung.holds else "[red]differ"
        if rung.chaotic:
            verdict = "[yellow]chaotic: rounding alone decides"
        noise = "" if rung.noise is None else f"{rung.noise:.1e}"
        limit = "" if rung.chaotic else f"{rung.tolerance:.1e}"
        shown.add_row(rung.name, f"{rung.error:.1e}", limit, noise, verdict)
    return shown


def report(case: Case, rungs: list[Rung]) -> dict:
    """The result as JSON."""
    experiment = case.task.experiment
    return {
        "agree": all(rung.holds for rung in rungs),
        "dtype": experiment.dtype,
        "rounds": len(case.plans),
        "parameters": case.task.parameters,
        "dropout_switched_off": case.dropout,
        "rungs": [
            {
                "name": rung.name,
                "error": rung.error if rung.error != float("inf") else None,
                "tolerance": None if rung.chaotic else rung.tolerance,
                "noise": rung.noise,
                "holds": rung.holds,
                "chaotic": rung.chaotic,
            }
            for rung in rungs
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
