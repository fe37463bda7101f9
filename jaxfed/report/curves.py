"""`curves.png`: loss and score over rounds, for slides."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

Curves = Mapping[str, Sequence[dict[str, Any]]]
"""A history for each label."""


def curves_png(curves: Curves, score: str = "accuracy") -> bytes:
    """Loss and score over rounds: training as dashed lines, tests as lines with markers."""
    # Half a second that only a run which writes files has to wait.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = list(dict.fromkeys(("loss", score)))
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
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
        panel.set_ylabel(("test " if len(curves) > 1 else "") + kind.replace("_", " "))
        panel.grid(alpha=0.3)
    if len(curves) <= 12:
        panels[0].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
