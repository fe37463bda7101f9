"""The study: its arithmetic, its arms, a quick run of it, and what is committed of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxfed
from jaxfed.experiment import override
from parity_tests.gap import trials
from parity_tests.gap.__main__ import main
from parity_tests.gap.arms import FULL, QUICK, Arm, Setting, arms
from parity_tests.gap.findings import Runs, Stop, chain, difference, effect, verdict
from parity_tests.gap.trials import case_of, in_jaxfed, in_reference
from tff_reference.process import ROOT, Worker

MNIST = Path(os.environ.get("JAXFED_DATA_DIR", "")) / "mnist"

SMALL = Setting((0, 1), (0.01, 0.03), (0.01,), 4, 2, 3, 20, 50)
DIGITS = override(jaxfed.Experiment(), {
    "rounds": 4, "eval_every": 2, "clients_per_round": 3, "data.num_clients": 3,
    "data.examples_per_client": 20, "data.partition": "shards", "model.name": "cnn-small",
    "model.norm": "batch", "client.epochs": 2, "client.batch_size": 5,
})  # fmt: skip


# --- The arithmetic -------------------------------------------------------------------------


def test_the_interval_is_students():
    # t = 4.30265 at 2 degrees of freedom; standard deviation 0.1, so 0.1 / sqrt(3) of the mean.
    found = effect([0.4, 0.5, 0.6])
    assert found.mean == pytest.approx(0.5)
    half = 4.30265 * 0.1 / 3**0.5
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_differences_are_of_equal_seeds():
    found = difference({0: 0.5, 1: 0.7, 2: 0.9, 3: 0.0}, {2: 0.8, 1: 0.6, 0: 0.4})
    assert found.by_seed == pytest.approx([0.1, 0.1, 0.1])
    assert verdict(found) == "supported"
    assert verdict(effect([-0.1, -0.1, -0.1])) == "opposite"
    assert verdict(effect([0.1, -0.1, 0.3])) == "not supported"


def run_of(arm, system, seed, rate, test, validation=None):
    return {
        "arm": arm, "system": system, "seed": seed, "rate": rate, "rounds": [1],
        "test": {rule: [value] for rule, value in test.items()},
        "validation": validation or test,
    }  # fmt: skip


def test_an_arm_is_tested_at_the_rate_that_is_best_on_validation_images():
    runs = [
        run_of("a", "jaxfed", seed, rate, {"kept": test}, {"kept": validation})
        for seed in (0, 1)
        # The rate that looks best on the test images is not the one that is taken.
        for rate, test, validation in ((0.1, 0.9, 0.2), (0.3, 0.5, 0.6))
    ]
    runs += [run_of("b", "jaxfed", 0, 0.3, {"kept": 0.4})]
    found = Runs(runs, {"b": "a"})
    assert found.rate("a") == found.rate("b") == 0.3
    assert found.accuracy(Stop("", "a")) == {0: 0.5, 1: 0.5}


@pytest.mark.parametrize("way", ["IID", "shards"])
def test_the_links_of_a_chain_add_up_to_the_gap(way):
    rng, runs = np.random.default_rng(0), []
    for arm in ("MobileNet, central", "MobileNet, IID", "MobileNet, shards"):
        for seed in (0, 1, 2):
            rules = ("kept", "frozen", "recalibrated")
            for system in ("jaxfed", "Keras" if "central" in arm else "TFF"):
                runs.append(run_of(arm, system, seed, 0.1, {r: rng.random() for r in rules}))
    found = chain(Runs(runs, {}), "MobileNet", way)
    links = [link["effect"]["mean"] for link in found["links"]]
    ends = [stop["accuracy"]["mean"] for stop in (found["stops"][0], found["stops"][-1])]
    assert len(links) == (6 if way == "IID" else 7)
    assert sum(links) == pytest.approx(found["gap"]["mean"]) == pytest.approx(ends[1] - ends[0])


# --- The arms -------------------------------------------------------------------------------


def test_every_name_is_one_arm_and_comes_after_what_it_depends_on():
    found = arms(FULL, quick=False)
    names = [arm.name for arm in found]
    assert len(set(names)) == len(names)
    for place, arm in enumerate(found):
        assert arm.rate_of is None or arm.rate_of in names[:place]
        assert arm.experiment.rounds % arm.experiment.eval_every == 0
        # Equally many steps, or its opposite number would be given more training.
        steps = arm.experiment.rounds * (arm.experiment.client.epochs or 0)
        assert steps == FULL.rounds


def test_one_seed_has_the_same_images_and_weights_in_every_arm():
    base = case_of(Arm("", DIGITS), SMALL, 1)
    for changes in ({"data.partition": "iid"}, {"algorithm": "central"}):
        other = case_of(Arm("", override(DIGITS, changes)), SMALL, 1)
        np.testing.assert_array_equal(base.train.images, other.train.images)
        np.testing.assert_array_equal(base.test.images, other.test.images)
        jax.tree.map(np.testing.assert_array_equal, base.start, other.start)
    assert not np.array_equal(base.train.images, case_of(Arm("", DIGITS), SMALL, 2).train.images)


@pytest.mark.parametrize("order", ["stored", "sorted"])
def test_the_order_of_images_is_all_that_an_order_changes(order):
    usual, other = (case_of(Arm("", DIGITS, order=o), SMALL, 0) for o in ("shuffled", order))
    labels = np.asarray(usual.train.labels)
    for plan, changed in zip(usual.plans, other.plans, strict=True):
        for epoch in (slice(0, 4), slice(4, 8)):
            before, after = (np.asarray(p.rows)[:, epoch].reshape(3, -1) for p in (plan, changed))
            np.testing.assert_array_equal(np.sort(before), np.sort(after))
            keys = after if order == "stored" else labels[after]
            assert (np.diff(keys) >= 0).all()
            assert not np.array_equal(before, after)


def test_the_search_goes_on_until_the_best_rate_has_worse_neighbours(monkeypatch):
    scores = {1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.9, 3e-2: 0.6, 1e-1: 0.95}
    monkeypatch.setattr(
        trials, "_train",
        lambda functions, case, validation, rate: {"validation": {"kept": scores[rate]}},
    )  # fmt: skip
    setting = SMALL._replace(rates=FULL.rates, start=FULL.start)
    found = in_jaxfed(Arm("", DIGITS), setting, None, {})
    assert [run["rate"] for run in found] == [r for r in (1e-3, 3e-3, 1e-2, 3e-2) for _ in "01"]
    scores[3e-4] = 1.0
    assert 3e-4 not in {run["rate"] for run in in_jaxfed(Arm("", DIGITS), setting, None, {})}
    scores |= {1e-3: 1.0, 3e-4: 1.1}
    assert 1e-4 in {run["rate"] for run in in_jaxfed(Arm("", DIGITS), setting, None, {})}


@pytest.mark.parametrize("changes", [
    {}, {"algorithm": "central"}, {"model.batch_stats": "pooled"}, {"model.batch_stats": "local"},
])  # fmt: skip
def test_a_trial_is_what_the_engine_runs(changes):
    """The study's own loop against `jaxfed.run` of the same experiment."""
    policy = changes.get("model.batch_stats", "mean")
    plain = {key: value for key, value in changes.items() if key != "model.batch_stats"}
    arm = Arm("", override(DIGITS, plain), policy=policy)
    (found,) = in_jaxfed(arm, SMALL._replace(seeds=(3,)), 0.03, {})
    case = case_of(arm, SMALL, 3)
    dataset = case.task.dataset._replace(
        x_test=np.asarray(case.test.images), y_test=np.asarray(case.test.labels)
    )
    expected = {"seed": 3, "client.lr": 0.03, "model.batch_stats": policy, **changes}
    result = jaxfed.run(override(DIGITS, expected), dataset=dataset)
    tested = [row["test_accuracy"] for row in result.history if row["test_accuracy"] is not None]
    assert found["test"]["kept"] == pytest.approx(tested, abs=1e-6)
    trained = [row["train_accuracy"] for row in result.history]
    assert found["train"] == pytest.approx(trained, abs=1e-6)


def test_rules_differ_in_statistics_alone():
    arm = Arm("", override(DIGITS, {"data.partition": "iid", "client.lr": 0.1}))
    (found,) = in_jaxfed(arm, SMALL._replace(seeds=(0,)), 0.1, {})
    case = case_of(arm, SMALL, 0)
    dataset = case.task.dataset._replace(
        x_test=np.asarray(case.test.images), y_test=np.asarray(case.test.labels)
    )
    for rule, policy in (("kept", "mean"), ("frozen", "frozen"), ("recalibrated", "recalibrate")):
        result = jaxfed.run(
            override(arm.experiment, {"model.batch_stats": policy}), dataset=dataset
        )
        # Recalibration passes over the images in another order: a last digit may differ.
        assert found["test"][rule][-1] == pytest.approx(
            result.history[-1]["test_accuracy"], abs=0.03
        )
    assert len({values[-1] for values in found["test"].values()}) > 1


# --- In TFF ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.xdist_group("gap")
@pytest.mark.parametrize("algorithm", ["fedavg", "central"])
def test_a_trial_in_the_reference_is_the_same_trial(tff_python, tmp_path, algorithm):
    """Free-running, from the same weights over the same batches, under every rule."""
    arm = Arm("cnn", override(DIGITS, {
        "dtype": "float64", "rounds": 2, "eval_every": 1, "algorithm": algorithm, "client.lr": 0.01,
    }))  # fmt: skip
    setting = SMALL._replace(seeds=(0,))
    with Worker(tff_python, tmp_path, run="tff_reference.training:run") as worker:
        theirs = in_reference(arm, setting, 0, 0.01, worker)
    with jax.enable_x64(True):
        (ours,) = in_jaxfed(arm, setting, 0.01, {})
    assert theirs["train"] == pytest.approx(ours["train"], abs=1e-6)
    for rule in ("recalibrated", "batch"):
        assert theirs["test"][rule][-1] == pytest.approx(ours["test"][rule][-1], abs=1e-6)
    rule = "kept" if algorithm == "central" else "frozen"
    assert theirs["test"][rule] == pytest.approx(ours["test"][rule], abs=1e-6)
    assert theirs["versions"]["tensorflow-federated"] == "0.87.0"


# --- A quick study --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.xdist_group("gap")
@pytest.mark.skipif(not MNIST.is_dir(), reason="no mnist in JAXFED_DATA_DIR")
def test_a_quick_study_concludes_what_the_whole_one_does(tff_python, tmp_path):
    command = [sys.executable, "-m", "parity_tests.gap", "--quick", "--out", tmp_path]
    log = tmp_path / "log"
    with log.open("wb") as file:
        subprocess.run(command, check=True, cwd=ROOT, stdout=file)
    content = json.loads((tmp_path / "gap.json").read_text())
    assert [each for each in content["findings"]["conclusions"] if not each["holds"]] == []
    assert len(content["findings"]["conclusions"]) == 6
    assert {run["seed"] for run in content["runs"]} == set(QUICK.seeds)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(?:src|href)=|url\((?!#)|@import", page)
    # A second start repeats nothing.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    with log.open("wb") as file:
        subprocess.run(command, check=True, cwd=ROOT, stdout=file)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == before
    again = json.loads((tmp_path / "gap.json").read_text())
    assert again["findings"] == content["findings"]


def test_bad_input_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--quick", "--publish"])
    assert caught.value.code == 2
    assert "--publish: got --quick too" in capsys.readouterr().err
