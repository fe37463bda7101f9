"""Convolution without `lax.conv`: what makes many clients at once fast.

Each client has its own kernels, and `vmap` of `lax.conv_general_dilated` over kernels is a grouped
convolution, which XLA runs 20 to 70 times slower on CPU than what stands here: a convolution is a
matrix product of image patches, which `vmap` turns into a batched matrix product, and a depthwise
convolution is a sum of shifted products. Both derivatives are written out: those that autodiff
finds are scatter-adds (not deterministic on GPU) and padded sums, each up to twice as slow on CPU.
The price is that forward-mode differentiation (`jax.jvp`) is not available.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pair = tuple[int, int]


def patches_conv(
    lhs: Float[Array, "B H W C"],
    rhs: Float[Array, "kh kw I F"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    out_sharding: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "B h w F"]:
    """`lax.conv_general_dilated` for NHWC images and HWIO kernels, as matrix products.

    Made for the `conv_general_dilated=` argument of `flax.nnx.Conv`. Covers dense (I = C) and
    depthwise (I = 1, F = C) two-dimensional convolutions; dilated and otherwise grouped ones, other
    layouts and an explicit output sharding go to `lax.conv_general_dilated`. Patches as matrices
    ("im2col"): Chellapilla, Puri and Simard, High Performance Convolutional Neural Networks for
    Document Processing, 2006.
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    depthwise = feature_group_count == lhs.shape[-1] == rhs.shape[-1]
    if (
        numbers != lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
        or any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        or not (feature_group_count == 1 or depthwise)
        or out_sharding is not None
    ):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            out_sharding=out_sharding,
            preferred_element_type=preferred_element_type,
        )

    kh, kw, _, features = rhs.shape
    strides = (window_strides[0], window_strides[1])
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], (kh, kw), strides, padding)
    x = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    if feature_group_count > 1:
        return _depthwise(x, rhs, strides)
    if (kh, kw, *strides) != (1, 1, 1, 1):
        x = _patches(x.shape[1:3], (kh, kw), strides, x)
    # One plain matrix product: contracting the four-dimensional array is up to four times slower.
    y = jnp.dot(
        x.reshape(-1, kh * kw * lhs.shape[-1]),
        rhs.reshape(-1, features),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return y.reshape(*x.shape[:3], features)


def _outputs(size: int, kernel: int, stride: int) -> int:
    return (size - kernel) // stride + 1


def _spread(y: Array, axis: int, low: int, size: int, stride: int) -> tuple[int, int, int]:
    """`lax.pad` entry that puts `y` back on an axis of `size`, `stride` apart, from `low` on."""
    return low, size - low - (y.shape[axis] - 1) * stride - 1, stride - 1


def _gather(size: Pair, kernel: Pair, strides: Pair, x: Array) -> Array:
    """[B, H, W, C] with (H, W) = size -> [B, h, w, kh, kw, C].

    Along one axis and then the other: long runs are copied, twice as fast on CPU as one gather.
    """
    (kh, kw), (sh, sw) = kernel, strides
    h, w = _outputs(size[0], kh, sh), _outputs(size[1], kw, sw)
    x = jnp.stack([x[:, :, j : j + (w - 1) * sw + 1 : sw] for j in range(kw)], axis=3)
    return jnp.stack([x[:, i : i + (h - 1) * sh + 1 : sh] for i in range(kh)], axis=3)


def _patches_forward(size: Pair, kernel: Pair, strides: Pair, x: Array) -> tuple[Array, None]:
    return _patches(size, kernel, strides, x), None


def _scatter(size: Pair, kernel: Pair, strides: Pair, _: None, dp: Array) -> tuple[Array]:
    """The transpose of `_gather`: adds each patch up where it came from."""
    zero = jnp.zeros((), dp.dtype)
    dx = zero
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = _spread(dp, 1, i, size[0], strides[0])
            columns = _spread(dp, 2, j, size[1], strides[1])
            dx += lax.pad(dp[:, :, :, i, j], zero, ((0, 0, 0), rows, columns, (0, 0, 0)))
    return (dx,)


_patches = jax.custom_vjp(_gather, nondiff_argnums=(0, 1, 2))
_patches.defvjp(_patches_forward, _scatter)


def _shifts(x: Array, kernel: Pair, strides: Pair) -> list[Array]:
    """The kh * kw strided views [B, h, w, C] of x that meet one kernel element each."""
    (kh, kw), (sh, sw) = kernel, strides
    h, w = _outputs(x.shape[1], kh, sh), _outputs(x.shape[2], kw, sw)
    return [
        x[:, i : i + (h - 1) * sh + 1 : sh, j : j + (w - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]


def _shifted_sum(x: Array, kernel: Array, strides: Pair) -> Array:
    """[B, H, W, C] and [kh, kw, 1, C] -> [B, h, w, C]."""
    kh, kw, _, features = kernel.shape
    taps = kernel.reshape(kh * kw, features)
    shifts = _shifts(x, (kh, kw), strides)
    return sum((v * k for v, k in zip(shifts[1:], taps[1:], strict=True)), shifts[0] * taps[0])


def _depthwise_forward(x: Array, kernel: Array, strides: Pair) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise(x, kernel, strides), (x, kernel)


def _depthwise_backward(
    strides: Pair, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    kh, kw, _, _ = kernel.shape
    shifts = _shifts(x, (kh, kw), strides)
    dkernel = jnp.stack([jnp.sum(v * dy, axis=(0, 1, 2)) for v in shifts])
    # The output gradient on the input's grid, convolved with the flipped kernel.
    rows = _spread(dy, 1, kh - 1, x.shape[1] + kh - 1, strides[0])
    columns = _spread(dy, 2, kw - 1, x.shape[2] + kw - 1, strides[1])
    spread = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))
    return _depthwise(spread, kernel[::-1, ::-1], (1, 1)), dkernel.reshape(kernel.shape)


_depthwise = jax.custom_vjp(_shifted_sum, nondiff_argnums=(2,))
_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
