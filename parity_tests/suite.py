"""The experiments on which the two frameworks are compared, each for a reason."""

from typing import Any, NamedTuple

from jaxfed import Experiment
from jaxfed.config import override
from parity_tests.case import Case, make_case


class Entry(NamedTuple):
    """One experiment of the suite."""

    why: str
    experiment: Experiment
    nan_seat: int | None = None
    recorded: bool = False
    """Its trace is kept in `recorded/`, for machines without TFF."""


def case_of(name: str) -> Case:
    """The case of an entry; weights, scales and statistics at random."""
    entry = SUITE[name]
    return make_case(entry.experiment, test_examples=200, scramble=True, nan_seat=entry.nan_seat)


def _of(base: dict[str, Any], **changes: Any) -> Experiment:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return override(Experiment(), {"dtype": "float64", **base, **keys})


# Digits on clients of 5, 22, 65, 16, 41 and 1 images: with batches of 16, a client of one example
# and a last batch of one row.
RAGGED = {
    "seed": 3, "data.partition": "quantity", "data.num_clients": 6, "data.alpha": 0.3,
    "data.examples_per_client": 25, "client.batch_size": 16, "client.epochs": 2,
}  # fmt: skip
CNN = {**RAGGED, "rounds": 10, "model.name": "cnn", "model.width": 0.25, "client.lr": 0.05}
BATCHNORM = {
    **RAGGED, "rounds": 2, "model.name": "cnn-small", "model.width": 0.5, "model.norm": "batch",
    "client.lr": 0.01,
}  # fmt: skip
# The 2NN is cheap: every optimizer passes through it, on either side.
SMALL = {**RAGGED, "rounds": 3, "model.name": "mlp", "model.width": 0.1}
# Two steps a client, batches not too small, a small rate: otherwise BatchNorm multiplies rounding
# without end, and ReLUs at zero turn it into jumps.
MOBILENET = {
    "rounds": 1, "data.num_clients": 2, "data.examples_per_client": 48, "client.batch_size": 24,
    "client.epochs": 1, "client.lr": 1e-4, "model.width": 0.25,
}  # fmt: skip

SUITE: dict[str, Entry] = {
    "cnn": Entry(
        "ragged clients, several local epochs, momentum; ten free-running rounds",
        _of(CNN, client__optimizer="momentum"), recorded=True,
    ),
    "cnn float32": Entry("the same in the users' precision", _of(CNN, rounds=2, dtype="float32")),
    "cnn, FedAdam": Entry(
        "uniform weights, an adaptive server",
        _of(CNN, rounds=3, weighting="uniform", server__optimizer="adam", server__lr=0.01),
    ),
    "NaN": Entry(
        "a client whose update is not finite",
        _of(CNN, rounds=2, model__name="cnn-small"), nan_seat=2, recorded=True,
    ),
    "cnn-mcmahan, FedProx": Entry(
        "a proximal term, dense layers",
        _of(CNN, rounds=2, algorithm="fedprox", client__prox_mu=0.3, model__name="cnn-mcmahan",
            model__width=0.05), recorded=True,
    ),
    "cnn-dropout, FedProx uniform": Entry(
        "a proximal term with uniform weights",
        _of(CNN, rounds=2, algorithm="fedprox", client__prox_mu=1.0, weighting="uniform",
            model__name="cnn-dropout", model__width=0.1),
    ),
    "BatchNorm": Entry(
        "statistics of ragged batches, of a batch of one row", _of(BATCHNORM), recorded=True
    ),
    "BatchNorm float32": Entry("the same in the users' precision", _of(BATCHNORM, dtype="float32")),
    "GroupNorm": Entry("another norm", _of(BATCHNORM, model__norm="group")),
    "LayerNorm": Entry("another norm", _of(BATCHNORM, model__norm="layer")),
    "FedSGD": Entry(
        "one gradient a client; float32, as TFF's build_fed_sgd can do no other",
        _of(SMALL, algorithm="fedsgd", client__epochs=1, server__lr=0.1, dtype="float32"),
    ),
    "logistic": Entry("no hidden layer", _of(RAGGED, rounds=3, model__name="logistic")),
    **{
        f"{client}, {server} on the server": Entry(
            "two optimizers",
            _of(SMALL, client__optimizer=client, client__lr=rate,
                server__optimizer=server, server__lr=server_rate),
        )
        for client, rate, server, server_rate in (
            ("adam", 0.003, "momentum", 0.5),
            ("adamw", 0.003, "adagrad", 0.05),
            ("adagrad", 0.03, "rmsprop", 0.01),
            ("rmsprop", 0.003, "yogi", 0.01),
            ("yogi", 0.003, "adamw", 0.01),
        )
    },
    "central": Entry(
        "ordinary Keras training, Adam going on from round to round",
        _of(SMALL, algorithm="central", client__optimizer="adam", client__lr=0.003), recorded=True,
    ),
    "central, BatchNorm": Entry(
        "moving statistics go on from round to round",
        _of(BATCHNORM, algorithm="central", client__optimizer="nesterov"),
    ),
    "mobilenet-v1": Entry(
        "keras.applications' own, so narrow that it can be recorded",
        _of(MOBILENET, model__name="mobilenet-v1", model__width=0.04), recorded=True,
    ),
    **{
        name: Entry(
            "keras.applications' own; clients one after another",
            _of(MOBILENET, model__name=name, parallel="loop"),
        )
        for name in ("mobilenet-v2", "mobilenet-v3-small", "mobilenet-v3-large")
    },
}  # fmt: skip
