"""Federated algorithms as two pure functions: `init(variables)` and `round(state, cohort)`."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxfed import batch_stats as bn
from jaxfed.aggregate import all_finite, map_sum, norm
from jaxfed.client import (
    ClientUpdate,
    ClientUpdateFn,
    Examples,
    LossFn,
    cross_entropy,
    full_gradient,
    local_training,
    make_trainer,
    steps_of,
)
from jaxfed.experiment import BatchStats
from jaxfed.model import Model, Tree, Variables
from jaxfed.plan import Plan

Weighting = Literal["examples", "uniform"]


class Cohort(NamedTuple):
    """What a round is given: the training set, and who visits which of its rows."""

    examples: Examples
    plan: Plan


class State(NamedTuple):
    """What is carried from round to round."""

    variables: Variables
    opt_state: optax.OptState
    """Of the server's optimizer; with central training, of the one optimizer there is."""
    own: Tree
    """What clients keep to themselves, `[num_clients, ...]`; only with `batch_stats="local"`."""


class Own(NamedTuple):
    """The BatchNorm layers that each client keeps under `batch_stats="local"`."""

    params: dict[str, Float[Array, "*clients features"]]
    stats: Tree
    seen: Bool[Array, "*clients"]
    """Whether the client has ever trained."""


class ClientReport(NamedTuple):
    """One row a seat of the cohort; NaN where nothing was seen."""

    num_examples: Float[Array, " clients"]
    loss: Float[Array, " clients"]
    accuracy: Float[Array, " clients"]
    delta_norm: Float[Array, " clients"]
    """How far the client moved away from the server's weights (client drift)."""
    dropped: Bool[Array, " clients"]
    """True if its update was not finite."""


class RoundMetrics(NamedTuple):
    """What a round reports and does not carry on."""

    train_loss: Float[Array, ""]
    """Mean over visited examples of the loss before the step that used them."""
    train_accuracy: Float[Array, ""]
    num_examples: Float[Array, ""]
    """Examples visited over all clients and local epochs."""
    dropped: Int[Array, ""]
    """Clients whose update was not finite."""
    delta_norm: Float[Array, ""]
    """Norm of the averaged update."""
    finite: Bool[Array, ""]
    """False if the round would have given weights that are not finite; the state is as it was."""
    clients: ClientReport


class FedAlgorithm(NamedTuple):
    """A federated algorithm: `init(variables) -> state`, `round(state, cohort)`.

    `round` returns `(state, RoundMetrics)`; both functions are pure, and left to the caller to
    `jax.jit`.
    """

    init: Callable[[Variables], State]
    round: Callable[[State, Cohort], tuple[State, RoundMetrics]]


class _Seat(NamedTuple):
    client: Int[Array, "*clients"]
    rows: Int[Array, "*clients steps batch"]


class _Summands(NamedTuple):
    weight: Array
    delta: Tree
    stats: Tree


def fedavg(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    weighting: Weighting = "examples",
    batch_stats: BatchStats = "recalibrate",
    prox_mu: float | Array | None = None,
    num_clients: int | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    loss: LossFn = cross_entropy,
    dtype: DTypeLike = jnp.float32,
) -> FedAlgorithm:
    r"""Federated averaging, with FedProx and adaptive servers as special cases.

    $$\bar\Delta = \frac{\sum_k n_k (w - w_k)}{\sum_k n_k}, \qquad
      w \leftarrow w - \mathrm{opt}(\bar\Delta)$$

    where $w_k$ is what client $k$ makes of $w$ by its own local steps, and $n_k$ the number of
    examples it visited, over all local epochs (or 1 with uniform weighting).

    Args:
      model: the network.
      client_optimizer: any optax optimizer; its state starts afresh in every round.
      server_optimizer: any optax optimizer; the mean update is its gradient. None is
        `optax.sgd(1.0)`, plain averaging.
      weighting: `examples` or `uniform`.
      batch_stats: see `jaxfed.batch_stats`. No effect on a network without BatchNorm.
      prox_mu: FedProx's mu; None for no proximal term.
      num_clients: size of the population; only `batch_stats="local"` needs it.
      chunk: clients computed at once; None for all, 1 for one after another.
      mesh: devices that share the cohort's clients; None is one device.
      loss: `(logits, labels) -> losses [batch]`.
      dtype: of the images that the network is given.

    Returns:
      A `FedAlgorithm`. A client whose update is not finite is dropped and counted; if none is
      left, or if the server's own step is not finite, the round changes nothing.

    References:
      McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
      2017, Algorithm 1. Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 1 (server
      optimizers). Li et al., Federated Optimization in Heterogeneous Networks, 2020 (FedProx).
    """
    client = local_training(model, client_optimizer, loss=loss, prox_mu=prox_mu, dtype=dtype)
    server = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    return averaging(
        client, server, weighting=weighting, batch_stats=batch_stats, num_clients=num_clients,
        chunk=chunk, mesh=mesh,
    )  # fmt: skip


def fedsgd(
    model: Model,
    server_optimizer: optax.GradientTransformation,
    *,
    weighting: Weighting = "examples",
    batch_stats: BatchStats = "recalibrate",
    chunk: int | None = None,
    mesh: Mesh | None = None,
    loss: LossFn = cross_entropy,
    dtype: DTypeLike = jnp.float32,
) -> FedAlgorithm:
    r"""FedSGD: every client sends one gradient over all its examples, the server takes the step.

    $$w \leftarrow w - \mathrm{opt}\Big(\frac{\sum_k n_k \nabla F_k(w)}{\sum_k n_k}\Big)$$

    Arguments as in `fedavg`. Source: McMahan et al. (2017), section 2.

    Raises:
      ValueError: for `batch_stats="local"`: no client takes a step of its own.
    """
    if batch_stats == "local":
        raise ValueError('fedsgd: got batch_stats="local", but clients take no step of their own')
    client = full_gradient(model, loss=loss, dtype=dtype)
    return averaging(
        client, server_optimizer, weighting=weighting, batch_stats=batch_stats, chunk=chunk,
        mesh=mesh,
    )  # fmt: skip


def averaging(
    client: ClientUpdateFn,
    server: optax.GradientTransformation,
    *,
    weighting: Weighting = "examples",
    batch_stats: BatchStats = "recalibrate",
    num_clients: int | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> FedAlgorithm:
    """The server's half, for any client: weighted mean of what clients send, one optimizer step.

    `fedavg` and `fedsgd` are this with `jaxfed.client.local_training` and `full_gradient`; a new
    algorithm brings a `ClientUpdateFn` of its own. The other arguments are those of `fedavg`.
    """
    keeps_own = batch_stats == "local"
    if keeps_own and num_clients is None:
        raise ValueError('batch_stats="local" keeps a layer a client: give num_clients')
    population = num_clients or 0

    def init(variables: Variables) -> State:
        own = None
        if keeps_own:
            part = Own(
                bn.select(variables.params, bn.own_params(variables)),
                variables.stats,
                jnp.array(False),
            )
            own = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (population, *leaf.shape)), part)
        return State(variables, server.init(variables.params), own)

    def contribute(shared: tuple[State, Examples, Array], seat: _Seat) -> tuple:
        state, examples, key = shared
        start, mine = state.variables, None
        if keeps_own:
            mine = jax.tree.map(lambda leaf: leaf[seat.client], state.own)
            start = Variables(bn.replace(start.params, mine.params), mine.stats)
        result = client(
            start, examples, seat.rows, jax.random.fold_in(key, seat.client)
        )  # fmt: skip
        sent = result.stats if batch_stats in bn.KEPT_ON_SERVER else {}
        finite = all_finite((result.delta, sent))
        present = result.num_examples > 0
        weight = result.num_examples if weighting == "examples" else jnp.ones_like(result.loss_sum)
        # TFF: a client whose delta is not finite sends zeros with weight zero.
        kept = finite & present
        weight = jnp.where(kept, weight, 0)
        if batch_stats == "pooled":
            sent = bn.to_moments(sent)
        delta, new_own = result.delta, None
        if mine is not None:
            names = bn.own_params(start)
            trained = jax.tree.map(jnp.subtract, start.params, delta)
            new_own = Own(bn.select(trained, names), result.stats, jnp.array(True))
            new_own = jax.tree.map(lambda n, o: jnp.where(kept, n, o), new_own, mine)
            zeros = {name: jnp.zeros_like(leaf) for name, leaf in mine.params.items()}
            delta = bn.replace(delta, zeros)

        def weighted(tree: Tree) -> Tree:
            return jax.tree.map(lambda leaf: jnp.where(kept, weight * leaf, 0), tree)

        summands = _Summands(weight, weighted(delta), weighted(sent))
        return summands, (client_report(result, finite), new_own)

    def round_(state: State, cohort: Cohort) -> tuple[State, RoundMetrics]:
        plan = cohort.plan
        key = jax.random.fold_in(jax.random.key(plan.seed), plan.round)
        total, (reports, own) = map_sum(
            contribute,
            (state, cohort.examples, key),
            _Seat(jnp.asarray(plan.clients), jnp.asarray(plan.rows)),
            chunk,
            mesh,
            steps_of(jnp.asarray(plan.rows)),
        )
        # TFF: divides as it is; if nobody is left, its server rejects the NaN, to the same effect.
        some = total.weight > 0
        divisor = jnp.where(some, total.weight, 1)
        delta = jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), total.delta)
        updates, opt_state = server.update(delta, state.opt_state, state.variables.params)
        params = optax.apply_updates(state.variables.params, updates)
        stats = state.variables.stats
        if batch_stats in bn.KEPT_ON_SERVER:
            stats = jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), total.stats)
            stats = bn.from_moments(stats) if batch_stats == "pooled" else stats
        new = State(Variables(params, stats), opt_state, None)
        old = State(state.variables, state.opt_state, None)
        finite = all_finite(new.variables) | ~some
        new = jax.tree.map(lambda n, o: jnp.where(some & finite, n.astype(o.dtype), o), new, old)
        if keeps_own:
            # An empty seat, -1, writes nowhere.
            seats = jnp.where(plan.clients < 0, population, plan.clients)
            own = jax.tree.map(
                lambda all_, mine: all_.at[seats].set(mine, mode="drop"), state.own, own
            )
            new = new._replace(own=own)
        return new, round_metrics(reports, delta, finite)

    return FedAlgorithm(init, round_)


def central(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossFn = cross_entropy,
    dtype: DTypeLike = jnp.float32,
) -> FedAlgorithm:
    """Ordinary training on the pooled data: what federated averaging is compared with.

    One sequence of steps through the single seat of the plan; the optimizer's state and
    BatchNorm's moving statistics go on from round to round, as in Keras' `fit`.
    """
    train = make_trainer(model, optimizer, loss=loss, dtype=dtype)

    def init(variables: Variables) -> State:
        return State(variables, optimizer.init(variables.params), None)

    def round_(state: State, cohort: Cohort) -> tuple[State, RoundMetrics]:
        plan = cohort.plan
        key = jax.random.fold_in(jax.random.key(plan.seed), plan.round)
        variables, opt_state, report = train(
            state.variables, state.opt_state, cohort.examples, jnp.asarray(plan.rows)[0], key
        )
        delta = jax.tree.map(jnp.subtract, state.variables.params, variables.params)
        update = ClientUpdate(delta, variables.stats, *report)
        new = State(variables, opt_state, None)
        finite = all_finite((delta, variables))
        # A diverged run stays where it was last finite, and says so.
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        reports = jax.tree.map(lambda leaf: leaf[None], client_report(update, finite))
        return new, round_metrics(reports, delta, finite)

    return FedAlgorithm(init, round_)


def client_report(update: ClientUpdate, finite: Bool[Array, ""]) -> ClientReport:
    """What is reported of one client; not `finite`, it counts as dropped."""
    present = update.num_examples > 0
    return ClientReport(
        num_examples=update.num_examples,
        loss=update.loss_sum / update.num_examples,
        accuracy=update.correct / update.num_examples,
        delta_norm=norm(update.delta),
        dropped=~finite & present,
    )


def round_metrics(
    clients: ClientReport, delta: Tree, finite: Bool[Array, ""] | bool = True
) -> RoundMetrics:
    """What is reported of a round: the reports of its clients, and the averaged update.

    `finite` is False if the round would have given weights that are not, and left them as they
    were: the run then ends.
    """
    # TFF: FedProx and FedSGD also add up the training metrics of the clients they drop.
    counted = (clients.num_examples > 0) & ~clients.dropped
    num_examples = jnp.where(counted, clients.num_examples, 0)

    def mean(values: Float[Array, " clients"]) -> Float[Array, ""]:
        return jnp.where(counted, num_examples * values, 0).sum() / num_examples.sum()

    return RoundMetrics(
        train_loss=mean(clients.loss),
        train_accuracy=mean(clients.accuracy),
        num_examples=num_examples.sum(),
        dropped=clients.dropped.sum(dtype=jnp.int32),
        delta_norm=norm(delta),
        finite=jnp.asarray(finite),
        clients=clients,
    )
