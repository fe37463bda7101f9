"""Pictures and pages made from a run's numbers: `curves.png` and `report.html`."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxfed.experiment import Experiment, to_dict

Curves = Mapping[str, Sequence[dict[str, Any]]]
"""A history for each label."""


def draw_curves(curves: Curves) -> Figure:
    """Loss and accuracy over rounds: training as lines, tests as lines with markers."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for panel, kind in zip(panels, ("loss", "accuracy"), strict=True):
        for label, history in curves.items():
            tested = [row for row in history if row[f"test_{kind}"] is not None]
            (line,) = panel.plot(
                [row["round"] for row in tested],
                [row[f"test_{kind}"] for row in tested],
                marker="o", markersize=3, label=label if len(curves) > 1 else "test",
            )  # fmt: skip
            if len(curves) == 1:
                trained = [row for row in history if row[f"train_{kind}"] is not None]
                panel.plot(
                    [row["round"] for row in trained],
                    [row[f"train_{kind}"] for row in trained],
                    color=line.get_color(), alpha=0.5, linestyle="--", label="train, on clients",
                )  # fmt: skip
        panel.set_xlabel("round")
        panel.set_ylabel(("test " if len(curves) > 1 else "") + kind)
        panel.grid(alpha=0.3)
    if len(curves) <= 12:
        panels[0].legend(fontsize="small")
    return figure


def curves_png(curves: Curves) -> bytes:
    """The curves as a PNG file."""
    buffer = io.BytesIO()
    draw_curves(curves).savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def report_html(
    title: str, curves: Curves, rows: Sequence[dict[str, Any]], experiment: Experiment
) -> str:
    """A page without outside requests: the result, the curves, the configuration."""
    buffer = io.StringIO()
    draw_curves(curves).savefig(buffer, format="svg", transparent=False)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    config = json.dumps(to_dict(experiment), indent=2)
    return _PAGE.format(
        title=html.escape(title), curves=svg, results=_table(rows), config=html.escape(config)
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return html.escape(f"{value:.4f}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
.wide {{ overflow-x: auto }}
svg {{ width: 100%; height: auto; border-radius: 6px }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .3rem .8rem; border-bottom: 1px solid #8884 }}
th:first-child, td:first-child {{ text-align: left }}
pre {{ overflow-x: auto; background: #8881; padding: 1rem; border-radius: 6px }}
</style></head><body>
<h1>{title}</h1>
<div class="wide">{results}</div>
<h2>Curves</h2>
{curves}
<h2>Configuration</h2>
<pre>{config}</pre>
</body></html>
"""
