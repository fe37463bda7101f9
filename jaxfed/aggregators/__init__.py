"""The aggregators by name. A new one is a file in this folder and a row in `AGGREGATORS`."""

from jaxfed.aggregators.mean import mean
from jaxfed.config.spec import Spec

__all__ = ["AGGREGATORS", "mean"]

AGGREGATORS: dict[str, Spec] = {
    "mean": Spec(lambda _: mean(), summary="weighted mean", source="McMahan et al. 2017"),
}
