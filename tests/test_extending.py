"""What docs/extending.md adds is right, and what a newcomer gets wrong is said in one line."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from toys import assert_close, clients_of, examples, mean_loss_and_grad, net, plan_of

import jaxfed
from jaxfed import Cohort, ConfigError, DataError, Experiment, Model, Variables, prepare

RAGGED = (7, 1, 12, 4, 9)
PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()


def scaffold(*args, **kwargs):
    (source,) = (s for s in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def sc" in s)
    scope: dict[str, Any] = {"jax": jax, "jnp": jnp, "optax": optax, "jaxfed": jaxfed}
    exec(source, scope)
    return scope["scaffold"](*args, **kwargs)


def naive_scaffold(model, x, c, own, data, plan, lr, server_lr):
    """Algorithm 1 of Karimireddy et al. (2020), line by line, with option II."""
    trained, changes = [], []
    for client, table in zip(plan.clients.tolist(), plan.rows, strict=True):
        y, steps = x, 0
        for rows in table:
            batch = rows[rows >= 0]
            if len(batch) == 0:
                continue
            variables = Variables(y, {})
            _, g = mean_loss_and_grad(model)(*variables, data.images[batch], data.labels[batch])
            y = jax.tree.map(lambda y, g, c, c_i: y - lr * (g + c - c_i), y, g, c, own[client])
            steps += 1
        old = own[client]
        own[client] = jax.tree.map(
            lambda c_i, c, x, y, k=steps: c_i - c + (x - y) / (k * lr), old, c, x, y
        )
        trained.append(y)
        changes.append(jax.tree.map(jnp.subtract, own[client], old))
    mean = jax.tree.map(lambda *ys: sum(ys) / len(ys), *trained)
    c = jax.tree.map(lambda c, *d: c + sum(d) / len(own), c, *changes)
    return jax.tree.map(lambda x, y: x + server_lr * (y - x), x, mean), c


@pytest.mark.parametrize("chunk", [None, 2])
def test_scaffold_equals_the_naive_loop(x64, chunk):
    model, data, partition = net(), examples(sum(RAGGED)), clients_of(*RAGGED)
    algorithm = scaffold(
        model, num_clients=5, lr=0.1, server_lr=0.7, chunk=chunk, dtype=jnp.float64
    )
    variables = model.init(jax.random.key(0))
    x, state, step = variables.params, algorithm.init(variables), jax.jit(algorithm.round)
    c = jax.tree.map(jnp.zeros_like, x)
    own = [c for _ in RAGGED]
    for number in (1, 2, 3):
        plan = plan_of(partition, number, epochs=2, clients_per_round=3)
        x, c = naive_scaffold(model, x, c, own, data, plan, 0.1, 0.7)
        state, metrics = step(state, Cohort(data, plan))
        assert_close(state.variables.params, x, 1e-12)
        assert_close(state.opt_state, c, 1e-12)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
        assert_close(state.own, stacked, 1e-12)
        assert metrics.num_examples == (plan.rows >= 0).sum()


def test_scaffold_leaves_out_a_client_that_diverged(x64):
    model, data = net(), examples(sum(RAGGED))
    # Client 0 holds row 0, which padding points to.
    bad = data._replace(images=jnp.asarray(data.images).at[0].set(jnp.nan))
    plan = plan_of(clients_of(*RAGGED), clients_per_round=5)
    algorithm = scaffold(model, num_clients=5, lr=0.1, dtype=jnp.float64)
    state, metrics = jax.jit(algorithm.round)(
        algorithm.init(model.init(jax.random.key(0))), Cohort(bad, plan)
    )
    assert metrics.dropped == 1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# --- What goes wrong at the first try -------------------------------------------------------


def linear(features, classes):
    def init(key):
        return Variables({"w": jnp.zeros((features, classes))}, {})

    def apply(variables, images, mask, train, key):
        return images.reshape(len(images), -1) @ variables.params["w"], variables.stats

    return Model(init, apply)


GOOD = linear(64, 10)
SHORT = Experiment(rounds=1)
DIGITS = jaxfed.load("digits")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (GOOD._replace(init=lambda key: {"w": jnp.zeros((64, 10))}), "init gives a dict"),
        (GOOD._replace(apply=lambda *given: GOOD.apply(*given)[0]), "expected the pair"),
        (GOOD._replace(apply=lambda *given: (GOOD.apply(*given)[0], None)), "variables.stats"),
        (linear(64, 9), r"logits \(2, 9\) for 2 images, expected \(2, 10\)"),
    ],
)
def test_a_network_that_is_no_model_is_refused(model, words):
    with pytest.raises(ConfigError, match=words):
        prepare(SHORT, model=model)


def test_two_networks_are_one_too_many():
    with pytest.raises(ConfigError, match="leave the other out"):
        prepare(SHORT, model=GOOD, build=lambda rngs: nnx.Linear(64, 10, rngs=rngs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": DIGITS.x_train[..., 0]}, r"x_train has shape .* \[N, H, W, C\]"),
        ({"x_test": DIGITS.x_test[:, :4]}, "x_test has shape .* one size in both sets"),
        ({"y_train": DIGITS.y_train[:-1]}, r"y_train is int32 \(1437,\); expected integers"),
        ({"y_test": DIGITS.y_test / 2}, "y_test is float64"),
        ({"num_classes": 9}, "labels from 0 to 9; expected 0 to 8"),
        ({"client_train": DIGITS.y_train[:5]}, "client_train has shape"),
    ],
)
def test_a_dataset_that_is_none_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        prepare(SHORT, dataset=DIGITS._replace(**changes))


def test_a_run_is_named_after_what_runs():
    task = prepare(SHORT, dataset=DIGITS._replace(name="mine"), model=GOOD)
    assert task.experiment.name == "mine iid, own network"
    assert prepare(Experiment(name="kept"), model=GOOD).experiment.name == "kept"
    assert prepare(SHORT).experiment.name == ""
