"""The command: `python -m benchmarks.gpu`; the package's docstring says how to run and read it."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import benchmarks.gpu
from benchmarks.gpu import ceiling, jobs, lowerings, precision, published, sweep, torch_loop
from benchmarks.gpu.measure import Case, Found, Row, one_line
from jaxfed.folder import write_json


class Section(NamedTuple):
    """Some cases, and how their rows are shown."""

    cases: Callable[[bool, Found], Iterator[Case]]
    share: float
    """Of the time; what is not used is for those that come later."""
    across: str | None = None
    """The key whose values are columns on the screen, each with the row's `ms`."""


SECTIONS = {
    "ceiling": Section(ceiling.cases, 0.1),
    "jobs": Section(jobs.cases, 0.35, "parallel"),
    "lowerings": Section(lowerings.cases, 0.25, "lowering"),
    "published": Section(published.cases, 0.15),
    "torch": Section(torch_loop.cases, 0.1),
    "sweep": Section(sweep.cases, 0.1),
    "precision": Section(precision.cases, 0.1),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "scikit-learn")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--jobs", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help="sections to run (default: all)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=450, help="no case begins after that")
    parser.add_argument("--tiny", action="store_true", help="everything small, for a CPU")
    chosen = parser.parse_args()

    started = time.perf_counter()
    found: Found = {name: [] for name in SECTIONS if name in chosen.jobs}
    pending = {name: list(SECTIONS[name].cases(chosen.tiny, found)) for name in found}
    report = {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.devices()[0].device_kind} x{len(jax.devices())} ({jax.default_backend()})",
        "host": f"{os.cpu_count()} cores",
        "versions": versions(),
        "sections": found,
    }
    print(report["device"], json.dumps(report["versions"]), flush=True)

    def work(name: str, until: float) -> None:
        """Runs a section's cases that are left, as long as there is time."""
        while pending[name] and time.perf_counter() < until:
            case = pending[name].pop(0)
            found[name] += rows_of(case)
            report["seconds"] = round(time.perf_counter() - started, 1)
            report["left_out"] = {key: len(cases) for key, cases in pending.items() if cases}
            if chosen.out:
                write_json(chosen.out, report)

    end = started + chosen.seconds
    shown = dict.fromkeys(found, 0)
    for shared_out in (True, False):
        for name in found:
            share = SECTIONS[name].share * chosen.seconds if shared_out else chosen.seconds
            work(name, min(end, time.perf_counter() + share))
            if rows := found[name][shown[name] :]:
                shown[name] = len(found[name])
                print(f"\n{name}\n{table(rows, SECTIONS[name].across)}", flush=True)
    print(f"\n{report.get('seconds')} s; cases left out: {report.get('left_out') or 'none'}")


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def rows_of(case: Case) -> list[Row]:
    """What a case measures, each row with the case's label; its error if it fails."""
    started = time.perf_counter()
    try:
        rows = case.measure()
    except Exception as error:
        rows = [{"error": one_line(error)}]
    took = round(time.perf_counter() - started, 1)
    return [{**case.label, **row, "case_seconds": took} for row in rows]


def table(rows: Sequence[Row], across: str | None) -> str:
    """Rows as aligned text, without columns of nothing; with `across`, one line for all of it."""
    lines = rows if across is None else side_by_side(rows, across)
    keys = list(dict.fromkeys(key for line in lines for key in line))
    keys = sorted(
        set(keys) - {"error", "case_seconds"}, key=lambda k: (k[:4] == "best", keys.index(k))
    )
    cells = [keys, *([shown(line.get(key)) for key in keys] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    for row in rows:
        if "error" in row:
            text.append(f"{', '.join(v for v in row.values() if isinstance(v, str))}")
    return "\n".join(line.rstrip() for line in text)


def side_by_side(rows: Sequence[Row], across: str) -> list[Row]:
    """The `ms` of rows that differ in `across` alone on one line, and how good the best is."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        label = {}
        for key, value in row.items():
            if isinstance(value, str | int) and key not in (across, "error"):
                label[key] = value
        line = lines.setdefault(tuple(label.values()), label)
        if across in row:
            line[str(row[across]) or "ms"] = row.get("ms", "error")
        for key in ("tflops", "of_ceiling", "of_bandwidth"):
            if row.get(key) is not None:
                line[f"best {key}"] = max(row[key], line.pop(f"best {key}", 0.0))
    return list(lines.values())


def shown(value: Any) -> str:
    """For the screen: numbers with three digits."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
