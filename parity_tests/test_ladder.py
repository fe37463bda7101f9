"""Every experiment of the suite against live TFF, rung by rung."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from parity_tests.ladder import climb
from parity_tests.reference import live
from parity_tests.suite import SUITE, case_of
from parity_tests.table import README, read, text, written
from tff_reference.process import Worker

# One process of TFF serves them all.
pytestmark = pytest.mark.xdist_group("ladder")

RUNGS = {
    "names", "logits, inference", "logits, training", "loss", "gradient", "moving statistics",
    "steps, teacher-forced", "local update", "weighted mean", "server step", "one round",
    "rounds, teacher-forced", "rounds, free-running", "training metrics", "evaluation",
}  # fmt: skip


@pytest.fixture(scope="module")
def traced(tff_python, tmp_path_factory, request):
    """`name -> (case, trace)`; TFF computes the next trace while one is being compared."""
    chosen = {item.callspec.params["name"] for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")}  # fmt: skip
    cases = {name: case_of(name) for name in SUITE if name in chosen}
    ahead = ThreadPoolExecutor(1)
    with Worker(tff_python, tmp_path_factory.mktemp("logs")) as worker:
        waiting = {name: ahead.submit(live, case, worker, name) for name, case in cases.items()}
        yield lambda name: (cases[name], waiting[name].result())
        ahead.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE)
def test_jaxfed_equals_tff(name, traced):
    case, trace = traced(name)
    rungs = list(climb(case, trace))
    assert [rung for rung in rungs if not rung.holds or rung.chaotic] == []
    absent = RUNGS - {rung.name for rung in rungs}
    if not case.start.stats:
        absent -= {"moving statistics"}
    if len(case.plans) == 1:
        absent -= {"rounds, teacher-forced", "rounds, free-running"}
    if case.task.experiment.algorithm == "central":
        absent -= {"local update", "weighted mean", "server step"}
    assert absent == set()


def test_the_suite_has_what_goes_wrong():
    """Ragged clients, clients and batches of one, a client that diverges, both weightings."""
    cases = {name: case_of(name) for name in SUITE if not name.startswith("mobilenet")}
    sizes = {name: (case.plans[0].rows >= 0).sum(-1) for name, case in cases.items()}
    epochs = {name: case.task.experiment.client.epochs for name, case in cases.items()}
    ragged = [name for name, size in sizes.items() if len(set(size.sum(-1))) > 1]
    single = [name for name, size in sizes.items() if (size.sum(-1) == epochs[name]).any()]
    assert "cnn" in ragged and "cnn" in single and (epochs["cnn"] or 0) > 1
    one_row = [name for name in ragged if (sizes[name][:, 1:] == 1).any()]
    assert "BatchNorm" in one_row and cases["BatchNorm"].start.stats
    assert any(np.isnan(case.train.inputs).any() for case in cases.values())
    experiments = [entry.experiment for entry in SUITE.values()]
    assert {e.weighting or "examples" for e in experiments} == {"examples", "uniform"}
    assert {e.algorithm for e in experiments} == {"fedavg", "fedprox", "fedsgd", "central"}
    assert {e.dtype for e in experiments} == {"float64", "float32"}


def test_the_readme_has_the_table():
    readme = README.read_text()
    assert written(readme, text(read())) == readme
    assert set(read()["cases"]) == set(SUITE)
