"""The compiled program of one or more tasks: one compilation for all points of a sweep.

`jaxfed.segments` runs it, `jaxfed.final` scores what it ends with.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxfed.config import Experiment, numbers
from jaxfed.core.evaluate import RECALIBRATION_EXAMPLES, batches, evaluator
from jaxfed.core.federated import Cohort, FedAlgorithm, Report, State
from jaxfed.core.problem import Examples
from jaxfed.core.tree import replace
from jaxfed.plan import Plan, make_plan, stack_plans
from jaxfed.precision import precision
from jaxfed.prepare import Task, make_algorithm

EVAL_BATCH = 200
PLAN_BYTES = 64 * 2**20
"""Plans of so many bytes at most are on the device at a time."""

AUTO_CHUNK = {"cpu": 1, "gpu": 128, "tpu": 128}
"""Clients at once on a device under `parallel="auto"`. Measured on CPU (benchmarks/README.md): one
client's arrays fit into a core's cache, those of ten do not. Not yet measured on the others."""

Numbers = dict[str, Float[Array, "*points"]]
"""The numbers of a program by key (`client.lr`), which may differ between its points."""


class Program(NamedTuple):
    """The compiled round and evaluation of one or more tasks, and what they are fed."""

    tasks: Sequence[Task]
    length: int
    """Rounds per dispatch."""
    train: Any
    evaluate: Any
    numbers: Numbers
    train_set: Examples
    test_set: Examples
    test_index: Array
    train_index: Array
    state: State
    """The initial state; a leading axis `[points]` on every leaf."""
    mesh: Mesh | None
    """The devices that share the clients; all inputs are on each of them."""
    compile_seconds: float


def chunk_of(experiment: Experiment) -> int | None:
    """How many clients are computed at once; None is all of them."""
    if experiment.parallel == "loop":
        return 1
    if experiment.parallel == "vmap":
        return None
    if experiment.parallel == "auto":
        return AUTO_CHUNK.get(jax.default_backend(), AUTO_CHUNK["gpu"])
    return int(experiment.parallel)


def all_devices() -> Mesh | None:
    """All devices of all processes, to share clients and batches; None if there is only one."""
    devices = jax.devices()
    return None if len(devices) == 1 else Mesh(np.asarray(devices), ("clients",))


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """Puts the same arrays on every device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, NamedSharding(mesh, P()))


def algorithm_of(task: Task, given: dict[str, Any], mesh: Mesh | None = None) -> FedAlgorithm:
    """The algorithm of a task as its experiment runs it; `given` numbers may be traced."""
    return make_algorithm(task, given, chunk=chunk_of(task.experiment), mesh=mesh)


def segment_length(task: Task, checkpoint_every: int | None = None, done: int = 0) -> int:
    """Rounds per dispatch: a divisor of the rounds to every evaluation, checkpoint, and the end."""
    experiment = task.experiment
    length = math.gcd(experiment.rounds, experiment.eval_every, checkpoint_every or 0, done)
    seats = 1 if task.schedule.pooled else task.schedule.clients_per_round
    size = 4 * seats * task.schedule.steps * task.schedule.batch
    while length > 1 and length * size > PLAN_BYTES:
        length = max(d for d in range(1, length) if length % d == 0)
    return length


def initial_state(task: Task, key: Array) -> State:
    """The state before the first round."""
    variables = task.problem.init(key)
    if task.start is not None:
        given = {name: jnp.asarray(leaf) for name, leaf in task.start.arrays.items()}
        like = jax.tree.map(jnp.result_type, variables)
        variables = jax.tree.map(
            lambda leaf, dtype: leaf.astype(dtype), replace(variables, given), like
        )
    return algorithm_of(task, {}).init(variables)


def state_like(task: Task) -> State:
    """Shapes and dtypes of a task's state."""
    with precision(task.experiment):
        return jax.eval_shape(lambda key: initial_state(task, key), jax.random.key(0))


def compile_tasks(
    tasks: Sequence[Task], checkpoint_every: int | None = None, done: int = 0
) -> Program:
    """Compiles the training segment and the evaluation for tasks that differ in numbers and seed.

    Ahead of time, so that nothing can be compiled again later: a call with other shapes fails.

    Args:
      tasks: whose experiments differ in seed and numbers only.
      checkpoint_every: rounds after which the state has to be at hand.
      done: rounds that were run before; `jaxfed.segments` goes on from there.
    """
    first = tasks[0]
    with precision(first.experiment):
        return _compile(tasks, segment_length(first, checkpoint_every, done))


def _compile(tasks: Sequence[Task], length: int) -> Program:
    started = time.perf_counter()
    first = tasks[0]
    every = [numbers(task.experiment) for task in tasks]
    given = {key: jnp.asarray([each[key] for each in every], float) for key in every[0]}
    dataset = first.dataset
    # Central training is one sequence of steps, which nothing can share.
    alone = first.schedule.pooled and jax.process_count() == 1
    mesh = None if alone else all_devices()
    train_set, test_set, test_index, train_index, given = replicated(
        (
            Examples(dataset.x_train, dataset.y_train),
            Examples(dataset.x_test, dataset.y_test),
            batches(np.arange(len(dataset.y_test)), EVAL_BATCH),
            _stacked([_recalibration_rows(task) for task in tasks]),
            given,
        ),
        mesh,
    )
    init = jax.jit(lambda key: initial_state(first, key))
    states = [init(jax.random.key(task.experiment.seed)) for task in tasks]
    state = replicated(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), mesh)
    policy = first.experiment.model.batch_stats or "frozen"

    def train_points(given: Numbers, state: State, train_set: Examples, plans: Plan) -> Any:
        def one(point: tuple) -> tuple[State, Report]:
            given, state, plans = point
            algorithm = algorithm_of(first, given, mesh)
            return jax.lax.scan(
                lambda state, plan: algorithm.round(state, Cohort(train_set, plan)), state, plans
            )

        return jax.lax.map(one, (given, state, plans))

    def evaluate_points(
        state: State, test: Examples, test_index: Array, train: Examples, train_index: Array
    ) -> Any:
        personal = algorithm_of(first, {}, mesh).personal
        evaluate = evaluator(first.problem, policy, personal, mesh=mesh)

        def one(point: tuple) -> Any:
            state, train_index = point
            metrics, variables = evaluate(state, test, test_index, train, train_index)
            return {name: mean.value() for name, mean in metrics.items()}, variables

        return jax.lax.map(one, (state, train_index))

    plans = replicated(plans_of(tasks, 1, length), mesh)
    everywhere = None if mesh is None else NamedSharding(mesh, P())
    # Nothing is donated: a run that diverges goes back to the state that it came from.
    train_program = jax.jit(train_points, out_shardings=everywhere)
    evaluate_program = jax.jit(evaluate_points, out_shardings=everywhere)
    train_compiled = train_program.lower(given, state, train_set, plans).compile()
    evaluate_compiled = evaluate_program.lower(
        state, test_set, test_index, train_set, train_index
    ).compile()
    return Program(
        tasks, length, train_compiled, evaluate_compiled, given, train_set, test_set, test_index,
        train_index, state, mesh, time.perf_counter() - started,
    )  # fmt: skip


def _recalibration_rows(task: Task) -> np.ndarray:
    rng = np.random.default_rng([task.experiment.seed, 0])
    rows = rng.permutation(task.partition.order)[:RECALIBRATION_EXAMPLES]
    return batches(rows, min(EVAL_BATCH, len(rows)))


def _stacked(tables: list[np.ndarray]) -> np.ndarray:
    steps = max(len(table) for table in tables)
    return np.stack([np.pad(t, ((0, steps - len(t)), (0, 0)), constant_values=-1) for t in tables])


def plans_of(tasks: Sequence[Task], first_round: int, length: int) -> Plan:
    """The plans of so many rounds, `[points, rounds, ...]`."""
    rounds = range(first_round, first_round + length)
    return stack_plans(
        [stack_plans([make_plan(task.schedule, number) for number in rounds]) for task in tasks]
    )
