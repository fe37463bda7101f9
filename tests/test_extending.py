"""What docs/extending.md adds is right, and what a newcomer gets wrong is said in one line."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toys import assert_close, clients_of, examples, mean_loss_and_grad, net, plan_of, problem

import jaxfed
from jaxfed import (
    ClientConfig,
    Cohort,
    ConfigError,
    DataError,
    Experiment,
    Federation,
    Model,
    ServerConfig,
    Variables,
    prepare,
)

RAGGED = (7, 1, 12, 4, 9)
EMPTY = -1
PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
MODULE = "".join(re.findall(r"```python\n# my_algorithms\.py\n(.*?)```", PAGE, re.DOTALL))
CHUNKS = [None, 1, 2]


def of_page(name):
    scope: dict[str, Any] = {"__name__": "my_algorithms"}
    exec(MODULE, scope)
    return scope[name]


def with_rates(lr, server_lr):
    return Experiment(client=ClientConfig(lr=lr), server=ServerConfig(lr=server_lr))


def federation(chunk=None, aggregator=None):
    return Federation(aggregator or jaxfed.mean(), num_clients=len(RAGGED), chunk=chunk)


def plans(seats=(0, 4, EMPTY)):
    """Rounds of three different cohorts, one of them with an empty seat."""
    partition = clients_of(*RAGGED)
    everyone = [plan_of(partition, number, epochs=2) for number in (1, 2, 3)]
    cohorts = [(1, 2, 4), seats, (0, 3, 4)]
    for plan, cohort in zip(everyone, cohorts, strict=True):
        seated = np.asarray(cohort, np.int32)
        rows = np.where((seated >= 0)[:, None, None], plan.rows[seated], -1)
        yield plan._replace(clients=seated, rows=rows)


def batches_of(plan):
    """The clients of a plan, each with its batches; empty seats are left out."""
    for client, table in zip(plan.clients.tolist(), plan.rows, strict=True):
        batches = [rows[rows >= 0] for rows in table]
        if client >= 0:
            yield client, [batch for batch in batches if len(batch)]


def gradient(model, params, data, batch):
    _, g = mean_loss_and_grad(model)(params, {}, data.inputs[batch], data.targets[batch])
    return g


def trees(function, *arguments):
    return jax.tree.map(function, *arguments)


def naive_fedprox(model, x, data, plan, lr, mu):
    """Algorithm 2 of Li et al. (2020) with SGD as its solver; clients count by examples visited."""
    trained, sizes = [], []
    for _, batches in batches_of(plan):
        w = x
        for batch in batches:
            g = gradient(model, w, data, batch)
            w = trees(lambda w, g, x: w - lr * (g + mu * (w - x)), w, g, x)
        trained.append(w)
        sizes.append(sum(map(len, batches)))
    shares = np.array(sizes) / sum(sizes)
    return trees(lambda *ws: sum(p * w for p, w in zip(shares, ws, strict=True)), *trained)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_fedprox_equals_the_naive_loop(chunk, x64):
    model, data = net(), examples(sum(RAGGED))
    algorithm = of_page("fedprox")(problem(model), Experiment(), federation(chunk))
    state = algorithm.init(model.init(jax.random.key(0)))
    x, step = state.variables.params, jax.jit(algorithm.round)
    for plan in plans():
        x = naive_fedprox(model, x, data, plan, 0.1, 0.1)
        state, _ = step(state, Cohort(data, plan))
        assert_close(state.variables.params, x, 1e-12)


def naive_scaffold(model, x, c, own, data, plan, lr, server_lr):
    """Algorithm 1 of Karimireddy et al. (2020), line by line, with option II."""
    trained, changes = [], []
    for client, batches in batches_of(plan):
        y, old, steps = x, own[client], len(batches)
        for batch in batches:
            g = gradient(model, y, data, batch)
            y = trees(lambda y, g, c, c_i: y - lr * (g + c - c_i), y, g, c, old)
        own[client] = trees(
            lambda c_i, c, x, y, k=steps: c_i - c + (x - y) / (k * lr), old, c, x, y
        )
        trained.append(y)
        changes.append(trees(jnp.subtract, own[client], old))
    mean = trees(lambda *ys: sum(ys) / len(ys), *trained)
    c = trees(lambda c, *d: c + sum(d) / len(own), c, *changes)
    return trees(lambda x, y: x + server_lr * (y - x), x, mean), c


@pytest.mark.parametrize("chunk", CHUNKS)
def test_scaffold_equals_the_naive_loop(chunk, x64):
    model, data = net(), examples(sum(RAGGED))
    build = of_page("scaffold").build
    algorithm = build(problem(model), with_rates(0.1, 0.7), federation(chunk))
    state = algorithm.init(model.init(jax.random.key(0)))
    x, step = state.variables.params, jax.jit(algorithm.round)
    c = trees(jnp.zeros_like, x)
    own = [c for _ in RAGGED]
    for plan in plans():
        x, c = naive_scaffold(model, x, c, own, data, plan, 0.1, 0.7)
        state, report = step(state, Cohort(data, plan))
        assert_close(state.variables.params, x, 1e-12)
        assert_close(state.server, c, 1e-12)
        assert_close(state.memory, trees(lambda *leaves: jnp.stack(leaves), *own), 1e-12)
        assert report.num_examples == (plan.rows >= 0).sum()


def test_scaffold_leaves_out_a_client_that_diverged(x64):
    model, data = net(), examples(sum(RAGGED))
    # Client 0 holds row 0, which padding points to.
    bad = data._replace(inputs=jnp.asarray(data.inputs).at[0].set(jnp.nan))
    plan = plan_of(clients_of(*RAGGED))
    algorithm = of_page("scaffold").build(problem(model), with_rates(0.1, 1.0), federation())
    state, report = jax.jit(algorithm.round)(
        algorithm.init(model.init(jax.random.key(0))), Cohort(bad, plan)
    )
    assert report.dropped == 1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert state.seen is not None
    assert state.seen.tolist() == [False, True, True, True, True]


def naive_trimmed(messages, share):
    """Definition 2 of Yin et al. (2018), one coordinate at a time."""
    cut = int(share * len(messages))

    def of_leaf(*leaves):
        columns = np.stack([np.asarray(leaf).ravel() for leaf in leaves], axis=1).tolist()
        kept = [sorted(column)[cut : len(column) - cut] for column in columns]
        return np.array([sum(c) / len(c) for c in kept]).reshape(leaves[0].shape)

    return trees(of_leaf, *messages)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("share", "cut"), [(0.0, 0), (0.3, 1), (0.45, 1)])
def test_the_trimmed_mean_equals_the_naive_one(share, cut, chunk, x64):
    """Four clients and an empty seat; what a client sends is a row of the data."""
    data, plan = examples(sum(RAGGED)), plan_of(clients_of(*RAGGED))
    seats = np.array([3, 0, EMPTY, 2, 4], np.int32)
    rows = np.where((seats >= 0)[:, None, None], plan.rows[seats], -1)
    plan = plan._replace(clients=seats, rows=rows)
    posed, start = problem(net()), net().init(jax.random.key(0))

    def message(client):
        return trees(lambda leaf: jnp.sin(leaf + 7 * client), start.params)

    def update(sent, memory, work):
        _, stats, metrics = posed.gradient(sent.variables, work.examples, work.rows[0], work.key)
        return jaxfed.Sent(message(work.id), stats, metrics)

    shared = federation(chunk, of_page("trimmed_mean")(share))
    algorithm = jaxfed.federated(jaxfed.stateless(update), optax.sgd(1.0), shared)
    state, report = jax.jit(algorithm.round)(algorithm.init(start), Cohort(data, plan))
    wanted = naive_trimmed([message(client) for client in (0, 2, 3, 4)], share)
    assert_close(jaxfed.subtract(start.params, state.variables.params), wanted, 1e-12)
    assert report.measurements["trimmed"] == 2 * cut


# --- From the command line ------------------------------------------------------------------

SCAFFOLD = (
    "--algorithm", "my_scaffold:scaffold", "--data.partition", "shards", "--clients_per_round", "4",
)  # fmt: skip
RUN = (
    *SCAFFOLD, "--model.name", "mlp", "--model.width", "0.5", "--rounds", "150", "--eval_every",
    "2", "--checkpoint_every", "2", "--client.epochs", "1", "--quiet",
)  # fmt: skip


def train(flags, out, folder, environment):
    command = [sys.executable, "-m", "jaxfed.train", *flags, "--out", str(out)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(process):
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    return out


@pytest.fixture
def own_scaffold(tmp_path):
    (tmp_path / "my_scaffold.py").write_text(MODULE)
    return tmp_path


@pytest.mark.slow
def test_an_algorithm_outside_the_package_is_swept_in_one_program(own_scaffold, users_environment):
    flags = [*SCAFFOLD, "--model.name", "logistic", "--rounds", "3"]
    flags += ["--sweep", "client.lr=0.05,0.1,0.2"]
    printed = finished(train(flags, "sweep", own_scaffold, users_environment))
    assert "(3 points, 1 compiled)" in printed
    assert "3 of my_scaffold:scaffold" in printed
    points = sorted((own_scaffold / "sweep").glob("*/config.json"))
    recorded = [json.loads(path.read_text()) for path in points]
    assert [config["client"]["lr"] for config in recorded] == [0.05, 0.1, 0.2]
    # What it does not use is recorded as null.
    assert {config["client"]["optimizer"] for config in recorded} == {None}
    assert {config["weighting"] for config in recorded} == {None}
    losses = [json.loads((path.parent / "summary.json").read_text()) for path in points]
    assert len({summary["final_test_loss"] for summary in losses}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2"])
def test_an_algorithm_outside_the_package_survives_a_kill(devices, own_scaffold, users_environment):
    environment = {**users_environment, "JAX_NUM_CPU_DEVICES": devices}
    finished(train(RUN, "whole", own_scaffold, environment))
    process = train(RUN, "cut", own_scaffold, environment)
    metrics = own_scaffold / "cut" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 10):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (own_scaffold / "cut" / "summary.json").exists()
    finished(train([*RUN, "--resume"], "cut", own_scaffold, environment))
    for name in ("weights.npz", "best.npz"):
        whole, cut = (own_scaffold / folder / name for folder in ("whole", "cut"))
        assert cut.read_bytes() == whole.read_bytes(), name


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


FLAT = DIGITS.x_train.reshape(len(DIGITS.x_train), -1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": DIGITS.x_train[..., 0]}, r"x_train has shape .* \[N, H, W, C\]"),
        ({"x_train": FLAT}, r"x_train has shape .* \(uint8 is for images\)"),
        ({"x_test": DIGITS.x_test[:, :4]}, "x_test has shape .* one size in both sets"),
        ({"x_train": DIGITS.x_train.tolist()}, "x_train is a list; expected a numpy array"),
        ({"x_test": DIGITS.x_test.astype(str)}, "x_test is a ndarray of <U3; expected a numpy"),
        ({"y_train": DIGITS.y_train[:-1]}, r"y_train is int32 \(1437,\); expected \(1438, ...\)"),
        ({"num_classes": 9}, "labels from 0 to 9; expected 0 to 8"),
        ({"client_train": DIGITS.y_train[:5]}, "client_train has shape"),
    ],
)
def test_a_dataset_that_is_none_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        prepare(SHORT, dataset=DIGITS._replace(**changes))


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        (None, {"y_train": DIGITS.y_train / 2}, "got classification .* use --task regression"),
        (None, {"y_test": DIGITS.y_test / 2}, r"for y_test of float64 \[359\], expected integers"),
        ("next-token", {}, r"for y_train of int32 \[1438\], expected integers \[N, length\]"),
        ("multilabel", {}, r"expected 0 or 1 \[N, labels\]; use --task classification or regr"),
        ("ranking", {}, "--task: got ranking, expected one of classification"),
        ("no_such_module:task", {}, "expected module:object"),
    ],
)
def test_targets_that_do_not_fit_the_task_are_refused(task, changes, words):
    with pytest.raises(ConfigError, match=words):
        prepare(Experiment(rounds=1, task=task), dataset=DIGITS._replace(**changes))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_what_is_no_image_reaches_the_network_as_it_is(dtype):
    seen = []

    def apply(variables, inputs, mask, train, key):
        seen.append((inputs.shape[1:], inputs.dtype.name))
        return GOOD.apply(variables, inputs.astype(jnp.float32), mask, train, key)

    rows = DIGITS._replace(x_train=FLAT.astype(dtype), x_test=FLAT[:9].astype(dtype),
                           y_test=DIGITS.y_train[:9])  # fmt: skip
    prepare(SHORT, dataset=rows, model=GOOD._replace(apply=apply))
    assert set(seen) == {((64,), dtype)}


# --- An algorithm that is none --------------------------------------------------------------


def remembering(problem, experiment, federation):
    client = jaxfed.Client(lambda variables: variables.params, update=lambda *given: given[1])
    return jaxfed.federated(client, optax.sgd(1.0), federation._replace(num_clients=0))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"algorithm": "no_such_module:scaffold"}, "--algorithm: got 'no_such_module:scaffold'"),
        ({"algorithm": "jaxfed:scafold"}, "expected module:object"),
        ({"algorithm": "scaffold"}, "--algorithm: got scaffold, expected one of fedavg"),
        ({"server": ServerConfig(aggregator="jaxfed:nobody")}, "--server.aggregator: got"),
    ],
)
def test_an_algorithm_that_is_none_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        prepare(Experiment(rounds=1, **flags))


def test_build_has_to_give_an_algorithm():
    with pytest.raises(ConfigError, match=r"build gives a int, expected a jaxfed\.FedAlgorithm"):
        prepare(SHORT, algorithm=lambda problem, experiment, federation: 3)


def test_memory_needs_the_number_of_clients(x64):
    algorithm = remembering(problem(net()), Experiment(), federation())
    with pytest.raises(ValueError, match="expected the size of the population"):
        algorithm.init(net().init(jax.random.key(0)))


@pytest.mark.parametrize(
    "config",
    [
        {"client": ClientConfig(optimizer="adam")},
        {"client": ClientConfig(mu=0.1)},
        {"server": ServerConfig(momentum=0.9)},
        {"weighting": "uniform"},
    ],
)
def test_keys_that_an_algorithm_does_not_use_are_refused(config):
    with pytest.raises(ConfigError, match=r"leave (it|momentum) out"):
        prepare(Experiment(rounds=1, **config), algorithm=of_page("fedprox"))
    used = Experiment(client=ClientConfig(lr=0.2, epochs=2), server=ServerConfig(lr=0.5))
    resolved = prepare(used, algorithm=of_page("scaffold")).experiment
    assert (resolved.client.lr, resolved.client.epochs, resolved.server.lr) == (0.2, 2, 0.5)
    assert resolved.client.optimizer is resolved.server.optimizer is resolved.weighting is None


def test_a_run_is_named_after_what_runs():
    task = prepare(SHORT, dataset=DIGITS._replace(name="mine"), model=GOOD)
    assert task.experiment.name == "mine iid, own network"
    assert prepare(Experiment(name="kept"), model=GOOD).experiment.name == "kept"
    assert prepare(SHORT).experiment.name == ""
