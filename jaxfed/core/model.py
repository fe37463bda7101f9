"""What the engine knows of a network: two pure functions and two trees of arrays.

`Model(init, apply)` is the only form in which a network reaches the federated algorithms.
Flax NNX and Linen modules become one by `from_nnx` and `from_linen`; anything else
(Equinox, Haiku, bare functions) is a `Model` as soon as it has an `init` and an `apply`.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxfed.core.tree import Tree


class Variables(NamedTuple):
    """The arrays of a network: what is optimised, and what is only averaged."""

    params: Tree
    """Trained by the clients' optimizer; the server's optimizer moves them."""
    stats: Tree
    """BatchNorm's moving statistics; no optimizer ever touches them. Empty without BatchNorm."""


class Model(NamedTuple):
    """A network as two pure functions.

    `init(key) -> Variables`

    `apply(variables, images, mask, train, key) -> (logits, stats)` with images `[batch, ...]`,
    mask `[batch]` of bool (False: a row of padding, which must not influence BatchNorm),
    `train` a Python bool, `key` for dropout; logits `[batch, classes]`, and the new statistics
    (the old ones when `train` is False).
    """

    init: Callable[[jax.Array], Variables]
    apply: Callable[[Variables, jax.Array, jax.Array, bool, jax.Array], tuple[jax.Array, Tree]]


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Wraps a Flax NNX module; `build(rngs)` makes it.

    A module with BatchNorm has to take `mask` (bool `[batch]`) in its `__call__` and hand it to
    its BatchNorm layers: the last batch of a client is padded, and padding must not count.

    Raises:
      TypeError: if the module holds BatchNorm statistics but its `__call__` takes no `mask`.

    Example:
      >>> import jax
      >>> model = from_nnx(lambda rngs: nnx.Linear(4, 2, rngs=rngs))
      >>> sorted(model.init(jax.random.key(0)).params)
      ['bias', 'kernel']
    """
    kinds = (nnx.Param, nnx.BatchStat, nnx.RngState, ...)
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, abstract_params, abstract_stats, streams, other = nnx.split(abstract, *kinds)
    name = type(abstract).__name__
    takes_mask = "mask" in inspect.signature(type(abstract).__call__).parameters
    if jax.tree.leaves(abstract_stats) and not takes_mask:
        raise TypeError(
            f"{name} has BatchNorm statistics, but its __call__ takes no mask; "
            "add mask=None and pass it on to the BatchNorm layers"
        )
    if jax.tree.leaves(other):
        raise TypeError(
            f"{name} holds variables that are neither nnx.Param nor nnx.BatchStat: "
            f"{nnx.to_pure_dict(other)}; federated averaging has no rule for them, "
            "so make them one of the two or plain attributes"
        )

    def init(key: jax.Array) -> Variables:
        _, params, stats, _, _ = nnx.split(build(nnx.Rngs(key)), *kinds)
        return Variables(nnx.to_pure_dict(params), nnx.to_pure_dict(stats))

    def filled(abstract: nnx.State, values: Tree) -> nnx.State:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, values)
        return state

    def apply(
        variables: Variables, images: jax.Array, mask: jax.Array, train: bool, key: jax.Array
    ) -> tuple[jax.Array, Tree]:
        # The streams of dropout are made anew from the key: a network carries no hidden state
        # from one step to the next.
        leaves, treedef = jax.tree.flatten(nnx.to_pure_dict(streams))
        fresh = [
            jax.random.fold_in(key, i)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        module = nnx.merge(
            graph,
            filled(abstract_params, variables.params),
            filled(abstract_stats, variables.stats),
            filled(streams, jax.tree.unflatten(treedef, fresh)),
        )
        module.train() if train else module.eval()
        logits = module(images, mask=mask) if takes_mask else module(images)
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return Model(init, apply)


def from_linen(module: linen.Module, example_shape: tuple[int, ...]) -> Model:
    """Wraps a Flax Linen module whose `__call__` takes `(x, train=...)`, or `(x)` alone.

    A module with BatchNorm also has to take `mask`, as in `from_nnx`. `example_shape` is the
    shape of one image, without the batch axis.

    Raises:
      TypeError: if the module holds collections other than `params` and `batch_stats`, or
        statistics without a `mask` argument.

    Example:
      >>> import jax
      >>> from flax import linen
      >>> model = from_linen(linen.Dense(2), (4,))
      >>> sorted(model.init(jax.random.key(0)).params)
      ['bias', 'kernel']
    """
    arguments = inspect.signature(type(module).__call__).parameters

    def call(
        variables: Tree, images: jax.Array, mask: Any, train: bool, key: Any, mutable: Any
    ) -> Any:
        optional = {"train": train, "mask": mask}
        given = {name: value for name, value in optional.items() if name in arguments}
        rngs = {"dropout": key} if train else {}
        return module.apply(variables, images, rngs=rngs, mutable=mutable, **given)

    def init(key: jax.Array) -> Variables:
        batch = jnp.zeros((1, *example_shape))
        given: dict[str, Any] = {"train": False} if "train" in arguments else {}
        collections = module.init({"params": key}, batch, **given)
        if extra := set(collections) - {"params", "batch_stats"}:
            raise TypeError(
                f"{type(module).__name__} keeps the collections {sorted(extra)}; federated "
                "averaging has rules for params and batch_stats only"
            )
        stats = collections.get("batch_stats", {})
        if stats and "mask" not in arguments:
            raise TypeError(
                f"{type(module).__name__} has batch_stats, but its __call__ takes no mask; "
                "add mask=None and pass it on to the BatchNorm layers"
            )
        return Variables(collections.get("params", {}), stats)

    def apply(
        variables: Variables, images: jax.Array, mask: jax.Array, train: bool, key: jax.Array
    ) -> tuple[jax.Array, Tree]:
        collections = {"params": variables.params}
        if jax.tree.leaves(variables.stats):
            collections["batch_stats"] = variables.stats
        if not train:
            return call(collections, images, mask, False, key, False), variables.stats
        logits, updated = call(collections, images, mask, True, key, ["batch_stats"])
        return logits, updated.get("batch_stats", variables.stats)

    return Model(init, apply)
