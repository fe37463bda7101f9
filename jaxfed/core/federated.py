"""A federated algorithm as a composition: a client, an aggregator, a server.

`federated(client, server, federation)` makes the two pure functions `init(variables) -> state` and
`round(state, cohort) -> (state, report)`. An algorithm with another shape writes its own `round`
around `collect`, one pass over a cohort.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxfed.core.batch_stats import FROZEN, Statistics
from jaxfed.core.clients import map_sum
from jaxfed.core.local import Work, examples_of, steps_of
from jaxfed.core.model import Variables
from jaxfed.core.problem import Examples, Mean, Metrics
from jaxfed.core.tree import (
    Tree,
    all_finite,
    count_parameters,
    divide,
    norm,
    scale,
    where,
    zeros,
)
from jaxfed.plan import Plan

Message = Tree
Memory = Tree
Weighting = Literal["examples", "uniform"]

RESERVED = 2**32 - 1
"""Folded into keys for what is not a step of a client: no step and no client has this number."""

GATHERED = 2**29
"""Numbers that an aggregator may gather on a device: clients x parameters (2 GiB in float32)."""


class Broadcast(NamedTuple):
    """What the server sends to every client: its variables and its state."""

    variables: Variables
    server: Tree


class Sent(NamedTuple):
    """What one client returns."""

    message: Message
    """To be aggregated; by convention server weights minus trained weights, or a tuple of that and
    more."""
    stats: Tree
    """BatchNorm's statistics after the last step."""
    metrics: Metrics
    memory: Memory = None
    """What it keeps until it takes part again."""
    weight: Float[Array, ""] | float = 1.0
    """Multiplies the weight that the federation gives it."""


def _params(variables: Variables) -> Tree:
    return variables.params


class Client(NamedTuple):
    """One client as pure functions.

    Args:
      init: `variables -> memory`, what a client keeps before it first takes part; None: nothing.
      update: `(broadcast, memory, work) -> Sent`.
      message: `variables -> tree` with the structure of its messages; by default the parameters.
      personal: `(server variables, memory) -> variables`, the client's own network, where it has
        one.
    """

    init: Callable[[Variables], Memory]
    update: Callable[[Broadcast, Memory, Work], Sent]
    message: Callable[[Variables], Message] = _params
    personal: Callable[[Variables, Memory], Variables] | None = None


def stateless(update: Callable[[Broadcast, Memory, Work], Sent]) -> Client:
    """A client that remembers nothing between rounds."""
    return Client(lambda _: None, update)


class Aggregator(NamedTuple):
    """How the clients' messages become one.

    Aggregators are composed by wrapping: `clipped(1.0, mean())` replaces `encode` of `mean()`.

    Args:
      init: `message -> state`, given a tree like the messages.
      encode: `(state, message, weight, key) -> (summed, gathered)`, on each client. `summed` is
        added up over clients as they are computed; `gathered` is stacked on a leading axis
        `[clients]`, for rules that must see all messages at once. None stands for nothing.
      decode: `(state, summed, gathered, key) -> (message, state, measurements)`, once, on the
        server. `measurements` is a dict of scalars that is recorded with the round.

    A client that is absent, or whose message is not finite, has weight 0 and a message of zeros,
    and adds zeros to `summed`, whatever `encode` returns for it.
    """

    init: Callable[[Message], Tree]
    encode: Callable[[Tree, Message, Float[Array, ""], PRNGKeyArray], tuple[Tree, Tree]]
    decode: Callable[[Tree, Tree, Tree, PRNGKeyArray], tuple[Message, Tree, dict[str, Array]]]


Server = optax.GradientTransformationExtraArgs
"""`init(params) -> state`, `update(message, state, params, clients=, round=) -> (updates, state)`.

Any optax optimizer is one; `clients` is the number of clients that were counted.
"""


class Federation(NamedTuple):
    """What all algorithms share: how messages become one, and how clients are run.

    Args:
      aggregator: of the messages.
      statistics: what becomes of BatchNorm's moving statistics; see `jaxfed.core.batch_stats`.
      weighting: clients count by `examples` visited, or `uniform`.
      num_clients: of the population; needed where clients remember something.
      chunk, mesh: how clients are spread over time and devices; see `map_sum`.
    """

    aggregator: Aggregator
    statistics: Statistics = FROZEN
    weighting: Weighting = "examples"
    num_clients: int = 0
    chunk: int | None = None
    mesh: Mesh | None = None


class State(NamedTuple):
    """What is carried from round to round."""

    variables: Variables
    server: Tree
    """State of the server's optimizer; of the only optimizer, with central training."""
    aggregator: Tree = None
    memory: Memory = None
    """What clients keep, `[num_clients, ...]`; None if they keep nothing."""
    seen: Bool[Array, " num_clients"] | None = None
    """Which clients have trained, where they keep something."""


class Cohort(NamedTuple):
    """What a round is given: the training set, and who visits which of its rows."""

    examples: Examples
    plan: Plan


class ClientReport(NamedTuple):
    """One entry per seat of the cohort."""

    metrics: Metrics
    """Sums, leading axis `[clients]`."""
    num_examples: Float[Array, " clients"]
    """Examples visited, counted over all local epochs."""
    drift: Float[Array, " clients"]
    """Distance between the client's weights and the server's."""
    dropped: Bool[Array, " clients"]
    """True if its message was not finite."""


class Report(NamedTuple):
    """What a round reports and does not carry on."""

    metrics: Metrics
    """Over the visited examples of all clients, each before the step that used it."""
    num_examples: Float[Array, ""]
    dropped: Int[Array, ""]
    """Clients whose message was not finite."""
    delta_norm: Float[Array, ""]
    """Norm of the aggregated update."""
    finite: Bool[Array, ""]
    """False if the round would have given weights that are not finite; the state is as it was."""
    measurements: dict[str, Array]
    """Of the aggregator."""
    clients: ClientReport


class FedAlgorithm(NamedTuple):
    """A federated algorithm as two pure functions, left to the caller to `jax.jit`.

    Args:
      init: `variables -> state`.
      round: `(state, cohort) -> (state, report)`.
      personal: `(state, client id) -> variables`, where clients have networks of their own.
    """

    init: Callable[[Variables], State]
    round: Callable[[State, Cohort], tuple[State, Report]]
    personal: Callable[[State, Int[Array, ""]], Variables] | None = None


class Collected(NamedTuple):
    """The outcome of one pass over a cohort."""

    message: Message
    stats: Tree
    """Weighted mean of what the clients' statistics policy sends."""
    clients: Float[Array, ""]
    """Number of clients that were counted: present and finite."""
    aggregator: Tree
    memory: Memory
    seen: Bool[Array, " num_clients"] | None
    measurements: dict[str, Array]
    reports: ClientReport


def collect(
    client: Client, federation: Federation, broadcast: Broadcast, state: State, cohort: Cohort
) -> Collected:
    """Runs the clients of a cohort and aggregates their messages.

    The key of a client depends on (seed, round, client) alone. A client that is absent or whose
    message is not finite keeps its memory, and counts nowhere.

    Raises:
      ValueError: while tracing, if the aggregator would gather more than `GATHERED` numbers.
    """
    plan, aggregator, statistics = cohort.plan, federation.aggregator, federation.statistics
    ids, table = jnp.asarray(plan.clients), jnp.asarray(plan.rows)
    key = jax.random.fold_in(jax.random.key(plan.seed), plan.round)
    round_ = jnp.asarray(plan.round)

    def contribute(shared: tuple, seat: tuple) -> tuple:
        broadcast, examples, aggregator_state, memory, key, round_ = shared
        id_, rows = seat
        mine = jax.tree.map(lambda leaf: leaf[id_], memory)
        key = jax.random.fold_in(key, id_)
        sent = client.update(broadcast, mine, Work(examples, rows, key, id_, round_))
        message, stats = sent.message, statistics.send(sent.stats)
        dtype = sent.metrics["loss"].count.dtype
        num_examples = examples_of(rows, dtype)
        finite, present = all_finite((message, stats)), num_examples > 0
        # TFF: a client whose update is not finite sends zeros with weight zero.
        kept = finite & present
        drift = norm(_update(message, broadcast.variables.params))
        weight = num_examples if federation.weighting == "examples" else jnp.ones((), dtype)
        weight = jnp.where(kept, sent.weight * weight, 0).astype(dtype)
        message, stats = where(kept, (message, stats), zeros((message, stats)))
        summed, gathered = aggregator.encode(
            aggregator_state, message, weight, jax.random.fold_in(key, RESERVED)
        )
        summed = where(kept, summed, zeros(summed))
        total = (summed, (weight, scale(weight, stats)), kept.astype(dtype))
        report = ClientReport(sent.metrics, num_examples, drift, ~finite & present)
        return total, (gathered, where(kept, sent.memory, mine), kept, report)

    shared = (broadcast, cohort.examples, state.aggregator, state.memory, key, round_)
    _check_gathered(contribute, shared, (ids, table))
    (summed, (weight, stats), clients), (gathered, memory, kept, reports) = map_sum(
        contribute, shared, (ids, table), federation.chunk, federation.mesh, steps_of(table)
    )
    message, aggregator_state, measurements = aggregator.decode(
        state.aggregator, summed, gathered, jax.random.fold_in(key, RESERVED)
    )
    stats = divide(stats, jnp.where(weight > 0, weight, 1))
    seats = jnp.where(ids < 0, federation.num_clients, ids)  # an empty seat writes nowhere
    memory = jax.tree.map(
        lambda all_, new: all_.at[seats].set(new, mode="drop"), state.memory, memory
    )
    seen = state.seen
    if seen is not None:
        seen = seen.at[seats].max(kept, mode="drop")
    return Collected(message, stats, clients, aggregator_state, memory, seen, measurements, reports)


def _check_gathered(contribute: Callable, shared: tuple, seats: tuple) -> None:
    count = seats[0].shape[0]
    one = jax.tree.map(lambda leaf: leaf[0], seats)
    gathered = jax.eval_shape(contribute, shared, one)[1][0]
    if count * count_parameters(gathered) > GATHERED:
        raise ValueError(
            f"aggregator: got {count} clients x {count_parameters(gathered)} numbers to hold at "
            f"once, expected at most {GATHERED}; take a smaller cohort or network, or an "
            "aggregator that adds up (mean)"
        )


def _update(message: Message, params: Tree) -> Tree:
    """The part of a message that is an update of the weights: all of it, or its first entry."""
    structure = jax.tree.structure(params)
    if isinstance(message, tuple | list) and message and jax.tree.structure(message) != structure:
        return message[0]
    return message


def federated(
    client: Client, server: optax.GradientTransformation, federation: Federation
) -> FedAlgorithm:
    """Composes a client, a server and a federation into an algorithm.

    One round: the server broadcasts its variables and state, `client.update` runs on every client
    of the cohort, `federation.aggregator` makes one message of theirs, and `server.update` turns it
    into an update of the weights. A round without any finite client, or after which the weights
    would not be finite, leaves variables, server and aggregator as they were.

    Args:
      client: see `Client`.
      server: any optax optimizer; its gradient is the aggregated message.
      federation: see `Federation`.

    Raises:
      ValueError: by `init`, if clients remember something and `federation.num_clients` is 0.

    Example (FedSGD; every client's loss is the squared distance from its own example):
      >>> import numpy as np
      >>> from jaxfed import Examples, Mean, Problem, full_gradient, mean
      >>> def metrics(variables, examples, rows, train, key):
      ...     mask = rows >= 0
      ...     losses = (variables.params - examples.targets[rows]) ** 2 / 2
      ...     loss = Mean(jnp.where(mask, losses, 0).sum(), mask.sum(dtype=jnp.float32))
      ...     return {"loss": loss}, variables.stats
      >>> problem = Problem(lambda key: Variables(jnp.zeros(()), {}), metrics)
      >>> def update(sent, memory, work):
      ...     return Sent(*full_gradient(problem.gradient, sent.variables, work))
      >>> algorithm = federated(stateless(update), optax.sgd(1.0), Federation(mean()))
      >>> state = algorithm.init(problem.init(jax.random.key(0)))
      >>> plan = Plan(np.int32(0), np.int32(1), np.arange(2), np.arange(2).reshape(2, 1, 1))
      >>> data = Examples(jnp.zeros(2), jnp.array([1.0, 5.0]))
      >>> state, report = algorithm.round(state, Cohort(data, plan))
      >>> float(state.variables.params), float(report.metrics["loss"].value())
      (3.0, 6.5)
    """
    server = optax.with_extra_args_support(server)

    def init(variables: Variables) -> State:
        memory, count, seen = client.init(variables), federation.num_clients, None
        if jax.tree.leaves(memory):
            if count < 1:
                raise ValueError(
                    "Federation.num_clients: got 0, expected the size of the population, since "
                    "clients remember something between rounds"
                )
            seen = jnp.zeros(count, bool)
        memory = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), memory)
        return State(
            variables, server.init(variables.params),
            federation.aggregator.init(client.message(variables)), memory, seen,
        )  # fmt: skip

    def round_(state: State, cohort: Cohort) -> tuple[State, Report]:
        params = state.variables.params
        got = collect(client, federation, Broadcast(state.variables, state.server), state, cohort)
        updates, server_state = server.update(
            got.message, state.server, params, clients=got.clients, round=cohort.plan.round
        )
        stats = federation.statistics.receive(got.stats, state.variables.stats)
        variables = Variables(optax.apply_updates(params, updates), stats)
        return settled(state, State(variables, server_state), got)

    def personal(state: State, id_: Int[Array, ""]) -> Variables:
        assert client.personal is not None
        mine = jax.tree.map(lambda leaf: leaf[id_], state.memory)
        return client.personal(state.variables, mine)

    return FedAlgorithm(init, round_, personal if client.personal else None)


def settled(old: State, new: State, got: Collected) -> tuple[State, Report]:
    """The state after a round, and its report.

    `new` holds variables and server; what `got` collected is added here. Where no client was
    counted, or `new.variables` are not finite, the old variables, server and aggregator stay.
    """
    some = got.clients > 0
    finite = all_finite(new.variables) | ~some
    variables, server, aggregator = where(
        some & finite,
        (new.variables, new.server, got.aggregator),
        (old.variables, old.server, old.aggregator),
    )
    state = State(variables, server, aggregator, got.memory, got.seen)
    update = _update(got.message, old.variables.params)
    return state, report_of(got.reports, norm(update), finite, got.measurements)


def report_of(
    clients: ClientReport, delta_norm: Array, finite: Bool[Array, ""],
    measurements: dict[str, Array] | None = None,
) -> Report:  # fmt: skip
    """The report of a round from those of its clients; dropped ones are left out of the sums."""
    # TFF: FedProx and FedSGD also add up the training metrics of the clients they drop.
    counted = (clients.num_examples > 0) & ~clients.dropped

    def sum_(values: Float[Array, "clients ..."]) -> Float[Array, "..."]:
        mask = counted.reshape(-1, *(1,) * (values.ndim - 1))
        return jnp.where(mask, values, 0).sum(axis=0)

    metrics = {
        name: Mean(sum_(mean.total), sum_(mean.count)) for name, mean in clients.metrics.items()
    }
    return Report(
        metrics, sum_(clients.num_examples), clients.dropped.sum(dtype=jnp.int32), delta_norm,
        finite, measurements or {}, clients,
    )  # fmt: skip
