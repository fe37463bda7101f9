"""Federated learning in pure JAX: many clients in parallel on one device.

The whole of it is `run(Experiment(...))`; every piece is usable alone.
"""

from jaxfed.aggregators import AGGREGATORS, mean
from jaxfed.algorithms import ALGORITHMS, central, fedavg, fedbn, fedprox, fedsgd, local_training
from jaxfed.config import (
    ClientConfig,
    ConfigError,
    DataConfig,
    Experiment,
    ModelConfig,
    ServerConfig,
    Spec,
    from_json,
    to_json,
)
from jaxfed.core.batch_stats import POLICIES, Statistics
from jaxfed.core.clients import map_sum
from jaxfed.core.evaluate import score
from jaxfed.core.federated import (
    Aggregator,
    Broadcast,
    Client,
    Cohort,
    Collected,
    FedAlgorithm,
    Federation,
    Report,
    Sent,
    Server,
    State,
    collect,
    federated,
    settled,
    stateless,
)
from jaxfed.core.local import (
    Trained,
    Work,
    full_gradient,
    local_steps,
    plus,
    proximal,
    steps_of,
)
from jaxfed.core.model import Model, Variables, from_linen, from_nnx
from jaxfed.core.personal import keeping
from jaxfed.core.problem import (
    Examples,
    Mean,
    Problem,
    classification,
    constant,
    multilabel,
    next_token,
    regression,
    supervised,
)
from jaxfed.core.tree import add, matching, scale, subtract, zeros
from jaxfed.data import DataError, Dataset, Partition, load, partition
from jaxfed.optimizers import OPTIMIZERS, by_round, client_optimizer, optimizer, server_optimizer
from jaxfed.plan import Plan, make_plan, make_schedule
from jaxfed.prepare import prepare
from jaxfed.run import Result, run
from jaxfed.saved import SavedRun, load_run

__all__ = [
    "AGGREGATORS", "ALGORITHMS", "OPTIMIZERS", "POLICIES", "Aggregator", "Broadcast", "Client",
    "ClientConfig", "Cohort", "Collected", "ConfigError", "DataConfig", "DataError", "Dataset",
    "Examples", "Experiment", "FedAlgorithm", "Federation", "Mean", "Model", "ModelConfig",
    "Partition", "Plan", "Problem", "Report", "Result", "SavedRun", "Sent", "Server",
    "ServerConfig", "Spec", "State", "Statistics", "Trained", "Variables", "Work", "add",
    "by_round", "central", "classification", "client_optimizer", "collect", "constant", "fedavg",
    "fedbn", "federated", "fedprox", "fedsgd", "from_json", "from_linen", "from_nnx",
    "full_gradient", "keeping", "load", "load_run", "local_steps", "local_training", "make_plan",
    "make_schedule", "map_sum", "matching", "mean", "multilabel", "next_token", "optimizer",
    "partition", "plus", "prepare", "proximal", "regression", "run", "scale", "score",
    "server_optimizer", "settled", "stateless", "steps_of", "subtract", "supervised", "to_json",
    "zeros",
]  # fmt: skip
