"""jaxfed's networks as their PyTorch users would write them, and weights by name both ways.

`channels` of a network says, for each dense layer that sees a flattened picture, how many that has.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean",
          "var": "running_var"}  # fmt: skip
"""jaxfed's name of a weight within its layer -> PyTorch's."""


class CNN(nn.Module):
    """Two convolutions: images [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, channels: int, side: int, classes: int):
        super().__init__()
        self.channels = {"logits": 64}
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.logits = nn.Linear(64 * (((side - 2) // 2 - 2) // 2) ** 2, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.logits(x.flatten(1))


class MLP(nn.Module):
    """Two hidden layers of 200: images [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, channels: int, side: int, classes: int):
        super().__init__()
        self.channels = {"dense1": channels}
        self.dense1 = nn.Linear(channels * side**2, 200)
        self.dense2 = nn.Linear(200, 200)
        self.logits = nn.Linear(200, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.dense1(x.flatten(1)))
        return self.logits(functional.relu(self.dense2(x)))


BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5,
          (1024, 2), (1024, 1))  # fmt: skip
"""MobileNetV1's output channels and strides."""


class MobileNet(nn.Module):
    """keras.applications' MobileNet, without dropout: [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, channels: int, classes: int, width: float):
        super().__init__()
        self.channels = {}

        def norm(features: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(features, eps=1e-3, momentum=0.01)

        features = int(32 * width)
        self.conv1 = nn.Conv2d(channels, features, 3, stride=2, bias=False)
        self.conv1_bn = norm(features)
        for number, (filters, stride) in enumerate(BLOCKS, start=1):
            out = int(filters * width)
            dw = nn.Conv2d(
                features, features, 3, stride, padding=1 if stride == 1 else 0,
                groups=features, bias=False,
            )  # fmt: skip
            self.add_module(f"conv_dw_{number}", dw)
            self.add_module(f"conv_dw_{number}_bn", norm(features))
            self.add_module(f"conv_pw_{number}", nn.Conv2d(features, out, 1, bias=False))
            self.add_module(f"conv_pw_{number}_bn", norm(out))
            features = out
        self.conv_preds = nn.Conv2d(features, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Keras pads what a stride of 2 leaves over on the right and at the bottom only.
        x = functional.relu6(self.conv1_bn(self.conv1(functional.pad(x, (0, 1, 0, 1)))))
        for number, (_, stride) in enumerate(BLOCKS, start=1):
            if stride == 2:
                x = functional.pad(x, (0, 1, 0, 1))
            for name in (f"conv_dw_{number}", f"conv_pw_{number}"):
                norm = self.get_submodule(f"{name}_bn")
                x = functional.relu6(norm(self.get_submodule(name)(x)))
        return self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)


def build(network: dict) -> nn.Module:
    """The network that a case names, with weights of PyTorch's own."""
    side, _, channels = network["input_shape"]
    match network["name"]:
        case "cnn":
            return CNN(channels, side, network["num_classes"])
        case "mlp":
            return MLP(channels, side, network["num_classes"])
        case "mobilenet-v1":
            return MobileNet(channels, network["num_classes"], network["width"])
    raise ValueError(f"network: got {network['name']}, expected cnn, mlp or mobilenet-v1")


def images(pixels: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def to_torch(arrays: dict[str, np.ndarray], network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights by jaxfed's names as a state dict of `network`.

    Kernels turn from (h, w, in, out) to (out, in, h, w), those of dense layers that see a flattened
    picture, too.
    """
    state = network.state_dict()
    for name, array in arrays.items():
        layer, key = _key(name)
        value = array
        if array.ndim == 2:
            value = _pictures(array, network.channels.get(layer, len(array)))
        if array.ndim > 1:
            value = value.transpose(3, 2, 0, 1)
        state[key] = torch.from_numpy(value.reshape(state[key].shape).copy())
    return state


def from_torch(
    state: dict[str, torch.Tensor], like: dict[str, np.ndarray], network: nn.Module
) -> dict[str, np.ndarray]:
    """The inverse of `to_torch`, for the names in `like`."""
    found = {}
    for name, array in like.items():
        layer, key = _key(name)
        value = state[key].numpy()
        if array.ndim == 2:
            shape = _pictures(array, network.channels.get(layer, len(array))).shape
            value = value.reshape([shape[at] for at in (3, 2, 0, 1)])
        if array.ndim > 1:
            value = value.transpose(2, 3, 1, 0)
        found[name] = value.reshape(array.shape)
    return found


def _key(name: str) -> tuple[str, str]:
    layer, _, leaf = name.rpartition("/")
    return layer, f"{layer}.{LEAVES[leaf]}"


def _pictures(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The kernel of a dense layer as (h, w, channels, out)."""
    side = round((len(kernel) / channels) ** 0.5)
    return kernel.reshape(side, side, channels, -1)
