"""Datasets from one `.npz` file, every array of it checked."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxfed.data.dataset import DataError, Dataset

MAX_CLASSES = 2**16
REQUIRED = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL = ("client_train", "client_test")


def read(path: str) -> Dataset:
    """Read a `.npz` file made by `np.savez` or `np.savez_compressed`.

    It holds `x_train` and `x_test`, uint8 [N, H, W, C] or [N, H, W] (one channel is added);
    `y_train` and `y_test`, integers [N]; and optionally `client_train` and `client_test`, integers
    or strings [N] that say whose each example is (the natural partition). The number of classes is
    the largest label of both sets plus one. Pickled objects are refused.

    Raises:
      DataError: the file or an array in it is not like that.
    """
    arrays = _arrays(path)
    x_train, x_test = (_images(path, name, arrays[name]) for name in ("x_train", "x_test"))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{path}: x_train holds images of {_shape(x_train)} and x_test of {_shape(x_test)}; "
            "expected one size: resize one of them"
        )
    y_train = _labels(path, "y_train", arrays["y_train"], len(x_train))
    y_test = _labels(path, "y_test", arrays["y_test"], len(x_test))
    client_train, client_test = _clients(path, arrays, len(x_train), len(x_test))
    num_classes = int(max(y_train.max(), y_test.max())) + 1
    return Dataset(path, x_train, y_train, x_test, y_test, num_classes, client_train, client_test)


def _arrays(path: str) -> dict[str, np.ndarray]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{path}: no such file; expected a .npz file with {', '.join(REQUIRED)}")
    if not zipfile.is_zipfile(file):
        raise DataError(f"{path}: not a .npz (zip) file; write it with np.savez_compressed")
    try:
        with np.load(file, allow_pickle=False) as archive:
            missing = [name for name in REQUIRED if name not in archive]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise DataError(f"{path}: holds {found}; expected also {', '.join(missing)}")
            arrays = {n: archive[n] for n in (*REQUIRED, *OPTIONAL) if n in archive}
    except DataError:
        raise
    except ValueError as error:
        if "Object arrays" not in str(error):
            reason = "an array is not in .npy format" if "pickle" in str(error) else error
            raise DataError(f"{path}: damaged ({reason}); write it again") from error
        raise DataError(
            f"{path}: holds pickled Python objects; expected plain arrays, images all of one size"
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error}); write it again") from error
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:  # numpy hands out what is no .npy file as bytes
        raise DataError(f"{path}: {', '.join(strange)} not in .npy format; write it again")
    return arrays


def _shape(images: np.ndarray) -> str:
    return "x".join(str(side) for side in images.shape[1:])


def _images(path: str, name: str, images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8:
        nan = " with NaN" if images.dtype.kind == "f" and np.isnan(images).any() else ""
        raise DataError(
            f"{path}: {name} has dtype {images.dtype}{nan}; expected uint8 pixels 0..255: if yours "
            "are 0..1, save (x * 255).round().astype(np.uint8)"
        )
    if images.ndim not in (3, 4):
        raise DataError(
            f"{path}: {name} has shape {images.shape}; expected [N, H, W, C] or [N, H, W]"
        )
    if images.size == 0:
        raise DataError(f"{path}: {name} has shape {images.shape}; expected at least one image")
    return images if images.ndim == 4 else images[..., None]


def _labels(path: str, name: str, labels: np.ndarray, length: int) -> np.ndarray:
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} has dtype {labels.dtype}; expected integer class numbers")
    if labels.shape != (length,):
        raise DataError(
            f"{path}: {name} has shape {labels.shape}; expected ({length},), one label an image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(
            f"{path}: {name} has labels from {low} to {high}; expected class numbers from 0 to "
            f"at most {MAX_CLASSES - 1}: number them with np.unique(..., return_inverse=True)"
        )
    return labels.astype(np.int32)


def _clients(
    path: str, arrays: Mapping[str, np.ndarray], num_train: int, num_test: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Dense client numbers: those of the training set first, then those only in the test set."""
    for name, length in (("client_train", num_train), ("client_test", num_test)):
        ids = arrays.get(name)
        if ids is None:
            continue
        if ids.dtype.kind not in "iuSU":
            raise DataError(f"{path}: {name} has dtype {ids.dtype}; expected integers or strings")
        if ids.shape != (length,):
            raise DataError(
                f"{path}: {name} has shape {ids.shape}; expected ({length},), one client an image"
            )
    train, test = (arrays.get(name) for name in OPTIONAL)
    if train is None:
        if test is not None:
            raise DataError(f"{path}: holds client_test without client_train; expected both")
        return None, None
    known, client_train = np.unique(train, return_inverse=True)
    if test is None:
        return client_train.astype(np.int32), None
    if (train.dtype.kind in "iu") != (test.dtype.kind in "iu"):
        raise DataError(
            f"{path}: client_train has dtype {train.dtype} and client_test {test.dtype}; "
            "expected the same kind of id in both"
        )
    new = np.setdiff1d(test, known)
    everyone = np.concatenate([known, new])
    rank = np.argsort(everyone)
    client_test = rank[np.searchsorted(everyone, test, sorter=rank)]
    return client_train.astype(np.int32), client_test.astype(np.int32)
