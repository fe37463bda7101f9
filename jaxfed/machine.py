"""What a command asks of JAX before its first device: every core, and its compiled programs kept.

They are settings of a whole process. `python -m jaxfed.train` makes them; a library does not, so
who imports jaxfed and wants them calls `use_all_cores()` first of all and works `with
kept_programs()`.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxfed.data import cache

MAX_CPU_DEVICES = 8
"""Each holds a copy of the data."""
PATIENCE = (
    "--xla_cpu_collective_call_terminate_timeout_seconds=1000000"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=1000000"
)
"""XLA ends a process in which one device waits 40 s for another. Clients may differ by more."""


def use_all_cores() -> None:
    """Makes every CPU core (up to 8) a device of its own, to train clients side by side.

    One client's layers are too small to keep several cores busy. Has no effect where there is a
    GPU or TPU, which is used instead, or once JAX has been used; `JAX_NUM_CPU_DEVICES`, or the
    number of devices in `XLA_FLAGS`, has its way.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in flags:
        return
    cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                else os.cpu_count() or 1, MAX_CPU_DEVICES)  # fmt: skip
    with suppress(RuntimeError):  # JAX has been used before
        jax.config.update("jax_num_cpu_devices", cores)
        if PATIENCE not in flags:  # kept programs are known by these flags: once, however often
            os.environ["XLA_FLAGS"] = f"{flags} {PATIENCE}".strip()


@contextmanager
def kept_programs() -> Iterator[None]:
    """Keeps compiled programs in `JAXFED_CACHE_DIR`, for the next process that needs the same.

    A process that was killed may have left half a program. That is compiled again, and all are
    dropped at the end, since JAX would never write it anew. `JAX_COMPILATION_CACHE_DIR` has its
    way, and so has the setting of JAX that it stands for.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        yield
        return
    folder, show, broken = cache.root() / "programs", warnings.showwarning, []
    _keep(str(folder), 0.0)

    def shown(message: Any, *where: Any) -> None:
        if "persistent compilation cache entry" in str(message):
            broken.append(message)
        else:
            show(message, *where)

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = show
        _keep(None, 1.0)
        if broken:
            shutil.rmtree(folder, ignore_errors=True)


def _keep(folder: str | None, seconds: float) -> None:
    """Programs that took so many seconds to compile are kept in a folder from now on."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()  # the folder is looked at once
