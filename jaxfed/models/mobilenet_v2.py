"""MobileNetV2, weight for weight `keras.applications.MobileNetV2`."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxfed.models import layers
from jaxfed.models.layers import NormName, make_divisible, relu6

# Expansion, output channels, repeats and stride of the first repeat; table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nnx.Module):
    """Expand (1x1), filter (3x3 depthwise), project (1x1, linear); a shortcut where shapes allow.

    [B, H, W, in_features] -> [B, H/stride, W/stride, out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        expansion: int,
        stride: int,
        norm: NormName,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        conv = partial(layers.conv, bias=norm == "none", dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, momentum=0.999, dtype=dtype)

        hidden = expansion * in_features
        self.has_expand = expansion > 1
        self.has_shortcut = stride == 1 and in_features == out_features
        if self.has_expand:
            self.expand = conv(in_features, hidden, 1)
            self.expand_BN = make_norm(hidden)
        # Keras: `correct_pad` then valid, which is what SAME means at stride 2.
        self.depthwise = conv(hidden, hidden, 3, stride=stride, groups=hidden)
        self.depthwise_BN = make_norm(hidden)
        self.project = conv(hidden, out_features, 1)
        self.project_BN = make_norm(out_features)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None
    ) -> Float[Array, "B h w F"]:
        """The block's output; `mask` as in the whole network."""
        y = x
        if self.has_expand:
            y = relu6(self.expand_BN(self.expand(y), mask))
        y = relu6(self.depthwise_BN(self.depthwise(y), mask))
        y = self.project_BN(self.project(y), mask)
        return x + y if self.has_shortcut else y


class MobileNetV2(nnx.Module):
    """Sandler et al., MobileNetV2, 2018: [B, H, W, C] -> logits [B, num_classes]; H, W >= 32.

    Layer paths are Keras' names (block_1.expand_BN is block_1_expand_BN) and BatchNorm has Keras'
    momentum .999. With norm "none" each convolution has a bias in place of the norm layer's.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "batch",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv = partial(layers.conv, bias=norm == "none", dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, momentum=0.999, dtype=dtype)

        features = make_divisible(32 * width)
        self.Conv1 = conv(input_shape[-1], features, 3, stride=2)
        self.bn_Conv1 = make_norm(features)
        self.blocks: tuple[str, ...] = ()
        for expansion, filters, repeats, first_stride in STAGES:
            for repeat in range(repeats):
                name = f"block_{len(self.blocks)}" if self.blocks else "expanded_conv"
                inputs, features = features, make_divisible(int(filters * width))
                block = InvertedResidual(
                    inputs,
                    features,
                    expansion=expansion,
                    stride=first_stride if repeat == 0 else 1,
                    norm=norm,
                    dtype=dtype,
                    rngs=rngs,
                )
                setattr(self, name, block)
                self.blocks += (name,)
        # The paper: a narrower network keeps the full last convolution.
        last = make_divisible(1280 * max(width, 1.0))
        self.Conv_1 = conv(features, last, 1)
        self.Conv_1_bn = make_norm(last)
        self.predictions = layers.dense(last, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` [B] marks the real rows, which alone count in BatchNorm's moments."""
        x = relu6(self.bn_Conv1(self.Conv1(x), mask))
        for name in self.blocks:
            x = getattr(self, name)(x, mask)
        x = relu6(self.Conv_1_bn(self.Conv_1(x), mask))
        return self.predictions(jnp.mean(x, axis=(1, 2)))
