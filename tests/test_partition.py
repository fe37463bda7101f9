"""Laws that every partition obeys, laws of each one, and hashes that pin them for ever."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.data import (
    PARTITIONS,
    DataError,
    Partition,
    format_label_table,
    label_table,
    partition,
)
from jaxfed.data.partition import dirichlet, natural, pathological, shards

LABELS = np.random.default_rng(0).integers(0, 10, 3000).astype(np.int32)
WRITERS = np.random.default_rng(1).integers(0, 50, 3000).astype(np.int32)


def divide(name: str, labels: np.ndarray = LABELS, **knobs) -> Partition:
    writers = WRITERS[: len(labels)] if name == "natural" else None
    return partition(name, labels, **{"num_clients": 20, "client_ids": writers} | knobs)


@st.composite
def any_division(draw):
    """Labels, and arguments with which every partition is possible."""
    num_classes = draw(st.integers(1, 12))
    num_clients = draw(st.integers(1, 15))
    labels = np.repeat(np.arange(num_classes), draw(st.integers(num_clients, 40)))
    extra = draw(st.lists(st.integers(0, num_classes - 1), max_size=30))
    labels = np.concatenate([labels, np.array(extra, int)]).astype(np.int32)
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)
    arguments = {
        "num_clients": num_clients,
        "seed": draw(st.integers(0, 2**40)),
        "shards_per_client": draw(st.integers(1, len(labels) // num_clients)),
        "alpha": draw(st.sampled_from([1e-9, 1e-3, 0.1, 1.0, 1e4])),
        "classes_per_client": draw(st.integers(-(-num_classes // num_clients), num_classes)),
        "client_ids": np.arange(len(labels)) % num_clients,
    }
    return labels, arguments


@pytest.mark.parametrize("name", PARTITIONS)
@given(any_division())
@settings(deadline=None, max_examples=40)
def test_each_example_belongs_to_exactly_one_client_and_no_client_is_empty(name, division):
    labels, arguments = division
    parts = partition(name, labels, **arguments)
    assert np.array_equal(np.sort(parts.order), np.arange(len(labels)))
    assert parts.num_clients == arguments["num_clients"]
    assert parts.sizes.min() >= 1
    assert parts.order.dtype == np.int32 and parts.offsets.dtype == np.int64
    for k in range(parts.num_clients):
        assert np.all(np.diff(parts.client(k)) > 0)
    again = partition(name, labels, **arguments)
    assert np.array_equal(parts.order, again.order)
    assert np.array_equal(parts.offsets, again.offsets)


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_seed_matters(name):
    one, other = (divide(name, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one.order, other.order)


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_subset_is_drawn_first(name):
    parts = divide(name, num_clients=10, examples_per_client=30)
    assert len(np.unique(parts.order)) == len(parts.order)
    if name == "natural":
        assert parts.num_clients == 10
        assert parts.sizes.max() == 30
    else:
        assert len(parts.order) == 300
        other = divide(name, num_clients=10, examples_per_client=30, seed=1)
        assert set(parts.order) != set(other.order)


@pytest.mark.parametrize("name", ["iid", "dirichlet"])
@pytest.mark.parametrize(("num_clients", "sizes"), [(7, {428, 429}), (3000, {1}), (1, {3000})])
def test_sizes_are_as_equal_as_possible(name, num_clients, sizes):
    assert set(divide(name, num_clients=num_clients).sizes) == sizes


def test_shards_of_sorted_labels_are_what_mcmahan_describes():
    """100 clients, 200 shards: a shard of a balanced set has one label, so a client at most two."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
    table = label_table(divide("shards", labels, num_clients=100), labels, 10)
    assert set(table.sum(axis=1)) == {60}
    assert (table > 0).sum(axis=1).max() == 2


@pytest.mark.parametrize("shards_per_client", [1, 2, 5])
def test_a_shard_adds_at_most_two_labels(shards_per_client):
    """Not balanced: a shard, smaller than any class, may straddle one border between classes."""
    parts = shards(LABELS, num_clients=30, shards_per_client=shards_per_client, seed=3)
    kinds = (label_table(parts, LABELS, 10) > 0).sum(axis=1)
    assert kinds.max() <= 2 * shards_per_client
    assert parts.sizes.max() - parts.sizes.min() <= shards_per_client


@given(num_clients=st.integers(10, 60), classes_per_client=st.integers(1, 10), seed=st.integers(0))
@settings(deadline=None, max_examples=40)
def test_pathological_gives_exactly_so_many_classes(num_clients, classes_per_client, seed):
    parts = pathological(
        LABELS, num_clients=num_clients, classes_per_client=classes_per_client, seed=seed
    )
    table = label_table(parts, LABELS, 10)
    assert set((table > 0).sum(axis=1)) == {classes_per_client}
    holders = (table > 0).sum(axis=0)
    assert holders.max() - holders.min() <= 1
    for column in table.T:
        shares = column[column > 0]
        assert shares.max() - shares.min() <= 1


def skew(name: str, alpha: float) -> float:
    """Mean total variation distance between a client's class mixture and everybody's, 0 to 1."""
    table = label_table(divide(name, alpha=alpha), LABELS, 10)
    mixtures = table / table.sum(axis=1, keepdims=True)
    return float(np.abs(mixtures - table.sum(axis=0) / table.sum()).sum(axis=1).mean() / 2)


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet-unbalanced"])
def test_alpha_goes_from_one_class_to_iid(name):
    iid = skew("iid", 1.0)
    small, middle, large = (skew(name, alpha) for alpha in (0.01, 1.0, 1e5))
    assert small > 0.7 > middle > 2 * iid
    assert large < 1.5 * iid


def test_dirichlet_draws_from_the_prior():
    """Rare classes stay rare: q ~ Dir(alpha p), so the mean mixture of early clients is p."""
    labels = np.repeat([0, 1], [900, 100])
    means = [
        label_table(dirichlet(labels, num_clients=10, alpha=5.0, seed=seed), labels, 2)[0, 1]
        for seed in range(200)
    ]
    assert np.mean(means) == pytest.approx(10, abs=1.5)


def test_dirichlet_treats_all_clients_alike():
    """The last clients are no more mixed than the first ones, although classes run out."""
    kinds = np.mean(
        [
            (label_table(divide("dirichlet", alpha=0.05, seed=s), LABELS, 10) > 0).sum(axis=1)
            for s in range(100)
        ],
        axis=0,
    )
    assert abs(kinds[:5].mean() - kinds[-5:].mean()) < 0.25


def test_quantity_skews_sizes_and_not_labels():
    parts = divide("quantity", alpha=0.3)
    assert parts.sizes.max() > 5 * np.median(parts.sizes)
    largest = np.argmax(parts.sizes)
    shares = np.bincount(LABELS[parts.client(int(largest))], minlength=10) / parts.sizes[largest]
    assert np.abs(shares - 0.1).max() < 0.05
    assert np.ptp(divide("quantity", alpha=1e8).sizes) <= 1


def test_natural_keeps_the_clients():
    parts = divide("natural", num_clients=None)
    assert parts.num_clients == 50
    for k in range(50):
        assert np.array_equal(parts.client(k), np.flatnonzero(k == WRITERS))
    some = divide("natural", num_clients=8)
    owners = [set(WRITERS[some.client(k)]) for k in range(8)]
    assert all(len(each) == 1 for each in owners)
    assert len(set.union(*owners)) == 8
    assert set(some.sizes) <= set(parts.sizes)
    assert natural(WRITERS, examples_per_client=10**6).sizes.sum() == 3000


GOLDEN = {
    "iid": "157534775f70d5cf",
    "shards": "ea38ed540642bccd",
    "dirichlet": "c19c09e880e58f00",
    "dirichlet-unbalanced": "7606f4ba8684df6a",
    "pathological": "b60304985d204481",
    "quantity": "9c3051b01ba82e06",
    "natural": "23356d313286afb1",
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_partitions_never_change(name):
    """A published seed must name the same clients in every version and on every machine."""
    labels = (np.arange(1000) * 7919 % 10).astype(np.int32)
    parts = partition(
        name, labels, num_clients=13, seed=42, examples_per_client=50,
        client_ids=np.arange(1000) ** 2 % 31,
    )  # fmt: skip
    content = parts.order.astype("<i4").tobytes() + parts.offsets.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("irid", {}, "did you mean 'iid'"),
        ("iid", {"num_clients": 0}, "got num_clients 0; expected 1 to 3000"),
        ("iid", {"num_clients": 3001}, "got num_clients 3001; expected 1 to 3000"),
        ("iid", {"num_clients": None}, "got no num_clients"),
        ("iid", {"seed": -1}, "got seed -1"),
        ("iid", {"examples_per_client": 151}, "20 clients x 151 examples = 3020; expected at most"),
        ("iid", {"examples_per_client": 0}, "examples_per_client 0"),
        ("shards", {"shards_per_client": 151}, "= 3020 shards; expected at most 3000"),
        ("shards", {"shards_per_client": 0}, "shards_per_client 0"),
        ("dirichlet", {"alpha": 0.0}, "got alpha 0.0"),
        ("dirichlet-unbalanced", {"alpha": np.nan}, "got alpha nan"),
        ("quantity", {"alpha": np.inf}, "got alpha inf"),
        ("pathological", {"classes_per_client": 11}, "expected 1 to 10"),
        ("pathological", {"classes_per_client": 0}, "classes_per_client 0"),
        ("pathological", {"num_clients": 3, "classes_per_client": 3}, "expected 4 to 10"),
        ("pathological", {"num_clients": 3000}, "hold class 0; expected at most"),
        ("natural", {"client_ids": None}, "without client ids"),
        ("natural", {"num_clients": 51}, "got num_clients 51; expected 1 to 50"),
        ("natural", {"examples_per_client": 0}, "examples_per_client 0"),
    ],
)
def test_impossible_divisions_are_refused_in_one_line(name, arguments, message):
    with pytest.raises(DataError) as caught:
        divide(name, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_knobs_of_the_table_are_those_that_matter():
    changed = {"shards_per_client": 3, "alpha": 0.1, "classes_per_client": 3}
    for name, spec in PARTITIONS.items():
        plain = divide(name)
        for knob, value in changed.items():
            same = np.array_equal(plain.order, divide(name, **{knob: value}).order)
            assert same == (knob not in spec.knobs), (name, knob)


def test_label_table_counts_and_prints():
    table = label_table(divide("iid"), LABELS, 12)
    assert table.shape == (20, 12)
    assert np.array_equal(table.sum(axis=0), np.bincount(LABELS, minlength=12))
    text = format_label_table(table, max_rows=3, max_columns=11).splitlines()
    assert len(text) == 1 + 3 + 2 + 1
    assert text[0].split() == ["client", "total", *map(str, range(11))]
    assert text[-3].split() == ["..."]
    assert text[-2].split()[:2] == ["all", "3000"]
    assert text[-1] == "(1 more classes)"


def test_a_hundred_thousand_clients_take_no_python_loop():
    """Minutes if any partition walked over clients and examples one by one."""
    labels = (np.arange(200_000) % 10).astype(np.int32)
    for name in PARTITIONS:
        knobs = {"classes_per_client": 1, "shards_per_client": 1, "alpha": 0.1}
        parts = partition(name, labels, num_clients=100_000, client_ids=labels * 0 + np.arange(
            200_000) // 2, **knobs)  # fmt: skip
        assert parts.num_clients == 100_000
