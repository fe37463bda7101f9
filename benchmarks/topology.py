"""The same run on one device, on several, and on several processes: how far are the weights apart?

    python -m benchmarks.topology

prints a line for every topology, made of virtual CPU devices, and the largest difference from one
device, relative to the largest weight. Seven clients of unequal size share the devices, so that
some seats stay empty.
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
SETTING = {
    "rounds": 3, "eval_every": 3, "clients_per_round": 7, "data.num_clients": 9,
    "data.partition": "quantity", "data.examples_per_client": 20, "model.name": "cnn-small",
    "model.norm": "batch", "client.optimizer": "momentum", "client.lr": 0.05, "client.epochs": 2,
}  # fmt: skip
POLICIES = ("recalibrate", "local")


class Topology(NamedTuple):
    """So many processes, each with so many devices."""

    processes: int
    devices: int


TOPOLOGIES = (Topology(1, 2), Topology(1, 4), Topology(1, 8), Topology(2, 2))


def main() -> None:
    print(f"{'processes x devices':20} {'policy':12} weights    test loss")
    for policy in POLICIES:
        one = run(Topology(1, 1), policy)
        for topology in TOPOLOGIES:
            weights, loss = difference(one, run(topology, policy))
            name = f"{topology.processes} x {topology.devices}"
            print(f"{name:20} {policy:12} {weights:.1e}    {loss:.1e}", flush=True)


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> tuple[float, float]:
    """Of any weight, relative to the largest one, and of the test loss, relative to itself."""
    if one.keys() != other.keys():
        raise ValueError(f"got weights {sorted(other)}, expected {sorted(one)}")
    weights = [name for name in one if name != "loss"]
    gap = max(np.abs(other[name] - one[name]).max() for name in weights)
    largest = max(np.abs(one[name]).max() for name in weights)
    return float(gap / largest), float(abs(other["loss"] / one["loss"] - 1))


def run(topology: Topology, policy: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The weights and the test loss after the run, by process 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={topology.devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.topology", path, policy, dtype,
                 str(topology.processes), str(number), str(port)],
                env=env, cwd=ROOT,
            )
            for number in range(topology.processes)
        ]  # fmt: skip
        codes = [child.wait(300) for child in children]
        if any(codes):
            raise RuntimeError(f"{topology}: got exit codes {codes}, expected 0")
        with np.load(path) as file:
            return dict(file)


def child(path: str, policy: str, dtype: str, processes: str, number: str, port: str) -> None:
    """One process of a topology."""
    import jax

    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(number))
    import jaxfed
    from jaxfed.experiment import override

    changes = {**SETTING, "model.batch_stats": policy, "dtype": dtype}
    result = jaxfed.run(override(jaxfed.Experiment(), changes))
    if jax.process_index() == 0:
        leaves = jax.tree_util.tree_leaves_with_path(result.variables)
        arrays = {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}
        arrays["loss"] = np.asarray(result.summary["final_test_loss"])
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
