"""The tables of docs/algorithms.md, made from the tables of the code.

    python -m benchmarks.tables

`tests/test_docs.py` holds the page to it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages import table
from jaxfed import AGGREGATORS, ALGORITHMS, OPTIMIZERS, POLICIES, Spec
from jaxfed.data import PARTITIONS
from jaxfed.folder import write_atomically
from jaxfed.resolve import PARTITION_DEFAULTS
from jaxfed.tasks import TASKS

PAGE = Path(__file__).parent.parent / "docs" / "algorithms.md"


def main() -> None:
    write_atomically(PAGE, filled(PAGE.read_text(encoding="utf-8")))
    print(f"written: {PAGE.relative_to(PAGE.parent.parent)}")


def filled(text: str) -> str:
    """The page with every table between its marks made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{PAGE.name}: got no {begin} ... {end}, expected both; add them")
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def grouped(keys: Iterable[str]) -> str:
    """Keys by their group.

    Example:
      >>> grouped(["client.lr", "client.epochs", "weighting"])
      '`client.` lr, epochs; weighting'
    """
    groups: dict[str, list[str]] = {}
    for key in keys:
        group, _, leaf = key.rpartition(".")
        groups.setdefault(group, []).append(leaf)
    shared = ", ".join(groups.pop("", []))
    parts = [f"`{group}.` {', '.join(leaves)}" for group, leaves in groups.items()]
    return "; ".join([*parts, *([shared] if shared else [])])


def values(defaults: Mapping[str, Any]) -> str:
    """Defaults that are set, as `key value`."""
    return ", ".join(f"{key} {value}" for key, value in defaults.items() if value is not None)


def specs(rows: Mapping[str, Spec]) -> str:
    """A table of algorithms or of aggregators."""
    lines = [
        [f"`{name}`", spec.summary, grouped(spec.uses), values(spec.defaults), spec.source]
        for name, spec in rows.items()
    ]
    return table(["name", "summary", "keys", "defaults", "source"], lines)


def optimizers() -> str:
    lines = [
        [
            f"`{name}`", spec.summary, ", ".join(spec.defaults), values(spec.defaults),
            f"{spec.client_lr:g}", f"{spec.server_lr:g}",
        ]
        for name, spec in OPTIMIZERS.items()
    ]  # fmt: skip
    return table(["name", "summary", "keys", "defaults", "client lr", "server lr"], lines)


def tasks() -> str:
    lines = [
        [f"`{name}`", spec.summary, spec.targets, grouped(spec.uses)]
        for name, spec in TASKS.items()
    ]
    return table(["name", "summary", "targets", "keys"], lines)


def partitions() -> str:
    lines = [
        [
            f"`{name}`", spec.summary, grouped(f"data.{key}" for key in spec.knobs),
            values({key: PARTITION_DEFAULTS[key] for key in spec.knobs}),
        ]
        for name, spec in PARTITIONS.items()
    ]  # fmt: skip
    return table(["name", "summary", "keys", "defaults"], lines)


def policies() -> str:
    return table(["name", "summary"], [[f"`{n}`", p.summary] for n, p in POLICIES.items()])


TABLES = {
    "algorithms": lambda: specs(ALGORITHMS),
    "aggregators": lambda: specs(AGGREGATORS),
    "optimizers": optimizers,
    "tasks": tasks,
    "partitions": partitions,
    "batch norm": policies,
}


if __name__ == "__main__":
    main()
