"""What is kept when a program's rounds are over: weights, and how good they are for each client."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from jaxfed.core.evaluate import batches, row_scorer
from jaxfed.core.federated import State
from jaxfed.core.model import Variables
from jaxfed.core.problem import Metrics
from jaxfed.precision import precision
from jaxfed.prepare import Task
from jaxfed.program import EVAL_BATCH, Program, algorithm_of, replicated

Scores = dict[str, Float[np.ndarray, " clients"]]
"""Metrics of the final network on the training examples of each client; NaN: it has none.

Where clients have networks of their own it is each client's, NaN if it never trained.
"""


class Final(NamedTuple):
    """What is kept of one point when its rounds are over."""

    variables: Variables
    """Numpy arrays, as evaluated (statistics recalibrated)."""
    clients: Scores


def finish(program: Program, state: State) -> list[Final]:
    """Evaluates the state after the last round for good: weights and every client's scores."""
    first = program.tasks[0]
    with precision(first.experiment):
        personal = algorithm_of(first, {}).personal
        _, variables = program.evaluate(
            state, program.test_set, program.test_index, program.train_set, program.train_index
        )
        everywhere = None if program.mesh is None else NamedSharding(program.mesh, P())
        score = jax.jit(
            row_scorer(first.problem, personal, mesh=program.mesh), out_shardings=everywhere
        )
        finals = []
        for point, task in enumerate(program.tasks):
            ours, weights = jax.tree.map(lambda leaf, at=point: leaf[at], (state, variables))
            index, owner = _client_batches(task, one_client_each=personal is not None)
            placed = replicated((index, owner), program.mesh)
            metrics = jax.device_get(score(ours, weights, program.train_set, *placed))
            seen = None if personal is None else jax.device_get(ours.seen)
            scores = _by_client(task, metrics, index >= 0, seen)
            finals.append(Final(jax.device_get(weights), scores))
    return finals


def _client_batches(task: Task, *, one_client_each: bool) -> tuple[np.ndarray, np.ndarray]:
    """All examples, client after client, in batches, and whose they are if each is of one."""
    partition = task.partition
    if not one_client_each:
        index = batches(partition.order, min(EVAL_BATCH, len(partition.order)))
        return index, np.zeros(len(index), np.int32)
    size = min(EVAL_BATCH, int(partition.sizes.max()))
    tables = [batches(partition.client(k), size) for k in range(partition.num_clients)]
    owner = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
    return np.concatenate(tables), owner


def _by_client(task: Task, metrics: Metrics, there: np.ndarray, seen: np.ndarray | None) -> Scores:
    sizes = task.partition.sizes
    client = np.repeat(np.arange(len(sizes)), sizes)
    known = sizes > 0 if seen is None else (sizes > 0) & seen

    def summed(values: Any) -> np.ndarray:
        return np.bincount(client, np.asarray(values)[there], len(sizes))

    with np.errstate(invalid="ignore", divide="ignore"):
        means = {name: summed(m.total) / summed(m.count) for name, m in metrics.items()}
    return {name: np.where(known, values, np.nan) for name, values in means.items()}
