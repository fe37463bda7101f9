"""The files of a run. Each is either whole and new, or still whole and old."""

import contextlib
import csv
import errno
import fcntl
import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxfed.config import ConfigError, Experiment, dotted_keys, from_json, to_json, value_of

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
CHECKPOINTS, PARTICIPATION = "checkpoints", "participation.csv.gz"
LOCK, TEMPORARY = ".lock", ".tmp"
NOT_THE_NAME = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Reasons for which no file can be written, whatever it is called."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes from writing to it.

    The lock is the kernel's, so that it ends with the process, however that ends.

    Raises:
      ConfigError: if another process has it, or if it cannot be a folder.
    """
    lock = path / LOCK
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and error.errno in NOT_THE_NAME:
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--out: got {str(path)!r}, expected a folder or a new name ({reason})"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False  # held, or given up by its holder while we were looking at it
        if not mine:
            raise ConfigError(
                f"--out: got {str(path)!r}, to which another process is writing; wait until it is "
                "done, or name another folder"
            )
        for left in path.rglob(f".*{TEMPORARY}"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def begin(path: Path, experiment: Experiment, points: Sequence[str] = (), *, resume: bool) -> None:
    """Makes a run's folder, or checks that the run in it may go on, perhaps for more rounds.

    Args:
      path: the folder.
      experiment: of the run, or what the points of a sweep start from.
      points: folder names of a sweep's points; none for a run.
      resume: a run may be there.

    Raises:
      ConfigError: if one is there that may not be, or that differs in more than its number of
        rounds (naming the keys that do).
    """
    config = path / CONFIG
    if not config.exists():
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(config, to_json(experiment))
        return
    if not resume:
        raise ConfigError(
            f"--out: {str(path)!r} already holds a run; add --resume to go on with it, or name "
            "another folder"
        )
    if points and (path / METRICS).exists():
        raise ConfigError(f"--resume: {str(path)!r} holds a single run; leave --sweep out")
    found = {each.parent.name for each in path.glob(f"[0-9][0-9][0-9]*_*/{CONFIG}")}
    if odd := sorted(found - set(points)):
        raise ConfigError(
            f"--resume: {str(path)!r} holds a sweep with other points (such as {odd[0]}); give the "
            "same --sweep, or name another --out"
        )
    old = from_json(config)
    if changed := _differing(old, experiment):
        raise ConfigError(
            f"--resume: {str(path)!r} holds a run with other settings "
            f"({'; '.join(changed)}); give the same settings or name another --out"
        )
    if experiment.rounds < old.rounds:
        raise ConfigError(
            f"--rounds: got {experiment.rounds}, expected {old.rounds} or more, to go on with the "
            f"run in {str(path)!r}"
        )
    if experiment.rounds != old.rounds and "cosine" in (
        experiment.client.schedule, experiment.server.schedule
    ):  # fmt: skip
        raise ConfigError(
            f"--rounds: got {experiment.rounds}, expected {old.rounds}, since a cosine schedule "
            "depends on it; give the same number, or name another --out"
        )
    write_atomically(config, to_json(experiment))


def _differing(old: Experiment, new: Experiment) -> list[str]:
    keys = [
        key for key in dotted_keys() if key != "rounds" and value_of(old, key) != value_of(new, key)
    ]
    return [f"{key}: was {value_of(old, key)}, now {value_of(new, key)}" for key in keys]


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rounds to `metrics.jsonl`, one line each, in a single write."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with (path / METRICS).open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # they are not to be missed by a checkpoint that comes after


def append_clients(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds who took part to `participation.csv.gz`, as one more member of the archive.

    `pandas.read_csv(path)` reads all members as one table.
    """
    if not rows:
        return
    file = path / PARTICIPATION
    text = "" if file.exists() else ",".join(rows[0]) + "\n"
    text += "".join(",".join(map(_cell, row.values())) + "\n" for row in rows)
    with file.open("ab") as target:
        target.write(gzip.compress(text.encode(), mtime=0))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _members(path: Path) -> tuple[list[str], bool]:
    """The lines of `participation.csv.gz`, and whether its last member is whole."""
    text, content = "", b""
    with contextlib.suppress(FileNotFoundError):
        content = (path / PARTICIPATION).read_bytes()
    while content:
        member = zlib.decompressobj(wbits=31)  # of gzip's format
        try:
            more = member.decompress(content).decode()
        except (zlib.error, ValueError):
            return text.splitlines(), False
        if not member.eof:
            return text.splitlines(), False
        text, content = text + more, member.unused_data
    return text.splitlines(), True


def keep_clients(path: Path, rounds: int) -> None:
    """Drops what `participation.csv.gz` holds of later rounds: they will be run again."""
    lines, whole = _members(path)
    kept = lines[:1] + [line for line in lines[1:] if int(line.partition(",")[0]) <= rounds]
    if whole and kept == lines:
        return
    if len(kept) > 1:
        text = "".join(f"{line}\n" for line in kept)
        write_atomically(path / PARTICIPATION, gzip.compress(text.encode(), mtime=0))
    else:
        (path / PARTICIPATION).unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl` up to a line that was cut off, or is not the next round."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError):
        for line in (path / METRICS).read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or row.get("round") != len(rows) + 1:
                break
            rows.append(row)
    return rows


def rewrite_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces `metrics.jsonl` by these rows."""
    write_atomically(path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def read_summary(path: Path) -> dict[str, Any] | None:
    """Reads `summary.json`; None if it is not there, or not whole."""
    try:
        summary = json.loads((path / SUMMARY).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a table atomically; the first row's keys are the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
