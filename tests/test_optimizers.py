"""Optimizers by name against the update rules that TFF 0.87 documents, written out in numpy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.optimizers import OPTIMIZERS, optimizer

pytestmark = pytest.mark.usefixtures("x64")

RATE, MOMENTUM, STEPS = 0.1, 0.8, 5
TFF = [name for name in OPTIMIZERS if not name.startswith("fed")]


def reference(name, w, gradients):
    """The weights after each gradient."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    v += {"adagrad": 0.1, "yogi": 1e-6}.get(name, 0.0)
    path = []
    for t, g in enumerate(gradients, start=1):
        step = RATE * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        match name:
            case "sgd":
                w = w - RATE * g
            case "momentum" | "nesterov":
                m = MOMENTUM * m + g
                w = w - RATE * (m if name == "momentum" else MOMENTUM * m + g)
            case "adagrad":
                v = v + g**2
                w = w - RATE * g / np.sqrt(v + 1e-7)
            case "rmsprop":
                v = 0.9 * v + 0.1 * g**2
                w = w - RATE * g / (np.sqrt(v) + 1e-7)
            case "adam" | "adamw":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                decay = 0.004 * w if name == "adamw" else 0
                w = w - step * m / (np.sqrt(v) + 1e-7) - RATE * decay
            case "yogi":
                m = 0.9 * m + 0.1 * g
                v = v + 0.001 * np.sign(g**2 - v) * g**2
                w = w - step * m / (np.sqrt(v) + 1e-3)
        path.append(w)
    return path


@pytest.mark.parametrize("name", TFF)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_update_rule(name, scale):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=7), scale * rng.normal(size=(STEPS, 7))
    gradients[1] = 0.0
    tx = optimizer(name, RATE, MOMENTUM if name in ("momentum", "nesterov") else None)
    w = jnp.asarray(start)
    state = tx.init(w)
    for g, expected in zip(gradients, reference(name, start, gradients), strict=True):
        updates, state = tx.update(jnp.asarray(g), state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(np.asarray(w), expected, rtol=1e-12, atol=1e-12)


def test_rates_may_be_traced():
    import jax

    def after(lr):
        tx = optimizer("adam", lr)
        return jnp.asarray(tx.update(jnp.ones(3), tx.init(jnp.ones(3)))[0])

    np.testing.assert_allclose(jax.jit(after)(0.3), after(0.3), rtol=1e-14)
