"""Optimizers four times: jaxfed's, TFF's, Keras' and optax's default of that name.

`python -m parity_tests.optimizer_table` prints the table, from a trace of TFF and Keras that is
kept beside this file; with `--record` that trace is made anew, in TFF's environment.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.optimizers import OPTIMIZERS, optimizer
from tff_reference import environment
from tff_reference.process import Worker

RECORDED = Path(__file__).parent / "recorded" / "optimizers.npz"

LR, MOMENTUM, STEPS = 0.1, 0.8, 5
# Written out: the last bit of a power is not the same on every processor.
SIZES = np.array([1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 0.0])

OPTAX: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(LR),
    "momentum": lambda: optax.sgd(LR, MOMENTUM),
    "nesterov": lambda: optax.sgd(LR, MOMENTUM, nesterov=True),
    "adam": lambda: optax.adam(LR),
    "adamw": lambda: optax.adamw(LR),
    "adagrad": lambda: optax.adagrad(LR),
    "rmsprop": lambda: optax.rmsprop(LR),
    "yogi": lambda: optax.yogi(LR),
}

WHY = {
    "nesterov": "TFF has none.",
    "adam": "optax adds an epsilon of 1e-8 to the corrected root of the second moment, TFF and "
    "Keras one of 1e-7 to the uncorrected one.",
    "adamw": "As adam; and optax decays weights by 1e-4, TFF and Keras by 4e-3.",
    "rmsprop": "TFF adds its epsilon of 1e-7 to the root; Keras has the same inside the root, "
    "optax one of 1e-8 inside the root.",
    "yogi": "TFF computes the step size, and 1 - beta, in float32. optax starts the first moment "
    "at 1e-6, not at 0, and corrects the second, which starts at 1e-6, too. Keras has none.",
}


def inputs() -> dict[str, np.ndarray]:
    """Weights and five gradients of every size, for `tff_reference.optimizer_table`.

    `from_zero` starts at 0, so that rounding does not hide the small steps; each weight has
    gradients of one of `SIZES`. `mixed` has every size after every other. The third gradient is
    zero everywhere.
    """
    rng = np.random.default_rng(0)
    sizes = SIZES * np.resize([1, -1], 12)
    mixed = SIZES[rng.integers(-8, 3, (STEPS, 3, 4)) + 8] * rng.choice([-1, 1], (STEPS, 3, 4))
    gradients = {
        "from_zero": sizes * rng.uniform(0.5, 1.5, (STEPS, 12)),
        "mixed": mixed * rng.uniform(0.5, 1.5, (STEPS, 3, 4)),
    }
    for gradient in gradients.values():
        gradient[2] = 0.0
    return {
        "lr": np.asarray(LR),
        "momentum": np.asarray(MOMENTUM),
        "weights/from_zero": np.zeros(12),
        "weights/mixed": rng.normal(size=(3, 4)),
        **{f"gradients/{leaf}": gradient for leaf, gradient in gradients.items()},
    }


def path(tx: optax.GradientTransformation) -> dict[str, np.ndarray]:
    """The weights after each step [steps, ...], in float64."""
    given = inputs()
    leaves = ("from_zero", "mixed")
    with jax.enable_x64(True):
        weights = {leaf: jnp.asarray(given[f"weights/{leaf}"]) for leaf in leaves}
        state, after = tx.init(weights), []
        for step in range(STEPS):
            gradient = {leaf: jnp.asarray(given[f"gradients/{leaf}"][step]) for leaf in leaves}
            updates, state = tx.update(gradient, state, weights)
            weights = optax.apply_updates(weights, updates)
            after.append(jax.tree.map(np.asarray, weights))
    return {leaf: np.stack([weights[leaf] for weights in after]) for leaf in leaves}


def worst_error(path: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest relative difference of one weight after one step."""

    def of(a: np.ndarray, b: np.ndarray) -> float:
        size = np.maximum(np.abs(a), np.abs(b))
        return float(np.max(np.abs(a - b) / np.where(size > 0, size, 1)))

    return max(of(path[leaf], expected[leaf]) for leaf in expected)


class Row(NamedTuple):
    """Worst relative errors of one optimizer; None where one side does not have it."""

    name: str
    jaxfed_tff: float | None
    jaxfed_keras: float | None
    optax_tff: float | None
    optax_tff_at_one: float | None
    """The same for gradients near 1 alone."""
    why: str


def rows(trace: dict[str, np.ndarray]) -> list[Row]:
    """The table, given what `tff_reference.optimizer_table` wrote."""

    def row(name: str) -> Row:
        momentum = MOMENTUM if OPTIMIZERS[name].defaults.get("momentum") else None
        ours, plain = path(optimizer(name, LR, momentum)), path(OPTAX[name]())
        tff, keras = (under(trace, f"{library}/{name}/") for library in ("tff", "keras"))
        return Row(
            name,
            jaxfed_tff=worst_error(ours, tff) if tff else None,
            jaxfed_keras=worst_error(ours, keras) if keras else None,
            optax_tff=worst_error(plain, tff) if tff else None,
            optax_tff_at_one=worst_error(at_one(plain), at_one(tff)) if tff else None,
            why=WHY.get(name, ""),
        )

    return [row(name) for name in OPTAX]


def under(trace: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): a for key, a in trace.items() if key.startswith(prefix)}


def at_one(path: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weight that had gradients near 1."""
    return {leaf: path[leaf][:, SIZES == 1] for leaf in path if leaf == "from_zero"}


def markdown(table: list[Row]) -> str:
    """The rows as a Markdown table."""

    def cell(error: float | None) -> str:
        return "" if error is None else f"{error:.0e}" if error else "0"

    head = (
        "optimizer",
        "jaxfed - TFF",
        "jaxfed - Keras",
        "optax - TFF",
        "at gradients of 1",
        "why",
    )
    lines = [head, ["---"] * len(head)]
    lines += [[row.name, *map(cell, row[1:-1]), row.why] for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(worker: Worker, folder: Path) -> dict[str, np.ndarray]:
    """TFF's and Keras' trace; `worker` has to serve `tff_reference.optimizer_table:run`."""
    np.savez(folder / "inputs.npz", **inputs())  # pyright: ignore[reportArgumentType]
    worker.ask(folder)
    with np.load(folder / "trace.npz") as file:
        return dict(file)


def recorded() -> dict[str, np.ndarray]:
    """The trace that is kept beside this file.

    Raises:
      ValueError: if it was made from other inputs.
    """
    with np.load(RECORDED) as file:
        trace = dict(file)
    if not all(np.array_equal(trace.pop(name, None), value) for name, value in inputs().items()):
        raise ValueError(
            f"{RECORDED.name}: got a trace of other inputs, expected one of `inputs()`; make it "
            "anew with python -m parity_tests.optimizer_table --record"
        )
    return trace


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="ask TFF and Keras again")
    if parser.parse_args(arguments).record:
        with tempfile.TemporaryDirectory() as scratch:
            folder, run = Path(scratch), "tff_reference.optimizer_table:run"
            with Worker(environment.ensure(), folder / "log", run) as worker:
                trace = measured(worker, folder)
        RECORDED.parent.mkdir(exist_ok=True)
        np.savez_compressed(RECORDED, **inputs(), **trace)  # pyright: ignore[reportArgumentType]
    sys.stdout.write(markdown(rows(recorded())) + "\n")


if __name__ == "__main__":
    main()
