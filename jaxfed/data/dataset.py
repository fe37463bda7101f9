"""`Dataset`, the one form in which images reach the engine, and `load`, which finds one by name."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`, called now and then while something slow goes on."""


SOURCES = {
    "digits": "1797 real 8x8 digits that ship with scikit-learn",
    "NAME": "any image classification dataset of TensorFlow Datasets (needs the extra tfds)",
    "path/to/file.npz": "your own: x_train y_train x_test y_test, perhaps client_train client_test",
}
"""What `load` takes."""


class DataError(ValueError):
    """Data that cannot be used: one line saying what came, what was expected and what to do."""


class Dataset(NamedTuple):
    """Examples with targets, all in host memory (or mapped from the cache, read-only).

    Attributes:
      name: what `load` was asked for.
      x_train: images, pixels 0..255, uint8 [N, H, W, C]; or features, floats or integers [N, ...],
        which reach the network as they are.
      y_train: classes, int32 [N]; or the targets of another task, [N, ...].
      x_test: as x_train, [M, ...].
      y_test: as y_train.
      num_classes: number of classes (or tokens); every label is below it. 0 without classes.
      client_train: natural owner 0..K-1 of each training example, int32 [N], or None.
      client_test: the same for the test examples, int32 [M], or None. A client that is in both
        has one number; those that only occur in the test set are numbered from K on.
      notes: what was done to the data, one sentence each, for the header of a run.
      images: whether inputs are pixels 0..255; None: they are if they are uint8 [N, H, W, C].
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    client_train: np.ndarray | None = None
    client_test: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    images: bool | None = None

    @property
    def has_images(self) -> bool:
        """Whether inputs are pixels 0..255, which are scaled for the network."""
        if self.images is not None:
            return self.images
        return self.x_train.dtype == np.uint8 and np.ndim(self.x_train) == 4


def check(dataset: Dataset) -> None:
    """Checks that a dataset made by hand is as `Dataset` says.

    Raises:
      DataError: naming the field that is not.
    """
    shape = np.shape(dataset.x_train)
    for part, inputs, targets, clients in (
        ("train", dataset.x_train, dataset.y_train, dataset.client_train),
        ("test", dataset.x_test, dataset.y_test, dataset.client_test),
    ):
        for field, array in (("x", inputs), ("y", targets)):
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "iufb":
                raise DataError(
                    f"{dataset.name}: {field}_{part} is a {type(array).__name__}"
                    f"{' of ' + str(array.dtype) if isinstance(array, np.ndarray) else ''}; "
                    "expected a numpy array of numbers: np.asarray(...)"
                )
        pixels = dataset.has_images or (dataset.images is None and inputs.dtype == np.uint8)
        if (
            np.ndim(inputs) < 2
            or len(inputs) == 0
            or np.shape(inputs)[1:] != shape[1:]
            or (pixels and np.ndim(inputs) != 4)
        ):
            wanted = "[N, H, W, C] (uint8 is for images)" if pixels else "[N, ...]"
            raise DataError(
                f"{dataset.name}: x_{part} has shape {np.shape(inputs)}; expected {wanted}, "
                "one size in both sets: add the axis that is missing, or resize"
            )
        if len(np.shape(targets)) < 1 or len(targets) != len(inputs):
            raise DataError(
                f"{dataset.name}: y_{part} is {targets.dtype} {np.shape(targets)}; expected "
                f"({len(inputs)}, ...), targets for every example"
            )
        classes = dataset.num_classes
        labelled = targets.dtype.kind in "iu" and targets.ndim == 1 and classes > 0
        if labelled and (targets.min() < 0 or targets.max() >= classes):
            raise DataError(
                f"{dataset.name}: y_{part} has labels from {targets.min()} to {targets.max()}; "
                f"expected 0 to {classes - 1}: change them or num_classes"
            )
        if clients is not None and np.shape(clients) != (len(inputs),):
            raise DataError(
                f"{dataset.name}: client_{part} has shape {np.shape(clients)}; expected "
                f"({len(inputs)},), one client per example"
            )


def load(name: str, progress: Progress | None = None) -> Dataset:
    """Load a dataset by name.

    Args:
      name: `digits` (1797 real 8x8 digits that ship with scikit-learn), a path that ends in `.npz`
        (see `jaxfed.data.npz.read`), or any image classification dataset of TensorFlow Datasets,
        `mnist`, `emnist/digits`, `mnist:3.0.1` (see `jaxfed.data.tfds.read`).
      progress: called while images are downloaded or decoded for the first time.

    Raises:
      DataError: the name is unknown, or the data is not what it should be.

    >>> digits = load("digits")
    >>> digits.x_train.shape, digits.x_test.shape, digits.num_classes
    ((1438, 8, 8, 1), (359, 8, 8, 1), 10)
    """
    # Imported here because each needs what is defined above, and a run needs only one of them.
    from jaxfed.data import npz, tfds  # noqa: PLC0415

    if name == "digits":
        return _digits()
    if name.endswith(".npz"):
        return npz.read(name)
    return tfds.read(name, progress)


def _digits() -> Dataset:
    """Scikit-learn's digits (UCI optdigits test part), a fifth of every class kept for testing."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 (half a second)

    pixels, labels = load_digits(return_X_y=True)
    x = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    y = np.asarray(labels, np.int32)
    # A split of our own: it must be the same on every machine whatever scikit-learn does later.
    order = np.lexsort((np.random.Generator(np.random.PCG64(0)).random(len(y)), y))
    counts = np.bincount(y)
    rank = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_test = np.empty(len(y), bool)
    in_test[order] = rank < np.round(counts[y[order]] * 0.2)
    return Dataset("digits", x[~in_test], y[~in_test], x[in_test], y[in_test], num_classes=10)
