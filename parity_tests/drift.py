"""How far a free run leaves TFF's, round after round, and how far rounding alone would take it.

    python -m parity_tests.drift exp.json [--rounds N] [--dtype float32] [--json FILE]

Three distances a round, relative to how far TFF's weights have moved:

| column | between |
|---|---|
| `one round` | TFF's weights and what jaxfed makes of TFF's weights of the round before |
| `free` | TFF's weights and jaxfed's, which had the start alone in common |
| `rounding` | jaxfed's weights and jaxfed's from a start that is one rounding away |

If `one round` stays at rounding while `free` grows as `rounding` does, the two frameworks compute
the same, and training itself multiplies what no two programs share: the order of sums.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxfed import Cohort, ConfigError, DataError, Examples, Variables, from_json
from jaxfed.config import override, to_dict
from jaxfed.folder import write_json
from jaxfed.precision import precision
from jaxfed.program import algorithm_of
from parity_tests.case import Case, NotComparable, flat, make_case, unflat
from parity_tests.reference import live
from parity_tests.replay import compiled
from tff_reference import environment
from tff_reference.process import Worker, WorkerError


class Apart(NamedTuple):
    """The distances after one round, and the training accuracies in it."""

    round: int
    one_round: float
    free: float
    rounding: float
    accuracy_tff: float
    accuracy_jaxfed: float


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 0, 1 if TFF fails, 2 for what cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.drift",
        description="How far a free run leaves TFF's, and how far rounding alone would take it.",
    )
    parser.add_argument("experiment", help="a JSON file as jaxfed.train takes it")
    parser.add_argument("--rounds", type=int, help="default: the file's")
    parser.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE too")
    options = parser.parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    try:
        experiment = override(from_json(options.experiment), {"dtype": options.dtype})
        case = make_case(experiment, rounds=options.rounds, test_examples=1)
        with (
            tempfile.TemporaryDirectory() as logs,
            Worker(environment.ensure(), Path(logs)) as worker,
            console.status("TFF computes its side"),
        ):
            trace = live(case, worker, "drift", 3600.0)
    except (ConfigError, DataError, NotComparable, environment.NoPython) as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except WorkerError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 1
    console.print("round  one round      free  rounding  train accuracy: TFF  jaxfed")
    rows = drift(case, trace)
    for row in rows:
        console.print(
            f"{row.round:5d} {row.one_round:10.1e} {row.free:9.1e} {row.rounding:9.1e} "
            f"{row.accuracy_tff:20.4f} {row.accuracy_jaxfed:7.4f}",
            highlight=False,
        )
    if options.json:
        write_json(options.json, report(case, rows))
    return 0


def report(case: Case, rows: list[Apart]) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "command": "python -m parity_tests.drift EXPERIMENT --json FILE",
        "experiment": to_dict(case.task.experiment),
        "versions": {name: importlib.metadata.version(name) for name in ("jaxfed", "jax", "numpy")},
        "rows": [row._asdict() for row in rows],
    }


def drift(case: Case, trace: dict[str, np.ndarray]) -> list[Apart]:
    """Follows TFF's trace of a federated case in jaxfed, from its weights and on its own."""
    with precision(case.task.experiment):
        algorithm = algorithm_of(case.task, {})
        step = compiled(algorithm.round)
        train = Examples(jnp.asarray(case.train.inputs), jnp.asarray(case.train.targets))
        start = jax.tree.map(jnp.asarray, case.start)
        nudged = start._replace(params=jax.tree.map(_next, start.params))
        forced = free = algorithm.init(start)
        other = algorithm.init(nudged)
        rows = []
        for number, plan in enumerate(case.plans, start=1):
            cohort = Cohort(train, plan)
            forced, _ = step(forced, cohort)
            free, report = step(free, cohort)
            other, _ = step(other, cohort)
            prefix = f"round/{number}/"
            theirs = _under(trace, f"{prefix}params/", case.start.params)
            moved = _length(theirs, start.params)
            rows.append(
                Apart(
                    number,
                    _length(theirs, forced.variables.params) / moved,
                    _length(theirs, free.variables.params) / moved,
                    _length(other.variables.params, free.variables.params) / moved,
                    float(trace[f"{prefix}train/accuracy"]),
                    float(report.metrics["accuracy"].value()),
                )
            )
            # The state of the server's optimizer goes on, as in TFF.
            forced = forced._replace(variables=Variables(theirs, start.stats))
        return rows


def _next(leaf: Any) -> Any:
    return jnp.nextafter(leaf, jnp.inf)


def _under(trace: dict[str, np.ndarray], prefix: str, like: Any) -> Any:
    found = {n[len(prefix) :]: jnp.asarray(a) for n, a in trace.items() if n.startswith(prefix)}
    return unflat(found, like)  # pyright: ignore[reportArgumentType]


def _length(one: Any, other: Any) -> float:
    """Euclidean distance of all weights."""
    pairs = zip(flat(one).values(), flat(other).values(), strict=True)
    return float(np.sqrt(sum(np.sum((np.asarray(a) - np.asarray(b)) ** 2) for a, b in pairs)))


if __name__ == "__main__":
    sys.exit(main())
