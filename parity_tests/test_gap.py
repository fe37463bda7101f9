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
from jaxfed.config import override
from parity_tests.gap import pages, trials
from parity_tests.gap.__main__ import AGAIN, PUBLISHED, main
from parity_tests.gap.arms import FULL, QUICK, Arm, Setting, arms
from parity_tests.gap.effects import (
    MARGIN,
    Runs,
    Stop,
    difference,
    effect,
    same,
    verdict,
    within_seeds,
)  # fmt: skip
from parity_tests.gap.findings import chain, conclusions, findings, otherwise
from parity_tests.gap.trials import case_of, in_jaxfed, in_reference
from tff_reference.process import ROOT, Worker

MNIST = Path(os.environ.get("JAXFED_DATA_DIR", "")) / "mnist"

SMALL = Setting((0, 1), (0.01, 0.03), (0.01,), 4, 2, 3, 20, 50, 2, 1, (7,))
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
    # Above zero, and of no account: within the margin.
    assert verdict(effect([0.05, 0.051, 0.052])) == "not supported"
    assert verdict(effect([-0.05, -0.051, -0.052])) == "not supported"


def test_repeats_of_a_seed_are_compared_by_how_they_spread():
    # A two-sample Student test, pooled: differences 0.1 and 0.3, variance 0.02 in each of 4 groups,
    # standard error sqrt(0.02 * 4 / 2) / 2 = 0.1, t = 2.77645 at 4 degrees of freedom.
    after = {0: [0.5, 0.7], 1: [0.6, 0.8]}
    before = {0: [0.4, 0.6], 1: [0.3, 0.5]}
    found = within_seeds(after, before)
    assert found.by_seed == pytest.approx([0.1, 0.3])
    assert (found.mean, found.high) == pytest.approx((0.2, 0.2 + 2.77645 * 0.1), abs=1e-6)


@pytest.mark.parametrize(("low", "high", "expected"), [
    (-0.01, 0.02, True), (0.01, 0.02, True), (-0.3, 0.3, False), (0.01, MARGIN + 0.01, False),
])  # fmt: skip
def test_a_wide_interval_around_zero_is_no_sameness(low, high, expected):
    assert same(effect([0.0, 0.0])._replace(low=low, high=high)) is expected


def run_of(arm, system, seed, rate, test, validation=None):
    return {
        "arm": arm, "system": system, "seed": seed, "repeat": 0, "rate": rate,
        "rounds": [1], "chose": True,
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


@pytest.mark.parametrize("more", [(), (3, 4)])
@pytest.mark.parametrize("way", ["IID", "shards"])
def test_the_links_of_a_chain_add_up_to_the_gap(way, more):
    rng, runs = np.random.default_rng(0), []
    for arm in ("MobileNet, central", "MobileNet, IID", "MobileNet, shards"):
        for seed in (0, 1, 2, *more):
            rules = ("kept", "frozen", "recalibrated")
            for system in ("jaxfed", "Keras" if "central" in arm else "TFF"):
                if seed not in more or (system, arm) == ("jaxfed", "MobileNet, IID"):
                    runs.append(run_of(arm, system, seed, 0.1, {r: rng.random() for r in rules}))
    found = chain(Runs(runs, {}), "MobileNet", way)
    links = [link["effect"]["mean"] for link in found["links"]]
    ends = [stop["accuracy"]["mean"] for stop in (found["stops"][0], found["stops"][-1])]
    assert len(links) == (6 if way == "IID" else 7)
    assert sum(links) == pytest.approx(found["gap"]["mean"]) == pytest.approx(ends[1] - ends[0])


def test_what_the_verdict_concludes():
    """Planted: the rule costs 0.7, federation 0.1; TFF is the same, then 0.2 worse."""

    def concluded(worse, repeats):
        runs, noise = [], np.random.default_rng(0)
        exact = {"central": 0.9, "IID": 0.8}
        for seed in range(3):
            for way, accuracy in exact.items():
                runs.append(run_of(f"net, {way}", "jaxfed", seed, 0.1, {"recalibrated": accuracy}))
                runs[-1]["test"]["frozen"] = [0.1]
            runs.append(run_of("net, IID", "TFF", seed, 0.1, {"recalibrated": 0.8 - worse}))
            runs[-1]["test"]["frozen"] = [0.1]
        again = [run | {"repeat": r} for r in range(1, repeats) for run in runs]
        both = [json.loads(json.dumps(run)) for run in runs + again]
        for run in both:
            run["test"] = {rule: [v[0] + noise.normal(0, 0.01)] for rule, v in run["test"].items()}
        return [each["holds"] for each in conclusions(Runs(both, {}), ["net"])]

    assert concluded(0.0, 1) == [True, None, True, True, True]  # no repeats, nothing on sameness
    assert concluded(0.0, 4) == [True, None, True, True, True, True, True]
    assert concluded(0.2, 4) == [True, None, True, True, True, True, False]


# --- The arms -------------------------------------------------------------------------------


def test_a_study_that_is_made_again_says_what_it_concludes_otherwise():
    gains = {"about": "MobileNet", "text": "it gains", "effect": {}}
    shuffle, wait = ({"claim": claim, "view": "CNN", "effect": {}} for claim in ("shuffle", "wait"))
    one = {
        "conclusions": [gains | {"holds": True}],
        "claims": [shuffle | {"verdict": "supported"}],
    }
    other = {
        "conclusions": [gains | {"holds": False}],
        "claims": [shuffle | {"verdict": "supported"}, wait | {"verdict": "opposite"}],
    }
    assert otherwise(one, one) == []
    assert otherwise(one, other) == [
        "MobileNet: it gains: holds, published: does not hold",
        "wait (CNN): absent, published: opposite",
    ]


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
        np.testing.assert_array_equal(base.train.inputs, other.train.inputs)
        np.testing.assert_array_equal(base.test.inputs, other.test.inputs)
        jax.tree.map(np.testing.assert_array_equal, base.start, other.start)
    assert not np.array_equal(base.train.inputs, case_of(Arm("", DIGITS), SMALL, 2).train.inputs)


def test_a_repeat_is_off_by_rounding_alone():
    first, again = (case_of(Arm("", DIGITS), SMALL, 1, repeat) for repeat in (0, 2))
    np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
    ours, theirs = (jax.tree.leaves(case.start.params) for case in (first, again))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6)
    assert any(not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("order", ["stored", "sorted"])
def test_the_order_of_images_is_all_that_an_order_changes(order):
    usual, other = (case_of(Arm("", DIGITS, order=o), SMALL, 0) for o in ("shuffled", order))
    labels = np.asarray(usual.train.targets)
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
    setting = SMALL._replace(rates=FULL.rates, start=(1e-3, 3e-3), repeats=3)
    found = in_jaxfed(Arm("", DIGITS), setting, None, {})
    assert [run["rate"] for run in found] == [r for r in (1e-3, 3e-3, 1e-2, 3e-2) for _ in "01"]
    found = in_jaxfed(Arm("", DIGITS), setting._replace(tuning=1), None, {})
    asked = [(run["rate"], run["seed"], run["chose"]) for run in found]
    assert asked == [
        (1e-3, 0, True), (3e-3, 0, True), (1e-2, 0, True), (1e-2, 1, False), (3e-2, 0, True)
    ]  # fmt: skip
    found = in_jaxfed(Arm("", DIGITS, about_rates=True), setting._replace(tuning=1), None, {})
    assert [run["rate"] for run in found] == [r for r in (1e-3, 3e-3, 1e-2, 3e-2) for _ in "01"]
    repeated = in_jaxfed(Arm("", DIGITS, repeated=True), setting, None, {})
    again = [(run["rate"], run["seed"], run["repeat"]) for run in repeated if run["repeat"]]
    assert again == [(1e-2, seed, repeat) for repeat in (1, 2) for seed in SMALL.seeds]
    varies = in_jaxfed(Arm("", DIGITS, varies=True), setting, None, {})
    assert [run["seed"] for run in varies if run["rate"] == 1e-2] == [0, 1, 7]
    assert {run["seed"] for run in varies if run["chose"]} == {0, 1}
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
        x_test=np.asarray(case.test.inputs), y_test=np.asarray(case.test.targets)
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
        x_test=np.asarray(case.test.inputs), y_test=np.asarray(case.test.targets)
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
        theirs = in_reference(arm, setting, 0, 0, 0.01, worker)
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
    # As a user's is compiled, not as a test's: it trains for minutes.
    users = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    command = [sys.executable, "-m", "parity_tests.gap", "--quick", "--out", tmp_path]
    log = tmp_path / "log"
    with log.open("wb") as file:
        subprocess.run(command, check=True, cwd=ROOT, stdout=file, env=users)
    content = json.loads((tmp_path / "gap.json").read_text())
    holds = [each["holds"] for each in content["findings"]["conclusions"]]
    assert holds == [True, None, True, True, True], content["findings"]["conclusions"]
    assert {run["seed"] for run in content["runs"]} == set(QUICK.seeds)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(?:src|href)=|url\((?!#)|@import", page)
    # A second start repeats nothing.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    with log.open("wb") as file:
        subprocess.run(command, check=True, cwd=ROOT, stdout=file, env=users)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == before
    again = json.loads((tmp_path / "gap.json").read_text())
    assert again["findings"] == content["findings"]


def test_bad_input_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--quick", "--publish"])
    assert caught.value.code == 2
    assert "--publish: got --quick too" in capsys.readouterr().err


# --- What is committed ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return json.loads(PUBLISHED.read_text())


@pytest.fixture(scope="module")
def again():
    return json.loads(AGAIN.read_text())


def test_the_published_pages_are_made_of_the_published_numbers(published, again):
    assert (ROOT / "docs" / "gap.md").read_text() == pages.markdown(published, again)
    readme = (ROOT / "README.md").read_text()
    assert pages.in_readme(readme, published) == readme
    for name in pages.figures(published):
        assert f"({name}.svg)" in (ROOT / "docs" / "gap.md").read_text()
        assert (ROOT / "docs" / f"{name}.svg").exists()


@pytest.mark.parametrize("study", ["published", "again"])
def test_the_published_findings_follow_from_the_published_runs(study, request):
    published = request.getfixturevalue(study)
    rate_of = {name: arm["rate_of"] for name, arm in published["arms"].items()}
    again = findings(Runs(published["runs"], rate_of), rate_of, quick=False)
    ours, theirs = (leaves(json.loads(json.dumps(f))) for f in (again, published["findings"]))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        # Student's t is not the same to the last digit in every version of SciPy.
        same = pytest.approx(theirs[path], abs=1e-9) if type(value) is float else theirs[path]
        assert value == same, path


def leaves(tree, path=()):
    """What is at every end of nested dicts and lists, by the way there."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {p: leaf for key, sub in items for p, leaf in leaves(sub, (*path, key)).items()}


@pytest.mark.parametrize("study", ["published", "again"])
def test_the_published_study_is_of_the_present_arms(study, request):
    published = request.getfixturevalue(study)
    assert published["setting"] == json.loads(json.dumps(FULL._asdict()))
    assert list(published["arms"]) == [arm.name for arm in arms(FULL, quick=False)]
    for arm in arms(FULL, quick=False):
        runs = [run for run in published["runs"] if run["arm"] == arm.name]
        more = FULL.more if arm.varies else ()
        assert {run["seed"] for run in runs} == {*FULL.seeds, *more}
        assert arm.reference == any(run["system"] != "jaxfed" for run in runs)


@pytest.mark.parametrize("study", ["published", "again"])
def test_no_published_arm_is_untuned(study, request):
    """Every arm's rate is better on validation images than its neighbours on the grid."""
    published = request.getfixturevalue(study)
    for arm in arms(FULL, quick=False):
        if arm.rate_of is not None:
            continue
        runs = [r for r in published["runs"] if (r["arm"], r["system"]) == (arm.name, "jaxfed")]
        scores = {}
        for run in runs:
            if run["chose"]:
                scores.setdefault(run["rate"], []).append(run["validation"][trials.honest(run)])
        best = max(scores, key=lambda rate: np.mean(scores[rate]))
        place = FULL.rates.index(best)
        assert set(FULL.rates[max(place - 1, 0) : place + 2]) <= scores.keys(), arm.name
        assert published["findings"]["rates"][arm.name] == best


def test_every_published_conclusion_holds(published):
    held = [each["holds"] for each in published["findings"]["conclusions"]]
    assert False not in held
    assert held.count(True) >= 14


def test_made_again_the_study_concludes_the_same(published, again):
    assert otherwise(again["findings"], published["findings"]) == []
    # Another machine: what jaxfed trains there ends at other numbers.
    ours, theirs = (
        [
            run["test"]
            for run in study["runs"]
            if (run["arm"], run["system"]) == ("MobileNet, IID", "jaxfed")
        ]
        for study in (again, published)
    )
    assert ours != theirs
