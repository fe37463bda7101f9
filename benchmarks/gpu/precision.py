"""What TF32 and bfloat16 do to the accuracy of the CNN, after the same rounds."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.gpu.measure import PRECISIONS, Case, Found, Row, synthetic
from jaxfed.config import ClientConfig, DataConfig, Experiment, ModelConfig
from jaxfed.data import Dataset, load
from jaxfed.prepare import prepare
from jaxfed.program import compile_tasks
from jaxfed.segments import segments


def cases(tiny: bool, _: Found) -> Iterator[Case]:
    names = ("float32", "bfloat16") if tiny else tuple(PRECISIONS)
    for name in names:
        yield Case({"precision": name}, partial(trained, name, tiny))


def digits(tiny: bool) -> Dataset:
    """Real digits if scikit-learn is there; a synthetic task, which is easier, otherwise."""
    if tiny:
        return synthetic(12, 1, 10, 40, 40)
    try:
        return load("digits")
    except ImportError:
        return synthetic(28, 1, 10, 1438, 359)


def trained(name: str, tiny: bool) -> list[Row]:
    """Test accuracy and loss of the last round."""
    precision = PRECISIONS[name]
    experiment = Experiment(
        rounds=2 if tiny else 30,
        eval_every=1 if tiny else 10,
        dtype="bfloat16" if precision.dtype == jnp.bfloat16 else "float32",
        data=DataConfig(num_clients=4 if tiny else 10, image_size=12 if tiny else 28),
        model=ModelConfig("cnn", width=0.1 if tiny else 1.0),
        client=ClientConfig(epochs=1 if tiny else 3, batch_size=20),
    )
    dataset = digits(tiny)
    with jax.default_matmul_precision(precision.matmul):
        program = compile_tasks([prepare(experiment, dataset=dataset)])
    found = list(segments(program))
    last = found[-1].rows[0][-1]
    spent = [segment.train_seconds for segment in found]
    return [
        {
            "dataset": dataset.name,
            "rounds": last["round"],
            "test_accuracy": last["test_accuracy"],
            "test_loss": last["test_loss"],
            "train_loss": last["train_loss"],
            "user_ms": 1e3 * min(spent) / program.length,
        }
    ]
