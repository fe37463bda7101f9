"""How far two frameworks may be apart, rung by rung, and why."""

from typing import NamedTuple

from jaxfed import Experiment

NOISE_FACTOR = 30.0
"""Where a result is ill-conditioned, it may be off by so many times what rounding the weights once
does to it: each framework rounds every intermediate result, not the weights alone."""

CHAOS = 1e-2
"""A tolerance above this compares nothing; the rung is reported as chaotic instead."""


class Limit(NamedTuple):
    """Largest relative error that counts as equal."""

    float64: float
    float32: float
    why: str


LIMITS: dict[str, Limit] = {
    "names": Limit(0, 0, "exact"),
    "logits, inference": Limit(1e-12, 1e-5, "sums in another order"),
    "logits, training": Limit(1e-10, 1e-5, "sums in another order; BatchNorm divides by a spread"),
    "loss": Limit(1e-12, 1e-5, "sums in another order"),
    "gradient": Limit(1e-10, 1e-4, "sums in another order"),
    "moving statistics": Limit(
        1e-11, 2e-3, "sums in another order; Keras' fused float32 kernel has n / (n - 1) variances"
    ),
    "steps, teacher-forced": Limit(1e-10, 2e-4, "as the gradient"),
    "local update": Limit(1e-10, 1e-5, "several steps multiply the rounding of the first"),
    "weighted mean": Limit(1e-12, 1e-5, "a sum over clients"),
    "server step": Limit(1e-11, 1e-5, "weights before minus weights after loses digits"),
    "one round": Limit(1e-10, 1e-5, "as the local update"),
    "rounds, teacher-forced": Limit(1e-10, 1e-5, "as one round"),
    "rounds, free-running": Limit(1e-9, 1e-4, "every round multiplies the rounding of the last"),
    "training metrics": Limit(1e-6, 1e-5, "Keras and TFF add metrics up in float32"),
    "evaluation": Limit(1e-6, 1e-5, "Keras and TFF add metrics up in float32"),
}


YOGI = 1e-4
"""TFF computes Yogi's step size in float32 whatever the weights are, and 1 - 0.999 is off by 2e-5
there; every rung that an update by Yogi passes through is."""

YOGI_CLIENT = ("steps, teacher-forced", "local update")
YOGI_ROUND = (
    "server step", "one round", "rounds, teacher-forced", "rounds, free-running",
    "training metrics",
)  # fmt: skip


def tolerance(rung: str, experiment: Experiment) -> float:
    """The limit of a rung in an experiment."""
    limit = LIMITS[rung]
    if experiment.dtype == "float32":
        return limit.float32
    client, server = (
        config.optimizer == "yogi" for config in (experiment.client, experiment.server)
    )
    if (client and rung in YOGI_CLIENT) or ((client or server) and rung in YOGI_ROUND):
        return max(limit.float64, YOGI)
    return limit.float64
