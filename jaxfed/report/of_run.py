"""The page of one run."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxfed.batch_stats import POLICIES
from jaxfed.experiment import Experiment, command_line, to_dict
from jaxfed.report.charts import (
    Series,
    duration,
    figure_of,
    histogram,
    label_map,
    line_chart,
    percent,
    share_bar,
)
from jaxfed.report.page import CONTINUED, code, facts, grid, page, section, table, text, tiles
from jaxfed.saved import SavedRun

MOST_CLIENTS, MOST_CLASSES = 50, 100
"""Rows and columns of the label map; the numbers beside it are of all clients."""


def run_page(run: SavedRun) -> str:
    """The page of a run, made of nothing but what is in its folder."""
    return page(
        run.summary["name"],
        subtitle(run.experiment),
        section("Result", headline(run)),
        section("Learning curves", learning_curves(run.history)),
        section("What the clients hold", *_labels(run.clients)),
        section("How well the clients are served", *_served(run)),
        section("Drift", *_drift(run.history, run.experiment)),
        section("What ran", *_what_ran(run.experiment, run.summary)),
    )


def subtitle(experiment: Experiment) -> str:
    """The experiment in one sentence."""
    data, cohort = experiment.data, experiment.clients_per_round
    return (
        f"{experiment.rounds} rounds of {experiment.algorithm}: {experiment.model.name} on "
        f"{data.dataset}, {data.num_clients} clients ({data.partition}), {cohort} a round, "
        f"seed {experiment.seed}"
    )


def headline(run: SavedRun) -> str:
    """The numbers one came for."""
    summary, known = run.summary, _accuracies(run.clients)
    final, best = summary["final_test_accuracy"], summary["best_test_accuracy"]
    when = next((r["round"] for r in run.history if r["test_accuracy"] == best), None)
    items = [
        ("final test accuracy", _share(final), f"after round {summary['rounds']}"),
        ("best test accuracy", _share(best), f"round {when}" if best is not None else ""),
    ]
    if len(known):
        items.append(("worst 10 % of clients", percent(worst(known)), "on their own images"))
    items.append(("time", duration(summary["seconds"]), summary["device"]))
    return tiles(items)


def learning_curves(history: Sequence[dict[str, Any]]) -> str:
    """Accuracy and loss, on the test set and on the clients while they train."""

    def series(kind: str) -> list[Series]:
        rounds = [row["round"] for row in history]
        train = [row[f"train_{kind}"] for row in history]
        return [
            Series("train, on clients", rounds, train, "var(--k1)", dashed=True),
            Series("test", rounds, [row[f"test_{kind}"] for row in history]),
        ]

    return grid(
        line_chart("Accuracy", series("accuracy"), unit=percent, limits=(0, 1)),
        line_chart("Loss", series("loss")),
    )


def _labels(clients: Sequence[dict[str, Any]]) -> list[str]:
    counts = np.array(
        [[count for key, count in row.items() if key.startswith("class_")] for row in clients]
    )
    sizes = counts.sum(axis=1)
    held = (counts > 0).sum(axis=1)
    shown = counts[:MOST_CLIENTS, :MOST_CLASSES]
    cut = [
        f"the first {part} of {whole} {what}"
        for part, whole, what in zip(shown.shape, counts.shape, ("clients", "classes"), strict=True)
        if part < whole
    ]
    # Half the total variation distance: 0 where a client's labels are distributed as everyone's.
    everyone = counts.sum(axis=0) / counts.sum()
    skew = np.abs(counts[sizes > 0] / sizes[sizes > 0, None] - everyone).sum(axis=1) / 2
    return [
        grid(
            label_map("Training images of each class" + (": " if cut else "") + ", ".join(cut),
                      shown.tolist()),
            facts([
                ("clients", len(clients)),
                ("images a client", f"{sizes.min()} to {sizes.max()}, median "
                 f"{figure_of(float(np.median(sizes)))}"),
                ("classes a client", f"{held.min()} to {held.max()} of {counts.shape[1]}, mean "
                 f"{figure_of(float(held.mean()))}"),
                ("label skew", f"{figure_of(float(skew.mean()))}: mean distance (total variation) "
                 "between a client's labels and all clients'; 0 is IID"),
            ]),
        )
    ]  # fmt: skip


def _accuracies(clients: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([row["accuracy"] for row in clients if row["accuracy"] is not None], float)


def worst(accuracies: np.ndarray, share: float = 0.1) -> float:
    """Mean accuracy of the worst tenth of the clients, at least one."""
    return float(np.sort(accuracies)[: max(1, round(share * len(accuracies)))].mean())


def _served(run: SavedRun) -> list[str]:
    known = _accuracies(run.clients)
    own = run.experiment.model.batch_stats == "local"
    network = "each client's own network" if own else "the final network"
    what = text(
        f"Accuracy of {network} on each client's own training images (not test data: it shows "
        "whom the network serves badly, not how it generalises)."
    )
    if not len(known):
        return [what, text("No client has a finite score.")]
    left_out = len(run.clients) - len(known)
    levels = (5, 25, 50, 75, 95)
    rows = [("worst client", known.min()), ("mean of the worst 10 %", worst(known))]
    rows += [
        (f"{level}th percentile", value)
        for level, value in zip(levels, np.percentile(known, levels), strict=True)
    ]
    rows += [("best client", known.max()), ("mean", known.mean())]
    rows += [("standard deviation", known.std())]
    shown = [(name, percent(float(value))) for name, value in rows]
    note = [text(f"{left_out} client(s) without images or training left out.")] if left_out else []
    chart = histogram("Clients by accuracy", known.tolist(), "accuracy on own training images")
    return [what, grid(chart, table(("clients", "accuracy"), shown)), *note]


def _drift(history: Sequence[dict[str, Any]], experiment: Experiment) -> list[str]:
    rounds = [row["round"] for row in history]
    mean = [row["client_delta_norm"] for row in history]
    server = [row["delta_norm"] for row in history]
    moves = line_chart("How far the weights move in a round (norm)", [
        Series("one client, mean", rounds, mean, "var(--k1)", dashed=True),
        Series("the averaged update", rounds, server),
    ])  # fmt: skip
    if experiment.algorithm == "central":
        return [grid(moves), text("Central training has one client, so there is no drift.")]
    ratio = [s / m if s is not None and m else None for s, m in zip(server, mean, strict=True)]
    seats = experiment.clients_per_round or 1
    return [
        grid(moves, line_chart(
            "Agreement: averaged update / mean client", [Series("agreement", rounds, ratio)],
            limits=(0, 1),
        )),
        text(
            "Agreement is 1 where all clients move the same way, and falls towards "
            f"1 / sqrt({seats}) = {figure_of(seats**-0.5)} where they move independently: the rest "
            "is drift, and averaging cancels it."
        ),
        text(_dropped(history)),
    ]  # fmt: skip


def _dropped(history: Sequence[dict[str, Any]]) -> str:
    count = sum(row["dropped_clients"] for row in history)
    if not count:
        return "No update was dropped."
    most = max(history, key=lambda row: row["dropped_clients"])
    return (
        f"{count} client update(s) were not finite and were dropped, most of them in round "
        f"{most['round']} ({most['dropped_clients']}); lower --client.lr."
    )


def _what_ran(experiment: Experiment, summary: dict[str, Any]) -> list[str]:
    return [
        facts(what_ran(experiment, summary)),
        times(summary),
        *again(experiment),
        configuration(experiment),
    ]


def what_ran(experiment: Experiment, summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """Everything that decides about the numbers and is not in the configuration."""
    policy = experiment.model.batch_stats
    rule = f"{policy}: {POLICIES[policy]}" if policy else "no BatchNorm in this network"
    return [
        ("network", f"{experiment.model.name}, {summary['parameters']:,} parameters"),
        ("BatchNorm", rule),
        ("precision", experiment.dtype),
        ("device", summary["device"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items())),
    ]


def times(summary: dict[str, Any]) -> str:
    """Where the time went."""
    parts = [(name, summary[f"{name}_seconds"]) for name in ("compile", "train", "evaluate")]
    rest = summary["seconds"] - sum(value for _, value in parts)
    return "<h3>Time</h3>" + share_bar([*parts, ("other", max(rest, 0.0))])


def again(experiment: Experiment) -> list[str]:
    """The command that gives the same numbers."""
    return ["<h3>Run it again</h3>", code(command_line(experiment, CONTINUED))]


def configuration(experiment: Experiment) -> str:
    """`config.json`, folded away."""
    config = code(json.dumps(to_dict(experiment), indent=2))
    return f"<details><summary>Configuration</summary>{config}</details>"


def _share(value: float | None) -> str:
    return "none" if value is None else percent(value)
