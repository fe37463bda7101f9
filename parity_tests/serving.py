"""What the worker is asked to run in test_process.py: cases that go wrong, by the folder's name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tff_reference.worker import NotExpressible


def toy(folder: Path) -> None:
    """Does what the first word of the folder's name says; leaves its pid and its child's."""
    leave_pids(folder, subprocess.Popen(["sleep", "1000"]).pid)
    what = folder.name.split("-")[0]
    if what == "hang":
        print("going to hang", flush=True)
        time.sleep(1000)
    elif what == "exit":
        print("about to leave")
        os._exit(7)
    elif what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "raise":
        raise ValueError("three is not four")
    elif what == "refuse":
        raise NotExpressible("TFF has no such optimizer")
    elif what == "stdin":
        assert sys.stdin.read() == ""
        subprocess.run(["cat"], check=True, timeout=5)


def tff(folder: Path) -> None:
    """The smallest computation that makes TFF start its own worker."""
    import tensorflow as tf  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
    import tensorflow_federated as tff  # pyright: ignore[reportMissingImports]

    @tff.tensorflow.computation(tf.int32)
    def add_one(number):
        return number + 1

    assert add_one(41) == 42
    leave_pids(folder)
    if folder.name.startswith("hang"):
        time.sleep(1000)


def leave_pids(folder: Path, *children: int) -> None:
    """Its own first."""
    (folder / "part").write_text(" ".join(map(str, [os.getpid(), *children])))
    (folder / "part").replace(folder / "pids")
