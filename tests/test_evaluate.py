"""Evaluation: exact over padding, and BatchNorm statistics re-estimated exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import assert_close, averaged, clients_of, examples, net, plan_of, problem

from jaxfed import Cohort, Examples, Variables, score
from jaxfed.core.batch_stats import has_moments, recalibrate
from jaxfed.core.evaluate import batches, evaluator

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_score_does_not_depend_on_batches(batch_size):
    model, data = net(norm=True), examples(11)
    variables = model.init(jax.random.key(1))
    mask = jnp.ones(11, bool)
    logits, _ = model.apply(variables, jnp.asarray(data.inputs), mask, False, jax.random.key(0))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.targets)
    index = jnp.asarray(batches(np.arange(11), batch_size))
    got = score(problem(model), variables, data, index)
    assert_close(got["loss"].value(), losses.mean(), 1e-14)
    right = np.asarray(logits).argmax(-1) == np.asarray(data.targets)
    assert_close(got["accuracy"].value(), right.mean(), 1e-15)


@pytest.mark.parametrize("batch_size", [30, 30 + 7])
def test_recalibration_gives_the_moments_of_the_data(batch_size):
    """One full batch: the moments of what the first layer puts out, found in numpy."""
    model, data = net(norm=True), examples(30)
    variables = model.init(jax.random.key(1))
    stats = recalibrate(
        problem(model), variables, data, jnp.asarray(batches(np.arange(30), batch_size))
    )
    hidden = np.asarray(data.inputs) @ np.asarray(variables.params["first"]["kernel"])
    assert_close(stats["norm"]["mean"], hidden.mean(0), 1e-13)
    assert_close(stats["norm"]["var"], hidden.var(0), 1e-13)


def test_recalibration_over_batches_is_exact_in_the_first_layer():
    """Uneven batches, padded: still each row once, by the law of total variance."""
    model, data = net(norm=True), examples(30)
    variables = model.init(jax.random.key(1))
    index = jnp.asarray(batches(np.arange(30), 8))
    stats = recalibrate(problem(model), variables, data, index)
    hidden = np.asarray(data.inputs) @ np.asarray(variables.params["first"]["kernel"])
    assert_close(stats["norm"]["mean"], hidden.mean(0), 1e-12)
    assert_close(stats["norm"]["var"], hidden.var(0), 1e-12)


def test_recalibration_ignores_what_the_statistics_were():
    model, data = net(norm=True), examples(20)
    params, stats = model.init(jax.random.key(1))
    odd = jax.tree.map(lambda leaf: leaf * 7 + 3, stats)
    index = jnp.asarray(batches(np.arange(20), 6))
    left, right = (
        recalibrate(problem(model), Variables(params, s), data, index) for s in (stats, odd)
    )
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, left, right)))
    assert has_moments(stats)


def test_own_networks_are_scored_on_equal_shares():
    """FedBN: the mean over clients of each one's own accuracy, on disjoint shares."""
    model, data, partition = net(norm=True), examples(36), clients_of(12, 12, 12)
    algorithm = averaged(model, optax.sgd(0.3), batch_stats="local", num_clients=3)
    state = algorithm.init(model.init(jax.random.key(0)))
    state, _ = algorithm.round(state, Cohort(data, plan_of(partition, clients_per_round=2)))
    test = examples(10, seed=5)
    evaluate = evaluator(problem(model), "local", algorithm.personal)
    index = jnp.asarray(batches(np.arange(10), 4))
    scores, _ = evaluate(state, test, index, data, index)
    right, count, loss = 0, 0, 0.0
    assert state.seen is not None
    for client in range(3):
        if not state.seen[client]:
            continue
        params = dict(state.variables.params)
        params["norm"] = {
            name: state.memory[0][f"params/norm/{name}"][client] for name in ("bias", "scale")
        }
        stats = {"norm": {n: state.memory[0][f"stats/norm/{n}"][client] for n in ("mean", "var")}}
        rows = np.arange(10)[client::3]
        share = Examples(test.inputs[rows], test.targets[rows])
        index_ = jnp.arange(len(rows))[None]
        part = score(problem(model), Variables(params, stats), share, index_)
        right, count = right + part["accuracy"].total, count + len(rows)
        loss += part["loss"].total
    assert_close(scores["accuracy"].value(), right / count, 1e-14)
    assert_close(scores["loss"].value(), loss / count, 1e-12)
