"""The config tree: one frozen dataclass = the JSON file = the command-line flags = the sweep keys.

Nothing here needs a dataset, a model or JAX. What can only be judged with them at hand
(more clients than examples, a network that needs larger images) is refused by
`jaxfed.prepare`, also before anything is compiled.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import shlex
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

OptimizerName = Literal[
    "sgd", "momentum", "nesterov", "adam", "adamw", "adagrad", "rmsprop", "yogi"
]
Norm = Literal["batch", "group", "layer", "none"]
BatchStats = Literal["frozen", "mean", "pooled", "local", "recalibrate"]

Algorithm = Literal["fedavg", "fedprox", "fedsgd", "central"]

ALGORITHMS: dict[Algorithm, str] = {
    "fedavg": "federated averaging (McMahan 2017), with any server optimizer (Reddi 2021)",
    "fedprox": "fedavg with a proximal term, --client.prox_mu (Li 2020)",
    "fedsgd": "one gradient a client and round (McMahan 2017)",
    "central": "ordinary training on the cohort's pooled data: the other half of a comparison",
}
"""What `--list` says of each algorithm."""

WITH_MOMENTUM = ("momentum", "nesterov")
FLOAT32_MAX = 3.4e38
LARGEST_IMAGE = 4096
LONGEST_TEXT = 1000


class ConfigError(ValueError):
    """An experiment that cannot run: what was got, what was expected, what to do."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are divided among clients."""

    dataset: str = "digits"
    """digits (embedded), a TFDS name (mnist, cifar10, ...) or path/to/file.npz."""
    partition: str = "iid"
    """iid, shards, dirichlet, dirichlet-unbalanced, pathological, quantity or natural."""
    num_clients: int | None = None
    """Clients in the population (default: 10; with natural, all of the file)."""
    examples_per_client: int | None = None
    """Draw num_clients x this many training images first (default: use all images)."""
    shards_per_client: int = 2
    """Label-sorted shards dealt to each client (partition shards)."""
    alpha: float = 0.5
    """Dirichlet concentration: smaller is more skewed (partitions dirichlet, quantity)."""
    classes_per_client: int = 2
    """Classes each client holds (partition pathological)."""
    image_size: int | None = None
    """Side of the images in pixels (default: native, or the model's minimum if that is larger)."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and what federated averaging does to its BatchNorm statistics."""

    name: str = "cnn"
    """cnn, cnn-small, cnn-mcmahan, cnn-dropout, mlp, logistic, mobilenet-v1, -v2, -v3-small, ..."""
    width: float = 1.0
    """Multiplies the number of channels (MobileNet's alpha)."""
    norm: Norm | None = None
    """Normalisation layers (default: the published network's own)."""
    batch_stats: BatchStats | None = None
    """What becomes of BatchNorm's moving statistics (default: recalibrate; TFF's: frozen)."""


@dataclass(frozen=True)
class ClientConfig:
    """Local training on each client."""

    optimizer: OptimizerName = "sgd"
    """Local optimizer; its state starts afresh every round."""
    lr: float = 0.1
    """Local learning rate."""
    momentum: float | None = None
    """Momentum of the optimizers momentum and nesterov (default: 0.9)."""
    epochs: int | None = None
    """Passes over the client's images each round, McMahan's E (default: 3; fedsgd: 1)."""
    batch_size: int | None = 20
    """Images a step (McMahan's B); none is one full batch."""
    shuffle: bool = True
    """Visit the images in a new order every epoch."""
    prox_mu: float | None = None
    """Weight of FedProx's proximal term (algorithm fedprox; default: 0.01)."""


@dataclass(frozen=True)
class ServerConfig:
    """How the server uses the clients' mean update."""

    optimizer: OptimizerName = "sgd"
    """sgd at 1.0 is FedAvg, momentum FedAvgM, adam FedAdam, yogi FedYogi."""
    lr: float = 1.0
    """Server learning rate."""
    momentum: float | None = None
    """Momentum of the optimizers momentum and nesterov (default: 0.9)."""


@dataclass(frozen=True)
class Experiment:
    """One federated experiment, completely described.

    Example:
      >>> from jaxfed import Experiment, DataConfig
      >>> Experiment(rounds=5, data=DataConfig(num_clients=20)).data.num_clients
      20
    """

    name: str = ""
    """A label for reports (default: made from dataset and model)."""
    seed: int = 0
    """Seed of partition, initial weights, cohorts, batch order and dropout."""
    rounds: int = 30
    """Communication rounds."""
    clients_per_round: int | None = None
    """Clients in a cohort (default: 10, or all if there are fewer)."""
    eval_every: int = 1
    """Evaluate on the test set every so many rounds, and after the last."""
    algorithm: Algorithm = "fedavg"
    """How the clients' work becomes the server's; central is ordinary training."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Clients count by their number of examples, or equally."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of the computation; weights are float32 (float64 with float64)."""
    parallel: Literal["auto", "loop", "vmap"] | int = "auto"
    """Clients at once on each device (all visible devices are used): one (loop), all (vmap), N."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


# --- JSON and overrides ---------------------------------------------------------------------


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as nested dicts of plain JSON values."""
    return dataclasses.asdict(experiment)


def to_json(experiment: Experiment) -> str:
    """The experiment as indented JSON, every key present."""
    return json.dumps(to_dict(experiment), indent=2) + "\n"


def from_dict(tree: Any) -> Experiment:
    """Builds an experiment from nested dicts; absent keys keep their defaults.

    Raises:
      ConfigError: for an unknown key or a value of the wrong type.
    """
    return _build(Experiment, tree, "")


def from_json(path: str | Path) -> Experiment:
    """Reads an experiment from a JSON file (any key may be left out).

    Raises:
      ConfigError: if the file cannot be read, is not JSON, or does not describe an experiment.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--config: got {str(path)!r}, expected a readable JSON file ({reason}); check the path"
        ) from None
    try:
        tree = json.loads(text, object_pairs_hook=_once)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--config: {str(path)!r} is not JSON ({error}); mend it or write one with to_json"
        ) from None
    return from_dict(tree)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = next(key for key, _ in pairs if [each for each, _ in pairs].count(key) > 1)
        raise ConfigError(f"--config: got the key {twice!r} twice, expected every key once")
    return tree


def override(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
    """Replaces dotted keys, with the same checks as JSON.

    Example:
      >>> override(Experiment(), {"client.lr": 0.05, "seed": 3}).client.lr
      0.05
    """
    tree = to_dict(experiment)
    for key, value in changes.items():
        node, parts = tree, key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, dict) or part not in node:
                raise _unknown(key, dotted_keys())
            if depth == len(parts) - 1:
                if isinstance(node[part], dict):
                    raise _unknown(key, dotted_keys())
                node[part] = value
            node = node[part]
    return from_dict(tree)


def dotted_keys(cls: Any = Experiment, prefix: str = "") -> list[str]:
    """Every key as it stands on the command line: `seed`, `client.lr`, ..."""
    keys = []
    for item in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[item.name]
        nested = dataclasses.is_dataclass(kind)
        keys += dotted_keys(kind, f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return keys


def value_of(experiment: Experiment, key: str) -> Any:
    """The value of a dotted key.

    Example:
      >>> value_of(Experiment(), "client.lr")
      0.1
    """
    node: Any = experiment
    for part in key.split("."):
        node = getattr(node, part)
    return node


def command_line(experiment: Experiment, between: str = " ") -> str:
    """The command that runs an experiment: every key that is not at its default, as a flag.

    Example:
      >>> command_line(Experiment(name="my run", client=ClientConfig(lr=0.05)))
      "python -m jaxfed.train --name 'my run' --client.lr 0.05"
    """
    parts = ["python -m jaxfed.train"]
    for key in dotted_keys():
        value = value_of(experiment, key)
        if value != value_of(Experiment(), key):
            text = shlex.quote(str(value))
            parts.append(f"--{key}={text}" if str(value).startswith("-") else f"--{key} {text}")
    return between.join(parts)


def _unknown(key: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see --help for all keys"
    return ConfigError(f"--{key}: unknown key; {hint}")


def _build(cls: Any, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        where = f"--{prefix[:-1]}" if prefix else "the experiment"
        raise ConfigError(f"{where}: got {_show(tree)}, expected a JSON object of keys")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            group, _, leaf = key.rpartition(".")
            if not prefix and key in dotted_keys():
                raise ConfigError(
                    f"--{key}: got it as one key, expected groups; write "
                    f'{{"{group}": {{"{leaf}": ...}}}}'
                )
            raise _unknown(f"{prefix}{key}", dotted_keys())
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value, f"{prefix}{key}.")
        else:
            values[key] = _check_type(kind, value, prefix + key)
    return cls(**values)


def _check_type(kind: Any, value: Any, flag: str) -> Any:
    choices = get_args(kind) if get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for choice in choices:
        if get_origin(choice) is Literal and isinstance(value, str) and value in get_args(choice):
            return value
        if choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return float(value)
        if choice is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(choice, type) and type(value) is choice:
            return value
    raise ConfigError(f"--{flag}: got {_show(value)}, expected {_describe(choices)}")


def expected(key: str) -> str:
    """What a dotted key takes, in words.

    Example:
      >>> expected("client.lr"), expected("parallel")
      ('a number', 'auto, loop, vmap or a whole number')
    """
    cls: Any = Experiment
    for part in key.split("."):
        cls = typing.get_type_hints(cls)[part]
    return _describe(
        get_args(cls) if get_origin(cls) in (types.UnionType, typing.Union) else (cls,)
    )


def _describe(choices: tuple[Any, ...]) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    parts = []
    for choice in choices:
        if get_origin(choice) is Literal:
            parts += [str(option) for option in get_args(choice)]
        else:
            parts.append("null" if choice is type(None) else words[choice])
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        return "something too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


# --- What no experiment may be --------------------------------------------------------------


def validate(experiment: Experiment) -> None:
    """Refuses values and combinations that no dataset and no model could make sense of.

    Raises:
      ConfigError: naming the flag, what it got, what was expected and what to do.
    """
    _build(Experiment, to_dict(experiment), "")  # the types, also of one built in Python
    data, model, client, server = (
        experiment.data, experiment.model, experiment.client, experiment.server
    )  # fmt: skip
    _text("name", experiment.name)
    _text("data.dataset", data.dataset)
    _at_least("seed", experiment.seed, 0)
    _at_least("rounds", experiment.rounds, 1)
    _at_least("clients_per_round", experiment.clients_per_round, 1)
    _at_least("eval_every", experiment.eval_every, 1)
    _at_least("parallel", experiment.parallel, 1)
    _at_least("data.num_clients", data.num_clients, 1)
    _at_least("data.examples_per_client", data.examples_per_client, 1)
    _at_least("data.shards_per_client", data.shards_per_client, 1)
    _at_least("data.classes_per_client", data.classes_per_client, 1)
    _at_least("data.image_size", data.image_size, 1)
    if data.image_size and data.image_size > LARGEST_IMAGE:
        raise ConfigError(
            f"--data.image_size: got {data.image_size}, expected at most {LARGEST_IMAGE}"
        )
    _at_least("client.epochs", client.epochs, 1)
    _at_least("client.batch_size", client.batch_size, 1)
    _positive("data.alpha", data.alpha)
    _positive("model.width", model.width)
    _rate("client.lr", client.lr)
    _rate("server.lr", server.lr)
    _rate("client.prox_mu", client.prox_mu)
    _momentum("client", client.optimizer, client.momentum)
    _momentum("server", server.optimizer, server.momentum)
    _at_most(
        "clients_per_round", experiment.clients_per_round, "data.num_clients", data.num_clients
    )
    if client.prox_mu and experiment.algorithm != "fedprox":
        raise ConfigError(
            f"--client.prox_mu: got {client.prox_mu} with algorithm {experiment.algorithm}, "
            "which has no proximal term; add --algorithm fedprox or leave prox_mu out"
        )
    if model.batch_stats and model.norm not in (None, "batch"):
        raise ConfigError(
            f"--model.batch_stats: got {model.batch_stats} with --model.norm {model.norm}, "
            "which keeps no statistics; use --model.norm batch or leave batch_stats out"
        )
    if experiment.algorithm == "central":
        if model.batch_stats == "local":
            raise ConfigError(
                "--model.batch_stats: got local with algorithm central, which has no clients; "
                "use mean"
            )
        if experiment.weighting == "uniform":
            raise ConfigError(
                "--weighting: got uniform with algorithm central, which has no clients; "
                "leave it out"
            )
    if experiment.algorithm == "fedsgd" and model.batch_stats == "local":
        raise ConfigError(
            "--model.batch_stats: got local with algorithm fedsgd, whose clients take no step of "
            "their own; use recalibrate, or --algorithm fedavg"
        )
    if experiment.algorithm == "fedsgd" and client.epochs not in (None, 1):
        raise ConfigError(
            f"--client.epochs: got {client.epochs} with algorithm fedsgd, where a client sends "
            "one gradient; use 1, or --algorithm fedavg"
        )


def _text(flag: str, value: str) -> None:
    if len(value) > LONGEST_TEXT:
        raise ConfigError(f"--{flag}: got {len(value)} characters, expected at most {LONGEST_TEXT}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"--{flag}: got {value!a}, expected text without lone surrogates")


def _at_least(flag: str, value: int | str | None, low: int) -> None:
    if isinstance(value, int) and value < low:
        raise ConfigError(f"--{flag}: got {value}, expected {low} or more")
    if isinstance(value, int) and value >= 2**31:
        raise ConfigError(f"--{flag}: got {_show(value)}, expected less than {2**31}")


def _at_most(flag: str, value: int | None, limit_flag: str, limit: int | None) -> None:
    if value is not None and limit is not None and value > limit:
        raise ConfigError(
            f"--{flag}: got {value}, expected at most {limit} (--{limit_flag}); "
            "lower the one or raise the other"
        )


def _positive(flag: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--{flag}: got {value}, expected a number above 0")


def _rate(flag: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"--{flag}: got {value}, expected a finite number, 0 or more")
    if value is not None and value > FLOAT32_MAX:
        raise ConfigError(f"--{flag}: got {value}, expected at most {FLOAT32_MAX:.2g} (float32)")


def _momentum(who: str, optimizer: str, value: float | None) -> None:
    if value is None:
        return
    if not 0 <= value < 1:
        raise ConfigError(f"--{who}.momentum: got {value}, expected 0 or more and below 1")
    if optimizer not in WITH_MOMENTUM:
        raise ConfigError(
            f"--{who}.momentum: got {value} with optimizer {optimizer}, which has none; "
            f"use --{who}.optimizer momentum (or nesterov) or leave momentum out"
        )
