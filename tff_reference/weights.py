"""A Keras model's weights under jaxfed's names and in jaxfed's layout, both ways.

jaxfed names a weight by its path, `expanded_conv/squeeze_excite/Conv/kernel`, Keras by a layer's
name, `expanded_conv/squeeze_excite/Conv/kernel:0` or `expanded_conv_project/kernel:0`. The two
agree once every "/" is a "_", but a Keras name alone does not tell where jaxfed has which. So every
function here is told jaxfed's names, and checks that the two sides have the same weights.

Everything goes by lists of variables, `model.trainable_variables` or
`model.non_trainable_variables`: the order of TFF's `ModelWeights` and of a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

LEAVES = {
    "kernel": "kernel",
    "depthwise_kernel": "kernel",
    "bias": "bias",
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}
"""Keras' name of a variable within its layer -> jaxfed's."""


def names(variables: Sequence[tf.Variable], known: Iterable[str]) -> list[str]:
    """jaxfed's name of each variable, in their order.

    Args:
      variables: some of a Keras model's.
      known: jaxfed's names for them, in any order.

    Raises:
      ValueError: if the two are not the same weights, one for one; it lists those that are left
        over on either side.
    """
    given = list(known)
    by_key = {_joined(name): name for name in given}
    keys = [_key(variable) for variable in variables]
    for side, all_of_it in (("names", list(map(_joined, given))), ("Keras variables", keys)):
        if twice := sorted({key for key in all_of_it if all_of_it.count(key) > 1}):
            raise ValueError(f"weights: got several {side} for {_listed(twice)}, expected one each")
    missing, surplus = set(keys) - set(by_key), set(by_key) - set(keys)
    if missing or surplus:
        raise ValueError(
            f"weights: got {len(given)} names, expected the model's {len(keys)}; "
            f"not given: {_listed(sorted(missing))}; "
            f"not in the model: {_listed(sorted(by_key[key] for key in surplus))}"
        )
    return [by_key[key] for key in keys]


def to_jaxfed(
    variables: Sequence[tf.Variable], values: Sequence[np.ndarray], known: Iterable[str]
) -> dict[str, np.ndarray]:
    """Arrays that come in the order of `variables` (weights, gradients), by jaxfed's names.

    Raises:
      ValueError: as `names`.
    """
    labels = names(variables, known)
    return {
        label: _swapped(variable, np.asarray(value))
        for label, variable, value in zip(labels, variables, values, strict=True)
    }


def to_keras(
    variables: Sequence[tf.Variable], arrays: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """The inverse of `to_jaxfed`: arrays by jaxfed's names, in the order of `variables`.

    Raises:
      ValueError: as `names`, or if a shape is not the variable's; it lists all of them.
    """
    labels = names(variables, arrays)
    values = [
        _swapped(variable, np.asarray(arrays[label]))
        for label, variable in zip(labels, variables, strict=True)
    ]
    wrong = [
        f"{label}: got {value.shape}, expected {tuple(variable.shape)}"
        for label, variable, value in zip(labels, variables, values, strict=True)
        if value.shape != tuple(variable.shape)
    ]
    if wrong:
        raise ValueError(f"weights: shapes differ (in Keras' layout): {_listed(wrong)}")
    return values


def read(variables: Sequence[tf.Variable], known: Iterable[str]) -> dict[str, np.ndarray]:
    """The values of `variables` by jaxfed's names; the errors of `names`."""
    return to_jaxfed(variables, [variable.numpy() for variable in variables], known)


def assign(variables: Sequence[tf.Variable], arrays: Mapping[str, np.ndarray]) -> None:
    """Sets all of `variables` from arrays by jaxfed's names; the errors of `to_keras`."""
    for variable, value in zip(variables, to_keras(variables, arrays), strict=True):
        variable.assign(value)


def load(model: tf.keras.Model, path: str) -> None:
    """Sets all weights of a Keras model from the `weights.npz` of a jaxfed run.

    The model has jaxfed's layers under jaxfed's names; keras.applications' MobileNets and
    `tff_reference.networks.build` do.

    Raises:
      ValueError: if the two have not the same weights, or not of the same shapes.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    kinds = {"params/": model.trainable_variables, "stats/": model.non_trainable_variables}
    for kind, variables in kinds.items():
        ours = {n.removeprefix(kind): a for n, a in arrays.items() if n.startswith(kind)}
        assign(variables, ours)


def _path(variable: tf.Variable) -> tuple[str, str]:
    layer, _, leaf = variable.name.rpartition(":")[0].rpartition("/")
    return layer, leaf


def _key(variable: tf.Variable) -> str:
    layer, leaf = _path(variable)
    if leaf not in LEAVES:
        raise ValueError(
            f"weights: got the Keras variable {variable.name}, expected one of the kinds "
            f"{', '.join(LEAVES)}; jaxfed has no name for it"
        )
    return _joined(f"{layer}/{LEAVES[leaf]}")


def _joined(path: str) -> str:
    return path.replace("/", "_")


def _swapped(variable: tf.Variable, array: np.ndarray) -> np.ndarray:
    """A depthwise kernel from Keras' (h, w, C, 1) to jaxfed's (h, w, 1, C), or back."""
    depthwise = _path(variable)[1] == "depthwise_kernel" and array.ndim == 4
    return array.swapaxes(2, 3) if depthwise else array


def _listed(items: list[str]) -> str:
    return ", ".join(items) if items else "none"
