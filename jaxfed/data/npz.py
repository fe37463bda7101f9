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

    It holds `x_train` and `x_test`, images uint8 [N, H, W, C] or [N, H, W] (one channel is added),
    or features [N, ...] of any other number type, which reach the network as they are; `y_train`
    and `y_test`, integers [N], or the targets of another task [N, ...]; and optionally
    `client_train` and `client_test`, integers or strings [N] that say whose each example is (the
    natural partition). The number of classes is the largest integer target of both sets plus one.
    Pickled objects are refused.

    Raises:
      DataError: the file or an array in it is not like that.
    """
    arrays = _arrays(path)
    x_train, x_test = (_inputs(path, name, arrays[name]) for name in ("x_train", "x_test"))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{path}: x_train holds examples of {_shape(x_train)} and x_test of {_shape(x_test)}; "
            "expected one size: resize one of them"
        )
    y_train = _targets(path, "y_train", arrays["y_train"], len(x_train))
    y_test = _targets(path, "y_test", arrays["y_test"], len(x_test))
    client_train, client_test = _clients(path, arrays, len(x_train), len(x_test))
    classes = y_train.dtype.kind == y_test.dtype.kind == "i"
    num_classes = int(max(y_train.max(), y_test.max())) + 1 if classes else 0
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


def _inputs(path: str, name: str, inputs: np.ndarray) -> np.ndarray:
    if inputs.size == 0:
        raise DataError(f"{path}: {name} has shape {inputs.shape}; expected at least one example")
    if inputs.dtype == np.uint8:
        if inputs.ndim not in (3, 4):
            raise DataError(
                f"{path}: {name} has shape {inputs.shape}; expected images [N, H, W, C] or "
                "[N, H, W]: save what is no image as int32 or float32"
            )
        return inputs if inputs.ndim == 4 else inputs[..., None]
    if inputs.dtype.kind not in "iufb" or inputs.ndim < 2:
        raise DataError(
            f"{path}: {name} is {inputs.dtype} {inputs.shape}; expected uint8 images [N, H, W, C], "
            "or numbers [N, ...]"
        )
    _check_finite(path, name, inputs)
    if inputs.dtype.kind == "f":
        return inputs.astype(np.float32) if inputs.dtype.itemsize < 4 else inputs
    return inputs.astype(np.int32)


def _targets(path: str, name: str, targets: np.ndarray, length: int) -> np.ndarray:
    if targets.dtype.kind not in "iufb":
        raise DataError(f"{path}: {name} has dtype {targets.dtype}; expected numbers")
    if targets.ndim < 1 or len(targets) != length:
        raise DataError(
            f"{path}: {name} has shape {targets.shape}; expected ({length}, ...), targets for "
            "every example"
        )
    if targets.size == 0:
        raise DataError(f"{path}: {name} has shape {targets.shape}; expected at least one target")
    if targets.dtype.kind == "f":
        _check_finite(path, name, targets)
        return targets
    low, high = int(targets.min()), int(targets.max())
    if (low < 0 and targets.ndim == 1) or high >= MAX_CLASSES:
        raise DataError(
            f"{path}: {name} has labels from {low} to {high}; expected class numbers from 0 to "
            f"at most {MAX_CLASSES - 1}: number them with np.unique(..., return_inverse=True)"
        )
    return targets.astype(np.int32)


def _check_finite(path: str, name: str, array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(
            f"{path}: {name} has dtype {array.dtype} with NaN or infinity; expected finite numbers"
        )


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
