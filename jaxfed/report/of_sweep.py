"""The page of a sweep."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxfed.config import Experiment, command_line
from jaxfed.report.charts import COLORS, Series
from jaxfed.report.of_run import (
    Score,
    configuration,
    label_of,
    metric_chart,
    metrics_of,
    score_of,
    what_ran,
)
from jaxfed.report.page import CONTINUED, cell, code, facts, grid, page, section, table, text, tiles


class SweepPoint(NamedTuple):
    """One run of a sweep."""

    changes: dict[str, Any]
    """The swept keys and this point's values."""
    experiment: Experiment
    history: Sequence[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def score(self) -> Score:
        """The metric that points are ranked by."""
        return score_of(self.summary)

    @property
    def result(self) -> float | None:
        """The final test score; None if the run diverged."""
        return self.summary[f"final_test_{self.score.name}"]

    @property
    def label(self) -> str:
        """For example `client.lr=0.1 seed=1`."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items())


def sweep_page(base: Experiment, points: Sequence[SweepPoint]) -> str:
    """The page of a sweep: the best point, all of them compared, and how to run each again.

    Args:
      base: the experiment that every point is a change of.
      points: in the order of the sweep; those that failed have no final accuracy.
    """
    finished = [p for p in points if p.result is not None]
    choose = max if points[0].score.maximize else min
    best = choose(finished, key=lambda p: p.result or 0.0, default=None)
    keys = varied(points)
    name = base.name or f"{base.data.dataset} {base.data.partition} {base.model.name}"
    sections = [section("Best point", *_best(best, points))]
    if len(keys) >= 2:
        sections.append(section("Two keys at a time", *_heat(finished, keys)))
    sections += [
        section("Curves", grid(*_curves(points, best))),
        section("All points", text("Click a column's head to sort."), _table(points)),
        section(
            "What ran",
            facts(what_ran(points[0].experiment, points[0].summary)),
            configuration(base),
        ),
    ]
    swept = ", ".join(keys) or "nothing"
    return page(f"Sweep: {name}", f"{len(points)} points; swept: {swept}", *sections)


def varied(points: Sequence[SweepPoint]) -> list[str]:
    """The swept keys that take more than one value, `seed` last."""
    keys = [key for key in points[0].changes if len({str(p.changes[key]) for p in points}) > 1]
    return sorted(keys, key=lambda key: key == "seed")


def _best(best: SweepPoint | None, points: Sequence[SweepPoint]) -> list[str]:
    if best is None:
        return [text(f"No point has a final test {points[0].score.label}.")]
    score = best.score
    parts = [
        tiles([
            (f"final test {score.label}", score.text(best.result), best.label),
            (f"best test {score.label}",
             score.text(best.summary[f"best_test_{score.name}"]), "of this point"),
        ])
    ]  # fmt: skip
    siblings = [
        p.result
        for p in points
        if p.result is not None and {**p.changes, "seed": 0} == {**best.changes, "seed": 0}
    ]
    if len(siblings) > 1:
        mean, spread = statistics.mean(siblings), statistics.stdev(siblings)
        parts.append(
            text(
                f"The same settings over {len(siblings)} seeds: mean {score.text(mean)}, standard "
                f"deviation {score.text(spread)}."
            )
        )
    return [*parts, text("Run it again:"), code(command_line(best.experiment, CONTINUED))]


def _heat(points: Sequence[SweepPoint], keys: Sequence[str]) -> list[str]:
    down, across = keys[:2]
    cells: dict[tuple[str, str], list[float]] = {}
    for point in points:
        place = str(point.changes[down]), str(point.changes[across])
        cells.setdefault(place, []).append(point.result or 0.0)
    means = {place: statistics.mean(values) for place, values in cells.items()}
    low, high = min(means.values(), default=0), max(means.values(), default=1)
    columns = list(dict.fromkeys(place[1] for place in means))
    rows = []
    for row in dict.fromkeys(place[0] for place in means):
        line = [f"<th>{cell(row)}</th>"]
        for column in columns:
            value = means.get((row, column))
            if value is None:
                line.append('<td class="empty"></td>')
                continue
            heat = (value - low) / (high - low) if high > low else 1
            line.append(f'<td style="--heat:{heat:.3f}">{points[0].score.text(value)}</td>')
        rows.append(f"<tr>{''.join(line)}</tr>")
    head = "".join(f"<th>{cell(column)}</th>" for column in columns)
    corner = f"<th>{cell(down)} \\ {cell(across)}</th>"
    most = max(map(len, cells.values()), default=1)
    mean = f", mean of up to {most} points" if most > 1 else ""
    return [
        text(f"Final test {points[0].score.label} by {down} (down) and {across} (across){mean}."),
        f'<div class="wide"><table class="heat"><thead><tr>{corner}{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    ]


def _curves(points: Sequence[SweepPoint], best: SweepPoint | None) -> list[str]:
    few = len(points) <= COLORS

    def series(key: str) -> list[Series]:
        lines = []
        for number, point in enumerate(points):
            rounds = [row["round"] for row in point.history]
            values = [row[key] for row in point.history]
            if few:
                lines.append(Series(point.label, rounds, values, f"var(--k{number})"))
            elif point is not best:
                lines.append(Series("the other points", rounds, values, "var(--faint)"))
        if best and not few:
            rounds = [row["round"] for row in best.history]
            lines.append(Series(f"best: {best.label}", rounds, [r[key] for r in best.history]))
        return lines

    names = metrics_of(points[0].history)
    return [metric_chart(name, f"Test {label_of(name)}", series(f"test_{name}")) for name in names]


def _table(points: Sequence[SweepPoint]) -> str:
    score = points[0].score
    results = {
        f"final_test_{score.name}": f"final {score.label}",
        f"best_test_{score.name}": f"best {score.label}",
        "final_test_loss": "final loss", "rounds": "rounds", "dropped_clients": "dropped",
    }  # fmt: skip
    head = ["point", *points[0].changes, *results.values()]
    rows = [
        (f"{i:03d}", *(str(v) for v in p.changes.values()), *(p.summary[key] for key in results))
        for i, p in enumerate(points)
    ]
    return table(head, rows, sortable=True)
