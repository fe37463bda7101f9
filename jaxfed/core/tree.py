"""Arithmetic on trees of arrays, and the names of their leaves."""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

Tree = Any
"""A pytree of arrays: nested dicts, tuples, or any registered node."""


def add(a: Tree, b: Tree) -> Tree:
    """`a + b`, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def subtract(a: Tree, b: Tree) -> Tree:
    """`a - b`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(factor: Any, tree: Tree) -> Tree:
    """`factor * tree`."""
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def divide(tree: Tree, divisor: Array) -> Tree:
    """`tree / divisor` in each leaf's own dtype."""
    return jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), tree)


def zeros(tree: Tree) -> Tree:
    """Zeros in the shapes of `tree`."""
    return jax.tree.map(jnp.zeros_like, tree)


def where(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    """`new` if the condition holds, else `old`, in the dtypes of `old`.

    A module may store its statistics in another precision than it computes in.
    """
    return jax.tree.map(lambda n, o: jnp.where(condition, n.astype(o.dtype), o), new, old)


def norm(tree: Tree) -> Array:
    """Euclidean norm of all numbers in the tree."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))


def all_finite(tree: Tree) -> Bool[Array, ""]:
    """True if no number in the tree is infinite or NaN."""

    def each(tree: Tree) -> Bool[Array, ""]:
        leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
        return jnp.stack(leaves).all() if leaves else jnp.array(True)

    # A finite norm proves it at the price of one product; the norm of finite numbers may overflow.
    return jax.lax.cond(jnp.isfinite(norm(tree)), lambda _: jnp.array(True), each, tree)


def count_parameters(tree: Tree) -> int:
    """Number of scalars in a tree of arrays (or of their shapes)."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


# --- Leaves by name -------------------------------------------------------------------------


def name_of(path: tuple) -> str:
    """The name of a leaf, for example `params/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Tree) -> list[str]:
    """The names of all leaves.

    Example:
      >>> names({"out": {"bias": 0, "kernel": 1}})
      ['out/bias', 'out/kernel']
    """
    return [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def select(tree: Tree, chosen: frozenset[str]) -> dict[str, Array]:
    """The leaves whose names are in `chosen`, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): leaf for path, leaf in leaves if name_of(path) in chosen}


def replace(tree: Tree, leaves: dict[str, Array]) -> Tree:
    """`tree` with the given leaves in place of its own; the inverse of `select`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(name_of(path), leaf), tree
    )


def matching(*patterns: str) -> Callable[[Tree], frozenset[str]]:
    """Returns a function from a tree to the names of its leaves that match any pattern.

    Patterns are those of a shell: `*` matches any text, slashes included.

    Example:
      >>> sorted(matching("out/*")({"conv": {"kernel": 0}, "out": {"bias": 0, "kernel": 1}}))
      ['out/bias', 'out/kernel']
    """

    def chosen(tree: Tree) -> frozenset[str]:
        return frozenset(
            name for name in names(tree) if any(fnmatch.fnmatchcase(name, p) for p in patterns)
        )

    return chosen
