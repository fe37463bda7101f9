"""`python -m parity_tests.compare` on experiments that nobody tuned for, and what it refuses."""

import json

import pytest

from jaxfed.config import ConfigError
from parity_tests.case import NotComparable, make_case
from parity_tests.compare import main, prepared

# One process of TFF serves them all.
pytestmark = pytest.mark.xdist_group("compare")


def write(folder, tree):
    path = folder / "exp.json"
    path.write_text(json.dumps(tree))
    return str(path)


UNTUNED = {
    "colour images, two-class shards, LayerNorm, AdaGrad": {
        "rounds": 2, "seed": 11, "data": {"dataset": "colour", "partition": "shards",
        "num_clients": 4}, "model": {"name": "cnn", "width": 0.4, "norm": "layer"},
        "client": {"optimizer": "adagrad", "lr": 0.02, "batch_size": 7, "epochs": 1},
        "clients_per_round": 3,
    },
    "FedProx, Dirichlet, momentum on the server": {
        "rounds": 2, "seed": 5, "algorithm": "fedprox", "weighting": "uniform",
        "data": {"partition": "dirichlet", "num_clients": 7, "examples_per_client": 30},
        "model": {"name": "mlp", "width": 0.3}, "clients_per_round": 4,
        "client": {"lr": 0.2, "batch_size": 32, "prox_mu": 0.5},
        "server": {"optimizer": "momentum", "lr": 0.7, "momentum": 0.5},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", UNTUNED)
def test_untuned_experiments_agree(what, tff_python, tmp_path, capsys, monkeypatch):
    import numpy as np

    tree = json.loads(json.dumps(UNTUNED[what]))
    if tree["data"].get("dataset") == "colour":
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (150, 12, 14, 3), dtype=np.uint8)
        labels = np.arange(150) % 5
        tree["data"]["dataset"] = str(tmp_path / "colour.npz")
        np.savez(tmp_path / "colour.npz", x_train=images[:120], y_train=labels[:120],
                 x_test=images[120:], y_test=labels[120:])  # fmt: skip
    code = main([write(tmp_path, tree), "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "jaxfed and TFF agree" in printed
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["agree"] and result["rounds"] == 2 and result["dtype"] == "float64"
    rungs = {rung["name"]: rung for rung in result["rungs"]}
    assert rungs["one round"]["error"] <= 1e-10
    assert not any(rung["chaotic"] for rung in rungs.values())
    assert ("wrong sign" in printed) == (tree.get("algorithm") == "fedprox")


@pytest.mark.slow
def test_a_difference_is_exit_code_1(tff_python, tmp_path, capsys, monkeypatch):
    from parity_tests.test_recorded import wrong_weighting

    wrong_weighting(monkeypatch)
    tree = {
        "rounds": 1, "data": {"partition": "quantity", "num_clients": 3, "examples_per_client": 20},
        "model": {"name": "logistic"},
    }  # fmt: skip
    assert main([write(tmp_path, tree)]) == 1
    assert "jaxfed and TFF differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"model": {"name": "mlp", "norm": "batch", "batch_stats": "mean"}}, "frozen"),
        ({"client": {"optimizer": "nesterov"}}, "momentum"),
        ({"algorithm": "fedsgd", "weighting": "uniform"}, "build_fed_sgd"),
        ({"algorithm": "central", "client": {"optimizer": "yogi"}}, "Keras"),
        ({"algorithm": "central",
          "model": {"name": "mlp", "norm": "batch", "batch_stats": "frozen"}}, "mean"),
        ({"algorithm": "fedbn"}, "--algorithm: got fedbn"),
        ({"client": {"clip": 1.0}}, "--client.clip: got 1.0"),
        ({"client": {"momentum": 0.5}}, "use --client.optimizer momentum"),
        ({"server": {"optimizer": "fedadam"}}, "--server.optimizer: got fedadam"),
        ({"server": {"schedule": "cosine"}}, "--server.schedule: got cosine"),
        ({"nonsense": 1}, "unknown key"),
        ({"data": {"num_clients": 100000}}, "num_clients"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_exit_code_2(tree, said, tmp_path, capsys):
    assert main([write(tmp_path, tree)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_fedsgd_is_compared_in_float32():
    from jaxfed import Experiment
    from jaxfed.config import override

    experiment = override(Experiment(), {"algorithm": "fedsgd", "model.name": "logistic"})
    assert prepared(experiment, 1, None).task.experiment.dtype == "float32"
    with pytest.raises(NotComparable, match="float32"):
        prepared(experiment, 1, "float64")
    with pytest.raises((NotComparable, ConfigError), match="bfloat16"):
        make_case(override(experiment, {"dtype": "bfloat16", "algorithm": "fedavg"}))
