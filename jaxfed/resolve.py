"""What an experiment's rows use: defaults filled in, everything else refused.

The rows are those of ALGORITHMS, AGGREGATORS, OPTIMIZERS, PARTITIONS and TASKS. After `resolve` a
key of theirs has a value exactly if something reads it.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxfed.aggregators import AGGREGATORS
from jaxfed.algorithms import ALGORITHMS
from jaxfed.config import (
    ConfigError,
    Experiment,
    Spec,
    dotted_keys,
    override,
    replaced,
    value_of,
)
from jaxfed.data import PARTITIONS
from jaxfed.optimizers import DECAY, OPTIMIZERS
from jaxfed.own import is_own, load_object, name_of
from jaxfed.tasks import TASKS, task_of

ALWAYS = ("client.batch_size", "client.shuffle")
"""Keys of `client` and `server` that a plan reads, whatever the algorithm."""
PARTITION_DEFAULTS = {"shards_per_client": 2, "alpha": 0.5, "classes_per_client": 2}


class Rows(NamedTuple):
    """The rows that an experiment names."""

    algorithm: Spec
    aggregator: Spec | None


def row_of(table: Mapping[str, Any], name: str, flag: str) -> Any:
    """The row of a table, with the names that there are if it has none.

    Raises:
      ConfigError: for an unknown name.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--{flag}: got {name}, expected one of {', '.join(table)}{hint}")


def spec_of(table: Mapping[str, Spec], name: str, flag: str) -> Spec:
    """A row of a table of specs, or that of the user's own `module:object`.

    Raises:
      ConfigError: if there is neither.
    """
    return as_spec(load_object(name, flag), flag) if is_own(name) else row_of(table, name, flag)


ARGUMENTS = {
    "algorithm": ("problem", "experiment", "federation"),
    "server.aggregator": ("experiment",),
}
"""What a row's `build` is called with."""


def as_spec(piece: Any, flag: str) -> Spec:
    """A `Spec` as it is; a bare `build` function as one that uses no key.

    Raises:
      ConfigError: if it is neither, or names keys that do not exist.
    """
    spec = piece if isinstance(piece, Spec) else Spec(piece, summary="your own")
    arguments = ARGUMENTS[flag]
    try:
        inspect.signature(spec.build).bind(*arguments)
    except (TypeError, ValueError):
        raise ConfigError(
            f"--{flag}: got {piece!r:.80}, expected a jaxfed.Spec, or a function of "
            f"({', '.join(arguments)})"
        ) from None
    known = dotted_keys()
    for key in (*spec.uses, *spec.defaults):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--{flag}: its Spec names {key!r}, which is no key{hint}")
    return spec


def resolve(experiment: Experiment, algorithm: Any = None) -> tuple[Experiment, Rows]:
    """Fills in the defaults of what is used, and refuses what is given and not used.

    Args:
      experiment: see `Experiment`.
      algorithm: a `Spec`, or a build function, instead of `experiment.algorithm`.

    Raises:
      ConfigError: naming the key, its value and who would use it.
    """
    if algorithm is None:
        algorithm = spec_of(ALGORITHMS, experiment.algorithm, "algorithm")
    else:
        experiment = replaced(experiment, {"algorithm": name_of(algorithm, "own")})
        algorithm = as_spec(algorithm, "algorithm")
    wanted = experiment.server.aggregator or algorithm.defaults.get("server.aggregator", "mean")
    aggregator = None
    if "server.aggregator" in algorithm.uses:
        aggregator = spec_of(AGGREGATORS, wanted, "server.aggregator")
    rows = Rows(algorithm, aggregator)
    used, defaults = _used(experiment, rows)
    for key in dotted_keys():
        if (not key.startswith(("client.", "server.")) and key not in _SHARED) or key in ALWAYS:
            continue
        value = value_of(experiment, key)
        if value is not None and key not in used and value != algorithm.defaults.get(key):
            raise ConfigError(_unused(experiment, key, value))
    filled = {
        key: value for key, value in defaults.items()
        if value is not None and value_of(experiment, key) is None
    }  # fmt: skip
    return _resolve_partition(override(experiment, filled)), rows


_SHARED = ("weighting", "model.batch_stats")
"""Keys outside `client` and `server` that an algorithm may use or not."""


def _used(experiment: Experiment, rows: Rows) -> tuple[set[str], dict[str, Any]]:
    """The keys that are read, and the defaults of those that are not given."""
    algorithm, aggregator = rows
    used, defaults = set(algorithm.uses), dict(algorithm.defaults)
    if aggregator is not None:
        used |= set(aggregator.uses)
        defaults = {**aggregator.defaults, **defaults}
    task = experiment.task or "classification"
    used |= set(() if is_own(task) else task_of(task).uses)
    for group, config in (("client", experiment.client), ("server", experiment.server)):
        if f"{group}.lr" not in used:
            continue
        name = "sgd"
        if f"{group}.optimizer" in used:
            name = config.optimizer or defaults.get(f"{group}.optimizer", "sgd")
            spec = row_of(OPTIMIZERS, name, f"{group}.optimizer")
            used |= {f"{group}.{key}" for key in spec.defaults}
            if name in ("momentum", "nesterov"):
                defaults.setdefault(f"{group}.momentum", spec.defaults["momentum"])
        defaults.setdefault(f"{group}.lr", getattr(OPTIMIZERS[name], f"{group}_lr"))
        if f"{group}.schedule" in used:
            if config.lr_decay is not None:
                defaults[f"{group}.schedule"] = "exponential"
            if (config.schedule or defaults.get(f"{group}.schedule")) == "exponential":
                defaults[f"{group}.lr_decay"] = DECAY
            else:
                used.discard(f"{group}.lr_decay")
    return used, defaults


def _unused(experiment: Experiment, key: str, value: Any) -> str:
    """Why a key is refused, and who would use it."""
    group, _, leaf = key.partition(".")
    got = f"--{key}: got {value}"
    if leaf == "lr_decay":
        schedule = getattr(experiment, group).schedule
        return f"{got} with schedule {schedule}; use --{group}.schedule exponential or leave it out"
    if key == "client.label_smoothing":
        return f"{got} with task {experiment.task}, which has no classes; leave it out"
    optimizers = [name for name, spec in OPTIMIZERS.items() if leaf in spec.defaults]
    config = getattr(experiment, group, None)
    if optimizers and leaf != "weight_decay" and hasattr(config, "optimizer"):
        spec = ALGORITHMS.get(experiment.algorithm)
        if spec is None or f"{group}.optimizer" in spec.uses:
            return (
                f"{got} with optimizer {getattr(config, 'optimizer', None) or 'sgd'}, which has no "
                f"{leaf}; use --{group}.optimizer {_either(optimizers)}, or leave {leaf} out"
            )
    users = [
        *(f"--algorithm {name}" for name, spec in ALGORITHMS.items() if key in spec.uses),
        *(f"--server.aggregator {name}" for name, spec in AGGREGATORS.items() if key in spec.uses),
    ]
    hint = f", or use {_either(users)}" if users else ""
    return f"{got} with algorithm {experiment.algorithm}, which does not use it; leave it out{hint}"


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _resolve_partition(experiment: Experiment) -> Experiment:
    name = experiment.data.partition
    used = row_of(PARTITIONS, name, "data.partition").knobs
    filled = {}
    for key, default in PARTITION_DEFAULTS.items():
        value = getattr(experiment.data, key)
        if key in used:
            filled[f"data.{key}"] = default if value is None else value
        elif value is not None:
            users = [other for other, spec in PARTITIONS.items() if key in spec.knobs]
            raise ConfigError(
                f"--data.{key}: got {value} with partition {name}, which does not use it; leave it "
                f"out, or use --data.partition {_either(users)}"
            )
    return override(experiment, filled)


TABLES: dict[str, Mapping[str, Any]] = {
    "algorithm": ALGORITHMS,
    "task": TASKS,
    "data.partition": PARTITIONS,
    "client.optimizer": OPTIMIZERS,
    "server.optimizer": OPTIMIZERS,
    "server.aggregator": AGGREGATORS,
}
"""The table that each key names a row of."""
