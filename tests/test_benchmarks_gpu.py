"""The benchmark for GPUs, run small on a CPU."""

import json
import math
import subprocess
import sys

import pytest

from benchmarks.gpu.__main__ import SECTIONS, rows_of, table
from benchmarks.gpu.lowerings import LIMITS, TINY_LAYERS, lowerings
from benchmarks.gpu.measure import Case
from benchmarks.topology import ROOT

NO_TORCH = "ModuleNotFoundError: No module named 'torch'"


def run(*words):
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    ).stdout


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    screen = run("--tiny", "--out", str(out))
    report = json.loads(out.read_text())
    assert list(report["sections"]) == list(SECTIONS)
    assert not report["left_out"]
    for name, rows in report["sections"].items():
        assert rows
        assert f"\n{name}\n" in screen
        for row in rows:
            if name == "torch" and row.get("error") == NO_TORCH:
                continue
            assert "error" not in row, row
            for key, value in row.items():
                if key not in ("gap", "case_seconds", "test_accuracy") and value is not None:
                    assert isinstance(value, str) or (math.isfinite(value) and value > 0), row
            assert {"ms", "user_ms", "rounds_per_second"} & set(row), row
    found = report["sections"]["lowerings"]
    assert len(found) == len(LIMITS) * sum(len(lowerings(layer)) for layer in TINY_LAYERS)
    for row in found:
        assert row["gap"] <= LIMITS[row["precision"]], row
        assert row["of_ceiling"] and row["of_bandwidth"], row


def test_no_case_begins_when_the_time_is_over(tmp_path):
    assert "left out" in run("--tiny", "--seconds", "0", "--jobs", "ceiling")


def fails():
    raise MemoryError("out of memory\nand much more")


def test_what_fails_is_a_row():
    rows = rows_of(Case({"job": "large"}, fails))
    assert rows == [{"job": "large", "error": "MemoryError: out of memory", "case_seconds": 0.0}]
    assert table(rows, None).splitlines()[-1] == "large, MemoryError: out of memory"


def test_lowerings_stand_side_by_side():
    rows = [
        {"layer": "a", "clients": 2, "lowering": "x", "ms": 1.0, "of_ceiling": 0.25},
        {"layer": "a", "clients": 2, "lowering": "y", "ms": 0.5, "of_ceiling": 0.5},
        {"layer": "b", "clients": 2, "lowering": "y", "error": "ValueError: no"},
    ]
    head, first, second, error = table(rows, "lowering").splitlines()
    assert head.split() == ["layer", "clients", "x", "y", "best", "of_ceiling"]
    assert first.split() == ["a", "2", "1", "0.5", "0.5"]
    assert second.split() == ["b", "2", "error"]
    assert error == "b, y, ValueError: no"
