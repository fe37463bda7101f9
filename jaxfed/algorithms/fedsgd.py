"""FedSGD: one gradient per client and round."""

import optax

from jaxfed.aggregators.mean import mean
from jaxfed.algorithms.fedavg import AVERAGED, SERVER_STEP
from jaxfed.config.experiment import ConfigError, Experiment
from jaxfed.config.spec import Spec
from jaxfed.core.federated import (
    Broadcast,
    Client,
    FedAlgorithm,
    Federation,
    Sent,
    federated,
    stateless,
)
from jaxfed.core.local import Work, full_gradient
from jaxfed.core.problem import Problem
from jaxfed.optimizers import server_optimizer


def one_gradient(problem: Problem) -> Client:
    """A client that sends the gradient of its mean loss over all its examples."""

    def update(sent: Broadcast, memory: None, work: Work) -> Sent:
        del memory
        gradient, stats, metrics = full_gradient(problem.gradient, sent.variables, work)
        return Sent(gradient, stats, metrics)

    return stateless(update)


def fedsgd(
    problem: Problem,
    server_optimizer: optax.GradientTransformation,
    federation: Federation | None = None,
) -> FedAlgorithm:
    r"""FedSGD: every client sends one gradient, and the server takes the step.

    $$w \leftarrow w - \mathrm{opt}\Big(\frac{\sum_k n_k \nabla F_k(w)}{\sum_k n_k}\Big)$$

    Batches only bound the memory of a gradient. Arguments as in `fedavg`. Source: McMahan et al.
    (2017), section 2.
    """
    return federated(one_gradient(problem), server_optimizer, federation or Federation(mean()))


def _build(problem: Problem, experiment: Experiment, federation: Federation) -> FedAlgorithm:
    if experiment.model.batch_stats == "local":
        raise ConfigError(
            "--model.batch_stats: got local with algorithm fedsgd, whose clients take no step of "
            "their own; use recalibrate, or --algorithm fedbn"
        )
    server = server_optimizer(experiment.server, experiment.rounds, experiment.model.frozen)
    return fedsgd(problem, server, federation)


FEDSGD = Spec(
    _build, (*SERVER_STEP, *AVERAGED, "model.batch_stats"),
    {"client.epochs": 1, "server.optimizer": "sgd", "server.aggregator": "mean",
     "weighting": "examples"},
    "one gradient per client and round", "McMahan et al. 2017, section 2",
)  # fmt: skip
