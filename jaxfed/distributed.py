"""Several processes that run one experiment: who writes, and how they stay together.

Every process computes; process 0 alone writes files and speaks. A process that goes its own way
(an error, a signal) would leave the others waiting in a collective operation, so whatever may go
wrong on one is agreed on by all, and what cannot be agreed on ends them all.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxfed.config import ConfigError

Result = TypeVar("Result")


class ElsewhereError(SystemExit):
    """Another process failed, and says why; this one ends as it does after bad input."""


def start(spec: str | None) -> None:
    """Connects this process with the others, before anything else asks JAX for a device.

    Args:
      spec: None for a single process; `auto` where JAX finds the others by itself (SLURM, TPU
        pods, Open MPI); otherwise HOST:PORT,PROCESSES,NUMBER, the address of process 0, how many
        there are, and which this is, from 0.

    Raises:
      ConfigError: if it is none of these, or there is nothing to be found.
    """
    if spec is None:
        return
    # A signal is for the round to notice, not for a service that nobody asks.
    jax.config.update("jax_enable_preemption_service", False)
    if spec == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ConfigError(
                f"--distributed: got auto, but JAX finds no other processes ({error}); give "
                "HOST:PORT,PROCESSES,NUMBER"
            ) from None
        return
    found = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", spec)
    if not found or int(found[3]) >= int(found[2]):
        raise ConfigError(
            f"--distributed: got {spec}, expected auto or HOST:PORT,PROCESSES,NUMBER with NUMBER "
            "from 0 to PROCESSES - 1, such as 10.0.0.1:1234,2,0"
        )
    jax.distributed.initialize(found[1], int(found[2]), int(found[3]))


def leads() -> bool:
    """True for the process that writes and speaks."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest value of all processes; every one of them has to ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def agreed(step: Callable[[], Result]) -> Result:
    """Does a step that may fail, on every process; if it fails on one, it fails on all.

    Raises:
      ElsewhereError: where it went well, or where a process before this one says why it did not.
    """
    if jax.process_count() == 1:
        return step()
    result, error = None, None
    try:
        result = step()
    except Exception as raised:  # whatever it is, the others must hear of it
        error = raised
    count = jax.process_count()
    mine = jax.process_index() if error else count
    first = count - largest(count - mine)
    if first == count:
        return result  # pyright: ignore[reportReturnType]
    jax.distributed.shutdown()
    if error and first == mine:
        raise error
    raise ElsewhereError(2)


def same(value: int, flag: str, what: str) -> None:
    """Refuses to go on where processes see different things.

    Raises:
      ConfigError: on process 0; ElsewhereError on the others.
    """

    def check() -> None:
        if leads() and highest != lowest:
            raise ConfigError(
                f"{flag}: got {what} {lowest} to {highest}, expected the same in all processes; "
                "name a folder that all of them share"
            )

    highest, lowest = largest(value), -largest(-value)
    agreed(check)


def leave(run: Callable[[], int]) -> NoReturn:
    """Ends the process with the code that `run` returns; at once, if others are connected still.

    They are where `run` ended without their agreement. Python's way out would wait for them, while
    they wait for this process in a collective operation. Without it they fail, and end too.
    """
    try:
        code = run()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def stop() -> None:
    """Parts from the others, when all are done."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
