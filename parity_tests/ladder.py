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

from jaxfed import Cohort, Examples, State, Variables, score
from jaxfed.client import ClientUpdate, full_gradient, local_training, take_batch
from jaxfed.evaluate import batches
from jaxfed.experiment import Experiment
from jaxfed.model import Tree
from jaxfed.optimizers import optimizer
from jaxfed.plan import PADDING
from jaxfed.prepare import compute_dtype, precision
from jaxfed.program import Knobs, knobs_of, make_algorithm
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
    model, dtype = case.task.model, compute_dtype(case.task.experiment)
    rows = case.plans[0].rows[0, 0]
    rows = rows[rows >= 0]

    def logits(train: bool) -> Callable:
        def of(variables: Variables) -> Tree:
            images, _, mask = take_batch(_device(case.train), jnp.asarray(rows), dtype)
            return model.apply(variables, images, mask, train, jax.random.key(0))[0]

        return compiled(of)

    for mode in ("inference", "training"):
        name = f"logits, {mode}"
        yield judged(case, name, logits(mode == "training"), case.start, trace[f"logits/{mode}"])

    update = compiled(full_gradient(model, dtype=dtype))

    def of_batch(variables: Variables) -> ClientUpdate:
        return update(variables, _device(case.train), rows[None], jax.random.key(0))

    def mean_loss(variables: Variables) -> Tree:
        done = of_batch(variables)
        return done.loss_sum / done.num_examples

    yield judged(case, "loss", mean_loss, case.start, trace["loss"])
    expected = _under(trace, "gradient/", case.start.params)
    yield judged(case, "gradient", lambda w: of_batch(w).delta, case.start, expected)
    if jax.tree.leaves(case.start.stats):
        expected = _under(trace, "moved/", case.start.stats)
        yield judged(case, "moving statistics", lambda w: of_batch(w).stats, case.start, expected)


def _federated(case: Case, trace: Trace) -> Iterator[Rung]:
    """What clients send, what the server makes of it."""
    experiment, rows = case.task.experiment, np.asarray(case.plans[0].rows)
    dtype, stats = compute_dtype(experiment), case.start.stats
    update = compiled(_client(case.task.model, experiment, dtype))

    def sent(table: np.ndarray) -> Callable[[Variables], Tree]:
        def compute(variables: Variables) -> Tree:
            done = update(variables, _device(case.train), table, jax.random.key(0))
            finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(done.delta))
            # Both sides take nothing from a client whose update is not finite.
            return jax.tree.map(np.asarray if finite else np.zeros_like, done.delta)

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


def _client(model: Any, experiment: Experiment, dtype: Any) -> Callable:
    if experiment.algorithm == "fedsgd":
        return full_gradient(model, dtype=dtype)
    config = experiment.client
    return local_training(
        model, optimizer(config.optimizer, *_rate(config)), dtype=dtype,
        prox_mu=_knobs(experiment).prox_mu if experiment.algorithm == "fedprox" else None,
    )  # fmt: skip


def _knobs(experiment: Experiment) -> Knobs:
    """The experiment's numbers as TFF understands them.

    TFF: 0.87 adds mu (w_start - w) to the gradient (`proximal_client_work.py`), where FedProx
    (Li et al. 2020, equation 2) has mu (w - w_start): it drives clients away from the server's
    weights. With mu reversed jaxfed does the same, and the two can be compared.
    """
    knobs = knobs_of(experiment)
    return knobs._replace(prox_mu=-knobs.prox_mu)


def _rate(config: Any) -> tuple[float, float]:
    return config.lr, config.momentum or 0.0


def _central(case: Case, trace: Trace) -> Iterator[Rung]:
    """Single steps of ordinary training."""
    algorithm = make_algorithm(case.task, _knobs(case.task.experiment))
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
    algorithm = make_algorithm(case.task, _knobs(case.task.experiment))
    step, train = compiled(algorithm.round), _device(case.train)
    # TFF's server keeps the statistics it began with; in central training they move.
    central = case.task.experiment.algorithm == "central"
    reference = [case.start, *(_network(case, trace, r) for r in range(1, len(case.plans) + 1))]

    def change(before: Variables, after: Variables) -> Tree:
        moved = jax.tree.map(lambda b, a: np.asarray(b) - np.asarray(a), before, after)
        return moved if central else moved.params

    rungs: dict[str, list[Rung]] = {"one round": [], "rounds, teacher-forced": []}
    metrics, opt_state = [], algorithm.init(case.start).opt_state
    for plan, before, after in zip(case.plans, reference, reference[1:], strict=False):
        cohort = Cohort(train, plan)

        def one(start: Variables, cohort: Cohort = cohort, opt_state: Any = opt_state) -> tuple:
            return step(State(start, opt_state, None), cohort)

        def moved(start: Variables, one: Callable = one) -> Tree:
            return change(start, one(start)[0].variables)

        def reported(start: Variables, one: Callable = one) -> Tree:
            report = one(start)[1]
            return [report.train_loss, report.train_accuracy, report.num_examples]

        number = len(metrics) + 1
        name = "one round" if number == 1 else "rounds, teacher-forced"
        rungs[name].append(judged(case, name, moved, before, change(before, after)))
        expected = _scores(trace, number, "train")
        metrics.append(judged(case, "training metrics", reported, before, expected))
        # The state of the server's optimizer goes on: a plain function of the mean updates.
        opt_state = one(before)[0].opt_state
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
    index = jnp.asarray(batches(np.arange(len(case.test.labels)), 500))
    dtype, test = compute_dtype(case.task.experiment), _device(case.test)
    run = compiled(lambda network: score(case.task.model, network, test, index, dtype=dtype))
    return lambda network: list(run(network))


def _scores(trace: Trace, number: int, which: str) -> list[np.ndarray]:
    return [trace[f"round/{number}/{which}/{m}"] for m in ("loss", "accuracy", "num_examples")]


def _network(case: Case, trace: Trace, number: int) -> Variables:
    """The reference's network after round `number`."""
    params = _under(trace, f"round/{number}/params/", case.start.params)
    return Variables(params, _under(trace, f"round/{number}/stats/", case.start.stats))


def _worst(rungs: list[Rung]) -> Rung:
    return max(rungs, key=lambda rung: rung.error / rung.tolerance)


def _device(examples: Examples) -> Examples:
    return Examples(jnp.asarray(examples.images), jnp.asarray(examples.labels))
