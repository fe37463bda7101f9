"""Scalars for TensorBoard, written round by round (extra `tensorboard`; needs no TensorFlow)."""

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxfed.experiment import ConfigError

FOLDER = "tensorboard"
TAGS = {
    "test_accuracy": "test/accuracy",
    "test_loss": "test/loss",
    "train_accuracy": "train/accuracy",
    "train_loss": "train/loss",
    "client_delta_norm": "drift/one_client",
    "delta_norm": "drift/averaged_update",
    "dropped_clients": "clients/dropped",
    "seconds": "time/seconds_a_round",
}
"""What a column of `metrics.jsonl` is called in TensorBoard."""


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
                for key, tag in TAGS.items():
                    if row[key] is not None:
                        writer.add_scalar(tag, row[key], row["round"])
            writer.flush()

        yield add
