"""The server's half alone: jaxfed's mean and server step on updates that the reference sent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed import Cohort, Examples, Plan, Variables
from jaxfed import algorithm as algorithms
from jaxfed.client import ClientUpdate
from jaxfed.experiment import Experiment
from jaxfed.model import Tree
from jaxfed.optimizers import optimizer
from jaxfed.plan import PADDING
from parity_tests.case import Case

COMPILER = {"xla_backend_optimization_level": 0}
"""Compiled once and run a few times: the compiler's costly passes do not pay."""


def compiled(function: Callable) -> Callable:
    """`function`, quickly compiled."""
    return jax.jit(function, compiler_options=COMPILER)


def vector(tree: Tree) -> np.ndarray:
    """All numbers of a tree in one array: means and optimizers work on each number by itself."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def mean_of(case: Case, bad: np.ndarray) -> Callable[[np.ndarray], Tree]:
    """jaxfed's mean of updates [clients, numbers]; clients in `bad` send NaN, as they did."""
    experiment, plan = case.task.experiment, case.plans[0]
    step = _replay(optax.sgd(1.0), experiment)
    table = np.asarray(plan.rows)
    seats = np.arange(len(table), dtype=np.int32)[:, None, None]

    def compute(updates: np.ndarray) -> Tree:
        updates = np.where(bad[:, None], np.nan, updates)
        # From zero: 0 - 1.0 * mean.
        return -step(np.zeros_like(updates[0]), updates, np.where(table >= 0, seats, PADDING))

    return compute


def server_step(experiment: Experiment) -> Callable[[tuple], Tree]:
    """The first step of the server's optimizer, from `(weights, mean update)`."""
    step = _replay(
        optimizer(
            experiment.server.optimizer, experiment.server.lr, experiment.server.momentum or 0.0
        ),
        experiment,
    )

    def compute(given: tuple) -> Tree:
        params, mean = given
        return params - step(params, mean[None], np.zeros((1, 1, 1), np.int32))

    return compute


def _replay(server: optax.GradientTransformation, experiment: Experiment) -> Callable:
    """A round in which clients send given updates: `(weights, updates, rows) -> weights`."""
    algorithm = algorithms.averaging(
        _replayed, server, weighting=experiment.weighting, batch_stats="frozen"
    )

    def step(params: Any, updates: Any, rows: Any) -> Any:
        zero = np.zeros((), np.int32)
        plan = Plan(zero, zero, np.arange(len(rows), dtype=np.int32), rows)
        examples = Examples(updates, np.zeros(len(updates), np.int32))
        state = algorithm.init(Variables(params, {}))
        return algorithm.round(state, Cohort(examples, plan))[0].variables.params

    return compiled(step)


def _replayed(server: Variables, examples: Examples, rows: Any, key: Any) -> ClientUpdate:
    """A client that sends the update in the row that its plan names."""
    del server, key
    zero, count = jnp.zeros(()), (rows >= 0).sum().astype(float)
    delta = examples.images[jnp.maximum(rows.max(), 0)]
    return ClientUpdate(delta, {}, count, zero, zero)
