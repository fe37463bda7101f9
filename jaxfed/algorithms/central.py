"""Ordinary training on the pooled data: what federated algorithms are compared with."""

import jax
import jax.numpy as jnp

from jaxfed.algorithms.fedavg import CLIENT_STEPS
from jaxfed.config.experiment import ConfigError, Experiment
from jaxfed.config.spec import Spec
from jaxfed.core.federated import (
    ClientReport,
    Cohort,
    FedAlgorithm,
    Federation,
    Report,
    State,
    report_of,
)
from jaxfed.core.local import Optimizer, Work, at_round, examples_of, local_steps
from jaxfed.core.model import Variables
from jaxfed.core.problem import Problem
from jaxfed.core.tree import all_finite, norm, subtract, where
from jaxfed.optimizers import client_optimizer


def central(problem: Problem, optimizer: Optimizer) -> FedAlgorithm:
    """Ordinary training on the pooled data of a cohort.

    One sequence of steps through the single seat of the plan; the optimizer's state and
    BatchNorm's moving statistics go on from round to round, as in Keras' `fit`.
    """

    def init(variables: Variables) -> State:
        return State(variables, at_round(optimizer, jnp.ones((), int)).init(variables.params))

    def round_(state: State, cohort: Cohort) -> tuple[State, Report]:
        plan = cohort.plan
        key = jax.random.fold_in(jax.random.key(plan.seed), plan.round)
        rows, number = jnp.asarray(plan.rows)[0], jnp.asarray(plan.round)
        work = Work(cohort.examples, rows, key, jnp.zeros((), jnp.int32), number)
        trained = local_steps(
            problem.gradient, at_round(optimizer, number), state.variables, work, state.server
        )
        delta = subtract(state.variables.params, trained.variables.params)
        finite = all_finite((delta, trained.variables))
        # A diverged run stays where it was last finite, and says so.
        variables, opt_state = where(
            finite, (trained.variables, trained.optimizer), (state.variables, state.server)
        )
        num_examples = examples_of(rows, trained.metrics["loss"].count.dtype)
        dropped = ~finite & (num_examples > 0)
        report = ClientReport(trained.metrics, num_examples, norm(delta), dropped)
        report = jax.tree.map(lambda leaf: leaf[None], report)
        return State(variables, opt_state), report_of(report, norm(delta), finite)

    return FedAlgorithm(init, round_)


def _build(problem: Problem, experiment: Experiment, federation: Federation) -> FedAlgorithm:
    del federation
    if experiment.model.batch_stats == "local":
        raise ConfigError(
            "--model.batch_stats: got local with algorithm central, which has no clients; use mean"
        )
    optimizer = client_optimizer(experiment.client, experiment.rounds, experiment.model.frozen)
    return central(problem, optimizer)


CENTRAL = Spec(
    _build, (*CLIENT_STEPS, "model.batch_stats"), {"client.optimizer": "sgd", "client.epochs": 3},
    "ordinary training on the cohort's pooled data, for comparison", pooled=True,
)  # fmt: skip
