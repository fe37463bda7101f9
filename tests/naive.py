"""Naive twins of the rows of ALGORITHMS: loops over clients and real batches, as papers print them.

`NAIVE[row](model, data, plans, experiment) -> variables` after all rounds; no masks, no padding, no
vmap. `experiment` has every default filled in.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from toys import mean_loss_and_grad, naive_client

from jaxfed import Variables, optimizer


def _optimizer(config):
    return optimizer(config.optimizer, config.lr, config.momentum)


def _weighted(weights, trees):
    share = np.asarray(weights, float) / np.sum(weights)
    return jax.tree.map(
        lambda *ls: sum(p * leaf for p, leaf in zip(share, ls, strict=True)), *trees
    )


def _moments(stats):
    return {n: {"mean": s["mean"], "square": s["var"] + s["mean"] ** 2} for n, s in stats.items()}


def _statistics(rule, weights, stats, old):
    if rule == "mean":
        return _weighted(weights, stats)
    if rule == "pooled":
        mean = _weighted(weights, [_moments(each) for each in stats])
        return {
            n: {"mean": m["mean"], "var": m["square"] - m["mean"] ** 2} for n, m in mean.items()
        }
    return old


def fedavg(model, data, plans, experiment, memory=None):
    """Algorithm 1 of McMahan et al. (2017); `memory` is FedBN's, by client."""
    client, server = _optimizer(experiment.client), _optimizer(experiment.server)
    variables = model.init(jax.random.key(0))
    state = server.init(variables.params)
    for plan in plans:
        deltas, weights, stats = [], [], []
        for id_, table in zip(plan.clients.tolist(), plan.rows, strict=True):
            if not (np.asarray(table) >= 0).any():
                continue
            start = variables if memory is None else _with_own(variables, memory.get(id_))
            trained, count, _ = naive_client(
                model, client, start, data, table, experiment.client.mu or 0.0
            )
            if memory is not None:
                memory[id_] = trained.params["norm"], trained.stats
                trained.params["norm"] = start.params["norm"]
            deltas.append(jax.tree.map(jnp.subtract, start.params, trained.params))
            weights.append(count if experiment.weighting == "examples" else 1)
            stats.append(trained.stats)
        updates, state = server.update(_weighted(weights, deltas), state, variables.params)
        variables = Variables(
            optax.apply_updates(variables.params, updates),
            _statistics(experiment.model.batch_stats, weights, stats, variables.stats),
        )
    return variables


def _with_own(variables, own):
    if own is None:
        return variables
    return Variables({**variables.params, "norm": own[0]}, own[1])


def fedbn(model, data, plans, experiment):
    """Li et al. (2021): BatchNorm layers stay with their clients, and the server's never change."""
    start = model.init(jax.random.key(0))
    trained = fedavg(model, data, plans, experiment, memory={})
    # A client sends nothing of its own layer, so a momentum-free server leaves its copy alone.
    return Variables({**trained.params, "norm": start.params["norm"]}, start.stats)


def fedsgd(model, data, plans, experiment):
    """McMahan et al. (2017), section 2: the mean gradient over all examples of the cohort."""
    server, variables = _optimizer(experiment.server), model.init(jax.random.key(0))
    state = server.init(variables.params)
    for plan in plans:
        gradients, weights = [], []
        for table in plan.rows:
            rows = np.asarray(table)
            rows = rows[rows >= 0]
            if len(rows) == 0:
                continue
            _, gradient = mean_loss_and_grad(model)(
                *variables, data.inputs[rows], data.targets[rows]
            )
            gradients.append(gradient)
            weights.append(len(rows) if experiment.weighting == "examples" else 1)
        updates, state = server.update(_weighted(weights, gradients), state, variables.params)
        variables = Variables(optax.apply_updates(variables.params, updates), variables.stats)
    return variables


def central(model, data, plans, experiment):
    """Keras' `fit` on the pooled data of each cohort."""
    tx, variables = _optimizer(experiment.client), model.init(jax.random.key(0))
    params, stats = variables
    state = tx.init(params)
    for plan in plans:
        for table in plan.rows[0]:
            rows = np.asarray(table)
            rows = rows[rows >= 0]
            if len(rows) == 0:
                continue
            (_, stats), gradient = mean_loss_and_grad(model)(
                params, stats, data.inputs[rows], data.targets[rows]
            )
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
    return Variables(params, stats)


NAIVE = {
    "fedavg": fedavg, "fedprox": fedavg, "fedbn": fedbn, "fedsgd": fedsgd, "central": central,
}  # fmt: skip
