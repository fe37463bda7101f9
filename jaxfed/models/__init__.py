"""The networks by name. A new one is a file in this folder and a line in `MODELS`."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxfed.config import ConfigError
from jaxfed.models.cnn import CNN, MLP, CNNDropout, CNNMcMahan, CNNSmall, Logistic
from jaxfed.models.layers import NormName
from jaxfed.models.mobilenet_v1 import MobileNetV1
from jaxfed.models.mobilenet_v2 import MobileNetV2
from jaxfed.models.mobilenet_v3 import MobileNetV3Large, MobileNetV3Small

__all__ = ["MODELS", "Constructor", "ModelSpec", "build", "builder", "spec_of"]


class Constructor(Protocol):
    """What each network's class is called with."""

    def __call__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float,
        norm: NormName,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """Makes the network for images [H, W, C]."""
        ...


class ModelSpec(NamedTuple):
    """One row of `MODELS`."""

    constructor: Constructor
    min_image_size: int
    """Smallest height and width, in pixels, that leave something for the last layer to see."""
    norm: NormName
    """The published network's own normalisation; the others can be asked for."""
    description: str


MODELS: dict[str, ModelSpec] = {
    "cnn": ModelSpec(CNN, 10, "none", "2 convolutions"),
    "cnn-small": ModelSpec(CNNSmall, 4, "none", "1 convolution"),
    "cnn-mcmahan": ModelSpec(CNNMcMahan, 4, "none", "2 convolutions, 1.7 M (McMahan 2017)"),
    "cnn-dropout": ModelSpec(CNNDropout, 6, "none", "2 convolutions, dropout (Reddi 2021)"),
    "mlp": ModelSpec(MLP, 1, "none", "2 hidden layers of 200, the 2NN (McMahan 2017)"),
    "logistic": ModelSpec(Logistic, 1, "none", "multinomial logistic regression"),
    "mobilenet-v1": ModelSpec(MobileNetV1, 32, "batch", "MobileNet (Howard 2017)"),
    "mobilenet-v2": ModelSpec(MobileNetV2, 32, "batch", "MobileNetV2 (Sandler 2018)"),
    "mobilenet-v3-small": ModelSpec(MobileNetV3Small, 32, "batch", "MobileNetV3 (Howard 2019)"),
    "mobilenet-v3-large": ModelSpec(MobileNetV3Large, 32, "batch", "MobileNetV3 (Howard 2019)"),
}


def spec_of(name: str) -> ModelSpec:
    """The row of `MODELS` called `name`.

    Raises:
      ConfigError: if there is none.
    """
    if name not in MODELS:
        raise ConfigError(f"--model.name: got {name}, expected one of {', '.join(MODELS)}")
    return MODELS[name]


def builder(
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: float = 1.0,
    norm: NormName | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Callable[[nnx.Rngs], nnx.Module]:
    """A function of `rngs` that makes the network `name`; what `from_nnx` takes.

    Args:
      name: a key of `MODELS`.
      input_shape: (H, W, C) of one image; of any other input for networks without convolutions.
      num_classes: number of outputs.
      width: multiplies the numbers of channels.
      norm: normalisation layers; None is the published network's own.
      dtype: of the computation; parameters are float64 if it is, float32 otherwise.

    Raises:
      ConfigError: if there is no such network, or it does not do what is asked.
    """
    spec = spec_of(name)
    norm = norm or spec.norm
    if len(input_shape) != 3:
        if spec.min_image_size > 1:
            raise ConfigError(
                f"--model.name: got {name} for inputs of shape {input_shape}, expected images "
                "(H, W, C); use mlp or logistic, or a network of your own"
            )
        input_shape = (1, 1, math.prod(input_shape))
    if min(input_shape[:2]) < spec.min_image_size:
        raise ConfigError(
            f"--model.name: got {name} for images of {input_shape[0]} x {input_shape[1]}, which "
            f"expects {spec.min_image_size} x {spec.min_image_size} or more; pad or resize them, "
            "or take a smaller network"
        )
    if spec.constructor is Logistic and (width != 1 or norm != "none"):
        raise ConfigError(
            f"--model.name: got logistic with width {width} and norm {norm}, expected 1.0 and "
            "none: it has no hidden layer; leave them out"
        )
    shape = (input_shape[0], input_shape[1], input_shape[2])
    return lambda rngs: spec.constructor(
        shape, num_classes, width=width, norm=norm, dtype=dtype, rngs=rngs
    )


def build(
    name: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float = 1.0,
    norm: NormName | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """The network `name`, initialised; see `builder`.

    Example:
      >>> from flax import nnx
      >>> build("mobilenet-v1", (32, 32, 1), 10, width=0.25, rngs=nnx.Rngs(0)).conv_preds.bias.shape
      (10,)
    """
    return builder(name, input_shape, num_classes, width=width, norm=norm, dtype=dtype)(rngs)
