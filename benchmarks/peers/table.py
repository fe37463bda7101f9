"""Timings as rows: for the screen and for the results file."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.peers.jobs import Job, Row


class Timing(NamedTuple):
    """What was measured of one line."""

    seconds: list[float]
    """Of the whole work, one number a repeat."""
    first_seconds: float
    """Building, compiling and doing it for the first time."""
    peak_bytes: int
    apart: dict[str, float]
    """Relative differences from jaxfed's result; empty where there is nothing to compare."""


def rows_of(job: Job, timings: Mapping[Row, Timing]) -> list[dict[str, Any]]:
    """Rows of the results file, in the job's order; seconds are a round's.

    `ratio` is the median's to that of the job's first row, `None` where a peer cannot do it.
    """
    found, base = [], None
    for row, timing in timings.items():
        rounds = row.work.rounds if row.work.kind == "training" else 1
        seconds = [each / rounds for each in timing.seconds]
        median = statistics.median(seconds)
        base = median if base is None else base
        training = row.work.kind == "training"
        found.append(
            {
                "job": job.name,
                "peer": row.peer,
                "variant": row.variant,
                "median_seconds": median,
                "least_seconds": min(seconds),
                "most_seconds": max(seconds),
                "seconds_a_client": median / len(row.work.sizes) if training else None,
                "ratio": median / base,
                "first_seconds": timing.first_seconds,
                "peak_bytes": timing.peak_bytes,
                "apart": timing.apart,
                "timings": timing.seconds,
                "absent": None,
            }
        )
    blank = dict.fromkeys(found[0]) if found else {}
    for peer, reason in job.absent:
        found.append({**blank, "job": job.name, "peer": peer, "variant": "", "absent": reason})
    return found


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table, `ratio` last."""
    caption = "ms: median of a round, of an evaluation, of a whole sweep or start"
    table = Table(box=SIMPLE_HEAD, caption=caption)
    for name in ("job", "in"):
        table.add_column(name, no_wrap=True)
    for name in ("first s", "peak MB", "apart", "ms a client", "ms", "least - most", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        job, previous = "" if row["job"] == previous else row["job"], row["job"]
        if job and table.row_count:
            table.add_section()
        name = f"{row['peer']}, {row['variant']}" if row["variant"] else row["peer"]
        if row["absent"]:
            table.add_row(job, name, "", "", "", "", "n/a", row["absent"], "n/a")
            continue
        apart = row["apart"].values()
        client = row["seconds_a_client"]
        table.add_row(
            job,
            name,
            f"{row['first_seconds']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{max(apart):.0e}" if apart else "",
            "" if client is None else _milliseconds(client),
            _milliseconds(row["median_seconds"]),
            f"{_milliseconds(row['least_seconds'])} - {_milliseconds(row['most_seconds'])}",
            f"{row['ratio']:.2f}",
        )
    return table


def _milliseconds(seconds: float) -> str:
    number = 1000 * seconds
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f}"
