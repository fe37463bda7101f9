"""The arithmetic of the study: runs found by name, differences between them, intervals.

Every number is a test accuracy after the last round; of repeats of one seed, their mean. Two arms
are compared by the differences of equal seeds, whose mean has a 95 % interval from Student's t;
what lies inside it is no finding. That two of them are the same is not found by an interval that
holds zero, which a wide one always does, but by one that lies within `MARGIN` of it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from parity_tests.gap.trials import honest

CONFIDENCE = 0.95
CHANCE = 0.2
"""Ten classes: guessing gives 0.1, and a network that knows one of them no more than this."""
MARGIN = 0.08
"""Accuracies that differ by less are the same here: a tenth of the gap that is to be explained."""


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
            if run["chose"]:
                found.setdefault(run["rate"], []).append(run["validation"][rule])
        return sorted(((float(np.mean(v)), rate) for rate, v in found.items()), reverse=True)

    def rate(self, arm: str) -> float:
        """The learning rate that is best on validation images, with honest statistics."""
        runs = self._runs[self._rate_of.get(arm) or arm, "jaxfed"]
        return self.rates(arm, honest(runs[0]))[0][1]

    def repeats(self, stop: Stop, rate: float | None = None) -> dict[int, list[float]]:
        """Test accuracy after the last round by seed, at a rate or at the arm's chosen one."""
        runs = self._runs[stop.arm, stop.system]
        rate = (self.rate(stop.arm) if rate is None else rate) if stop.system == "jaxfed" else None
        found: dict[int, list[float]] = {}
        for run in runs:
            if rate is None or run["rate"] == rate:
                found.setdefault(run["seed"], []).append(run["test"][stop.rule][-1])
        return found

    def accuracy(self, stop: Stop, rate: float | None = None) -> dict[int, float]:
        """The mean of the repeats by seed."""
        return {s: float(np.mean(values)) for s, values in self.repeats(stop, rate).items()}

    def curve(self, stop: Stop) -> tuple[list[int], np.ndarray]:
        """Rounds, and test accuracy [runs, rounds]."""
        rate = self.rate(stop.arm)
        runs = [r for r in self._runs[stop.arm, stop.system] if r["rate"] == rate]
        return runs[0]["rounds"], np.array([run["test"][stop.rule] for run in runs])


def effect(numbers: Iterable[float]) -> Effect:
    """Mean and interval of independent numbers, one a seed."""
    values = np.array(list(numbers))
    spread = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    mean = float(values.mean())
    return Effect(mean, mean - float(spread), mean + float(spread), values.tolist())


def paired(*sides: dict[int, float]) -> list[dict[int, float]]:
    """The same numbers, of the seeds that all have."""
    seeds = sorted(set.intersection(*map(set, sides)))
    return [{seed: side[seed] for seed in seeds} for side in sides]


def difference(after: dict[int, float], before: dict[int, float]) -> Effect:
    """`after` minus `before`, over the seeds that both have."""
    after, before = paired(after, before)
    return effect(after[seed] - before[seed] for seed in after)


def within_seeds(after: dict[int, list[float]], before: dict[int, list[float]]) -> Effect:
    """`after` minus `before` for these very seeds, from repeats of each.

    The mean over seeds of the difference of means. Its interval comes from how repeats of one seed
    spread (one variance for all, pooled), not from how seeds do: it asks whether two systems that
    are given the same inputs give the same, not what other inputs would do.
    """
    seeds = sorted(after.keys() & before.keys())
    groups = [np.array(side[seed]) for seed in seeds for side in (after, before)]
    freedom = sum(len(group) - 1 for group in groups)
    variance = sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / freedom
    error = (variance * sum(1 / len(group) for group in groups)) ** 0.5 / len(seeds)
    by_seed = [float(np.mean(after[s]) - np.mean(before[s])) for s in seeds]
    mean, spread = (
        float(np.mean(by_seed)),
        float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error,
    )
    return Effect(mean, mean - spread, mean + spread, by_seed)


def same(found: Effect) -> bool:
    """Whether the whole interval is within `MARGIN` of zero."""
    return found.low > -MARGIN and found.high < MARGIN


def verdict(found: Effect) -> str:
    """What an article's claim that this should be above zero comes to.

    Not by the interval alone: of twenty intervals one misses zero by chance, and an effect within
    `MARGIN` explains nothing of the gap.
    """
    if found.low > 0 and found.mean > MARGIN:
        return "supported"
    return "opposite" if found.high < 0 and found.mean < -MARGIN else "not supported"
