"""Runs the whole suite against live TFF and keeps what it found.

    python -m parity_tests.record

writes the recorded traces, `docs/results/parity.json` and the table in the README. With names of
the suite after it, only those are run again.
"""

import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxfed.folder import write_json
from parity_tests import table
from parity_tests.case import Case
from parity_tests.ladder import climb
from parity_tests.reference import live, record
from parity_tests.suite import SUITE, case_of
from tff_reference import environment
from tff_reference.process import Worker


def traces(names: list[str], logs: Path) -> Iterator[tuple[str, Case, dict[str, np.ndarray]]]:
    """Cases with their live traces; TFF computes the next while one is being looked at."""
    with Worker(environment.ensure(), logs) as worker, ThreadPoolExecutor(1) as ahead:
        cases = {name: case_of(name) for name in names}
        waiting = {name: ahead.submit(live, cases[name], worker, name) for name in names}
        for name in names:
            yield name, cases[name], waiting[name].result()


def main() -> int:
    """The command; returns its exit code."""
    names = sys.argv[1:] or list(SUITE)
    if unknown := set(names) - set(SUITE):
        print(f"got {sorted(unknown)}, expected names of the suite: {', '.join(SUITE)}")
        return 2
    found = {}
    with tempfile.TemporaryDirectory() as logs:
        for name, case, trace in traces(names, Path(logs)):
            rungs = list(climb(case, trace))
            found[name] = (case.task.experiment.dtype, rungs)
            if SUITE[name].recorded:
                record(case, trace, name)
            worst = max(rungs, key=lambda rung: rung.error / max(rung.tolerance, 1e-300))
            red = [rung.name for rung in rungs if not rung.holds]
            print(f"{name:32} worst {worst.name} {worst.error:.1e}  {red or 'agree'}", flush=True)
    results = table.as_json(found)
    if names != list(SUITE):
        cases = {**table.read()["cases"], **results["cases"]}
        results["cases"] = {name: cases[name] for name in SUITE}
    write_json(table.RESULTS, results)
    readme = table.README.read_text()
    table.README.write_text(table.written(readme, table.text(table.read())))
    return 0 if all(rung.holds for _, rungs in found.values() for rung in rungs) else 1


if __name__ == "__main__":
    sys.exit(main())
