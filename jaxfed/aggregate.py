"""Many clients at once, and the sums that the server makes of them.

Everything a client contributes is a *sum* (weighted delta, weight, counts), so clients can be
computed one after another, all at once, or in chunks, and chunks added up, with memory for one
chunk only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from jaxfed.model import Tree


def sum_over_clients(
    contribute: Callable[[Any], tuple[Tree, Tree]], seats: Any, chunk: int | None
) -> tuple[Tree, Tree]:
    """Runs `contribute(seat) -> (summands, report)` for every seat of a cohort.

    Args:
      contribute: pure function of one seat. An empty seat has to contribute zeros.
      seats: pytree of arrays with a leading axis `[clients]`. In integer leaves -1 stands for
        an empty seat or a row of padding.
      chunk: clients computed at once: None for all (vmap), 1 for one after another, n for
        chunks of n; the cohort is filled up with empty seats to a multiple of n.

    Returns:
      The summands added over all clients, and the reports stacked on a leading axis.
    """
    count = jax.tree.leaves(seats)[0].shape[0]

    def of_chunk(seats: Any) -> tuple[Tree, Tree]:
        summands, reports = jax.vmap(contribute)(seats)
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), summands), reports

    if chunk is None or chunk >= count:
        return of_chunk(seats)
    chunk = max(chunk, 1)
    missing = -count % chunk
    # One at a time without a batch axis of size one: a smaller program.
    one_chunk = of_chunk if chunk > 1 else contribute
    grouped = seats
    if chunk > 1:
        grouped = jax.tree.map(lambda leaf: _grouped(leaf, missing, chunk), seats)
    shapes = jax.eval_shape(one_chunk, jax.tree.map(lambda leaf: leaf[0], grouped))[0]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: Tree, seats: Any) -> tuple[Tree, Tree]:
        summands, reports = one_chunk(seats)
        return jax.tree.map(jnp.add, total, summands), reports

    total, reports = jax.lax.scan(add, zeros, grouped)
    if chunk > 1:
        reports = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], reports)
    return total, reports


def _grouped(
    leaf: Shaped[Array, "clients ..."], missing: int, chunk: int
) -> Shaped[Array, "chunks chunk ..."]:
    fill = jnp.full((missing, *leaf.shape[1:]), -1, leaf.dtype)
    return jnp.concatenate([leaf, fill]).reshape(-1, chunk, *leaf.shape[1:])


def all_finite(tree: Tree) -> Bool[Array, ""]:
    """True if no number in the tree is infinite or NaN."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.array(True)


def norm(tree: Tree) -> Array:
    """Euclidean norm of all numbers in the tree."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))
