"""What is timed: the jobs, and how each is written down for jaxfed and its peers alike.

Images are scikit-learn's digits, enlarged, as many as are needed: time does not depend on what they
show. Weights by name, and the batches as index tables `[rounds, clients, steps, batch]`, are those
of `parity_tests.case`.
"""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed import Experiment
from jaxfed.config import override, to_json
from jaxfed.core.model import Variables
from jaxfed.core.problem import cross_entropy
from jaxfed.data import Dataset, fit, load
from parity_tests.case import Case, flat, make_case, unflat
from parity_tests.case import write as write_case

BATCH = 20
CHECKED_IMAGES = 1000
"""Training images that the loss of the final weights is compared on."""


class Work(NamedTuple):
    """What a process does once a timing, or several times if that takes less than half a second."""

    kind: Literal["training", "evaluation", "sweep", "cold-start"]
    model: str
    sizes: tuple[int, ...]
    """Images of each client; it visits them once a round, in batches of 20."""
    rounds: int = 1
    lr: float = 0.01
    width: float = 1.0
    test_images: int = 200
    points: int = 1
    """Learning rates of a sweep."""


class Row(NamedTuple):
    """A line of the table: who does what."""

    peer: str
    work: Work
    variant: str = ""


class Job(NamedTuple):
    """Lines that are timed in turn; the ratio is to the first."""

    name: str
    rows: tuple[Row, ...]
    absent: tuple[tuple[str, str], ...] = ()
    """Peers that cannot do it, and why."""
    update: float = 1e-3
    """Largest difference of the clients' joint update from jaxfed's, relative to it."""
    loss: float = 1e-4
    """Largest relative difference of a loss from jaxfed's."""
    repeats: int = 100
    """At most."""


PEERS = ("jaxfed", "tff", "fedjax", "torch", "flower", "pfl")
TEN = (100,) * 10
# A small learning rate: at 0.1, a difference in the last digit is 1e-3 of the update in two rounds.
CNN = Work("training", "cnn", TEN, rounds=5)
MLP = CNN._replace(model="mlp")
# BatchNorm over 20 images of 1 x 1 is ill-conditioned: in PyTorch alone, float32 and float64 are
# 0.01 to 0.07 of a step apart after the first, and at a rate of 1e-3 have nothing in common
# after four. Hence a tiny one and a single round, after which TFF, PyTorch and Flower are 0.04 to
# 0.07 of the update apart; another network, or twice the step, still shows.
MOBILENET = Work("training", "mobilenet-v1", TEN, rounds=1, lr=1e-5, width=0.25)
RAGGED = CNN._replace(sizes=tuple(np.linspace(5, 200, 10).astype(int).tolist()))
EQUAL = RAGGED._replace(sizes=(sum(RAGGED.sizes) // 10,) * 10)
SWEEP_MLP, SWEEP_CNN = (work._replace(kind="sweep") for work in (MLP, CNN))
NO_BATCHNORM = (("fedjax", "has no BatchNorm"),)


def _many(model: Work, clients: int) -> Work:
    return model._replace(sizes=TEN[:1] * clients, rounds=1)


def _each(work: Work, *peers: str) -> tuple[Row, ...]:
    return tuple(Row(peer, work) for peer in peers)


# Flower's cluster of processes takes its share of two cores in idleness too, so it has jobs apart.
FLOWER = "-flower"
JOBS = (
    Job("cnn", _each(CNN, "jaxfed", "tff", "fedjax", "torch", "pfl")),
    Job("2nn", _each(MLP, "jaxfed", "tff", "fedjax", "torch", "pfl")),
    Job(
        "mobilenet",
        _each(MOBILENET, "jaxfed", "tff", "torch", "pfl"),
        absent=NO_BATCHNORM,
        update=0.3,
        loss=1e-2,
    ),
    Job("cnn" + FLOWER, _each(CNN, "jaxfed", "flower")),
    Job("2nn" + FLOWER, _each(MLP, "jaxfed", "flower")),
    Job("mobilenet" + FLOWER, _each(MOBILENET, "jaxfed", "flower"), update=0.3, loss=1e-2),
    Job(
        "ragged",
        (
            Row("jaxfed", EQUAL, "equal"),
            Row("jaxfed", RAGGED, "ragged"),
            Row("torch", EQUAL, "equal"),
            Row("torch", RAGGED, "ragged"),
        ),
    ),
    Job("clients-100", _each(_many(CNN, 100), "jaxfed", "tff", "fedjax", "torch"), repeats=5),
    Job("clients-1000", _each(_many(CNN, 1000), "jaxfed", "torch"), repeats=3),
    Job("mobilenet-1000", _each(_many(MOBILENET, 1000), "jaxfed"), repeats=3),
    Job(
        "sweep-2nn",
        (
            Row("jaxfed", SWEEP_MLP, "1 rate"),
            Row("jaxfed", SWEEP_MLP._replace(points=16), "16 rates"),
        ),
    ),
    Job(
        "sweep-cnn",
        (
            Row("jaxfed", SWEEP_CNN, "1 rate"),
            Row("jaxfed", SWEEP_CNN._replace(points=16), "16 rates"),
        ),
        repeats=3,
    ),
    Job(
        "evaluation",
        _each(CNN._replace(kind="evaluation", test_images=10_000), "jaxfed", "tff", "torch"),
    ),
    Job(
        "cold-start",
        (
            Row("jaxfed", CNN._replace(kind="cold-start", rounds=1), "cnn"),
            Row("jaxfed", MOBILENET._replace(kind="cold-start", rounds=1), "mobilenet"),
        ),
    ),
)


def images(digits: Dataset, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """So many training images drawn with replacement: uint8 [count, H, W, C], and their labels.

    With noise: in the ramps of an enlarged image, which of four equal activations max pooling takes
    is a matter of rounding, and so would be the weights after a few steps.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(digits.y_train), count)
    noise = rng.integers(0, 128, (count, *digits.x_train.shape[1:]), np.uint8)
    return digits.x_train[rows] // 2 + noise, digits.y_train[rows]


def experiment_of(work: Work, data: Path) -> Experiment:
    """The work as jaxfed's users would write it down, with its images in the file `data`."""
    changes = {
        "rounds": work.rounds, "eval_every": work.rounds, "clients_per_round": len(work.sizes),
        "data.dataset": str(data), "data.partition": "natural", "model.name": work.model,
        "model.width": work.width, "client.lr": work.lr, "client.epochs": 1,
        "client.batch_size": BATCH,
    }  # fmt: skip
    return override(Experiment(), changes)


def write(work: Work, folder: Path) -> Case:
    """Writes what all processes are given into `folder`, which must not be there yet.

    `data.npz` and `experiment.json` are jaxfed's, `case.json` and `inputs.npz` the others'.
    """
    folder.mkdir(parents=True)
    side = 32 if work.model.startswith("mobilenet") else 28
    data = folder / "data.npz"
    digits = fit(load("digits"), side, side)
    x, y = images(digits, sum(work.sizes), seed=1)
    x_test, y_test = images(digits, work.test_images, seed=2)
    owner = np.repeat(np.arange(len(work.sizes)), work.sizes)
    np.savez(data, x_train=x, y_train=y, x_test=x_test, y_test=y_test, client_train=owner)
    experiment = experiment_of(work, data)
    (folder / "experiment.json").write_text(to_json(experiment))
    (folder / "work.json").write_text(json.dumps(work._asdict()) + "\n")
    case = make_case(experiment, test_examples=work.test_images, scramble=True)
    write_case(case, folder)
    return case


# --- Whether it was the same training -------------------------------------------------------


def differences(
    case: Case, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> dict[str, float]:
    """How far a peer's result is from jaxfed's: `loss`, and `update` where there is training.

    Both are relative. A result is the final weights by name, whose loss on training images, in
    training mode, is compared; or the scores of an evaluation.
    """
    if "loss" in ours:
        return {"loss": abs(float(theirs["loss"] / ours["loss"]) - 1)}
    if ours.keys() != theirs.keys():
        raise ValueError(f"got weights {sorted(theirs)}, expected {sorted(ours)}")
    start = flat(case.start.params)
    apart = sum(np.sum((theirs[name] - ours[name]) ** 2, dtype=float) for name in ours)
    moved = sum(np.sum((ours[name] - start[name]) ** 2, dtype=float) for name in ours)
    loss, other = training_loss(case, ours), training_loss(case, theirs)
    return {"loss": abs(other / loss - 1), "update": float(np.sqrt(apart / moved))}


def training_loss(case: Case, params: dict[str, np.ndarray]) -> float:
    """Mean cross-entropy of weights by name on the first training images, in training mode."""
    x = jnp.asarray(case.train.inputs[:CHECKED_IMAGES], jnp.float32) / 255
    y = jnp.asarray(case.train.targets[:CHECKED_IMAGES])
    # As JAX's arrays: BatchNorm would write into NumPy's.
    variables = jax.tree.map(
        jnp.asarray, Variables(unflat(params, case.start.params), case.start.stats)
    )
    mask = jnp.ones(len(x), bool)
    logits, _ = case.model.apply(variables, x, mask, True, jax.random.key(0))
    return float(cross_entropy(logits, y).mean())
