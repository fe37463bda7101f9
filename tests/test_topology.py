"""Clients spread over devices and processes: the same numbers, to rounding."""

import json
import subprocess
import sys

import pytest

from benchmarks.topology import (
    MOVES,
    ONE,
    OUT,
    ROOT,
    SETTING,
    TOPOLOGIES,
    Topology,
    environment,
    gap,
    moved,
    run,
)  # fmt: skip
from jaxfed import load_run

# In float64 the sums over clients, taken in another order, differ in the last digits; four rounds
# of training multiply that. A client that is lost or counted twice gives 1e-2.
LIMIT = {"float64": 1e-12, "float32": 1e-3}


@pytest.fixture(scope="module")
def one_device():
    return {policy: run(ONE, policy, "float64") for policy in ("recalibrate", "local")}


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_every_topology_trains_the_same_network(one_device, topology):
    gaps = gap(one_device["recalibrate"], run(topology, "recalibrate", "float64"))
    assert gaps.weights is not None
    assert max(gaps.weights, gaps.metrics) <= LIMIT["float64"]


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
def test_layers_that_clients_keep_are_found_again(one_device):
    gaps = gap(one_device["local"], run(Topology(1, 4), "local", "float64"))
    assert gaps.weights is not None
    assert max(gaps.weights, gaps.metrics) <= LIMIT["float64"]


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
@pytest.mark.parametrize(("begin", "end"), MOVES, ids=str)
def test_a_checkpoint_of_one_topology_is_resumed_on_another(one_device, begin, end):
    rounds = moved(begin, end, "recalibrate", "float64")
    assert [row["round"] for row in rounds[1]] == [1, 2, 3, 4]
    assert gap(one_device["recalibrate"], rounds).metrics <= LIMIT["float64"]


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
def test_clients_are_scored_alike_at_the_end(tmp_path):
    flags = [f"--{key}={value}" for key, value in {**SETTING, "dtype": "float64"}.items()]
    found = []
    for devices in (1, 4):
        out = tmp_path / f"{devices}"
        subprocess.run(
            [sys.executable, "-m", "jaxfed.train", "--quiet", "--out", out, *flags],
            check=True, cwd=ROOT, env=environment(devices), timeout=300,
        )  # fmt: skip
        found.append(load_run(out).clients)
    one, four = found
    for key in ("images", "accuracy", "loss"):
        assert [row[key] for row in four] == pytest.approx([row[key] for row in one], abs=1e-6)


def test_the_committed_table_holds_every_topology_within_the_limits():
    rows = json.loads(OUT.read_text())["rows"]
    assert len(rows) == 2 * (len(TOPOLOGIES) + len(MOVES) + 1)
    for row in rows:
        assert max(row["weights"] or 0.0, row["metrics"]) <= LIMIT[row["dtype"]], row


def test_the_doc_shows_the_committed_table():
    page = (ROOT / "docs" / "scaling.md").read_text()
    table: dict[tuple[str, str], list[str]] = {}
    for row in json.loads(OUT.read_text())["rows"]:
        cells = table.setdefault((row["topology"], row["batch_stats"]), [])
        cells.append("" if row["weights"] is None else f"{row['weights']:.0e}")
        cells.append(f"{row['metrics']:.0e}")
    for (topology, policy), cells in table.items():
        assert f"| {topology} | `{policy}` | {' | '.join(cells)} |" in page


INTEGERS = """
import jax, jax.numpy as jnp, numpy as np
from jaxfed.core.clients import map_sum
from jaxfed.program import all_devices

def contribute(shared, seat):  # 2**24 + 1 is no float32
    there = seat >= 0
    summands = {"count": jnp.where(there, 2**24 + 1, 0), "weight": jnp.where(there, 0.5, 0)}
    return summands, {"id": 2**24 + 1 + seat, "odd": seat % 2 == 1, "half": seat / 2, "none": None}

seats = jnp.arange(5, dtype=jnp.int32)
one = map_sum(contribute, (), seats, 1)
two = jax.jit(lambda seats: map_sum(contribute, (), seats, 1, all_devices(), 5 - seats))(seats)
assert len(jax.devices()) == 2
jax.tree.map(np.testing.assert_array_equal, one, two)
assert jax.tree.map(lambda leaf: leaf.dtype, one) == jax.tree.map(lambda leaf: leaf.dtype, two)
"""


def test_integers_and_truth_values_come_through_collectives_exactly():
    subprocess.run([sys.executable, "-c", INTEGERS], check=True, cwd=ROOT, env=environment(2))
