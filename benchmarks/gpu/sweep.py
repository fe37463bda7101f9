"""64 learning rates as one program, beside one run alone."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from benchmarks.gpu.jobs import JOBS, TINY_JOBS, Job, device_seconds, plans_of, task_of
from benchmarks.gpu.measure import Case, Found, Row, median_seconds
from jaxfed.config import replaced
from jaxfed.core.federated import Cohort
from jaxfed.prepare import Task
from jaxfed.program import Program, algorithm_of, compile_tasks, replicated


def cases(tiny: bool, _: Found) -> Iterator[Case]:
    jobs = TINY_JOBS[1:] if tiny else (JOBS[3], JOBS[0])
    for job in jobs:
        yield Case({"job": job.name}, partial(swept, job, 3 if tiny else 64))


def swept(job: Job, count: int) -> list[Row]:
    """Milliseconds of a round of all points: one alone, then all as jaxfed runs them.

    The last row is what no jaxfed command does: the points as one more mapped axis.
    """
    task = task_of(job, "auto", 40)
    points = [with_rate(task, 0.01 * 10 ** (k / count)) for k in range(count)]
    alone, together = compile_tasks(points[:1]), compile_tasks(points)
    single = device_seconds(alone, plans_of(points[:1], alone.length))
    plans = plans_of(points, together.length)
    swept = device_seconds(together, plans)
    mapped = mapped_seconds(together, plans)
    times = {"one run": (single, 1), "sweep": (swept, count), "vmap of points": (mapped, count)}
    return [
        {
            "how": how,
            "points": number,
            "ms": 1e3 * seconds,
            "times_one_run": seconds / single,
            "speedup": number * single / seconds,
        }
        for how, (seconds, number) in times.items()
    ]


def with_rate(task: Task, rate: float) -> Task:
    """The same task with another learning rate."""
    return task._replace(experiment=replaced(task.experiment, {"client.lr": rate}))


def mapped_seconds(program: Program, plans: Any) -> float:
    """Of one round of all points at once."""
    task = program.tasks[0]

    def one(given: Any, state: Any, plans: Any) -> Any:
        algorithm = algorithm_of(task, given, program.mesh)
        cohort = partial(Cohort, program.train_set)
        return jax.lax.scan(lambda state, plan: algorithm.round(state, cohort(plan)), state, plans)

    fed = replicated(plans, program.mesh)
    call = jax.jit(jax.vmap(one))
    return median_seconds(lambda: call(program.numbers, program.state, fed), 5) / program.length
