"""How good the server's network is: loss and accuracy on held-out examples."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxfed import batch_stats as bn
from jaxfed.aggregate import map_sum
from jaxfed.algorithm import State
from jaxfed.client import BatchReport, Examples, LossFn, cross_entropy, report_batch, take_batch
from jaxfed.experiment import BatchStats
from jaxfed.model import Model, Variables
from jaxfed.plan import PADDING

RECALIBRATION_EXAMPLES = 10_000
"""Training images that `recalibrate` passes over; all, where there are fewer."""


class Scores(NamedTuple):
    """Means over the test set."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]


def batches(rows: Int[np.ndarray, " examples"], batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """Cuts rows into batches, the last filled up with -1."""
    steps = -(-len(rows) // batch_size)
    table = np.full(steps * batch_size, PADDING, np.int32)
    table[: len(rows)] = rows
    return table.reshape(steps, batch_size)


def score(
    model: Model, variables: Variables, examples: Examples, index: Int[Array, "steps batch"],
    *, loss: LossFn = cross_entropy, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None,
) -> Scores:  # fmt: skip
    """Loss and accuracy of one network, in inference mode, on the examples in `index`.

    The devices of `mesh` share the batches.
    """
    return _means(_score_sums(model, variables, examples, index, loss, dtype, mesh))


def _score_sums(
    model: Model,
    variables: Variables,
    examples: Examples,
    index: Array,
    loss: LossFn,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> BatchReport:
    def of_batch(shared: tuple[Variables, Examples], rows: Array) -> tuple[BatchReport, None]:
        variables, examples = shared
        images, labels, mask = take_batch(examples, rows, dtype)
        logits, _ = model.apply(variables, images, mask, False, jax.random.key(0))
        return report_batch(loss, logits, labels, mask), None

    return map_sum(of_batch, (variables, examples), index, 1, mesh)[0]


def _means(total: BatchReport) -> Scores:
    return Scores(total.loss_sum / total.num_examples, total.correct / total.num_examples)


def evaluator(
    model: Model,
    batch_stats: BatchStats,
    *,
    loss: LossFn = cross_entropy,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> Callable[[State, Examples, Array, Examples, Array], tuple[Scores, Variables]]:
    """Makes `(state, test, test index, train, recalibration index) -> (scores, variables)`.

    The variables that come back are those that were scored: with `recalibrate` they hold the
    re-estimated statistics. With `local`, every client that has ever trained scores its own
    network on its own equal share of the test set, dealt out in turn, so that the result is the
    mean over clients of the personalised accuracy.
    """

    def evaluate(
        state: State, test: Examples, test_index: Array, train: Examples, train_index: Array
    ) -> tuple[Scores, Variables]:
        variables = state.variables
        if batch_stats == "local":
            return _score_own(state, test, test_index), variables
        if batch_stats == "recalibrate" and jax.tree.leaves(variables.stats):
            stats = bn.recalibrate(model, variables, train, train_index, dtype, mesh)
            variables = Variables(variables.params, stats)
        scores = score(model, variables, test, test_index, loss=loss, dtype=dtype, mesh=mesh)
        return scores, variables

    def _score_own(state: State, test: Examples, test_index: Array) -> Scores:
        clients = state.own.seen.shape[0]
        rows = test_index.reshape(-1)
        rows = jnp.concatenate([rows, jnp.full(-rows.shape[0] % clients, PADDING, rows.dtype)])
        shares = rows.reshape(-1, clients).T  # [clients, share], dealt out in turn

        def one(inputs: tuple) -> BatchReport:
            own, rows = inputs
            params = bn.replace(state.variables.params, own.params)
            rows = jnp.where(own.seen, rows, PADDING)[None]
            return _score_sums(model, Variables(params, own.stats), test, rows, loss, dtype)

        reports = jax.lax.map(one, (state.own, shares))
        return _means(jax.tree.map(lambda leaf: leaf.sum(axis=0), reports))

    return evaluate


class RowScores(NamedTuple):
    """What the network makes of every single example; nothing in it means anything at padding."""

    loss: Float[Array, "steps batch"]
    right: Bool[Array, "steps batch"]


def row_scorer(
    model: Model,
    batch_stats: BatchStats,
    *,
    loss: LossFn = cross_entropy,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> Callable[[State, Variables, Examples, Array, Array], RowScores]:
    """Makes `(state, variables, examples, index, owner) -> scores of every row`.

    `variables` are those that the evaluation gave back, `owner` is the client of each batch. Only
    `local` looks at it: there every client's rows are scored by its own network.
    """

    def of_batch(shared: tuple, seat: tuple) -> tuple[dict, RowScores]:
        variables, own, examples = shared
        rows, owner = seat
        if batch_stats == "local":
            mine = jax.tree.map(lambda leaf: leaf[owner], own)
            variables = Variables(bn.replace(variables.params, mine.params), mine.stats)
        images, labels, mask = take_batch(examples, rows, dtype)
        logits, _ = model.apply(variables, images, mask, False, jax.random.key(0))
        return {}, RowScores(loss(logits, labels), jnp.argmax(logits, axis=-1) == labels)

    def score_rows(
        state: State, variables: Variables, examples: Examples, index: Array, owner: Array
    ) -> RowScores:
        return map_sum(of_batch, (variables, state.own, examples), (index, owner), 1, mesh)[1]

    return score_rows
