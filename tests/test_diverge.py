"""Numbers that go wrong: said, counted, and never the end of good weights."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed.train
from jaxfed import (
    ClientConfig,
    Cohort,
    DataConfig,
    Dataset,
    Experiment,
    ModelConfig,
    central,
    checkpoint,
    fedavg,
    fedsgd,
    folder,
    run,
)  # fmt: skip
from jaxfed.config import from_json, override
from jaxfed.prepare import prepare
from jaxfed.program import initial_state
from jaxfed.segments import divergence
from jaxfed.train import main
from tests.toys import clients_of, examples, net, plan_of, problem

QUICK = [
    "--model.name", "logistic", "--client.epochs", "1", "--data.examples_per_client", "20",
    "--rounds", "4",
]  # fmt: skip


def broken(where):
    """Four clients with 30 images each, of floats; `where(owner)` has a NaN in its first image."""
    rng = np.random.default_rng(0)
    x = rng.random((160, 3, 3, 1)).astype(np.float32)
    y = (x[:, 0, 0, 0] > x[:, 2, 2, 0]).astype(np.int32)
    owner = np.repeat(np.arange(4, dtype=np.int32), 30)
    x[:120][[30 * k for k in where]] = np.nan
    return Dataset("floats", x[:120], y[:120], x[120:], y[120:], 2, client_train=owner)


def experiment(**changes):
    base = Experiment(
        rounds=8, data=DataConfig(partition="natural"), model=ModelConfig(name="logistic"),
        client=ClientConfig(lr=0.5),
    )  # fmt: skip
    return override(base, changes)


# --- Clients --------------------------------------------------------------------------------


def test_a_client_with_nan_pixels_is_dropped_counted_and_does_no_harm():
    result = run(experiment(), dataset=broken([2]))
    assert [row["dropped_clients"] for row in result.history] == [1] * 8
    assert [row["num_examples"] for row in result.history] == [3 * 30 * 3] * 8
    assert result.summary["dropped_clients"] == 8
    assert result.summary["diverged_in_round"] is None
    assert result.summary["final_test_accuracy"] > 0.8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.variables))


def test_a_cohort_without_a_finite_client_changes_nothing_and_is_not_the_end():
    result = run(experiment(clients_per_round=1), dataset=broken([1]))
    rows = result.history
    empty = [i for i, row in enumerate(rows) if row["dropped_clients"]]
    assert 0 < len(empty) < len(rows)
    assert empty[0] > 0
    for i in empty:
        assert rows[i]["num_examples"] == 0
        assert rows[i]["train_loss"] is None
        assert rows[i]["test_loss"] == rows[i - 1]["test_loss"]
    assert len(rows) == 8
    assert result.summary["diverged_in_round"] is None


def test_when_every_client_had_its_turn_in_vain_it_is_the_end():
    result = run(experiment(clients_per_round=2, rounds=9), dataset=broken([0, 1, 2, 3]))
    assert len(result.history) == 2
    assert result.history[-1]["diverged"] == "no client's update was finite in 2 round(s)"
    assert result.summary["diverged_in_round"] == 2


@pytest.mark.parametrize(
    ("dropped", "counted", "finite", "loss", "reason"),
    [
        ([0, 0, 0], [5, 5, 5], True, 1.0, None),
        ([1, 2, 0], [5, 5, 5], True, 1.0, None),
        ([5, 0, 5], [0, 5, 0], True, 1.0, None),
        ([5, 5, 1], [0, 0, 5], True, 1.0, None),
        ([0, 5, 5], [5, 0, 0], True, 1.0, "no client's update"),
        ([0, 0, 0], [5, 5, 5], True, None, "test loss"),
        ([0, 0, 0], [5, 5, 5], False, 1.0, "new weights"),
    ],
)
def test_what_ends_a_run(dropped, counted, finite, loss, reason):
    task = prepare(Experiment(clients_per_round=5, data=DataConfig(num_clients=10)))
    history = [
        {"round": i + 1, "dropped_clients": d, "num_examples": n, "test_loss": loss}
        for i, (d, n) in enumerate(zip(dropped, counted, strict=True))
    ]
    found = divergence(task, history, finite=finite, tested=True)
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")
    if loss is None:
        assert divergence(task, history, finite=finite, tested=False) is None


# --- The server -----------------------------------------------------------------------------


def endless(kind, model):
    infinite = optax.scale(-jnp.inf)
    if kind == "fedavg":
        return fedavg(problem(model), optax.sgd(0.1), infinite)
    if kind == "fedsgd":
        return fedsgd(problem(model), infinite)
    return central(problem(model), infinite)


@pytest.mark.parametrize("kind", ["fedavg", "fedsgd", "central"])
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(kind, x64):
    model = net(norm=True)
    plan = plan_of(clients_of(4, 4), pooled=kind == "central")
    algorithm = endless(kind, model)
    before = algorithm.init(model.init(jax.random.key(0)))
    after, metrics = jax.jit(algorithm.round)(before, Cohort(examples(8), plan))
    assert not metrics.finite
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, after, before)))


def test_the_last_good_weights_are_those_before():
    """One client's only pixel is 1e38: its update is finite, 30 times its update is not."""
    dataset = broken([])
    x = dataset.x_train.copy()
    x[:30] = 0
    x[:30, 0, 0] = 1e38
    changes = {"clients_per_round": 1, "client.batch_size": None, "client.epochs": 1}
    changes |= {"client.lr": 1.0, "seed": 1}
    result = run(experiment(**changes), dataset=dataset._replace(x_train=x))
    when = result.summary["diverged_in_round"]
    assert when > 1
    assert result.history[-1]["diverged"] == "the new weights are not finite"
    assert [row["diverged"] for row in result.history[:-1]] == [None] * (when - 1)
    assert result.history[-1]["test_accuracy"] is None
    assert result.summary["weights_of_round"] == when - 1
    assert result.summary["final_test_accuracy"] is None
    shorter = run(experiment(**changes, rounds=when - 1), dataset=dataset._replace(x_train=x))
    assert shorter.summary["final_test_accuracy"] == result.summary["best_test_accuracy"]
    same = jax.tree.map(np.array_equal, shorter.variables, result.variables)
    assert all(jax.tree.leaves(same))


def test_a_test_set_with_nan_is_no_accuracy():
    dataset = broken([])
    result = run(experiment(), dataset=dataset._replace(x_test=dataset.x_test * np.nan))
    assert [row["test_accuracy"] for row in result.history] == [None]
    assert result.summary["weights_of_round"] == 0


# --- The command ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--server.lr", "1e38"], "the test loss is not finite"),
        (["--client.lr", "1e38", "--client.batch_size", "5"], "no client's update was finite in 1"),
        (["--client.lr", "1e38", "--algorithm", "central"], "the new weights are not finite"),
        (["--server.lr", "1e38", "--eval_every", "4"], "the test loss is not finite"),
    ],
)
def test_a_run_that_diverges_says_when_and_keeps_what_was(flags, reason, tmp_path, capsys):
    out = tmp_path / "run"
    command = [*QUICK, "--quiet", *flags, "--out", str(out)]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert reason in message
    assert "the weights of round 0 are kept; lower --client.lr" in message
    summary = json.loads((out / "summary.json").read_text())
    rows = folder.read_rows(out)
    assert summary["diverged_in_round"] == len(rows) == rows[-1]["round"]
    assert f"diverged in round {len(rows)}:" in message
    assert summary["final_test_accuracy"] is None
    assert summary["final_test_loss"] is None
    for path in (*out.glob("*.json*"), out / "report.html"):
        assert "NaN" not in path.read_text()
        assert "Infinity" not in path.read_text()
    task = prepare(from_json(out / "config.json"))
    initial = initial_state(task, jax.random.key(0))
    like = (initial, initial.variables)
    (kept, _), _ = checkpoint.load(out, checkpoint.rounds(out)[0], like)
    assert all(jax.tree.leaves(jax.tree.map(np.allclose, kept, initial)))
    # Going on tells the same, and changes nothing.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main([*command, "--resume"]) == 1
    assert capsys.readouterr().err == message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_in_a_sweep_the_other_points_go_on(tmp_path, capsys, monkeypatch):
    out, alone = tmp_path / "sweep", tmp_path / "alone"
    quick = [*QUICK, "--client.batch_size", "5"]
    command = [*quick, "--sweep", "client.lr=1e38,0.1", "--out", str(out)]
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.err.startswith("jaxfed: client.lr=1e+38: diverged in round 1: ")
    assert said.err.count("\n") == 1
    assert "client.lr=1e+38: 10 client update(s) were not finite and were dropped" in said.out
    assert main([*quick, "--client.lr", "0.1", "--out", str(alone), "--quiet"]) == 0
    good = next(out.glob("001_*"))
    left, right = ([{**row, "seconds": 0} for row in folder.read_rows(p)] for p in (good, alone))
    assert [row["round"] for row in left] == [1, 2, 3, 4]
    for one, other in zip(left, right, strict=True):
        assert one.pop("diverged") is other.pop("diverged") is None
        assert one == pytest.approx(other, rel=1e-5)
    with (out / "sweep.csv").open() as file:
        bad_row, good_row = csv.DictReader(file)
    assert (bad_row["final_test_accuracy"], bad_row["diverged_in_round"]) == ("", "1")
    assert float(good_row["final_test_accuracy"]) > 0.1
    assert good_row["diverged_in_round"] == ""
    monkeypatch.setattr(jaxfed.train, "compile_tasks", None)
    assert main([*command, "--resume"]) == 1
    assert capsys.readouterr().err == said.err
