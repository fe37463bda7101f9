"""Many experiments from one: `--sweep client.lr=0.01,0.1 --sweep seed=0,1`.

Points that differ only in numbers of `client` and `server` and in seeds share one compiled program;
any other key makes a program for each of its values.
"""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxfed.config.codec import ALIASES, override, structure
from jaxfed.config.experiment import ConfigError, Experiment

MAX_POINTS = 10_000


class Point(NamedTuple):
    """One experiment of a sweep."""

    changes: dict[str, Any]
    experiment: Experiment


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Reads `key=value,value,...`; values are JSON, or text where they are not.

    Raises:
      ConfigError: if there is no `=`, or no value.

    Example:
      >>> parse_axis("client.lr=0.01,0.1")
      ('client.lr', [0.01, 0.1])
    """
    key, separator, values = text.partition("=")
    if not separator or not key or any(not value.strip() for value in values.split(",")):
        raise ConfigError(
            f"--sweep: got {text!r}, expected key=value,value,... (client.lr=0.01,0.1)"
        )
    key = key.strip().removeprefix("--")
    return ALIASES.get(key, key), [_value(value.strip()) for value in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except (ValueError, RecursionError):
        return text


def points(base: Experiment, axes: Sequence[str]) -> list[Point]:
    """The product of all axes, the last one varying fastest.

    Raises:
      ConfigError: for a malformed axis, an unknown key, a value of a wrong type, or anything twice.
    """
    parsed = [parse_axis(axis) for axis in axes]
    keys = [key for key, _ in parsed]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--sweep: got {', '.join(keys)}, expected every key once")
    count = math.prod(len(values) for _, values in parsed)
    if count > MAX_POINTS:
        raise ConfigError(f"--sweep: got {count} points, expected at most {MAX_POINTS}")
    combinations = itertools.product(*(values for _, values in parsed))
    changes = [dict(zip(keys, values, strict=True)) for values in combinations]
    found = [Point(change, override(base, change)) for change in changes]
    seen: set[Experiment] = set()
    for point in found:
        if point.experiment in seen:
            same = ", ".join(f"{key}={value}" for key, value in point.changes.items())
            raise ConfigError(f"--sweep: got {same} twice, expected every value once")
        seen.add(point.experiment)
    return found


def programs(experiments: Sequence[Experiment]) -> list[list[int]]:
    """Groups positions of (resolved) experiments that one compiled program can run."""
    groups: dict[str, list[int]] = {}
    for position, experiment in enumerate(experiments):
        groups.setdefault(structure(experiment), []).append(position)
    return list(groups.values())


def folder_name(number: int, changes: dict[str, Any]) -> str:
    """For example `003_client.lr=0.1_seed=1`, safe on every file system."""
    text = "_".join(f"{key}={value}" for key, value in changes.items())
    return f"{number:03d}_" + "".join(c if c.isalnum() or c in "._=-" else "-" for c in text)[:120]
