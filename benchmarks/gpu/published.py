"""Three jobs that other frameworks' benchmarks run, by the shapes of their tensors.

Images are synthetic and nothing is said about accuracy. No time of theirs is quoted here: compare
only with one that you have seen run on the same hardware.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from benchmarks.gpu.jobs import evaluated
from benchmarks.gpu.measure import Case, Found, Row, median_seconds, synthetic
from jaxfed.config import ClientConfig, DataConfig, Experiment, ModelConfig
from jaxfed.prepare import prepare
from jaxfed.program import compile_tasks
from jaxfed.segments import segments


class Published(NamedTuple):
    """What a published job does in each round, and how many rounds it has."""

    name: str
    rounds: int
    population: int
    images: int
    """Of each client."""
    cohort: int
    epochs: int
    batch: int
    side: int
    channels: int
    classes: int
    model: str


JOBS = (
    # 3x3x32, 3x3x64, pool, dense 128; ours has dropout too.
    Published("pfl CIFAR-10", 1500, 1000, 50, 50, 1, 10, 32, 3, 10, "cnn-dropout"),
    # The population only has to be larger than the cohort.
    Published("FLUTE FEMNIST", 1500, 500, 200, 10, 1, 20, 28, 1, 62, "cnn-dropout"),
    Published("BlazeFL CIFAR-10", 5, 100, 500, 100, 5, 50, 32, 3, 10, "cnn-mcmahan"),
)
TINY_JOBS = (
    Published("pfl CIFAR-10", 6, 6, 4, 3, 1, 2, 10, 3, 10, "cnn-small"),
    Published("BlazeFL CIFAR-10", 2, 2, 4, 2, 2, 2, 10, 3, 10, "cnn-small"),
)
DISPATCHES = 3


def cases(tiny: bool, _: Found) -> Iterator[Case]:
    for job in TINY_JOBS if tiny else JOBS:
        yield Case({"job": job.name, "network": job.model}, partial(measured, job, tiny))


def measured(job: Published, tiny: bool) -> list[Row]:
    """Rounds per second through `segments` with `parallel="auto"`, and what all rounds would take.

    Planning and copies to the device are included, evaluation and compilation stand apart.
    """
    dispatch = min(job.rounds, 100)
    experiment = Experiment(
        rounds=DISPATCHES * dispatch,
        eval_every=dispatch,
        clients_per_round=job.cohort,
        data=DataConfig(num_clients=job.population),
        model=ModelConfig(job.model, width=0.1 if tiny else 1.0),
        client=ClientConfig(epochs=job.epochs, batch_size=job.batch, lr=0.01),
    )
    test = 40 if tiny else 10_000
    images = synthetic(job.side, job.channels, job.classes, job.population * job.images, test)
    program = compile_tasks([prepare(experiment, dataset=images)])
    # The first dispatch warms up.
    spent = [segment.train_seconds for segment in segments(program)][1:]
    per_second = program.length * len(spent) / sum(spent)
    return [
        {
            "cohort": job.cohort,
            "epochs": job.epochs,
            "batch": job.batch,
            "measured_rounds": program.length * len(spent),
            "rounds_per_second": per_second,
            "rounds": job.rounds,
            "projected_seconds": job.rounds / per_second,
            "evaluation_ms": 1e3 * median_seconds(lambda: evaluated(program), 3),
            "compile_seconds": program.compile_seconds,
        }
    ]
