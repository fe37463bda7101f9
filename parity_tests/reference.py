"""The reference's trace of a case: from TFF, or from the recorded ones."""

import tempfile
from pathlib import Path

import numpy as np

from parity_tests.case import Case, digest, write
from tff_reference.process import Worker

TRACES = Path(__file__).parent / "recorded"


class StaleTraceError(RuntimeError):
    """A recorded trace whose inputs are no longer those of its case."""


def live(
    case: Case, worker: Worker, name: str, deadline: float = 600.0, *,
    forward_only: bool = False, nested: bool = False, eval_every: int = 1,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Has TFF compute the trace; `name` is what errors call the case; the rest as in `write`."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "".join(c if c.isalnum() else "-" for c in name)
        write(case, folder, forward_only=forward_only, nested=nested, eval_every=eval_every)
        worker.ask(folder, deadline)
        with np.load(folder / "trace.npz") as file:
            return dict(file)


def path_of(name: str) -> Path:
    """Where the trace of a suite entry is kept."""
    return TRACES / f"{name.replace(', ', '_').replace(' ', '_')}.npz"


def record(case: Case, trace: dict[str, np.ndarray], name: str) -> None:
    """Keeps a trace, stamped with the hash of its case's inputs."""
    TRACES.mkdir(exist_ok=True)
    stamped = {"digest": np.asarray(digest(case)), **trace}
    np.savez_compressed(path_of(name), **stamped)  # pyright: ignore[reportArgumentType]


def recorded(case: Case, name: str) -> dict[str, np.ndarray]:
    """A kept trace.

    Raises:
      StaleTraceError: if the case's inputs are not those that it was recorded with.
    """
    with np.load(path_of(name)) as file:
        trace = dict(file)
    was, now = str(trace.pop("digest")), digest(case)
    if was != now:
        raise StaleTraceError(
            f"{path_of(name).name}: recorded for inputs {was[:12]}, but the case {name!r} now has "
            f"{now[:12]}; if the change is meant, run python -m parity_tests.record"
        )
    return trace
