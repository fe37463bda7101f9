"""Rounds as users run them: `compile_tasks`, then the compiled program, for every `parallel`."""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.measure import (
    Case,
    Found,
    Row,
    ceiling_of,
    median_seconds,
    ratio,
    step_flops,
    synthetic,
)  # fmt: skip
from jaxfed.config import ClientConfig, DataConfig, Experiment, ModelConfig
from jaxfed.data import Dataset
from jaxfed.plan import Plan, make_plan, stack_plans
from jaxfed.prepare import Task, prepare
from jaxfed.program import Program, compile_tasks, replicated
from jaxfed.segments import segments


class Job(NamedTuple):
    """A cohort of so many clients with so many images each, all in every round."""

    name: str
    model: ModelConfig
    side: int
    clients: int
    partition: str = "iid"
    images: int = 100
    batch: int = 20


CNN, MLP, MOBILENET = ModelConfig("cnn"), ModelConfig("mlp"), ModelConfig("mobilenet-v1", 0.25)
JOBS = (
    Job("cnn", CNN, 28, 10),
    Job("cnn", CNN, 28, 100),
    Job("mobilenet", MOBILENET, 32, 10),
    Job("mlp", MLP, 28, 10),
    Job("cnn", CNN, 28, 1000),
    Job("cnn, ragged", CNN, 28, 100, "quantity"),
    Job("mobilenet", MOBILENET, 32, 100),
)
TINY_JOBS = (
    Job("cnn", ModelConfig("cnn", 0.1), 12, 4, images=8, batch=4),
    Job("mlp, ragged", ModelConfig("mlp", 0.1), 12, 3, "quantity", images=8, batch=4),
)
DISPATCHES = 3


def cases(tiny: bool, found: Found) -> Iterator[Case]:
    for job in TINY_JOBS if tiny else JOBS:
        chunks = (2,) if tiny else (10, 32, 128)
        # The last first: it is the most likely one to be fastest.
        for parallel in ("vmap", *(n for n in chunks[::-1] if n < job.clients), "loop"):
            label = {"job": job.name, "clients": job.clients, "parallel": str(parallel)}
            yield Case(label, partial(rounds, job, parallel, tiny, found))
    for job in (TINY_JOBS[0],) if tiny else (JOBS[0], JOBS[2]):
        label = {"job": f"{job.name}, evaluation", "clients": job.clients, "parallel": ""}
        yield Case(label, partial(evaluation, job, tiny))


def task_of(job: Job, parallel: Any, test: int = 400, dispatches: int = DISPATCHES) -> Task:
    """The job, on synthetic images."""
    each = max(1, min(10, 200 // job.clients))  # so that one client after another is not for ever
    experiment = Experiment(
        rounds=each * dispatches,
        eval_every=each,
        clients_per_round=job.clients,
        parallel=parallel,
        data=DataConfig(partition=job.partition, num_clients=job.clients),
        model=job.model,
        client=ClientConfig(epochs=1, batch_size=job.batch, lr=0.01),
    )
    return prepare(experiment, dataset=dataset_of(job, test))


def dataset_of(job: Job, test: int = 400) -> Dataset:
    """Grey images in ten classes."""
    return synthetic(job.side, 1, 10, job.clients * job.images, test)


def plans_of(tasks: list[Task], length: int) -> Plan:
    """The first rounds of every task, as the compiled program takes them."""
    numbers = range(1, length + 1)
    return stack_plans([stack_plans([make_plan(t.schedule, n) for n in numbers]) for t in tasks])


def rounds(job: Job, parallel: Any, tiny: bool, found: Found) -> list[Row]:
    """Milliseconds of a round, on the device alone and with everything a user waits for."""
    task = task_of(job, parallel, test=40 if tiny else 400)
    program = compile_tasks([task])
    started = time.perf_counter()
    plans = plans_of([task], program.length)
    plan_seconds = (time.perf_counter() - started) / program.length
    seconds = device_seconds(program, plans)
    user = user_seconds(program)
    visits = int((plans.rows >= 0).sum()) / program.length
    tflops = None
    if flops := step_flops(task):
        tflops = 1e-12 * flops * visits / task.schedule.batch / seconds
    return [
        {
            "ms": 1e3 * seconds,
            "user_ms": 1e3 * user,
            "plan_ms": 1e3 * plan_seconds,
            "images_per_second": visits / seconds,
            "tflops": tflops,
            "of_ceiling": None if tflops is None else ratio(tflops, ceiling_of(found, "default")),
            "compile_seconds": program.compile_seconds,
        }
    ]


def device_seconds(program: Program, plans: Plan) -> float:
    """Of one round of all points, in a program that is fed already."""
    fed = replicated(plans, program.mesh)
    call = partial(program.train, program.numbers, program.state, program.train_set, fed)
    return median_seconds(call, 5) / program.length


def user_seconds(program: Program) -> float:
    """Of one round through `segments`; the first dispatch warms up."""
    spent = [segment.train_seconds for segment in segments(program)]
    return statistics.median(spent[1:] or spent) / program.length


def evaluation(job: Job, tiny: bool) -> list[Row]:
    """Milliseconds to evaluate 10,000 images; with BatchNorm, to recalibrate on the clients' too.

    The network has not been trained, which makes no difference.
    """
    count = 40 if tiny else 10_000
    program = compile_tasks([task_of(job, "vmap", count, dispatches=1)])
    seconds = median_seconds(lambda: evaluated(program))
    return [{"ms": 1e3 * seconds, "images_per_second": count / seconds}]


def evaluated(program: Program) -> Any:
    """What `segments` does after a round that is evaluated."""
    scores, _ = program.evaluate(
        program.state, program.test_set, program.test_index, program.train_set, program.train_index
    )
    if not np.isfinite(scores["loss"]).all():
        raise ValueError("evaluation: got a loss that is not finite, expected a number")
    return scores
