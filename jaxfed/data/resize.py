"""Fit images to the side that a network needs, once, before training."""

import numpy as np

from jaxfed.data.dataset import DataError, Dataset

CHUNK = 4096  # images resized at a time: float32 copies of a whole dataset would not fit


def fit(dataset: Dataset, size: int | None = None, minimum: int = 1) -> Dataset:
    """Pad or resize the images to squares of one side, and say so in the notes.

    Images that are not square are first zero-padded to a square. After that, growing by less than
    a factor of two pads with zeros, centred (28 -> 32, as is usual for MNIST); everything else is
    a bilinear resize with half-pixel centres, antialiased when it shrinks (`jax.image.resize`).

    Args:
      dataset: images uint8 [N, H, W, C].
      size: side in pixels; None keeps the longer side of the images, or `minimum` if that is more.
      minimum: smallest side that the network accepts, in pixels.

    Raises:
      DataError: `size` is below `minimum` or below 1, or inputs that are no images would change.

    >>> from jaxfed.data import load
    >>> fit(load("digits"), minimum=12).notes
    ('images padded from 8x8 to 12x12',)
    """
    if np.ndim(dataset.x_train) != 4:
        if size is None and minimum <= 1:
            return dataset
        wanted = f"image_size {size}" if size is not None else f"a network for images of {minimum}"
        raise DataError(
            f"{dataset.name}: got {wanted} for inputs of shape {dataset.x_train.shape[1:]}; "
            "expected images [N, H, W, C]: choose another network"
        )
    height, width = dataset.x_train.shape[1:3]
    native = max(height, width)
    if size is not None and size < max(minimum, 1):
        raise DataError(
            f"got image_size {size}; expected at least {max(minimum, 1)}, the smallest side that "
            "the model accepts: leave image_size out or choose a smaller model"
        )
    side = max(native, minimum) if size is None else size
    if (height, width) == (side, side):
        return dataset
    pads = native <= side < 2 * native
    how = "padded" if pads else "resized"
    x_train, x_test = (
        _pad(_pad(x, native), side) if pads else _resize(_pad(x, native), side)
        for x in (dataset.x_train, dataset.x_test)
    )
    note = f"images {how} from {height}x{width} to {side}x{side}"
    return dataset._replace(x_train=x_train, x_test=x_test, notes=(*dataset.notes, note))


def _pad(images: np.ndarray, side: int) -> np.ndarray:
    """[N, H, W, C] -> [N, side, side, C], zeros around, the odd row or column at the end."""
    count, height, width, channels = images.shape
    if (height, width) == (side, side):
        return images
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.zeros((count, side, side, channels), images.dtype)
    padded[:, top : top + height, left : left + width] = images
    return padded


def _resize(images: np.ndarray, side: int) -> np.ndarray:
    """[N, S, S, C] -> [N, side, side, C] of the same dtype: one set of weights for both axes."""
    weights = _bilinear(images.shape[1], side)
    resized = np.empty((len(images), side, side, images.shape[3]), images.dtype)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].astype(np.float32)
        chunk = np.einsum("ah,bw,nhwc->nabc", weights, weights, chunk, optimize=True)
        if images.dtype.kind != "f":
            chunk = np.clip(np.rint(chunk), 0, 255)
        resized[start : start + CHUNK] = chunk
    return resized


def _bilinear(old: int, new: int) -> np.ndarray:
    """Weights float32 [new, old] of a triangle filter, widened when shrinking; rows sum to one."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, None] - np.arange(old)) / max(scale, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
