"""The host's side of the pipe: starts TFF's interpreter, asks it for cases, and ends it.

    with Worker(environment.ensure(), log_folder) as worker:
        worker.ask(case_folder)

TFF starts a `worker_binary` that outlives it and keeps its pipes open. Hence files for its output,
a process group of its own, deadlines, and the end of the whole group whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tff_reference.command import tail, variables
from tff_reference.worker import REPLY

ROOT = Path(__file__).parent.parent
PATIENCE = 3.0  # seconds that a process is given to end by itself
POLL = 0.02


class WorkerError(RuntimeError):
    """A case that was not run to its end."""


class CaseRefused(WorkerError):  # noqa: N818 (an answer, not a bug)
    """A case that TFF cannot express."""


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path


class Worker:
    """Runs cases in one long-lived process, started when asked and started again after a failure.

    Args:
      python: the interpreter of TFF's environment (`environment.ensure()`).
      log_folder: where each process that is started leaves its output.
      run: `module:function`, which serves a case, given its folder.
      start_deadline: seconds that the process may take until it can be asked (the import of TFF).
    """

    def __init__(
        self,
        python: Path,
        log_folder: Path,
        run: str = "tff_reference.case:run",
        start_deadline: float = 180.0,
    ):
        self._python = python
        self._log_folder = log_folder
        self._run = run
        self._start_deadline = start_deadline
        self._running: _Running | None = None

    def __enter__(self) -> Worker:
        """Nothing is started yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left."""
        self.close()

    def ask(self, folder: Path, deadline: float = 300.0) -> None:
        """Has the case in `folder` run; what it leaves there is between it and its caller.

        Raises:
          CaseRefused: TFF cannot express it; the process goes on to serve.
          WorkerError: it raised an exception (the process goes on to serve), or the process died or
            passed the deadline (nothing is left of it, and the next case starts another).
        """
        folder = folder.absolute()
        case = f"case {folder.name}"
        try:
            running = self._start(case)
            (folder / REPLY).unlink(missing_ok=True)
            assert running.process.stdin is not None
            with suppress(BrokenPipeError):  # it has just died, which _wait finds
                running.process.stdin.write(json.dumps({"folder": str(folder)}).encode() + b"\n")
            reply = _wait(running, folder, deadline, case)
        except BaseException:  # also an interrupt: the process is still busy with this case
            self.close()
            raise
        if reply["error"] is not None:
            kind = CaseRefused if reply["refused"] else WorkerError
            raise kind(_message(case, reply["error"], running.log))

    def close(self) -> None:
        """Ends the process and all that it has started."""
        if self._running is None:
            return
        process, self._running = self._running.process, None
        assert process.stdin is not None
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        with suppress(ProcessLookupError):  # also if it is dead: its children need not be
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _start(self, case: str) -> _Running:
        if self._running is not None:
            if self._running.process.poll() is None:
                return self._running
            self.close()  # it died between two cases, and what it had started may live
        self._log_folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(
                prefix="worker-", suffix=".log", dir=self._log_folder, delete=False
            ) as log,
            tempfile.TemporaryDirectory() as ready,
        ):
            command = [self._python, "-u", "-X", "faulthandler", "-m", "tff_reference.worker"]
            self._running = _Running(
                subprocess.Popen(
                    [*command, ready, "--run", self._run], bufsize=0, stdin=subprocess.PIPE,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
                    env={**variables(), "PYTHONPATH": str(ROOT)},
                ),
                Path(log.name),
            )  # fmt: skip
            _wait(self._running, Path(ready), self._start_deadline, f"{case}, before it was begun")
        return self._running


def _wait(running: _Running, folder: Path, deadline: float, case: str) -> dict:
    """The reply in `folder`, once it is there."""
    process, log = running
    end = time.monotonic() + deadline
    while True:
        code = process.poll()  # before the look for the reply: it may reply and die
        if (folder / REPLY).exists():
            reply = json.loads((folder / REPLY).read_text())
            (folder / REPLY).unlink()
            return reply
        if code is not None:
            raise WorkerError(_message(case, _death(code), log))
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGTERM)  # it then logs where it was
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            what = f"the worker was ended, not done after {deadline:g} s; give it more time"
            raise WorkerError(_message(case, what, log))
        time.sleep(POLL)


def _death(code: int) -> str:
    if code >= 0:
        return f"the worker ended by itself with exit code {code}"
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        name += ", as the system does when memory runs out: make the case smaller or free some"
    return f"the worker was killed by {name}"


def _message(case: str, what: str, log: Path) -> str:
    return f"{case}: {what}\nthe end of {log}:\n{tail(log)}"
