"""Whether a peer has done the same training: its result beside jaxfed's."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.peers.jobs import Job, Row, Work, differences
from parity_tests.case import Case


def compare(
    job: Job, row: Row, folders: Mapping[Row, Path], cases: Mapping[Work, Case]
) -> dict[str, float]:
    """How far the result of `row` is from that of jaxfed for the same work; empty if it has none.

    Raises:
      RuntimeError: if it is not the same training.
    """
    if row.work.kind in ("sweep", "cold-start"):
        return {}
    ours = next(other for other in folders if other.peer == "jaxfed" and other.work == row.work)
    if ours == row:
        return {}
    apart = differences(cases[row.work], load(folders[ours]), load(folders[row]))
    for name, limit in (("loss", job.loss), ("update", job.update)):
        if not apart.get(name, 0.0) <= limit:
            raise RuntimeError(
                f"{job.name}: {row.peer} has not trained the same network: got a difference of "
                f"{apart[name]:.1e} from jaxfed's {name}, expected at most {limit:.0e}; "
                f"see benchmarks/peers/in_{row.peer}.py"
            )
    return apart


def load(folder: Path) -> dict[str, np.ndarray]:
    """What a process has left: arrays by name."""
    with np.load(folder / "arrays.npz") as file:
        return dict(file)
