"""Federated averaging, and what differs from it in the client's steps only: FedProx, FedBN."""

from typing import Any

import optax

from jaxfed.aggregators.mean import mean
from jaxfed.config.experiment import Experiment
from jaxfed.config.spec import Spec
from jaxfed.core import batch_stats as bn
from jaxfed.core.federated import (
    Broadcast,
    Client,
    FedAlgorithm,
    Federation,
    Sent,
    federated,
    stateless,
)
from jaxfed.core.local import Optimizer, Work, at_round, local_steps, proximal
from jaxfed.core.personal import keeping
from jaxfed.core.problem import Problem
from jaxfed.core.tree import subtract
from jaxfed.optimizers import client_optimizer, server_optimizer

CLIENT_STEPS = (
    "client.optimizer", "client.lr", "client.schedule", "client.lr_decay", "client.weight_decay",
    "client.clip", "client.epochs",
)  # fmt: skip
SERVER_STEP = (
    "server.optimizer", "server.lr", "server.schedule", "server.lr_decay", "server.weight_decay",
    "server.warmup",
)  # fmt: skip
AVERAGED = ("server.aggregator", "weighting")
DEFAULTS = {
    "client.optimizer": "sgd", "client.epochs": 3, "server.optimizer": "sgd",
    "server.aggregator": "mean", "weighting": "examples",
}  # fmt: skip


def local_training(problem: Problem, optimizer: Optimizer) -> Client:
    """A client that trains for some steps and sends the difference.

    Its message is the server's weights minus its own, the direction a server optimizer descends.
    Source: ClientUpdate of McMahan et al. (2017), Algorithm 1, with any optax optimizer.
    """

    def update(sent: Broadcast, memory: None, work: Work) -> Sent:
        del memory
        local = at_round(optimizer, work.round)
        trained = local_steps(problem.gradient, local, sent.variables, work)
        delta = subtract(sent.variables.params, trained.variables.params)
        return Sent(delta, trained.variables.stats, trained.metrics)

    return stateless(update)


def fedavg(
    problem: Problem,
    client_optimizer: Optimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    federation: Federation | None = None,
) -> FedAlgorithm:
    r"""Federated averaging, generalized to any pair of optimizers.

    $$\Delta_k = w - \mathrm{ClientUpdate}(w), \qquad
      w \leftarrow w - \mathrm{opt}\Big(\frac{\sum_k n_k \Delta_k}{\sum_k n_k}\Big)$$

    Args:
      problem: what is learned.
      client_optimizer: fresh on every client in every round; `round -> optimizer` is a schedule by
        round, while a schedule inside an optax optimizer counts local steps and restarts.
      server_optimizer: default SGD at 1.0, which is plain averaging.
      federation: default: the mean weighted by examples.

    Source: McMahan et al. (2017), Algorithm 1; Reddi et al. (2021), Algorithm 1 (server
    optimizers).
    """
    client = local_training(problem, client_optimizer)
    return federated(client, server_optimizer or optax.sgd(1.0), federation or Federation(mean()))


def fedprox(
    problem: Problem,
    client_optimizer: Optimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    federation: Federation | None = None,
    *,
    mu: Any,
) -> FedAlgorithm:
    r"""FedAvg with a proximal term in the clients' objective, $\frac{\mu}{2} \|w - w_t\|^2$.

    Arguments as in `fedavg`. Source: Li et al. (2020), Federated Optimization in Heterogeneous
    Networks, equation 2.
    """
    local = _proximal(client_optimizer, mu)
    return fedavg(problem, local, server_optimizer, federation)


def fedbn(
    problem: Problem,
    client_optimizer: Optimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    federation: Federation | None = None,
) -> FedAlgorithm:
    """FedAvg in which every client keeps its own BatchNorm layers, scale and bias included.

    Arguments as in `fedavg`; `federation.num_clients` is needed. Source: Li et al. (2021), FedBN.
    """
    client = keeping(local_training(problem, client_optimizer), bn.layers)
    return federated(client, server_optimizer or optax.sgd(1.0), federation or Federation(mean()))


def _proximal(optimizer: Optimizer, mu: Any) -> Optimizer:
    if isinstance(optimizer, optax.GradientTransformation):
        return optax.chain(proximal(mu), optimizer)
    return lambda round_: optax.chain(proximal(mu), optimizer(round_))


def _build(problem: Problem, experiment: Experiment, federation: Federation) -> FedAlgorithm:
    rounds, frozen = experiment.rounds, experiment.model.frozen
    local = client_optimizer(experiment.client, rounds, frozen)
    server = server_optimizer(experiment.server, rounds, frozen)
    if experiment.client.mu is not None:
        local = _proximal(local, experiment.client.mu)
    if experiment.model.batch_stats == "local":
        return fedbn(problem, local, server, federation)
    return fedavg(problem, local, server, federation)


USES = (*CLIENT_STEPS, *SERVER_STEP, *AVERAGED)

FEDAVG = Spec(
    _build, (*USES, "model.batch_stats"), DEFAULTS,
    "federated averaging, with any server optimizer",
    "McMahan et al. 2017, Algorithm 1; Reddi et al. 2021",
)  # fmt: skip
FEDPROX = Spec(
    _build, (*USES, "client.mu", "model.batch_stats"), {**DEFAULTS, "client.mu": 0.01},
    "fedavg with a proximal term, --client.mu", "Li et al. 2020, equation 2",
)  # fmt: skip
FEDBN = Spec(
    _build, USES, {**DEFAULTS, "model.batch_stats": "local"},
    "fedavg in which clients keep their own BatchNorm layers", "Li et al. 2021",
)  # fmt: skip
