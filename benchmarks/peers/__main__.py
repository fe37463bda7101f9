"""The same federated training in jaxfed and in its peers: how long does it take?

    python -m benchmarks.peers [--jobs cnn,mobilenet] [--peers jaxfed,torch] [--repeats 7] [--write]

Every peer has a process of its own, in an environment that is made on first use, and is given the
same images, initial weights and batches. What comes of it is compared with jaxfed's result before
anything is timed; then all are timed in turn, so that what else the machine does hits all alike.
`--write` makes `benchmarks/results/peers.json`. Exit codes: 0 done; 1 a peer failed or trained
something else; 2 bad input.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.peers.check import compare
from benchmarks.peers.environments import python_of
from benchmarks.peers.jobs import JOBS, PEERS, Job, Row, write
from benchmarks.peers.table import Timing, rows_of, table_of
from benchmarks.results_file import processor
from jaxfed.data import cache
from jaxfed.folder import write_json
from tff_reference.process import Worker

OUT = Path(__file__).parent.parent / "results" / "peers.json"
TABLE = 110
"""Characters that the table needs."""
REST = 0.5
"""Seconds before each timing: a peer's threads go on spinning for a while when its work is done."""
DEADLINE = 1800.0
"""Seconds that one answer may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    names = [job.name for job in JOBS]
    parser.add_argument("--jobs", default=",".join(names), help="default: all of them")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: all of them")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each line (default: 7)")
    parser.add_argument("--write", action="store_true", help="write the results file")
    options = parser.parse_args(arguments)
    jobs, peers = options.jobs.split(","), options.peers.split(",")
    for flag, got, known in (("--jobs", jobs, names), ("--peers", peers, PEERS)):
        if unknown := [name for name in got if name not in known]:
            parser.error(f"{flag}: got {', '.join(unknown)}, expected some of {','.join(known)}")
    if "jaxfed" not in peers:
        parser.error("--peers: got none called jaxfed, expected it: all are compared with it")
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}, expected 1 or more")
    begin, rows, versions = time.perf_counter(), [], {}
    try:
        pythons = {peer: python_of(peer) for peer in PEERS if peer in peers}
        for job in JOBS:
            if job.name in jobs:
                rows += run(job, pythons, options.repeats, versions)
                if options.write:  # after each job: a later one may fail
                    seconds = time.perf_counter() - begin
                    write_json(OUT, merged(report(rows, versions, options.repeats, seconds)))
    except (RuntimeError, ValueError) as error:
        say(f"{str(error).splitlines()[0]} (logs: {logs()})")
        return 1
    Console(width=max(TABLE, Console().width)).print(table_of(rows))
    if options.write:
        print(f"written: {OUT.name}")
    return 0


def run(
    job: Job, pythons: dict[str, Path], repeats: int, versions: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    """Runs one job in those peers that have an interpreter; rows of the results file.

    Adds to `versions` what each peer says of its packages.

    Raises:
      RuntimeError: if a peer fails, or its result is not jaxfed's.
    """
    lines = [row for row in job.rows if row.peer in pythons]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        works = dict.fromkeys(row.work for row in lines)
        shared = {work: Path(scratch) / f"work-{number}" for number, work in enumerate(works)}
        cases = {work: write(work, folder) for work, folder in shared.items()}
        folders = {row: shared[row.work] / row.peer for row in lines}
        workers = {}
        for row, folder in folders.items():
            folder.mkdir()
            function = f"benchmarks.peers.in_{row.peer}:run"
            workers[row] = stack.enter_context(Worker(pythons[row.peer], logs(), function))
        firsts, apart = {}, {}
        for row in lines:
            say(f"{job.name}: {row.peer} {row.variant}".rstrip())
            firsts[row] = ask(workers[row], folders[row])
            versions[row.peer] = firsts[row]["versions"]
            apart[row] = compare(job, row, folders, cases)
        seconds: dict[Row, list[float]] = {row: [] for row in lines}
        peaks = dict.fromkeys(lines, 0)
        for repeat in range(min(repeats, job.repeats)):
            for row in lines:
                time.sleep(REST)
                answer = ask(workers[row], folders[row])
                seconds[row].append(answer["seconds"])
                peaks[row] = answer["peak_bytes"]
            say(f"{job.name}: timing {repeat + 1} of {min(repeats, job.repeats)}")
    timings = {
        row: Timing(seconds[row], firsts[row]["first_seconds"], peaks[row], apart[row])
        for row in lines
    }
    return rows_of(job, timings)


def ask(worker: Worker, folder: Path) -> dict[str, Any]:
    """One request and its answer; the errors of `Worker.ask`."""
    worker.ask(folder, DEADLINE)
    return json.loads((folder / "answer.json").read_text())


def logs() -> Path:
    """Where the peers leave what they print."""
    return cache.root() / "peers-logs"


def report(
    rows: list[dict[str, Any]], versions: dict[str, dict[str, str]], repeats: int, seconds: float
) -> dict[str, Any]:
    """The contents of the results file."""
    return {
        "command": " ".join(["python -m benchmarks.peers", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].platform,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "repeats": repeats,
        "versions": {"python": platform.python_version(), **versions},
        "rows": rows,
    }


def merged(new: dict[str, Any]) -> dict[str, Any]:
    """The new results, and those of the file for jobs that are not among them, in JOBS' order.

    A job's rows were always timed in one run.
    """
    if not OUT.exists():
        return new
    old = json.loads(OUT.read_text(encoding="utf-8"))
    done = {row["job"] for row in new["rows"]}
    rows = [row for row in old["rows"] if row["job"] not in done] + new["rows"]
    order = [job.name for job in JOBS]
    rows.sort(key=lambda row: order.index(row["job"]))
    command = "python -m benchmarks.peers --jobs JOB --write"  # of several runs
    versions = {**old["versions"], **new["versions"]}
    return {**new, "command": command, "versions": versions, "rows": rows}


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
