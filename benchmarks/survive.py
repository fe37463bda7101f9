"""Kills training processes at random moments, resumes them, and compares with undisturbed ones.

    python -m benchmarks.survive [--kills 20] [--seed 0]

A run and a sweep of two programs take turns. Each is killed (SIGKILL) after a random part of the
time that an undisturbed one takes, from its first import to its last file, and resumed until it is
done or the kills are used up; then its rounds, states, summaries and table are held against the
undisturbed one's. Exit code 0: nothing differs, 1: something does.
"""

import argparse
import csv
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
RUN = (
    "--model.name", "mlp", "--model.width", "0.5", "--rounds", "120", "--eval_every", "2",
    "--checkpoint_every", "2", "--client.epochs", "1", "--server.optimizer", "adam",
    "--server.lr", "0.01", "--clients_per_round", "4", "--quiet",
)  # fmt: skip
SWEEP = ("--sweep", "client.lr=0.05,0.1", "--sweep", "client.batch_size=20,40")
SECONDS = ("seconds", "compile_seconds", "train_seconds", "evaluate_seconds")
LONG = 600.0


class Survived(NamedTuple):
    """What came of it."""

    kills: int
    training: int
    """Of them, those of a process that had already written a round."""
    finished: int
    """Runs and sweeps that were killed and finished."""
    difference: float
    """The largest, of any number in any file; infinite if a file or a row is missing."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills and resumes training.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        done = survive(Path(work), options.kills, options.seed)
    print(
        f"kills survived: {done.kills} ({done.training} while it trained), "
        f"{done.finished} runs and sweeps finished; largest difference: {done.difference:g}"
    )
    return 0 if done.difference == 0 else 1


def survive(work: Path, kills: int, seed: int) -> Survived:
    """Kills so often; all files are in `work`."""
    draw = random.Random(seed)
    commands = {"run": RUN, "sweep": (*RUN, *SWEEP)}
    lasted = {}
    for kind, flags in commands.items():
        began = time.perf_counter()
        _wait(_start(flags, work / kind), LONG)
        lasted[kind] = time.perf_counter() - began
    killed, training, finished, difference = 0, 0, 0, 0.0
    while killed < kills:
        kind = list(commands)[finished % len(commands)]
        out = work / f"{kind}_{finished}"
        done = False
        while not done:
            before = _written(out)
            patience = draw.random() * lasted[kind] if killed < kills else LONG
            done = _wait(_start(commands[kind], out), patience)
            killed += not done
            training += not done and _written(out) != before
        finished += 1
        difference = max(difference, largest(_numbers(work / kind), _numbers(out)))
    return Survived(killed, training, finished, difference)


def _start(flags: tuple[str, ...], out: Path) -> subprocess.Popen:
    resume = ["--resume"] if (out / "config.json").exists() else []
    return subprocess.Popen(
        [sys.executable, "-m", "jaxfed.train", *flags, "--out", str(out), *resume],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether the process was done in time; else it is dead now."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if code:
        raise RuntimeError(f"got exit code {code}, expected 0")
    return True


def _written(out: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(out.rglob("metrics.jsonl"))]


def _numbers(out: Path) -> dict[str, Any]:
    """All that a folder says, but for how long it took."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found |= {f"{name} {row['round']} {key}": value for row in rows
                      for key, value in row.items() if key not in SECONDS}  # fmt: skip
        elif path.name in ("summary.json", "config.json"):
            tree = json.loads(path.read_text())
            found |= {f"{name} {k}": v for k, v in tree.items() if k not in SECONDS}
        elif path.suffix == ".csv":
            with path.open() as file:
                for number, row in enumerate(csv.DictReader(file)):
                    found |= {f"{name} {number} {k}": v for k, v in row.items() if k not in SECONDS}
        elif path.suffix == ".gz":
            found[name] = gzip.decompress(path.read_bytes()).decode()
        elif path.suffix == ".npz":
            with np.load(path) as file:
                found |= {f"{name} {k}": v for k, v in file.items() if k != "notes"}
        elif path.is_file():
            found[name] = "there"
    return found


def largest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any number; infinite where something else differs."""
    gaps = [np.inf if name not in one or name not in other else _gap(one[name], other[name])
            for name in one.keys() | other.keys()]  # fmt: skip
    return max(gaps)


def _gap(one: Any, other: Any) -> float:
    if isinstance(one, np.ndarray) and one.shape == other.shape and one.dtype == other.dtype:
        if one.tobytes() == other.tobytes():
            return 0.0
        return float(np.abs(one.astype(float) - other.astype(float)).max())
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    return 0.0 if type(one) is type(other) and one == other else np.inf


if __name__ == "__main__":
    sys.exit(main())
