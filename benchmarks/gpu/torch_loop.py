"""The same rounds in PyTorch: a loop over clients, on the same device and the same batches."""

import copy
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.gpu.jobs import JOBS, TINY_JOBS, Job, device_seconds, plans_of, task_of
from benchmarks.gpu.measure import PRECISIONS, Case, Found, Row, median_seconds
from jaxfed.models.mobilenet_v1 import BLOCKS
from jaxfed.program import Program, compile_tasks
from jaxfed.segments import segments

LIMITS = {"float32": 1e-4, "tf32": 1e-2}
"""How far the training losses of the first round may be apart, relative."""
RATE = 0.01


def cases(tiny: bool, _: Found) -> Iterator[Case]:
    cnn, mobilenet = (TINY_JOBS[0], None) if tiny else (JOBS[0], JOBS[2])
    for precision in LIMITS:
        label = {"job": cnn.name, "clients": cnn.clients, "precision": precision}
        yield Case(label, partial(side_by_side, cnn, precision, compare=True))
    if mobilenet is not None:
        label = {"job": mobilenet.name, "clients": mobilenet.clients, "precision": "tf32"}
        yield Case(label, partial(side_by_side, mobilenet, "tf32", compare=False))


def side_by_side(job: Job, precision: str, *, compare: bool) -> list[Row]:
    """Milliseconds of a round in PyTorch and in jaxfed.

    Raises:
      ValueError: if they do not train alike.
    """
    torch: Any = importlib.import_module("torch")
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = precision == "tf32"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = task_of(job, "vmap", 40)
    with jax.default_matmul_precision(PRECISIONS[precision].matmul):
        program = compile_tasks([task])
    plans = plans_of([task], program.length)
    images = torch.tensor(task.dataset.x_train, device=device).permute(0, 3, 1, 2)
    labels = torch.tensor(task.dataset.y_train, device=device).long()
    clients = [
        [torch.tensor(rows[rows >= 0], device=device).long() for rows in client if rows.max() >= 0]
        for client in np.asarray(plans.rows)[0, 0]
    ]
    network = (
        cnn(torch, program) if compare else mobilenet(torch, task.experiment.model.width or 1.0)
    )
    network = network.to(device)
    # The same data format for all: float32 in [0, 1], made when the batch is taken.
    work = partial(round_of, torch, network, images, labels, clients)
    row: Row = {"torch_device": device}
    if compare:
        ours = next(segments(program)).rows[0][0]["train_loss"]
        row |= {"torch_loss": work(), "jaxfed_loss": ours}
        row["gap"] = abs(row["torch_loss"] / ours - 1)
        if not row["gap"] <= LIMITS[precision]:
            raise ValueError(
                f"got {row['torch_loss']:.6f} in PyTorch and {ours:.6f} in jaxfed, expected the "
                f"same within {LIMITS[precision]:.0e}; one of them trains something else"
            )
    seconds = median_seconds(work, 5, budget=3.0)  # ends with .item(), which waits
    row["ms"] = 1e3 * seconds
    row["jaxfed_ms"] = 1e3 * device_seconds(program, plans)
    row["speedup"] = row["ms"] / row["jaxfed_ms"]
    return [row]


def round_of(torch: Any, network: Any, images: Any, labels: Any, clients: Any) -> float:
    """One round of federated averaging of equal clients, in place; the mean training loss."""
    total = [torch.zeros_like(parameter) for parameter in network.parameters()]
    losses, count = [], 0
    for batches in clients:
        model = copy.deepcopy(network)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for rows in batches:
            optimizer.zero_grad(set_to_none=True)
            logits = model(images[rows].float() / 255)
            loss = torch.nn.functional.cross_entropy(logits, labels[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach() * len(rows))
            count += len(rows)
        with torch.no_grad():
            for weights, parameter in zip(total, model.parameters(), strict=True):
                weights.add_(parameter, alpha=1 / len(clients))
    with torch.no_grad():
        for parameter, weights in zip(network.parameters(), total, strict=True):
            parameter.copy_(weights)
    return (torch.stack(losses).sum() / count).item()


def cnn(torch: Any, program: Program) -> Any:
    """`jaxfed.models.cnn.CNN` with the weights that the program begins with."""
    nn = torch.nn
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0]), program.state.variables.params)

    class Rows(nn.Module):
        """[B, C, H, W] -> [B, H * W * C], in the order of ours."""

        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).flatten(1)

    def filled(layer: Any, name: str) -> Any:
        kernel = params[name]["kernel"]
        kernel = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        layer.weight.data = torch.tensor(np.ascontiguousarray(kernel))
        layer.bias.data = torch.tensor(params[name]["bias"])
        return layer

    def conv(name: str) -> list[Any]:
        inputs, outputs = params[name]["kernel"].shape[2:]
        layer = filled(nn.Conv2d(inputs, outputs, 3), name)
        return [layer, nn.ReLU(), nn.MaxPool2d(2)]

    dense = filled(nn.Linear(*params["logits"]["kernel"].shape), "logits")
    return nn.Sequential(*conv("conv1"), *conv("conv2"), Rows(), dense)


def mobilenet(torch: Any, width: float) -> Any:
    """MobileNetV1 for grey images and ten classes, with weights of its own: for timing only."""
    nn = torch.nn

    def block(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[Any]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01), nn.ReLU6()]

    features = int(32 * width)
    layers = block(1, features, 3, 2)
    for filters, stride in BLOCKS:
        outputs = int(filters * width)
        layers += block(features, features, 3, stride, features) + block(features, outputs, 1, 1)
        features = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10))
