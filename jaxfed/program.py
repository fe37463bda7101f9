"""The compiled program of one or more tasks, and its running.

compile_tasks([task, ...]) -> Program   one compilation for all points of a sweep
segments(program) -> Segment, ...       the rounds between two evaluations, a dispatch each
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxfed.algorithm import Cohort, FedAlgorithm, RoundMetrics, State, central, fedavg, fedsgd
from jaxfed.client import Examples
from jaxfed.evaluate import RECALIBRATION_EXAMPLES, batches, evaluator, row_scorer
from jaxfed.experiment import Experiment
from jaxfed.model import Variables
from jaxfed.optimizers import optimizer
from jaxfed.plan import Plan, make_plan, stack_plans
from jaxfed.prepare import Task, compute_dtype, precision

EVAL_BATCH = 200
PLAN_BYTES = 64 * 2**20
"""Plans of so many bytes at most are on the device at a time."""

AUTO_CHUNK = {"cpu": 1, "gpu": 128, "tpu": 128}
"""Clients at once on a device under `parallel="auto"`. Measured on CPU (benchmarks/README.md): one
client's arrays fit into a core's cache, those of ten do not. Not yet measured on the others."""

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
    mesh: Mesh | None
    """The devices that share the clients; all inputs are on each of them."""
    compile_seconds: float


class Segment(NamedTuple):
    """What one dispatch brought: its rounds, for every point."""

    last_round: int
    rows: list[list[dict[str, Any]]]
    """`[points][rounds]`, as they stand in `metrics.jsonl`; up to the round that it diverged in."""
    state: State
    """Of a point that has diverged, the one that was last evaluated to a number."""
    variables: Variables
    """As they were last evaluated to a number (statistics recalibrated)."""
    train_seconds: float
    evaluate_seconds: float


def chunk_of(experiment: Experiment) -> int | None:
    """How many clients are computed at once; None is all of them."""
    if experiment.parallel == "loop":
        return 1
    if experiment.parallel == "vmap":
        return None
    if experiment.parallel == "auto":
        return AUTO_CHUNK.get(jax.default_backend(), AUTO_CHUNK["gpu"])
    return int(experiment.parallel)


def all_devices(experiment: Experiment) -> Mesh | None:
    """All devices of all processes, to share clients and batches; None to compute on the first.

    Central training is one sequence of steps, which nothing can share.
    """
    devices = jax.devices()
    alone = experiment.algorithm == "central" and jax.process_count() == 1
    return None if alone or len(devices) == 1 else Mesh(np.asarray(devices), ("clients",))


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """Puts the same arrays on every device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, NamedSharding(mesh, P()))


def make_algorithm(task: Task, knobs: Knobs, mesh: Mesh | None = None) -> FedAlgorithm:
    """The algorithm an experiment names, with its numbers taken from `knobs` (may be traced)."""
    if task.algorithm is not None:
        return task.algorithm(task.model, mesh)
    experiment = task.experiment
    client_tx = optimizer(experiment.client.optimizer, knobs.client_lr, knobs.client_momentum)
    server_tx = optimizer(experiment.server.optimizer, knobs.server_lr, knobs.server_momentum)
    dtype = compute_dtype(experiment)
    if experiment.algorithm == "central":
        return central(task.model, client_tx, dtype=dtype)
    weighting, policy = experiment.weighting, experiment.model.batch_stats or "frozen"
    population, chunk = task.partition.num_clients, chunk_of(experiment)
    if experiment.algorithm == "fedsgd":
        return fedsgd(
            task.model, server_tx, weighting=weighting, batch_stats=policy, chunk=chunk,
            mesh=mesh, dtype=dtype,
        )  # fmt: skip
    return fedavg(
        task.model, client_tx, server_tx, weighting=weighting, batch_stats=policy,
        prox_mu=knobs.prox_mu if experiment.algorithm == "fedprox" else None,
        num_clients=population, chunk=chunk, mesh=mesh, dtype=dtype,
    )  # fmt: skip


def knobs_of(experiment: Experiment) -> Knobs:
    """The numbers of an experiment that a sweep may vary without compiling again."""
    client, server = experiment.client, experiment.server
    return Knobs(
        client.lr, client.momentum or 0.0, server.lr, server.momentum or 0.0, client.prox_mu or 0.0
    )


def segment_length(task: Task, checkpoint_every: int | None = None, done: int = 0) -> int:
    """Rounds a dispatch: it ends at every evaluation and checkpoint, and divides what is to do."""
    experiment = task.experiment
    length = math.gcd(experiment.rounds, experiment.eval_every, checkpoint_every or 0, done)
    seats = 1 if task.schedule.pooled else task.schedule.clients_per_round
    size = 4 * seats * task.schedule.steps * task.schedule.batch
    while length > 1 and length * size > PLAN_BYTES:
        length = max(d for d in range(1, length) if length % d == 0)
    return length


def initial_state(task: Task, key: Array) -> State:
    """What the first round begins with."""
    algorithm = make_algorithm(task, knobs_of(task.experiment))
    return algorithm.init(task.model.init(key))


def state_like(task: Task) -> State:
    """Shapes and dtypes of a task's state."""
    with precision(task.experiment):
        return jax.eval_shape(lambda key: initial_state(task, key), jax.random.key(0))


def compile_tasks(
    tasks: Sequence[Task], checkpoint_every: int | None = None, done: int = 0
) -> Program:
    """Compiles the training segment and the evaluation for tasks that differ in knobs and seed.

    Ahead of time, so that nothing can be compiled again later: a call with other shapes fails.

    Args:
      tasks: whose experiments differ in seed and knobs only.
      checkpoint_every: rounds after which the state has to be at hand.
      done: rounds that were run before; `segments` goes on from there.
    """
    first = tasks[0]
    with precision(first.experiment):
        return _compile(tasks, segment_length(first, checkpoint_every, done))


def _compile(tasks: Sequence[Task], length: int) -> Program:
    started = time.perf_counter()
    first = tasks[0]
    knobs = jax.tree.map(lambda *leaves: jnp.asarray(leaves, float), *(
        knobs_of(task.experiment) for task in tasks
    ))  # fmt: skip
    dataset = first.dataset
    mesh = all_devices(first.experiment)
    train_set, test_set, test_index, train_index, knobs = replicated(
        (
            Examples(dataset.x_train, dataset.y_train),
            Examples(dataset.x_test, dataset.y_test),
            batches(np.arange(len(dataset.y_test)), EVAL_BATCH),
            _stacked([_recalibration_rows(task) for task in tasks]),
            knobs,
        ),
        mesh,
    )
    init = jax.jit(lambda key: initial_state(first, key))
    states = [init(jax.random.key(task.experiment.seed)) for task in tasks]
    state = replicated(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), mesh)
    policy = first.experiment.model.batch_stats or "frozen"
    evaluate = evaluator(first.model, policy, dtype=compute_dtype(first.experiment), mesh=mesh)

    def train_points(knobs: Knobs, state: State, train_set: Examples, plans: Plan) -> Any:
        def one(point: tuple) -> tuple[State, RoundMetrics]:
            knobs, state, plans = point
            algorithm = make_algorithm(first, knobs, mesh)
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

    plans = replicated(_plans(tasks, 1, length), mesh)
    everywhere = None if mesh is None else NamedSharding(mesh, P())
    # Nothing is donated: a run that diverges goes back to the state that it came from.
    train_program = jax.jit(train_points, out_shardings=everywhere)
    evaluate_program = jax.jit(evaluate_points, out_shardings=everywhere)
    train_compiled = train_program.lower(knobs, state, train_set, plans).compile()
    evaluate_compiled = evaluate_program.lower(
        state, test_set, test_index, train_set, train_index
    ).compile()
    return Program(
        tasks, length, train_compiled, evaluate_compiled, knobs, train_set, test_set, test_index,
        train_index, state, mesh, time.perf_counter() - started,
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


def segments(
    program: Program,
    state: State | None = None,
    histories: Sequence[Sequence[dict[str, Any]]] | None = None,
    done: int = 0,
) -> Iterator[Segment]:
    """Runs round after round, evaluating where the experiment says so.

    A point that diverges (see `divergence`) has no more rounds; when all have, it is over.

    Args:
      program: from `compile_tasks`.
      state: to go on from; None for the initial state.
      histories: rows of the rounds that were run before, for every point.
      done: how many those are.
    """
    tasks, experiment = program.tasks, program.tasks[0].experiment
    state = good = program.state if state is None else state
    variables = state.variables
    pasts = [list(rows) for rows in histories or [[] for _ in tasks]]
    plans = _plans(tasks, done + 1, program.length)
    for start in range(done + 1, experiment.rounds + 1, program.length):
        if all(_is_over(past) for past in pasts):
            return
        with precision(experiment):
            before = time.perf_counter()
            last = start + program.length - 1
            placed = replicated(plans, program.mesh)
            state, metrics = program.train(program.knobs, state, program.train_set, placed)
            if last < experiment.rounds:  # the next rounds are planned while these are computed
                plans = _plans(tasks, last + 1, program.length)
            metrics = jax.device_get(metrics)
            trained = time.perf_counter()
            scores, evaluated = None, variables
            if last % experiment.eval_every == 0 or last == experiment.rounds:
                scores, evaluated = program.evaluate(
                    state, program.test_set, program.test_index,
                    program.train_set, program.train_index,
                )  # fmt: skip
                scores = jax.device_get(scores)
            tested = time.perf_counter()
            seconds = (trained - before) / program.length
            rows = [
                _rows(task, past, metrics, scores, point, range(start, last + 1), seconds)
                for point, (task, past) in enumerate(zip(tasks, pasts, strict=True))
            ]
            alive = [bool(new) and not new[-1]["diverged"] for new in rows]
            if not all(alive):
                state, evaluated = _where(alive, (state, evaluated), (good, variables))
            variables = evaluated
            if scores is not None:
                good = state
        for past, new in zip(pasts, rows, strict=True):
            past.extend(new)
        assert state is not None
        yield Segment(last, rows, state, variables, trained - before, tested - trained)


def _is_over(history: Sequence[dict[str, Any]]) -> bool:
    return bool(history) and bool(history[-1]["diverged"])


def _rows(
    task: Task,
    past: Sequence[dict[str, Any]],
    metrics: RoundMetrics,
    scores: Any,
    point: int,
    rounds: range,
    seconds: float,
) -> list[dict[str, Any]]:
    """The rows of a dispatch, up to the one in which the run diverged; none if it had before."""
    rows: list[dict[str, Any]] = []
    if _is_over(past):
        return rows
    for place, number in enumerate(rounds):
        tested = scores if number == rounds[-1] else None
        rows.append(_row(metrics, tested, point, place, number, seconds))
        finite = bool(metrics.finite[point, place])
        reason = divergence(task, [*past, *rows], finite=finite, tested=tested is not None)
        rows[-1]["diverged"] = reason
        if reason:  # what may have been evaluated is the state before
            rows[-1] |= {"test_loss": None, "test_accuracy": None}
            break
    return rows


def divergence(
    task: Task, history: Sequence[dict[str, Any]], *, finite: bool, tested: bool
) -> str | None:
    """Why a run ends with the newest row of its history, or None if it need not.

    A client that is dropped, or a whole cohort, is no reason: the state stays as it was, and the
    next cohort may do better. It is one when as many seats as there are clients gave nothing.

    Args:
      task: of the run.
      history: its rows so far.
      finite: whether the newest round gave a finite state.
      tested: whether that was evaluated.
    """
    experiment, row = task.experiment, history[-1]
    if not finite:
        return "the new weights are not finite"
    if tested and row["test_loss"] is None:
        return "the test loss is not finite"
    empty = 0
    for each in reversed(history):
        if each["num_examples"] or not each["dropped_clients"]:
            break
        empty += 1
    if empty and empty * (experiment.clients_per_round or 1) >= task.partition.num_clients:
        return f"no client's update was finite in {empty} round(s)"
    return None


def _where(alive: Sequence[bool], new: Any, old: Any) -> Any:
    """Of every leaf `[points, ...]` the new rows of the points that are alive."""
    mask = np.asarray(alive)
    return jax.tree.map(
        lambda n, o: jnp.where(mask.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old
    )


def _row(
    metrics: RoundMetrics, scores: Any, point: int, place: int, number: int, seconds: float
) -> dict[str, Any]:
    at = (point, place)
    loss = None if scores is None else _number(scores.loss[point])
    # The class of NaN is 0, right one time in ten: a number that says nothing.
    accuracy = _number(scores.accuracy[point]) if scores is not None and loss is not None else None
    return {
        "round": number,
        "train_loss": _number(metrics.train_loss[at]),
        "train_accuracy": _number(metrics.train_accuracy[at]),
        "test_loss": loss,
        "test_accuracy": accuracy,
        "num_examples": int(metrics.num_examples[at]),
        "seconds": round(seconds, 6),
        "dropped_clients": int(metrics.dropped[at]),
        "delta_norm": _number(metrics.delta_norm[at]),
        "client_delta_norm": _client_mean(metrics, at),
    }


def _client_mean(metrics: RoundMetrics, at: tuple[int, int]) -> float | None:
    """Mean norm of one client's update, over those that took part and were not dropped."""
    clients = metrics.clients
    kept = (clients.num_examples[at] > 0) & ~clients.dropped[at]
    return _number(np.mean(clients.delta_norm[at][kept])) if kept.any() else None


def _number(value: Any) -> float | None:
    """A float for JSON, which has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None


class ClientScores(NamedTuple):
    """How good the final network is on the training images of each client; NaN: has none.

    With `batch_stats="local"` it is each client's own network, NaN if it never trained.
    """

    accuracy: Float[np.ndarray, " clients"]
    loss: Float[np.ndarray, " clients"]


class Final(NamedTuple):
    """What is kept of one point when its rounds are over."""

    variables: Variables
    """Numpy arrays, as evaluated (statistics recalibrated)."""
    clients: ClientScores


def finish(program: Program, state: State) -> list[Final]:
    """Evaluates the state after the last round for good: weights and every client's scores."""
    first = program.tasks[0]
    policy, local = first.experiment.model.batch_stats or "frozen", state.own is not None
    with precision(first.experiment):
        _, variables = program.evaluate(
            state, program.test_set, program.test_index, program.train_set, program.train_index
        )
        dtype = compute_dtype(first.experiment)
        everywhere = None if program.mesh is None else NamedSharding(program.mesh, P())
        score = jax.jit(
            row_scorer(first.model, policy, dtype=dtype, mesh=program.mesh),
            out_shardings=everywhere,
        )
        finals = []
        for point, task in enumerate(program.tasks):
            ours, weights = jax.tree.map(lambda leaf, at=point: leaf[at], (state, variables))
            index, owner = _client_batches(task, local)
            placed = replicated((index, owner), program.mesh)
            rows = jax.device_get(score(ours, weights, program.train_set, *placed))
            there = index >= 0
            seen = jax.device_get(ours.own.seen) if local else None
            scores = _by_client(task, rows.loss[there], rows.right[there], seen)
            finals.append(Final(jax.device_get(weights), scores))
    return finals


def _client_batches(task: Task, one_client_each: bool) -> tuple[np.ndarray, np.ndarray]:
    """All images, client after client, in batches, and whose they are if each is of one client."""
    partition = task.partition
    if not one_client_each:
        index = batches(partition.order, min(EVAL_BATCH, len(partition.order)))
        return index, np.zeros(len(index), np.int32)
    size = min(EVAL_BATCH, int(partition.sizes.max()))
    tables = [batches(partition.client(k), size) for k in range(partition.num_clients)]
    owner = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
    return np.concatenate(tables), owner


def _by_client(
    task: Task, loss: np.ndarray, right: np.ndarray, seen: np.ndarray | None
) -> ClientScores:
    sizes = task.partition.sizes
    client = np.repeat(np.arange(len(sizes)), sizes)
    known = sizes > 0 if seen is None else (sizes > 0) & seen
    divisor = np.where(known, sizes, np.nan)
    right, loss = (np.bincount(client, values, len(sizes)) / divisor for values in (right, loss))
    return ClientScores(right, loss)
