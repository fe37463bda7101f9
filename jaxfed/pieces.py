"""The network and the problem of an experiment: named in a table, or the user's own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxfed import data, models, own
from jaxfed.config import ConfigError, Experiment
from jaxfed.core.model import Model, Variables, from_nnx
from jaxfed.core.problem import PIXELS, Examples, Problem, constant
from jaxfed.core.tree import matching
from jaxfed.precision import compute_dtype, precision
from jaxfed.tasks import task_of

RANGES = {"0..1": PIXELS, "-1..1": (-1.0, 1.0), "0..255": (0.0, 255.0)}
"""`model.input_range` as numbers."""

MakeProblem = Callable[[Model], Problem]
Build = Callable[[nnx.Rngs], nnx.Module]


class Pieces(NamedTuple):
    """The user's own pieces; None where the experiment names one."""

    model: Model | None
    build: Build | None
    problem: Problem | MakeProblem | None
    network: str | None
    """How an own network is recorded."""
    task: str | None
    """How an own problem is recorded."""


def pieces_of(
    experiment: Experiment, model: Model | None, build: Build | None,
    problem: Problem | MakeProblem | None,
) -> Pieces:  # fmt: skip
    """Takes the user's own pieces, given in Python or named by the experiment.

    Raises:
      ConfigError: for pieces that exclude each other, or keys that an own network does not use.
    """
    name, network, task = experiment.model.name, None, None
    if model is not None or build is not None:
        network = own.name_of(build, "own") if build is not None else "own"
    elif own.is_own(name):
        found = own.load_object(name, "model.name")
        model, build = (found, None) if isinstance(found, Model) else (None, found)
        network = name
    if problem is not None:
        task = own.name_of(problem, "own")
    elif experiment.task is not None and own.is_own(experiment.task):
        problem = own.load_object(experiment.task, "task")
        task = experiment.task
    if isinstance(problem, Problem):
        if model is not None or build is not None:
            raise ConfigError(
                "problem: got a network too, expected one of them, since a Problem has a network; "
                "leave the network out, or give model -> Problem"
            )
        network = "own"
    if network is not None:
        for key, value in (("width", experiment.model.width), ("norm", experiment.model.norm)):
            if value is not None:
                raise ConfigError(
                    f"--model.{key}: got {value} with a network of your own, which does not use "
                    "it; leave it out"
                )
    return Pieces(model, build, problem, network, task)


def outputs_of(dataset: data.Dataset, task_name: str, pieces: Pieces) -> int:
    """Number of outputs that a network needs."""
    return (
        dataset.num_classes if pieces.problem is not None else task_of(task_name).outputs(dataset)
    )


def network_of(
    experiment: Experiment, dataset: data.Dataset, pieces: Pieces, task_name: str
) -> Model:
    """The network of an experiment, or the user's own NNX module, as a `Model`."""
    build = pieces.build
    outputs = outputs_of(dataset, task_name, pieces)
    if build is None and outputs < 1:
        raise ConfigError(
            f"--model.name: got {experiment.model.name} for a problem of your own on data without "
            "classes, which does not say how many outputs it needs; bring a network too"
        )
    if build is None:
        build = models.builder(
            experiment.model.name, dataset.x_train.shape[1:], outputs,
            width=1.0 if experiment.model.width is None else experiment.model.width,
            norm=experiment.model.norm, dtype=compute_dtype(experiment),
        )  # fmt: skip
    with precision(experiment):
        return from_nnx(build)


def problem_of(
    dataset: data.Dataset, pieces: Pieces, task_name: str
) -> Callable[[Experiment], Problem]:
    """Makes `experiment -> problem`; numbers of the experiment may be traced."""
    given, model = pieces.problem, pieces.model

    def make(experiment: Experiment) -> Problem:
        if isinstance(given, Problem):
            made = given
        elif given is not None:
            assert model is not None
            made = given(model)
        else:
            assert model is not None
            pixels = RANGES[experiment.model.input_range or "0..1"] if dataset.has_images else None
            made = task_of(task_name).build(model, experiment, pixels, compute_dtype(experiment))
        if experiment.model.frozen is None:
            return made
        return constant(made, matching(*experiment.model.frozen.split(",")))

    return make


def checked(
    problem: Problem, dataset: data.Dataset, experiment: Experiment, pieces: Pieces
) -> Variables:
    """The shapes of the network's variables; refuses one that does not keep its promises."""
    if not isinstance(problem, Problem):
        raise ConfigError(
            f"problem: got a {type(problem).__name__}, expected a jaxfed.Problem or a function "
            "model -> Problem"
        )
    shapes = jax.eval_shape(problem.init, jax.random.key(0))
    if not isinstance(shapes, Variables):
        raise ConfigError(
            f"model: init gives a {type(shapes).__name__}, expected jaxfed.Variables(params, stats)"
        )
    if pieces.network is None and pieces.problem is None:
        return shapes
    if pieces.model is not None:
        _check_model(pieces.model, shapes, dataset, experiment, pieces)
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
        metrics, _ = jax.eval_shape(
            lambda variables, examples, rows, key: problem.metrics(
                variables, examples, rows, True, key
            ),
            shapes, examples_like(dataset), rows, jax.random.key(0),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: does not fit the data ({str(error).splitlines()[0]})") from error
    if "loss" not in metrics or problem.score not in metrics:
        raise ConfigError(
            f"problem: got the metrics {', '.join(metrics)}, expected loss and the score "
            f"{problem.score} among them"
        )
    return shapes


def examples_like(dataset: data.Dataset) -> Examples:
    """Shapes and dtypes of the training set as the program takes it."""

    def like(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))

    return Examples(like(dataset.x_train), like(dataset.y_train))


def _check_model(
    model: Model, shapes: Any, dataset: data.Dataset, experiment: Experiment, pieces: Pieces
) -> None:
    batch, dtype = 2, dataset.x_train.dtype
    if dataset.has_images or dtype.kind == "f":
        dtype = compute_dtype(experiment)
    inputs = jax.ShapeDtypeStruct(
        (batch, *dataset.x_train.shape[1:]), jax.dtypes.canonicalize_dtype(dtype)
    )
    mask = jax.ShapeDtypeStruct((batch,), bool)
    given = jax.eval_shape(
        lambda variables, inputs, mask, key: model.apply(variables, inputs, mask, True, key),
        shapes, inputs, mask, jax.random.key(0),
    )  # fmt: skip
    if not isinstance(given, tuple) or len(given) != 2:
        raise ConfigError(
            f"model: apply gives a {type(given).__name__}, expected the pair (logits, stats)"
        )
    logits, stats = given
    if pieces.problem is None and experiment.task in (None, "classification"):
        shape, classes = getattr(logits, "shape", None), dataset.num_classes
        if shape is None or len(shape) != 2 or shape[0] != batch or shape[1] < classes:
            raise ConfigError(
                f"model: apply gives logits {shape} for {batch} images, expected ({batch}, "
                f"{classes}), a number for every class; change its last layer"
            )
    if jax.tree.map(jnp.shape, stats) != jax.tree.map(jnp.shape, shapes.stats):
        raise ConfigError(
            "model: apply gives other stats than init; return the updated ones, or variables.stats "
            "if there are none"
        )
