"""Index plans as batches: the same rows, in the same order, as another framework visits them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf


def scaled(images: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 pixels as numbers from 0 to 1; floating point images as they are."""
    if images.dtype == np.uint8:
        return images.astype(dtype) / np.asarray(255, dtype)
    return images.astype(dtype)


def in_order(count: int, batch: int) -> np.ndarray:
    """The index table [steps, batch] of rows 0 to count - 1, one after another."""
    rows = np.full(-(-count // batch) * batch, -1, np.int32)
    rows[:count] = np.arange(count)
    return rows.reshape(-1, batch)


def real(table: np.ndarray) -> Iterator[np.ndarray]:
    """The batches of an index table `[steps, batch]`, without padding (-1)."""
    for rows in table:
        if (rows >= 0).any():
            yield rows[rows >= 0]


def dataset(images: np.ndarray, labels: np.ndarray, table: np.ndarray) -> Any:
    """A `tf.data.Dataset` of the batches of an index table; it holds only the images it visits."""
    rows = np.concatenate([*real(table), np.zeros(0, table.dtype)])
    used, local = np.unique(rows, return_inverse=True)
    table = table[(table >= 0).any(axis=1)]
    places = np.full(table.shape, -1, np.int32)
    places[table >= 0] = local
    x, y = tf.constant(images[used]), tf.constant(labels[used].astype(np.int32))

    def batch(place: Any) -> tuple[Any, Any]:
        place = tf.boolean_mask(place, place >= 0)
        return tf.gather(x, place), tf.gather(y, place)

    return tf.data.Dataset.from_tensor_slices(places).map(batch)
