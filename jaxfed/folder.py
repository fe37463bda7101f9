"""The files of a run. Each is either whole and new, or still whole and old."""

import contextlib
import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxfed.algorithm import State
from jaxfed.experiment import ConfigError, Experiment, dotted_keys, from_json, to_dict, to_json

CONFIG, METRICS, SUMMARY, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, tree: Any) -> None:
    """Writes indented JSON atomically."""
    write_atomically(path, json.dumps(tree, indent=2) + "\n")


def begin(path: Path, experiment: Experiment, *, resume: bool) -> None:
    """Makes a run's folder, or checks that the run in it may go on, perhaps for more rounds.

    Raises:
      ConfigError: if a run is there and `resume` is False; or if it is True and the run that is
        there differs in more than its number of rounds (naming the keys that do).
    """
    config = path / CONFIG
    if config.exists():
        if not resume:
            raise ConfigError(
                f"--out: {str(path)!r} already holds a run; add --resume to go on with it, or name "
                "another folder"
            )
        if changed := _differing(from_json(config), experiment):
            raise ConfigError(
                f"--resume: {str(path)!r} holds a run with other settings "
                f"({'; '.join(changed)}); give the same settings or name another --out"
            )
        write_atomically(config, to_json(experiment))
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: got {str(path)!r}, which cannot be made a folder ({error.strerror})"
        ) from None
    write_atomically(config, to_json(experiment))


def _differing(old: Experiment, new: Experiment) -> list[str]:
    def at(experiment: Experiment, key: str) -> Any:
        node: Any = to_dict(experiment)
        for part in key.split("."):
            node = node[part]
        return node

    keys = [key for key in dotted_keys() if key != "rounds" and at(old, key) != at(new, key)]
    return [f"{key}: was {at(old, key)}, now {at(new, key)}" for key in keys]


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rounds to `metrics.jsonl`, one line each, in a single write."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with (path / METRICS).open("a", encoding="utf-8") as file:
        file.write(text)


def read_rows(path: Path, last_round: int | None = None) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl` up to a round, leaving out a last line that was cut off."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (path / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return [row for row in rows if last_round is None or row["round"] <= last_round]


def rewrite_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces `metrics.jsonl` by these rows."""
    write_atomically(path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a table atomically; the first row's keys are the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


@contextlib.contextmanager
def checkpoints(path: Path) -> Iterator[ocp.CheckpointManager]:
    """Opens `checkpoints/` in a run's folder; the two newest are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((path / CHECKPOINTS).absolute(), options=options) as manager:
        yield manager


def save(manager: ocp.CheckpointManager, last_round: int, state: State) -> None:
    """Saves the state after a round; a checkpoint is there whole or not at all."""
    if manager.latest_step() != last_round:
        manager.save(last_round, args=ocp.args.StandardSave(state))  # pyright: ignore[reportCallIssue]


def restore(manager: ocp.CheckpointManager, like: State) -> tuple[int, State] | None:
    """The newest checkpoint, as `(round, state)`, or None if there is none."""
    step = manager.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    found: Any = manager.restore(step, args=ocp.args.StandardRestore(abstract))  # pyright: ignore[reportCallIssue]
    return step, found
