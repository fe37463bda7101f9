"""What a run leaves in its folder is the run: weights, clients, rounds, TensorBoard's files."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import ConfigError, Examples, Variables, load_run, prepare, score
from jaxfed.config import override
from jaxfed.core.evaluate import batches
from jaxfed.final import finish
from jaxfed.program import EVAL_BATCH, algorithm_of, compile_tasks
from jaxfed.saved import by_name, read_weights, write_weights
from jaxfed.segments import segments
from jaxfed.tensorboard import tag_of
from jaxfed.train import main

FLAGS = [
    "--model.name", "cnn-small", "--model.norm", "batch", "--model.width", "0.5",
    "--data.partition", "dirichlet", "--data.num_clients", "4", "--client.epochs", "1",
    "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "run"
    flags = ["--rounds", "3", "--eval_every", "2", "--tensorboard", "--out", str(path)]
    assert main([*FLAGS, *flags]) == 0
    return path


def test_the_saved_weights_give_the_final_accuracy(folder):
    run = load_run(folder)
    task = prepare(run.experiment)
    data = task.dataset
    test = Examples(jnp.asarray(data.x_test), jnp.asarray(data.y_test))
    variables = jax.tree.map(jnp.asarray, run.variables)
    assert jax.tree.leaves(variables.stats)
    index = jnp.asarray(batches(np.arange(len(data.y_test)), EVAL_BATCH))
    found = score(task.problem, variables, test, index)
    assert float(found["accuracy"].value()) == run.summary["final_test_accuracy"]
    # Each client's score is that of the same weights on its own images.
    train = Examples(jnp.asarray(data.x_train), jnp.asarray(data.y_train))
    assert len(run.clients) == task.partition.num_clients
    for row in run.clients:
        rows = task.partition.client(row["client"])
        own = score(task.problem, variables, train, jnp.asarray(batches(rows, EVAL_BATCH)))
        assert row["images"] == len(rows)
        assert row["accuracy"] == pytest.approx(
            float(own["accuracy"].value()), abs=1e-6
        )  # six digits
        assert row["loss"] == pytest.approx(float(own["loss"].value()), rel=1e-5)
        labels = np.bincount(data.y_train[rows], minlength=10)
        assert [row[f"class_{label}"] for label in range(10)] == labels.tolist()


def test_the_history_is_one_json_object_a_line(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert load_run(folder).history == rows
    assert len({tuple(row) for row in rows}) == 1  # the same columns in every line
    assert all(isinstance(value, int | float | None) for row in rows for value in row.values())


def test_weights_are_plain_arrays_by_path(folder, tmp_path):
    with np.load(folder / "weights.npz", allow_pickle=False) as file:
        assert {"params/conv1/kernel", "stats/norm1/mean", "stats/norm1/var"} <= set(file.files)
        assert all(file[name].dtype == np.float32 for name in file.files)
    variables = Variables({"a": {"b": np.arange(3.0)}, "c": np.ones((2, 2))}, {})
    write_weights(tmp_path / "w.npz", variables)
    again = read_weights(tmp_path / "w.npz")
    assert again.stats == {}
    for name, array in by_name(variables).items():
        np.testing.assert_array_equal(array, by_name(again)[name])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_run(tmp_path)


def test_with_own_layers_every_client_is_scored_by_its_own_network():
    """FedBN, in a cohort that leaves one client out: that one has no network to score."""
    from jaxfed import Experiment, ModelConfig

    base = Experiment(rounds=1, model=ModelConfig("cnn-small", 0.5, "batch", "local"))
    changes = {"data.num_clients": 3, "clients_per_round": 2, "client.epochs": 1}
    task = prepare(override(base, changes))
    program = compile_tasks([task])
    (segment,) = segments(program)
    (final,) = finish(program, segment.state)
    state = jax.tree.map(lambda leaf: leaf[0], segment.state)
    train = Examples(jnp.asarray(task.dataset.x_train), jnp.asarray(task.dataset.y_train))
    seen = np.asarray(state.seen)
    personal = algorithm_of(task, {}).personal
    assert personal is not None
    assert seen.sum() == 2
    np.testing.assert_array_equal(np.isnan(final.clients["accuracy"]), ~seen)
    for client in np.flatnonzero(seen).tolist():
        variables = personal(state, jnp.asarray(client))
        index = jnp.asarray(batches(task.partition.client(client), EVAL_BATCH))
        expected = score(task.problem, variables, train, index)["accuracy"].value()
        assert final.clients["accuracy"][client] == pytest.approx(float(expected), abs=1e-6)


def events_of(folder):
    """The scalars of TensorBoard's event file: TFRecords of Event messages."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    (path,) = (folder / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        data = data[16 + size :]
    return found


def test_tensorboard_has_the_rounds(folder):
    run, found = load_run(folder), events_of(folder)
    expected = {
        (tag, row["round"]): value
        for row in run.history for key, value in row.items()
        if value is not None and (tag := tag_of(key))
    }  # fmt: skip
    assert {"test/accuracy", "train/loss", "drift/one_client"} <= {tag for tag, _ in found}
    assert found == pytest.approx(expected, rel=1e-6)  # event files hold float32


def test_tensorboard_without_its_extra_or_a_folder_is_refused(monkeypatch, tmp_path, capsys):
    assert main([*FLAGS, "--tensorboard"]) == 2
    assert "--tensorboard: got no --out" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*FLAGS, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'jaxfed[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
