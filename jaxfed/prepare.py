"""From an experiment to a task: data, partition and network, checked, every default filled in.

All of it happens on the host; what cannot work is refused here, before any compilation.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxfed import data, models
from jaxfed.algorithm import FedAlgorithm
from jaxfed.batch_stats import has_moments
from jaxfed.experiment import WITH_MOMENTUM, ConfigError, Experiment, validate
from jaxfed.model import Model, Variables, count_parameters, from_nnx
from jaxfed.plan import Schedule, make_schedule

MAX_PARAMETERS = MAX_VISITS = 2**31 - 1

MakeAlgorithm = Callable[[Model, Mesh | None], FedAlgorithm]
"""`(model, mesh) -> algorithm`; the mesh is what `map_sum` takes."""


class Task(NamedTuple):
    """An experiment with everything it needs, checked, before anything is compiled."""

    experiment: Experiment
    """With every default filled in."""
    dataset: data.Dataset
    partition: data.Partition
    schedule: Schedule
    model: Model
    parameters: int
    statistics: int
    algorithm: MakeAlgorithm | None = None
    """Instead of the one the experiment names."""


def prepare(
    experiment: Experiment,
    *,
    dataset: data.Dataset | None = None,
    build: Callable[[nnx.Rngs], nnx.Module] | None = None,
    model: Model | None = None,
    algorithm: MakeAlgorithm | None = None,
    progress: data.Progress | None = None,
) -> Task:
    """Loads and divides the data, builds the network, fills in defaults, and checks it all.

    Args:
      experiment: what to run.
      dataset: instead of the one the experiment names.
      build: an NNX module's constructor, `rngs -> module`, instead of `experiment.model.name`.
      model: any `Model`, likewise.
      algorithm: `(model, mesh) -> FedAlgorithm`, instead of `experiment.algorithm`.
      progress: called while a dataset is decoded.

    Raises:
      ConfigError: if the experiment cannot run; DataError if its data cannot be used.
    """
    validate(experiment)
    if model is not None and build is not None:
        raise ConfigError("model: got build too, expected one of them; leave the other out")
    own = model is not None or build is not None
    spec = None if own else models.spec_of(experiment.model.name)
    size = experiment.data.image_size
    if spec is not None and size is not None and size < spec.min_image_size:
        raise ConfigError(
            f"--data.image_size: got {size}, expected {spec.min_image_size} or more for "
            f"{experiment.model.name}; leave it out to have smaller images padded"
        )
    if dataset is None:
        with _naming("--data.dataset"):
            dataset = data.load(experiment.data.dataset, progress)
    else:
        data.check(dataset)
    dataset = data.fit(dataset, size, 1 if spec is None else spec.min_image_size)
    config = experiment.data
    num_clients = config.num_clients
    if num_clients is None and config.partition != "natural":
        num_clients = 10
    with _naming(f"--data.partition {config.partition}"):
        partition = data.partition(
            config.partition, dataset.y_train, num_clients=num_clients, seed=experiment.seed,
            examples_per_client=config.examples_per_client,
            shards_per_client=config.shards_per_client, alpha=config.alpha,
            classes_per_client=config.classes_per_client, client_ids=dataset.client_train,
        )  # fmt: skip
    norm = experiment.model.norm
    if model is None:
        if spec is not None:
            norm = norm or spec.norm
            build = models.builder(
                experiment.model.name, dataset.x_train.shape[1:], dataset.num_classes,
                width=experiment.model.width, norm=norm, dtype=compute_dtype(experiment),
            )  # fmt: skip
        assert build is not None
        with precision(experiment):
            model = from_nnx(build)
    with precision(experiment):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        if own:
            _check_model(model, shapes, dataset, compute_dtype(experiment))
    parameters, statistics = count_parameters(shapes.params), count_parameters(shapes.stats)
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"--model.width: got {experiment.model.width}, which makes {parameters} parameters, "
            f"expected at most {MAX_PARAMETERS}; take a smaller one"
        )
    experiment = _resolve(experiment, partition, norm, shapes)
    if not experiment.name and (own or algorithm or dataset.name != config.dataset):
        name = f"{dataset.name} {config.partition}"
        name += ", own network" if own else f" {experiment.model.name}"
        name += ", own algorithm" if algorithm else ""
        experiment = dataclasses.replace(experiment, name=name)
    client = experiment.client
    schedule = make_schedule(
        partition, seed=experiment.seed, clients_per_round=experiment.clients_per_round or 1,
        epochs=client.epochs or 1, batch_size=client.batch_size, shuffle=client.shuffle,
        pooled=experiment.algorithm == "central",
    )  # fmt: skip
    visits = (
        schedule.steps * schedule.batch * (1 if schedule.pooled else schedule.clients_per_round)
    )
    if visits > MAX_VISITS:
        raise ConfigError(
            f"--client.epochs: got {client.epochs}, which makes {visits} visits of images a round, "
            f"expected at most {MAX_VISITS}; take fewer epochs or a smaller cohort"
        )
    return Task(experiment, dataset, partition, schedule, model, parameters, statistics, algorithm)


def _check_model(model: Model, shapes: Any, dataset: data.Dataset, dtype: Any) -> None:
    """Refuses an own network that does not keep the promises of `Model`."""
    if not isinstance(shapes, Variables):
        raise ConfigError(
            f"model: init gives a {type(shapes).__name__}, expected jaxfed.Variables(params, stats)"
        )
    batch = 2
    images = jax.ShapeDtypeStruct((batch, *dataset.x_train.shape[1:]), dtype)
    mask = jax.ShapeDtypeStruct((batch,), bool)
    given = jax.eval_shape(
        lambda variables, images, mask, key: model.apply(variables, images, mask, True, key),
        shapes, images, mask, jax.random.key(0),
    )  # fmt: skip
    if not isinstance(given, tuple) or len(given) != 2:
        raise ConfigError(
            f"model: apply gives a {type(given).__name__}, expected the pair (logits, stats)"
        )
    logits, stats = given
    shape, classes = getattr(logits, "shape", None), dataset.num_classes
    if shape is None or len(shape) != 2 or shape[0] != batch or shape[1] < classes:
        raise ConfigError(
            f"model: apply gives logits {shape} for {batch} images, expected ({batch}, {classes}), "
            "a number for every class; change its last layer"
        )
    if jax.tree.map(jnp.shape, stats) != jax.tree.map(jnp.shape, shapes.stats):
        raise ConfigError(
            "model: apply gives other stats than init; return the updated ones, or variables.stats "
            "if there are none"
        )


@contextlib.contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Puts the flag in front of what the data layer, which knows no flags, complains of."""
    try:
        yield
    except data.DataError as error:
        raise data.DataError(f"{flag}: {error}") from None


def _resolve(
    experiment: Experiment, partition: data.Partition, norm: Any, shapes: Variables
) -> Experiment:
    """Fills in every default that depends on the data or the network."""
    population = partition.num_clients
    wanted = experiment.clients_per_round
    if wanted is not None and wanted > population:
        raise ConfigError(
            f"--clients_per_round: got {wanted}, expected at most {population}, the clients there "
            "are; lower it or raise --data.num_clients"
        )
    policy = experiment.model.batch_stats
    if not jax.tree.leaves(shapes.stats):
        if policy is not None:
            raise ConfigError(
                f"--model.batch_stats: got {policy}, but the network has no BatchNorm; "
                "leave it out, or add --model.norm batch"
            )
    else:
        default = "mean" if experiment.algorithm == "central" else "recalibrate"
        policy = policy or default
        if policy in ("pooled", "recalibrate") and not has_moments(shapes.stats):
            raise ConfigError(
                f"--model.batch_stats: got {policy}, which needs statistics named mean and var in "
                "every layer; name them so, or use mean, frozen or local"
            )

    def with_momentum(config: Any) -> Any:
        default = 0.9 if config.optimizer in WITH_MOMENTUM else None
        return dataclasses.replace(
            config, momentum=default if config.momentum is None else config.momentum
        )

    client = with_momentum(experiment.client)
    epochs = client.epochs or (1 if experiment.algorithm == "fedsgd" else 3)
    client = dataclasses.replace(client, epochs=epochs)
    if experiment.algorithm == "fedprox" and client.prox_mu is None:
        client = dataclasses.replace(client, prox_mu=0.01)
    return dataclasses.replace(
        experiment,
        clients_per_round=wanted or min(10, population),
        data=dataclasses.replace(experiment.data, num_clients=population),
        model=dataclasses.replace(experiment.model, norm=norm, batch_stats=policy),
        client=client,
        server=with_momentum(experiment.server),
    )


def compute_dtype(experiment: Experiment) -> Any:
    """The dtype of images and activations."""
    return jnp.dtype(experiment.dtype)


def precision(experiment: Experiment) -> contextlib.AbstractContextManager[Any]:
    """Turns 64-bit arithmetic on for a float64 experiment, and only for it."""
    return jax.enable_x64(experiment.dtype == "float64")
