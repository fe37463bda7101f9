"""Plans: every example once an epoch, nothing that depends on order of planning."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import clients_of, plan_of

from jaxfed import make_plan, make_schedule
from jaxfed.data.partition import Partition
from jaxfed.plan import stack_plans

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@given(sizes, st.integers(1, 3), st.none() | st.integers(1, 40), st.integers(0, 5))
def test_each_epoch_visits_every_example_of_a_client_once(sizes, epochs, batch_size, seed):
    partition = clients_of(*sizes)
    plan = plan_of(partition, 3, epochs=epochs, batch_size=batch_size, seed=seed)
    batch = plan.rows.shape[-1]
    for client, table in zip(plan.clients, plan.rows, strict=True):
        rows = partition.client(int(client))
        per_epoch = -(-len(rows) // batch)
        for epoch in range(epochs):
            part = table[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert sorted(part[part >= 0].tolist()) == rows.tolist()
            # Only the last batch of an epoch may be smaller.
            assert (part[:-1] >= 0).all()
        assert (table[epochs * per_epoch :] == -1).all()


@given(sizes, st.integers(1, 3), st.integers(1, 9))
def test_central_visits_what_the_clients_would_have(sizes, epochs, batch_size):
    partition = clients_of(*sizes)
    few = max(1, len(sizes) // 2)
    federated = plan_of(partition, 2, epochs=epochs, batch_size=batch_size, clients_per_round=few)
    pooled = plan_of(
        partition, 2, epochs=epochs, batch_size=batch_size, clients_per_round=few, pooled=True
    )
    assert pooled.rows.shape[0] == 1
    for plan in (federated, pooled):
        assert (plan.rows >= 0).any()
    assert np.array_equal(
        np.sort(federated.rows[federated.rows >= 0]), np.sort(pooled.rows[pooled.rows >= 0])
    )


def test_plans_depend_on_seed_round_and_client_only():
    partition = clients_of(*[10] * 50)

    def schedule(seed):
        return make_schedule(
            partition, seed=seed, clients_per_round=5, epochs=2, batch_size=4, shuffle=True
        )

    late, early = make_plan(schedule(0), 7), make_plan(schedule(0), 1)
    again = make_plan(schedule(0), 7)
    assert np.array_equal(late.rows, again.rows)
    assert np.array_equal(late.clients, again.clients)
    assert not np.array_equal(late.clients, early.clients)
    assert not np.array_equal(late.clients, make_plan(schedule(1), 7).clients)
    assert len(set(late.clients.tolist())) == 5
    first_epochs = late.rows[:, :3], late.rows[:, 3:]
    assert not np.array_equal(*first_epochs)


def test_every_client_gets_its_turn():
    """Cohorts are uniform: 5 of 50 over 400 rounds is 40 visits each, give or take 6 sigma."""
    schedule = make_schedule(
        clients_of(*[1] * 50), seed=0, clients_per_round=5, epochs=1, batch_size=1, shuffle=True
    )
    visits = np.bincount(
        np.concatenate([make_plan(schedule, n).clients for n in range(1, 401)]), minlength=50
    )
    assert abs(visits - 40).max() < 6 * np.sqrt(40)


def test_without_shuffling_the_order_is_that_of_the_data():
    schedule = make_schedule(
        clients_of(5), seed=0, clients_per_round=1, epochs=1, batch_size=2, shuffle=False
    )
    assert make_plan(schedule, 1).rows.tolist() == [[[0, 1], [2, 3], [4, -1]]]


@pytest.mark.parametrize("sizes", [(4, 4), (9, 2)])
def test_stacked_plans_are_padded_to_the_largest(sizes):
    plans = [plan_of(clients_of(*sizes)), plan_of(clients_of(17, 3))]
    stacked = stack_plans(plans)
    assert stacked.rows.shape == (2, 2, 5, 4)
    for plan, index in zip(plans, stacked.rows, strict=True):
        steps = plan.rows.shape[1]
        assert np.array_equal(index[:, :steps, : plan.rows.shape[2]], plan.rows)
        assert (index[:, steps:] == -1).all()


def test_planning_costs_what_the_cohort_does_whatever_the_population():
    def peak(population):
        order, offsets = np.arange(population, dtype=np.int32), np.arange(population + 1)
        schedule = make_schedule(
            Partition(order, offsets), seed=0, clients_per_round=100, epochs=1, batch_size=1,
            shuffle=True,
        )  # fmt: skip
        tracemalloc.start()
        make_plan(schedule, 1)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10**4)  # what is made once
    assert peak(10**6) < 2 * peak(10**4)
