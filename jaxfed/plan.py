"""Which client visits which example at which step: all randomness of data, made on the host.

A round's plan is a table of integers, so the compiled program holds no random generator for
data, and another framework can be handed exactly the same batches. Everything is drawn from
`(seed, round, client)`, so a plan depends neither on the order in which rounds are planned nor
on how clients are later spread over chunks and devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Int

from jaxfed.data.partition import Partition

PADDING = -1


class Plan(NamedTuple):
    """The work of one round; of several rounds, with a leading axis on every field."""

    seed: Int[np.ndarray | Array, "*rounds"]
    """Seed of the experiment (dropout draws its keys from it)."""
    round: Int[np.ndarray | Array, "*rounds"]
    """Number of the round, from 1."""
    clients: Int[np.ndarray | Array, "*rounds clients"]
    """Ids of the cohort's clients; -1 is an empty seat."""
    rows: Int[np.ndarray | Array, "*rounds clients steps batch"]
    """Rows of the training set that a client visits at each step; -1 is padding."""


class Schedule(NamedTuple):
    """How a partition is turned into plans; `steps` and `batch` fix the shape of all of them."""

    partition: Partition
    seed: int
    clients_per_round: int
    epochs: int
    batch: int
    steps: int
    shuffle: bool
    pooled: bool
    """True: the cohort's examples make one pseudo-client (central training)."""


def make_schedule(
    partition: Partition,
    *,
    seed: int,
    clients_per_round: int,
    epochs: int,
    batch_size: int | None,
    shuffle: bool,
    pooled: bool = False,
) -> Schedule:
    """Fixes the shape of the plans: the largest client decides, smaller ones are padded.

    Args:
      partition: which examples each client holds.
      seed: of cohorts and batch order.
      clients_per_round: cohort size.
      epochs: passes over a client's examples each round.
      batch_size: examples a step; None is one full batch.
      shuffle: draw a new order every epoch.
      pooled: merge each cohort into one pseudo-client that takes all its steps in sequence.
    """
    sizes = np.sort(partition.sizes)
    largest = int(sizes[-clients_per_round:].sum() if pooled else sizes[-1])
    batch = min(batch_size or largest, largest)
    return Schedule(
        partition, seed, clients_per_round, epochs, batch, epochs * -(-largest // batch),
        shuffle, pooled,
    )  # fmt: skip


def cohort_of(schedule: Schedule, number: int) -> Int[np.ndarray, " clients"]:
    """The clients of round `number`, drawn uniformly without replacement."""
    population = schedule.partition.num_clients
    if schedule.clients_per_round == population:
        return np.arange(population, dtype=np.int32)
    rng = np.random.default_rng([schedule.seed, number])
    drawn = rng.choice(population, schedule.clients_per_round, replace=False)
    return np.sort(drawn).astype(np.int32)


def make_plan(schedule: Schedule, number: int) -> Plan:
    """The plan of round `number`."""
    cohort = cohort_of(schedule, number)
    if schedule.pooled:
        rows = np.concatenate([schedule.partition.client(k) for k in cohort.tolist()])
        # The pseudo-client's id is 0, whatever the cohort.
        table = _batches(schedule, rows, number, 0)[None]
        cohort = np.zeros(1, np.int32)
    else:
        table = np.stack(
            [_batches(schedule, schedule.partition.client(k), number, k) for k in cohort.tolist()]
        )
    return Plan(np.asarray(schedule.seed, np.int32), np.asarray(number, np.int32), cohort, table)


def _batches(
    schedule: Schedule, rows: Int[np.ndarray, " examples"], number: int, client: int
) -> Int[np.ndarray, "steps batch"]:
    rng = np.random.default_rng([schedule.seed, number, client])
    table = np.full((schedule.steps, schedule.batch), PADDING, np.int32)
    per_epoch = -(-len(rows) // schedule.batch)
    for epoch in range(schedule.epochs if len(rows) else 0):
        # The last batch of an epoch is smaller, as in McMahan et al. (2017), Algorithm 1.
        flat = table[epoch * per_epoch : (epoch + 1) * per_epoch].reshape(-1)
        flat[: len(rows)] = rng.permutation(rows) if schedule.shuffle else rows
    return table


def stack_plans(plans: Sequence[Plan]) -> Plan:
    """Puts plans of the same cohort size side by side, on a new leading axis."""
    steps = max(plan.rows.shape[-2] for plan in plans)
    batch = max(plan.rows.shape[-1] for plan in plans)

    def padded(table: np.ndarray) -> np.ndarray:
        grow = [(0, 0)] * (table.ndim - 2)
        grow += [(0, steps - table.shape[-2]), (0, batch - table.shape[-1])]
        return np.pad(table, grow, constant_values=PADDING)

    return Plan(
        seed=np.stack([plan.seed for plan in plans]),
        round=np.stack([plan.round for plan in plans]),
        clients=np.stack([plan.clients for plan in plans]),
        rows=np.stack([padded(np.asarray(plan.rows)) for plan in plans]),
    )
