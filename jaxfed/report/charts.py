"""Charts as SVG text, drawn in the page's own colours so that they follow light and dark.

Every function returns markup that is already escaped. A chart is 360 units wide, about the width
of a phone, so that its text is readable there.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 10, 34
COLORS = 8
"""Colours of the page's palette, `--k0` to `--k7`."""
MOST_POINTS = 300
"""Points of a line; more of them could not be told apart."""


Number = int | float


class Series(NamedTuple):
    """One line of a chart; points without a number are left out."""

    label: str
    xs: Sequence[Number]
    ys: Sequence[Number | None]
    color: str = "var(--k0)"
    dashed: bool = False


def figure_of(value: Number) -> str:
    """Four significant digits without trailing zeros."""
    return f"{value:.4g}"


def duration(seconds: Number) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def percent(value: Number) -> str:
    """A share as a percentage: 0.9721 is 97.2 %."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def ticks(low: Number, high: Number, count: int = 5, *, whole: bool = False) -> list[Number]:
    """Round numbers that span `low` to `high`, steps of 1, 2 or 5 times a power of ten.

    Example:
      >>> ticks(0.13, 0.92)
      [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        pad = abs(low) / 10 or 1
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, 1) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: Callable[[Number], str] = figure_of,
    x_label: str = "round",
    limits: tuple[Number, Number] | None = None,
) -> str:
    """Lines over rounds, with a legend below and the numbers as tooltips.

    Args:
      title: heading of the chart.
      series: the lines; the last one lies on top.
      unit: how a value is written.
      x_label: of the horizontal axis.
      limits: the values the vertical axis must not go beyond.
    """
    lines = [(one, _points(one)) for one in series]
    known = [point for _, points in lines for point in points]
    if not known:
        return _framed(title, '<p class="none">Nothing to draw: no finite value.</p>', "")
    xs, ys = zip(*known, strict=True)
    across = ticks(min(xs), max(xs), whole=True)
    first, span = min(xs), max(xs) - min(xs)
    across = [first, *(x for x in across if first + span / 12 < x <= max(xs))]
    up = ticks(min(ys), max(ys))
    if limits:
        up = [y for y in up if limits[0] <= y <= limits[1]] or list(limits)
    x_low, x_high = min(xs), max(*xs, min(xs) + 1)
    y_low, y_high = min(up[0], *ys), max(up[-1], *ys)
    y_high = y_high if y_high > y_low else y_low + 1

    def at(x: Number, y: Number) -> tuple[Number, Number]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_axes(across, up, at, unit, x_label)]
    few = len(known) <= 2 * MOST_POINTS
    for one, points in lines:
        places = [at(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        style = f'style="stroke:{one.color}"'
        parts.append(f'<polyline class="line" {style}{dash} points="{path}"/>')
        if not few:
            continue
        radius = 2.4 if len(points) <= 60 else 1.2
        label = html.escape(one.label)
        for (x, y), (round_, value) in zip(places, points, strict=True):
            said = f"{label}, {html.escape(x_label)} {round_:g}: {unit(value)}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:{one.color}">'
                f"<title>{said}</title></circle>"
            )
    svg = _svg(title, "".join(parts))
    return _framed(title, svg, legend(series) if len(series) > 1 else "")


def _points(one: Series) -> list[tuple[Number, Number]]:
    points = [
        (x, y) for x, y in zip(one.xs, one.ys, strict=True) if y is not None and math.isfinite(y)
    ]
    every = -(-len(points) // MOST_POINTS)
    return points[::-1][:: max(every, 1)][::-1]  # from the end: the last point always stays


def legend(series: Sequence[Series]) -> str:
    """The names of lines beside a piece of each."""
    shown = {one.label: one for one in series if one.label}
    keys = (
        f'<span><i class="{"dash" if one.dashed else "full"}" style="border-color:{one.color}"></i>'
        f"{html.escape(one.label)}</span>"
        for one in shown.values()
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def histogram(title: str, values: Sequence[Number], x_label: str, bins: int = 20) -> str:
    """How many clients there are in each twentieth of the range from 0 to 1."""
    counts = [0] * bins
    for value in values:
        counts[min(int(value * bins), bins - 1)] += 1
    if not sum(counts):
        return _framed(title, '<p class="none">Nothing to draw: no finite value.</p>', "")
    up = ticks(0, max(counts), 4, whole=True)

    def at(x: Number, y: Number) -> tuple[Number, Number]:
        return (
            LEFT + x * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / up[-1] * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_axes([0, 0.25, 0.5, 0.75, 1], up, at, figure_of, x_label, percent)]
    for number, count in enumerate(counts):
        (x, y), (right, floor) = at(number / bins, count), at((number + 1) / bins, 0)
        said = f"{percent(number / bins)} to {percent((number + 1) / bins)}: {count} client(s)"
        parts.append(
            f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{right - x - 1:.1f}" '
            f'height="{floor - y:.1f}"><title>{said}</title></rect>'
        )
    return _framed(title, _svg(title, "".join(parts)), "")


def label_map(title: str, table: Sequence[Sequence[int]]) -> str:
    """Clients down, classes across: the darker, the more images of the class the client holds."""
    rows, columns = len(table), len(table[0])
    height = max(5.0, min(18.0, 300 / rows))
    width = (WIDTH - LEFT - RIGHT) / columns
    most = max(max(row) for row in table) or 1
    gap = 1 if min(width, height) > 8 else 0.3
    whole = f'width="{WIDTH - LEFT - RIGHT}" height="{rows * height:.2f}"'
    parts = [f'<rect class="bar" x="{LEFT}" y="{TOP}" {whole} fill-opacity="0.06"/>']
    for r, row in enumerate(table):
        for c, count in enumerate(row):
            if not count:
                continue
            place = f'x="{LEFT + c * width:.2f}" y="{TOP + r * height:.2f}"'
            size = f'width="{width - gap:.2f}" height="{height - gap:.2f}"'
            said = f"<title>client {r}: {count} image(s) of class {c}</title>"
            shade = f'fill-opacity="{0.1 + 0.9 * count / most:.2f}"'
            parts.append(f'<rect class="bar" {place} {size} {shade}>{said}</rect>')
    for r in range(0, rows, max(1, math.ceil(12 / height))):
        y = TOP + (r + 0.5) * height + 3.5
        parts.append(f'<text x="{LEFT - 5}" y="{y:.1f}" class="end">{r}</text>')
    floor = TOP + rows * height
    for c in range(0, columns, max(1, math.ceil(18 / width))):
        x = LEFT + (c + 0.5) * width
        parts.append(f'<text x="{x:.1f}" y="{floor + 13:.1f}" class="mid">{c}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{floor + 28:.1f}" class="mid">class</text>')
    middle = TOP + rows * height / 2
    parts.append(
        f'<text class="mid" transform="translate(12 {middle:.1f}) rotate(-90)">client</text>'
    )
    return _framed(title, _svg(title, "".join(parts), floor + 34), "")


def share_bar(parts: Sequence[tuple[str, Number]]) -> str:
    """Seconds as one bar cut in proportion, with what each piece is below it."""
    total = sum(value for _, value in parts) or 1
    colors = [f"var(--k{i % COLORS})" for i in range(len(parts))]
    pieces = "".join(
        f'<i style="width:{100 * value / total:.2f}%;background:{color}"></i>'
        for color, (_, value) in zip(colors, parts, strict=True)
    )
    names = "".join(
        f'<span><i class="box" style="background:{color}"></i>{html.escape(name)} '
        f"{duration(value)}</span>"
        for color, (name, value) in zip(colors, parts, strict=True)
    )
    return f'<div class="share">{pieces}</div><p class="legend">{names}</p>'


def _axes(
    across: Sequence[Number],
    up: Sequence[Number],
    at: Callable[[Number, Number], tuple[Number, Number]],
    unit: Callable[[Number], str],
    x_label: str,
    x_unit: Callable[[Number], str] = figure_of,
) -> str:
    parts = []
    for value in up:
        _, y = at(across[0], value)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" class="end">{unit(value)}</text>'
        )
    for value in across:
        x, _ = at(value, up[0])
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" class="mid">{x_unit(value)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    name = html.escape(x_label)
    return "".join(parts) + f'<text x="{middle}" y="{HEIGHT - 4}" class="mid">{name}</text>'


def _svg(title: str, inside: str, height: Number = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}">'
        f"{inside}</svg>"
    )


def _framed(title: str, inside: str, below: str) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{inside}{below}</figure>"
