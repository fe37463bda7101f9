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

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxfed.aggregate import map_sum
from jaxfed.client import Examples, take_batch
from jaxfed.model import Model, Tree, Variables

POLICIES = {
    "frozen": "never averaged, evaluation uses the initial 0 and 1 (TFF's rule)",
    "mean": "weighted mean of the clients' moving statistics",
    "pooled": "pooled over clients by the law of total variance",
    "local": "every client keeps its own BatchNorm layers (FedBN)",
    "recalibrate": "exact moments of training data at every evaluation",
}
"""What the header of a run, its report and `--list` say of each policy."""

KEPT_ON_SERVER = ("mean", "pooled")
"""The policies under which the server's statistics are made from the clients'."""


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


def recalibrate(
    model: Model, variables: Variables, examples: Examples, index: Int[Array, "steps batch"],
    dtype: DTypeLike, mesh: Mesh | None = None,
) -> Tree:  # fmt: skip
    """Exact BatchNorm statistics of the examples in `index` under the present weights.

    Each batch is normalised by its own moments, as in training; the moments of all batches are
    then combined by the law of total variance, each row counting once. Moving averages are not
    involved: a few updates at momentum 0.99 would still be mostly the initial 0 and 1.
    """
    zeros = jax.tree.map(jnp.zeros_like, variables.stats)
    ones = jax.tree.map(jnp.ones_like, variables.stats)
    count = (index >= 0).sum()

    def updated(params: Tree, stats: Tree, examples: Examples, rows: Array) -> tuple[Tree, Array]:
        images, _, mask = take_batch(examples, rows, dtype)
        _, new = model.apply(Variables(params, stats), images, mask, True, jax.random.key(0))
        return new, mask

    # A layer updates s <- m s + (1 - m) batch, and what it returns in training does not depend
    # on s. So s = 0 gives (1 - m) batch, and the difference to s = 1 gives m: exact moments of
    # a batch, from any module, without knowing its momentum.
    from_zeros, _ = updated(variables.params, zeros, examples, index[0])
    from_ones, _ = updated(variables.params, ones, examples, index[0])
    fresh = jax.tree.map(lambda one, zero: 1 - (one - zero), from_ones, from_zeros)

    def of_batch(shared: tuple, rows: Array) -> tuple[Tree, None]:
        params, zeros, fresh, examples, count = shared
        scaled, mask = updated(params, zeros, examples, rows)
        moments = to_moments(jax.tree.map(jnp.divide, scaled, fresh))
        share = mask.sum() / count
        return jax.tree.map(lambda m: jnp.where(share > 0, share * m, 0), moments), None

    shared = (variables.params, zeros, fresh, examples, count)
    return from_moments(map_sum(of_batch, shared, index, 1, mesh)[0])


def own_params(variables: Variables) -> frozenset[str]:
    """Paths of the parameters (scale, bias) of the layers that keep statistics."""
    layers = {path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(variables.stats)}
    return frozenset(
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(variables.params)
        if path[:-1] in layers
    )


def select(params: Tree, paths: frozenset[str]) -> dict[str, Array]:
    """The leaves at `paths`, by path."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if jax.tree_util.keystr(path) in paths
    }


def replace(params: Tree, leaves: dict[str, Array]) -> Tree:
    """`params` with the leaves of `select` put back."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), params
    )
