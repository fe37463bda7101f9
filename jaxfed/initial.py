"""Initial weights from a file: of jaxfed, of one of its runs, or of Keras."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.config import ConfigError
from jaxfed.core.model import Variables
from jaxfed.core.tree import names
from jaxfed.saved import WEIGHTS, by_name, read_weights

LEAVES = {
    "kernel": "kernel", "depthwise_kernel": "kernel", "bias": "bias", "gamma": "scale",
    "beta": "bias", "moving_mean": "mean", "moving_variance": "var",
}  # fmt: skip
"""Keras' name of an array within its layer -> jaxfed's."""


class Start(NamedTuple):
    """Arrays to start from, by name (`params/conv1/kernel`)."""

    arrays: dict[str, np.ndarray]
    note: str
    """For the header of a run."""
    keras: bool


def read_start(where: str, shapes: Variables, outputs: int) -> Start:
    """Reads initial weights and checks that they fit a network.

    Args:
      where: `weights.npz`, the folder of a run, or a Keras file of weights (`.h5`), such as those
        of keras.applications.
      shapes: the network's variables, or their shapes.
      outputs: number of outputs; the arrays of the last layer, alone, may be absent from a Keras
        file or made for another number, and then start at random.

    Raises:
      ConfigError: if there is no such file, or it holds another network.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise ConfigError(
            f"--init: got {where!r}, expected a weights.npz, the folder of a finished run, or a "
            "Keras .h5 file of weights; check the path"
        )
    keras = path.suffix == ".h5"
    found = _keras_arrays(path, shapes) if keras else _npz_arrays(path)
    wanted = dict(zip(names(shapes), map(np.shape, jax.tree.leaves(shapes)), strict=True))
    arrays, left = {}, []
    for name, shape in wanted.items():
        got = found.get(name)
        if got is not None and got.shape == shape:
            arrays[name] = got
        elif keras and shape and shape[-1] == outputs:
            left.append(name)
        else:
            have = "nothing" if got is None else list(got.shape)
            raise ConfigError(
                f"--init: {where!r} holds another network ({name}: got {have}, expected "
                f"{list(shape)}); set --model.name, --model.width and --data as they were"
            )
    note = f"{len(arrays)} of {len(wanted)} arrays from {where}"
    return Start(arrays, note + (f"; at random: {', '.join(left)}" if left else ""), keras)


def _npz_arrays(path: Path) -> Mapping[str, np.ndarray]:
    try:
        return by_name(read_weights(path))
    except Exception as error:  # what a broken zip file raises has no common name
        raise ConfigError(f"--init: got {str(path)!r}, which cannot be read ({error})") from None


def _keras_arrays(path: Path, shapes: Variables) -> dict[str, np.ndarray]:
    """The arrays of a Keras file under jaxfed's names, which differ in `/` and `_`."""
    try:
        import h5py  # noqa: PLC0415 (optional)
    except ImportError:
        raise ConfigError(
            "--init: a Keras file needs h5py, which is not installed; pip install 'jaxfed[keras]'"
        ) from None
    known = {_flat(name): name for name in names(shapes)}
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        layer, _, leaf = name.rpartition("/")
        leaf = leaf.partition(":")[0]
        if not isinstance(item, h5py.Dataset) or leaf not in LEAVES:
            return
        kind = "stats" if leaf.startswith("moving_") else "params"
        # A group per layer, and the layer's name again within it.
        parts = layer.split("/")
        layer = "/".join(parts[len(parts) // 2 :])
        label = known.get(_flat(f"{kind}/{layer}/{LEAVES[leaf]}"))
        if label is not None:
            value = np.asarray(item)
            # Keras: [height, width, channels, multiplier]; jaxfed: [height, width, 1, channels].
            arrays[label] = value.swapaxes(2, 3) if leaf == "depthwise_kernel" else value

    try:
        with h5py.File(path, "r") as file:
            if "layers" in file and "layer_names" not in file.attrs:
                raise ConfigError(
                    f"--init: got {str(path)!r}, whose arrays have no layer names (Keras 3), "
                    "expected the older .h5 format of keras.applications"
                )
            file.visititems(visit)
    except OSError as error:
        raise ConfigError(f"--init: got {str(path)!r}, which is no HDF5 file ({error})") from None
    return arrays


def _flat(name: str) -> str:
    return name.replace("/", "_")
