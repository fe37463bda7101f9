"""The layers that the networks share, initialised and normalised as Keras does it."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxfed.models.conv import patches_conv

NormName = Literal["batch", "group", "layer", "none"]


def param_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float64 parameters for float64 computation, float32 ones for everything else."""
    return jnp.promote_types(dtype, jnp.float32)


def make_divisible(channels: float | int) -> int:
    """The multiple of 8 nearest to `channels`, never more than a tenth below; MobileNets' rule."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv(
    in_features: int,
    out_features: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME",
    groups: int = 1,
    bias: bool = True,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Convolution, depthwise if groups = in_features = out_features.

    [B, H, W, in_features] -> [B, h, w, out_features].
    """
    return nnx.Conv(
        in_features,
        out_features,
        (kernel, kernel),
        stride,
        padding=padding,
        feature_group_count=groups,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype(dtype),
        # Keras: its depthwise kernel is (h, w, C, 1), ours (h, w, 1, C). Glorot's bound depends on
        # fan_in + fan_out only, h * w * (C + 1) in both.
        kernel_init=nnx.initializers.glorot_uniform(),
        conv_general_dilated=patches_conv,
        rngs=rngs,
    )


def dense(in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Fully connected: [B, in_features] -> [B, out_features]."""
    return nnx.Linear(
        in_features,
        out_features,
        dtype=dtype,
        param_dtype=param_dtype(dtype),
        kernel_init=nnx.initializers.glorot_uniform(),
        rngs=rngs,
    )


def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """min(max(x, 0), 6), with derivative 0 at both corners.

    TF: the derivative is 1 strictly between 0 and 6; `jax.nn.relu6` has 1/2 at the corners, which
    is where BatchNorm puts every constant channel.
    """
    return jnp.where(x > 0, jnp.where(x < 6, x, 6), 0)


def _four(x: Array) -> tuple[Array, Array]:
    """The largest of each window, and its place in it: 0 to 3, row by row, the first of equals."""
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x00, x01, x10, x11 = (x[:, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1))
    upper, lower = jnp.maximum(x00, x01), jnp.maximum(x10, x11)
    place = jnp.where(upper >= lower, jnp.where(x00 >= x01, 0, 1), jnp.where(x10 >= x11, 2, 3))
    return jnp.maximum(upper, lower), place.astype(jnp.int8)


def _largest(_: tuple[int, int], x: Array) -> Array:
    return _four(x)[0]


def _max_pool_forward(_: tuple[int, int], x: Array) -> tuple[Array, Array]:
    return _four(x)


def _max_pool_backward(odd: tuple[int, int], place: Array, dy: Array) -> tuple[Array]:
    b, h, w, c = dy.shape
    corner = jnp.arange(4, dtype=jnp.int8).reshape(2, 1, 2, 1)
    dx = jnp.where(place[:, :, None, :, None] == corner, dy[:, :, None, :, None], 0)
    dx = dx.reshape(b, 2 * h, 2 * w, c)
    return (jnp.pad(dx, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0))),)


_max_pool = jax.custom_vjp(_largest, nondiff_argnums=(0,))
_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Largest of each 2 x 2 window, stride 2; an odd last row or column is dropped.

    TF: the first of equal maxima (row by row) receives the whole gradient; `jnp.maximum` would
    split it. The derivative is written out: those of strided slices and of `lax.reduce_window`
    cost more than the rest of a small network.
    """
    return _max_pool((x.shape[1] % 2, x.shape[2] % 2), x)


def norm(
    name: NormName,
    features: int,
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    dtype: DTypeLike,
) -> "Norm":
    """The normalisation layer called `name`; `momentum` is BatchNorm's."""
    match name:
        case "batch":
            return BatchNorm(features, momentum=momentum, epsilon=epsilon, dtype=dtype)
        case "group":
            return GroupNorm(features, epsilon=epsilon, dtype=dtype)
        case "layer":
            return LayerNorm(features, epsilon=epsilon, dtype=dtype)
        case "none":
            return NoNorm()
    raise ValueError(f"norm: got {name!r}, expected batch, group, layer or none")


class BatchNorm(nnx.Module):
    """Normalises each channel by the moments of the batch, counting real rows only.

    Called with x [B, ..., C] and mask [B] (True = a real row; None = all are). In training the
    result for real rows, the gradients and the moving statistics are those of the smaller batch
    without the masked rows; a batch without any real row leaves the statistics as they are. After
    `model.eval()` the moving statistics are used. Ioffe and Szegedy, Batch Normalization, 2015.

    Keras: epsilon 1e-3, moving = momentum * moving + (1 - momentum) * batch, with the biased batch
    variance (its fused float32 kernel feeds the moving variance the unbiased one instead).
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        dtype: DTypeLike = jnp.float32,
    ):
        self.scale = nnx.Param(jnp.ones(features, param_dtype(dtype)))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype(dtype)))
        self.mean = nnx.BatchStat(jnp.zeros(features, param_dtype(dtype)))
        self.var = nnx.BatchStat(jnp.ones(features, param_dtype(dtype)))
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = False

    def __call__(
        self, x: Float[Array, "B *spatial C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B *spatial C"]:
        """Normalised x; in training the moving statistics are updated in place."""
        dtype = x.dtype
        x = x.astype(param_dtype(dtype))
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes = tuple(range(x.ndim - 1))
            if mask is None:
                mask = jnp.ones(len(x), bool)
            real = mask.reshape(-1, *(1,) * (x.ndim - 1))
            count = jnp.sum(mask, dtype=x.dtype) * (x[0].size // x.shape[-1])
            # Two passes: E[x^2] - E[x]^2 would lose half of the digits.
            share = 1 / jnp.maximum(count, 1)
            mean = jnp.sum(x, axes, where=real) * share
            var = jnp.sum(jnp.square(x - mean), axes, where=real) * share
            # Keras: 1 - momentum is rounded to float32, in float64 too.
            rate = jnp.where(count > 0, float(np.float32(1 - self.momentum)), 0)
            self.mean[...] -= rate * (self.mean - mean)
            self.var[...] -= rate * (self.var - var)
        x = (x - mean) * (lax.rsqrt(var + self.epsilon) * self.scale) + self.bias
        return x.astype(dtype)


class GroupNorm(nnx.Module):
    """Normalises each example by the moments of its channel groups; the mask is not needed.

    Wu and He, Group Normalization, 2018; in federated learning: Hsieh et al., The Non-IID Data
    Quagmire, 2020. There are 8 groups where 8 divides the channels, as the widths of all
    MobileNets but V1 see to; otherwise the largest divisor below 8, so that any width works.
    Keras: epsilon 1e-3.
    """

    def __init__(self, features: int, *, epsilon: float = 1e-3, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones(features, param_dtype(dtype)))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype(dtype)))
        self.groups = next(g for g in range(8, 0, -1) if features % g == 0)
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "B *spatial C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B *spatial C"]:
        """Normalised x."""
        del mask
        wide = x.astype(param_dtype(x.dtype))
        centred = wide - self._group_means(wide)
        var = self._group_means(jnp.square(centred))
        y = centred * (lax.rsqrt(var + self.epsilon) * self.scale) + self.bias
        return y.astype(x.dtype)

    def _group_means(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, 1, 1, C]; channel by channel first, which is faster on CPU."""
        channels = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True)
        groups = channels.reshape(*channels.shape[:-1], self.groups, -1)
        means = jnp.mean(groups, axis=-1, keepdims=True)
        return jnp.broadcast_to(means, groups.shape).reshape(channels.shape)


class LayerNorm(nnx.Module):
    """Normalises the channels at each position of each example; the mask is not needed.

    Ba, Kiros and Hinton, Layer Normalization, 2016. Keras: the last axis only, epsilon 1e-3.
    """

    def __init__(self, features: int, *, epsilon: float = 1e-3, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones(features, param_dtype(dtype)))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype(dtype)))
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "B *spatial C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B *spatial C"]:
        """Normalised x."""
        del mask
        wide = x.astype(param_dtype(x.dtype))
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        var = jnp.mean(jnp.square(centred), -1, keepdims=True)
        y = centred * lax.rsqrt(var + self.epsilon)
        return (y * self.scale + self.bias).astype(x.dtype)


class NoNorm(nnx.Module):
    """Returns its input: the network without normalisation, whose convolutions have biases."""

    def __call__(
        self, x: Float[Array, "B *spatial C"], mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B *spatial C"]:
        """x itself."""
        del mask
        return x


Norm = BatchNorm | GroupNorm | LayerNorm | NoNorm
