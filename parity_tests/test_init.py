"""`--init FILE.h5`: weights that Keras wrote, in jaxfed's networks."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import ConfigError, Dataset, Experiment, ModelConfig, prepare
from jaxfed.program import initial_state

WRITE = """
import sys
import numpy as np
import tensorflow as tf

folder, name, alpha, top = sys.argv[1:]
tf.keras.utils.set_random_seed(0)
made = getattr(tf.keras.applications, name)
given = {} if name != "MobileNetV3Small" else {"minimalistic": False}
model = made(input_shape=(32, 32, 3), alpha=float(alpha), weights=None, classes=10,
             include_top=top == "top", classifier_activation=None, **given) if top == "top" else \
    made(input_shape=(32, 32, 3), alpha=float(alpha), weights=None, include_top=False, **given)
rng = np.random.default_rng(0)
for layer in model.layers:  # moving statistics too, which are 0 and 1 in a new network
    layer.set_weights([w + 0.05 * rng.uniform(size=w.shape) for w in layer.get_weights()])
model.save_weights(f"{folder}/weights.h5")
images = np.load(f"{folder}/images.npy").astype("float32")
x = images if "V3" in name else images / 127.5 - 1  # V3 scales by itself
np.save(f"{folder}/outputs.npy", model.predict(x, verbose=0).reshape(len(x), -1))
"""
NAMES = {"mobilenet-v1": "MobileNet", "mobilenet-v2": "MobileNetV2",
         "mobilenet-v3-small": "MobileNetV3Small"}  # fmt: skip


@pytest.fixture(scope="module")
def written(tff_python, tmp_path_factory):
    """Makes the files of one network; returns their folder, the images and Keras' outputs."""

    def write(name, top):
        folder = tmp_path_factory.mktemp("keras")
        images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        np.save(folder / "images.npy", images)
        alpha = "1.0" if "v3" in name else "0.25" if "v1" in name else "0.35"
        subprocess.run(
            [tff_python, "-c", WRITE, str(folder), NAMES[name], alpha, "top" if top else "body"],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        return folder, images, np.load(folder / "outputs.npy"), float(alpha)

    return write


def dataset(images):
    labels = np.arange(len(images), dtype=np.int32)
    return Dataset("few", images, labels, images, labels, 10)


def experiment(name, width, folder):
    return Experiment(
        init=str(folder / "weights.h5"), model=ModelConfig(name=name, width=width),
        clients_per_round=1,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_kerass_weights_gives_kerass_outputs(name, written):
    folder, images, expected, width = written(name, top=True)
    from jaxfed.config import override

    task = prepare(
        override(experiment(name, width, folder), {"data.num_clients": 2}),
        dataset=dataset(images),
    )
    assert task.experiment.model.input_range == "-1..1"
    assert task.start is not None
    assert "at random" not in task.start.note
    variables = initial_state(task, jax.random.key(0)).variables
    assert task.model is not None
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    logits, _ = task.model.apply(variables, x, jnp.ones(4, bool), False, jax.random.key(0))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    again = initial_state(task, jax.random.key(1)).variables
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, again, variables)))


@pytest.mark.slow
def test_a_last_layer_that_the_file_lacks_starts_at_random(written):
    from jaxfed.config import override

    folder, images, _, width = written("mobilenet-v1", top=False)
    given = override(experiment("mobilenet-v1", width, folder), {"data.num_clients": 2})
    task = prepare(given, dataset=dataset(images))
    assert task.start is not None
    assert "at random: params/conv_preds/bias, params/conv_preds/kernel" in task.start.note
    with pytest.raises(ConfigError, match="holds another network"):
        prepare(override(given, {"model.width": 0.5}), dataset=dataset(images))
    grey = dataset(images[..., :1])
    with pytest.raises(ConfigError, match=r"params/conv1/kernel: got \[3, 3, 3, 8\]"):
        prepare(given, dataset=grey)


def test_a_file_that_is_not_kerass_is_refused(tmp_path):
    path = tmp_path / "weights.h5"
    path.write_bytes(b"no HDF5 at all")
    with pytest.raises(ConfigError, match="which is no HDF5 file"):
        prepare(Experiment(init=str(path)))
