"""Commands outside this process: their variables, their output in a file, their end."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def variables() -> dict[str, str]:
    """The environment variables for TFF's interpreter: those meant for the host's are left out.

    Its old XLA aborts on flags it does not know, and its warnings are not the host's.
    """
    ours = ("PYTHON", "JAX_", "XLA_", "TF_", "KERAS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # TFF talks to its own worker_binary by gRPC, which would ask a proxy even for localhost.
    mine = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "", "no_grpc_proxy": "localhost"}
    return {**kept, **mine}


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def run(what: str, command: list[str], log: Path, deadline: float) -> str:
    """Runs a command to its end, its output into `log`; says how it failed, empty if it did not.

    In its own process group, of which nothing is left: TFF starts processes that outlive it.
    """
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=variables(), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return f"{what}: {error}"
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            return f"{what}: not done after {deadline:g} s\n{tail(log)}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{what}: exit code {code}\n{tail(log)}" if code else ""
