"""One arm's runs: in jaxfed, and at the chosen learning rate in TFF or Keras.

Both sides are given the same `Case`, so one seed has the same initial weights, images and batches
everywhere. What is left to differ is what the arm names.

BatchNorm's statistics do nothing to training, which normalises every batch by itself. So one
trained network is tested under several rules at once:

| rule | the statistics are |
|---|---|
| `kept` | the server's: averaged over clients, pooled or local; in central training its own |
| `frozen` | those of the start, 0 and 1, which is TFF's rule |
| `recalibrated` | exact moments of the training images |
| `batch` | each test batch's own |

A network without them has `kept` alone.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxfed import Cohort, Examples, Plan, Problem, Report, State, Variables
from jaxfed.config import numbers, override, to_dict
from jaxfed.core.batch_stats import recalibrate
from jaxfed.core.evaluate import batches, evaluator, score
from jaxfed.core.tree import Tree
from jaxfed.models.layers import BatchNorm
from jaxfed.plan import stack_plans
from jaxfed.prepare import Task
from jaxfed.program import EVAL_BATCH, Numbers, algorithm_of
from parity_tests.case import Case, make_case, remade
from parity_tests.gap.arms import NUDGE, Arm, Setting
from parity_tests.reference import live
from tff_reference.process import Worker

Run = dict[str, Any]
"""arm, system, seed, repeat, rate, chose; rounds, test {rule: [...]}, validation {rule: ...},
train; seconds by the clock, pauses included."""

DEADLINE = 3600.0
DISPATCH = 5
"""Rounds that are one call, where it divides: arms that are tested at other times share a program.
"""


def case_of(arm: Arm, setting: Setting, seed: int, repeat: int = 0) -> Case:
    """What every system is given for one seed of an arm, or for a repeat of it."""
    case = make_case(override(arm.experiment, {"seed": seed}), rounds=arm.experiment.rounds)
    rows = np.random.default_rng([seed, 1]).permutation(len(case.task.dataset.y_test))
    case = case._replace(test=_examples(case, "test", rows[: setting.held_out]))
    params = jax.tree.map(
        lambda leaf: (leaf * (1 + NUDGE * repeat)).astype(leaf.dtype), case.start.params
    )
    case = case._replace(start=case.start._replace(params=params))
    if arm.momentum is not None:
        case = case._replace(task=remade(case.task, lambda m: _set_momentum(m, arm.momentum)))
    if arm.order != "shuffled":
        case = case._replace(plans=[_ordered(plan, case, arm.order) for plan in case.plans])
    return case


def validation_of(case: Case, setting: Setting, seed: int) -> Examples:
    """Training images that no client holds, to choose the learning rate by."""
    rest = np.setdiff1d(np.arange(len(case.task.dataset.y_train)), case.task.partition.order)
    rows = np.random.default_rng([seed, 2]).permutation(rest)
    return _examples(case, "train", rows[: setting.held_out])


def _examples(case: Case, part: str, rows: np.ndarray) -> Examples:
    data = case.task.dataset
    images, labels = (data.x_test, data.y_test) if part == "test" else (data.x_train, data.y_train)
    rows = np.sort(rows)  # the images may be mapped from a file
    return Examples(np.asarray(images[rows]), labels[rows].astype(np.int32))


def _set_momentum(module: nnx.Module, momentum: float | None) -> None:
    if isinstance(module, BatchNorm) and momentum is not None:
        module.momentum = momentum


def _ordered(plan: Plan, case: Case, order: str) -> Plan:
    """The plan with every client's images in one order, epoch after epoch."""
    table = np.asarray(plan.rows)
    flat = table.reshape(len(table), -1)
    epochs = case.task.experiment.client.epochs or 1
    if (flat < 0).any():
        raise ValueError("got clients of unequal size, expected equal ones: there is padding")
    labels = np.asarray(case.train.targets)

    def one(rows: np.ndarray) -> np.ndarray:
        rows = np.sort(rows)
        return rows if order == "stored" else rows[np.argsort(labels[rows], kind="stable")]

    ordered = [np.concatenate([one(e) for e in np.split(rows, epochs)]) for rows in flat]
    return plan._replace(rows=np.stack(ordered).reshape(table.shape))


class Functions(NamedTuple):
    """The pure functions of an arm, compiled when first called."""

    init: Callable[[Variables], State]
    train: Callable[[Numbers, State, Examples, Plan], tuple[State, Report]]
    test: Callable[[State, Tree, Examples, Examples], dict[str, Array]]
    """`(state, initial statistics, training images, held-out images) -> accuracy by rule`."""


Programs = dict[str, Callable[..., Any]]
"""Functions that were made before, by what they depend on but for the shapes of their inputs."""


class Trial(NamedTuple):
    """What one run of an arm needs."""

    seed: int
    repeat: int
    chooses: bool
    """Whether its validation accuracy is one of those that choose the learning rate."""
    case: Case
    validation: Examples


def in_jaxfed(arm: Arm, setting: Setting, rate: float | None, programs: Programs) -> list[Run]:
    """Every seed at one rate, or (None) at the best, which the first `setting.tuning` seeds find.

    Repeats are run at the best alone. Arms that differ in data alone share a program of `programs`.
    """
    seeds = (*setting.seeds, *(setting.more if arm.varies else ()))
    trials = [_trial(arm, setting, seed, 0) for seed in seeds]
    functions = _functions(arm, trials[0].case, programs)

    def at(rate: float, trials: list[Trial]) -> list[Run]:
        return [_timed(arm, functions, trial, rate) for trial in trials]

    if rate is not None:
        return at(rate, trials)
    first, rest = trials[: setting.tuning], trials[setting.tuning :]
    tried = {rate: at(rate, first) for rate in setting.start}
    while missing := _neighbours(setting.rates, tried):
        tried[missing[0]] = at(missing[0], first)
    best = _best(tried)
    for each in tried if arm.about_rates else (best,):
        tried[each] += at(each, rest)
    for repeat in range(1, setting.repeats if arm.repeated else 1):
        tried[best] += at(best, [_trial(arm, setting, seed, repeat) for seed in setting.seeds])
    return [run for rate in sorted(tried) for run in tried[rate]]


def _trial(arm: Arm, setting: Setting, seed: int, repeat: int) -> Trial:
    case = case_of(arm, setting, seed, repeat)
    chooses = repeat == 0 and seed in setting.seeds[: setting.tuning]
    return Trial(seed, repeat, chooses, case, validation_of(case, setting, seed))


def honest(run: Run) -> str:
    """The rule that an arm's learning rate is chosen by."""
    return "recalibrated" if "recalibrated" in run["validation"] else "kept"


def _best(tried: dict[float, list[Run]]) -> float:
    """The rate that is best on validation images, in the mean over the seeds that chose it."""

    def score(rate: float) -> float:
        return float(np.mean([run["validation"][honest(run)] for run in tried[rate]]))

    return max(tried, key=score)


def _neighbours(rates: tuple[float, ...], tried: dict[float, list[Run]]) -> list[float]:
    """Rates beside the best one that are still to be tried."""
    place = rates.index(_best(tried))
    beside = rates[max(place - 1, 0) : place + 2]
    return [rate for rate in beside if rate not in tried]


def _timed(arm: Arm, functions: Functions, trial: Trial, rate: float) -> Run:
    started = time.perf_counter()
    found = _train(functions, trial.case, trial.validation, rate)
    seconds = round(time.perf_counter() - started, 2)
    names = {"arm": arm.name, "system": "jaxfed", "seed": trial.seed, "repeat": trial.repeat}
    return {**names, "rate": rate, "chose": trial.chooses, **found, "seconds": seconds}


def _functions(arm: Arm, case: Case, programs: Programs) -> Functions:
    task, policy = case.task, arm.policy
    if policy != "mean" or task.experiment.model.batch_stats == "frozen":
        experiment = override(task.experiment, {"model.batch_stats": policy})
        task = task._replace(experiment=experiment)

    def train(given: Numbers, state: State, examples: Examples, plans: Plan) -> Any:
        algorithm = algorithm_of(task, given)
        return jax.lax.scan(
            lambda state, plan: algorithm.round(state, Cohort(examples, plan)), state, plans
        )

    def test(state: State, start: Tree, train: Examples, held_out: Examples) -> Any:
        return _scores(task, policy, state, start, train, held_out)

    parts = to_dict(task.experiment)
    network = json.dumps([parts["model"], arm.momentum, task.parameters, parts["dtype"]])
    names = ("algorithm", "weighting", "server")
    way = json.dumps([*(parts[name] for name in names), parts["client"]["optimizer"]])
    return Functions(
        algorithm_of(task, {}).init,
        programs.setdefault(f"train {network} {way} {task.partition.num_clients}", jax.jit(train)),
        programs.setdefault(f"test {network}", jax.jit(test)),
    )


def _scores(
    task: Task, policy: str, state: State, start: Tree, train: Examples, held_out: Examples
) -> dict[str, Array]:
    """Accuracy on `held_out` by rule."""
    problem, (params, stats) = task.problem, state.variables
    rows, train_rows = _all(held_out), _all(train)

    def accuracy(problem: Problem, variables: Variables) -> Array:
        return score(problem, variables, held_out, rows)["accuracy"].value()

    if policy == "local":
        evaluate = evaluator(problem, policy, algorithm_of(task, {}).personal)
        metrics, _ = evaluate(state, held_out, rows, train, train_rows)
        return {"kept": metrics["accuracy"].value()}
    if not jax.tree.leaves(stats):
        return {"kept": accuracy(problem, state.variables)}
    by_rule = {"kept": stats}
    if policy == "mean":
        honest = recalibrate(problem, state.variables, train, train_rows)
        by_rule |= {"frozen": start, "recalibrated": honest}
    values = jax.lax.map(
        lambda stats: accuracy(problem, Variables(params, stats)),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_rule.values()),
    )
    found = {rule: values[place] for place, rule in enumerate(by_rule)}
    if "recalibrated" in by_rule:
        normalizing = problem._replace(
            metrics=lambda variables, examples, rows, _, key: problem.metrics(
                variables, examples, rows, True, key
            )
        )
        found["batch"] = accuracy(normalizing, state.variables)
    return found


def _all(examples: Examples) -> Array:
    return jnp.asarray(batches(np.arange(len(examples.targets)), EVAL_BATCH))


def _train(functions: Functions, case: Case, validation: Examples, rate: float) -> Run:
    experiment = override(case.task.experiment, {"client.lr": rate})
    given: Any = jax.tree.map(jnp.float32, numbers(experiment))
    start = jax.tree.map(jnp.asarray, case.start)
    state, every = functions.init(start), experiment.eval_every
    step = DISPATCH if every % DISPATCH == 0 else every
    rounds = range(every, experiment.rounds + 1, every)
    trained, tested, dropped = [], [], 0
    for last in range(step, experiment.rounds + 1, step):
        plans = stack_plans(case.plans[last - step : last])
        state, report = functions.train(given, state, case.train, plans)
        trained += np.asarray(report.metrics["accuracy"].value()).tolist()
        dropped += int(np.asarray(report.dropped).sum())
        if last in rounds:
            tested.append(functions.test(state, start.stats, case.train, case.test))
    validated = functions.test(state, start.stats, case.train, validation)
    return {
        "rounds": list(rounds),
        "test": {rule: [float(scores[rule]) for scores in tested] for rule in tested[0]},
        "validation": {rule: float(value) for rule, value in validated.items()},
        "train": trained,
        "dropped": dropped,
    }


def in_reference(
    arm: Arm, setting: Setting, seed: int, repeat: int, rate: float, worker: Worker
) -> Run:
    """One run in TFF, or in Keras for central training, at one rate."""
    case = case_of(arm, setting, seed, repeat)
    experiment = override(case.task.experiment, {"client.lr": rate})
    case = case._replace(task=case.task._replace(experiment=experiment))
    started = time.perf_counter()
    trace = live(
        case,
        worker,
        f"{arm.name}, seed {seed}.{repeat}",
        DEADLINE,
        eval_every=experiment.eval_every,
    )
    seconds = time.perf_counter() - started
    central = experiment.algorithm == "central"
    rounds = range(experiment.eval_every, experiment.rounds + 1, experiment.eval_every)
    # TFF tests with the initial statistics, Keras with its own.
    rule = "kept" if central or not case.start.stats else "frozen"
    test = {rule: [float(trace[f"round/{r}/test/accuracy"]) for r in rounds]}
    for other in ("recalibrated", "batch"):
        if f"{other}/accuracy" in trace:
            test[other] = [float(trace[f"{other}/accuracy"])]
    return {
        "arm": arm.name,
        "system": "Keras" if central else "TFF",
        "seed": seed,
        "repeat": repeat,
        "rate": rate,
        "rounds": list(rounds),
        "test": test,
        "train": [
            float(trace[f"round/{r}/train/accuracy"]) for r in range(1, experiment.rounds + 1)
        ],
        "versions": json.loads(str(trace["versions"])),
        "seconds": round(seconds, 2),
    }
