"""The entry ticket: every law holds for every row of ALGORITHMS and AGGREGATORS, in float64.

A new row needs an entry in `CASES` and a naive twin in `naive.py`, and is then held to all laws.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import NAIVE
from toys import assert_close, clients_of, examples, net, plan_of

from jaxfed import (
    AGGREGATORS,
    ALGORITHMS,
    POLICIES,
    Aggregator,
    Cohort,
    Experiment,
    FedAlgorithm,
    Federation,
    Report,
    State,
    checkpoint,
    classification,
    make_plan,
    make_schedule,
)
from jaxfed.config import numbers, override, replaced
from jaxfed.plan import Plan
from jaxfed.resolve import resolve

pytestmark = pytest.mark.usefixtures("x64")

RAGGED = (7, 1, 12, 4, 9)  # partial last batches, a client of one example, one smaller than a batch
POPULATION = len(RAGGED)


class Case(NamedTuple):
    """A row of ALGORITHMS with the settings under which its laws are looked at."""

    algorithm: str
    changes: dict
    norm: bool = True
    """Whether the network has BatchNorm."""


MOMENTUM = {"client.optimizer": "momentum", "client.lr": 0.05}
CASES = {
    "fedavg, mean": Case("fedavg", {
        **MOMENTUM, "server.momentum": 0.5, "server.lr": 0.7, "model.batch_stats": "mean",
    }),
    "fedavg, pooled": Case("fedavg", {"client.lr": 0.1, "model.batch_stats": "pooled"}),
    "fedavg, uniform": Case("fedavg", {
        "client.optimizer": "adam", "client.lr": 0.01, "weighting": "uniform",
        "server.optimizer": "yogi", "server.lr": 0.02,
    }, norm=False),
    "fedprox": Case("fedprox", {**MOMENTUM, "client.mu": 0.4, "model.batch_stats": "mean"}),
    "fedsgd": Case("fedsgd", {"server.optimizer": "momentum", "server.lr": 0.3}, norm=False),
    "fedbn": Case("fedbn", {"client.lr": 0.2, "server.lr": 0.8}),
    "central": Case("central", {**MOMENTUM, "model.batch_stats": "mean"}),
}  # fmt: skip
FEDERATED = [name for name, case in CASES.items() if case.algorithm != "central"]


def gathering(inner: Aggregator) -> Aggregator:
    """`inner` as a rule that sees all messages at once: the same numbers by the other path."""

    def encode(state, message, weight, key):
        return None, inner.encode(state, message, weight, key)[0]

    def decode(state, summed, gathered, key):
        total = jax.tree.map(lambda leaf: leaf.sum(0), gathered)
        return inner.decode(state, total, None, key)

    return Aggregator(inner.init, encode, decode)


def experiment_of(name: str) -> Experiment:
    return resolve(override(Experiment(algorithm=CASES[name].algorithm), CASES[name].changes))[0]


def build(
    name: str, *, aggregator: str = "mean", gathers: bool = False, given=None,
    dtype=jnp.float64, **federation,
) -> FedAlgorithm:  # fmt: skip
    case, experiment = CASES[name], replaced(experiment_of(name), given or {})
    made = AGGREGATORS[aggregator].build(experiment)
    shared = Federation(
        gathering(made) if gathers else made,
        POLICIES[experiment.model.batch_stats or "frozen"],
        experiment.weighting or "examples",
        POPULATION,
        **federation,
    )
    posed = classification(net(case.norm, dtype), dtype=dtype)
    return ALGORITHMS[case.algorithm].build(posed, experiment, shared)


def plans_of(name: str, rounds=(1, 2, 3), cohort: int | None = 4) -> list[Plan]:
    pooled = CASES[name].algorithm == "central"
    epochs = 1 if CASES[name].algorithm == "fedsgd" else 2
    return [
        plan_of(clients_of(*RAGGED), n, epochs=epochs, clients_per_round=cohort, pooled=pooled)
        for n in rounds
    ]


DATA = examples(sum(RAGGED))


def run(algorithm: FedAlgorithm, name: str, plans, data=None) -> tuple[State, Report]:
    state = algorithm.init(net(CASES[name].norm).init(jax.random.key(0)))
    step = jax.jit(algorithm.round)
    report = None
    for plan in plans:
        state, report = step(state, Cohort(DATA if data is None else data, plan))
    assert report is not None
    return state, report


def test_every_row_has_its_cases_and_its_twin():
    assert {case.algorithm for case in CASES.values()} == set(ALGORITHMS) == set(NAIVE)


def test_the_order_of_a_client_depends_on_seed_round_and_client_alone():
    partition = clients_of(8, 8, 8, 8)

    def orders(**changes):
        given = {"seed": 0, "clients_per_round": 4, "epochs": 2, "batch_size": 8, "shuffle": True}
        plan = make_plan(make_schedule(partition, **(given | changes)), 1)
        return {
            k: np.asarray(rows) - 8 * k
            for k, rows in zip(plan.clients.tolist(), plan.rows, strict=True)
        }

    full = orders()
    flat = [tuple(full[k].ravel().tolist()) for k in full]
    assert len(set(flat)) == 4  # no two clients share an order
    assert all(not np.array_equal(*each) for each in full.values())  # nor two epochs
    for client, rows in orders(clients_per_round=2).items():  # whoever else takes part
        assert np.array_equal(rows, full[client])


@pytest.mark.parametrize("name", CASES)
def test_equals_its_naive_twin_in_any_chunks(name):
    plans, case = plans_of(name), CASES[name]
    expected = NAIVE[case.algorithm](net(case.norm), DATA, plans, experiment_of(name))
    states = [run(build(name, chunk=chunk), name, plans)[0] for chunk in (None, 1, 2)]
    assert_close(states[0].variables, expected, 1e-12)
    for other in states[1:]:
        assert_close(other, states[0], 1e-13)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("gathers", [False, True], ids=["summed", "gathered"])
@pytest.mark.parametrize("name", FEDERATED)
def test_order_and_padding_do_not_matter(name, gathers, aggregator):
    algorithm = build(name, gathers=gathers, aggregator=aggregator)
    (plan,) = plans_of(name, rounds=(1,))
    rows = np.asarray(plan.rows)
    order = np.array([2, 0, 3, 1])
    # Padding in the middle of a table, at its end, in the batch, and as empty seats.
    more = np.full((len(rows) + 2, 2 * rows.shape[1] + 1, rows.shape[2] + 3), -1, np.int32)
    more[: len(rows), ::2][:, : rows.shape[1], : rows.shape[2]] = rows
    padded = plan._replace(clients=np.append(plan.clients, [-1, -1]).astype(np.int32), rows=more)
    shuffled = plan._replace(clients=plan.clients[order], rows=rows[order])
    expected, report = run(algorithm, name, [plan])
    for other in (shuffled, padded):
        state, other_report = run(algorithm, name, [other])
        assert_close(state, expected, 1e-13)
        assert other_report.dropped == report.dropped == 0
        assert_close(other_report.metrics, report.metrics, 1e-13)


@pytest.mark.parametrize("name", FEDERATED)
def test_a_gathered_mean_is_the_mean(name):
    plans = plans_of(name)
    left, _ = run(build(name, gathers=True, chunk=2), name, plans)
    right, _ = run(build(name), name, plans)
    assert_close(left, right, 1e-13)


@pytest.mark.parametrize("gathers", [False, True], ids=["summed", "gathered"])
@pytest.mark.parametrize("name", FEDERATED)
def test_a_client_that_is_not_finite_is_out(name, gathers):
    algorithm = build(name, gathers=gathers)
    warm, last = plans_of(name, rounds=(1, 2), cohort=5)
    broken = DATA._replace(inputs=jnp.asarray(DATA.inputs).at[0].set(jnp.nan))  # client 0's
    others = last._replace(clients=last.clients[1:], rows=last.rows[1:])
    step = jax.jit(algorithm.round)
    state, _ = run(algorithm, name, [warm])
    got, report = step(state, Cohort(broken, last))
    expected, _ = step(state, Cohort(DATA, others))
    assert report.clients.dropped.tolist() == [True, False, False, False, False]
    assert_close(got, expected, 1e-13)


@pytest.mark.parametrize("name", FEDERATED)
def test_a_round_of_nobody_changes_nothing(name):
    algorithm = build(name)
    first, second = plans_of(name, rounds=(1, 2))
    state, _ = run(algorithm, name, [first])
    empty = second._replace(rows=np.full_like(second.rows, -1))
    after, report = jax.jit(algorithm.round)(state, Cohort(DATA, empty))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, after, state)))
    assert report.num_examples == 0
    assert report.finite


@pytest.mark.parametrize("name", FEDERATED)
def test_equal_clients_are_one_client(name):
    algorithm = build(name)
    one = plan_of(clients_of(9), epochs=1 if name == "fedsgd" else 2)
    four = Plan(one.seed, one.round, np.arange(4, dtype=np.int32), np.repeat(one.rows, 4, axis=0))
    left, _ = run(algorithm, name, [one])
    right, _ = run(algorithm, name, [four])
    assert_close(left.variables, right.variables, 1e-13)
    assert_close(left.server, right.server, 1e-13)


@pytest.mark.parametrize("name", FEDERATED)
def test_memory_is_written_for_the_cohort_alone(name):
    """An empty seat writes nowhere, above all not to the last client."""
    algorithm = build(name)
    (full,) = plans_of(name, rounds=(1,), cohort=5)
    plan = full._replace(
        clients=np.array([0, 4, -1], np.int32),
        rows=np.concatenate([full.rows[[0, 4]], np.full_like(full.rows[:1], -1)]),
    )
    state, _ = run(algorithm, name, [plan])
    if state.memory is None or state.seen is None:
        assert CASES[name].algorithm != "fedbn"
        return
    seen = state.seen.tolist()
    start = algorithm.init(net(CASES[name].norm).init(jax.random.key(0)))
    assert seen == [True, False, False, False, True]

    def changed(client):
        pairs = zip(jax.tree.leaves(state.memory), jax.tree.leaves(start.memory), strict=True)
        return any(bool((a[client] != b[client]).any()) for a, b in pairs)

    assert [changed(client) for client in range(POPULATION)] == seen


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", CASES)
def test_state_keeps_structure_shapes_and_dtypes(name, dtype):
    model = net(CASES[name].norm, dtype)
    data = DATA._replace(inputs=jnp.asarray(DATA.inputs, dtype))
    algorithm = build(name, dtype=dtype)
    (plan,) = plans_of(name, rounds=(1,))
    with jax.enable_x64(dtype == jnp.float64):
        state = algorithm.init(model.init(jax.random.key(0)))
        after = jax.eval_shape(algorithm.round, state, Cohort(data, plan))[0]
        like = jax.eval_shape(lambda: state)
    assert jax.tree.structure(after) == jax.tree.structure(like)
    left, right = jax.tree.leaves(after), jax.tree.leaves(like)
    assert [(x.shape, x.dtype) for x in left] == [(x.shape, x.dtype) for x in right]


@pytest.mark.parametrize("name", CASES)
def test_five_rounds_are_traced_once(name):
    algorithm, traces = build(name), []

    def counted(state, cohort):
        traces.append(1)
        return algorithm.round(state, cohort)

    step, state = jax.jit(counted), None
    state = algorithm.init(net(CASES[name].norm).init(jax.random.key(0)))
    plans = plans_of(name, rounds=range(1, 6), cohort=None if name == "central" else 4)
    for plan in plans:
        state, _ = step(state, Cohort(DATA, plan))
    assert len(traces) == 1


@pytest.mark.parametrize("name", CASES)
def test_traced_numbers_are_fixed_numbers(name):
    """Every float of client and server, as inputs of one program for two points."""
    (plan,) = plans_of(name, rounds=(1,))
    fixed = numbers(experiment_of(name))
    assert fixed
    points = {key: jnp.array([value, value / 2]) for key, value in fixed.items()}

    def after(given):
        algorithm = build(name, given=given)
        state = algorithm.init(net(CASES[name].norm).init(jax.random.key(0)))
        return algorithm.round(state, Cohort(DATA, plan))[0]

    many = jax.jit(lambda points: jax.lax.map(after, points))(points)
    for place, share in enumerate((1.0, 0.5)):
        one = jax.jit(lambda s=share: after({key: s * value for key, value in fixed.items()}))()
        assert_close(jax.tree.map(lambda leaf, at=place: leaf[at], many), one, 1e-13)


@pytest.mark.parametrize("name", CASES)
def test_survives_a_checkpoint_bit_for_bit(name, tmp_path):
    algorithm = build(name)
    plans = plans_of(name)
    state, _ = run(algorithm, name, plans[:2])
    checkpoint.save(tmp_path, 2, state, {})
    loaded, _ = checkpoint.load(tmp_path, 2, state)
    step = jax.jit(algorithm.round)
    left, _ = step(state, Cohort(DATA, plans[2]))
    right, _ = step(loaded, Cohort(DATA, plans[2]))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, left, right)))


def test_an_aggregator_that_gathers_too_much_is_refused(monkeypatch):
    monkeypatch.setattr("jaxfed.core.federated.GATHERED", 4 * 47)
    name = "fedavg, mean"
    plans = plans_of(name, rounds=(1,), cohort=4)
    run(build(name), name, plans)
    with pytest.raises(ValueError, match=r"4 clients x \d+ numbers .* take a smaller cohort"):
        run(build(name, gathers=True), name, plans)


ON_DEVICES = """
import jax, numpy as np
from jax.sharding import Mesh
from test_laws import FEDERATED, build, plans_of, run
from toys import assert_close

jax.config.update("jax_enable_x64", True)
devices = np.asarray(jax.devices())
assert len(devices) == 4
for name in FEDERATED:
    plans = plans_of(name, cohort=3)  # fewer clients than devices, and not divisible by two
    expected = run(build(name), name, plans)
    for count, chunk, gathers in ((2, None, False), (4, 1, True), (2, 1, True)):
        mesh = Mesh(devices[:count], ("clients",))
        got = run(build(name, mesh=mesh, chunk=chunk, gathers=gathers), name, plans)
        assert_close(got, expected, 1e-13)
        print(name, count, flush=True)
"""


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES], cwd=Path(__file__).parent, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3 * len(FEDERATED)
