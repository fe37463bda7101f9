"""The work in Apple's pfl: FederatedAveraging on its SimulatedBackend, with a PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional

from benchmarks.peers import torch_networks
from benchmarks.peers.serve import Inputs, cohorts, cores, serve


class Classifier(torch.nn.Module):
    """A network with what pfl asks of it."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(self.network.train()(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict:
        """None: no peer scores its clients' networks."""
        del x, y
        return {}


def run(folder: Path) -> None:
    """Answers one request."""
    serve(folder, build, ("pfl", "torch", "numpy"))


def build(inputs: Inputs) -> Callable[[], dict[str, np.ndarray]]:
    """Makes the function that does the work once."""
    torch.set_num_threads(cores())
    network = torch_networks.build(inputs.case["network"])
    start = torch_networks.to_torch({**inputs.params, **inputs.stats}, network)
    x, y = torch_networks.images(inputs.images), torch.from_numpy(inputs.labels).long()
    # Every client of every round is a user of its own, taken in order.
    users = [Dataset((x[rows], y[rows])) for clients in cohorts(inputs) for rows in clients]
    rounds, clients = inputs.rows.shape[:2]
    params = NNAlgorithmParams(
        central_num_iterations=rounds, evaluation_frequency=rounds, train_cohort_size=clients,
        val_cohort_size=None,
    )  # fmt: skip
    train_params = NNTrainHyperParams(
        local_num_epochs=1,
        local_learning_rate=inputs.case["client"]["lr"],
        local_batch_size=inputs.rows.shape[-1],
    )
    classifier = Classifier(network)
    model = PyTorchModel(
        model=classifier,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(classifier.parameters(), lr=1.0),
    )

    def train() -> dict[str, np.ndarray]:
        network.load_state_dict(start)
        sampler = MinimizeReuseUserSampler(list(range(len(users))))
        data = FederatedDataset(users.__getitem__, sampler)
        backend = SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])
        FederatedAveraging().run(params, backend, model, train_params)
        return torch_networks.from_torch(network.state_dict(), inputs.params, network)

    return train
