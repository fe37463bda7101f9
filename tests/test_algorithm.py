"""Laws of federated averaging, exact in float64, for every execution mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import (
    assert_close,
    averaged,
    clients_of,
    examples,
    naive_round,
    net,
    plan_of,
    problem,
)

from jaxfed import Cohort, Examples, Federation, Model, Variables, mean, optimizer
from jaxfed import central as central_training
from jaxfed import fedsgd as one_gradient
from jaxfed.core.tree import all_finite
from jaxfed.plan import Plan

pytestmark = pytest.mark.usefixtures("x64")

RAGGED = (7, 1, 12, 4, 9)  # partial last batches, a client of one example, one smaller than a batch
CHUNKS = (None, 1, 2)  # all at once, one after another, uneven chunks


def settled(algorithm, model, data, plan, rounds=1, state=None):
    step = jax.jit(algorithm.round)
    state = algorithm.init(model.init(jax.random.key(0))) if state is None else state
    for _ in range(rounds - 1):
        state, _ = step(state, Cohort(data, plan))
    return step(state, Cohort(data, plan))


@functools.lru_cache
def naive_run(norm, client):
    """Three rounds of the naive loop: `[(plan, variables, train loss), ...]`."""
    model, data, partition = net(norm), examples(sum(RAGGED)), clients_of(*RAGGED)
    server, variables = optimizer("momentum", 0.7), net(norm).init(jax.random.key(0))
    opt_state, rounds = server.init(variables.params), []
    for number in (1, 2, 3):
        plan = plan_of(partition, number, epochs=2)
        variables, opt_state, loss = naive_round(
            model, optimizer(client, 0.1), server, variables, opt_state, data, plan
        )
        rounds.append((plan, variables, loss))
    return rounds


@pytest.mark.parametrize("chunk", CHUNKS)
# No Adam on BatchNorm: in a batch of one row its gradient is exactly zero, where Adam turns the
# rounding noise (1e-17) into steps of 1e-11.
@pytest.mark.parametrize(
    ("norm", "client"), [(False, "sgd"), (True, "momentum"), (False, "adam"), (False, "yogi")]
)
def test_engine_equals_the_naive_loop(chunk, norm, client):
    model, data = net(norm), examples(sum(RAGGED))
    algorithm = averaged(
        model, optimizer(client, 0.1), optimizer("momentum", 0.7), batch_stats="mean",
        chunk=chunk,
    )  # fmt: skip
    state, step = algorithm.init(model.init(jax.random.key(0))), jax.jit(algorithm.round)
    for plan, variables, loss in naive_run(norm, client):
        state, metrics = step(state, Cohort(data, plan))
        assert_close(state.variables, variables, 1e-12)
        assert_close(metrics.metrics["loss"].value(), loss, 1e-12)
        assert metrics.num_examples == 2 * sum(RAGGED)


@pytest.mark.parametrize("uniform", [False, True])
def test_weights_and_proximal_term_equal_the_naive_loop(uniform):
    model, data, partition = net(), examples(sum(RAGGED)), clients_of(*RAGGED)
    server, plan = optax.sgd(1.0), plan_of(partition, epochs=3)
    algorithm = averaged(
        model, optax.sgd(0.2), server, weighting="uniform" if uniform else "examples",
        mu=0.5,
    )  # fmt: skip
    start = model.init(jax.random.key(0))
    state, _ = settled(algorithm, model, data, plan)
    expected, _, _ = naive_round(
        model, optax.sgd(0.2), server, start, server.init(start.params), data, plan,
        uniform=uniform, prox_mu=0.5,
    )  # fmt: skip
    assert_close(state.variables.params, expected.params, 1e-12)
    no_prox = averaged(model, optax.sgd(0.2), server)
    other, _ = settled(no_prox, model, data, plan)
    gap = jnp.abs(other.variables.params["last"]["kernel"] - expected.params["last"]["kernel"])
    assert gap.max() > 1e-4


@pytest.mark.parametrize("norm", [False, True])
def test_one_client_at_server_rate_one_is_plain_sgd(norm):
    model, data, partition = net(norm), examples(11), clients_of(11)
    federated = averaged(model, optax.sgd(0.3), batch_stats="mean")
    ordinary = central_training(problem(model), optax.sgd(0.3))
    plan = plan_of(partition, epochs=2)
    left, _ = settled(federated, model, data, plan, rounds=3)
    right, _ = settled(ordinary, model, data, plan, rounds=3)
    assert_close(left.variables, right.variables, 1e-13)


def test_equal_clients_are_one_client():
    model, data = net(norm=True), examples(9)
    one = plan_of(clients_of(9), epochs=2)
    # The same rows for everybody.
    four = Plan(one.seed, one.round, np.arange(4, dtype=np.int32), np.repeat(one.rows, 4, axis=0))
    algorithm = averaged(model, optax.sgd(0.3), batch_stats="mean")
    left, _ = settled(algorithm, model, data, one)
    right, _ = settled(algorithm, model, data, four)
    assert_close(left.variables, right.variables, 1e-14)


@pytest.mark.parametrize("policy", ["frozen", "mean", "pooled"])
def test_order_of_clients_and_padding_do_not_matter(policy):
    model, data, partition = net(norm=True), examples(sum(RAGGED)), clients_of(*RAGGED)
    plan = plan_of(partition, epochs=2)
    algorithm = averaged(model, optimizer("momentum", 0.05), batch_stats=policy)
    reference, _ = settled(algorithm, model, data, plan)
    order = np.array([3, 0, 4, 2, 1])
    shuffled = plan._replace(clients=plan.clients[order], rows=plan.rows[order])
    more = np.pad(plan.rows, ((0, 2), (0, 3), (0, 5)), constant_values=-1)
    padded = plan._replace(clients=np.append(plan.clients, [-1, -1]).astype(np.int32), rows=more)
    for other in (shuffled, padded):
        state, _ = settled(algorithm, model, data, other)
        assert_close(state.variables, reference.variables, 1e-13)


def test_zero_rate_changes_nothing():
    model, data, partition = net(norm=True), examples(20), clients_of(12, 8)
    algorithm = averaged(model, optax.sgd(0.0), batch_stats="frozen")
    state, metrics = settled(algorithm, model, data, plan_of(partition))
    start = model.init(jax.random.key(0))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, state.variables, start)))
    assert metrics.delta_norm == 0


@pytest.mark.parametrize("chunk", CHUNKS[:2])
def test_one_full_batch_step_is_fedsgd(chunk):
    model, data, partition = net(), examples(sum(RAGGED)), clients_of(*RAGGED)
    full = plan_of(partition, batch_size=None)
    small = plan_of(partition, batch_size=5)
    expected, _ = settled(averaged(model, optax.sgd(0.3), chunk=chunk), model, data, full)
    for plan in (full, small):  # batches only bound the memory of a gradient
        algorithm = one_gradient(problem(model), optax.sgd(0.3), Federation(mean(), chunk=chunk))
        state, _ = settled(algorithm, model, data, plan)
        assert_close(state.variables.params, expected.variables.params, 1e-14)


@pytest.mark.parametrize(
    ("policy", "chunk"), [("mean", 1), ("pooled", 2), ("local", 2), ("local", 1)]
)
def test_chunks_equal_all_at_once(policy, chunk):
    model, data, partition = net(norm=True), examples(sum(RAGGED)), clients_of(*RAGGED)

    def algorithm(chunk):
        return averaged(
            model, optimizer("momentum", 0.1), optimizer("yogi", 0.01), batch_stats=policy,
            num_clients=5, chunk=chunk,
        )  # fmt: skip

    plan = plan_of(partition, clients_per_round=4)
    left, left_metrics = settled(algorithm(None), model, data, plan, rounds=2)
    right, right_metrics = settled(algorithm(chunk), model, data, plan, rounds=2)
    assert_close(left, right, 1e-13)
    assert_close(left_metrics, right_metrics, 1e-13)


def test_pooled_statistics_follow_the_law_of_total_variance():
    """One pass at momentum 0 on two clients gives the moments of their union."""
    from jaxfed.core.batch_stats import from_moments, to_moments

    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 5)) for n in (8, 24)]
    weights = [0.25, 0.75]
    stats = [{"bn": {"mean": jnp.array(p.mean(0)), "var": jnp.array(p.var(0))}} for p in parts]
    moments = jax.tree.map(
        lambda a, b: weights[0] * a + weights[1] * b, *(to_moments(s) for s in stats)
    )
    union = np.concatenate(parts)
    expected = {"bn": {"mean": union.mean(0), "var": union.var(0)}}
    assert_close(from_moments(moments), expected, 1e-14)


def test_frozen_statistics_stay_as_they_were():
    model, data, partition = net(norm=True), examples(30), clients_of(20, 10)
    algorithm = averaged(model, optax.sgd(0.1), batch_stats="frozen")
    state, _ = settled(algorithm, model, data, plan_of(partition), rounds=3)
    stats = state.variables.stats["norm"]
    assert (stats["mean"] == 0).all()
    assert (stats["var"] == 1).all()


def test_local_statistics_belong_to_their_client():
    """FedBN: a client's BatchNorm layer goes on from its own, and never reaches the server."""
    model, data, partition = net(norm=True), examples(36), clients_of(12, 12, 12)
    algorithm = averaged(model, optax.sgd(0.3), batch_stats="local", num_clients=3)
    start = model.init(jax.random.key(0))
    plan = plan_of(partition, clients_per_round=2)
    state, _ = settled(algorithm, model, data, plan)
    took_part = set(plan.clients.tolist())
    for client in range(3):
        scale = state.memory[0]["params/norm/scale"][client]
        assert bool(state.seen[client]) == (client in took_part)
        assert (scale == 1).all() != (client in took_part)
    assert (state.variables.params["norm"]["scale"] == 1).all()
    changed = state.variables.params["first"]["kernel"] != start.params["first"]["kernel"]
    assert changed.any()
    # With one client, FedBN is ordinary training: the client's own layer goes on every round.
    alone = averaged(model, optax.sgd(0.3), batch_stats="local", num_clients=1)
    plain = averaged(model, optax.sgd(0.3), batch_stats="mean")
    one = plan_of(clients_of(36), epochs=2)
    left, _ = settled(alone, model, data, one, rounds=3)
    right, _ = settled(plain, model, data, one, rounds=3)
    assert_close(left.variables.params["last"], right.variables.params["last"], 1e-13)
    mine = left.memory[0]["params/norm/scale"][0]
    assert_close(mine, right.variables.params["norm"]["scale"], 1e-13)


@pytest.mark.parametrize(
    ("policy", "chunk"), [("frozen", None), ("pooled", 2), ("local", 1), ("mean", 1)]
)
def test_a_client_that_is_not_finite_is_dropped_and_counted(chunk, policy):
    model, data, partition = net(norm=True), examples(24), clients_of(8, 8, 8)
    images = np.array(data.inputs)
    images[3] = np.nan
    broken = Examples(jnp.asarray(images), data.targets)
    algorithm = averaged(model, optax.sgd(0.1), batch_stats=policy, num_clients=3, chunk=chunk)
    plan = plan_of(partition)
    state, metrics = settled(algorithm, model, broken, plan)
    assert metrics.dropped == 1
    assert metrics.clients.dropped.tolist() == [True, False, False]
    assert np.isfinite(metrics.metrics["loss"].value())
    others = plan._replace(clients=plan.clients[1:], rows=plan.rows[1:])
    expected, expected_metrics = settled(algorithm, model, data, others)
    assert_close(state, expected, 1e-14)
    assert_close(metrics.metrics["loss"].value(), expected_metrics.metrics["loss"].value(), 1e-14)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1e30, -1e30], True), ([1e30, np.nan], False), ([np.inf, 0.0], False), ([], True)],
)
def test_numbers_whose_squares_overflow_are_finite(values, expected):
    tree = {"a": jnp.asarray(values, jnp.float32), "b": jnp.ones(3, jnp.float32)}
    assert bool(jax.jit(all_finite)(tree)) == expected
    assert jax.vmap(all_finite)(jax.tree.map(lambda leaf: leaf[None], tree)).tolist() == [expected]


def test_a_round_without_any_finite_client_changes_nothing():
    model, data, partition = net(norm=True), examples(8), clients_of(4, 4)
    broken = Examples(jnp.full_like(data.inputs, jnp.inf), data.targets)
    algorithm = averaged(model, optax.sgd(0.1), optimizer("adam", 0.1), batch_stats="pooled")
    warm, _ = settled(algorithm, model, data, plan_of(partition))
    state, metrics = settled(algorithm, model, broken, plan_of(partition), state=warm)
    assert metrics.dropped == 2
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, state, warm)))


def test_an_empty_client_has_no_weight():
    model, data = net(norm=True), examples(8)
    algorithm = averaged(model, optax.sgd(0.1), weighting="uniform", batch_stats="mean")
    left, _ = settled(algorithm, model, data, plan_of(clients_of(5, 0, 3)))
    right, _ = settled(algorithm, model, data, plan_of(clients_of(5, 3)))
    assert_close(left.variables, right.variables, 1e-14)


@pytest.mark.parametrize(("chunk", "computed"), [(1, 1 + 4 + 2), (2, 2 * 4 + 2 * 1), (None, 3 * 4)])
def test_padding_at_the_end_is_not_computed(chunk, computed):
    """Clients of 1, 4 and 2 steps; what a chunk computes is its longest client's for each."""
    model, data, seen = net(), examples(28), []

    def apply(variables, images, mask, train, key):
        jax.debug.callback(lambda rows: seen.append(int(rows)), mask.sum())
        return model.apply(variables, images, mask, train, key)

    plan = plan_of(clients_of(4, 16, 8), 1, epochs=1)
    algorithm = averaged(Model(model.init, apply), optimizer("sgd", 0.1), chunk=chunk)
    state = algorithm.init(model.init(jax.random.key(0)))
    jax.block_until_ready(jax.jit(algorithm.round)(state, Cohort(data, plan)))
    jax.effects_barrier()
    assert sum(rows > 0 for rows in seen) == 7
    assert len(seen) == computed


def test_a_second_round_does_not_trace_again():
    model, data, partition = net(norm=True), examples(sum(RAGGED)), clients_of(*RAGGED)
    algorithm = averaged(model, optax.sgd(0.1), batch_stats="pooled", chunk=2)
    traces = []

    def counted(state, cohort):
        traces.append(1)
        return algorithm.round(state, cohort)

    step = jax.jit(counted, donate_argnums=0)
    state = algorithm.init(model.init(jax.random.key(0)))
    for number in range(1, 5):
        state, _ = step(state, Cohort(data, plan_of(partition, number, clients_per_round=3)))
    assert len(traces) == 1


@pytest.mark.parametrize("chunk", [None, 1])
def test_training_learns(chunk):
    """A problem with a known answer: labels that a linear rule decides."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6))
    data = Examples(jnp.asarray(x), jnp.asarray(x[:, :3].argmax(1), jnp.int32))
    algorithm = averaged(net(), optax.sgd(0.3), chunk=chunk)
    state, metrics = settled(algorithm, net(), data, plan_of(clients_of(100, 150, 50)), rounds=40)
    assert metrics.metrics["accuracy"].value() > 0.95
    assert isinstance(state.variables, Variables)
