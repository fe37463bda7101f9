"""What is kept when a program's rounds are over: weights, and how good they are for each client."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from jaxfed.algorithm import State
from jaxfed.evaluate import batches, row_scorer
from jaxfed.model import Variables
from jaxfed.prepare import Task, compute_dtype, precision
from jaxfed.program import EVAL_BATCH, Program, replicated


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
