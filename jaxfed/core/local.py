"""What one client does in one round. Every function here is for a single client.

`jaxfed.core.federated.collect` runs it for all clients of a cohort.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from jaxfed.core.model import Variables
from jaxfed.core.problem import Examples, Gradient, Metrics
from jaxfed.core.tree import Tree, add, scale, subtract, where, zeros

OptimizerOfRound = Callable[[Array], optax.GradientTransformation]
"""`round -> optimizer`, the round counted from 1 and possibly traced: a schedule by round."""

Optimizer = optax.GradientTransformation | OptimizerOfRound


class Work(NamedTuple):
    """What one client is given in one round."""

    examples: Examples
    rows: Int[Array, "steps batch"]
    """Rows of `examples` visited at each step; -1 is padding."""
    key: PRNGKeyArray
    id: Int[Array, ""]
    round: Int[Array, ""]


class Trained(NamedTuple):
    """The result of local training."""

    variables: Variables
    metrics: Metrics
    """Over visited examples, each just before the step that used it."""
    optimizer: Any
    """Its state after the last step."""


def at_round(optimizer: Optimizer, round_: Array) -> optax.GradientTransformation:
    """The optimizer of a round: `optimizer(round)` for a schedule by round, else `optimizer`."""
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    return optimizer(round_)


def steps_of(rows: Int[Array, "*clients steps batch"]) -> Int[Array, "*clients"]:
    """Number of steps up to the last one with a real row; those after it are padding."""
    real = (rows >= 0).any(axis=-1)
    return jnp.max(jnp.where(real, jnp.arange(1, rows.shape[-2] + 1), 0), axis=-1)


def examples_of(rows: Int[Array, "*clients steps batch"], dtype: Any) -> Array:
    """Number of examples visited, counted over all local epochs."""
    return (rows >= 0).sum(axis=(-2, -1)).astype(dtype)


def no_metrics(gradient: Gradient, variables: Variables, work: Work) -> Metrics:
    """Zeros, in the precision in which steps report."""
    shapes = jax.eval_shape(gradient, variables, work.examples, work.rows[0], work.key)[2]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def local_steps(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    start: Variables,
    work: Work,
    state: optax.OptState | None = None,
) -> Trained:
    r"""Mini-batch training along the rows of the plan.

    $$w \leftarrow w - \mathrm{opt}(\nabla \ell(w; b))$$

    A step whose rows are all padding changes nothing: neither weights, nor statistics, nor the
    optimizer's state. Those at the end of the table are not computed.

    Args:
      gradient: `Problem.gradient`, or a correction of it.
      optimizer: any optax optimizer. A schedule inside it counts local steps.
      start: weights and statistics before the first step.
      work: the client's rows; the key of step n is `fold_in(work.key, n)`.
      state: of the optimizer; None starts afresh, as TFF's clients do every round.

    Source: ClientUpdate of McMahan et al. (2017), Algorithm 1.
    """

    def step(number: Array, carry: tuple) -> tuple:
        (variables, state), total = carry
        rows = work.rows[number]
        grad, stats, metrics = gradient(
            variables, work.examples, rows, jax.random.fold_in(work.key, number)
        )
        updates, new_state = optimizer.update(grad, state, variables.params)
        params = optax.apply_updates(variables.params, updates)
        new, old = (Variables(params, stats), new_state), (variables, state)
        return where(rows.max() >= 0, new, old), add(total, metrics)

    if state is None:
        state = optimizer.init(start.params)
    carry: Any = ((start, state), no_metrics(gradient, start, work))
    (variables, state), metrics = jax.lax.fori_loop(0, steps_of(work.rows), step, carry)
    return Trained(variables, metrics, state)


def full_gradient(
    gradient: Gradient, variables: Variables, work: Work
) -> tuple[Tree, Tree, Metrics]:
    """The gradient of the mean loss over all of a client's examples, at fixed weights.

    Batches only bound the memory: their gradients are averaged by the number of examples (or
    tokens) that count in them. Returns the gradient, the statistics after all batches, and the
    metrics.
    """

    def step(number: Array, carry: tuple) -> tuple:
        total, stats, metrics = carry
        rows = work.rows[number]
        grad, new_stats, found = gradient(
            Variables(variables.params, stats), work.examples, rows,
            jax.random.fold_in(work.key, number),
        )  # fmt: skip
        total = add(total, scale(found["loss"].count, grad))
        return total, where(rows.max() >= 0, new_stats, stats), add(metrics, found)

    carry = (zeros(variables.params), variables.stats, no_metrics(gradient, variables, work))
    total, stats, metrics = jax.lax.fori_loop(0, steps_of(work.rows), step, carry)
    count = jnp.maximum(metrics["loss"].count, 1)
    return jax.tree.map(lambda leaf: leaf / count, total), stats, metrics


def proximal(mu: Any) -> optax.GradientTransformation:
    r"""Adds $\mu (w - w_\mathrm{start})$ to the gradient; chain it in front of an optimizer.

    Source: Li et al. (2020), Federated Optimization in Heterogeneous Networks, equation 2.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.chain(proximal(0.5), optax.sgd(1.0))
      >>> state = tx.init(jnp.array([1.0]))
      >>> tx.update(jnp.array([2.0]), state, jnp.array([5.0]))[0].tolist()
      [-4.0]
    """

    def update(grad: Tree, start: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        return add(grad, scale(mu, subtract(params, start))), start

    return optax.GradientTransformation(
        lambda params: params,
        update,  # pyright: ignore[reportArgumentType]
    )


def plus(constant: Tree) -> optax.GradientTransformation:
    """Adds a constant tree to every gradient; chain it in front of an optimizer.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = plus(jnp.array([1.0]))
      >>> tx.update(jnp.array([2.0]), tx.init(jnp.array([0.0])))[0].tolist()
      [3.0]
    """
    return optax.stateless(lambda grad, _: add(grad, constant))
