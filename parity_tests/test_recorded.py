"""The ladder without TFF, on recorded traces; and what a planted fault does to it."""

import functools
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed.core.federated
import jaxfed.models.layers
import jaxfed.optimizers
from jaxfed.config import numbers, override
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
    right = jaxfed.core.federated.collect

    @functools.wraps(right)
    def wrong(client, federation, *rest):
        return right(client, federation._replace(weighting="uniform"), *rest)

    patch.setattr(jaxfed.core.federated, "collect", wrong)


def wrong_epsilon_of_adam(patch):
    """Optax' default instead of TFF's and Keras'."""

    right = jaxfed.optimizers.OPTIMIZERS["adam"]
    wrong = right._replace(defaults={**right.defaults, "epsilon": 1e-8})
    patch.setitem(jaxfed.optimizers.OPTIMIZERS, "adam", wrong)


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
    # The package has a function of the module's name.
    fedavg = importlib.import_module("jaxfed.algorithms.fedavg")
    right = fedavg.local_steps

    def wrong(gradient, optimizer, start, work, state=None):
        full = (work.rows >= 0).all(-1)
        rows = jnp.where((full | ~full.any())[:, None], work.rows, PADDING)
        return right(gradient, optimizer, start, work._replace(rows=rows), state)

    patch.setattr(fedavg, "local_steps", wrong)


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
    patch.setattr(ladder, "_numbers", numbers)


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
