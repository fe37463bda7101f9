"""How a number of jaxfed's is held against the reference's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.core.tree import Tree
from parity_tests.case import Case
from parity_tests.tolerances import CHAOS, NOISE_FACTOR, tolerance


class Rung(NamedTuple):
    """One comparison."""

    name: str
    error: float
    """Largest relative difference; NaN on one side alone is infinite."""
    tolerance: float
    noise: float | None = None
    """What rounding the weights once does to the result; measured only where it matters."""

    @property
    def chaotic(self) -> bool:
        """True if rounding alone decides the result: nothing can be compared here."""
        return self.noise is not None and NOISE_FACTOR * self.noise > CHAOS

    @property
    def holds(self) -> bool:
        """True if the two frameworks agree as far as the system lets one see."""
        return self.error <= self.tolerance or (self.chaotic and np.isfinite(self.error))


def difference(got: Any, expected: Any) -> float:
    """Largest difference of two trees, relative to what is large in them.

    A leaf counts relative to its own largest number, or to a hundredth of the tree's where it is
    smaller than that: such leaves are differences of large numbers (a bias in front of BatchNorm
    has a gradient of exactly zero and a computed one of rounding errors).
    """
    expected = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(expected)]
    got = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(got)]
    largest = max((float(np.nanmax(np.abs(leaf), initial=0)) for leaf in expected), default=0.0)
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
            return float("inf")
        scale = max(float(np.nanmax(np.abs(b), initial=0)), largest / 100)
        gap = float(np.nanmax(np.abs(a - b), initial=0))
        worst = max(worst, gap / scale if scale > 0 else (float("inf") if gap > 0 else 0.0))
    return worst


def judged(
    case: Case, name: str, compute: Callable[[Any], Tree], given: Any, expected: Tree
) -> Rung:
    """Compares `compute(given)`; where it is off, measures what rounding alone would do.

    The noise is the effect of changing every number in `given` by one unit in the last place. A
    system that multiplies that by a million cannot be compared more closely than a million units.
    """
    got = compute(given)
    error, allowed = difference(got, expected), tolerance(name, case.task.experiment)
    if error <= allowed or not np.isfinite(error):
        return Rung(name, error, allowed)
    noise = max(difference(compute(_rounded_otherwise(given, draw)), got) for draw in range(3))
    return Rung(name, error, max(allowed, NOISE_FACTOR * noise), noise)


def _rounded_otherwise(tree: Tree, draw: int) -> Tree:
    rng = np.random.default_rng(draw)

    def nudged(leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        sign = rng.choice([-1, 1], leaf.shape)
        return (leaf * (1 + sign * np.finfo(leaf.dtype).eps)).astype(leaf.dtype)

    return jax.tree.map(nudged, tree)
