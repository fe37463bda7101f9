"""Clients spread over devices and processes: the same numbers, to rounding."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.topology import ROOT, TOPOLOGIES, Topology, difference, run
from jaxfed import load_run

# In float64 the sums over clients, taken in another order, differ in the last digits; three rounds
# of training multiply that. A client that is lost or counted twice gives 1e-2.
LIMIT = 1e-12


@pytest.fixture(scope="module")
def one_device():
    return {policy: run(Topology(1, 1), policy, "float64") for policy in ("recalibrate", "local")}


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_every_topology_trains_the_same_network(one_device, topology):
    gaps = difference(one_device["recalibrate"], run(topology, "recalibrate", "float64"))
    assert max(gaps) <= LIMIT


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
def test_layers_that_clients_keep_are_found_again(one_device):
    gaps = difference(one_device["local"], run(Topology(1, 4), "local", "float64"))
    assert max(gaps) <= LIMIT


def train(folder, devices, *flags):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    force = f"--xla_force_host_platform_device_count={devices}"
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {force}"
    command = [sys.executable, "-m", "jaxfed.train", "--out", folder, "--quiet", *flags]
    command += ["--model.name", "mlp", "--data.num_clients", "5", "--dtype", "float64"]
    subprocess.run(command, check=True, cwd=ROOT, env=env, timeout=300)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
def test_a_checkpoint_of_one_topology_is_resumed_on_another(tmp_path):
    whole = train(tmp_path / "whole", 1, "--rounds", "4")
    train(tmp_path / "moved", 4, "--rounds", "2")
    moved = train(tmp_path / "moved", 1, "--rounds", "4", "--resume")
    train(tmp_path / "back", 1, "--rounds", "2")
    back = train(tmp_path / "back", 4, "--rounds", "4", "--resume")
    for rows in (moved, back):
        assert [row["round"] for row in rows] == [1, 2, 3, 4]
        for key in ("train_loss", "test_loss", "test_accuracy", "delta_norm"):
            assert [row[key] for row in rows] == pytest.approx(
                [row[key] for row in whole], rel=1e-12
            )
    # What is measured at the end, on each client's images, by one device and by four.
    one, four = (load_run(tmp_path / name).clients for name in ("whole", "back"))
    for key in ("images", "accuracy", "loss"):
        assert [row[key] for row in four] == pytest.approx([row[key] for row in one], abs=1e-6)
