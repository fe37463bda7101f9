"""The interpreter of each peer, whose environment is made on first use."""

import sys
from pathlib import Path

from tff_reference.environment import TFF, Contents, ensure


def _of(name: str, module: str, gigabytes: float, complete: bool) -> Contents:
    return Contents(
        name=name,
        requirements=Path(__file__).with_name(f"{name}.txt"),
        module=module,
        free_bytes=int(1.5e9 * gigabytes),
        cost=f"a few minutes and {gigabytes} GB, once",
        variable=None,
        complete=complete,
    )


ENVIRONMENTS = {
    "tff": TFF,
    "fedjax": _of("fedjax", "fedjax", 0.7, complete=True),
    "torch": _of("torch", "torch", 1.0, complete=False),
    "flower": _of("flower", "flwr", 1.4, complete=False),
    "pfl": _of("pfl", "pfl", 1.1, complete=False),
}


def python_of(peer: str) -> Path:
    """The interpreter for `peer`; jaxfed's is this one.

    Raises:
      NoPython, RuntimeError: as `tff_reference.environment.ensure`.
    """
    return Path(sys.executable) if peer == "jaxfed" else ensure(ENVIRONMENTS[peer])
