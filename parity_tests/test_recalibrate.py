"""Honest statistics for a TFF user: the example of `tff_reference.recalibrate`, carried out."""

import ast
import json
import re

import numpy as np
import pytest

from jaxfed.data import load
from tff_reference.process import ROOT, Worker


def test_the_readme_shows_the_example():
    source = (ROOT / "tff_reference" / "recalibrate.py").read_text(encoding="utf-8")
    example = ast.get_docstring(ast.parse(source)) or ""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    lines = [line.strip() for line in example.splitlines() if line.startswith("    ")]
    assert lines == [line for line in shown.splitlines() if line]


@pytest.mark.slow
def test_the_example_brings_the_accuracy_back(tff_python, tmp_path):
    digits = load("digits")
    folder = tmp_path / "case"
    folder.mkdir()
    np.savez(
        folder / "data.npz", x_train=digits.x_train / 255, y_train=digits.y_train,
        x_test=digits.x_test / 255, y_test=digits.y_test,
    )  # fmt: skip
    with Worker(tff_python, tmp_path / "logs", run="parity_tests.tff_user:run") as worker:
        worker.ask(folder)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["trained"], "the weights are not those of the process"
    assert scores["momentum"] == 0.99, "the model was left changed"
    assert scores["recalibrated"] > 0.9
    assert scores["recalibrated"] > scores["printed"] + 0.2
