"""What becomes of BatchNorm's moving statistics, by name.

| policy | after a round, on the server | at evaluation |
|---|---|---|
| `frozen` | never change (TFF's rule: `non_trainable` variables stay as initialised) | used as they are: mean 0, variance 1 |
| `mean` | weighted mean of the clients' statistics | used |
| `pooled` | law of total variance over the clients' statistics | used |
| `local` | each client keeps its own BatchNorm layer, scale and bias included (FedBN, Li et al. 2021) | each client's own |
| `recalibrate` | not needed | exact moments of a pass over training data (Wu & Johnson 2021, "precise BN") |

Statistics are averaged, never optimised: an adaptive server optimizer would make variances
negative. A statistics tree is any nested dict whose BatchNorm layers hold `mean` and `var`, as
those of Flax NNX and Linen do.
"""  # noqa: E501

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxfed.core.clients import map_sum
from jaxfed.core.model import Variables
from jaxfed.core.problem import Examples, Problem
from jaxfed.core.tree import Tree, names


def to_moments(stats: Tree) -> Tree:
    """Replaces every variance by the second moment E[x^2], which may be averaged."""
    return _map_layers(stats, lambda mean, var: {"mean": mean, "var": var + mean**2})


def from_moments(moments: Tree) -> Tree:
    """Undoes `to_moments`: variance = E[x^2] - E[x]^2 (law of total variance), at least 0."""
    return _map_layers(
        moments, lambda mean, second: {"mean": mean, "var": jnp.maximum(second - mean**2, 0)}
    )


def _map_layers(stats: Tree, rule: Callable[[Array, Array], dict[str, Array]]) -> Tree:
    if not isinstance(stats, dict):
        return stats
    if set(stats) == {"mean", "var"}:
        return rule(stats["mean"], stats["var"])
    return {name: _map_layers(child, rule) for name, child in stats.items()}


def has_moments(stats: Tree) -> bool:
    """True if every leaf belongs to a layer that holds `mean` and `var`."""
    if not isinstance(stats, dict):
        return False
    return set(stats) == {"mean", "var"} or (
        bool(stats) and all(has_moments(child) for child in stats.values())
    )


class Statistics(NamedTuple):
    """A policy: what a client sends of its statistics, and what the server does with their mean."""

    send: Callable[[Tree], Tree]
    """`client's statistics -> tree`, averaged over clients with their weights."""
    receive: Callable[[Tree, Tree], Tree]
    """`(mean, server's statistics) -> server's statistics`."""
    summary: str
    """For the header of a run, its report and `--list`."""


def _never(summary: str) -> Statistics:
    return Statistics(lambda _: None, lambda _, old: old, summary)


FROZEN = _never("never averaged, evaluation uses the initial 0 and 1 (TFF's rule)")

POLICIES: dict[str, Statistics] = {
    "frozen": FROZEN,
    "mean": Statistics(
        lambda stats: stats, lambda mean, _: mean,
        "weighted mean of the clients' moving statistics",
    ),
    "pooled": Statistics(
        to_moments, lambda mean, _: from_moments(mean),
        "pooled over clients by the law of total variance",
    ),
    "local": _never("every client keeps its own BatchNorm layers (FedBN)"),
    "recalibrate": _never("exact moments of training data at every evaluation"),
}  # fmt: skip
"""The policies by name."""


def recalibrate(
    problem: Problem, variables: Variables, examples: Examples, index: Int[Array, "steps batch"],
    mesh: Mesh | None = None,
) -> Tree:  # fmt: skip
    """Exact BatchNorm statistics of the examples in `index` under the present weights.

    Each batch is normalized by its own moments, as in training; the moments of all batches are
    then combined by the law of total variance, each row counting once. Moving averages are not
    involved: a few updates at momentum 0.99 would still be mostly the initial 0 and 1.
    """
    zeros = jax.tree.map(jnp.zeros_like, variables.stats)
    ones = jax.tree.map(jnp.ones_like, variables.stats)
    count = (index >= 0).sum()

    def updated(params: Tree, stats: Tree, examples: Examples, rows: Array) -> Tree:
        return problem.metrics(Variables(params, stats), examples, rows, True, jax.random.key(0))[1]

    # A layer updates s <- m s + (1 - m) batch, and what it returns in training does not depend
    # on s. So s = 0 gives (1 - m) batch, and the difference to s = 1 gives m: exact moments of
    # a batch, from any module, without knowing its momentum.
    from_zeros = updated(variables.params, zeros, examples, index[0])
    from_ones = updated(variables.params, ones, examples, index[0])
    fresh = jax.tree.map(lambda one, zero: 1 - (one - zero), from_ones, from_zeros)

    def of_batch(shared: tuple, rows: Array) -> tuple[Tree, None]:
        params, zeros, fresh, examples, count = shared
        scaled = updated(params, zeros, examples, rows)
        moments = to_moments(jax.tree.map(jnp.divide, scaled, fresh))
        share = (rows >= 0).sum() / count
        return jax.tree.map(lambda m: jnp.where(share > 0, share * m, 0), moments), None

    shared = (variables.params, zeros, fresh, examples, count)
    return from_moments(map_sum(of_batch, shared, index, 1, mesh)[0])


def layers(variables: Variables) -> frozenset[str]:
    """Names of all statistics, and of the parameters of the layers that hold them (scale, bias).

    Example:
      >>> import numpy as np
      >>> layer = {"mean": np.zeros(2), "var": np.ones(2)}
      >>> params = {"norm": {"scale": np.ones(2)}, "out": {"bias": np.zeros(2)}}
      >>> sorted(layers(Variables(params, {"norm": layer})))
      ['params/norm/scale', 'stats/norm/mean', 'stats/norm/var']
    """
    stats = names(variables.stats)
    with_stats = {name.rpartition("/")[0] for name in stats}
    params = [name for name in names(variables.params) if name.rpartition("/")[0] in with_stats]
    return frozenset([f"params/{name}" for name in params] + [f"stats/{name}" for name in stats])
