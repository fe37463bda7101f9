"""States on disk: one `.npz` file a round, whole and right, or refused.

A file holds the leaves of a tree by their path, and notes as JSON. Its checksums (the CRC-32 of
every member of a zip file) are verified when it is read, as are names, shapes and dtypes; nothing
in it is ever unpickled. It knows nothing of devices.
"""

import io
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from jaxfed.config import ConfigError
from jaxfed.folder import CHECKPOINTS, write_atomically

FORMAT = 1
KEEP = 2
NOTES = "notes"


class DamagedError(ValueError):
    """A file that is not what was written."""


def save(path: Path, number: int, tree: Any, notes: dict[str, Any]) -> None:
    """Writes the state after round `number` of the run in a folder, and keeps the newest two.

    Args:
      path: the run's folder.
      number: of the last round that is in the state.
      tree: arrays of any dtype, and PRNG keys.
      notes: anything that JSON can hold.
    """
    arrays, dtypes = {}, {}
    for name, leaf in tree_flatten_with_path(tree)[0]:
        raw = _raw(leaf)
        # numpy's files know no bfloat16: its bits are kept, and its name.
        dtypes[keystr(name)] = raw.dtype.name
        arrays[keystr(name)] = raw.view(f"u{raw.itemsize}") if raw.dtype.kind == "V" else raw
    header = {"format": FORMAT, "round": number, "dtypes": dtypes, "notes": notes}
    arrays[NOTES] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomically(_file(path, number), content.getvalue())
    past = [each for each in rounds(path) if each <= number]
    for old in set(rounds(path)) - set(past[:KEEP]):  # later ones too: a future that was not
        _file(path, old).unlink()


def rounds(path: Path) -> list[int]:
    """Rounds whose state was saved, the newest first."""
    files = (path / CHECKPOINTS).glob("*.npz")
    return sorted((int(file.stem) for file in files if file.stem.isdecimal()), reverse=True)


def load(path: Path, number: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the state after round `number`, as numpy arrays (and PRNG keys), and the notes.

    Args:
      path: the run's folder.
      number: one of `rounds(path)`.
      like: a tree of the structure, shapes and dtypes that are expected.

    Raises:
      DamagedError: if the file is not, to the last bit, what was written.
      ConfigError: if it is, but holds another kind of state.
    """
    file = _file(path, number)
    found, header = _read(file)
    if header["format"] != FORMAT:
        raise ConfigError(f"{file}: got format {header['format']}, expected {FORMAT}")
    leaves, structure = tree_flatten_with_path(like)
    names = [keystr(name) for name, _ in leaves]
    if odd := sorted(found.keys() ^ set(names)):
        got, expected = (odd[0], "none") if odd[0] in found else ("none", odd[0])
        raise _other(file, "an array", got, expected)
    restored = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        raw, is_key = found[name], _is_key(leaf)
        wanted = jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
        dtype = jnp.dtype(header["dtypes"][name])
        if (raw.shape, dtype) != (wanted.shape, wanted.dtype):
            raise _other(
                file, name, f"{dtype}{list(raw.shape)}", f"{wanted.dtype}{list(wanted.shape)}"
            )
        raw = raw.view(dtype)
        if is_key:
            raw = jax.random.wrap_key_data(jnp.asarray(raw), impl=jax.random.key_impl(leaf))
        restored.append(raw)
    return tree_unflatten(structure, restored), header["notes"]


def newest(paths: Sequence[Path], like: Any) -> tuple[int, list[tuple[Any, dict[str, Any]]]] | None:
    """The newest state that all of these runs have whole; a damaged one is passed over, aloud.

    Returns:
      The number of its round, and for every run what `load` gives; None if there is none.

    Raises:
      ConfigError: if it belongs to another experiment.
    """
    common = set.intersection(*(set(rounds(path)) for path in paths))
    for number in sorted(common, reverse=True):
        try:
            return number, [load(path, number, like) for path in paths]
        except DamagedError as error:
            print(f"jaxfed: {error}; going on from an earlier state", file=sys.stderr)
    return None


def _file(path: Path, number: int) -> Path:
    return path / CHECKPOINTS / f"{number:08d}.npz"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> np.ndarray:
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return np.asarray(leaf, order="C")


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    content = io.BytesIO(file.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:
            if broken := archive.testzip():  # compares every member with its checksum
                raise DamagedError(f"{broken} does not match its checksum")
        content.seek(0)
        with np.load(content, allow_pickle=False) as archive:
            found = dict(archive)
        header = json.loads(bytes(found.pop(NOTES)))
    except Exception as error:  # what a broken zip file raises has no common name
        raise DamagedError(f"{file} is damaged ({error})") from None
    return found, header


def _other(file: Path, name: str, got: str, expected: str) -> ConfigError:
    return ConfigError(
        f"--resume: {file} holds another network's state ({name}: got {got}, expected {expected}); "
        "go on with the version that wrote it, or name another --out"
    )
