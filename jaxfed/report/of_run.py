"""The page of one run."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfed.algorithms import ALGORITHMS
from jaxfed.config import Experiment, command_line, to_dict
from jaxfed.core.batch_stats import POLICIES
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
        f"{data.dataset}, {data.num_clients} clients ({data.partition}), {cohort} per round, "
        f"seed {experiment.seed}"
    )


def headline(run: SavedRun) -> str:
    """The numbers one came for."""
    summary, score = run.summary, score_of(run.summary)
    known = _scores(run.clients, score.name)
    final, best = summary[f"final_test_{score.name}"], summary[f"best_test_{score.name}"]
    when = next((r["round"] for r in run.history if r[f"test_{score.name}"] == best), None)
    items = [
        (f"final test {score.label}", score.text(final), f"after round {summary['rounds']}"),
        (f"best test {score.label}", score.text(best), f"round {when}" if best is not None else ""),
    ]
    if len(known):
        low = score.text(worst(known, maximize=score.maximize))
        items.append(("worst 10 % of clients", low, "on their own examples"))
    items.append(("time", duration(summary["seconds"]), summary["device"]))
    return tiles(items)


def learning_curves(history: Sequence[dict[str, Any]]) -> str:
    """Every metric, on the test set and on the clients while they train."""

    def series(kind: str) -> list[Series]:
        rounds = [row["round"] for row in history]
        train = [row[f"train_{kind}"] for row in history]
        return [
            Series("train, on clients", rounds, train, "var(--k1)", dashed=True),
            Series("test", rounds, [row[f"test_{kind}"] for row in history]),
        ]

    names = metrics_of(history)
    return grid(*(metric_chart(name, label_of(name).capitalize(), series(name)) for name in names))


def metric_chart(name: str, title: str, series: list[Series]) -> str:
    """A chart of a metric; accuracies as percent from 0 to 1."""
    if name.endswith("accuracy"):
        return line_chart(title, series, unit=percent, limits=(0, 1))
    return line_chart(title, series)


def metrics_of(history: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the test metrics, the loss last."""
    names = [key.removeprefix("test_") for key in history[0] if key.startswith("test_")]
    return sorted(names, key=lambda name: name == "loss")


def label_of(name: str) -> str:
    """A metric's name in words."""
    return name.replace("_", " ")


class Score(NamedTuple):
    """The metric that runs are ranked by."""

    name: str
    maximize: bool

    @property
    def label(self) -> str:
        """Its name in words."""
        return label_of(self.name)

    def text(self, value: float | None) -> str:
        """A value of it."""
        if value is None:
            return "none"
        return percent(value) if self.name.endswith("accuracy") else figure_of(value)


def score_of(summary: dict[str, Any]) -> Score:
    """The score of a run; accuracy in runs that were saved before there were others."""
    return Score(summary.get("score", "accuracy"), summary.get("maximize", True))


def _labels(clients: Sequence[dict[str, Any]]) -> list[str]:
    counts = np.array(
        [[count for key, count in row.items() if key.startswith("class_")] for row in clients]
    )
    if not counts.size:
        sizes = np.array([row["images"] for row in clients])
        return [facts([("clients", len(clients)), ("examples per client", _spread(sizes))])]
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
            label_map("Training examples of each class" + (": " if cut else "") + ", ".join(cut),
                      shown.tolist()),
            facts([
                ("clients", len(clients)),
                ("examples per client", _spread(sizes)),
                ("classes per client", f"{held.min()} to {held.max()} of {counts.shape[1]}, mean "
                 f"{figure_of(float(held.mean()))}"),
                ("label skew", f"{figure_of(float(skew.mean()))}: mean distance (total variation) "
                 "between a client's labels and all clients'; 0 is IID"),
            ]),
        )
    ]  # fmt: skip


def _spread(sizes: np.ndarray) -> str:
    median = figure_of(float(np.median(sizes)))
    return f"{sizes.min()} to {sizes.max()}, median {median}"


def _scores(clients: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in clients if row.get(name) is not None], float)


def worst(scores: np.ndarray, share: float = 0.1, *, maximize: bool = True) -> float:
    """Mean score of the worst tenth of the clients, at least one."""
    ranked = np.sort(scores) if maximize else np.sort(scores)[::-1]
    return float(ranked[: max(1, round(share * len(ranked)))].mean())


def _served(run: SavedRun) -> list[str]:
    score = score_of(run.summary)
    known = _scores(run.clients, score.name)
    own = run.experiment.model.batch_stats == "local"
    network = "each client's own network" if own else "the final network"
    what = text(
        f"{score.label.capitalize()} of {network} on each client's own training examples (not test "
        "data: it shows which clients the network serves badly, not how it generalizes)."
    )
    if not len(known):
        return [what, text("No client has a finite score.")]
    left_out = len(run.clients) - len(known)
    levels = (5, 25, 50, 75, 95)
    low, high = known.min(), known.max()
    if not score.maximize:
        low, high = high, low
    rows = [
        ("worst client", low),
        ("mean of the worst 10 %", worst(known, maximize=score.maximize)),
    ]
    rows += [
        (f"{level}th percentile", value)
        for level, value in zip(levels, np.percentile(known, levels), strict=True)
    ]
    rows += [("best client", high), ("mean", known.mean())]
    rows += [("standard deviation", known.std())]
    shown = [(name, score.text(float(value))) for name, value in rows]
    note = (
        [text(f"{left_out} client(s) without examples or training left out.")] if left_out else []
    )
    beside = table(("clients", score.label), shown)
    if score.name.endswith("accuracy"):
        title = f"Clients by {score.label}"
        chart = histogram(title, known.tolist(), f"{score.label} on own training examples")
        beside = grid(chart, beside)
    return [what, beside, *note]


def _drift(history: Sequence[dict[str, Any]], experiment: Experiment) -> list[str]:
    rounds = [row["round"] for row in history]
    mean = [row["client_delta_norm"] for row in history]
    server = [row["delta_norm"] for row in history]
    moves = line_chart("How far the weights move in a round (norm)", [
        Series("one client, mean", rounds, mean, "var(--k1)", dashed=True),
        Series("the averaged update", rounds, server),
    ])  # fmt: skip
    spec = ALGORITHMS.get(experiment.algorithm)
    if spec is not None and spec.pooled:
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
    rule = f"{policy}: {POLICIES[policy].summary}" if policy else "no BatchNorm in this network"
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
