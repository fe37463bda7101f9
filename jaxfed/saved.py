"""What a run leaves for later: its weights and its clients' scores as files, and their reading.

load_run("runs/a") -> SavedRun(experiment, history, summary, variables, clients)
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed import folder
from jaxfed.config import ConfigError, Experiment, from_json
from jaxfed.core.model import Tree, Variables

WEIGHTS, BEST, CLIENTS = "weights.npz", "best.npz", "clients.csv"


class SavedRun(NamedTuple):
    """A run as it lies in its folder."""

    experiment: Experiment
    """With every default filled in."""
    history: list[dict[str, Any]]
    """One dict per round: round, train_loss, test_loss, and so on for every metric."""
    summary: dict[str, Any]
    variables: Variables
    """The server's final weights as numpy arrays, with the statistics that were evaluated."""
    clients: list[dict[str, Any]]
    """One dict per client: client, images, accuracy, loss, class_0, class_1, ..."""


def load_run(path: str | Path) -> SavedRun:
    """Reads the folder that `python -m jaxfed.train --out PATH` wrote.

    Raises:
      ConfigError: if there is no finished (or interrupted, and saved) run in it.
    """
    path = Path(path)
    for name in (folder.CONFIG, folder.SUMMARY, WEIGHTS, CLIENTS):
        if not (path / name).is_file():
            raise ConfigError(
                f"load_run: got {str(path)!r}, which has no {name}; expected the folder of a run "
                "that has ended (of one point, if it was a sweep); finish it with --resume"
            )
    return read(path, json.loads((path / folder.SUMMARY).read_text(encoding="utf-8")))


def read(path: Path, summary: dict[str, Any]) -> SavedRun:
    """Reads all but the summary, which is written last."""
    return SavedRun(
        from_json(path / folder.CONFIG),
        folder.read_rows(path),
        summary,
        read_weights(path / WEIGHTS),
        read_clients(path / CLIENTS),
    )


def write_weights(path: Path, variables: Variables) -> None:
    """Writes a network's arrays as a `.npz` file, `params/conv1/kernel` and so on, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **by_name(variables))
    folder.write_atomically(path, buffer.getvalue())


def by_name(variables: Variables) -> dict[str, np.ndarray]:
    """The arrays by their paths.

    Example:
      >>> by_name(Variables({"out": {"bias": np.zeros(2)}}, {}))
      {'params/out/bias': array([0., 0.])}
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables._asdict())
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def read_weights(path: str | Path) -> Variables:
    """Reads what `write_weights` wrote, as nested dicts of numpy arrays."""
    trees: dict[str, Tree] = {"params": {}, "stats": {}}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            *branches, leaf = name.split("/")
            node = trees
            for branch in branches:
                node = node.setdefault(branch, {})
            node[leaf] = file[name]
    return Variables(trees["params"], trees["stats"])


def client_rows(
    sizes: np.ndarray, labels: np.ndarray, scores: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The rows of `clients.csv`.

    Args:
      sizes: examples of each client, [K].
      labels: examples of each class that each client holds, [K, classes]; [K, 0] without classes.
      scores: metrics of the final network on each client's training examples, [K]; NaN: unknown.
    """
    return [
        {
            "client": client,
            "images": int(sizes[client]),
            **{name: _number(values[client]) for name, values in sorted(scores.items())},
            **{f"class_{label}": int(count) for label, count in enumerate(labels[client])},
        }
        for client in range(len(sizes))
    ]


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def read_clients(path: Path) -> list[dict[str, Any]]:
    """Reads `clients.csv`; an empty cell is None."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {
                key: int(text)
                if key in ("client", "images") or key.startswith("class_")
                else (None if text == "" else float(text))
                for key, text in row.items()
            }
            for row in csv.DictReader(file)
        ]
