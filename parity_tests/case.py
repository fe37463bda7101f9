"""A case: an experiment turned into what both frameworks are given, number for number.

`make_case(experiment)` draws the batches and the weights; `write(case, folder)` hands them to the
reference as `case.json` and `inputs.npz`, `digest(case)` is the hash of exactly that.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxfed import (
    Examples,
    Experiment,
    Model,
    Plan,
    Problem,
    Variables,
    classification,
    from_nnx,
    make_plan,
    prepare,
)
from jaxfed.config import override, value_of
from jaxfed.core.problem import PIXELS
from jaxfed.core.tree import Tree
from jaxfed.models import builder
from jaxfed.plan import PADDING
from jaxfed.precision import compute_dtype, precision
from jaxfed.prepare import Task

WALK = 4
"""Steps that are taken one by one."""

ALGORITHMS = ("fedavg", "fedprox", "fedsgd", "central")
OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "adamw", "adagrad", "rmsprop", "yogi")
"""What `tff_reference` has."""

ABSENT: dict[str, tuple[Any, ...]] = {
    "task": (None, "classification"),
    "init": (None,),
    "model.input_range": (None, "0..1"),
    "model.frozen": (None,),
    "client.clip": (None,),
    "client.label_smoothing": (None,),
    "server.aggregator": (None, "mean"),
    "server.warmup": (None,),
    **{
        f"{group}.{key}": (None, "constant") if key == "schedule" else (None,)
        for group in ("client", "server")
        for key in ("b1", "b2", "epsilon", "weight_decay", "schedule", "lr_decay")
    },
}
"""Keys that the reference is not given, with the values that say what it does."""


class NotComparable(ValueError):  # noqa: N818 (an answer, not a bug)
    """An experiment that TFF cannot express: what was got, what TFF has, what to do."""


class Case(NamedTuple):
    """One experiment as both frameworks are given it, all arrays in host memory."""

    task: Task
    """The experiment with every default filled in, and its network without dropout."""
    start: Variables
    train: Examples
    test: Examples
    plans: list[Plan]
    """One a round; their rows are rows of `train`."""
    walk: np.ndarray
    """Batches [steps, batch] that are also taken one by one, each from the reference's weights."""
    dropout: bool
    """Whether the experiment's own network has dropout, which is off on both sides."""

    @property
    def model(self) -> Model:
        """The network of the task."""
        assert self.task.model is not None
        return self.task.model


def make_case(
    experiment: Experiment,
    *,
    rounds: int | None = None,
    test_examples: int = 2000,
    scramble: bool = False,
    nan_seat: int | None = None,
) -> Case:
    """Draws everything an experiment leaves to chance.

    Args:
      experiment: what to compare; `batch_stats` may be left out, it is TFF's `frozen` then.
      rounds: instead of the experiment's.
      test_examples: at most so many test images are evaluated.
      scramble: weights at random instead of the network's own start, biases, scales and moving
        statistics too, so that no two of them can be mistaken for each other.
      nan_seat: put NaN into the images of the client in this seat of the first round.

    Raises:
      NotComparable: if TFF cannot express the experiment. ConfigError, DataError: if it is none.
    """
    refuse(experiment)
    if experiment.algorithm != "central" and experiment.model.batch_stats is None:
        # Refused by `prepare` where there is no BatchNorm.
        task = prepare(experiment)
        if task.experiment.model.batch_stats is not None:
            task = prepare(override(experiment, {"model.batch_stats": "frozen"}))
    else:
        task = prepare(experiment)
    if not task.dataset.has_images:
        raise NotComparable(
            f"--data.dataset: got {task.dataset.name}, whose inputs are not images, but the "
            "reference's networks take nothing else"
        )
    task, dropout = _without_dropout(task)
    count = rounds or experiment.rounds
    plans = [make_plan(task.schedule, number) for number in range(1, count + 1)]
    used = np.unique(np.concatenate([plan.rows[plan.rows >= 0] for plan in plans]))
    plans = [plan._replace(rows=_places(np.asarray(plan.rows), used)) for plan in plans]
    data = task.dataset
    images: np.ndarray = np.asarray(data.x_train[used])
    if nan_seat is not None:
        images = images.astype(np.float64) / 255
        images[plans[0].rows[nan_seat, 0, 0]] = np.nan
    with precision(task.experiment):
        key = jax.random.key(task.experiment.seed)
        init = task.problem.init
        shapes = jax.eval_shape(init, key)
        # Drawn by NumPy, scrambled weights are the same whatever the version of JAX.
        start = _scrambled(shapes, task.experiment.seed) if scramble else init(key)
    return Case(
        task=task,
        start=jax.tree.map(np.asarray, start),
        train=Examples(images, data.y_train[used].astype(np.int32)),
        test=Examples(data.x_test[:test_examples], data.y_test[:test_examples].astype(np.int32)),
        plans=plans,
        walk=_walk(np.asarray(plans[0].rows)),
        dropout=dropout,
    )


def refuse(experiment: Experiment) -> None:
    """Raises NotComparable for what TFF 0.87, or Keras for central training, cannot express."""
    model, central = experiment.model, experiment.algorithm == "central"
    if experiment.algorithm not in ALGORITHMS:
        raise NotComparable(
            f"--algorithm: got {experiment.algorithm}, but the reference has only "
            f"{', '.join(ALGORITHMS)}; use one of them"
        )
    for key, allowed in ABSENT.items():
        if (value := value_of(experiment, key)) not in allowed:
            raise NotComparable(
                f"--{key}: got {value}, which the reference does not have; leave it out"
            )
    for group, config in (("client", experiment.client), ("server", experiment.server)):
        if config.optimizer not in (None, *OPTIMIZERS):
            raise NotComparable(
                f"--{group}.optimizer: got {config.optimizer}, but the reference has only "
                f"{', '.join(OPTIMIZERS)}; use one of them"
            )
        if config.optimizer in (None, "sgd") and config.momentum is not None:
            raise NotComparable(
                f"--{group}.momentum: got {config.momentum} with optimizer sgd, which has none in "
                f"the reference; use --{group}.optimizer momentum"
            )
    allowed = (None, "mean") if central else (None, "frozen")
    if model.batch_stats not in allowed:
        raise NotComparable(
            f"--model.batch_stats: got {model.batch_stats}, but {'Keras' if central else 'TFF'} "
            f"has only what is called {allowed[1]} here; use {allowed[1]} or leave it out"
        )
    if experiment.algorithm == "fedsgd" and experiment.dtype == "float64":
        raise NotComparable(
            "--dtype: got float64 with algorithm fedsgd, but TFF's build_fed_sgd multiplies "
            "gradients by float32 numbers of examples; use float32"
        )
    if experiment.dtype == "bfloat16":
        raise NotComparable("--dtype: got bfloat16, expected float32 or float64; use one of them")
    if central and experiment.client.optimizer in ("yogi", "rmsprop"):
        raise NotComparable(
            f"--client.optimizer: got {experiment.client.optimizer} with algorithm central, "
            "but Keras' has another rule or none; use sgd, momentum, nesterov, adam or adagrad"
        )
    if not central and "nesterov" in (experiment.client.optimizer, experiment.server.optimizer):
        raise NotComparable(
            "--client.optimizer, --server.optimizer: got nesterov, which tff.learning.optimizers "
            "does not have; use momentum"
        )
    if experiment.algorithm == "fedsgd" and experiment.weighting == "uniform":
        raise NotComparable(
            "--weighting: got uniform with algorithm fedsgd, but TFF's build_fed_sgd weights by "
            "examples only; leave it out"
        )


def remade(task: Task, change: Callable[[nnx.Module], None]) -> Task:
    """The task with a network of which `change` has seen every module once it was built."""
    config, dtype = task.experiment.model, compute_dtype(task.experiment)
    build = builder(
        config.name, task.dataset.x_train.shape[1:], task.dataset.num_classes,
        width=config.width or 1.0, norm=config.norm, dtype=dtype,
    )  # fmt: skip

    def built(rngs: nnx.Rngs) -> nnx.Module:
        module = build(rngs)
        for _, child in nnx.iter_modules(module):
            change(child)
        return module

    with precision(task.experiment):
        model = from_nnx(built)

    def problem(experiment: Experiment) -> Problem:
        return classification(model, pixels=PIXELS, dtype=compute_dtype(experiment))

    return task._replace(model=model, make_problem=problem)


def _without_dropout(task: Task) -> tuple[Task, bool]:
    found = []

    def change(module: nnx.Module) -> None:
        if isinstance(module, nnx.Dropout):
            found.append(module.rate)
            module.rate = 0.0

    return remade(task, change), any(found)


def _places(rows: np.ndarray, used: np.ndarray) -> np.ndarray:
    places = np.searchsorted(used, np.maximum(rows, 0))
    return np.where(rows >= 0, places, PADDING).astype(np.int32)


def _walk(rows: np.ndarray) -> np.ndarray:
    """The first batches of the client that takes most steps, and its last, which may be smaller."""
    busiest = rows[np.argmax((rows >= 0).any(-1).sum(-1))]
    real = busiest[(busiest >= 0).any(-1)]
    return real if len(real) <= WALK else np.concatenate([real[: WALK - 1], real[-1:]])


def _scrambled(shapes: Variables, seed: int) -> Variables:
    rng = np.random.default_rng(seed)

    def drawn(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        role = path[-1].key
        if role == "var":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        if role == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            return (rng.uniform(-1, 1, leaf.shape) * math.sqrt(3 / fan_in)).astype(leaf.dtype)
        middle = 1.0 if role == "scale" else 0.0
        return (middle + rng.uniform(-0.2, 0.2, leaf.shape)).astype(leaf.dtype)

    return Variables(*(jax.tree_util.tree_map_with_path(drawn, tree) for tree in shapes))


# --- What the reference is given ------------------------------------------------------------


def flat(tree: Tree) -> dict[str, Any]:
    """A nested dict of arrays by the names of the reference, `conv1/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(part.key) for part in path): leaf for path, leaf in leaves}


def unflat(arrays: dict[str, np.ndarray], like: Tree) -> Tree:
    """The inverse of `flat`, with the structure of `like`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays["/".join(str(part.key) for part in path)], like
    )


def described(case: Case) -> dict[str, Any]:
    """The contents of `case.json`."""
    experiment = case.task.experiment

    def of(config: Any, lr: float) -> dict[str, Any]:
        # None where the algorithm has no such optimizer; the reference is always given one.
        return {
            "optimizer": config.optimizer or "sgd",
            "lr": lr if config.lr is None else config.lr,
            "momentum": config.momentum or 0.0,
        }

    return {
        "dtype": experiment.dtype,
        "network": {
            "name": experiment.model.name,
            "width": experiment.model.width,
            "norm": experiment.model.norm,
            "input_shape": list(case.train.inputs.shape[1:]),
            "num_classes": case.task.dataset.num_classes,
            "dropout": False,
        },
        "algorithm": experiment.algorithm,
        "weighting": experiment.weighting or "examples",
        "prox_mu": experiment.client.mu or 0.0,
        "client": of(experiment.client, 0.1),
        "server": of(experiment.server, 1.0),
    }


def inputs(case: Case) -> dict[str, np.ndarray]:
    """The contents of `inputs.npz`."""
    return {
        "images": np.asarray(case.train.inputs),
        "labels": np.asarray(case.train.targets),
        "rows": np.stack([plan.rows for plan in case.plans]),
        "walk": case.walk,
        "test_images": np.asarray(case.test.inputs),
        "test_labels": np.asarray(case.test.targets),
        **{f"params/{name}": leaf for name, leaf in flat(case.start.params).items()},
        **{f"stats/{name}": leaf for name, leaf in flat(case.start.stats).items()},
    }


def write(
    case: Case, folder: Path, *, forward_only: bool = False, nested: bool = False,
    eval_every: int = 1,
) -> None:  # fmt: skip
    """Writes what the reference is given.

    `forward_only` asks for the first batch alone; `nested` puts the Keras network into a
    Sequential, where TFF's warning about BatchNorm does not look; `eval_every` is for
    `tff_reference.training` alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**described(case), "forward_only": forward_only, "eval_every": eval_every}
    content["network"]["nested"] = nested
    (folder / "case.json").write_text(json.dumps(content, indent=2) + "\n")
    np.savez(folder / "inputs.npz", **inputs(case))  # pyright: ignore[reportArgumentType]


def digest(case: Case) -> str:
    """SHA-256 of everything the reference is given."""
    found = hashlib.sha256(json.dumps(described(case), sort_keys=True).encode())
    for name, array in sorted(inputs(case).items()):
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
