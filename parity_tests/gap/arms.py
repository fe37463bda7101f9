"""What the study runs: every arm, and what it differs in from another.

An arm is one way of training, run for every seed; with the same seed all arms start from the same
weights and see the same images. Every arm looks for its best client learning rate along one grid,
by images that are neither trained nor tested on, unless it is to take that of another arm.
"""

from typing import Any, Literal, NamedTuple

from jaxfed import Experiment
from jaxfed.config import override

Order = Literal["shuffled", "stored", "sorted"]
"""How a client's images arrive: in a new order every epoch, as they are stored, by label."""


class Setting(NamedTuple):
    """The size of a study."""

    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    """Client learning rates to choose from, in order."""
    start: tuple[float, ...]
    """Those that are tried first; others until the best has worse neighbours."""
    rounds: int
    eval_every: int
    clients: int
    examples: int
    """Images a client."""
    held_out: int
    """Images to test on, and as many to choose the learning rate by."""
    tuning: int
    """Seeds that the learning rate is chosen by."""
    repeats: int
    """Runs of one seed in an arm that is repeated."""
    more: tuple[int, ...]
    """Further seeds of an arm that varies."""


GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FULL = Setting((0, 1, 2), GRID, (3e-3, 1e-2), 25, 5, 4, 400, 2000, 2, 3, (3, 4, 5))
QUICK = Setting((0, 1, 2), (1e-2,), (1e-2,), 24, 24, 2, 200, 1000, 1, 1, ())
NUDGE = 1e-6
"""Every repeat starts from weights that are larger by another such part: by about their rounding.
Training multiplies it until two runs are as far apart as two roundings of the same run can be."""


class Arm(NamedTuple):
    """One way of training."""

    name: str
    experiment: Experiment
    policy: Literal["mean", "pooled", "local"] = "mean"
    """What the server keeps of the clients' BatchNorm statistics."""
    order: Order = "shuffled"
    momentum: float | None = None
    """BatchNorm's, if not the network's own."""
    reference: bool = False
    """Also run by TFF (by Keras, if central), at the learning rate chosen here."""
    about_rates: bool = False
    """Every seed at every rate that was tried, not at the chosen one alone."""
    repeated: bool = False
    """Also run, at the learning rate chosen, from starts that differ by rounding alone."""
    varies: bool = False
    """Also run, in jaxfed, with further seeds: they differ so much that a few do not tell."""
    rate_of: str | None = None
    """The arm whose learning rate it takes: one that trains exactly alike."""


NETWORKS = {
    "MobileNet": {"model.name": "mobilenet-v1", "model.width": 0.25},
    "MobileNet GroupNorm": {
        "model.name": "mobilenet-v1", "model.width": 0.25, "model.norm": "group",
    },
    "MobileNet LayerNorm": {
        "model.name": "mobilenet-v1", "model.width": 0.25, "model.norm": "layer",
    },
    "MobileNet 0.5": {"model.name": "mobilenet-v1", "model.width": 0.5},
    "MobileNetV2": {"model.name": "mobilenet-v2", "model.width": 0.35},
    "CNN": {"model.name": "cnn"},
    "small CNN": {"model.name": "cnn-small"},
}  # fmt: skip
"""CNN and small CNN are the article's first and third."""

CHAINS = ("MobileNet", "MobileNet GroupNorm", "CNN")
EPOCHS = 5
"""Local epochs, where the arm is about them; otherwise 1."""


def arms(setting: Setting, *, quick: bool) -> list[Arm]:
    """Every arm of the study; those that others depend on come before them."""

    def arm(network: str, way: str, changes: dict[str, Any] | None = None, **rest: Any) -> Arm:
        return Arm(
            f"{network}, {way}", _experiment(setting, NETWORKS[network], changes or {}), **rest
        )

    central, shards = {"algorithm": "central"}, {"data.partition": "shards"}
    if quick:
        return [
            arm("MobileNet", "central", central),
            arm("MobileNet", "IID", reference=True),
        ]
    curve = {"eval_every": setting.eval_every}  # the others are tested at the end alone
    rounds = setting.rounds // EPOCHS
    epochs = {"client.epochs": EPOCHS, "rounds": rounds, "eval_every": rounds}
    adam = {"server.optimizer": "adam", "server.lr": 1.0}
    fashion = {"data.dataset": "fashion_mnist"}
    found = [
        arm("MobileNet", "central", central, reference=True),
        arm("MobileNet", "IID", curve, reference=True, about_rates=True, repeated=True),
        arm("MobileNet", "shards", {**shards, **curve}, reference=True),
    ]
    for network in CHAINS[1:]:
        found += [
            arm(network, "central", central, reference=True),
            arm(
                network,
                "IID",
                reference=True,
                about_rates=network == "CNN",
                varies=network == "CNN",
            ),
            arm(network, "shards", shards, reference=True),
        ]
    found += [
        arm("MobileNet", "Fashion-MNIST, IID", fashion, reference=True),
        arm("MobileNet", "Fashion-MNIST, central", {**fashion, **central}),
        arm("MobileNetV2", "IID", reference=True),
        arm("MobileNetV2", "central", central),
    ]
    for network in ("MobileNet", "CNN"):
        found += [
            arm(network, "IID, sorted by label", order="sorted"),
            arm(network, "IID, not shuffled", order="stored"),
            arm(network, "IID, server Adam 1.0", adam, varies=network == "CNN"),
            arm(network, f"IID, {EPOCHS} local epochs", epochs),
        ]
    found.append(arm("small CNN", "IID"))
    for way, changes in (("IID", {}), ("shards", shards)):
        same = f"MobileNet, {way}"
        found += [
            arm("MobileNet", f"{way}, momentum 0.9", changes, momentum=0.9, rate_of=same),
            arm("MobileNet", f"{way}, pooled", changes, policy="pooled", rate_of=same),
        ]
    return [
        *found,
        arm("MobileNet", "shards, local", shards, policy="local"),
        arm("MobileNet LayerNorm", "IID"),
        arm("MobileNet 0.5", "IID"),
    ]


def _experiment(setting: Setting, network: dict[str, Any], changes: dict[str, Any]) -> Experiment:
    base = {
        "rounds": setting.rounds, "eval_every": setting.rounds,
        "clients_per_round": setting.clients, "data.dataset": "mnist",
        "data.num_clients": setting.clients, "data.examples_per_client": setting.examples,
        "client.optimizer": "adam", "client.epochs": 1, "client.batch_size": 20,
    }  # fmt: skip
    return override(Experiment(), {**base, **network, **changes})
