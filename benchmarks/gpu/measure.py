"""What the sections share: cases, timing, precisions, counts, and synthetic images."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.problem import cross_entropy
from jaxfed.data import Dataset
from jaxfed.precision import compute_dtype
from jaxfed.prepare import Task

Row = dict[str, Any]
"""One line of a table, as it stands in the JSON file."""

Found = dict[str, list[Row]]
"""The rows of the sections so far."""


class Case(NamedTuple):
    """Something to measure that may fail without harm to the rest."""

    label: Row
    measure: Callable[[], list[Row]]


class Precision(NamedTuple):
    """How float32 products are rounded, and what type the arrays have."""

    matmul: str
    """What `jax.default_matmul_precision` takes."""
    dtype: Any


PRECISIONS = {
    "float32": Precision("float32", jnp.float32),
    "tf32": Precision("tensorfloat32", jnp.float32),
    "bfloat16": Precision("default", jnp.bfloat16),
    "default": Precision("default", jnp.float32),
}


def one_line(error: Exception) -> str:
    """The error's type and the beginning of its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def median_seconds(call: Callable[[], Any], most: int = 7, budget: float = 1.0) -> float:
    """Median duration of `call`, run once for nothing and then 2 to `most` times.

    Args:
      call: returns arrays, which are waited for.
      most: runs.
      budget: seconds after which two runs have to do.
    """
    jax.block_until_ready(call())
    seconds = []
    while len(seconds) < 2 or (len(seconds) < most and sum(seconds) < budget):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def ceiling_of(found: Found, precision: str) -> float | None:
    """TFLOP/s of the matrix product in that precision, if it was measured."""
    for row in found.get("ceiling", []):
        if row.get("what") == f"matmul {precision}" and "tflops" in row:
            return row["tflops"]
    return None


def ratio(value: float, ceiling: float | None) -> float | None:
    """`value / ceiling` if there is one."""
    return None if ceiling is None else value / ceiling


def gap(arrays: Sequence[Any], others: Sequence[Any]) -> float:
    """Largest |a - b| / |b| over pairs of arrays, Euclidean norms."""

    def norm(x: Any) -> float:
        return float(np.linalg.norm(np.asarray(x, np.float64)))

    pairs = zip(arrays, others, strict=True)
    return max(norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / norm(b)
               for a, b in pairs)  # fmt: skip


def synthetic(side: int, channels: int, classes: int, train: int, test: int) -> Dataset:
    """Images of a random pattern a class, under noise: easy to learn, of any shape."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 96, (classes, side, side, channels), dtype=np.uint8)
    labels = rng.integers(0, classes, train + test, dtype=np.int32)
    images = rng.integers(0, 160, (train + test, side, side, channels), dtype=np.uint8)
    images += patterns[labels]
    return Dataset(
        "synthetic", images[:train], labels[:train], images[train:], labels[train:], classes
    )


def step_flops(task: Task) -> float | None:
    """Operations of one client's step on one full batch, as XLA counts the traced gradient."""
    batch, model = task.schedule.batch, task.model
    assert model is not None

    def loss(params: Any, variables: Any, images: Any, labels: Any) -> Any:
        mask = jnp.ones(batch, bool)
        given = variables._replace(params=params)
        logits, _ = model.apply(given, images, mask, True, jax.random.key(0))
        return cross_entropy(logits, labels).mean()

    variables = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct(
        (batch, *task.dataset.x_train.shape[1:]), compute_dtype(task.experiment)
    )
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    traced = jax.jit(jax.grad(loss)).lower(variables.params, variables, images, labels)
    try:
        # Of the traced program: in the compiled one, loops and library calls are not counted.
        analysis = traced.cost_analysis()
    except (NotImplementedError, RuntimeError):  # not every backend can
        return None
    return dict(analysis or {}).get("flops")
