"""Tasks: losses and metrics that are a task's own, from Python and from the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfed
from jaxfed import ClientConfig, DataConfig, Dataset, Examples, Experiment, ModelConfig, run
from jaxfed.train import main


def diabetes() -> Dataset:
    """scikit-learn's diabetes: ten features, disease progression; clients by decade of age."""
    from sklearn.datasets import load_diabetes

    x, y = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    decade = np.unique(np.clip(x[:, 0] // 10, 2, 7), return_inverse=True)[1].astype(np.int32)
    features = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    target = ((y - y.mean()) / y.std()).astype(np.float32)
    test = np.arange(len(y)) % 5 == 0
    return Dataset(
        "diabetes", features[~test], target[~test], features[test], target[test], 0,
        client_train=decade[~test],
    )  # fmt: skip


def save(dataset: Dataset, path) -> str:
    arrays = {"x_train": dataset.x_train, "y_train": dataset.y_train, "x_test": dataset.x_test}
    if dataset.client_train is not None:
        arrays["client_train"] = dataset.client_train
    np.savez(path, allow_pickle=False, y_test=dataset.y_test, **arrays)
    return str(path)


def multilabel_toy() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    y = (x[:, :3] > 0).astype(np.int32)
    return Dataset("signs", x[:200], y[:200], x[200:], y[200:], 0)


VOCABULARY, LENGTH = 8, 6


def token_toy() -> Dataset:
    """The next token is the present one plus one; the last two of some rows are padding."""
    rng = np.random.default_rng(0)
    x = (rng.integers(0, VOCABULARY, (240, 1)) + np.arange(LENGTH)) % VOCABULARY
    y = (x + 1) % VOCABULARY
    y[::3, -2:] = -1
    x, y = x.astype(np.int32), y.astype(np.int32)
    return Dataset("counting", x[:200], y[:200], x[200:], y[200:], VOCABULARY)


class Bigram(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(VOCABULARY, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.table(tokens)


# --- From Python ----------------------------------------------------------------------------


def test_regression_on_clients_by_age():
    experiment = Experiment(
        rounds=25, eval_every=25, task="regression", data=DataConfig(partition="natural"),
        model=ModelConfig(name="logistic"), client=ClientConfig(lr=0.02),
    )  # fmt: skip
    data = diabetes()
    result = run(experiment, dataset=data)
    assert result.experiment.data.num_clients == 6
    summary = result.summary
    assert (summary["score"], summary["maximize"]) == ("loss", False)
    design = np.c_[data.x_train, np.ones(len(data.x_train))]
    weights = np.linalg.lstsq(design, data.y_train, rcond=None)[0]
    best = np.mean((np.c_[data.x_test, np.ones(len(data.x_test))] @ weights - data.y_test) ** 2)
    assert summary["final_test_loss"] < 1.15 * best  # of ordinary least squares on pooled data
    assert 0 < summary["final_test_absolute_error"] < 1


def test_multilabel_learns():
    experiment = Experiment(
        rounds=20, eval_every=20, task="multilabel", model=ModelConfig(name="logistic"),
        client=ClientConfig(lr=1.0),
    )  # fmt: skip
    result = run(experiment, dataset=multilabel_toy())
    assert result.summary["final_test_accuracy"] > 0.95


def test_next_token_counts_tokens_and_does_not_scale_them():
    experiment = Experiment(
        rounds=20, eval_every=20, task="next-token", client=ClientConfig(lr=5.0)
    )
    result = run(experiment, dataset=token_toy(), build=Bigram)
    assert result.summary["final_test_accuracy"] == 1.0
    assert result.history[-1]["num_examples"] == 3 * 200  # examples, though means are over tokens


def test_means_over_tokens_weigh_tokens():
    """Two batches of unequal numbers of tokens: the mean is that of all tokens at once."""
    model = jaxfed.from_nnx(Bigram)
    problem = jaxfed.next_token(model)
    data = token_toy()
    examples = Examples(jnp.asarray(data.x_test), jnp.asarray(data.y_test))
    variables = model.init(jax.random.key(0))
    index = jnp.array([[0, 1, 2], [3, -1, -1]])
    found = jaxfed.score(problem, variables, examples, index)["loss"]
    logits = variables.params["table"]["embedding"][data.x_test[:4]]
    targets = data.y_test[:4]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    assert float(found.count) == (targets >= 0).sum()
    assert float(found.value()) == pytest.approx(float(losses[targets >= 0].mean()), rel=1e-6)


def test_own_loss_and_metrics_arrive_everywhere(tmp_path):
    def problem(model):
        return jaxfed.supervised(
            model,
            lambda y, t: optax.huber_loss(y[:, 0], t),
            {"within_one": lambda y, t: (jnp.abs(y[:, 0] - t) < 1).astype(y.dtype)},
            score="within_one",
            maximize=True,
        )

    def build(rngs):
        return nnx.Linear(10, 1, rngs=rngs)

    experiment = Experiment(rounds=3, data=DataConfig(partition="natural"))
    data = diabetes()
    result = run(experiment, dataset=data, build=build, problem=problem)
    assert set(result.history[0]) >= {"train_within_one", "test_within_one", "test_loss"}
    assert result.summary["final_test_within_one"] is not None
    kernel, bias = (np.asarray(result.variables.params[name]) for name in ("kernel", "bias"))
    residual = np.abs((data.x_test @ kernel + bias)[:, 0] - data.y_test)
    huber = np.where(residual < 1, residual**2 / 2, residual - 0.5).mean()
    assert result.summary["final_test_loss"] == pytest.approx(huber, rel=1e-5)
    assert result.summary["final_test_within_one"] == pytest.approx((residual < 1).mean())
    assert result.experiment.data.dataset == "diabetes"  # the record says what was used
    assert result.experiment.client.lr == 0.1
    assert set(result.clients[0]) == {
        "round", "client", "examples", "loss", "within_one", "drift", "dropped",
    }  # fmt: skip


def test_pixels_are_scaled_only_where_the_data_are_images():
    model = jaxfed.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    images = Examples(jnp.full((2, 4), 255, jnp.uint8), jnp.zeros(2, jnp.int32))
    variables, key, rows = model.init(jax.random.key(0)), jax.random.key(0), jnp.arange(2)
    with pytest.raises(TypeError, match=r"got uint8, expected pixels=\(low, high\) for images"):
        jaxfed.classification(model).metrics(variables, images, rows, False, key)

    def loss(problem, inputs):
        examples = Examples(inputs, images.targets)
        metrics, _ = problem.metrics(variables, examples, rows, False, key)
        return float(metrics["loss"].value())

    for pixels, value in (((0, 1), 1.0), ((-1, 1), 1.0), ((0, 255), 255.0)):
        scaled = loss(jaxfed.classification(model, pixels=pixels), images.inputs)
        plain = loss(jaxfed.classification(model), jnp.full((2, 4), value, jnp.float32))
        assert scaled == pytest.approx(plain, rel=1e-6)


def test_labels_are_smoothed_in_training_alone():
    model = jaxfed.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    variables, key = model.init(jax.random.key(0)), jax.random.key(0)
    data = Examples(jax.random.normal(key, (5, 4)), jnp.array([0, 1, 2, 0, 1], jnp.int32))
    smooth = jaxfed.classification(model, label_smoothing=0.3)

    def loss(problem, train):
        metrics, _ = problem.metrics(variables, data, jnp.arange(5), train, key)
        return float(metrics["loss"].value())

    logits, _ = model.apply(variables, data.inputs, jnp.ones(5, bool), True, key)
    wanted = optax.smooth_labels(jax.nn.one_hot(data.targets, 3), 0.3)
    expected = float(optax.softmax_cross_entropy(logits, wanted).mean())
    assert loss(smooth, True) == pytest.approx(expected, rel=1e-6)
    assert loss(smooth, False) == loss(jaxfed.classification(model), False)


@pytest.mark.parametrize(
    ("task", "targets", "words"),
    [
        ("classification", jnp.zeros((4, 3), jnp.int32), "for a class per position use next_token"),
        ("next_token", jnp.zeros((4, 3), jnp.int32), r"expected \[batch, length, vocabulary\]"),
        ("multilabel", jnp.zeros((4, 5), jnp.int32), r"expected \[batch, labels\] for both"),
        ("regression", jnp.zeros((4, 2)), "expected one output per target"),
    ],
)
def test_targets_of_another_shape_are_refused(task, targets, words):
    model = jaxfed.from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    problem = getattr(jaxfed, task)(model)
    with pytest.raises(ValueError, match=words):
        problem.metrics(
            model.init(jax.random.key(0)), Examples(jnp.ones((4, 2)), targets), jnp.arange(4),
            True, jax.random.key(0),
        )  # fmt: skip


# --- From the command line ------------------------------------------------------------------


def test_regression_from_the_command_line(tmp_path, capsys):
    data = save(diabetes(), tmp_path / "diabetes.npz")
    out = tmp_path / "run"
    flags = ["--data.dataset", data, "--data.partition", "natural", "--model.name", "logistic"]
    assert main([*flags, "--out", str(out)]) == 2
    assert "--task: got classification" in capsys.readouterr().err
    command = [*flags, "--task", "regression", "--client.lr", "0.02", "--rounds", "4"]
    assert main([*command, "--tensorboard", "--out", str(out)]) == 0
    assert "test absolute error" in capsys.readouterr().out
    saved = jaxfed.load_run(out)
    assert saved.summary["final_test_loss"] < 1
    assert set(saved.clients[0]) == {"client", "images", "absolute_error", "loss"}
    page = (out / "report.html").read_text()
    assert "Absolute error" in page
    assert "final test loss" in page
    sweep = tmp_path / "sweep"
    assert main([*command, "--sweep", "client.lr=0.001,0.02", "--out", str(sweep)]) == 0
    assert "client.lr=0.02" in (sweep / "report.html").read_text()


def test_multilabel_and_tokens_from_the_command_line(tmp_path, monkeypatch, capsys):
    labels = save(multilabel_toy(), tmp_path / "signs.npz")
    command = ["--data.dataset", labels, "--task", "multilabel", "--model.name", "mlp"]
    assert main([*command, "--rounds", "2", "--out", str(tmp_path / "m")]) == 0
    tokens = save(token_toy(), tmp_path / "tokens.npz")
    (tmp_path / "my_net.py").write_text(
        "from flax import nnx\n\n\nclass Bigram(nnx.Module):\n"
        "    def __init__(self, rngs):\n        self.table = nnx.Embed(8, 8, rngs=rngs)\n\n"
        "    def __call__(self, tokens):\n        return self.table(tokens)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["--data.dataset", tokens, "--task", "next-token", "--model.name", "my_net:Bigram"]
    command += ["--client.lr", "5", "--rounds", "15", "--eval_every", "15"]
    assert main([*command, "--out", str(tmp_path / "t")]) == 0
    saved = jaxfed.load_run(tmp_path / "t")
    assert saved.summary["final_test_accuracy"] > 0.9
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["model"]["name"] == "my_net:Bigram"
    assert main(["--data.dataset", tokens, "--model.name", "nowhere:Net"]) == 2
    assert "expected module:object" in capsys.readouterr().err


def test_a_partition_by_class_needs_classes(tmp_path, capsys):
    data = save(diabetes(), tmp_path / "diabetes.npz")
    flags = ["--data.dataset", data, "--task", "regression", "--model.name", "mlp"]
    assert main([*flags, "--data.partition", "shards"]) == 2
    assert "choose iid, quantity or natural" in capsys.readouterr().err
