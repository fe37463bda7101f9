"""Hyper-parameters, schedules, start and end of a run; nothing is ignored in silence."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed
from jaxfed import ClientConfig, ConfigError, Experiment, ModelConfig, ServerConfig, prepare, run
from jaxfed.config import override
from jaxfed.optimizers import OPTIMIZERS, client_optimizer, optimizer, server_optimizer
from jaxfed.saved import read_weights
from jaxfed.train import main

QUICK = ["--model.name", "logistic", "--client.epochs", "1", "--data.examples_per_client", "20"]
SHORT = Experiment(rounds=3, model=ModelConfig(name="logistic"))


# --- Optimizers -----------------------------------------------------------------------------


def steps(tx, gradients, start):
    state, x, path = tx.init(start), start, []
    for gradient in gradients:
        updates, state = tx.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        path.append(np.asarray(x))
    return np.array(path)


def naive_reddi(kind, gradients, start, lr, b1, b2, tau):
    """Algorithm 2 of Reddi et al. (2021); a gradient here is minus their pseudo-gradient."""
    x, m, v, path = np.array(start), 0.0, tau**2, []
    for g in gradients:
        d = -np.asarray(g)
        m = b1 * m + (1 - b1) * d
        if kind == "fedadagrad":
            v = v + d**2
        elif kind == "fedyogi":
            v = v - (1 - b2) * d**2 * np.sign(v - d**2)
        else:
            v = b2 * v + (1 - b2) * d**2
        x = x + lr * m / (np.sqrt(v) + tau)
        path.append(x)
    return np.array(path)


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi", "fedadagrad"])
def test_reddis_optimizers_are_as_published(kind, x64):
    rng = np.random.default_rng(0)
    gradients, start = jnp.asarray(rng.normal(size=(20, 5))), jnp.asarray(rng.normal(size=5))
    given = {"b1": 0.8, "epsilon": 0.03} | ({} if kind == "fedadagrad" else {"b2": 0.95})
    got = steps(optimizer(kind, 0.1, **given), gradients, start)
    expected = naive_reddi(kind, gradients, start, 0.1, 0.8, 0.95, 0.03)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_sgd_with_momentum_is_momentum(x64):
    rng = np.random.default_rng(0)
    gradients, start = jnp.asarray(rng.normal(size=(5, 3))), jnp.zeros(3)
    left = steps(optimizer("sgd", 0.1, 0.9), gradients, start)
    assert np.array_equal(left, steps(optimizer("momentum", 0.1), gradients, start))
    assert not np.allclose(left, steps(optimizer("sgd", 0.1), gradients, start))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_number_of_an_optimizer_counts_and_no_other_is_taken(name, x64):
    rng = np.random.default_rng(1)
    gradients, start = jnp.asarray(rng.normal(size=(5, 3))), jnp.ones(3)
    plain = steps(optimizer(name, 0.1), gradients, start)
    for key in ("momentum", "b1", "b2", "epsilon", "weight_decay"):
        if key in OPTIMIZERS[name].defaults or key == "weight_decay":
            other = steps(optimizer(name, 0.1, **{key: 0.3}), gradients, start)
            assert not np.allclose(other, plain, rtol=1e-6), key
        else:
            with pytest.raises(ValueError, match=key):
                optimizer(name, 0.1, **{key: 0.3})


def test_clipping_and_weight_decay(x64):
    gradient, weights = jnp.array([3.0, 4.0]), jnp.array([10.0, 0.0])
    config = ClientConfig(optimizer="sgd", lr=1.0, clip=1.0, weight_decay=0.1)
    tx = client_optimizer(config, rounds=1)
    assert isinstance(tx, optax.GradientTransformation)
    updates, _ = tx.update(gradient, tx.init(weights), weights)
    np.testing.assert_allclose(np.asarray(updates), [-0.6 - 1.0, -0.8], rtol=1e-12)
    small, _ = tx.update(gradient / 100, tx.init(weights), weights * 0)
    np.testing.assert_allclose(np.asarray(small), -gradient / 100, rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"schedule": "exponential", "lr_decay": 0.5}, [1, 0.5, 0.25, 0.125]),
        ({"schedule": "cosine"}, [(1 + np.cos(np.pi * t / 4)) / 2 for t in range(4)]),
        ({"schedule": "constant", "warmup": 2}, [0.5, 1, 1, 1]),
    ],
)
def test_schedules_go_by_round(changes, factors, x64):
    tx = server_optimizer(ServerConfig(optimizer="sgd", lr=2.0, **changes), rounds=4)
    tx = optax.with_extra_args_support(tx)
    state = tx.init(jnp.ones(1))
    got = [
        np.asarray(tx.update(jnp.ones(1), state, jnp.ones(1), round=jnp.array(r), clients=1)[0])[0]
        for r in range(1, 5)
    ]
    np.testing.assert_allclose(got, [-2 * f for f in factors], rtol=1e-12)
    if "warmup" not in changes:
        local = client_optimizer(ClientConfig(optimizer="sgd", lr=2.0, **changes), rounds=4)
        for r, f in enumerate(factors, start=1):
            tx = local(jnp.array(r))  # pyright: ignore[reportCallIssue]
            step, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
            np.testing.assert_allclose(np.asarray(step), [-2 * f])


def test_a_client_schedule_is_by_round_in_a_run():
    """Rate 0.4 in round 1 and 0.2 in round 2 is what two runs of one round each make of it."""
    base = override(SHORT, {"rounds": 2, "client.lr": 0.4, "client.lr_decay": 0.5})
    both = run(base).history
    constant = run(override(SHORT, {"rounds": 2, "client.lr": 0.4})).history
    assert both[0]["test_loss"] == pytest.approx(constant[0]["test_loss"], rel=1e-6)
    assert both[1]["test_loss"] != pytest.approx(constant[1]["test_loss"], rel=1e-3)


def test_defaults_follow_the_optimizer():
    task = prepare(Experiment(server=ServerConfig(optimizer="adam")))
    assert task.experiment.server.lr == 0.01
    assert task.experiment.client.lr == 0.1
    assert prepare(Experiment(client=ClientConfig(optimizer="adam"))).experiment.client.lr == 0.001
    result = run(override(Experiment(rounds=15, eval_every=15), {"server.optimizer": "adam"}))
    assert result.summary["final_test_accuracy"] > 0.85


# --- Nothing is ignored -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--algorithm", "fedsgd", "--client.lr", "0.1"], "fedsgd, which does not use it"),
        (["--algorithm", "fedsgd", "--client.optimizer", "sgd"], "--client.optimizer: got sgd"),
        (["--algorithm", "fedsgd", "--client.epochs", "2"], "--client.epochs: got 2"),
        (["--algorithm", "central", "--server.lr", "0.5"], "--server.lr: got 0.5"),
        (["--algorithm", "central", "--server.optimizer", "adam"], "--server.optimizer: got adam"),
        (["--algorithm", "central", "--weighting", "uniform"], "--weighting: got uniform"),
        (["--client.mu", "0.1"], "use --algorithm fedprox"),
        (["--client.prox_mu", "0.1"], "--client.mu: got 0.1"),
        (["--client.momentum", "0.9", "--client.optimizer", "adam"], "which has no momentum"),
        (["--server.b1", "0.9"], "which has no b1; use --server.optimizer adam"),
        (["--client.lr_decay", "0.9", "--client.schedule", "cosine"], "schedule exponential"),
        (["--data.alpha", "0.3"], "use --data.partition dirichlet"),
        (["--data.shards_per_client", "3"], "use --data.partition shards"),
        (["--server.aggregator", "medain"], "expected one of mean"),
        (["--algorithm", "fedavgg"], "did you mean fedavg?"),
        (["--client.optimizer", "adamm"], "did you mean adam?"),
        (["--model.frozen", "nothing/*"], "matches no parameter"),
        (["--init", "nowhere.npz"], "expected a weights.npz"),
    ],
)
def test_what_is_not_used_is_refused(flags, words, capsys):
    assert main([*flags, "--rounds", "1"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("algorithm", jaxfed.ALGORITHMS)
def test_the_record_holds_what_was_used_and_nothing_else(algorithm):
    norm = "batch" if algorithm == "fedbn" else None
    model = ModelConfig(name="mlp", width=0.1, norm=norm)
    experiment = prepare(Experiment(algorithm=algorithm, model=model)).experiment
    uses = jaxfed.ALGORITHMS[algorithm].uses
    for key in ("client.lr", "server.lr", "client.optimizer", "server.optimizer", "weighting"):
        group, _, leaf = key.rpartition(".")
        value = getattr(getattr(experiment, group) if group else experiment, leaf)
        assert (value is not None) == (key in uses), key
    assert experiment.data.alpha is None
    assert prepare(experiment).experiment == experiment  # and it can be run again


def test_an_own_algorithm_is_recorded_with_what_it_uses():
    def build(problem, experiment, federation):
        return jaxfed.fedavg(problem, optax.sgd(0.3), None, federation)

    result = run(SHORT, algorithm=build)
    assert result.experiment.client.lr is None
    assert result.experiment.client.optimizer is None
    assert result.experiment.algorithm != "fedavg"
    with pytest.raises(ConfigError, match=r"--client\.lr: got 7\.0"):
        run(override(SHORT, {"client.lr": 7.0}), algorithm=build)
    spec = jaxfed.Spec(build, uses=("client.lr",), defaults={"client.lr": 0.3})
    assert run(SHORT, algorithm=spec).experiment.client.lr == 0.3


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (3, "expected a jaxfed.Spec, or a function of"),
        (jaxfed.zeros, r"function of \(problem, experiment, federation\)"),
        (jaxfed.Spec(lambda *_: None, uses=("client.learning_rate",)), "which is no key"),
        (lambda problem, experiment, federation: None, "expected a jaxfed.FedAlgorithm"),
        (
            lambda problem, experiment, federation: jaxfed.fedavg(
                problem, jaxfed.client_optimizer(experiment.client, 1)
            ),
            "list 'client.optimizer' and 'client.lr' in Spec.uses",
        ),
    ],
)
def test_an_algorithm_that_is_none_is_refused(algorithm, words):
    with pytest.raises(ConfigError, match=words):
        prepare(SHORT, algorithm=algorithm)


def test_own_statistics_need_clients_that_keep_them():
    spec = jaxfed.Spec(
        lambda problem, experiment, federation: jaxfed.fedavg(problem, optax.sgd(0.1)),
        uses=("model.batch_stats",),
    )
    model = ModelConfig(name="mlp", width=0.1, norm="batch", batch_stats="local")
    with pytest.raises(ConfigError, match="keep no network of their own"):
        prepare(Experiment(model=model), algorithm=spec)


def test_earlier_config_files_are_read(tmp_path):
    """Files of jaxfed 0.1 record defaults that their algorithm did not use."""
    old = {
        "algorithm": "fedsgd", "rounds": 2, "weighting": "examples",
        "data": {"dataset": "digits", "alpha": 0.5, "shards_per_client": 2},
        "client": {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "prox_mu": None},
        "server": {"optimizer": "sgd", "lr": 1.0, "momentum": None},
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(old))
    assert prepare(jaxfed.from_json(path)).experiment.server.lr == 1.0
    central = {**old, "algorithm": "central"}
    path.write_text(json.dumps(central))
    assert prepare(jaxfed.from_json(path)).experiment.client.lr == 0.1


def test_a_cosine_schedule_cannot_be_made_longer(tmp_path, capsys):
    out = str(tmp_path / "run")
    flags = [*QUICK, "--client.schedule", "cosine", "--out", out]
    assert main([*flags, "--rounds", "2"]) == 0
    assert main([*flags, "--rounds", "3", "--resume"]) == 2
    assert "cosine schedule depends on it" in capsys.readouterr().err


# --- Start and end --------------------------------------------------------------------------


def test_a_run_starts_from_weights_of_another(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*QUICK, "--rounds", "3", "--out", str(first)]) == 0
    for where in (first, first / "weights.npz"):
        flags = ["--init", str(where), "--client.lr", "0", "--rounds", "1", "--seed", "5"]
        assert main([*QUICK, *flags, "--out", str(second / where.name)]) == 0
        left, right = (jaxfed.load_run(path).variables for path in (first, second / where.name))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, left, right)))


def test_weights_of_another_network_are_refused(tmp_path, capsys):
    assert main([*QUICK, "--rounds", "1", "--out", str(tmp_path / "a")]) == 0
    assert main(["--model.name", "mlp", "--init", str(tmp_path / "a"), "--rounds", "1"]) == 2
    assert "holds another network" in capsys.readouterr().err


def test_frozen_parameters_stay_and_the_others_do_not():
    model = ModelConfig(name="mlp", width=0.1, frozen="dense1/*,*/bias")
    optimizers = {"client.optimizer": "adamw", "server.optimizer": "adamw"}
    task = prepare(override(Experiment(rounds=2, model=model), optimizers))
    start = task.problem.init(jax.random.key(0)).params
    after = run(task.experiment).variables.params
    for layer, leaves in start.items():
        for name, leaf in leaves.items():
            same = np.array_equal(leaf, after[layer][name])
            assert same == (layer == "dense1" or name == "bias"), (layer, name)


def test_a_run_stops_at_a_test_score(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--model.name", "logistic", "--rounds", "40", "--stop_at", "0.9", "--client.lr", "0.5"]
    assert main([*flags, "--out", str(out)]) == 0
    saved = jaxfed.load_run(out)
    assert saved.summary["stopped_in_round"] == len(saved.history) < 40
    assert [row["test_accuracy"] >= 0.9 for row in saved.history][-2:] == [False, True]
    before = (out / "weights.npz").read_bytes()
    assert main([*flags, "--resume", "--out", str(out)]) == 0  # it is over, and stays so
    assert (out / "weights.npz").read_bytes() == before


def test_points_of_a_sweep_stop_each_by_itself(tmp_path):
    out, alone = tmp_path / "sweep", tmp_path / "alone"
    flags = ["--model.name", "logistic", "--rounds", "12", "--stop_at", "0.9"]
    assert main([*flags, "--sweep", "client.lr=0.5,0.001", "--out", str(out)]) == 0
    assert main([*flags, "--client.lr", "0.5", "--out", str(alone)]) == 0
    fast, slow = (jaxfed.load_run(path) for path in sorted(out.glob("0*")))
    assert fast.summary["stopped_in_round"] == jaxfed.load_run(alone).summary["rounds"] < 12
    assert slow.summary["stopped_in_round"] is None
    assert len(slow.history) == 12
    left, right = fast.variables.params, jaxfed.load_run(alone).variables.params
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_best_round_is_kept_beside_the_last(tmp_path):
    out = tmp_path / "run"
    # A rate at which accuracy goes up and down.
    flags = ["--model.name", "logistic", "--rounds", "8", "--client.lr", "30", "--seed", "1"]
    assert main([*flags, "--out", str(out)]) == 0
    saved = jaxfed.load_run(out)
    tested = [row["test_accuracy"] for row in saved.history]
    when = saved.summary["best_round"]
    assert tested[when - 1] == max(tested) == saved.summary["best_test_accuracy"]
    assert when == 1 + tested.index(max(tested)) < 8
    shorter = tmp_path / "shorter"
    flags[3] = str(when)
    assert main([*flags, "--out", str(shorter)]) == 0
    best, last = (read_weights(path) for path in (out / "best.npz", shorter / "weights.npz"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, best, last)))
    result = run(override(SHORT, {"rounds": 8, "client.lr": 30.0, "seed": 1, "client.epochs": 3}))
    assert result.summary["best_round"] == when
    for a, b in zip(jax.tree.leaves(result.best), jax.tree.leaves(best), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_who_took_part_is_one_table(tmp_path):
    pandas = pytest.importorskip("pandas")
    out, longer = tmp_path / "run", tmp_path / "longer"
    flags = [*QUICK, "--clients_per_round", "3"]
    assert main([*flags, "--rounds", "4", "--out", str(out)]) == 0
    table = pandas.read_csv(out / "participation.csv.gz")
    assert list(table) == [
        "round", "client", "examples", "loss", "accuracy", "drift", "dropped",
    ]  # fmt: skip
    assert len(table) == 12
    assert (table.groupby("round").client.nunique() == 3).all()
    saved = jaxfed.load_run(out)
    for row in saved.history:
        ours = table[table["round"] == row["round"]]
        mean = np.average(ours.loss, weights=ours.examples)
        assert mean == pytest.approx(row["train_loss"], rel=1e-4)
        assert ours.examples.sum() == row["num_examples"]
        assert ours.drift.mean() == pytest.approx(row["client_delta_norm"], rel=1e-4)
    assert main([*flags, "--rounds", "6", "--resume", "--out", str(out)]) == 0
    assert main([*flags, "--rounds", "6", "--out", str(longer)]) == 0
    left, right = (pandas.read_csv(path / "participation.csv.gz") for path in (out, longer))
    assert left.equals(right)
    result = run(override(SHORT, {"clients_per_round": 3}))
    assert len(pandas.DataFrame(result.clients)) == 9
