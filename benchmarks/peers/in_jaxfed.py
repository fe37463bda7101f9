"""The work in jaxfed: compiled ahead of time, all rounds one dispatch, images on the device."""

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.peers.serve import Inputs, serve
from jaxfed import Experiment, Variables
from jaxfed.config import from_json, override
from jaxfed.machine import use_all_cores
from jaxfed.plan import make_plan, stack_plans
from jaxfed.prepare import prepare
from jaxfed.program import compile_tasks, replicated
from jaxfed.segments import segments
from parity_tests.case import flat, make_case, unflat

Do = Callable[[], dict[str, np.ndarray]]


def run(folder: Path) -> None:
    """Answers one request; as the command does, with every core a device."""
    use_all_cores()
    serve(folder, build, ("jaxfed", "jax", "jaxlib", "flax", "optax", "numpy"))


def build(inputs: Inputs) -> Do:
    """Makes the function that does the work once."""
    experiment = from_json(inputs.folder / "experiment.json")
    match inputs.work["kind"]:
        case "sweep":
            return _sweep(experiment, inputs.work["points"])
        case "cold-start":
            return lambda: _cold_start(inputs.folder / "experiment.json")
    task = make_case(experiment, test_examples=inputs.work["test_images"]).task
    program = compile_tasks([task])
    start = program.state.variables
    params = jax.tree.map(lambda leaf: leaf[None], unflat(inputs.params, start.params))
    variables = replicated(Variables(params, start.stats), program.mesh)
    state = program.state._replace(variables=variables)
    rounds = range(1, program.length + 1)
    plans = stack_plans([stack_plans([make_plan(task.schedule, number) for number in rounds])])
    plans = replicated(plans, program.mesh)

    def train() -> dict[str, np.ndarray]:
        after, _ = jax.block_until_ready(
            program.train(program.numbers, state, program.train_set, plans)
        )
        return {name: np.asarray(leaf)[0] for name, leaf in flat(after.variables.params).items()}

    def evaluate() -> dict[str, np.ndarray]:
        scores, _ = jax.block_until_ready(
            program.evaluate(
                state, program.test_set, program.test_index, program.train_set, program.train_index
            )
        )
        return {name: np.asarray(scores[name])[0] for name in ("loss", "accuracy")}

    return evaluate if inputs.work["kind"] == "evaluation" else train


def _sweep(experiment: Experiment, points: int) -> Do:
    """Compiles one program for so many learning rates and runs it, every time anew."""
    rates = np.geomspace(0.01, 0.1, points).tolist()
    tasks = [prepare(override(experiment, {"client.lr": rate})) for rate in rates]

    def do() -> dict[str, np.ndarray]:
        (last,) = itertools.islice(segments(compile_tasks(tasks)), 1)
        return {"rounds": np.asarray([len(rows) for rows in last.rows])}

    return do


def _cold_start(experiment: Path) -> dict[str, np.ndarray]:
    """From the start of `python -m jaxfed.train` to the end of its first round."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "jaxfed.train", "--config", str(experiment)]
        process = subprocess.Popen([*command, "--quiet", "--out", str(out)])
        try:
            metrics = out / "metrics.jsonl"
            while not metrics.exists() or not metrics.read_text().endswith("\n"):
                if process.poll():
                    raise RuntimeError(f"python -m jaxfed.train: exit code {process.returncode}")
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    return {}
