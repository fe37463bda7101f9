"""Datasets from TensorFlow Datasets (TFDS), decoded once into the cache.

TFDS itself is imported only when the cache does not have the dataset: that import takes longer than
everything else here. Prepared `array_record` files are read without TensorFlow.
"""

import difflib
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.data import cache
from jaxfed.data.dataset import DataError, Dataset, Progress

INSTALL = "pip install 'jaxfed[tfds]'"
BATCH = 500  # records read at once: three times faster than one by one; threads do not help
COMMON = ("mnist", "fashion_mnist", "kmnist", "emnist/digits", "cifar10", "cifar100")


def read(name: str, progress: Progress | None = None) -> Dataset:
    """Read a TFDS image classification dataset, in its stored order, splits `train` and `test`.

    It is looked for in `$JAXFED_DATA_DIR`, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`, and
    downloaded and prepared there by TFDS if it is absent. The decoded arrays are kept in the cache
    (`jaxfed.data.cache.root`) under a fingerprint of the prepared files, so another version or
    another folder never meets the wrong arrays. Without a `test` split, `validation` is used.

    Raises:
      DataError: no such dataset; it cannot be prepared or read; not one image and one label of
        fixed size and known class an example.
    """
    where = data_dir()
    if not re.fullmatch(r"\w+(/\w[\w.+-]*)*(:[\w.*]+)?", name):
        raise _unknown(name, COMMON)
    folder = _cache_folder(name, where)
    if folder is not None and (kept := cache.fetch(folder)) is not None:
        return kept
    dataset = _decode(name, where, progress)
    folder = _cache_folder(name, where)  # again: it may have been prepared only now
    if folder is None:  # a bucket, not a local folder
        return dataset
    try:
        cache.store(folder, dataset)
    except OSError as error:
        note = f"not cached ({error}): decoded at every start; set JAXFED_CACHE_DIR"
        return dataset._replace(notes=(*dataset.notes, note))
    return cache.fetch(folder) or dataset  # mapped, as in every later start


def data_dir() -> str:
    """Where datasets are looked for: `$JAXFED_DATA_DIR`, `$TFDS_DATA_DIR` or TFDS's own folder."""
    return (
        os.environ.get("JAXFED_DATA_DIR")
        or os.environ.get("TFDS_DATA_DIR")
        or "~/tensorflow_datasets"
    )


def _cache_folder(name: str, data_dir: str) -> Path | None:
    """Where the arrays of the files prepared for `name` are kept; None if there are no files."""
    prepared = Path(data_dir).expanduser() / name.partition(":")[0]
    files = sorted(path for path in prepared.rglob("*") if path.is_file())
    if not files:
        return None
    digest = hashlib.sha256(name.encode())
    for file in files:
        digest.update(f"\n{file.relative_to(prepared).as_posix()} {file.stat().st_size}".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return cache.root() / "tfds" / f"{re.sub(r'[/:]', '-', name)}-{digest.hexdigest()[:16]}"


def _decode(name: str, data_dir: str, progress: Progress | None) -> Dataset:
    try:
        import tensorflow_datasets as tfds  # noqa: PLC0415 (optional, and slow)
    except ImportError as error:
        hint = _suggestion(name, ("digits", *COMMON))
        raise DataError(
            f"got dataset {name!r}{hint}, which tensorflow-datasets reads, and that cannot be "
            f"imported ({error}); run: {INSTALL}"
        ) from error
    with _without_absl_warnings():
        builder = _prepared(tfds, name, data_dir, progress)
        keys = _keys(tfds, name, builder.info)
        test = next((s for s in ("test", "validation") if s in builder.info.splits), None)
        if test is None or "train" not in builder.info.splits:
            raise DataError(
                f"{name}: has splits {', '.join(builder.info.splits)}; expected train and test "
                "(or validation): make a .npz file of it"
            )
        x_train, y_train = _split(tfds, name, builder, split="train", keys=keys, progress=progress)
        x_test, y_test = _split(tfds, name, builder, split=test, keys=keys, progress=progress)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise _several_sizes(name, x_train.shape[1:], x_test.shape[1:])
    num_classes = builder.info.features[keys[1]].num_classes
    notes = () if test == "test" else (f"tested on the {test} split: there is no test split",)
    return Dataset(name, x_train, y_train, x_test, y_test, num_classes, notes=notes)


def _prepared(tfds: Any, name: str, data_dir: str, progress: Progress | None) -> Any:
    """The TFDS builder of `name`, its files present."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)  # the others need the network
        raise _unknown(name, ("digits", *known)) from error
    except ImportError as error:
        reason = _first_line(error)
        raise DataError(
            f"got dataset {name!r}, which needs more ({reason}); run: {INSTALL}"
        ) from error
    except Exception as error:  # TFDS raises anything, AssertionError too
        raise DataError(
            f"got dataset {name!r}{_configs(tfds, name)}: {_first_line(error)}"
        ) from error
    if builder.is_prepared():
        return builder
    what = f"downloading {name} with TFDS"
    if progress:
        progress(what, 0, 1)
    try:
        # Not TFDS's default format, because this one can be read without TensorFlow.
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        install = f", or run: {INSTALL}" if isinstance(error, ImportError) else ""
        raise DataError(
            f"got dataset {name!r}, which is not in {data_dir} and could not be downloaded and "
            f"prepared there ({_first_line(error)}); point JAXFED_DATA_DIR at a folder that has "
            f"it{install}"
        ) from error
    if not builder.is_prepared():  # TFDS trusts any folder that exists
        raise DataError(f"got {builder.data_path}, which holds no prepared dataset; delete it")
    if progress:
        progress(what, 1, 1)
    return builder


def _configs(tfds: Any, name: str) -> str:
    """A hint for a wrong config of a known dataset, such as emnist/digit."""
    base, _, config = name.partition(":")[0].partition("/")
    with suppress(Exception):  # a hint is not worth a second error
        known = tfds.builder_cls(base).builder_configs
        if config and config not in known:
            names = [f"{base}/{each}" for each in known]
            return f"{_suggestion(name, names)}, expected one of {', '.join(names)}"
    return ""


def _keys(tfds: Any, name: str, info: Any) -> tuple[str, str]:
    """Names of the image and of the label in an example."""
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    images = [key for key, value in features.items() if type(value) is tfds.features.Image]
    labels = [key for key, value in features.items() if type(value) is tfds.features.ClassLabel]
    supervised = info.supervised_keys
    if supervised and supervised[0] in images and supervised[1] in labels:
        return supervised[0], supervised[1]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{name}: an example has {len(images)} images and {len(labels)} class labels; expected "
            "one of each: choose an image classification dataset or make a .npz file of it"
        )
    return images[0], labels[0]


def _split(
    tfds: Any,
    name: str,
    builder: Any,
    *,
    split: str,
    keys: tuple[str, str],
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, H, W, C] and labels int32 [N] of one split."""
    image, label = keys
    total = builder.info.splits[split].num_examples
    labels = np.full(total, -1, np.int32)
    images = np.empty((total, 0, 0, 0), np.uint8)
    for done, example in enumerate(_examples(tfds, name, builder, split)):
        pixels = example[image]
        if pixels.dtype != np.uint8:
            raise DataError(f"{name}: images have dtype {pixels.dtype}; expected uint8 0..255")
        if done == 0:
            images = np.empty((total, *pixels.shape), np.uint8)
        elif pixels.shape != images.shape[1:]:
            raise _several_sizes(name, images.shape[1:], pixels.shape)
        images[done], labels[done] = pixels, example[label]
        if progress and ((done + 1) % BATCH == 0 or done + 1 == total):
            progress(f"decoding {name} {split}", done + 1, total)
    if total == 0 or labels.min() < 0:
        raise DataError(
            f"{name}: {int((labels < 0).sum())} of {total} examples of split {split} have no "
            "label; expected a labelled split: make a .npz file of it"
        )
    return images, labels


def _examples(tfds: Any, name: str, builder: Any, split: str) -> Iterator[Mapping[str, Any]]:
    """The decoded examples of one split in their stored order."""
    try:
        source = builder.as_data_source(split)
    except NotImplementedError:  # prepared as tfrecord, which only TensorFlow reads
        try:
            # One file after another: the same order as above.
            one_by_one = tfds.ReadConfig(interleave_cycle_length=1)
            records = builder.as_dataset(split=split, shuffle_files=False, read_config=one_by_one)
        except ImportError as error:
            raise DataError(
                f"{name}: prepared in {builder.data_path} as {builder.info.file_format.value}, "
                f"which needs TensorFlow ({error}); run: {INSTALL}"
            ) from error
        yield from tfds.as_numpy(records)
        return
    except ImportError as error:
        raise DataError(f"{name}: cannot be read ({error}); run: {INSTALL}") from error
    for start in range(0, len(source), BATCH):
        try:
            batch = source.__getitems__(range(start, min(start + BATCH, len(source))))
        except Exception as error:  # array_record's and Pillow's own
            raise DataError(
                f"{name}: damaged files in {builder.data_path} ({_first_line(error)}); "
                "prepare the dataset again"
            ) from error
        yield from batch


def _several_sizes(name: str, one: tuple[int, ...], other: tuple[int, ...]) -> DataError:
    return DataError(
        f"{name}: holds images of several sizes, {one} and {other}; expected one size: resize "
        "them yourself and make a .npz file"
    )


def _unknown(name: str, known: Iterable[str]) -> DataError:
    return DataError(
        f"got dataset {name!r}{_suggestion(name, known)}; expected digits, a path that ends in "
        ".npz, or a TFDS image classification dataset such as mnist, emnist/digits or cifar10"
    )


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close and close[0] != name else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    # TFDS puts `Failed to construct dataset "x", builder_kwargs "{...}": ` before the reason.
    return lines[0].split('}": ')[-1][:300] if lines else type(error).__name__


@contextmanager
def _without_absl_warnings() -> Iterator[None]:
    """TFDS warns about a folder that it is about to fill, and advertises OpenCV."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
