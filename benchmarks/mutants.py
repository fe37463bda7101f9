"""Plants faults in the engine, one at a time, and prints which law caught each.

    python -m benchmarks.mutants [NAME ...]

Every fault is a change of one place in a copy of the package; the quick tests named beside it are
run against the copy. Exit code 1 if a fault survives.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LAWS = "tests/test_laws.py"


class Mutant(NamedTuple):
    """A fault: in `file`, `old` becomes `new`."""

    file: str
    old: str
    new: str
    tests: str = LAWS
    """Where it has to be caught."""


MUTANTS = {
    "shuffling ignores the client": Mutant(
        "plan.py", "default_rng([schedule.seed, number, client])",
        "default_rng([schedule.seed, number])",
    ),
    "memory is written through an empty seat": Mutant(
        "core/federated.py", "seats = jnp.where(ids < 0, federation.num_clients, ids)",
        "seats = ids",
    ),
    "a padded step updates the weights": Mutant(
        "core/local.py", "return where(rows.max() >= 0, new, old), add(total, metrics)",
        "return where(rows.max() >= -1, new, old), add(total, metrics)",
    ),
    "the best accuracy is the last": Mutant(
        "run.py", "choose(tested, key=lambda row: row[f\"test_{score}\"], default={})",
        "tested[-1] if tested else {}", "tests/test_options.py -k best",
    ),
    "pooled sends variances instead of moments": Mutant(
        "core/batch_stats.py", "to_moments, lambda mean, _", "lambda stats: stats, lambda mean, _",
    ),
    "a client that is not finite counts": Mutant(
        "core/federated.py", "kept = finite & present", "kept = present"
    ),
    "uniform weights are weights by examples": Mutant(
        "core/federated.py", 'if federation.weighting == "examples"',
        'if federation.weighting != ""',
    ),
    "the proximal term has TFF's sign": Mutant(
        "core/local.py", "add(grad, scale(mu, subtract(params, start)))",
        "add(grad, scale(mu, subtract(start, params)))",
    ),
    "the server's state is not kept": Mutant(
        "core/federated.py", "State(variables, server_state), got)",
        "State(variables, state.server), got)",
    ),
    "the loss of a padded row counts": Mutant(
        "core/problem.py", "jnp.where(present, values, 0).sum()", "values.sum()"
    ),
    "kept layers are averaged too": Mutant(
        "core/personal.py", "zeros(mine))[\"params\"]", "{})[\"params\"]"
    ),
    "kept layers start anew every round": Mutant(
        "core/personal.py", "start = joined(sent.variables, mine)", "start = sent.variables"
    ),
    "a client that did not take part is seen": Mutant(
        "core/federated.py", "seen.at[seats].max(kept, mode=\"drop\")",
        "jnp.ones_like(seen)",
    ),
    "a mean is divided by the number of clients": Mutant(
        "aggregators/mean.py", "return (weight, scale(weight, message)), None",
        "return ((weight > 0).astype(weight.dtype), scale(weight, message)), None",
    ),
    "a full gradient weighs its batches equally": Mutant(
        "core/local.py", "scale(found[\"loss\"].count, grad)", "grad"
    ),
    "the optimizer of central training starts afresh": Mutant(
        "algorithms/central.py", "state.variables, work, state.server", "state.variables, work"
    ),
    "a learning rate is part of the program": Mutant(
        "prepare.py", "experiment = replaced(task.experiment, numbers)",
        "experiment = task.experiment", "tests/test_train.py -k sweep_rows",
    ),
    "what is gathered is not masked": Mutant(
        "core/federated.py", "where(kept, (message, stats), zeros((message, stats)))",
        "(message, stats)",
    ),
}  # fmt: skip


def caught(mutant: Mutant) -> str | None:
    """The first test that fails on the package with a fault in it; None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("jaxfed", "tests", "benchmarks", "parity_tests", "tff_reference"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        path = Path(folder) / "jaxfed" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.file}: expected {mutant.old!r} once; update the mutant")
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", *mutant.tests.split(), "-x", "-q", "-n", "0"]
        done = subprocess.run(
            [*command, "-m", "not slow", "-p", "no:cacheprovider"], cwd=folder, check=False,
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folder},
        )  # fmt: skip
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest: exit code {done.returncode}\n{done.stdout[-2000:]}")
        return failed[1] if failed else None


def main(names: list[str]) -> int:
    """Plants each fault and prints what caught it."""
    survivors = 0
    for name, mutant in MUTANTS.items():
        if names and name not in names:
            continue
        law = caught(mutant)
        survivors += law is None
        print(f"{name}: {law or 'SURVIVED'}", flush=True)
    print(f"{survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
