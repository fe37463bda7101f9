"""What every results file says of how it came about."""

import datetime
import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("jaxfed", "jax", "jaxlib", "flax", "optax", "numpy")


def stamp(command: str) -> dict[str, Any]:
    """Command, date, processor, cores and versions."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in NAMES},
        },
    }


def processor() -> str:
    """What the system calls the processor, with the widest vectors that it has."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        found = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in text.splitlines())
        }
        widest = next((n for n in ("avx512f", "avx2", "avx") if n in found.get("flags", "")), "")
        return f"{found.get('model name', platform.machine())} {widest}".strip()
    return platform.processor() or platform.machine()
