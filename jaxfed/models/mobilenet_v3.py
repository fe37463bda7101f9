"""MobileNetV3 small and large, weight for weight `keras.applications.MobileNetV3Small/Large`.

As with `include_preprocessing=False` and `minimalistic=False`: pixels are scaled by the data
pipeline, as for every other network here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxfed.models import layers
from jaxfed.models.layers import NormName, make_divisible, relu6


def hard_sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """relu6(x + 3) / 6."""
    return relu6(x + 3) * (1 / 6)


def hard_swish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * relu6(x + 3) / 6."""
    return x * hard_sigmoid(x)


class Block(NamedTuple):
    """One row of the paper's tables 1 and 2."""

    kernel: int
    expansion: float
    filters: int
    squeeze: bool
    activation: Callable[[Array], Array]
    stride: int


SMALL = (
    Block(3, 1, 16, True, nnx.relu, 2),
    Block(3, 72 / 16, 24, False, nnx.relu, 2),
    Block(3, 88 / 24, 24, False, nnx.relu, 1),
    Block(5, 4, 40, True, hard_swish, 2),
    Block(5, 6, 40, True, hard_swish, 1),
    Block(5, 6, 40, True, hard_swish, 1),
    Block(5, 3, 48, True, hard_swish, 1),
    Block(5, 3, 48, True, hard_swish, 1),
    Block(5, 6, 96, True, hard_swish, 2),
    Block(5, 6, 96, True, hard_swish, 1),
    Block(5, 6, 96, True, hard_swish, 1),
)
LARGE = (
    Block(3, 1, 16, False, nnx.relu, 1),
    Block(3, 4, 24, False, nnx.relu, 2),
    Block(3, 3, 24, False, nnx.relu, 1),
    Block(5, 3, 40, True, nnx.relu, 2),
    Block(5, 3, 40, True, nnx.relu, 1),
    Block(5, 3, 40, True, nnx.relu, 1),
    Block(3, 6, 80, False, hard_swish, 2),
    Block(3, 2.5, 80, False, hard_swish, 1),
    Block(3, 2.3, 80, False, hard_swish, 1),
    Block(3, 2.3, 80, False, hard_swish, 1),
    Block(3, 6, 112, True, hard_swish, 1),
    Block(3, 6, 112, True, hard_swish, 1),
    Block(5, 6, 160, True, hard_swish, 2),
    Block(5, 6, 160, True, hard_swish, 1),
    Block(5, 6, 160, True, hard_swish, 1),
)


class SqueezeExcite(nnx.Module):
    """Scales each channel by a gate computed from the means of all: [B, H, W, C] -> the same."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        squeezed = make_divisible(features * 0.25)
        self.Conv = layers.conv(features, squeezed, 1, dtype=dtype, rngs=rngs)
        self.Conv_1 = layers.conv(squeezed, features, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Gated x."""
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * hard_sigmoid(self.Conv_1(nnx.relu(self.Conv(means))))


class InvertedResidual(nnx.Module):
    """Expand (1x1), filter (depthwise), squeeze and excite, project (1x1, linear), shortcut.

    [B, H, W, in_features] -> [B, H/stride, W/stride, out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: Block,
        *,
        expand: bool,
        norm: NormName,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        conv = partial(layers.conv, bias=norm == "none", dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, momentum=0.999, dtype=dtype)

        hidden = make_divisible(in_features * block.expansion)
        self.activation = block.activation
        self.has_expand = expand
        self.has_squeeze = block.squeeze
        self.has_shortcut = block.stride == 1 and in_features == out_features
        if expand:
            self.expand = conv(in_features, hidden, 1)
            self.expand_BatchNorm = make_norm(hidden)
        # Keras: `correct_pad` then valid, which is what SAME means at stride 2.
        self.depthwise = conv(hidden, hidden, block.kernel, stride=block.stride, groups=hidden)
        self.depthwise_BatchNorm = make_norm(hidden)
        if block.squeeze:
            self.squeeze_excite = SqueezeExcite(hidden, dtype=dtype, rngs=rngs)
        self.project = conv(hidden, out_features, 1)
        self.project_BatchNorm = make_norm(out_features)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None
    ) -> Float[Array, "B h w F"]:
        """The block's output; `mask` as in the whole network."""
        y = x
        if self.has_expand:
            y = self.activation(self.expand_BatchNorm(self.expand(y), mask))
        y = self.activation(self.depthwise_BatchNorm(self.depthwise(y), mask))
        if self.has_squeeze:
            y = self.squeeze_excite(y)
        y = self.project_BatchNorm(self.project(y), mask)
        return x + y if self.has_shortcut else y


class MobileNetV3(nnx.Module):
    """Howard et al., Searching for MobileNetV3, 2019; use `MobileNetV3Small` or `-Large`.

    [B, H, W, C] -> logits [B, num_classes]; H, W >= 32. Layer paths are Keras' names
    (expanded_conv_1.expand is expanded_conv_1/expand) and BatchNorm has Keras' momentum .999.
    With norm "none" each convolution has a bias in place of the norm layer's.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        last_features: int,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float,
        norm: NormName,
        dropout: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        conv = partial(layers.conv, dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, momentum=0.999, dtype=dtype)
        bias = norm == "none"

        features = 16  # at any width, as in Keras
        self.Conv = conv(input_shape[-1], features, 3, stride=2, bias=bias)
        self.Conv_BatchNorm = make_norm(features)
        self.blocks: tuple[str, ...] = ()
        for i, block in enumerate(blocks):
            name = f"expanded_conv_{i}" if i else "expanded_conv"
            inputs, features = features, make_divisible(block.filters * width)
            residual = InvertedResidual(
                inputs, features, block, expand=i > 0, norm=norm, dtype=dtype, rngs=rngs
            )
            setattr(self, name, residual)
            self.blocks += (name,)
        inputs, features = features, make_divisible(features * 6)
        self.Conv_1 = conv(inputs, features, 1, bias=bias)
        self.Conv_1_BatchNorm = make_norm(features)
        # The paper: a narrower network keeps the full last layer.
        inputs, features = features, make_divisible(last_features * max(width, 1.0))
        self.Conv_2 = conv(inputs, features, 1)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.Logits = conv(features, num_classes, 1)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` [B] marks the real rows, which alone count in BatchNorm's moments."""
        x = hard_swish(self.Conv_BatchNorm(self.Conv(x), mask))
        for name in self.blocks:
            x = getattr(self, name)(x, mask)
        x = hard_swish(self.Conv_1_BatchNorm(self.Conv_1(x), mask))
        x = hard_swish(self.Conv_2(jnp.mean(x, axis=(1, 2), keepdims=True)))
        return self.Logits(self.dropout(x))[:, 0, 0]


class MobileNetV3Small(MobileNetV3):
    """Howard et al., Searching for MobileNetV3, 2019, table 2; see `MobileNetV3`."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "batch",
        dropout: float = 0.2,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            SMALL,
            1024,
            input_shape,
            num_classes,
            width=width,
            norm=norm,
            dropout=dropout,
            dtype=dtype,
            rngs=rngs,
        )


class MobileNetV3Large(MobileNetV3):
    """Howard et al., Searching for MobileNetV3, 2019, table 1; see `MobileNetV3`."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "batch",
        dropout: float = 0.2,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            LARGE,
            1280,
            input_shape,
            num_classes,
            width=width,
            norm=norm,
            dropout=dropout,
            dtype=dtype,
            rngs=rngs,
        )
