"""The study's two pictures: the waterfall of the gap, and the curves of one network."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DOWN, UP, TOTAL, GREY = "#c44e52", "#55a868", "#4c72b0", "#8c8c8c"


def waterfall(chains: Sequence[dict[str, Any]]) -> Figure:
    """A panel a chain: accuracy in plain Keras, what each change adds, accuracy in TFF."""
    figure = _figure(5.2, 0.62 * max(len(chain["stops"]) for chain in chains) + 1.0, len(chains))
    for panel, chain in zip(figure.axes, chains, strict=True):
        first, last = chain["stops"][0], chain["stops"][-1]
        labels, level = [first["label"]], first["accuracy"]["mean"]
        panel.barh(0, level, color=TOTAL)
        _mark(panel, 0, level, f"{level:.3f}")
        for place, link in enumerate(chain["links"], start=1):
            found = link["effect"]
            step = found["mean"]
            panel.barh(place, step, left=level, color=UP if step > 0 else DOWN)
            panel.plot(
                [level + found["low"], level + found["high"]], [place, place], color="black", lw=1
            )
            level += step
            _mark(panel, place, max(level, level - step, level - step + found["high"]),
                  f"{step:+.3f}")  # fmt: skip
            labels.append(link["label"])
        panel.barh(len(labels), last["accuracy"]["mean"], color=TOTAL)
        _mark(panel, len(labels), last["accuracy"]["mean"], f"{last['accuracy']['mean']:.3f}")
        labels.append("what TFF prints")
        panel.set_yticks(range(len(labels)), labels)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.15)
        panel.set_xlabel("test accuracy (lines: 95 % intervals)")
        panel.set_title(f"{chain['network']}, {_clients(chain['clients'])}", fontsize="medium")
        panel.grid(axis="x", alpha=0.3)
    return figure


def curves(panels: Sequence[tuple[str, dict[str, Any]]]) -> Figure:
    """Test accuracy over rounds, a line a rule: mean over seeds, and the range of the seeds."""
    figure = _figure(5.2, 3.6, len(panels))
    for panel, (title, lines) in zip(figure.axes, panels, strict=True):
        for label, curve in lines.items():
            (line,) = panel.plot(curve["rounds"], curve["mean"], marker="o", ms=3, label=label)
            panel.fill_between(
                curve["rounds"], curve["low"], curve["high"], color=line.get_color(), alpha=0.15
            )
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("round")
        panel.set_ylabel("test accuracy")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG; the same figure gives the same text."""
    buffer = io.StringIO()
    # Text as text: smaller, searchable, and read aloud.
    import matplotlib as mpl  # noqa: PLC0415

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxfed"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    text = buffer.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"


def _figure(width: float, height: float, panels: int) -> Figure:
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, panels)
    return figure


def _mark(panel: Any, place: int, right: float, text: str) -> None:
    panel.text(right + 0.01, place, text, va="center", fontsize="small")


def _clients(way: str) -> str:
    return "IID clients" if way == "IID" else "two-class shards"
