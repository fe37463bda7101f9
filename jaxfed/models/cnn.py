"""The small networks of the federated literature."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxfed.models import layers
from jaxfed.models.layers import NormName, max_pool


def scaled(units: int, width: float) -> int:
    """`units` times `width`, rounded, at least one."""
    return max(1, round(units * width))


class CNN(nnx.Module):
    """Two convolutions and a classifier; H, W >= 10.

    [B, H, W, C] -> logits [B, num_classes]. A norm, if any, stands between convolution and ReLU,
    as in every network of this file.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        h, w, channels = input_shape
        conv = partial(layers.conv, kernel=3, padding="VALID", dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, dtype=dtype)
        c1, c2 = scaled(32, width), scaled(64, width)
        h, w = (((n - 2) // 2 - 2) // 2 for n in (h, w))

        self.conv1 = conv(channels, c1)
        self.norm1 = make_norm(c1)
        self.conv2 = conv(c1, c2)
        self.norm2 = make_norm(c2)
        self.logits = layers.dense(h * w * c2, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` [B] marks the real rows, which alone count in BatchNorm's moments."""
        x = max_pool(nnx.relu(self.norm1(self.conv1(x), mask)))
        x = max_pool(nnx.relu(self.norm2(self.conv2(x), mask)))
        return self.logits(x.reshape(len(x), -1))


class CNNSmall(nnx.Module):
    """One convolution and a classifier; H, W >= 4.

    [B, H, W, C] -> logits [B, num_classes].
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        h, w, channels = input_shape
        c1 = scaled(16, width)
        h, w = ((n - 2) // 2 for n in (h, w))

        self.conv1 = layers.conv(channels, c1, 3, padding="VALID", dtype=dtype, rngs=rngs)
        self.norm1 = layers.norm(norm, c1, dtype=dtype)
        self.logits = layers.dense(h * w * c1, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` [B] marks the real rows, which alone count in BatchNorm's moments."""
        x = max_pool(nnx.relu(self.norm1(self.conv1(x), mask)))
        return self.logits(x.reshape(len(x), -1))


class CNNMcMahan(nnx.Module):
    """The CNN of McMahan et al., Communication-Efficient Learning, 2017; H, W >= 4.

    [B, H, W, C] -> logits [B, num_classes]. Padding SAME: that gives the paper's 1,663,370
    parameters on MNIST.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        h, w, channels = input_shape
        conv = partial(layers.conv, kernel=5, dtype=dtype, rngs=rngs)
        dense = partial(layers.dense, dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, dtype=dtype)
        c1, c2, hidden = (scaled(n, width) for n in (32, 64, 512))

        self.conv1 = conv(channels, c1)
        self.norm1 = make_norm(c1)
        self.conv2 = conv(c1, c2)
        self.norm2 = make_norm(c2)
        self.dense1 = dense((h // 4) * (w // 4) * c2, hidden)
        self.logits = dense(hidden, num_classes)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` [B] marks the real rows, which alone count in BatchNorm's moments."""
        x = max_pool(nnx.relu(self.norm1(self.conv1(x), mask)))
        x = max_pool(nnx.relu(self.norm2(self.conv2(x), mask)))
        return self.logits(nnx.relu(self.dense1(x.reshape(len(x), -1))))


class CNNDropout(nnx.Module):
    """The EMNIST CNN of Reddi et al., Adaptive Federated Optimization, 2021; H, W >= 6.

    [B, H, W, C] -> logits [B, num_classes]. 1,206,590 parameters on EMNIST-62.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        h, w, channels = input_shape
        conv = partial(layers.conv, kernel=3, padding="VALID", dtype=dtype, rngs=rngs)
        dense = partial(layers.dense, dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, dtype=dtype)
        c1, c2, hidden = (scaled(n, width) for n in (32, 64, 128))

        self.conv1 = conv(channels, c1)
        self.norm1 = make_norm(c1)
        self.conv2 = conv(c1, c2)
        self.norm2 = make_norm(c2)
        self.dropout1 = nnx.Dropout(0.25, rngs=rngs)
        self.dense1 = dense((h - 4) // 2 * ((w - 4) // 2) * c2, hidden)
        self.dropout2 = nnx.Dropout(0.5, rngs=rngs)
        self.logits = dense(hidden, num_classes)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` [B] marks the real rows, which alone count in BatchNorm's moments."""
        x = nnx.relu(self.norm1(self.conv1(x), mask))
        x = max_pool(nnx.relu(self.norm2(self.conv2(x), mask)))
        x = self.dropout1(x).reshape(len(x), -1)
        x = self.dropout2(nnx.relu(self.dense1(x)))
        return self.logits(x)


class MLP(nnx.Module):
    """The "2NN" of McMahan et al., 2017: two hidden layers of 200 units; any image size.

    [B, ...] -> logits [B, num_classes]. 199,210 parameters on MNIST.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        h, w, channels = input_shape
        hidden = scaled(200, width)
        dense = partial(layers.dense, dtype=dtype, rngs=rngs)
        make_norm = partial(layers.norm, norm, dtype=dtype)

        self.dense1 = dense(h * w * channels, hidden)
        self.norm1 = make_norm(hidden)
        self.dense2 = dense(hidden, hidden)
        self.norm2 = make_norm(hidden)
        self.logits = dense(hidden, num_classes)

    def __call__(
        self, x: Float[Array, "B ..."], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` [B] marks the real rows, which alone count in BatchNorm's moments."""
        x = nnx.relu(self.norm1(self.dense1(x.reshape(len(x), -1)), mask))
        x = nnx.relu(self.norm2(self.dense2(x), mask))
        return self.logits(x)


class Logistic(nnx.Module):
    """Multinomial logistic regression, convex; any image size.

    [B, ...] -> logits [B, num_classes].
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        norm: NormName = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width != 1 or norm != "none":
            raise ValueError(
                f"Logistic: got width {width} and norm {norm}, expected 1.0 and none: it has no "
                "hidden layer; leave them out"
            )
        h, w, channels = input_shape
        self.logits = layers.dense(h * w * channels, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B ..."], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B K"]:
        """Logits; `mask` is not needed."""
        del mask
        return self.logits(x.reshape(len(x), -1))
