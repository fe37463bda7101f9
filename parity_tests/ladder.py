"""The ladder: one rung a cause, each climbed from the reference's own values.

`climb(case, trace)` compares what jaxfed computes with a trace of the reference, from the names of
the weights up to whole rounds. Every rung starts from what the *reference* had at that point, so a
fault shows at the rung where it is and not before.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed import (
    Broadcast,
    Client,
    Cohort,
    Examples,
    Experiment,
    Variables,
    Work,
    local_training,
    optimizer,
    proximal,
    score,
)
from jaxfed.algorithms.fedsgd import one_gradient
from jaxfed.config import numbers
from jaxfed.core.evaluate import batches
from jaxfed.core.problem import PIXELS, Metrics, take_batch
from jaxfed.core.tree import Tree
from jaxfed.plan import PADDING
from jaxfed.precision import compute_dtype, precision
from jaxfed.program import algorithm_of
from parity_tests.case import Case, flat, unflat
from parity_tests.measure import Rung, judged
from parity_tests.replay import compiled, mean_of, server_step, vector
from parity_tests.tolerances import tolerance

Trace = dict[str, np.ndarray]


def climb(case: Case, trace: Trace) -> Iterator[Rung]:
    """Compares rung by rung; lazily, so that one may stop at the first that fails."""
    rungs = _rungs(case, trace)
    while True:
        with precision(case.task.experiment):  # not around a yield: it would leak out
            rung = next(rungs, None)
        if rung is None:
            return
        yield rung


def _rungs(case: Case, trace: Trace) -> Iterator[Rung]:
    yield _names(case, trace)
    yield from _batch(case, trace)
    central = case.task.experiment.algorithm == "central"
    yield from (_central if central else _federated)(case, trace)
    yield from _rounds(case, trace)


def _under(trace: Trace, prefix: str, like: Tree) -> Tree:
    found = {name[len(prefix) :]: a for name, a in trace.items() if name.startswith(prefix)}
    return unflat(found, like)


def _names(case: Case, trace: Trace) -> Rung:
    """Number of weights whose name or shape differs."""
    wrong = 0
    for kind, tree in (("parameters", case.start.params), ("statistics", case.start.stats)):
        theirs = {name: tuple(shape) for name, shape in json.loads(str(trace[kind])).items()}
        ours = {name: leaf.shape for name, leaf in flat(tree).items()}
        wrong += len(set(theirs.items()) ^ set(ours.items()))
    return Rung("names", float(wrong), tolerance("names", case.task.experiment))


def _batch(case: Case, trace: Trace) -> Iterator[Rung]:
    """Network, loss, gradient and statistics on the first batch."""
    model, dtype = case.model, compute_dtype(case.task.experiment)
    rows = case.plans[0].rows[0, 0]
    rows = jnp.asarray(rows[rows >= 0])

    def logits(train: bool) -> Callable:
        def of(variables: Variables) -> Tree:
            images, _, mask = take_batch(_device(case.train), rows, dtype, PIXELS)
            return model.apply(variables, images, mask, train, jax.random.key(0))[0]

        return compiled(of)

    for mode in ("inference", "training"):
        name = f"logits, {mode}"
        yield judged(case, name, logits(mode == "training"), case.start, trace[f"logits/{mode}"])

    gradient = compiled(case.task.problem.gradient)

    def of_batch(variables: Variables) -> tuple[Tree, Tree, Metrics]:
        return gradient(variables, _device(case.train), rows, jax.random.key(0))

    def mean_loss(variables: Variables) -> Tree:
        return of_batch(variables)[2]["loss"].value()

    yield judged(case, "loss", mean_loss, case.start, trace["loss"])
    expected = _under(trace, "gradient/", case.start.params)
    yield judged(case, "gradient", lambda w: of_batch(w)[0], case.start, expected)
    if jax.tree.leaves(case.start.stats):
        expected = _under(trace, "moved/", case.start.stats)
        yield judged(case, "moving statistics", lambda w: of_batch(w)[1], case.start, expected)


def _federated(case: Case, trace: Trace) -> Iterator[Rung]:
    """What clients send, what the server makes of it."""
    experiment, rows = case.task.experiment, np.asarray(case.plans[0].rows)
    stats, update = case.start.stats, compiled(_client(case).update)

    def sent(table: np.ndarray) -> Callable[[Variables], Tree]:
        work = Work(
            _device(case.train), jnp.asarray(table), jax.random.key(0), jnp.asarray(0),
            jnp.asarray(1),
        )  # fmt: skip

        def compute(variables: Variables) -> Tree:
            message = update(Broadcast(variables, None), None, work).message
            finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(message))
            # Both sides take nothing from a client whose update is not finite.
            return jax.tree.map(np.asarray if finite else np.zeros_like, message)

        return compute

    like = case.start.params
    yield _worst(
        [
            judged(case, "steps, teacher-forced", sent(rows), Variables(params, stats), expected)
            for params, rows, expected in _walk(case, trace)
        ]
    )
    updates = [_under(trace, f"client/{seat}/", like) for seat in range(len(rows))]
    every = [
        judged(case, "local update", sent(table), case.start, expected)
        for table, expected in zip(rows, updates, strict=True)
    ]
    yield _worst(every)

    mean = _under(trace, "round/1/mean/", like)
    bad = (rows >= 0).any((1, 2)) & (trace["client_weights"] == 0)
    vectors = np.stack([vector(update) for update in updates])
    yield judged(case, "weighted mean", mean_of(case, bad), vectors, vector(mean))

    start, after = vector(like), vector(_under(trace, "round/1/params/", like))
    stepped = server_step(experiment)
    yield judged(case, "server step", stepped, (start, vector(mean)), start - after)


def _walk(case: Case, trace: Trace) -> Iterator[tuple[Tree, np.ndarray, Tree]]:
    """The reference's single steps: its weights before each, the batch, its update."""
    params = case.start.params
    for number, rows in enumerate(case.walk):
        update = _under(trace, f"step/{number}/", params)
        # Filled up to the shape of local training, which is then compiled once for both.
        table = np.full_like(case.plans[0].rows[0], PADDING)
        table[0] = rows
        yield params, table, update
        params = jax.tree.map(np.subtract, params, update)


def _client(case: Case) -> Client:
    experiment, problem = case.task.experiment, case.task.problem
    if experiment.algorithm == "fedsgd":
        return one_gradient(problem)
    config = experiment.client
    assert config.optimizer is not None
    assert config.lr is not None
    local = optimizer(config.optimizer, config.lr, config.momentum)
    if experiment.algorithm == "fedprox":
        local = optax.chain(proximal(_numbers(experiment)["client.mu"]), local)
    return local_training(problem, local)


def _numbers(experiment: Experiment) -> dict[str, float]:
    """The experiment's numbers as TFF understands them.

    TFF: 0.87 adds mu (w_start - w) to the gradient (`proximal_client_work.py`), where FedProx
    (Li et al. 2020, equation 2) has mu (w - w_start): it drives clients away from the server's
    weights. With mu reversed jaxfed does the same, and the two can be compared.
    """
    found = numbers(experiment)
    return {key: -value if key == "client.mu" else value for key, value in found.items()}


def _central(case: Case, trace: Trace) -> Iterator[Rung]:
    """Single steps of ordinary training."""
    algorithm = algorithm_of(case.task, _numbers(case.task.experiment))
    step, plan, train = compiled(algorithm.round), case.plans[0], _device(case.train)

    def moved(rows: np.ndarray) -> Callable[[Variables], Tree]:
        cohort = Cohort(train, plan._replace(rows=rows[None]))

        def compute(start: Variables) -> Tree:
            after = step(algorithm.init(start), cohort)[0].variables.params
            return jax.tree.map(jnp.subtract, start.params, after)

        return compute

    stats = case.start.stats
    yield _worst(
        [
            judged(case, "steps, teacher-forced", moved(rows), Variables(params, stats), expected)
            for params, rows, expected in _walk(case, trace)
        ]
    )


def _rounds(case: Case, trace: Trace) -> Iterator[Rung]:
    """Whole rounds, each from the reference's weights; then all of them without help."""
    algorithm = algorithm_of(case.task, _numbers(case.task.experiment))
    step, train = compiled(algorithm.round), _device(case.train)
    # TFF's server keeps the statistics it began with; in central training they move.
    central = case.task.experiment.algorithm == "central"
    reference = [case.start, *(_network(case, trace, r) for r in range(1, len(case.plans) + 1))]

    def change(before: Variables, after: Variables) -> Tree:
        moved = jax.tree.map(lambda b, a: np.asarray(b) - np.asarray(a), before, after)
        return moved if central else moved.params

    rungs: dict[str, list[Rung]] = {"one round": [], "rounds, teacher-forced": []}
    metrics, initial = [], algorithm.init(case.start)
    server = initial.server
    for plan, before, after in zip(case.plans, reference, reference[1:], strict=False):
        cohort = Cohort(train, plan)

        def one(start: Variables, cohort: Cohort = cohort, server: Any = server) -> tuple:
            return step(initial._replace(variables=start, server=server), cohort)

        def moved(start: Variables, one: Callable = one) -> Tree:
            return change(start, one(start)[0].variables)

        def reported(start: Variables, one: Callable = one) -> Tree:
            report = one(start)[1]
            return [*_means(report.metrics), report.num_examples]

        number = len(metrics) + 1
        name = "one round" if number == 1 else "rounds, teacher-forced"
        rungs[name].append(judged(case, name, moved, before, change(before, after)))
        expected = _scores(trace, number, "train")
        metrics.append(judged(case, "training metrics", reported, before, expected))
        # The state of the server's optimizer goes on: a plain function of the mean updates.
        server = one(before)[0].server
    yield from (_worst(found) for found in rungs.values() if found)

    def all_rounds(start: Variables) -> Tree:
        state = algorithm.init(jax.tree.map(jnp.asarray, start))
        for plan in case.plans:
            state, _ = step(state, Cohort(train, plan))
        return change(start, state.variables)

    if len(case.plans) > 1:
        expected = change(case.start, reference[-1])
        yield judged(case, "rounds, free-running", all_rounds, case.start, expected)
    yield _worst(metrics)
    yield _worst(
        [
            judged(case, "evaluation", _scorer(case), network, _scores(trace, number, "test")[:2])
            for number, network in enumerate(reference[1:], start=1)
        ]
    )


def _scorer(case: Case) -> Callable[[Variables], Tree]:
    index = jnp.asarray(batches(np.arange(len(case.test.targets)), 500))
    problem, test = case.task.problem, _device(case.test)
    return compiled(lambda network: _means(score(problem, network, test, index)))


def _means(metrics: Metrics) -> list[jax.Array]:
    return [metrics[name].value() for name in ("loss", "accuracy")]


def _scores(trace: Trace, number: int, which: str) -> list[np.ndarray]:
    return [trace[f"round/{number}/{which}/{m}"] for m in ("loss", "accuracy", "num_examples")]


def _network(case: Case, trace: Trace, number: int) -> Variables:
    """The reference's network after round `number`."""
    params = _under(trace, f"round/{number}/params/", case.start.params)
    return Variables(params, _under(trace, f"round/{number}/stats/", case.start.stats))


def _worst(rungs: list[Rung]) -> Rung:
    return max(rungs, key=lambda rung: rung.error / rung.tolerance)


def _device(examples: Examples) -> Examples:
    return Examples(jnp.asarray(examples.inputs), jnp.asarray(examples.targets))
