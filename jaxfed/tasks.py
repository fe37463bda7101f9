"""The tasks by name: the problem that a network and a dataset pose."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxfed.config import ConfigError, Experiment
from jaxfed.core.model import Model
from jaxfed.core.problem import (
    Pixels,
    Problem,
    classification,
    multilabel,
    next_token,
    regression,
)
from jaxfed.data import Dataset


class TaskSpec(NamedTuple):
    """One row of `TASKS`."""

    build: Callable[[Model, Experiment, Pixels | None, Any], Problem]
    """`(model, experiment, pixels, dtype) -> problem`; numbers of the experiment may be traced."""
    outputs: Callable[[Dataset], int]
    """Number of outputs that a network needs."""
    targets: str
    """What `y_train` and `y_test` are, for error messages."""
    fits: Callable[[np.ndarray], bool]
    """Whether an array can be the targets."""
    uses: tuple[str, ...]
    summary: str


def _integers(y: np.ndarray) -> bool:
    return y.dtype.kind in "iu"


TASKS = {
    "classification": TaskSpec(
        lambda model, experiment, pixels, dtype: classification(
            model, pixels=pixels, dtype=dtype, label_smoothing=experiment.client.label_smoothing
        ),
        lambda data: data.num_classes, "integers [N], one class each",
        lambda y: y.ndim == 1 and _integers(y), ("client.label_smoothing",),
        "one class per example; cross-entropy, accuracy",
    ),
    "next-token": TaskSpec(
        lambda model, experiment, _, dtype: next_token(
            model, dtype=dtype, label_smoothing=experiment.client.label_smoothing
        ),
        lambda data: data.num_classes, "integers [N, length], negative where nothing is predicted",
        lambda y: y.ndim == 2 and _integers(y), ("client.label_smoothing",),
        "one class per position; cross-entropy and accuracy per token",
    ),
    "regression": TaskSpec(
        lambda model, _, pixels, dtype: regression(model, pixels=pixels, dtype=dtype),
        lambda data: int(np.prod(data.y_train.shape[1:])), "numbers [N] or [N, outputs]",
        lambda y: y.ndim in (1, 2) and y.dtype.kind in "iuf", (),
        "numbers; squared and absolute error",
    ),
    "multilabel": TaskSpec(
        lambda model, _, pixels, dtype: multilabel(model, pixels=pixels, dtype=dtype),
        lambda data: data.y_train.shape[1], "0 or 1 [N, labels]",
        lambda y: y.ndim == 2 and bool(np.isin(y, (0, 1)).all()), (),
        "any number of labels per example; cross-entropy and accuracy per label",
    ),
}  # fmt: skip


def task_of(name: str) -> TaskSpec:
    """The row of `TASKS` called `name`.

    Raises:
      ConfigError: if there is none.
    """
    if name not in TASKS:
        raise ConfigError(
            f"--task: got {name}, expected one of {', '.join(TASKS)}, or module:object"
        )
    return TASKS[name]


def check_targets(name: str, dataset: Dataset) -> None:
    """Refuses a dataset whose targets are not those of the task.

    Raises:
      ConfigError: saying what they are.
    """
    spec = task_of(name)
    for part, y in (("y_train", dataset.y_train), ("y_test", dataset.y_test)):
        if not spec.fits(y):
            others = [
                other
                for other, row in TASKS.items()
                if other != name and row.fits(dataset.y_train) and row.fits(dataset.y_test)
            ]
            hint = f"; use --task {' or '.join(others)}" if others else ""
            raise ConfigError(
                f"--task: got {name} for {part} of {y.dtype} {list(y.shape)}, expected "
                f"{spec.targets}{hint}"
            )
