"""The weights of a run, put into Keras: `weights.npz` gives the same network there."""

import subprocess

import numpy as np
import pytest

from jaxfed import load_run
from jaxfed.data import load
from jaxfed.train import main
from tff_reference.process import ROOT

SCRIPT = """
import sys
import numpy as np
from tff_reference import networks, weights
folder = sys.argv[1]
model = networks.build("cnn-small", (8, 8, 1), 10, width=1.0, norm="batch", dropout=True)
weights.load(model, f"{folder}/weights.npz")
images = np.load(f"{folder}/images.npy")
np.save(f"{folder}/logits.npy", model(images, training=False).numpy())
"""


@pytest.mark.slow
def test_a_run_goes_on_in_keras(tff_python, tmp_path):
    out = tmp_path / "run"
    flags = ["--model.name", "cnn-small", "--model.norm", "batch", "--rounds", "3", "--quiet"]
    assert main([*flags, "--client.epochs", "1", "--out", str(out)]) == 0
    digits = load("digits")
    np.save(out / "images.npy", (digits.x_test / 255).astype(np.float32))
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(
            [tff_python, "-c", SCRIPT, str(out)],
            cwd=ROOT, check=True, timeout=500, stdout=log, stderr=log,
        )  # fmt: skip
    right = np.load(out / "logits.npy").argmax(-1) == digits.y_test
    # One image of 359 may lie between two classes.
    assert right.mean() == pytest.approx(load_run(out).summary["final_test_accuracy"], abs=1 / 359)
