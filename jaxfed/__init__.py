"""Federated averaging in pure JAX: many clients in parallel on one device.

The whole of it is `run(Experiment(...))`; every piece is usable alone.
"""

from jaxfed.aggregate import map_sum
from jaxfed.algorithm import Cohort, FedAlgorithm, State, central, fedavg, fedsgd
from jaxfed.client import Examples, local_training
from jaxfed.data import DataError, Dataset, Partition, load, partition
from jaxfed.evaluate import score
from jaxfed.experiment import (
    ClientConfig,
    ConfigError,
    DataConfig,
    Experiment,
    ModelConfig,
    ServerConfig,
    from_json,
    to_json,
)
from jaxfed.model import Model, Variables, from_linen, from_nnx
from jaxfed.optimizers import optimizer
from jaxfed.plan import Plan, make_plan, make_schedule
from jaxfed.prepare import prepare
from jaxfed.run import Result, run
from jaxfed.saved import SavedRun, load_run

__all__ = [
    "ClientConfig", "Cohort", "ConfigError", "DataConfig", "DataError", "Dataset", "Examples",
    "Experiment", "FedAlgorithm", "Model", "ModelConfig", "Partition", "Plan", "Result",
    "SavedRun", "ServerConfig", "State", "Variables", "central", "fedavg", "fedsgd", "from_json",
    "from_linen", "from_nnx", "load", "load_run", "local_training", "make_plan", "make_schedule",
    "map_sum", "optimizer", "partition", "prepare", "run", "score", "to_json",
]  # fmt: skip
