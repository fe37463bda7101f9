"""TFF's own Python environment: made once, on first use, then reused.

TFF pins packages that no current JAX can live with, so it gets an environment of its own, with
every package pinned (`requirements.txt`). `python -m tff_reference.environment` makes it and prints
the path of its interpreter; it needs nothing but the standard library.

A folder is finished when it holds the file FINISHED, which is written last. A folder without it is
half-made: the file LOCK in it says that it was made here, so it may be cleared and made again. One
that was made by someone else (`$JAXFED_TFF_ENV`) is checked and used, and never cleared.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tff_reference.command import run, tail

# The pinned packages have no files for other versions (some need 3.11), nor TFF for other systems.
PYTHON = "3.11"
SYSTEM = "linux-x86_64"
FINISHED = ".jaxfed-finished"
LOCK = ".jaxfed-lock"


class Contents(NamedTuple):
    """What an environment holds: pinned packages, the module that must import, space and time."""

    name: str
    requirements: Path
    module: str
    free_bytes: int
    cost: str
    variable: str | None = "JAXFED_TFF_ENV"
    """The environment variable that may name a folder for it."""
    complete: bool = True
    """False: packages may need others on some machines (a build for CUDA, its libraries)."""


TFF = Contents(
    name="tff",
    requirements=Path(__file__).with_name("requirements.txt"),
    module="tensorflow_federated",
    free_bytes=4_000_000_000,  # 2.6 GB installed, and the downloads
    cost="about 100 s and 2.6 GB, once",
)


class NoPython(RuntimeError):  # noqa: N818 (a reason to skip, not a bug)
    """No interpreter here can run TFF."""


def ensure(contents: Contents = TFF, pythons: Sequence[str] | None = None) -> Path:
    """The interpreter of a finished environment, which is made first if there is none.

    Args:
      contents: what the environment holds.
      pythons: the interpreters to make it with, best first; default: this one, then those on PATH.

    Raises:
      NoPython: an environment has to be made, and no interpreter is suitable.
      RuntimeError: it could not be made, or the one that `$JAXFED_TFF_ENV` names does not work.
    """
    wanted = hashlib.sha256(contents.requirements.read_bytes()).hexdigest()[:12]
    explicit = os.environ.get(contents.variable) if contents.variable else None
    name = f"{contents.name}-{wanted}-py{PYTHON}"
    folder = Path(explicit).expanduser().absolute() if explicit else _cache() / name
    if _finished(folder, wanted):
        return _interpreter(folder)
    if explicit and _foreign(folder):
        return _adopt(folder, contents, wanted)
    here = [sys.executable, *_on_path()] if pythons is None else pythons
    python = _suitable(here, contents.module)
    with _locked(folder):
        if not _finished(folder, wanted):  # another process may have made it meanwhile
            _make(folder, python, contents, wanted)
    return _interpreter(folder)


def _cache() -> Path:
    """The rule of `jaxfed.data.cache.root`, which this package must not import."""
    if explicit := os.environ.get("JAXFED_CACHE_DIR"):
        return Path(explicit).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "jaxfed"


def _interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def _finished(folder: Path, wanted: str) -> bool:
    with suppress(OSError):
        # exists() follows the link: the interpreter it was made with may be gone.
        return (folder / FINISHED).read_text() == wanted and _interpreter(folder).exists()
    return False


def _finish(folder: Path, wanted: str) -> None:
    part = folder / f"{FINISHED}.{os.getpid()}"
    part.write_text(wanted)
    part.replace(folder / FINISHED)


def _foreign(folder: Path) -> bool:
    if folder.is_dir():
        return not (folder / LOCK).exists() and any(folder.iterdir())
    return folder.exists()


def _adopt(folder: Path, contents: Contents, wanted: str) -> Path:
    """Uses an environment that was not made here, if it holds what it should."""
    remedy = f"make it so, or name an empty folder, or unset {contents.variable}"
    expected = f"expected an environment with the packages of {contents.requirements}"
    if not _interpreter(folder).exists():
        raise RuntimeError(
            f"{contents.variable}: got {folder}, which has no bin/python; {expected}: {remedy}"
        )
    _say(f"Checking {folder}, which was not made here ...")
    with tempfile.TemporaryDirectory() as scratch:
        if failure := _check(_interpreter(folder), contents, Path(scratch) / "check.log"):
            raise RuntimeError(
                f"{contents.variable}: got {folder}, {expected}: {remedy}\n{failure}"
            )
    with suppress(PermissionError):  # a folder shared read-only is checked every time
        _finish(folder, wanted)
    return _interpreter(folder)


def _suitable(pythons: Sequence[str], module: str = TFF.module) -> str:
    """The first interpreter that can run what is pinned and make environments."""
    probe = (
        "import ensurepip, sys, sysconfig, venv\n"
        "print('%d.%d' % sys.version_info[:2], sysconfig.get_platform())"
    )
    seen = []
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "probe.log"
        for python in pythons:
            failure = run("cannot run", [python, "-c", probe], log, deadline=30)
            said = tail(log, 1) or failure.strip()
            if not failure and said == f"{PYTHON} {SYSTEM}":
                return python
            seen.append(f"{python} ({said})")
    raise NoPython(
        f"{module}: got {', '.join(seen) or 'no Python at all'}; expected Python "
        f"{PYTHON} on {SYSTEM}, with venv and ensurepip; install one (Debian: python{PYTHON}-venv, "
        f"too) and put it on PATH as python{PYTHON}"
    )


def _on_path() -> Iterator[str]:
    """Every one on PATH; not the first alone, which may be the shim of an absent one."""
    for folder in os.get_exec_path():
        if found := shutil.which(f"python{PYTHON}", path=folder):
            yield found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"Another process is making {folder}: waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file unlocks it, and so does the end of this process


def _make(folder: Path, python: str, contents: Contents, wanted: str) -> None:
    for left in folder.iterdir():  # of a process that did not finish
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left.name != LOCK:
            left.unlink()
    free = shutil.disk_usage(folder).free
    if free < contents.free_bytes:
        raise RuntimeError(
            f"{folder}: got {free / 1e9:.1f} GB of free disk, expected "
            f"{contents.free_bytes / 1e9:.1f} GB; free some, or name a folder on another disk in "
            f"{f'{contents.variable} or ' if contents.variable else ''}JAXFED_CACHE_DIR"
        )
    _say(f"Making the environment {folder} ({contents.cost}) ...")
    begin = time.monotonic()
    log = folder / "make.log"
    install = ["-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    install += ["--no-deps"] if contents.complete else []
    made = _interpreter(folder)
    failure = (
        run("venv", [python, "-m", "venv", str(folder)], log, deadline=300)
        or run("pip", [str(made), *install, "-r", str(contents.requirements)], log, deadline=3600)
        or _check(made, contents, log)
    )
    if failure:
        raise RuntimeError(f"{folder}: the environment could not be made: {failure}")
    _finish(folder, wanted)
    _say(f"Made {folder} in {time.monotonic() - begin:.0f} s.")


def _check(python: Path, contents: Contents, log: Path) -> str:
    """What keeps `python` from serving as the reference; empty if nothing does.

    The packages must be the pinned ones: others may give other numbers.
    """
    lines = contents.requirements.read_text().split()
    pins = [line for line in lines if "==" in line and not line.startswith(("#", "-"))]
    script = (
        "import importlib, sys\n"
        "from importlib.metadata import version\n"
        "pins = [pin.split('==') for pin in sys.argv[2:]]\n"
        "got = {n: version(n).partition('+')[0] for n, _ in pins}\n"  # 2.13.0+cpu is 2.13.0
        "wrong = [(n, got[n], 'expected', v) for n, v in pins if got[n] != v]\n"
        "sys.exit(str(wrong)) if wrong else importlib.import_module(sys.argv[1])\n"
    )
    command = [str(python), "-c", script, contents.module, *pins]
    return run(f"import {contents.module}", command, log, deadline=300)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(ensure())
    except RuntimeError as error:
        sys.exit(str(error))
