"""Pages and pictures made from a run's folder: `report.html` and `curves.png`."""

from jaxfed.report.curves import Curves, curves_png
from jaxfed.report.of_run import run_page
from jaxfed.report.of_sweep import SweepPoint, sweep_page

__all__ = ["Curves", "SweepPoint", "curves_png", "run_page", "sweep_page"]
