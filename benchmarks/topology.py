"""The same run on one device, on several, and on several processes: how far are they apart?

    python -m benchmarks.topology [--write]

prints a line for every topology, made of virtual CPU devices. Seven clients of unequal size share
the devices, so that some seats stay empty. `weights` is the largest difference of any weight from
the run on one device, relative to the largest weight; `metrics` that of any loss or norm of any
round, relative to itself. A line `1 x 4 -> 1 x 1` is a run through `python -m jaxfed.train` that
was ended half way on the one and resumed on the other. `--write` makes
`benchmarks/results/topology.json`.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "topology.json"
SETTING = {
    "rounds": 4, "eval_every": 2, "clients_per_round": 7, "data.num_clients": 9,
    "data.partition": "quantity", "data.examples_per_client": 20, "model.name": "cnn-small",
    "model.norm": "batch", "client.optimizer": "momentum", "client.lr": 0.05, "client.epochs": 2,
}  # fmt: skip
METRICS = ("train_loss", "test_loss", "delta_norm")
DTYPES = ("float64", "float32")


class Topology(NamedTuple):
    """So many processes, each with so many devices."""

    processes: int
    devices: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.devices}"


class Gap(NamedTuple):
    """How far a run is from the one on one device."""

    weights: float | None
    metrics: float


ONE = Topology(1, 1)
TOPOLOGIES = (Topology(1, 2), Topology(1, 4), Topology(1, 8), Topology(2, 2))
MOVES = ((Topology(1, 4), ONE), (ONE, Topology(1, 4)))
Run = tuple[dict[str, np.ndarray], list[dict[str, Any]]]
"""The final weights by name, and the rounds as they stand in `metrics.jsonl`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    started, rows = time.perf_counter(), []
    print(f"{'processes x devices':20} {'batch_stats':12} {'dtype':8} weights   metrics")

    def note(name: str, policy: str, dtype: str, gap: Gap) -> None:
        row = {"topology": name, "batch_stats": policy, "dtype": dtype, **gap._asdict()}
        rows.append(row)
        weights = "-" if gap.weights is None else f"{gap.weights:.1e}"
        print(f"{name:20} {policy:12} {dtype:8} {weights:9} {gap.metrics:.1e}", flush=True)

    for dtype in DTYPES:
        one = run(ONE, "recalibrate", dtype)
        for topology in TOPOLOGIES:
            note(str(topology), "recalibrate", dtype, gap(one, run(topology, "recalibrate", dtype)))
        for begin, end in MOVES:
            name = f"{begin} -> {end}"
            note(name, "recalibrate", dtype, gap(one, moved(begin, end, "recalibrate", dtype)))
        one = run(ONE, "local", dtype)
        note(str(TOPOLOGIES[1]), "local", dtype, gap(one, run(TOPOLOGIES[1], "local", dtype)))
    if write:
        from jaxfed.folder import write_json

        names = ("jaxfed", "jax", "flax", "optax", "numpy")
        written = {
            "command": "python -m benchmarks.topology --write",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "seconds": round(time.perf_counter() - started, 1),
            "device": f"virtual CPU devices on {os.cpu_count()} cores; between processes, gloo",
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in names},
            },
            "setting": SETTING,
            "rows": rows,
        }
        write_json(OUT, written)
        print(f"written: {OUT.relative_to(ROOT)}")


def gap(one: Run, other: Run) -> Gap:
    """The largest differences; without weights where the other run kept none."""
    (weights, rows), (other_weights, other_rows) = one, other
    metrics = 0.0
    for row, other_row in zip(rows, other_rows, strict=True):
        for key in METRICS:
            if row[key] is not None:
                metrics = max(metrics, abs(other_row[key] / row[key] - 1))
    if not other_weights:
        return Gap(None, metrics)
    if weights.keys() != other_weights.keys():
        raise ValueError(f"got weights {sorted(other_weights)}, expected {sorted(weights)}")
    apart = max(np.abs(other_weights[name] - weights[name]).max() for name in weights)
    return Gap(float(apart / max(np.abs(leaf).max() for leaf in weights.values())), metrics)


def environment(devices: int) -> dict[str, str]:
    """For a process with so many virtual CPU devices."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(topology: Topology, policy: str, dtype: str = "float32") -> Run:
    """Runs the setting on a topology; what process 0 gets."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.topology", "--child", folder, policy, dtype]
        children = [
            subprocess.Popen(
                [*words, str(topology.processes), str(number), port],
                env=environment(topology.devices), cwd=ROOT,
            )
            for number in range(topology.processes)
        ]  # fmt: skip
        codes = [child.wait(300) for child in children]
        if any(codes):
            raise RuntimeError(f"{topology}: got exit codes {codes}, expected 0")
        with np.load(Path(folder) / "weights.npz") as file:
            return dict(file), json.loads((Path(folder) / "rows.json").read_text())


def child(folder: str, policy: str, dtype: str, processes: str, number: str, port: str) -> None:
    """One process of a topology."""
    import jax

    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(number))
    expected = int(os.environ["JAX_NUM_CPU_DEVICES"])
    if (got := jax.local_device_count()) != expected:
        raise RuntimeError(f"got {got} devices, expected {expected}")
    import jaxfed
    from jaxfed.config import override

    changes = {**SETTING, "model.batch_stats": policy, "dtype": dtype}
    result = jaxfed.run(override(jaxfed.Experiment(), changes))
    if jax.process_index() == 0:
        leaves = jax.tree_util.tree_leaves_with_path(result.variables)
        arrays = {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}
        np.savez(Path(folder) / "weights.npz", **arrays)  # pyright: ignore[reportArgumentType]
        (Path(folder) / "rows.json").write_text(json.dumps(result.history))


def moved(begin: Topology, end: Topology, policy: str, dtype: str) -> Run:
    """Half of the rounds on one topology, the rest resumed on another, by the command line."""
    setting = {**SETTING, "model.batch_stats": policy, "dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        for topology, rounds in ((begin, 2), (end, SETTING["rounds"])):
            flags = [f"--{key}={value}" for key, value in {**setting, "rounds": rounds}.items()]
            command = [sys.executable, "-m", "jaxfed.train", "--quiet", "--out", folder, *flags]
            if topology is end:
                command.append("--resume")
            subprocess.run(
                command, check=True, cwd=ROOT, env=environment(topology.devices), timeout=300
            )
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {}, [json.loads(line) for line in lines]


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
