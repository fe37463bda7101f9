"""The comparison with other frameworks: its inputs, its verdict, its table; no other framework."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks.peers import check
from benchmarks.peers.__main__ import main, report
from benchmarks.peers.jobs import JOBS, PEERS, Job, Row, Work, differences, write
from benchmarks.peers.serve import cohorts, read, serve
from benchmarks.peers.table import Timing, rows_of, table_of
from parity_tests.case import flat

TINY = Work("training", "logistic", (25, 40), rounds=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers") / "work"
    return write(TINY, folder), folder


def test_every_peer_is_given_the_plans_of_jaxfed(written):
    case, folder = written
    inputs = read(folder)
    assert inputs.images.shape == (65, 28, 28, 1)
    assert inputs.images.dtype == np.float32
    assert inputs.images.max() <= 1
    assert inputs.rows.shape == (2, 2, 2, 20)
    np.testing.assert_array_equal(inputs.rows, [plan.rows for plan in case.plans])
    for clients in cohorts(inputs):
        assert [len(rows) for rows in clients] == [25, 40]
        assert sorted(np.concatenate(clients)) == list(range(65))
    assert inputs.params.keys() == flat(case.start.params).keys()


def test_work_is_done_twice_and_then_timed(tmp_path, written):
    _, folder = written
    done = []

    def build(inputs):
        def do():
            done.append(inputs.work["model"])
            return {"loss": np.asarray(1.0)}

        return do

    request = folder / "toy"
    request.mkdir()
    serve(request, build, ("numpy",))
    first = json.loads((request / "answer.json").read_text())
    assert first["versions"] == {"numpy": np.__version__}
    assert done == ["logistic"] * 2
    assert check.load(request) == {"loss": 1.0}


def test_another_training_is_refused(tmp_path, written):
    case, _ = written
    job = Job("tiny", (Row("jaxfed", TINY), Row("torch", TINY)))
    start = flat(case.start.params)
    ours = {name: leaf + 0.1 for name, leaf in start.items()}
    theirs = {name: leaf + np.float32(0.1002) for name, leaf in start.items()}
    apart = differences(case, ours, theirs)
    assert apart["update"] == pytest.approx(2e-3, rel=1e-2)
    folders = {row: tmp_path / row.peer for row in job.rows}
    for row, arrays in zip(job.rows, (ours, theirs), strict=True):
        folders[row].mkdir()
        np.savez(folders[row] / "arrays.npz", **arrays)
    compared = [check.compare(job, row, folders, {TINY: case}) for row in job.rows[:1]]
    assert compared == [{}]
    with pytest.raises(RuntimeError, match="tiny: torch has not trained the same network: got"):
        check.compare(job, job.rows[1], folders, {TINY: case})
    # NaN is no agreement.
    theirs["logits/bias"] = theirs["logits/bias"] * np.nan
    np.savez(folders[job.rows[1]] / "arrays.npz", **theirs)
    with pytest.raises(RuntimeError, match="got a difference of nan"):
        check.compare(job, job.rows[1], folders, {TINY: case})


def test_the_table_has_medians_and_ratios():
    job = Job("tiny", (Row("jaxfed", TINY), Row("torch", TINY)), absent=(("fedjax", "no words"),))
    timings = {
        job.rows[0]: Timing([0.4, 0.2, 0.3], 1.0, 10**8, {}),
        job.rows[1]: Timing([0.9, 0.6, 0.5], 2.0, 10**8, {"loss": 1e-6, "update": 3e-6}),
    }
    ours, theirs, absent = rows = rows_of(job, timings)
    assert ours["median_seconds"] == pytest.approx(0.15)
    assert ours["seconds_a_client"] == pytest.approx(0.075)
    assert [row["ratio"] for row in rows] == [1.0, pytest.approx(2.0), None]
    assert theirs["least_seconds"], theirs["most_seconds"] == (0.25, 0.45)
    assert absent["absent"] == "no words"
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table_of(rows))
    lines = captured.get().splitlines()
    assert any("torch" in line and "300" in line and "2.00" in line for line in lines)
    assert any("fedjax" in line and "n/a" in line for line in lines)
    written = report(rows, {"jaxfed": {"jax": jax.__version__}}, 3, 1.0)
    assert json.loads(json.dumps(written))["rows"] == rows
    assert written["processor"]


def test_every_job_begins_with_jaxfed_which_does_all_that_others_do():
    for job in JOBS:
        assert job.rows[0].peer == "jaxfed"
        ours = {row.work for row in job.rows if row.peer == "jaxfed"}
        assert {row.work for row in job.rows} == ours
        assert {row.peer for row in job.rows} <= set(PEERS)
        assert len(set(job.rows)) == len(job.rows)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--jobs", "cmm"], "--jobs: got cmm, expected some of cnn,"),
        (["--peers", "torch"], "--peers: got none called jaxfed, expected it"),
        (["--repeats", "0"], "--repeats: got 0, expected 1 or more"),
    ],
)
def test_bad_input_is_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
