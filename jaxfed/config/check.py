"""Values that no dataset and no network could make sense of.

Nothing here needs a table: what the rows of an experiment use is checked by `jaxfed.resolve`.
"""

import math
from typing import Any

from jaxfed.config.codec import build_typed, dotted_keys, shown, value_of
from jaxfed.config.experiment import ConfigError, Experiment

FLOAT32_MAX = 3.4e38
LARGEST_IMAGE = 4096
LONGEST_TEXT = 1000

COUNTS = {
    "seed": 0, "rounds": 1, "clients_per_round": 1, "eval_every": 1, "parallel": 1,
    "data.num_clients": 1, "data.examples_per_client": 1, "data.shards_per_client": 1,
    "data.classes_per_client": 1, "data.image_size": 1, "client.epochs": 1,
    "client.batch_size": 1, "server.warmup": 1,
}  # fmt: skip
"""The smallest value of each whole number."""
POSITIVE = ("data.alpha", "model.width", "client.clip", "client.lr_decay", "server.lr_decay")
NOT_NEGATIVE = (
    "client.lr", "server.lr", "client.mu", "client.epsilon", "server.epsilon",
    "client.weight_decay", "server.weight_decay",
)  # fmt: skip
SHARES = (
    "client.momentum", "server.momentum", "client.b1", "server.b1", "client.b2", "server.b2",
    "client.label_smoothing",
)  # fmt: skip
"""Numbers from 0 to below 1."""


def validate(experiment: Experiment) -> None:
    """Refuses values out of range and cohorts above the population.

    Raises:
      ConfigError: naming the flag, what it got, what was expected and what to do.
    """
    build_typed(experiment)  # the types, also of one built in Python
    for key in dotted_keys():
        value = value_of(experiment, key)
        if isinstance(value, str):
            _text(key, value)
    for key, low in COUNTS.items():
        _at_least(key, value_of(experiment, key), low)
    size = experiment.data.image_size
    if size and size > LARGEST_IMAGE:
        raise ConfigError(f"--data.image_size: got {size}, expected at most {LARGEST_IMAGE}")
    for key in POSITIVE:
        _positive(key, value_of(experiment, key))
    for key in NOT_NEGATIVE:
        _rate(key, value_of(experiment, key))
    for key in SHARES:
        value = value_of(experiment, key)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"--{key}: got {value}, expected 0 or more and below 1")
    if experiment.stop_at is not None and not math.isfinite(experiment.stop_at):
        raise ConfigError(f"--stop_at: got {experiment.stop_at}, expected a finite number")
    wanted, population = experiment.clients_per_round, experiment.data.num_clients
    if wanted is not None and population is not None and wanted > population:
        raise ConfigError(
            f"--clients_per_round: got {wanted}, expected at most {population} "
            "(--data.num_clients); lower the one or raise the other"
        )
    model = experiment.model
    if model.batch_stats and model.norm not in (None, "batch"):
        raise ConfigError(
            f"--model.batch_stats: got {model.batch_stats} with --model.norm {model.norm}, "
            "which keeps no statistics; use --model.norm batch or leave batch_stats out"
        )


def _text(flag: str, value: str) -> None:
    if len(value) > LONGEST_TEXT:
        raise ConfigError(f"--{flag}: got {len(value)} characters, expected at most {LONGEST_TEXT}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"--{flag}: got {value!a}, expected text without lone surrogates")


def _at_least(flag: str, value: Any, low: int) -> None:
    if isinstance(value, int) and value < low:
        raise ConfigError(f"--{flag}: got {value}, expected {low} or more")
    if isinstance(value, int) and value >= 2**31:
        raise ConfigError(f"--{flag}: got {shown(value)}, expected less than {2**31}")


def _positive(flag: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--{flag}: got {value}, expected a number above 0")


def _rate(flag: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"--{flag}: got {value}, expected a finite number, 0 or more")
    if value is not None and value > FLOAT32_MAX:
        raise ConfigError(f"--{flag}: got {value}, expected at most {FLOAT32_MAX:.2g} (float32)")
