"""Metrics of networks on examples, in inference mode."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxfed.core.batch_stats import recalibrate
from jaxfed.core.clients import map_sum
from jaxfed.core.federated import State
from jaxfed.core.model import Variables
from jaxfed.core.problem import Examples, Metrics, Problem
from jaxfed.plan import PADDING

RECALIBRATION_EXAMPLES = 10_000
"""Training examples that `recalibrate` passes over; all, where there are fewer."""

Personal = Callable[[State, Int[Array, ""]], Variables]
"""`FedAlgorithm.personal`."""


def batches(rows: Int[np.ndarray, " examples"], batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """Cuts rows into batches, the last filled up with -1."""
    steps = -(-len(rows) // batch_size)
    table = np.full(steps * batch_size, PADDING, np.int32)
    table[: len(rows)] = rows
    return table.reshape(steps, batch_size)


def score(
    problem: Problem, variables: Variables, examples: Examples, index: Int[Array, "steps batch"],
    *, mesh: Mesh | None = None,
) -> Metrics:  # fmt: skip
    """Metrics of one network, in inference mode, on the examples in `index`.

    The devices of `mesh` share the batches. `score(...)["loss"].value()` is the mean loss.
    """

    def of_batch(shared: tuple[Variables, Examples], rows: Array) -> tuple[Metrics, None]:
        variables, examples = shared
        return problem.metrics(variables, examples, rows, False, jax.random.key(0))[0], None

    return map_sum(of_batch, (variables, examples), index, 1, mesh)[0]


def evaluator(
    problem: Problem, policy: str, personal: Personal | None = None, *, mesh: Mesh | None = None
) -> Callable[[State, Examples, Array, Examples, Array], tuple[Metrics, Variables]]:
    """Makes `(state, test, test index, train, recalibration index) -> (metrics, variables)`.

    The variables that come back are those that were scored: with the policy `recalibrate` they hold
    the re-estimated statistics. If clients have networks of their own (`personal`), every client
    that has ever trained scores its own on an equal share of the test set, dealt out in turn, so
    that the result is the mean over clients of the personalized metrics.
    """

    def evaluate(
        state: State, test: Examples, test_index: Array, train: Examples, train_index: Array
    ) -> tuple[Metrics, Variables]:
        variables = state.variables
        if personal is not None:
            return _score_own(personal, state, test, test_index), variables
        if policy == "recalibrate" and jax.tree.leaves(variables.stats):
            stats = recalibrate(problem, variables, train, train_index, mesh)
            variables = Variables(variables.params, stats)
        return score(problem, variables, test, test_index, mesh=mesh), variables

    def _score_own(personal: Personal, state: State, test: Examples, test_index: Array) -> Metrics:
        assert state.seen is not None
        clients = state.seen.shape[0]
        rows = test_index.reshape(-1)
        rows = jnp.concatenate([rows, jnp.full(-rows.shape[0] % clients, PADDING, rows.dtype)])
        shares = rows.reshape(-1, clients).T  # [clients, share], dealt out in turn

        def one(inputs: tuple) -> Metrics:
            id_, seen, rows = inputs
            rows = jnp.where(seen, rows, PADDING)[None]
            return score(problem, personal(state, id_), test, rows)

        metrics = jax.lax.map(one, (jnp.arange(clients), state.seen, shares))
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), metrics)

    return evaluate


def row_scorer(
    problem: Problem, personal: Personal | None = None, *, mesh: Mesh | None = None
) -> Callable[[State, Variables, Examples, Array, Array], Metrics]:
    """Makes `(state, variables, examples, index, owner) -> metrics [steps, batch]` of single rows.

    `variables` are those that the evaluation gave back, `owner` is the client of each batch, which
    counts only where clients have networks of their own. A row of padding counts 0.
    """

    def of_batch(shared: tuple, seat: tuple) -> tuple[dict, Metrics]:
        variables, state, examples = shared
        rows, owner = seat
        if personal is not None:
            variables = personal(state, owner)

        def of_row(row: Array) -> Metrics:
            return problem.metrics(variables, examples, row[None], False, jax.random.key(0))[0]

        return {}, jax.vmap(of_row)(rows)

    def score_rows(
        state: State, variables: Variables, examples: Examples, index: Array, owner: Array
    ) -> Metrics:
        return map_sum(of_batch, (variables, state, examples), (index, owner), 1, mesh)[1]

    return score_rows
