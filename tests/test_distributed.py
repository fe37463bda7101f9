"""The real command line on two processes of two virtual devices each, connected by gloo."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.topology import ROOT, environment, free_port
from jaxfed.train import main

FLAGS = [
    "--model.name", "mlp", "--model.width", "0.25", "--data.num_clients", "5", "--rounds", "60",
    "--eval_every", "2", "--server.optimizer", "adam", "--server.lr", "0.01", "--dtype", "float64",
]  # fmt: skip
SECONDS = 600
GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+"
)
METRICS = ("train_loss", "test_loss", "test_accuracy", "num_examples", "delta_norm")


def start(tmp_path, *flags, devices=2):
    """Two processes; what they print goes to files, which cannot fill up as pipes do."""
    address = f"127.0.0.1:{free_port()}"
    env = environment(devices) | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    children = []
    for number in (0, 1):
        command = [sys.executable, "-m", "jaxfed.train", "--distributed", f"{address},2,{number}"]
        with (tmp_path / f"output{number}").open("w") as output:
            children.append(
                subprocess.Popen(
                    [*command, *flags], env=env, cwd=ROOT, stdout=output, stderr=output
                )
            )
    return children


def ended(children):
    """Their exit codes; none is left behind."""
    try:
        return [child.wait(SECONDS) for child in children]
    finally:
        for child in children:
            child.kill()


def said(tmp_path, number):
    """What a process printed, without gloo's words, which its threads write into one another."""
    lines = (tmp_path / f"output{number}").read_text().splitlines()
    return [line for line in lines if GLOO.sub("", line).strip()]


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def wait_for_rounds(path, children):
    deadline = time.time() + SECONDS
    metrics = path / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < deadline:
        assert all(child.poll() is None for child in children)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
@pytest.mark.timeout(4 * SECONDS)
def test_interrupted_by_one_process_and_resumed_equals_a_run_of_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*FLAGS, "--quiet", "--out", str(whole)]) == 0
    children = start(tmp_path, *FLAGS, "--out", str(cut))
    wait_for_rounds(cut, children)
    children[1].send_signal(signal.SIGTERM)  # not the one that writes
    assert ended(children) == [143, 143], (said(tmp_path, 0), said(tmp_path, 1))
    assert "go on with" in said(tmp_path, 0)[-1]
    assert said(tmp_path, 1) == []
    assert 0 < len(rows_of(cut)) < 60
    children = start(tmp_path, *FLAGS, "--out", str(cut), "--resume")
    assert ended(children) == [0, 0], (said(tmp_path, 0), said(tmp_path, 1))
    assert said(tmp_path, 1) == []
    assert [row["round"] for row in rows_of(cut)] == list(range(1, 61))
    assert json.loads((cut / "summary.json").read_text())["device"].startswith("cpu x4")
    for row, expected in zip(rows_of(cut), rows_of(whole), strict=True):
        for key in METRICS:
            got, wanted = row[key], expected[key]
            # Sums in another order: up to 9e-16 were measured. None: not evaluated.
            same = got is None if wanted is None else got == pytest.approx(wanted, rel=1e-12)
            assert same, (row["round"], key, got, wanted)


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
@pytest.mark.timeout(2 * SECONDS)
def test_what_is_wrong_for_the_first_stops_all_and_is_said_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    children = start(tmp_path, *FLAGS, "--out", str(tmp_path / "run"))
    assert ended(children) == [2, 2], (said(tmp_path, 0), said(tmp_path, 1))
    assert "already holds a run" in said(tmp_path, 0)[-1]
    assert said(tmp_path, 1) == []


@pytest.mark.slow
@pytest.mark.xdist_group("topology")
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_does_not_wait_for_ever(tmp_path, victim):
    children = start(tmp_path, *FLAGS, "--rounds", "100000", "--out", str(tmp_path / "run"))
    wait_for_rounds(tmp_path / "run", children)
    children[victim].kill()
    codes = ended(children)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, None)


@pytest.mark.parametrize("spec", ["", "here", "host:1,2", "host,2,0", "host:1,2,2", "host:1,0,0"])
def test_a_place_that_is_none_is_refused(spec, capsys):
    assert main(["--distributed", spec]) == 2
    assert "HOST:PORT,PROCESSES,NUMBER" in capsys.readouterr().err


@pytest.mark.slow
def test_auto_without_others_to_find_is_refused(users_environment):
    command = [sys.executable, "-m", "jaxfed.train", "--distributed", "auto"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=users_environment, timeout=SECONDS
    )
    assert done.returncode == 2
    assert done.stderr.startswith("jaxfed: --distributed: got auto")
