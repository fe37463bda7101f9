"""Decoded datasets on disk: a folder of plain `.npy` files that the next start maps into memory.

A folder is written beside its place and then renamed into it, so it is whole or absent, however
many processes write it at once. `info.json` holds a checksum of every file: a folder that does not
match is as good as absent.
"""

import json
import mmap
import os
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from jaxfed.data.dataset import Dataset

FORMAT = 1
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
ATTEMPTS = 3


def root() -> Path:
    """The folder of all caches: `$JAXFED_CACHE_DIR`, or `jaxfed` in the user's cache folder."""
    if explicit := os.environ.get("JAXFED_CACHE_DIR"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxfed"


def fetch(folder: Path) -> Dataset | None:
    """The dataset kept in `folder`, its arrays mapped read-only; None if absent or damaged."""
    try:
        info = json.loads((folder / "info.json").read_text())
        if info["format"] != FORMAT:
            return None
        if any(info["crc32"][name] != _crc32(folder / f"{name}.npy") for name in ARRAYS):
            return None
        x_train, y_train, x_test, y_test = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS
        )
        return Dataset(
            name=info["name"],
            x_train=x_train,
            y_train=y_train,
            x_test=x_test,
            y_test=y_test,
            num_classes=info["num_classes"],
            notes=tuple(info["notes"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(folder: Path, dataset: Dataset) -> None:
    """Keep `dataset` in `folder`, instead of what may be there unless that is sound.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=".new-", ignore_cleanup_errors=True
    ) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        crc32 = {}
        for name in ARRAYS:
            np.save(fresh / f"{name}.npy", getattr(dataset, name), allow_pickle=False)
            crc32[name] = _crc32(fresh / f"{name}.npy")
        info = {
            "format": FORMAT,
            "name": dataset.name,
            "num_classes": dataset.num_classes,
            "notes": dataset.notes,
            "crc32": crc32,
        }
        (fresh / "info.json").write_text(json.dumps(info, indent=1))
        for attempt in range(ATTEMPTS):
            try:
                fresh.rename(folder)
            except OSError:
                if fetch(folder) is not None:
                    return  # another process was first
                if attempt == ATTEMPTS - 1:
                    raise
                with suppress(FileNotFoundError):  # another process may clear it away, too
                    folder.rename(Path(scratch) / f"damaged-{attempt}")
            else:
                return


def _crc32(file: Path) -> int:
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return zlib.crc32(content)
