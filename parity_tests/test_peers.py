"""The comparison with other frameworks, with the one whose environment the tests have: TFF."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import run
from benchmarks.peers.jobs import Job, Row, Work

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compare")]


def test_tff_does_the_same_training_and_is_timed(tff_python, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXFED_CACHE_DIR", str(tmp_path))  # logs
    work = Work("training", "logistic", (30, 45), rounds=2)
    versions: dict[str, dict[str, str]] = {}
    pythons = {"jaxfed": Path(sys.executable), "tff": tff_python}
    rows = run(Job("tiny", tuple(Row(peer, work) for peer in pythons)), pythons, 1, versions)
    assert [row["peer"] for row in rows] == ["jaxfed", "tff"]
    assert [list(row["apart"]) for row in rows] == [[], ["loss", "update"]]
    assert versions["tff"]["tensorflow-federated"] == "0.87.0"
    assert all(row["median_seconds"] > 0 for row in rows)
