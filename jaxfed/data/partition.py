"""Who owns which training example: the ways of dividing labelled data among clients.

Every way is a function from labels and a seed to a `Partition`. Inside, each only decides the
owner of every example; `_group` then puts a client's examples in ascending order, so the order in
which a client sees its data is never an accident of how it was dealt out. Randomness is
`numpy.random.PCG64` seeded by `SeedSequence`: the same seed gives the same partition on every
machine (golden hashes in the tests pin it).
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxfed.data.dataset import DataError


class Partition(NamedTuple):
    """Examples grouped by client.

    Attributes:
      order: example indices, client after client and ascending within one, int32 [M].
      offsets: client k owns `order[offsets[k]:offsets[k + 1]]`, int64 [K + 1].
    """

    order: np.ndarray
    offsets: np.ndarray

    @property
    def num_clients(self) -> int:
        """Number of clients, K."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, int64 [K]."""
        return np.diff(self.offsets)

    def client(self, k: int) -> np.ndarray:
        """Example indices of client k, int32 [sizes[k]]."""
        return self.order[self.offsets[k] : self.offsets[k + 1]]


def iid(labels: np.ndarray, *, num_clients: int, seed: int) -> Partition:
    """Random parts whose sizes differ by at most one.

    >>> iid(np.zeros(7), num_clients=3, seed=0).sizes
    array([3, 2, 2])
    """
    _check_clients(num_clients, len(labels))
    return _group(_rng(seed).permutation(np.arange(len(labels)) % num_clients), num_clients)


def shards(labels: np.ndarray, *, num_clients: int, shards_per_client: int, seed: int) -> Partition:
    """Sort by label, cut into equal shards, deal `shards_per_client` of them to each client.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", section 3: 100 clients and 2 shards each, so that most clients have two digits.
    Examples of one label keep their order.

    >>> labels = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    >>> parts = shards(labels, num_clients=2, shards_per_client=2, seed=0)
    >>> labels[parts.client(0)], labels[parts.client(1)]
    (array([0, 3, 0, 3]), array([1, 2, 1, 2]))
    """
    _check_clients(num_clients, len(labels))
    _check_positive("shards_per_client", shards_per_client)
    count = num_clients * shards_per_client
    if count > len(labels):
        raise DataError(
            f"got {num_clients} clients x {shards_per_client} shards = {count} shards; expected at "
            f"most {len(labels)}, the number of examples: lower num_clients or shards_per_client"
        )
    shard = np.arange(len(labels)) * count // len(labels)
    owner = np.empty(len(labels), np.int64)
    owner[np.argsort(labels, kind="stable")] = _rng(seed).permutation(count)[shard]
    return _group(owner // shards_per_client, num_clients)


def dirichlet(labels: np.ndarray, *, num_clients: int, alpha: float, seed: int) -> Partition:
    """Equally many examples for every client, their classes drawn from Dir(alpha * prior).

    Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification": client k draws q_k ~ Dir(alpha p), p the class frequencies, and then labels
    from q_k. Sampling is without replacement, so classes run out; those who wanted one draw again
    from what is left of their q_k (from a new one if nothing is), all clients alike, where dealing
    client after client would leave the last ones with the remains. Every example is used once.
    alpha -> infinity is IID; alpha -> 0 is one class a client, as far as equal sizes allow.

    NIID-Bench, Flower and others mean `dirichlet_unbalanced` by this name. There alpha is of one
    client; here it is shared by C classes, so alpha * C is about as skewed.
    """
    _check_clients(num_clients, len(labels))
    _check_alpha(alpha)
    rng = _rng(seed)
    y = np.unique(labels, return_inverse=True)[1]
    left = np.bincount(y)
    prior = left / len(y)
    mixtures = rng.dirichlet(alpha * prior, size=num_clients)
    client = np.arange(len(y)) % num_clients
    wanted = np.empty(len(y), np.int64)
    waiting = np.arange(len(y))
    while len(waiting):  # a class runs out in every round but the last
        mixtures[:, left == 0] = 0
        poor = mixtures.sum(axis=1) < 1e-12  # all that this client wanted is gone
        mixtures[np.ix_(poor, left > 0)] = rng.dirichlet(alpha * prior[left > 0], size=poor.sum())
        picks = _draw(rng, mixtures, client[waiting])
        order = np.lexsort((rng.random(len(picks)), picks))
        counts = np.bincount(picks, minlength=len(left))
        served = order[_ranks(counts) < left[picks[order]]]
        wanted[waiting[served]] = picks[served]
        left = np.maximum(left - counts, 0)
        waiting = np.delete(waiting, served)
    owner = np.empty(len(y), np.int64)
    owner[np.lexsort((rng.random(len(y)), y))] = client[np.argsort(wanted, kind="stable")]
    return _group(owner, num_clients)


def dirichlet_unbalanced(
    labels: np.ndarray, *, num_clients: int, alpha: float, seed: int
) -> Partition:
    """Every class is divided among the clients in proportions drawn from Dir(alpha).

    Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks"; Li et
    al. 2022, "Federated Learning on Non-IID Data Silos". Sizes are skewed along with the labels. A
    client left without any example gets one that another client can spare.
    """
    _check_clients(num_clients, len(labels))
    _check_alpha(alpha)
    rng = _rng(seed)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))
        position = (np.arange(len(members)) + 0.5) / len(members) * ends[-1]
        owner[members] = np.searchsorted(ends, position)
    keep = np.unique(owner, return_index=True)[1]  # one example of every client that has any
    spare = rng.permutation(np.delete(np.arange(len(labels)), keep))
    empty = np.setdiff1d(np.arange(num_clients), owner)
    owner[spare[: len(empty)]] = empty
    return _group(owner, num_clients)


def pathological(
    labels: np.ndarray, *, num_clients: int, classes_per_client: int, seed: int
) -> Partition:
    """Exactly `classes_per_client` classes a client, each class shared equally by its holders.

    Every class gets the same number of holders (give or take one), drawn at random. Unlike in
    `shards`, no client has fewer or more classes than asked for.
    """
    _check_clients(num_clients, len(labels))
    _check_positive("classes_per_client", classes_per_client)
    rng = _rng(seed)
    classes, y = np.unique(labels, return_inverse=True)
    if not len(classes) / num_clients <= classes_per_client <= len(classes):
        raise DataError(
            f"got classes_per_client {classes_per_client} for {num_clients} clients; expected "
            f"{-(-len(classes) // num_clients)} to {len(classes)}, so that each of the "
            f"{len(classes)} classes has a client"
        )
    keys = rng.random((num_clients, len(classes)))
    holders = np.zeros((num_clients, len(classes)), bool)
    load = np.zeros(len(classes))
    for k in range(num_clients):  # the classes held least so far, ties broken at random
        chosen = np.argpartition(load + keys[k], classes_per_client - 1)[:classes_per_client]
        holders[k, chosen] = True
        load[chosen] += 1
    owner = np.empty(len(y), np.int64)
    for c in range(len(classes)):
        members = np.flatnonzero(y == c)
        clients = rng.permutation(np.flatnonzero(holders[:, c]))
        if len(clients) > len(members):
            raise DataError(
                f"got {len(clients)} clients that hold class {classes[c]}; expected at most "
                f"{len(members)}, its number of examples: lower num_clients or classes_per_client"
            )
        owner[rng.permutation(members)] = clients[np.arange(len(members)) % len(clients)]
    return _group(owner, num_clients)


def quantity(labels: np.ndarray, *, num_clients: int, alpha: float, seed: int) -> Partition:
    """Random parts whose sizes are drawn from Dir(alpha), at least one example each.

    Li et al. 2022, "Federated Learning on Non-IID Data Silos", quantity skew.
    """
    _check_clients(num_clients, len(labels))
    _check_alpha(alpha)
    rng = _rng(seed)
    shares = rng.dirichlet(np.full(num_clients, alpha)) * (len(labels) - num_clients)
    sizes = 1 + np.floor(shares).astype(np.int64)
    largest_remainders = np.argsort(np.floor(shares) - shares, kind="stable")
    sizes[largest_remainders[: len(labels) - sizes.sum()]] += 1
    return _group(rng.permutation(np.repeat(np.arange(num_clients), sizes)), num_clients)


def natural(
    client_ids: np.ndarray,
    *,
    num_clients: int | None = None,
    examples_per_client: int | None = None,
    seed: int = 0,
) -> Partition:
    """The division that comes with the data: writers, users, hospitals.

    Args:
      client_ids: owner of every example, integers [N].
      num_clients: draw that many of the clients at random; None takes all.
      examples_per_client: draw at most that many of a client's examples at random.
      seed: of both draws.

    >>> natural(np.array([7, 9, 7, 8])).order, natural(np.array([7, 9, 7, 8])).offsets
    (array([0, 2, 3, 1], dtype=int32), array([0, 2, 3, 4]))
    """
    everyone, owner = np.unique(client_ids, return_inverse=True)
    num_clients = len(everyone) if num_clients is None else num_clients
    if not 1 <= num_clients <= len(everyone):
        raise DataError(
            f"got num_clients {num_clients}; expected 1 to {len(everyone)}, the clients of this "
            "dataset's natural partition"
        )
    rng = _rng(seed)
    number = np.full(len(everyone), -1)
    number[np.sort(rng.permutation(len(everyone))[:num_clients])] = np.arange(num_clients)
    kept = number[owner]
    if examples_per_client is not None:
        _check_positive("examples_per_client", examples_per_client)
        order = np.lexsort((rng.random(len(owner)), owner))
        kept[order[_ranks(np.bincount(owner)) >= examples_per_client]] = -1
    return _group(kept, num_clients)


class PartitionSpec(NamedTuple):
    """One way of dividing: the function, the knobs that it alone uses, and a line for `--help`."""

    function: Callable[..., Partition]
    knobs: tuple[str, ...]
    summary: str
    labels: bool = False
    """Whether it divides by class."""


PARTITIONS = {
    "iid": PartitionSpec(iid, (), "equal random parts"),
    "shards": PartitionSpec(
        shards, ("shards_per_client",), "sorted by label and cut in shards", True
    ),
    "dirichlet": PartitionSpec(dirichlet, ("alpha",), "equal sizes, classes from Dir(alpha)", True),
    "dirichlet-unbalanced": PartitionSpec(
        dirichlet_unbalanced, ("alpha",), "each class divided by Dir(alpha); sizes differ", True
    ),
    "pathological": PartitionSpec(
        pathological, ("classes_per_client",), "exactly so many classes per client", True
    ),
    "quantity": PartitionSpec(quantity, ("alpha",), "IID labels, sizes from Dir(alpha)"),
    "natural": PartitionSpec(natural, (), "the clients that come with the data"),
}
"""Every partition by name. `num_clients`, `examples_per_client` and the seed apply to all."""


def partition(
    name: str,
    labels: np.ndarray,
    *,
    num_clients: int | None,
    seed: int = 0,
    examples_per_client: int | None = None,
    shards_per_client: int = 2,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    client_ids: np.ndarray | None = None,
) -> Partition:
    """Divide examples among clients in the way called `name`.

    Args:
      name: a key of `PARTITIONS`; knobs that it does not use are ignored.
      labels: class of every training example, int [N].
      num_clients: number of clients; None only for `natural`: all of them.
      seed: of everything random here, at least 0.
      examples_per_client: n uses only `n * num_clients` examples, drawn at random before they are
        divided; for `natural` it is the most that a client keeps. None uses all.
      shards_per_client: for `shards`.
      alpha: for `dirichlet`, `dirichlet-unbalanced` and `quantity`; small is skewed.
      classes_per_client: for `pathological`.
      client_ids: owner of every example, int [N], for `natural`.

    Raises:
      DataError: the name is unknown, or the division is impossible.

    >>> partition("iid", np.zeros(100), num_clients=4, examples_per_client=5).sizes
    array([5, 5, 5, 5])
    """
    if name not in PARTITIONS:
        close = difflib.get_close_matches(name, PARTITIONS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise DataError(f"got partition {name!r}{hint}; expected one of {', '.join(PARTITIONS)}")
    if name == "natural":
        if client_ids is None:
            raise DataError(
                "got partition 'natural' for data without client ids; expected a .npz file with "
                "client_train: choose another partition or add them"
            )
        return natural(
            client_ids, num_clients=num_clients, examples_per_client=examples_per_client, seed=seed
        )
    if num_clients is None:
        raise DataError(f"got no num_clients; expected a number for partition {name!r}")
    _check_clients(num_clients, len(labels))
    subset = None
    if examples_per_client is not None:
        _check_positive("examples_per_client", examples_per_client)
        total = num_clients * examples_per_client
        if total > len(labels):
            raise DataError(
                f"got {num_clients} clients x {examples_per_client} examples = {total}; expected "
                f"at most {len(labels)}, the number of training examples: lower "
                "num_clients or examples_per_client"
            )
        subset = np.sort(_rng(seed, stream=1).permutation(len(labels))[:total]).astype(np.int32)
        labels = labels[subset]
    values = {
        "shards_per_client": shards_per_client,
        "alpha": alpha,
        "classes_per_client": classes_per_client,
    }
    function, knobs, _, by_class = PARTITIONS[name]
    if by_class and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise DataError(
            f"got partition {name!r} for targets {labels.dtype} {list(labels.shape)}; expected "
            "classes [N], by which it divides: choose iid, quantity or natural"
        )
    parts = function(labels, num_clients=num_clients, seed=seed, **{k: values[k] for k in knobs})
    return parts if subset is None else parts._replace(order=subset[parts.order])


def _rng(seed: int, stream: int = 0) -> np.random.Generator:
    """A generator of this module's own: no other use of the same seed meets its numbers."""
    if seed < 0:
        raise DataError(f"got seed {seed}; expected 0 or more")
    entropy = [seed, int.from_bytes(b"part", "big"), stream]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def _group(owner: np.ndarray, num_clients: int) -> Partition:
    """Partition from the owner of every example, int [N]; -1 is nobody's."""
    order = np.argsort(owner, kind="stable")[np.count_nonzero(owner < 0) :]
    sizes = np.bincount(owner[order], minlength=num_clients)
    return Partition(order.astype(np.int32), np.concatenate([[0], np.cumsum(sizes)]))


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each group, for sorted groups of these sizes: int [sum(counts)]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _draw(rng: np.random.Generator, mixtures: np.ndarray, client: np.ndarray) -> np.ndarray:
    """For each entry of `client` a class drawn from its mixture, a row of weights [K, C]."""
    num_clients, num_classes = mixtures.shape
    ends = np.cumsum(mixtures, axis=1)
    ends /= ends[:, -1:]
    # One search over all clients' intervals laid end to end. A class without weight has no width.
    place = client + rng.random(len(client)) * (1 - 1e-9)
    flat = (ends + np.arange(num_clients)[:, None]).ravel()
    return np.searchsorted(flat, place, side="right") - client * num_classes


def _check_clients(num_clients: int, examples: int) -> None:
    if not 1 <= num_clients <= examples:
        raise DataError(
            f"got num_clients {num_clients}; expected 1 to {examples}, the number of examples"
        )


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise DataError(f"got {name} {value}; expected 1 or more")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < np.inf:
        raise DataError(f"got alpha {alpha}; expected a finite number above 0")
