"""The algorithms by name. A new one is a file in this folder and a row in `ALGORITHMS`."""

from jaxfed.algorithms.central import CENTRAL, central
from jaxfed.algorithms.fedavg import FEDAVG, FEDBN, FEDPROX, fedavg, fedbn, fedprox, local_training
from jaxfed.algorithms.fedsgd import FEDSGD, fedsgd
from jaxfed.config.spec import Spec

__all__ = [
    "ALGORITHMS", "central", "fedavg", "fedbn", "fedprox", "fedsgd", "local_training",
]  # fmt: skip

ALGORITHMS: dict[str, Spec] = {
    "fedavg": FEDAVG,
    "fedprox": FEDPROX,
    "fedsgd": FEDSGD,
    "fedbn": FEDBN,
    "central": CENTRAL,
}
