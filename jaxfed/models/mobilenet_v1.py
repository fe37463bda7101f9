"""MobileNetV1, weight for weight `keras.applications.MobileNet`."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxfed.models import layers
from jaxfed.models.layers import NormName, relu6

# Output channels and stride of each depthwise-separable block, table 1 of the paper.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNetV1(nnx.Module):
    """Howard et al., MobileNets, 2017: [B, H, W, C] -> logits [B, num_classes]; H, W >= 32.

    Layers have Keras' names (conv_dw_1, conv_dw_1_bn, conv_pw_1, ...) and BatchNorm Keras'
    defaults. With norm "none" each convolution has a bias in place of the norm layer's.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "batch",
        dropout: float = 1e-3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bias = norm == "none"
        conv = partial(layers.conv, dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, dtype=dtype)

        features = max(1, int(32 * width))
        self.conv1 = conv(input_shape[-1], features, 3, stride=2, bias=bias)
        self.conv1_bn = make_norm(features)
        for i, (filters, stride) in enumerate(BLOCKS, start=1):
            # Keras: ZeroPadding ((0, 1), (0, 1)) then valid; SAME differs on odd sizes.
            padding = "SAME" if stride == 1 else ((0, 1), (0, 1))
            dw = conv(
                features, features, 3, stride=stride, padding=padding, groups=features, bias=bias
            )
            setattr(self, f"conv_dw_{i}", dw)
            setattr(self, f"conv_dw_{i}_bn", make_norm(features))
            inputs, features = features, max(1, int(filters * width))
            setattr(self, f"conv_pw_{i}", conv(inputs, features, 1, bias=bias))
            setattr(self, f"conv_pw_{i}_bn", make_norm(features))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.conv_preds = conv(features, num_classes, 1)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` [B] marks the real rows, which alone count in BatchNorm's moments."""
        x = relu6(self.conv1_bn(self.conv1(x), mask))
        for i in range(1, len(BLOCKS) + 1):
            for name in (f"conv_dw_{i}", f"conv_pw_{i}"):
                x = getattr(self, name)(x)
                x = relu6(getattr(self, f"{name}_bn")(x, mask))
        x = self.dropout(jnp.mean(x, axis=(1, 2), keepdims=True))
        return self.conv_preds(x)[:, 0, 0]
