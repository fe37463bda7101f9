"""A process that is timed: builds its work once, then does it again whenever it is asked.

Runs in the environment of every peer, so it needs NumPy alone. `tff_reference.worker` calls it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ENOUGH = 0.5
"""Seconds that a timing takes at least."""


class Inputs(NamedTuple):
    """What a peer is given."""

    folder: Path
    case: dict
    """Network, optimizers: the contents of `case.json`."""
    images: np.ndarray
    """float32 [N, H, W, C], 0 to 1."""
    labels: np.ndarray
    rows: np.ndarray
    """[rounds, clients, steps, batch], rows of `images`; -1 is padding."""
    test_images: np.ndarray
    test_labels: np.ndarray
    params: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    work: dict


class _Built(NamedTuple):
    do: Callable[[], dict[str, np.ndarray]]
    times: int


_built: dict[Path, _Built] = {}
"""The work of this process between two requests."""


def serve(
    folder: Path,
    build: Callable[[Inputs], Callable[[], dict[str, np.ndarray]]],
    packages: Sequence[str],
) -> None:
    """Answers one request in `answer.json`.

    The first one builds the work and does it twice; what comes of it is left in `arrays.npz`. All
    later ones time it.

    Args:
      folder: of the request; its parent holds the inputs.
      build: makes a function that does the work from its beginning to its very end, and returns
        the final weights by name, or scores.
      packages: whose versions matter.
    """
    begin = time.perf_counter()
    if folder in _built:
        do, times = _built[folder]
        for _ in range(times):
            do()
        seconds = (time.perf_counter() - begin) / times
        answer = {"seconds": seconds, "peak_bytes": peak_bytes()}
    else:
        do = build(read(folder.parent))
        arrays = do()
        first, again = time.perf_counter() - begin, time.perf_counter()
        do()
        times = max(1, math.ceil(ENOUGH / (time.perf_counter() - again)))
        np.savez(folder / "arrays.npz", **arrays)  # pyright: ignore[reportArgumentType]
        _built[folder] = _Built(do, times)
        versions = {name: importlib.metadata.version(name) for name in packages}
        answer = {"first_seconds": first, "versions": versions}
    (folder / "answer.json").write_text(json.dumps(answer))


def read(folder: Path) -> Inputs:
    """What `benchmarks.peers.jobs.write` has left in `folder`."""
    with np.load(folder / "inputs.npz") as file:
        arrays = dict(file)

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}

    return Inputs(
        folder=folder,
        case=json.loads((folder / "case.json").read_text()),
        images=arrays["images"].astype(np.float32) / np.float32(255),
        labels=arrays["labels"],
        rows=arrays["rows"],
        test_images=arrays["test_images"].astype(np.float32) / np.float32(255),
        test_labels=arrays["test_labels"],
        params=under("params/"),
        stats=under("stats/"),
        work=json.loads((folder / "work.json").read_text()),
    )


def visits(table: np.ndarray) -> np.ndarray:
    """The rows of a client's table [steps, batch] in their order, without padding.

    Batches of it are the table's: with one epoch only the last batch is smaller.
    """
    return table[table >= 0]


def cohorts(inputs: Inputs) -> Iterator[list[np.ndarray]]:
    """For every round, the rows that each client visits, in their order."""
    for tables in inputs.rows:
        yield [visits(table) for table in tables]


def peak_bytes() -> int:
    """The most memory that this process has held so far.

    Not `ru_maxrss`: that also counts what the process was forked from.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
