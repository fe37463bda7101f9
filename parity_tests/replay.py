"""The server's half alone: jaxfed's mean and server step on updates that the reference sent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed import (
    Broadcast,
    Cohort,
    Examples,
    Experiment,
    Federation,
    Mean,
    Plan,
    Sent,
    Variables,
    Work,
    federated,
    mean,
    optimizer,
    stateless,
)
from jaxfed.core.tree import Tree
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
    config = experiment.server
    assert config.optimizer is not None
    assert config.lr is not None
    step = _replay(optimizer(config.optimizer, config.lr, config.momentum), experiment)

    def compute(given: tuple) -> Tree:
        params, mean = given
        return params - step(params, mean[None], np.zeros((1, 1, 1), np.int32))

    return compute


def _replay(server: optax.GradientTransformation, experiment: Experiment) -> Callable:
    """A round in which clients send given updates: `(weights, updates, rows) -> weights`."""
    federation = Federation(mean(), weighting=experiment.weighting or "examples")
    algorithm = federated(stateless(_replayed), server, federation)

    def step(params: Any, updates: Any, rows: Any) -> Any:
        zero = np.zeros((), np.int32)
        plan = Plan(zero, zero, np.arange(len(rows), dtype=np.int32), rows)
        examples = Examples(updates, np.zeros(len(updates), np.int32))
        state = algorithm.init(Variables(params, {}))
        return algorithm.round(state, Cohort(examples, plan))[0].variables.params

    return compiled(step)


def _replayed(sent: Broadcast, memory: None, work: Work) -> Sent:
    """A client that sends the update in the row that its plan names."""
    del sent, memory
    update = work.examples.inputs[jnp.maximum(work.rows.max(), 0)]
    count = (work.rows >= 0).sum().astype(float)
    return Sent(update, {}, {"loss": Mean(jnp.zeros(()), count)})
