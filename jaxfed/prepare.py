"""From an experiment to a task: data, partition and network, checked, every default filled in.

All of it happens on the host; what cannot work is refused here, before any compilation.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxfed import data, models, own
from jaxfed.aggregators import AGGREGATORS
from jaxfed.config import ConfigError, Experiment, Spec, replaced, validate
from jaxfed.core.batch_stats import POLICIES, has_moments
from jaxfed.core.federated import Aggregator, FedAlgorithm, Federation
from jaxfed.core.model import Model, Variables
from jaxfed.core.problem import Problem
from jaxfed.core.tree import count_parameters, matching
from jaxfed.initial import Start, read_start
from jaxfed.pieces import (
    Build,
    MakeProblem,
    Pieces,
    checked,
    network_of,
    outputs_of,
    pieces_of,
    problem_of,
)
from jaxfed.plan import Schedule, make_schedule
from jaxfed.precision import precision
from jaxfed.resolve import Rows, resolve
from jaxfed.tasks import check_targets

MAX_PARAMETERS = MAX_VISITS = 2**31 - 1


class Task(NamedTuple):
    """An experiment with everything it needs, checked, before anything is compiled."""

    experiment: Experiment
    """With every default filled in."""
    dataset: data.Dataset
    partition: data.Partition
    schedule: Schedule
    model: Model | None
    """None if the problem brought a network of its own."""
    parameters: int
    statistics: int
    rows: Rows
    """The algorithm and the aggregator."""
    make_problem: Callable[[Experiment], Problem]
    """Of the experiment, whose numbers may be tracers."""
    start: Start | None = None
    """Weights to start from, instead of random ones."""

    @property
    def problem(self) -> Problem:
        """The problem, with its numbers fixed."""
        return self.make_problem(self.experiment)


def prepare(
    experiment: Experiment,
    *,
    dataset: data.Dataset | None = None,
    build: Build | None = None,
    model: Model | None = None,
    algorithm: Any = None,
    problem: Problem | MakeProblem | None = None,
    progress: data.Progress | None = None,
) -> Task:
    """Loads and divides the data, builds the network, fills in defaults, and checks it all.

    Args:
      experiment: what to run.
      dataset: instead of the one the experiment names.
      build: an NNX module's constructor, `rngs -> module`, instead of `experiment.model.name`.
      model: any `Model`, likewise.
      algorithm: a `Spec`, or its `build`, instead of `experiment.algorithm`.
      problem: instead of `experiment.task`: a `Problem`, which has a network of its own, or
        `model -> Problem`.
      progress: called while a dataset is decoded.

    Raises:
      ConfigError: if the experiment cannot run; DataError if its data cannot be used.
    """
    validate(experiment)
    if sum(piece is not None for piece in (model, build)) > 1:
        raise ConfigError("model: got build too, expected one of them; leave the other out")
    experiment, rows = resolve(experiment, algorithm)
    pieces = pieces_of(experiment, model, build, problem)
    experiment, dataset = _with_data(experiment, dataset, pieces, progress)
    task_name = experiment.task or "classification"
    if pieces.problem is None:
        check_targets(task_name, dataset)
    partition = _divided(experiment, dataset)
    if pieces.model is None and not isinstance(pieces.problem, Problem):
        pieces = pieces._replace(model=network_of(experiment, dataset, pieces, task_name))
    make_problem = problem_of(dataset, pieces, task_name)
    with precision(experiment):
        shapes = checked(make_problem(experiment), dataset, experiment, pieces)
    parameters, statistics = count_parameters(shapes.params), count_parameters(shapes.stats)
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"--model.width: got {experiment.model.width}, which makes {parameters} parameters, "
            f"expected at most {MAX_PARAMETERS}; take a smaller one"
        )
    start = None
    if experiment.init is not None:
        start = read_start(experiment.init, shapes, outputs_of(dataset, task_name, pieces))
    experiment = _resolved(experiment, partition, shapes, dataset, pieces, start, rows.algorithm)
    experiment = _named(experiment, dataset, pieces, algorithm)
    if experiment.model.frozen and not matching(*experiment.model.frozen.split(","))(shapes.params):
        raise ConfigError(
            f"--model.frozen: got {experiment.model.frozen!r}, which matches no parameter; "
            "expected patterns of names such as 'conv1/*'"
        )
    schedule = _scheduled(experiment, partition, rows.algorithm)
    task = Task(
        experiment, dataset, partition, schedule, pieces.model, parameters, statistics, rows,
        make_problem, start,
    )  # fmt: skip
    make_algorithm(task, {})  # lets the row refuse what it cannot do
    return task


def _with_data(
    experiment: Experiment, dataset: data.Dataset | None, pieces: Pieces,
    progress: data.Progress | None,
) -> tuple[Experiment, data.Dataset]:  # fmt: skip
    config, size = experiment.data, experiment.data.image_size
    spec = None if pieces.network else models.spec_of(experiment.model.name)
    if spec is not None and size is not None and size < spec.min_image_size:
        raise ConfigError(
            f"--data.image_size: got {size}, expected {spec.min_image_size} or more for "
            f"{experiment.model.name}; leave it out to have smaller images padded"
        )
    if dataset is None:
        with _naming("--data.dataset"):
            dataset = data.load(config.dataset, progress)
    else:
        data.check(dataset)
        experiment = replaced(experiment, {"data.dataset": dataset.name})
    with _naming(f"--model.name {experiment.model.name}"):
        dataset = data.fit(dataset, size, 1 if spec is None else spec.min_image_size)
    return experiment, dataset


def _divided(experiment: Experiment, dataset: data.Dataset) -> data.Partition:
    config = experiment.data
    num_clients = config.num_clients
    if num_clients is None and config.partition != "natural":
        num_clients = 10
    given = {
        key: getattr(config, key)
        for key in ("shards_per_client", "alpha", "classes_per_client")
        if getattr(config, key) is not None
    }
    with _naming(f"--data.partition {config.partition}"):
        return data.partition(
            config.partition, dataset.y_train, num_clients=num_clients, seed=experiment.seed,
            examples_per_client=config.examples_per_client, client_ids=dataset.client_train,
            **given,
        )  # fmt: skip


@contextlib.contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Puts the flag in front of what the data layer, which knows no flags, complains of."""
    try:
        yield
    except data.DataError as error:
        raise data.DataError(f"{flag}: {error}") from None


def _resolved(
    experiment: Experiment, partition: data.Partition, shapes: Variables, dataset: data.Dataset,
    pieces: Pieces, start: Start | None, spec: Spec,
) -> Experiment:  # fmt: skip
    """Fills in every default that depends on the data or the network."""
    population, wanted = partition.num_clients, experiment.clients_per_round
    if wanted is not None and wanted > population:
        raise ConfigError(
            f"--clients_per_round: got {wanted}, expected at most {population}, the clients there "
            "are; lower it or raise --data.num_clients"
        )
    policy = _policy(experiment, shapes, spec)
    model, filled = experiment.model, {}
    if pieces.network is None:
        filled["model.norm"] = model.norm or models.spec_of(model.name).norm
        filled["model.width"] = 1.0 if model.width is None else model.width
    else:
        filled["model.name"] = pieces.network
    if dataset.has_images and pieces.problem is None:
        usual = "-1..1" if start is not None and start.keras else "0..1"
        filled["model.input_range"] = model.input_range or usual
    elif model.input_range is not None:
        why = "a problem of your own" if pieces.problem is not None else "data that are no images"
        raise ConfigError(f"--model.input_range: got {model.input_range} with {why}; leave it out")
    return replaced(
        experiment,
        {
            **filled,
            "task": pieces.task or experiment.task or "classification",
            "clients_per_round": wanted or min(10, population),
            "data.num_clients": population,
            "model.batch_stats": policy,
        },
    )


def _policy(experiment: Experiment, shapes: Variables, spec: Spec) -> Any:
    policy = experiment.model.batch_stats
    if not jax.tree.leaves(shapes.stats):
        if policy is not None:
            default = spec.defaults.get("model.batch_stats") == policy
            why = f"{policy} (of algorithm {experiment.algorithm})" if default else policy
            raise ConfigError(
                f"--model.batch_stats: got {why}, but the network has no BatchNorm; "
                "leave it out, or add --model.norm batch"
            )
        return None
    policy = policy or ("mean" if spec.pooled else "recalibrate")
    if policy in ("pooled", "recalibrate") and not has_moments(shapes.stats):
        raise ConfigError(
            f"--model.batch_stats: got {policy}, which needs statistics named mean and var in "
            "every layer; name them so, or use mean, frozen or local"
        )
    return policy


def _named(
    experiment: Experiment, dataset: data.Dataset, pieces: Pieces, algorithm: Any
) -> Experiment:
    own_algorithm = algorithm is not None or own.is_own(experiment.algorithm)
    if experiment.name or not (pieces.network or own_algorithm):
        return experiment
    name = f"{dataset.name} {experiment.data.partition}"
    name += ", own network" if pieces.network else f" {experiment.model.name}"
    name += ", own algorithm" if own_algorithm else ""
    return dataclasses.replace(experiment, name=name)


def _scheduled(experiment: Experiment, partition: data.Partition, spec: Spec) -> Schedule:
    client = experiment.client
    schedule = make_schedule(
        partition, seed=experiment.seed, clients_per_round=experiment.clients_per_round or 1,
        epochs=client.epochs or 1, batch_size=client.batch_size, shuffle=client.shuffle,
        pooled=spec.pooled,
    )  # fmt: skip
    visits = (
        schedule.steps * schedule.batch * (1 if schedule.pooled else schedule.clients_per_round)
    )
    if visits > MAX_VISITS:
        raise ConfigError(
            f"--client.epochs: got {client.epochs}, which makes {visits} visits of examples per "
            f"round, expected at most {MAX_VISITS}; take fewer epochs or a smaller cohort"
        )
    return schedule


def make_algorithm(
    task: Task, numbers: dict[str, Any], *, chunk: int | None = None, mesh: Mesh | None = None
) -> FedAlgorithm:
    """The algorithm of a task, with some of its numbers replaced, perhaps by tracers.

    Args:
      task: see `prepare`.
      numbers: by key, `client.lr` and so on; what is not in it is as the experiment has it.
      chunk, mesh: how clients are spread over time and devices; see `map_sum`.
    """
    experiment = replaced(task.experiment, numbers)
    algorithm, aggregator = task.rows
    policy = POLICIES[experiment.model.batch_stats or "frozen"]
    federation = Federation(
        (aggregator or AGGREGATORS["mean"]).build(experiment), policy,
        experiment.weighting or "examples", task.partition.num_clients, chunk, mesh,
    )  # fmt: skip
    if not isinstance(federation.aggregator, Aggregator):
        raise ConfigError(
            f"--server.aggregator: got {experiment.server.aggregator}, whose build gives a "
            f"{type(federation.aggregator).__name__}, expected a jaxfed.Aggregator"
        )
    made = algorithm.build(task.make_problem(experiment), experiment, federation)
    if not isinstance(made, FedAlgorithm):
        raise ConfigError(
            f"--algorithm: got {experiment.algorithm}, whose build gives a {type(made).__name__}, "
            "expected a jaxfed.FedAlgorithm"
        )
    if experiment.model.batch_stats == "local" and made.personal is None:
        raise ConfigError(
            f"--model.batch_stats: got local with algorithm {experiment.algorithm}, whose clients "
            "keep no network of their own (jaxfed.keeping); use recalibrate, or --algorithm fedbn"
        )
    return made
