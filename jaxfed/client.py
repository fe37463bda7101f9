"""What one client does in one round: local steps from the server's weights.

Every function here is for a single client; `jaxfed.aggregate` runs it for many.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray, Shaped

from jaxfed.model import Model, Tree, Variables


class Examples(NamedTuple):
    """Labelled images that stay on the device; plans refer to them by row."""

    images: Shaped[Array | np.ndarray, "examples ..."]
    """uint8 (0 to 255, scaled to [0, 1] when a batch is taken) or floating point (as it is)."""
    labels: Integer[Array | np.ndarray, " examples"]


class ClientUpdate(NamedTuple):
    """What a client sends to the server, and what it reports."""

    delta: Tree
    """Server weights minus trained weights: the direction a server optimizer descends."""
    stats: Tree
    """The client's BatchNorm statistics after its last step."""
    num_examples: Float[Array, ""]
    """Examples visited, counted over all local epochs."""
    loss_sum: Float[Array, ""]
    """Sum over visited examples of the loss just before the step that used them."""
    correct: Float[Array, ""]
    """Number of visited examples classified rightly, likewise."""


LossFn = Callable[[Array, Array], Array]
"""`(logits [batch, classes], labels [batch]) -> losses [batch]`."""

ClientUpdateFn = Callable[[Variables, Examples, Array, PRNGKeyArray], ClientUpdate]
"""`(server variables, examples, index [steps, batch], key) -> update`."""


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Integer[Array, " batch"]
) -> Float[Array, " batch"]:
    """Softmax cross-entropy with integer labels, at least in float32."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def take_batch(
    examples: Examples, rows: Int[Array, " batch"], dtype: DTypeLike
) -> tuple[Float[Array, "batch ..."], Integer[Array, " batch"], Bool[Array, " batch"]]:
    """Gathers rows; -1 gives a row of padding, False in the mask that is returned last."""
    mask = rows >= 0
    rows = jnp.maximum(rows, 0)
    images = jnp.asarray(examples.images)[rows]
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(dtype) / 255
    else:  # padding shows row 0, and what another client holds there may be NaN
        images = jnp.where(mask.reshape(-1, *(1,) * (images.ndim - 1)), images, 0)
    return images.astype(dtype), jnp.asarray(examples.labels)[rows], mask


class BatchReport(NamedTuple):
    """Sums over the real rows of one batch."""

    num_examples: Float[Array, ""]
    loss_sum: Float[Array, ""]
    correct: Float[Array, ""]


def report_batch(
    loss: LossFn, logits: Float[Array, "batch classes"], labels: Array, mask: Bool[Array, " batch"]
) -> BatchReport:
    """Counts, loss and right answers of the rows that are not padding."""
    losses = jnp.where(mask, loss(logits, labels), 0)
    right = mask & (jnp.argmax(logits, axis=-1) == labels)
    return BatchReport(mask.sum(dtype=losses.dtype), losses.sum(), right.sum(dtype=losses.dtype))


def _masked_grad(model: Model, loss: LossFn, dtype: DTypeLike) -> Callable:
    """`(variables, examples, rows, key) -> (gradient of the mean loss, stats, report)`."""

    def objective(
        params: Tree, stats: Tree, examples: Examples, rows: Array, key: PRNGKeyArray
    ) -> tuple[Array, tuple[Tree, BatchReport]]:
        images, labels, mask = take_batch(examples, rows, dtype)
        logits, stats = model.apply(Variables(params, stats), images, mask, True, key)
        report = report_batch(loss, logits, labels, mask)
        # TFF: the mean runs over the rows that are there, also in a smaller last batch.
        return report.loss_sum / jnp.maximum(report.num_examples, 1), (stats, report)

    def masked_grad(
        variables: Variables, examples: Examples, rows: Array, key: PRNGKeyArray
    ) -> tuple[Tree, Tree, BatchReport]:
        grad = jax.grad(objective, has_aux=True)
        gradient, (stats, report) = grad(variables.params, variables.stats, examples, rows, key)
        return gradient, stats, report

    return masked_grad


def steps_of(index: Int[Array, "*clients steps batch"]) -> Int[Array, "*clients"]:
    """How many steps it takes to come to the end of a table: what follows is padding."""
    real = (index >= 0).any(axis=-1)
    return jnp.max(jnp.where(real, jnp.arange(1, index.shape[-2] + 1), 0), axis=-1)


def _no_report(
    masked_grad: Callable, variables: Variables, examples: Examples, index: Array, key: Array
) -> BatchReport:
    """Zeros, in the precision in which steps report."""
    report = jax.eval_shape(masked_grad, variables, examples, index[0], key)[2]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), report)


def _where(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    # The old dtype stands: a module may keep its statistics in another precision than it computes.
    return jax.tree.map(lambda n, o: jnp.where(condition, n.astype(o.dtype), o), new, old)


def make_trainer(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossFn = cross_entropy,
    prox_mu: float | Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Callable[..., tuple[Variables, optax.OptState, BatchReport]]:
    r"""Mini-batch training along a table of rows: `(start, opt_state, examples, index, key)`.

    $$w \leftarrow w - \mathrm{opt}\big(\nabla \ell(w; b) + \mu (w - w_\mathrm{start})\big)$$

    A step whose rows are all padding changes nothing: neither weights, nor statistics, nor the
    optimizer's state. Those at the end of the table are not computed.
    """
    masked_grad = _masked_grad(model, loss, dtype)

    def train(
        start: Variables, opt_state: optax.OptState, examples: Examples,
        index: Int[Array, "steps batch"], key: PRNGKeyArray,
    ) -> tuple[Variables, optax.OptState, BatchReport]:  # fmt: skip
        def step(number: Array, carry: tuple) -> tuple:
            (variables, opt_state), total = carry
            rows = index[number]
            gradient, stats, report = masked_grad(
                variables, examples, rows, jax.random.fold_in(key, number)
            )
            if prox_mu is not None:  # FedProx: Li et al. (2020), equation 2
                gradient = jax.tree.map(
                    lambda g, w, w0: g + prox_mu * (w - w0),
                    gradient, variables.params, start.params,
                )  # fmt: skip
            updates, new_state = optimizer.update(gradient, opt_state, variables.params)
            params = optax.apply_updates(variables.params, updates)
            new = (Variables(params, stats), new_state)
            old = (variables, opt_state)
            return _where(rows.max() >= 0, new, old), jax.tree.map(jnp.add, total, report)

        none = _no_report(masked_grad, start, examples, index, key)
        (variables, opt_state), total = jax.lax.fori_loop(
            0, steps_of(index), step, ((start, opt_state), none)
        )
        return variables, opt_state, total

    return train


def local_training(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossFn = cross_entropy,
    prox_mu: float | Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> ClientUpdateFn:
    """ClientUpdate of McMahan et al. (2017), Algorithm 1, with any optax optimizer.

    TFF: the optimizer's state starts afresh every round.
    """
    train = make_trainer(model, optimizer, loss=loss, prox_mu=prox_mu, dtype=dtype)

    def update(
        server: Variables, examples: Examples, index: Int[Array, "steps batch"], key: PRNGKeyArray
    ) -> ClientUpdate:
        trained, _, report = train(server, optimizer.init(server.params), examples, index, key)
        delta = jax.tree.map(jnp.subtract, server.params, trained.params)
        return ClientUpdate(delta, trained.stats, *report)

    return update


def full_gradient(
    model: Model,
    *,
    loss: LossFn = cross_entropy,
    dtype: DTypeLike = jnp.float32,
) -> ClientUpdateFn:
    """The client of FedSGD: one gradient of the mean loss over all its examples.

    Batches only bound the memory: their gradients are averaged by their number of examples.
    The gradient is what `delta` holds, so that the server's optimizer takes the step.
    """
    masked_grad = _masked_grad(model, loss, dtype)

    def update(
        server: Variables, examples: Examples, index: Int[Array, "steps batch"], key: PRNGKeyArray
    ) -> ClientUpdate:
        def step(number: Array, carry: tuple) -> tuple:
            total, stats, reports = carry
            rows = index[number]
            gradient, new_stats, report = masked_grad(
                Variables(server.params, stats), examples, rows, jax.random.fold_in(key, number)
            )
            total = jax.tree.map(lambda t, g: t + report.num_examples * g, total, gradient)
            stats = _where(rows.max() >= 0, new_stats, stats)
            return total, stats, jax.tree.map(jnp.add, reports, report)

        zeros = jax.tree.map(jnp.zeros_like, server.params)
        none = _no_report(masked_grad, server, examples, index, key)
        total, stats, report = jax.lax.fori_loop(
            0, steps_of(index), step, (zeros, server.stats, none)
        )
        count = jnp.maximum(report.num_examples, 1)
        return ClientUpdate(jax.tree.map(lambda t: t / count, total), stats, *report)

    return update
