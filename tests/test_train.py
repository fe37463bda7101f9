"""The front door, as a user meets it: files, sweeps, interruptions."""

import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxfed import ClientConfig, Experiment, ModelConfig, run
from jaxfed.config import from_json, override
from jaxfed.config.sweep import points, programs
from jaxfed.prepare import prepare
from jaxfed.program import compile_tasks
from jaxfed.train import main

QUICK = ["--model.name", "logistic", "--rounds", "4", "--client.epochs", "1", "--quiet"]


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_folder(tmp_path):
    out = tmp_path / "run"
    assert main([*QUICK, "--eval_every", "2", "--out", str(out)]) == 0
    names = {"config.json", "metrics.jsonl", "summary.json", "curves.png", "report.html"}
    names |= {"weights.npz", "best.npz", "clients.csv", "participation.csv.gz", "checkpoints"}
    assert {path.name for path in out.iterdir()} == names
    rows = rows_of(out)
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert [row["test_accuracy"] is None for row in rows] == [True, False, True, False]
    contract = [
        "round",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "num_examples",
        "seconds",
    ]
    assert list(rows[0])[: len(contract)] == contract
    assert rows[0]["num_examples"] == 1438
    summary = json.loads((out / "summary.json").read_text())
    assert summary["final_test_accuracy"] == rows[-1]["test_accuracy"] > 0.5
    assert summary["rounds"] == 4
    for key in ("best_test_accuracy", "seconds", "compile_seconds", "device", "versions"):
        assert summary[key]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page
    # The folder's config is the whole experiment: running it again gives the same numbers.
    again = run(from_json(out / "config.json"))
    assert [row["train_loss"] for row in again.history] == [row["train_loss"] for row in rows]


def test_the_names_of_an_experiment_are_escaped(tmp_path):
    out = tmp_path / "run"
    assert main([*QUICK, "--name", "<script>alert(1)</script>", "--out", str(out)]) == 0
    assert "<script>" not in (out / "report.html").read_text()


def test_a_folder_is_not_overwritten(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*QUICK, "--out", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert main([*QUICK, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*QUICK, "--client.lr", "0.3", "--resume", "--out", str(out)]) == 2
    assert "client.lr: was 0.1, now 0.3" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_sweep_rows_equal_single_runs_and_one_program_serves_all(tmp_path):
    out = tmp_path / "sweep"
    axes = ["--sweep", "client.lr=0.05,0.1,0.2", "--sweep", "seed=0,1"]
    assert main([*QUICK, *axes, "--out", str(out)]) == 0
    with (out / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6
    assert list(table[0])[:2] == ["client.lr", "seed"]
    base = Experiment(rounds=4, model=ModelConfig(name="logistic"))
    base = override(base, {"client.epochs": 1})
    for row in table:
        changes = {"client.lr": float(row["client.lr"]), "seed": int(row["seed"])}
        single = run(override(base, changes)).summary
        for key in ("final_test_accuracy", "best_test_accuracy", "final_test_loss"):
            assert float(row[key]) == pytest.approx(single[key], abs=1e-5)
    folders = [path for path in out.iterdir() if (path / "summary.json").exists()]
    assert len(folders) == 6
    tasks = [prepare(point.experiment) for point in points(base, [axes[1], axes[3]])]
    groups = programs([task.experiment for task in tasks])
    assert groups == [[0, 1, 2, 3, 4, 5]]
    assert compile_tasks(tasks).numbers["client.lr"].shape == (6,)


def test_points_that_differ_in_structure_get_their_own_program():
    base = Experiment(model=ModelConfig(name="logistic"))
    todo = points(base, ["client.batch_size=10,20", "client.lr=0.1,0.2", "name=a,b"])
    assert programs([point.experiment for point in todo]) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_resume_gives_what_an_uninterrupted_run_gives(tmp_path):
    """SIGTERM in the middle: exit code 143, state saved, and the rest equal to the last digit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--model.name", "mlp", "--model.width", "0.25", "--rounds", "60", "--eval_every", "2"]
    flags += ["--server.optimizer", "adam", "--server.lr", "0.01"]
    assert main([*flags, "--quiet", "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "jaxfed.train", *flags, "--out", str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = cut / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert b"--resume" in output
    done = len(rows_of(cut))
    assert 0 < done < 60
    assert main([*flags, "--quiet", "--resume", "--out", str(cut)]) == 0

    def numbers(path):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(path)]

    assert numbers(cut) == numbers(whole)


def test_a_finished_run_can_be_made_longer(tmp_path):
    long, grown = tmp_path / "long", tmp_path / "grown"
    assert main([*QUICK, "--rounds", "6", "--out", str(long)]) == 0
    assert main([*QUICK, "--rounds", "4", "--out", str(grown)]) == 0
    assert main([*QUICK, "--rounds", "6", "--resume", "--out", str(grown)]) == 0
    left, right = ([{**row, "seconds": 0} for row in rows_of(path)] for path in (long, grown))
    assert left == right
    assert from_json(grown / "config.json") == from_json(long / "config.json")


def test_a_run_that_diverges_fails_and_says_so(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--server.optimizer", "sgd", "--server.lr", "1e38", "--out", str(out)]
    assert main([*QUICK, *flags]) == 1
    assert "not finite" in capsys.readouterr().err
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_output_for_a_pipe_is_plain_lines(users_environment):
    command = [sys.executable, "-m", "jaxfed.train", *QUICK[:-1], "--rounds", "2"]
    environment = users_environment | {"COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "\x1b" not in done.stdout
    assert "round 2" in done.stdout
    for word in ("digits", "1438 + 359", "logistic", "650 parameters", "iid", "10 clients", "cpu"):
        assert word in done.stdout
    assert done.stderr == ""


def test_label_table_shows_the_skew(capsys):
    flags = ["--data.partition", "pathological", "--data.classes_per_client", "2", "--labels"]
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    clients = [[int(word) for word in line.split()] for line in lines if line.split()[0].isdigit()]
    counts = [row[2:] for row in clients]  # client, total, then the classes
    assert len(counts) == 10
    assert all(sum(count > 0 for count in row) == 2 for row in counts)


def test_help_names_every_group():
    command = [sys.executable, "-m", "jaxfed.train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in ("--rounds", "--data.dataset", "--model.batch_stats", "--client.lr", "--sweep"):
        assert flag in text


def test_own_data_and_model_through_run():
    from flax import nnx

    from jaxfed import Dataset

    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (300, 4, 4, 1), dtype=np.uint8)
    y = (x[:, 0, 0, 0] > 127).astype(np.int32)
    dataset = Dataset("corners", x[:200], y[:200], x[200:], y[200:], 2)

    class Tiny(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, images):
            return self.layer(images.reshape(len(images), -1))

    rounds = []
    experiment = Experiment(rounds=60, client=ClientConfig(lr=1.0))
    result = run(experiment, dataset=dataset, build=Tiny, on_round=rounds.append)
    assert result.summary["final_test_accuracy"] > 0.9
    assert rounds == result.history
    assert result.variables.params["layer"]["kernel"].shape == (16, 2)
