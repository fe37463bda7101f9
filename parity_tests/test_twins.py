"""Every network with every norm against its Keras twin, and dropout by its statistics."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import Experiment, from_nnx
from jaxfed.config import override
from jaxfed.models import MODELS, builder
from parity_tests.case import make_case, write
from parity_tests.ladder import climb
from parity_tests.reference import live
from tff_reference.process import Worker

# One process of TFF serves them all.
pytestmark = pytest.mark.xdist_group("twins")

NORMS = ("batch", "group", "layer", "none")
NETWORKS = [
    pair for pair in itertools.product(MODELS, NORMS) if pair[0] != "logistic" or pair[1] == "none"
]


@pytest.fixture(scope="module")
def worker(tff_python, tmp_path_factory):
    with Worker(tff_python, tmp_path_factory.mktemp("logs")) as worker:
        yield worker


def experiment(**changes):
    base = {
        "dtype": "float64", "rounds": 1, "client.batch_size": 5, "data.num_clients": 2,
        "data.examples_per_client": 10,
    }  # fmt: skip
    return override(Experiment(), {**base, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), NETWORKS)
def test_names_shapes_and_logits(name, norm, worker):
    width = {"model.width": 0.3} if name != "logistic" else {}
    # An odd side tells one padding from another.
    size = {"data.image_size": 33 if name.startswith("mobilenet") else 13}
    case = make_case(
        experiment(**{"model.name": name, "model.norm": norm}, **width, **size), scramble=True
    )
    nested = norm in ("batch", "layer")
    trace = live(case, worker, f"{name} {norm}", forward_only=True, nested=nested)
    rungs = list(itertools.islice(climb(case, trace), 3))
    assert [rung.name for rung in rungs] == ["names", "logits, inference", "logits, training"]
    assert [rung for rung in rungs if not rung.holds or rung.chaotic] == []


@pytest.mark.slow
def test_dropout_has_the_same_distribution(worker, tmp_path):
    """One image 4000 times: mean and spread of the logits over the random masks."""
    count = 4000
    case = make_case(experiment(**{"model.name": "cnn-dropout", "model.width": 0.2}), scramble=True)
    assert case.dropout
    image = np.repeat(np.asarray(case.train.inputs)[:1], count, axis=0)
    rows = np.arange(count, dtype=np.int32)[None, None]
    case = case._replace(
        train=case.train._replace(inputs=image, targets=np.zeros(count, np.int32)),
        plans=[case.plans[0]._replace(rows=rows)],
    )
    write(case, tmp_path, forward_only=True)
    described = json.loads((tmp_path / "case.json").read_text())
    described["network"]["dropout"] = True
    (tmp_path / "case.json").write_text(json.dumps(described))
    worker.ask(tmp_path)
    theirs = np.load(tmp_path / "trace.npz")["logits/training"]

    with jax.enable_x64(True):
        network = described["network"]
        build = builder(
            network["name"], tuple(network["input_shape"]), 10, width=0.2, dtype=jnp.float64
        )
        images = jnp.asarray(image, jnp.float64) / 255
        mask = jnp.ones(count, bool)
        ours, _ = from_nnx(build).apply(case.start, images, mask, True, jax.random.key(0))
        ours = np.asarray(ours)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4.5 * error).all()
    # The spread of a spread over 4000 draws is about 1.1 %.
    assert (np.abs(ours.std(0) / theirs.std(0) - 1) < 0.06).all()
    # And dropout is on: without it all rows would be the same.
    assert ours.std(0).min() > 0.01
