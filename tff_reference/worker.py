"""TFF's side of the pipe: serves one case after another, because importing TFF takes 13 s.

A request is a line on stdin, `{"folder": "..."}`; its answer is the file REPLY in that folder. When
stdin ends, whoever asked is gone, and this process ends with all that it has started.
`tff_reference.process` is the other side.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

REPLY = "reply.json"


class NotExpressible(Exception):  # noqa: N818 (an answer, not a bug)
    """What a case asks for does not exist in TFF."""


def main() -> None:
    """Says that it is ready, then serves requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ready", type=Path, help="folder of the answer that says it is ready")
    parser.add_argument("--run", default="tff_reference.case:run", help="what serves a request")
    arguments = parser.parse_args()
    if os.getpgrp() != os.getpid():
        sys.exit(
            "tff_reference.worker: got a process group with others in it, expected one of its own, "
            "which it ends with itself; start it by tff_reference.process.Worker"
        )
    # A worker that hangs is asked to end by SIGTERM, and then says where it was.
    faulthandler.register(signal.SIGTERM, chain=True)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(_stdin(), requests), daemon=True).start()
    module, _, function = arguments.run.partition(":")
    run = getattr(importlib.import_module(module), function)
    _answer(arguments.ready, {"error": None})
    while True:
        folder = Path(json.loads(requests.get())["folder"])
        _answer(folder, _serve(run, folder))


def _stdin() -> BinaryIO:
    """The requests; those who look at stdin later, such as children, find it empty."""
    requests = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as empty:  # noqa: PTH123 (it is no path, but a device)
        os.dup2(empty.fileno(), 0)
    return requests


def _read(stdin: BinaryIO, requests: queue.SimpleQueue[str]) -> None:
    for line in stdin:
        requests.put(line.decode())
    # A thread sees the end in the middle of a case, too. TFF's worker_binary is in this group.
    os.killpg(0, signal.SIGKILL)


def _serve(run: Callable[[Path], None], folder: Path) -> dict[str, str | bool | None]:
    try:
        run(folder)
    except Exception as error:
        traceback.print_exc()
        refused = isinstance(error, NotExpressible)
        return {"error": f"{type(error).__name__}: {error}", "refused": refused}
    return {"error": None}


def _answer(folder: Path, reply: dict[str, str | bool | None]) -> None:
    part = folder / f"{REPLY}.part"
    part.write_text(json.dumps(reply))
    part.replace(folder / REPLY)  # whole or absent


if __name__ == "__main__":
    # By its name, so that the exception above is the same class for those who import it.
    importlib.import_module("tff_reference.worker").main()
