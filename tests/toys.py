"""Small networks and data for laws that must hold exactly, and the naive twin of the engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxfed import (
    POLICIES,
    Examples,
    FedAlgorithm,
    Federation,
    Model,
    Partition,
    Plan,
    Problem,
    Variables,
    classification,
    fedavg,
    fedbn,
    fedprox,
    from_nnx,
    make_plan,
    make_schedule,
    mean,
)
from jaxfed.models.layers import BatchNorm


class Net(nnx.Module):
    """Two dense layers, with BatchNorm between them if asked for."""

    def __init__(self, *, norm: bool, dtype=jnp.float64, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 5, use_bias=not norm, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(5, momentum=0.9, dtype=dtype) if norm else None
        self.last = nnx.Linear(5, 3, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x, mask=None):
        x = self.first(x)
        if self.norm is not None:
            x = self.norm(x, mask)
        return self.last(jnp.tanh(x))


def net(norm: bool = False, dtype=jnp.float64) -> Model:
    return from_nnx(lambda rngs: Net(norm=norm, dtype=dtype, rngs=rngs))


def problem(model: Model) -> Problem:
    return classification(model, dtype=jnp.float64)


def averaged(
    model: Model, client=None, server=None, *, batch_stats="recalibrate", mu=None,
    num_clients=0, pixels=None, dtype=jnp.float64, **federation,
) -> FedAlgorithm:  # fmt: skip
    """FedAvg, FedProx with `mu`, FedBN with `batch_stats="local"`."""
    client = optax.sgd(0.1) if client is None else client
    posed = classification(model, dtype=dtype, pixels=pixels)
    shared = Federation(mean(), POLICIES[batch_stats], num_clients=num_clients, **federation)
    if batch_stats == "local":
        return fedbn(posed, client, server, shared)
    if mu is not None:
        return fedprox(posed, client, server, shared, mu=mu)
    return fedavg(posed, client, server, shared)


def examples(count: int, seed: int = 0, dtype=np.float64) -> Examples:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6)).astype(dtype)
    return Examples(jnp.asarray(x), jnp.asarray(rng.integers(0, 3, count, dtype=np.int32)))


def clients_of(*sizes: int) -> Partition:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Partition(np.arange(offsets[-1], dtype=np.int32), offsets)


def plan_of(
    partition: Partition, number: int = 1, *, epochs: int = 1, batch_size: int | None = 4,
    clients_per_round: int | None = None, seed: int = 0, pooled: bool = False,
) -> Plan:  # fmt: skip
    schedule = make_schedule(
        partition, seed=seed, clients_per_round=clients_per_round or partition.num_clients,
        epochs=epochs, batch_size=batch_size, shuffle=True, pooled=pooled,
    )  # fmt: skip
    return make_plan(schedule, number)


@functools.lru_cache(maxsize=1)
def mean_loss_and_grad(model: Model):
    def mean_loss(params, stats, images, labels):
        mask = jnp.ones(len(labels), bool)
        if jnp.issubdtype(images.dtype, jnp.integer):
            images = images.astype(jnp.float64) / 255
        variables = Variables(params, stats)
        logits, stats = model.apply(variables, images, mask, True, jax.random.key(0))
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.mean(log_probabilities[jnp.arange(len(labels)), labels]), stats

    return jax.jit(jax.value_and_grad(mean_loss, has_aux=True))


def naive_client(model, optimizer, variables, data, table, prox_mu=0.0):
    """ClientUpdate as McMahan et al. (2017) print it: real batches, no padding, no scan."""
    params, stats = variables
    opt_state = optimizer.init(params)
    count, loss_sum = 0, 0.0
    for rows in np.asarray(table):
        batch = rows[rows >= 0]
        if len(batch) == 0:
            continue
        (loss, stats), gradient = mean_loss_and_grad(model)(
            params, stats, data.inputs[batch], data.targets[batch]
        )
        gradient = jax.tree.map(
            lambda g, w, w0: g + prox_mu * (w - w0), gradient, params, variables.params
        )
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        count += len(batch)
        loss_sum += float(loss) * len(batch)
    return Variables(params, stats), count, loss_sum


def naive_round(
    model, optimizer, server, variables, opt_state, data, plan, *, uniform=False, prox_mu=0.0
):
    """One round of Algorithm 1: a loop over clients, then the server's step."""
    results = [
        naive_client(model, optimizer, variables, data, table, prox_mu) for table in plan.rows
    ]
    weights = np.array([1.0 if uniform else count for _, count, _ in results])
    weights = weights / weights.sum()
    mean = jax.tree.map(
        lambda w, *trained: sum(
            p * (w - t) for p, t in zip(weights, trained, strict=True)
        ),
        variables.params, *(trained.params for trained, _, _ in results),
    )  # fmt: skip
    updates, opt_state = server.update(mean, opt_state, variables.params)
    stats = jax.tree.map(
        lambda *all_: sum(p * s for p, s in zip(weights, all_, strict=True)),
        *(trained.stats for trained, _, _ in results),
    )
    loss = sum(loss for _, _, loss in results) / sum(count for _, count, _ in results)
    return Variables(optax.apply_updates(variables.params, updates), stats), opt_state, loss


def assert_close(left, right, tolerance: float):
    """Every leaf within `tolerance`, relative to the largest number of the leaf (at least 1)."""
    for pair in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = (np.asarray(leaf, float) for leaf in pair)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())
