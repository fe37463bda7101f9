"""How a free run leaves TFF's: on a recorded trace, in the command, in what is published."""

import json
import re

import pytest

from jaxfed import Experiment
from jaxfed.config import override, to_json
from jaxfed.folder import write_json
from parity_tests import drift as command
from parity_tests.drift import drift
from parity_tests.reference import recorded
from parity_tests.suite import case_of
from parity_tests.table import ROOT

RESULTS = ROOT / "docs" / "results"


@pytest.mark.slow
def test_a_free_run_leaves_tff_as_rounding_alone_would():
    case = case_of("cnn")
    rows = drift(case, recorded(case, "cnn"))
    assert [row.round for row in rows] == list(range(1, 11))
    for row in rows:
        assert row.one_round < 1e-12
        # Both multiply rounding, and begin with as little of it.
        assert 0 < row.free < 1e-10
        assert 0 < row.rounding < 1e-10
        assert row.accuracy_tff == pytest.approx(row.accuracy_jaxfed, abs=1e-6)


def test_what_is_compared_with_another_start_is_far_apart():
    """The distances see a difference where there is one: TFF's trace belongs to another rate."""
    case = case_of("cnn")
    trace = recorded(case, "cnn")
    other = override(case.task.experiment, {"client.lr": 0.051})
    rows = drift(case._replace(task=case.task._replace(experiment=other)), trace)
    assert all(row.one_round > 1e-4 for row in rows[:3])


@pytest.mark.slow
@pytest.mark.xdist_group("drift")
def test_the_command(tff_python, tmp_path, capsys):
    experiment = override(
        Experiment(),
        {"rounds": 2, "model.name": "logistic", "data.num_clients": 2,
         "data.examples_per_client": 30, "client.epochs": 1},
    )  # fmt: skip
    (tmp_path / "exp.json").write_text(to_json(experiment))
    out = tmp_path / "out.json"
    assert command.main([str(tmp_path / "exp.json"), "--json", str(out)]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2
    assert all(row["free"] < 1e-13 for row in rows)
    write_json(tmp_path / "frozen.json", {"model": {"batch_stats": "mean"}})
    assert command.main([str(tmp_path / "frozen.json")]) == 2
    assert "batch_stats" in capsys.readouterr().err


def test_the_published_distances_are_those_of_the_results_files():
    page = (ROOT / "docs" / "parity.md").read_text()
    lines = re.findall(r"^\| `(drift-[\w-]+)` \| (\d+) \| (\S+) \| (\S+) \| (\S+) \|$", page, re.M)
    assert len(lines) >= 6
    for name, number, *cells in lines:
        content = json.loads((RESULTS / f"{name}.json").read_text())
        row = content["rows"][int(number) - 1]
        assert cells == [f"{row[key]:.0e}" for key in ("one_round", "free", "rounding")]
