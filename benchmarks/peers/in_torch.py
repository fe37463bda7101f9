"""The work as a loop over clients in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks.peers import torch_networks
from benchmarks.peers.serve import Inputs, cohorts, cores, serve

EVAL_BATCH = 200


def run(folder: Path) -> None:
    """Answers one request."""
    serve(folder, build, ("torch", "numpy"))


def build(inputs: Inputs) -> Callable[[], dict[str, np.ndarray]]:
    """Makes the function that does the work once."""
    torch.set_num_threads(cores())
    network = torch_networks.build(inputs.case["network"])
    start = torch_networks.to_torch({**inputs.params, **inputs.stats}, network)
    if inputs.work["kind"] == "evaluation":
        network.load_state_dict(start)
        test = torch_networks.images(inputs.test_images), torch.from_numpy(inputs.test_labels)
        return lambda: _evaluate(network, *test)
    x, y = torch_networks.images(inputs.images), torch.from_numpy(inputs.labels).long()
    rounds = [[torch.from_numpy(rows).long() for rows in clients] for clients in cohorts(inputs)]
    lr, batch = inputs.case["client"]["lr"], inputs.rows.shape[-1]

    def train_client(state: dict[str, torch.Tensor], rows: torch.Tensor) -> dict:
        network.load_state_dict(state)
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=lr)
        for indices in rows.split(batch):
            optimizer.zero_grad()
            functional.cross_entropy(network(x[indices]), y[indices]).backward()
            optimizer.step()
        return network.state_dict()

    def train() -> dict[str, np.ndarray]:
        state = start
        for clients in rounds:
            total = sum(map(len, clients))
            mean = {name: torch.zeros_like(value) for name, value in state.items()}
            for rows in clients:
                for name, value in train_client(state, rows).items():
                    if value.is_floating_point():
                        mean[name].add_(value, alpha=len(rows) / total)
            state = mean
        return torch_networks.from_torch(state, inputs.params, network)

    return train


def _evaluate(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
    network.eval()
    loss, right = 0.0, 0
    with torch.inference_mode():
        for images, labels in zip(x.split(EVAL_BATCH), y.split(EVAL_BATCH), strict=True):
            logits = network(images)
            loss += functional.cross_entropy(logits, labels.long(), reduction="sum").item()
            right += (logits.argmax(1) == labels).sum().item()
    return {"loss": np.asarray(loss / len(y)), "accuracy": np.asarray(right / len(y))}
