"""Experiments as JSON, as flags and as dotted keys; their numbers as inputs of a program."""

import contextlib
import copy
import dataclasses
import difflib
import json
import shlex
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jaxfed.config.experiment import ConfigError, Experiment

ALIASES = {"client.prox_mu": "client.mu"}
"""Keys under their earlier names."""


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
            f"--config: {str(path)!r} is not JSON ({error}); fix it or write one with to_json"
        ) from None
    return from_dict(_migrated(tree))


def _migrated(tree: Any) -> Any:
    """A config of jaxfed 0.1, whose files recorded defaults that the algorithm did not use."""
    if not isinstance(tree, dict) or "task" in tree:
        return tree
    tree = copy.deepcopy(tree)
    unused = {
        "fedsgd": {"client": {"optimizer": "sgd", "lr": 0.1}},
        "central": {"server": {"optimizer": "sgd", "lr": 1.0}, "": {"weighting": "examples"}},
    }.get(str(tree.get("algorithm")), {})
    unused |= {"data": {"alpha": 0.5, "shards_per_client": 2, "classes_per_client": 2}}
    for group, keys in unused.items():
        node = tree.get(group) if group else tree
        for key, default in keys.items():
            if isinstance(node, dict) and node.get(key) == default:
                del node[key]
    return tree


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
    for given, value in changes.items():
        key = ALIASES.get(given, given)
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
      >>> value_of(Experiment(), "data.partition")
      'iid'
    """
    node: Any = experiment
    for part in key.split("."):
        node = getattr(node, part)
    return node


def command_line(experiment: Experiment, between: str = " ") -> str:
    """The command that runs an experiment: every key that is not at its default, as a flag.

    Example:
      >>> from jaxfed import ClientConfig
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


def replaced(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """Replaces dotted keys without any check, so that a number may be a tracer."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        group, _, leaf = key.rpartition(".")
        groups.setdefault(group, {})[leaf] = value
    changed = dict(groups.pop("", {}))
    for group, leaves in groups.items():
        changed[group] = _with(getattr(experiment, group), leaves)
    return _with(experiment, changed)


def _with(config: Any, leaves: Mapping[str, Any]) -> Any:
    config = copy.copy(config)
    for leaf, value in leaves.items():
        object.__setattr__(config, leaf, value)  # a constructor would be held to the declared types
    return config


def numbers(experiment: Experiment) -> dict[str, float]:
    """The floats of `client` and `server` that are set: inputs of a program, not part of it.

    Example:
      >>> from jaxfed import ClientConfig
      >>> numbers(Experiment(client=ClientConfig(lr=0.1, epochs=2)))
      {'client.lr': 0.1}
    """
    keys = (key for key in dotted_keys() if key.startswith(("client.", "server.")))
    values = {key: value_of(experiment, key) for key in keys}
    return {key: value for key, value in values.items() if isinstance(value, float)}


def structure(experiment: Experiment) -> str:
    """What experiments have in common that one compiled program can run: all but numbers and seed.

    A number that is absent from one and present in the other makes two programs.
    """
    same = dict.fromkeys(numbers(experiment), 0.0)
    return to_json(replaced(experiment, {**same, "seed": 0, "name": ""}))


def _unknown(key: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see --help for all keys"
    return ConfigError(f"--{key}: unknown key; {hint}")


def build_typed(experiment: Experiment) -> Experiment:
    """The experiment with every value checked against its declared type.

    Raises:
      ConfigError: for a value of another type.
    """
    return _build(Experiment, to_dict(experiment), "")


def _build(cls: Any, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        where = f"--{prefix[:-1]}" if prefix else "the experiment"
        raise ConfigError(f"{where}: got {shown(tree)}, expected a JSON object of keys")
    hints = typing.get_type_hints(cls)
    values = {}
    for given, value in tree.items():
        key = str(ALIASES.get(f"{prefix}{given}", given)).removeprefix(prefix)
        if key in values:
            raise ConfigError(f"--{prefix}{given}: got it beside {key}, which is the same key")
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
    raise ConfigError(f"--{flag}: got {shown(value)}, expected {_describe(choices)}")


def expected(key: str) -> str:
    """What a dotted key takes, in words.

    Example:
      >>> expected("client.lr"), expected("parallel")
      ('a number or null', 'auto, loop, vmap or a whole number')
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


def shown(value: Any) -> str:
    """A value for an error message, cut if it is long."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        return "something too large to show"
    return text if len(text) <= 60 else text[:57] + "..."
