"""The ladder without TFF, on recorded traces; and what a planted fault does to it."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed.algorithm
import jaxfed.client
import jaxfed.models.layers
import jaxfed.optimizers
from jaxfed.experiment import override
from jaxfed.plan import PADDING
from parity_tests import ladder
from parity_tests.case import make_case
from parity_tests.reference import StaleTraceError, path_of, recorded
from parity_tests.suite import SUITE, case_of

RECORDED = [name for name, entry in SUITE.items() if entry.recorded]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_jaxfed_equals_what_tff_did(name):
    case = case_of(name)
    rungs = list(ladder.climb(case, recorded(case, name)))
    assert len(rungs) > 10
    assert [rung for rung in rungs if not rung.holds or rung.chaotic] == []
    assert path_of(name).stat().st_size < 2**20


def test_a_stale_trace_is_refused():
    entry = SUITE["central"]
    for changes in ({"client.lr": 0.004}, {"seed": 4}, {"client.batch_size": 15}):
        case = make_case(override(entry.experiment, changes), test_examples=200, scramble=True)
        with pytest.raises(StaleTraceError, match=r"central.npz.*parity_tests.record"):
            recorded(case, "central")


# --- Planted faults -------------------------------------------------------------------------


def wrong_weighting(patch):
    """Clients count equally where they should count by examples."""
    right = jaxfed.algorithm.averaging

    @functools.wraps(right)
    def wrong(client, server, **options):
        return right(client, server, **{**options, "weighting": "uniform"})

    patch.setattr(jaxfed.algorithm, "averaging", wrong)


def wrong_epsilon_of_adam(patch):
    """Optax' default instead of TFF's and Keras'."""

    def direction():
        return jaxfed.optimizers._scale_by_moments(1e-8, 0.0, lambda g, v: v + 0.001 * (g * g - v))

    patch.setattr(jaxfed.optimizers, "_adam_direction", direction)


def wrong_epsilon_of_batch_norm(patch):
    """Flax' default instead of Keras'."""
    right = jaxfed.models.layers.BatchNorm

    def wrong(features, *, momentum, epsilon, dtype):
        del epsilon
        return right(features, momentum=momentum, epsilon=1e-5, dtype=dtype)

    patch.setattr(jaxfed.models.layers, "BatchNorm", wrong)


def unbiased_variance(patch):
    """Moving variances of n / (n - 1) times the batch's, as in Keras' fused float32 kernel."""
    right = jaxfed.models.layers.BatchNorm

    class Wrong(right):
        def __call__(self, x, mask=None):
            before = self.var[...]
            y = super().__call__(x, mask)
            if not self.use_running_average:
                count = x.size // x.shape[-1]
                self.var[...] = before + (self.var[...] - before) * count / (count - 1)
            return y

    patch.setattr(jaxfed.models.layers, "BatchNorm", Wrong)


def dropped_last_batch(patch):
    """A smaller last batch is left out where there are full ones, as `drop_remainder` does."""
    right = jaxfed.client.make_trainer

    def wrong(*arguments, **options):
        train = right(*arguments, **options)

        def full_only(start, opt_state, examples, index, key):
            full = (index >= 0).all(-1)
            kept = jnp.where((full | ~full.any())[:, None], index, PADDING)
            return train(start, opt_state, examples, kept, key)

        return full_only

    patch.setattr(jaxfed.client, "make_trainer", wrong)


def shifted_stride(patch):
    """Strided convolutions padded at the other end."""
    right = jaxfed.models.layers.patches_conv

    def wrong(x, kernel, strides, padding, **options):
        if tuple(strides) == (2, 2) and not isinstance(padding, str):
            padding = [(high, low) for low, high in padding]
        return right(x, kernel, strides, padding, **options)

    patch.setattr(jaxfed.models.layers, "patches_conv", wrong)


def fedprox_as_published(patch):
    """No fault of ours: TFF's proximal term has the other sign, and this is how it shows."""
    patch.setattr(ladder, "_knobs", ladder.knobs_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "name", "rung"),
    [
        (shifted_stride, "mobilenet-v1", "logits, inference"),
        (wrong_epsilon_of_batch_norm, "BatchNorm", "logits, inference"),
        (unbiased_variance, "BatchNorm", "moving statistics"),
        (wrong_epsilon_of_adam, "central", "steps, teacher-forced"),
        (dropped_last_batch, "cnn", "local update"),
        (wrong_weighting, "cnn", "weighted mean"),
        (fedprox_as_published, "cnn-mcmahan, FedProx", "local update"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_fault_shows_at_its_rung_and_not_before(fault, name, rung, monkeypatch):
    trace = recorded(case_of(name), name)
    fault(monkeypatch)
    reds = (found for found in ladder.climb(case_of(name), trace) if not found.holds)
    first = next(reds, None)
    assert first is not None, "no rung noticed"
    assert first.name == rung
    assert first.error > 100 * first.tolerance
    assert not first.chaotic
    assert np.isfinite(first.error)
