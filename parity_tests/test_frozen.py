"""`batch_stats=frozen` is TFF's rule: MobileNet has the test accuracy that TFF prints for it."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import Cohort, Examples, Experiment, State, Variables
from jaxfed.config import override
from jaxfed.core.evaluate import batches, evaluator
from jaxfed.precision import precision
from jaxfed.program import algorithm_of
from parity_tests.case import flat, make_case, unflat
from parity_tests.reference import live
from parity_tests.replay import compiled
from tff_reference.process import Worker

ROUNDS = 10
MNIST = Path(os.environ.get("JAXFED_DATA_DIR", "")) / "mnist"


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="no mnist in JAXFED_DATA_DIR")
def test_frozen_is_what_tff_evaluates(tff_python, tmp_path):
    # Two steps a round: four of a third of the size end 1e-8 apart.
    experiment = override(Experiment(), {
        "rounds": ROUNDS, "dtype": "float64", "data.dataset": "mnist", "data.num_clients": 4,
        "data.examples_per_client": 80, "model.name": "mobilenet-v1", "model.width": 0.25,
        "model.batch_stats": "frozen", "client.lr": 0.03, "client.epochs": 1,
        "client.batch_size": 40,
    })  # fmt: skip
    case = make_case(experiment, test_examples=2000)
    with Worker(tff_python, tmp_path) as worker:
        # Nested, as users have it who see no warning from TFF.
        trace = live(case, worker, "MobileNet on MNIST", deadline=500, nested=True)
    with precision(experiment):
        algorithm = algorithm_of(case.task, {})
        step = compiled(algorithm.round)
        score = compiled(evaluator(case.task.problem, "frozen"))
        train, test = (Examples(jnp.asarray(x), jnp.asarray(y)) for x, y in (case.train, case.test))
        index = jnp.asarray(batches(np.arange(2000), 500))
        before = case.start
        for number, plan in enumerate(case.plans, start=1):
            state = algorithm.init(jax.tree.map(jnp.asarray, before))
            state, _ = step(state, Cohort(train, plan))
            theirs = {
                name.removeprefix(f"round/{number}/params/"): array
                for name, array in trace.items()
                if name.startswith(f"round/{number}/params/")
            }
            for name, ours in flat(state.variables.params).items():
                gap = np.abs(np.asarray(ours) - theirs[name]).max()
                assert gap <= 1e-10 * np.abs(theirs[name]).max(), (number, name)
            scores, _ = score(State(state.variables, ()), test, index, train, index)
            tff = float(trace[f"round/{number}/test/accuracy"])
            assert abs(float(scores["accuracy"].value()) - tff) <= 0.005, number
            before = Variables(unflat(theirs, before.params), before.stats)
    # Loss, not accuracy: which few images are right is decided by rounding, other on each machine.
    first, last = (
        np.mean([float(trace[f"round/{r}/train/loss"]) for r in rounds])
        for rounds in ((1, 2, 3), (ROUNDS - 2, ROUNDS - 1, ROUNDS))
    )
    assert last < first - 0.1  # while the test accuracy has stayed at chance:
    assert float(trace[f"round/{ROUNDS}/test/accuracy"]) < 0.2
