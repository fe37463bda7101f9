"""What `--help` and `--list` print, taken from the code's own docstrings and tables."""

import ast
import dataclasses
import inspect
import os
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jaxfed.aggregators import AGGREGATORS
from jaxfed.algorithms import ALGORITHMS
from jaxfed.config import Spec
from jaxfed.core.batch_stats import POLICIES
from jaxfed.data import PARTITIONS
from jaxfed.data.dataset import SOURCES
from jaxfed.data.tfds import COMMON, data_dir
from jaxfed.models import MODELS, ModelSpec
from jaxfed.optimizers import OPTIMIZERS
from jaxfed.resolve import TABLES
from jaxfed.tasks import TASKS

Row = tuple[str, str]
"""A flag or a name, and its line."""

METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", list: "KEY=V,V,..."}
BEFORE = ("config", "sweep")
"""Flags of the command that say what to run; the others say what to do with it."""


def help_text(command: Any, width: int = 100) -> str:
    """All flags of a command (a dataclass) in groups, each with its default."""
    experiment = command.experiment
    own = [item.name for item in dataclasses.fields(command) if item.name != "experiment"]
    after = [name for name in own if name not in BEFORE]
    groups = {"experiment": [*_flags(command, BEFORE), *_flags(experiment)]}
    for item in dataclasses.fields(experiment):
        part = getattr(experiment, item.name)
        if dataclasses.is_dataclass(part):
            title = f"{item.name}: {_first_line(type(part))}"
            groups[title] = _flags(part, prefix=f"{item.name}.")
    groups["output"] = [*_flags(command, after), ("-h, --help", "Print this.")]
    head = (
        "usage: python -m jaxfed.train [flags]\n\n"
        f"{_first_line(type(command))}\nEvery flag stands here with its default, or with the kind "
        "of value it takes.\n"
    )
    return head + _columns(groups, width)


def list_text(width: int = 100) -> str:
    """Every name that a flag takes, with a line each."""
    folder = data_dir()
    datasets = dict(SOURCES)
    for name in COMMON:
        there = (Path(folder).expanduser() / name).is_dir()
        datasets[name] = f"prepared in {folder}" if there else "fetched by TFDS on first use"
    return _columns(
        {
            "datasets: --data.dataset": datasets.items(),
            "partitions: --data.partition": (
                (name, spec.summary + "".join(f", --data.{knob}" for knob in spec.knobs))
                for name, spec in PARTITIONS.items()
            ),
            "models: --model.name": (
                (name, f"{spec.description}; {_limits(spec)}") for name, spec in MODELS.items()
            ),
            "BatchNorm's statistics: --model.batch_stats": (
                (name, policy.summary) for name, policy in POLICIES.items()
            ),
            "optimizers: --client.optimizer, --server.optimizer": (
                (name, spec.summary) for name, spec in OPTIMIZERS.items()
            ),
            "tasks: --task": ((name, spec.summary) for name, spec in TASKS.items()),
            "algorithms: --algorithm": _specs(ALGORITHMS),
            "aggregators: --server.aggregator": _specs(AGGREGATORS),
        },
        width,
    ).lstrip("\n")


def _specs(table: Mapping[str, Spec]) -> list[Row]:
    return [
        (name, spec.summary + (f" ({spec.source})" if spec.source else ""))
        for name, spec in table.items()
    ]


def _limits(spec: ModelSpec) -> str:
    norm = "" if spec.norm == "none" else f", {spec.norm} norm"
    return f"images from {spec.min_image_size}x{spec.min_image_size}{norm}"


def _columns(groups: Mapping[str, Iterable[Row]], width: int) -> str:
    tables = {title: list(rows) for title, rows in groups.items()}
    left = max(len(name) for rows in tables.values() for name, _ in rows) + 4
    lines = []
    for title, rows in tables.items():
        lines += ["", title]
        for name, text in rows:
            wrapped = textwrap.wrap(text, max(width - left, 30)) or [""]
            lines.append(f"  {name}".ljust(left) + wrapped[0])
            lines += [" " * left + line for line in wrapped[1:]]
    return "\n".join(lines) + "\n"


def _flags(part: Any, names: Sequence[str] | None = None, prefix: str = "") -> list[Row]:
    """The flags of a dataclass's instance, or some of them; not those that are dataclasses."""
    hints, docs = typing.get_type_hints(type(part)), _attribute_docs(type(part))
    rows = []
    for name in [item.name for item in dataclasses.fields(part)] if names is None else names:
        kind, value = hints[name], getattr(part, name)
        if dataclasses.is_dataclass(value):
            continue
        options = get_args(kind) if get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
        words = [w for o in options if get_origin(o) is Literal for w in get_args(o)]
        words += TABLES.get(prefix + name, ())
        choices = f" [{', '.join(words)}]" if words else ""
        shown = "" if value is False else f" {value}"
        if value in (None, "", []):
            bases = (get_origin(option) or option for option in options)
            shown = " " + next((METAVARS[b] for b in bases if b in METAVARS), "NAME")
        rows.append((f"--{prefix}{name.rstrip('_')}{shown}", docs[name] + choices))
    return rows


def _first_line(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").splitlines()[0]


def _attribute_docs(cls: type) -> dict[str, str]:
    """The string below each attribute, which Python itself does not keep."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for item, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            said = text.value if isinstance(text, ast.Constant) else ""
            docs[item.target.id] = " ".join(str(said).split())
    return docs


def terminal_width() -> int:
    """Columns of the terminal, 100 where there is none."""
    try:
        return os.get_terminal_size().columns
    except OSError:
        return int(os.environ.get("COLUMNS") or 100)
