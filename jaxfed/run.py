"""From an experiment to its results: prepare on the host, compile once, run, report.

prepare(experiment) -> Task        data, partition, network; refuses what cannot work
compile_tasks([task, ...]) -> Program   one compilation for all points of a sweep
segments(program) -> Segment, ...   the rounds between two evaluations, one dispatch each
run(experiment) -> Result          all of it
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxfed import data, models
from jaxfed.algorithm import Cohort, FedAlgorithm, RoundMetrics, State, central, fedavg, fedsgd
from jaxfed.batch_stats import has_moments
from jaxfed.client import Examples
from jaxfed.evaluate import RECALIBRATION_EXAMPLES, batches, evaluator
from jaxfed.experiment import WITH_MOMENTUM, ConfigError, Experiment, validate
from jaxfed.model import Model, Variables, count_parameters, from_nnx
from jaxfed.optimizers import optimizer
from jaxfed.plan import Plan, Schedule, make_plan, make_schedule, stack_plans

EVAL_BATCH = 200
PLAN_BYTES = 64 * 2**20
"""Plans of so many bytes at most are on the device at a time."""

Progress = Callable[[str, int, int], None]
"""`(what is being done, done, total)`, called during long work on the host."""


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


Knob = Float[Array, "*points"] | float


class Knobs(NamedTuple):
    """The numbers that may differ between the points of one compiled program."""

    client_lr: Knob
    client_momentum: Knob
    server_lr: Knob
    server_momentum: Knob
    prox_mu: Knob


class Program(NamedTuple):
    """The compiled round and evaluation of one or more tasks, and what they are fed."""

    tasks: Sequence[Task]
    length: int
    """Rounds a dispatch."""
    train: Any
    evaluate: Any
    knobs: Knobs
    train_set: Examples
    test_set: Examples
    test_index: Array
    train_index: Array
    state: State
    """The initial state; a leading axis `[points]` on every leaf."""
    compile_seconds: float


class Segment(NamedTuple):
    """What one dispatch brought: its rounds, for every point."""

    rows: list[list[dict[str, Any]]]
    """`[points][rounds]`, as they stand in `metrics.jsonl`."""
    state: State
    variables: Variables | None
    """As they were evaluated (statistics recalibrated); None without evaluation."""
    train_seconds: float
    evaluate_seconds: float


class Result(NamedTuple):
    """A finished run."""

    experiment: Experiment
    history: list[dict[str, Any]]
    """One row a round: round, train_loss, train_accuracy, test_loss, test_accuracy, ..."""
    summary: dict[str, Any]
    variables: Variables
    """The server's final weights, with the statistics that were evaluated."""
    model: Model


# --- Before compilation ---------------------------------------------------------------------


def prepare(
    experiment: Experiment,
    *,
    dataset: data.Dataset | None = None,
    build: Callable[[nnx.Rngs], nnx.Module] | None = None,
    model: Model | None = None,
    progress: Progress | None = None,
) -> Task:
    """Loads and divides the data, builds the network, fills in defaults, and checks it all.

    Args:
      experiment: what to run.
      dataset: instead of the one the experiment names.
      build: an NNX module's constructor, `rngs -> module`, instead of `experiment.model.name`.
      model: any `Model`, likewise.
      progress: called while a dataset is decoded.

    Raises:
      ConfigError: if the experiment cannot run; DataError if its data cannot be used.
    """
    validate(experiment)
    own = model is not None or build is not None
    spec = None if own else models.spec_of(experiment.model.name)
    size = experiment.data.image_size
    if spec is not None and size is not None and size < spec.min_image_size:
        raise ConfigError(
            f"--data.image_size: got {size}, expected {spec.min_image_size} or more for "
            f"{experiment.model.name}; leave it out to have smaller images padded"
        )
    dataset = data.load(experiment.data.dataset, progress) if dataset is None else dataset
    dataset = data.fit(dataset, size, 1 if spec is None else spec.min_image_size)
    config = experiment.data
    num_clients = config.num_clients
    if num_clients is None and config.partition != "natural":
        num_clients = 10
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
                width=experiment.model.width, norm=norm, dtype=_dtype(experiment),
            )  # fmt: skip
        assert build is not None
        with precision(experiment):
            model = from_nnx(build)
    with precision(experiment):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
    experiment = _resolve(experiment, partition, norm, shapes)
    client = experiment.client
    schedule = make_schedule(
        partition, seed=experiment.seed, clients_per_round=experiment.clients_per_round or 1,
        epochs=client.epochs or 1, batch_size=client.batch_size, shuffle=client.shuffle,
        pooled=experiment.algorithm == "central",
    )  # fmt: skip
    parameters, statistics = count_parameters(shapes.params), count_parameters(shapes.stats)
    return Task(experiment, dataset, partition, schedule, model, parameters, statistics)


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
                f"--model.batch_stats: got {policy}, but {experiment.model.name} has no BatchNorm; "
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


def _dtype(experiment: Experiment) -> Any:
    return jnp.dtype(experiment.dtype)


def precision(experiment: Experiment) -> contextlib.AbstractContextManager[Any]:
    """Turns 64-bit arithmetic on for a float64 experiment, and only for it."""
    return jax.enable_x64(experiment.dtype == "float64")


# --- One compilation ------------------------------------------------------------------------


def chunk_of(experiment: Experiment) -> int | None:
    """How many clients are computed at once; None is all of them."""
    if experiment.parallel == "loop":
        return 1
    if experiment.parallel == "vmap":
        return None
    if experiment.parallel == "auto":
        return AUTO_CHUNK.get(jax.default_backend(), AUTO_CHUNK["gpu"])
    return int(experiment.parallel)


AUTO_CHUNK = {"cpu": 10, "gpu": 128, "tpu": 128}
"""Clients at once under `parallel="auto"`. CPU: measured, see benchmarks; others: a guess."""


def make_algorithm(task: Task, knobs: Knobs) -> FedAlgorithm:
    """The algorithm an experiment names, with its numbers taken from `knobs` (may be traced)."""
    experiment = task.experiment
    client_tx = optimizer(experiment.client.optimizer, knobs.client_lr, knobs.client_momentum)
    server_tx = optimizer(experiment.server.optimizer, knobs.server_lr, knobs.server_momentum)
    dtype = _dtype(experiment)
    if experiment.algorithm == "central":
        return central(task.model, client_tx, dtype=dtype)
    weighting, policy = experiment.weighting, experiment.model.batch_stats or "frozen"
    population, chunk = task.partition.num_clients, chunk_of(experiment)
    if experiment.algorithm == "fedsgd":
        return fedsgd(
            task.model, server_tx, weighting=weighting, batch_stats=policy,
            num_clients=population, chunk=chunk, dtype=dtype,
        )  # fmt: skip
    return fedavg(
        task.model, client_tx, server_tx, weighting=weighting, batch_stats=policy,
        prox_mu=knobs.prox_mu if experiment.algorithm == "fedprox" else None,
        num_clients=population, chunk=chunk, dtype=dtype,
    )  # fmt: skip


def knobs_of(experiment: Experiment) -> Knobs:
    """The numbers of an experiment that a sweep may vary without compiling again."""
    client, server = experiment.client, experiment.server
    return Knobs(
        client.lr, client.momentum or 0.0, server.lr, server.momentum or 0.0, client.prox_mu or 0.0
    )


def segment_length(task: Task, checkpoint_every: int | None = None) -> int:
    """Rounds a dispatch: it ends at every evaluation and checkpoint, and divides the run."""
    experiment = task.experiment
    length = math.gcd(experiment.rounds, experiment.eval_every, checkpoint_every or 0)
    seats = 1 if task.schedule.pooled else task.schedule.clients_per_round
    size = 4 * seats * task.schedule.steps * task.schedule.batch
    while length > 1 and length * size > PLAN_BYTES:
        length = max(d for d in range(1, length) if length % d == 0)
    return length


def compile_tasks(tasks: Sequence[Task], checkpoint_every: int | None = None) -> Program:
    """Compiles the training segment and the evaluation for tasks that differ in knobs and seed.

    Ahead of time, so that nothing can be compiled again later: a call with other shapes fails.
    """
    first = tasks[0]
    with precision(first.experiment):
        return _compile(tasks, checkpoint_every)


def _compile(tasks: Sequence[Task], checkpoint_every: int | None) -> Program:
    started = time.perf_counter()
    first = tasks[0]
    length = segment_length(first, checkpoint_every)
    knobs = jax.tree.map(lambda *leaves: jnp.asarray(leaves, float), *(
        knobs_of(task.experiment) for task in tasks
    ))  # fmt: skip
    dataset = first.dataset
    train_set = Examples(jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train))
    test_set = Examples(jnp.asarray(dataset.x_test), jnp.asarray(dataset.y_test))
    test_index = jnp.asarray(batches(np.arange(len(dataset.y_test)), EVAL_BATCH))
    train_index = jnp.asarray(_stacked([_recalibration_rows(task) for task in tasks]))
    init = jax.jit(lambda key: make_algorithm(first, knobs_of(first.experiment)).init(
        first.model.init(key)
    ))  # fmt: skip
    states = [init(jax.random.key(task.experiment.seed)) for task in tasks]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    policy = first.experiment.model.batch_stats or "frozen"
    evaluate = evaluator(first.model, policy, dtype=_dtype(first.experiment))

    def train_points(knobs: Knobs, state: State, train_set: Examples, plans: Plan) -> Any:
        def one(point: tuple) -> tuple[State, RoundMetrics]:
            knobs, state, plans = point
            algorithm = make_algorithm(first, knobs)
            return jax.lax.scan(
                lambda state, plan: algorithm.round(state, Cohort(train_set, plan)), state, plans
            )

        return jax.lax.map(one, (knobs, state, plans))

    def evaluate_points(
        state: State, test: Examples, test_index: Array, train: Examples, train_index: Array
    ) -> Any:
        def one(point: tuple) -> Any:
            state, train_index = point
            return evaluate(state, test, test_index, train, train_index)

        return jax.lax.map(one, (state, train_index))

    plans = _plans(tasks, 1, length)
    train_program = jax.jit(train_points, donate_argnums=1)
    evaluate_program = jax.jit(evaluate_points)
    train_compiled = train_program.lower(knobs, state, train_set, plans).compile()
    evaluate_compiled = evaluate_program.lower(
        state, test_set, test_index, train_set, train_index
    ).compile()
    return Program(
        tasks, length, train_compiled, evaluate_compiled, knobs, train_set, test_set, test_index,
        train_index, state, time.perf_counter() - started,
    )  # fmt: skip


def _recalibration_rows(task: Task) -> np.ndarray:
    rng = np.random.default_rng([task.experiment.seed, 0])
    rows = rng.permutation(task.partition.order)[:RECALIBRATION_EXAMPLES]
    return batches(rows, min(EVAL_BATCH, len(rows)))


def _stacked(tables: list[np.ndarray]) -> np.ndarray:
    steps = max(len(table) for table in tables)
    return np.stack([np.pad(t, ((0, steps - len(t)), (0, 0)), constant_values=-1) for t in tables])


def _plans(tasks: Sequence[Task], first_round: int, length: int) -> Plan:
    rounds = range(first_round, first_round + length)
    return stack_plans(
        [stack_plans([make_plan(task.schedule, number) for number in rounds]) for task in tasks]
    )


# --- Running --------------------------------------------------------------------------------


def segments(
    program: Program, state: State | None = None, first_round: int = 1
) -> Iterator[Segment]:
    """Runs round after round, evaluating where the experiment says so.

    Args:
      program: from `compile_tasks`. Its initial state is donated to the first segment.
      state: to go on from; None for the initial state.
      first_round: number of the first round to run.
    """
    experiment = program.tasks[0].experiment
    state = program.state if state is None else state
    for start in range(first_round, experiment.rounds + 1, program.length):
        with precision(experiment):
            before = time.perf_counter()
            plans = _plans(program.tasks, start, program.length)
            state, metrics = program.train(program.knobs, state, program.train_set, plans)
            metrics = jax.device_get(metrics)
            trained = time.perf_counter()
            last = start + program.length - 1
            scores, variables = None, None
            if last % experiment.eval_every == 0 or last == experiment.rounds:
                scores, variables = program.evaluate(
                    state, program.test_set, program.test_index,
                    program.train_set, program.train_index,
                )  # fmt: skip
                scores = jax.device_get(scores)
            evaluated = time.perf_counter()
        seconds = (trained - before) / program.length
        rows = [
            [
                _row(metrics, scores if number == last else None, point, number, start, seconds)
                for number in range(start, last + 1)
            ]
            for point in range(len(program.tasks))
        ]
        assert state is not None
        yield Segment(rows, state, variables, trained - before, evaluated - trained)


def _row(
    metrics: RoundMetrics, scores: Any, point: int, number: int, start: int, seconds: float
) -> dict[str, Any]:
    at = (point, number - start)
    return {
        "round": number,
        "train_loss": _number(metrics.train_loss[at]),
        "train_accuracy": _number(metrics.train_accuracy[at]),
        "test_loss": None if scores is None else _number(scores.loss[point]),
        "test_accuracy": None if scores is None else _number(scores.accuracy[point]),
        "num_examples": int(metrics.num_examples[at]),
        "seconds": round(seconds, 6),
        "dropped_clients": int(metrics.dropped[at]),
        "delta_norm": _number(metrics.delta_norm[at]),
    }


def _number(value: Any) -> float | None:
    """A float for JSON, which has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None


def summarize(task: Task, history: list[dict[str, Any]], seconds: dict[str, float]) -> dict:
    """The contents of `summary.json`."""
    tested = [row["test_accuracy"] for row in history if row["test_accuracy"] is not None]
    names = ("jaxfed", "jax", "flax", "optax", "numpy")
    return {
        "name": name_of(task.experiment),
        "final_test_accuracy": history[-1]["test_accuracy"] if history else None,
        "best_test_accuracy": max(tested, default=None),
        "final_test_loss": history[-1]["test_loss"] if history else None,
        "rounds": history[-1]["round"] if history else 0,
        "dropped_clients": sum(row["dropped_clients"] for row in history),
        **{key: round(value, 3) for key, value in seconds.items()},
        "device": device_name(),
        "parameters": task.parameters,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def name_of(experiment: Experiment) -> str:
    """The experiment's name, or one made from its dataset and model."""
    config = experiment.data
    return experiment.name or f"{config.dataset} {config.partition} {experiment.model.name}"


def device_name() -> str:
    """For example `cpu x1 (cpu)` or `gpu x1 (NVIDIA H200)`."""
    devices = jax.devices()
    return f"{devices[0].platform} x{len(devices)} ({devices[0].device_kind})"


def run(
    experiment: Experiment,
    *,
    dataset: data.Dataset | None = None,
    build: Callable[[nnx.Rngs], nnx.Module] | None = None,
    model: Model | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Runs an experiment from beginning to end.

    Args:
      experiment: what to run.
      dataset: your own images instead of `experiment.data.dataset`.
      build: your own NNX module, `rngs -> module`, instead of `experiment.model.name`.
      model: any other network as a `Model(init, apply)`.
      on_round: called with every row of the history.

    Raises:
      ConfigError: if the experiment cannot run. DataError: if its data cannot be used.

    Example:
      >>> from jaxfed import Experiment, ModelConfig, run
      >>> result = run(Experiment(rounds=2, model=ModelConfig(name="logistic")))
      >>> [row["round"] for row in result.history]
      [1, 2]
    """
    task = prepare(experiment, dataset=dataset, build=build, model=model)
    started = time.perf_counter()
    program = compile_tasks([task])
    history, variables = [], None
    spent = {"train_seconds": 0.0, "evaluate_seconds": 0.0}
    for segment in segments(program):
        history += segment.rows[0]
        variables = segment.variables
        spent["train_seconds"] += segment.train_seconds
        spent["evaluate_seconds"] += segment.evaluate_seconds
        if on_round:
            for row in segment.rows[0]:
                on_round(row)
    seconds = {
        "seconds": time.perf_counter() - started,
        "compile_seconds": program.compile_seconds,
        **spent,
    }
    final = jax.tree.map(lambda leaf: leaf[0], variables)
    return Result(task.experiment, history, summarize(task, history, seconds), final, task.model)
