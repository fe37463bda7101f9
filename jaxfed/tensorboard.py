"""Scalars for TensorBoard, written round by round (extra `tensorboard`; needs no TensorFlow)."""

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxfed.config import ConfigError

FOLDER = "tensorboard"
TAGS = {
    "client_delta_norm": "drift/one_client",
    "delta_norm": "drift/averaged_update",
    "dropped_clients": "clients/dropped",
    "num_examples": "clients/examples",
    "seconds": "time/seconds_per_round",
}
"""The TensorBoard tags of columns of `metrics.jsonl`; metrics are `test/NAME` and `train/NAME`."""


def tag_of(column: str) -> str | None:
    """The tag of a column; None if it is not shown."""
    for part in ("test", "train"):
        if column.startswith(f"{part}_"):
            return f"{part}/{column.removeprefix(f'{part}_')}"
    if column in ("round", "diverged"):
        return None
    return TAGS.get(column, f"aggregator/{column}")


def require() -> None:
    """Refuses, before anything is computed, where the extra is missing.

    Raises:
      ConfigError: it is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "--tensorboard: needs tensorboardX, which is not installed; "
            "pip install 'jaxfed[tensorboard]', or leave the flag out"
        )


@contextlib.contextmanager
def board(path: Path) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
    """Opens `tensorboard/` in a run's folder, afresh; gives a function that adds rounds."""
    from tensorboardX import SummaryWriter  # noqa: PLC0415 (optional)

    shutil.rmtree(path / FOLDER, ignore_errors=True)
    with SummaryWriter(str(path / FOLDER)) as writer:

        def add(rows: Sequence[dict[str, Any]]) -> None:
            for row in rows:
                for key, value in row.items():
                    if value is not None and (tag := tag_of(key)):
                        writer.add_scalar(tag, value, row["round"])
            writer.flush()

        yield add
