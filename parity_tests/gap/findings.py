"""From runs to findings: differences between arms, seed by seed, with intervals. Pure functions.

Every number is a test accuracy after the last round. Two arms are compared by the differences of
equal seeds, whose mean has a 95 % interval from Student's t; what lies inside it is no finding.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from parity_tests.gap.arms import CHAINS, EPOCHS
from parity_tests.gap.trials import honest

CONFIDENCE = 0.95
CHANCE = 0.2
"""Ten classes: guessing gives 0.1, and a network that knows one of them no more than this."""


class Stop(NamedTuple):
    """An accuracy: of an arm, in a system, under a rule for BatchNorm's statistics."""

    label: str
    arm: str
    system: str = "jaxfed"
    rule: str = "kept"


class Effect(NamedTuple):
    """The mean of one number a seed, or of its differences, with its interval."""

    mean: float
    low: float
    high: float
    by_seed: list[float]


class Runs:
    """All runs, found by arm, system and seed."""

    def __init__(self, runs: Iterable[dict[str, Any]], rate_of: dict[str, str | None]):
        self._runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._rate_of = rate_of
        for run in runs:
            self._runs.setdefault((run["arm"], run["system"]), []).append(run)

    def has(self, stop: Stop) -> bool:
        """Whether the study ran it."""
        return (stop.arm, stop.system) in self._runs

    def rates(self, arm: str, rule: str) -> list[tuple[float, float]]:
        """(mean validation accuracy, learning rate), the best first."""
        found: dict[float, list[float]] = {}
        for run in self._runs[self._rate_of.get(arm) or arm, "jaxfed"]:
            found.setdefault(run["rate"], []).append(run["validation"][rule])
        return sorted(((float(np.mean(v)), rate) for rate, v in found.items()), reverse=True)

    def rate(self, arm: str) -> float:
        """The learning rate that is best on validation images, with honest statistics."""
        runs = self._runs[self._rate_of.get(arm) or arm, "jaxfed"]
        return self.rates(arm, honest(runs[0]))[0][1]

    def accuracy(self, stop: Stop, rate: float | None = None) -> dict[int, float]:
        """Test accuracy after the last round by seed, at a rate or at the arm's chosen one."""
        runs = self._runs[stop.arm, stop.system]
        rate = (self.rate(stop.arm) if rate is None else rate) if stop.system == "jaxfed" else None
        return {
            run["seed"]: run["test"][stop.rule][-1]
            for run in runs
            if rate is None or run["rate"] == rate
        }

    def curve(self, stop: Stop) -> tuple[list[int], np.ndarray]:
        """Rounds, and test accuracy [seeds, rounds]."""
        rate = self.rate(stop.arm)
        runs = [r for r in self._runs[stop.arm, stop.system] if r["rate"] == rate]
        return runs[0]["rounds"], np.array([run["test"][stop.rule] for run in runs])


def effect(numbers: Iterable[float]) -> Effect:
    """Mean and interval of independent numbers, one a seed."""
    values = np.array(list(numbers))
    spread = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    mean = float(values.mean())
    return Effect(mean, mean - float(spread), mean + float(spread), values.tolist())


def difference(after: dict[int, float], before: dict[int, float]) -> Effect:
    """`after` minus `before`, over the seeds that both have."""
    return effect(after[seed] - before[seed] for seed in sorted(after.keys() & before.keys()))


def verdict(found: Effect) -> str:
    """What an article's claim that this should be above zero comes to."""
    if found.low > 0:
        return "supported"
    return "opposite" if found.high < 0 else "not supported"


# --- The chain ------------------------------------------------------------------------------


def stops(network: str, way: str) -> list[Stop]:
    """From plain Keras to TFF, one change at a time."""
    normed = network.startswith("MobileNet") and not network.endswith("Norm")
    central, iid, arm = f"{network}, central", f"{network}, IID", f"{network}, {way}"
    found = [
        Stop("Keras, all data in one place", central, "Keras"),
        Stop("jaxfed, all data in one place", central),
    ]
    if normed:
        found.append(Stop("exact statistics, not moving ones", central, rule="recalibrated"))
    found.append(Stop("federated, IID clients", iid, rule="recalibrated" if normed else "kept"))
    if normed:
        found.append(Stop("moving statistics, averaged", iid))
    if way == "shards":
        found.append(Stop("two-class shards", arm))
    if normed:
        found.append(Stop("statistics never averaged (TFF's rule)", arm, rule="frozen"))
    return [*found, Stop("TFF itself", arm, "TFF", "frozen" if normed else "kept")]


def chain(runs: Runs, network: str, way: str) -> dict[str, Any]:
    """The accuracy at every stop, the links between them, and the whole gap."""
    path = [stop for stop in stops(network, way) if runs.has(stop)]
    values = [runs.accuracy(stop) for stop in path]
    links = [difference(b, a) for a, b in itertools.pairwise(values)]
    return {
        "network": network,
        "clients": way,
        "stops": [
            {"label": stop.label, "accuracy": effect(v.values())._asdict()}
            for stop, v in zip(path, values, strict=True)
        ],
        "links": [
            {"label": stop.label, "effect": link._asdict()}
            for stop, link in zip(path[1:], links, strict=True)
        ],
        "gap": difference(values[-1], values[0])._asdict(),
    }


# --- The article's claims -------------------------------------------------------------------


def claims(runs: Runs) -> list[dict[str, Any]]:
    """What the article advises, each as `advised minus not advised`."""
    found = []
    views = (
        ("MobileNet as TFF tests it", "MobileNet", "frozen"),
        ("MobileNet, honest statistics", "MobileNet", "recalibrated"),
        ("the article's CNN", "CNN", "kept"),
    )
    pairs = (
        ("shuffle the clients' images, which arrive sorted", "IID", "IID, sorted by label"),
        ("shuffle the clients' images, which arrive mixed", "IID", "IID, not shuffled"),
        ("server Adam at 1.0 instead of averaging", "IID, server Adam 1.0", "IID"),
        (f"1 local epoch instead of {EPOCHS}, IID", "IID", f"IID, {EPOCHS} local epochs"),
        (f"1 local epoch instead of {EPOCHS}, shards", "shards", f"shards, {EPOCHS} local epochs"),
        ("IID clients instead of two-class shards", "IID", "shards"),
    )
    for text, advised, other in pairs:
        for view, network, rule in views:
            best = [_tuned(runs, f"{network}, {way}", rule) for way in (advised, other)]
            found.append(_claim(text, view, *best))
    for view, network, rule in views:
        stop = Stop("", f"{network}, IID", rule=rule)
        rates = runs.rates(stop.arm, rule)
        best, worst = rates[0][1], rates[-1][1]
        text = "choose the client learning rate: best of the grid against worst"
        found.append(_claim(text, view, runs.accuracy(stop, best), runs.accuracy(stop, worst)))
    small = _tuned(runs, "small CNN, IID", "kept")
    for view, network, rule in views:
        other = _tuned(runs, f"{network}, IID", rule)
        found.append(_claim("a smaller network, the article's third, instead", view, small, other))
    narrow, wide = (
        _tuned(runs, f"{name}, IID", "frozen") for name in ("MobileNet", "MobileNet 0.5")
    )
    text = "a smaller network: MobileNet of width 0.25 instead of 0.5"
    found.append(_claim(text, "MobileNet as TFF tests it", narrow, wide))
    return found


def _tuned(runs: Runs, arm: str, rule: str) -> dict[int, float]:
    """At the learning rate that is best for the very rule it is tested under."""
    return runs.accuracy(Stop("", arm, rule=rule), runs.rates(arm, rule)[0][1])


def _claim(text: str, view: str, advised: dict, other: dict) -> dict[str, Any]:
    found = difference(advised, other)
    return {
        "claim": text,
        "view": view,
        "advised": effect(advised.values())._asdict(),
        "other": effect(other.values())._asdict(),
        "effect": found._asdict(),
        "verdict": verdict(found),
    }


# --- What brings it back --------------------------------------------------------------------

IN_TFF = "in TFF: `recalibrated(model, weights, images)`"
REMEDIES = {
    "nothing: as TFF tests it": ("MobileNet", "TFF", "frozen"),
    IN_TFF: ("MobileNet", "TFF", "recalibrated"),
    "in TFF: batch statistics at evaluation": ("MobileNet", "TFF", "batch"),
    "in TFF: GroupNorm": ("MobileNet GroupNorm", "TFF", "kept"),
    "GroupNorm": ("MobileNet GroupNorm", "jaxfed", "kept"),
    "LayerNorm": ("MobileNet LayerNorm", "jaxfed", "kept"),
    "`mean`: statistics averaged": ("MobileNet", "jaxfed", "kept"),
    "`mean` with BatchNorm's momentum 0.9": ("MobileNet, momentum 0.9", "jaxfed", "kept"),
    "`pooled`": ("MobileNet, pooled", "jaxfed", "kept"),
    "`local` (FedBN)": ("MobileNet, local", "jaxfed", "kept"),
    "`recalibrate`": ("MobileNet", "jaxfed", "recalibrated"),
    "batch statistics at evaluation": ("MobileNet", "jaxfed", "batch"),
    "width 0.5, as TFF tests it": ("MobileNet 0.5", "jaxfed", "frozen"),
}
"""Network and variant, system, rule."""


def remedies(runs: Runs, way: str) -> list[dict[str, Any]]:
    """Each remedy's accuracy, and its gain over what TFF prints."""
    found = []
    base = runs.accuracy(Stop("", f"MobileNet, {way}", "TFF", "frozen"))
    for label, (name, system, rule) in REMEDIES.items():
        network, _, variant = name.partition(", ")
        stop = Stop(label, f"{network}, {way}" + (f", {variant}" if variant else ""), system, rule)
        if runs.has(stop):
            values = runs.accuracy(stop)
            gain = difference(values, base)._asdict()
            accuracy = effect(values.values())._asdict()
            found.append({"remedy": label, "accuracy": accuracy, "gain": gain})
    return found


# --- The verdict ----------------------------------------------------------------------------


FEDERATION = "federated averaging itself changes accuracy by"
RULE = "TFF's rule for BatchNorm, on the same weights, by"
RESIDUAL = "what is left between jaxfed under that rule and TFF is"


def conclusions(runs: Runs, names: Iterable[str]) -> list[dict[str, Any]]:
    """The sentences that the study is for, each with its numbers and whether it holds.

    `names` are the networks (and datasets) with BatchNorm to conclude about: what precedes
    ", central" and ", IID" in the names of arms.
    """
    found = []
    for name in names:
        central, iid = f"{name}, central", f"{name}, IID"
        printed = runs.accuracy(Stop("", iid, "TFF", "frozen"))
        frozen = runs.accuracy(Stop("", iid, rule="frozen"))
        honest = runs.accuracy(Stop("", iid, rule="recalibrated"))
        mended = runs.accuracy(Stop("", iid, "TFF", "recalibrated"))
        pooled = runs.accuracy(Stop("", central, rule="recalibrated"))
        algorithm, rule = difference(honest, pooled), difference(frozen, honest)
        residual, trained = difference(printed, frozen), difference(mended, honest)
        gain, tested = difference(mended, printed), effect(printed.values())
        found += [
            _conclusion(
                name, "IID clients, and still at chance: TFF prints", tested, tested.high < CHANCE
            ),
            _conclusion(name, FEDERATION, algorithm,
                        abs(algorithm.mean) < abs(rule.mean)),
            _conclusion(name, RULE, rule,
                        rule.high < 0),
            _conclusion(name, RESIDUAL, residual,
                        residual.low <= 0 <= residual.high),
            _conclusion(name, "and with both statistics recalibrated", trained,
                        trained.low <= 0 <= trained.high),
            _conclusion(name, "recalibrated in TFF, its weights gain", gain, gain.low > 0),
        ]  # fmt: skip
    return found


def _conclusion(name: str, text: str, found: Effect, holds: bool) -> dict[str, Any]:
    return {"about": name, "text": text, "effect": found._asdict(), "holds": bool(holds)}


def curves(runs: Runs) -> dict[str, Any]:
    """MobileNet's test accuracy over rounds under every rule, and in TFF."""
    found = {}
    for way, title in (
        ("IID", "MobileNet, IID clients"),
        ("shards", "MobileNet, two-class shards"),
    ):
        arm = f"MobileNet, {way}"
        lines = {
            "exact statistics": Stop("", arm, rule="recalibrated"),
            "moving statistics, averaged": Stop("", arm),
            "never averaged (TFF's rule)": Stop("", arm, rule="frozen"),
            "TFF itself": Stop("", arm, "TFF", "frozen"),
        }
        found[title] = {}
        for label, stop in lines.items():
            rounds, accuracy = runs.curve(stop)
            found[title][label] = {
                "rounds": rounds,
                "mean": accuracy.mean(axis=0).tolist(),
                "low": accuracy.min(axis=0).tolist(),
                "high": accuracy.max(axis=0).tolist(),
            }
    return found


def findings(runs: Runs, names: Iterable[str], *, quick: bool) -> dict[str, Any]:
    """All of it, as it stands in `gap.json`; `names` are those of the arms."""
    rates = {name: runs.rate(name) for name in names}
    if quick:
        return {"conclusions": conclusions(runs, ["MobileNet"]), "rates": rates}
    return {
        "rates": rates,
        "curves": curves(runs),
        "conclusions": conclusions(runs, ["MobileNet", "MobileNetV2", "MobileNet, Fashion-MNIST"]),
        "chains": [chain(runs, network, way) for way in ("IID", "shards") for network in CHAINS],
        "claims": claims(runs),
        "remedies": {way: remedies(runs, way) for way in ("IID", "shards")},
    }
