"""The work in Flower's simulation: a ClientApp in Ray's processes, a ServerApp with FedAvg."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Neither tells its makers that it was used; both are to be set before they are imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional

from benchmarks.peers import torch_networks
from benchmarks.peers.serve import Inputs, cores, read, serve, visits

client_app = ClientApp()


def run(folder: Path) -> None:
    """Answers one request."""
    serve(folder, build, ("flwr", "ray", "torch", "numpy"))


@functools.cache
def loaded(folder: str) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    """The inputs, images and labels; read once by every process of Ray."""
    inputs = read(Path(folder))
    return inputs, torch_networks.images(inputs.images), torch.from_numpy(inputs.labels).long()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's part in a round."""
    config = message.content["config"]
    inputs, x, y = loaded(config["folder"])
    network = torch_networks.build(inputs.case["network"])
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    network.train()
    client = context.node_config["partition-id"]
    rows = torch.from_numpy(visits(inputs.rows[config["server-round"] - 1, client])).long()
    optimizer = torch.optim.SGD(network.parameters(), lr=inputs.case["client"]["lr"])
    for indices in rows.split(inputs.rows.shape[-1]):
        optimizer.zero_grad()
        functional.cross_entropy(network(x[indices]), y[indices]).backward()
        optimizer.step()
    content = {
        "arrays": ArrayRecord(network.state_dict()),
        "metrics": MetricRecord({"num-examples": len(rows)}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def build(inputs: Inputs) -> Callable[[], dict[str, np.ndarray]]:
    """Starts the simulation, whose server then trains whenever it is asked."""
    network = torch_networks.build(inputs.case["network"])
    start = torch_networks.to_torch({**inputs.params, **inputs.stats}, network)
    rounds, clients = inputs.rows.shape[:2]
    requests: queue.SimpleQueue[None] = queue.SimpleQueue()
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        while True:
            requests.get()
            strategy = FedAvg(
                fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
            )
            result = strategy.start(
                grid=grid, initial_arrays=ArrayRecord(start), num_rounds=rounds,
                train_config=ConfigRecord({"folder": str(inputs.folder)}),
            )  # fmt: skip
            results.put(result.arrays)

    def simulate() -> None:
        try:
            run_simulation(
                server_app, client_app, num_supernodes=clients,
                backend_config={
                    "init_args": {"num_cpus": cores()},
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                },
            )  # fmt: skip
        except BaseException as error:
            results.put(error)
            raise

    threading.Thread(target=simulate, daemon=True).start()

    def train_all() -> dict[str, np.ndarray]:
        requests.put(None)
        arrays = results.get()
        if isinstance(arrays, BaseException):
            raise arrays
        return torch_networks.from_torch(arrays.to_torch_state_dict(), inputs.params, network)

    return train_all
