"""The precision of an experiment."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxfed.config import Experiment


def compute_dtype(experiment: Experiment) -> Any:
    """The dtype of inputs and activations."""
    return jnp.dtype(experiment.dtype)


def precision(experiment: Experiment) -> contextlib.AbstractContextManager[Any]:
    """Turns 64-bit arithmetic on for a float64 experiment, and only for it."""
    return jax.enable_x64(experiment.dtype == "float64")
