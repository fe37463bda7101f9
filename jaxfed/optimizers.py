r"""Optimizers by name, as optax transformations that equal TFF's.

| name | TFF 0.87 (`tff.learning.optimizers`) | optax's own default differs in |
|---|---|---|
| sgd, momentum | `build_sgdm` | nothing |
| nesterov | (Keras `SGD(nesterov=True)`) | nothing |
| adagrad | `build_adagrad`: `g / sqrt(s + 1e-7)`, s starts at 0.1 | nothing |
| rmsprop | `build_rmsprop`: decay 0.9, `g / (sqrt(s) + 1e-7)` | epsilon 1e-8 inside the root |
| adam, adamw | `build_adam`, `build_adamw`: epsilon 1e-7 beside the *uncorrected* root | epsilon 1e-8, beside the corrected root; weight decay 1e-4 instead of 4e-3 |
| yogi | `build_yogi`: epsilon 1e-3, first moment from 0, second from 1e-6, not corrected apart from the step size | first moment from 1e-6, second moment bias-corrected |
"""  # noqa: E501

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

Scalar = float | jax.Array


class MomentState(NamedTuple):
    """Step count and the moving averages of the gradient and of its square."""

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def _scale_by_moments(
    epsilon: float, initial_nu: float, second_moment: Callable[[jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    r"""Adam's family as TFF and Keras write it, with epsilon beside the uncorrected root.

    $$u_t = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t} + \epsilon}$$

    This is "epsilon hat" of Kingma & Ba (2015), end of section 2; `optax.scale_by_adam`
    implements their Algorithm 1, whose effective epsilon is smaller in the first steps.
    """
    beta1, beta2 = 0.9, 0.999

    def init(params: optax.Params) -> MomentState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(lambda p: jnp.full_like(p, initial_nu), params)
        return MomentState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        updates: optax.Updates, state: MomentState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MomentState]:
        del params
        step = state.step + 1
        mu = jax.tree.map(lambda g, m: m + (1 - beta1) * (g - m), updates, state.mu)
        nu = jax.tree.map(second_moment, updates, state.nu)

        def scaled(m: jax.Array, v: jax.Array) -> jax.Array:
            t = step.astype(m.dtype)
            correction = jnp.sqrt(1 - beta2**t) / (1 - beta1**t)
            return correction * m / (jnp.sqrt(v) + epsilon)

        return jax.tree.map(scaled, mu, nu), MomentState(step, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _adam_direction() -> optax.GradientTransformation:
    return _scale_by_moments(1e-7, 0.0, lambda g, v: v + (1 - 0.999) * (g * g - v))


def _yogi_direction() -> optax.GradientTransformation:
    return _scale_by_moments(1e-3, 1e-6, lambda g, v: v + (1 - 0.999) * jnp.sign(g * g - v) * g * g)


def optimizer(name: str, lr: Scalar, momentum: Scalar = 0.9) -> optax.GradientTransformation:
    """The optimizer that an experiment names; `lr` and `momentum` may be traced.

    Args:
      name: one of `OPTIMIZERS`.
      lr: learning rate.
      momentum: decay of the velocity; only `momentum` and `nesterov` use it.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optimizer("sgd", 0.5)
      >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])))
      >>> updates.tolist()
      [-1.0]
    """
    return OPTIMIZERS[name].make(lr, momentum)


class OptimizerSpec(NamedTuple):
    """One row of `OPTIMIZERS`."""

    make: Callable[[Scalar, Scalar], optax.GradientTransformation]
    """Of the learning rate and the momentum."""
    summary: str


OPTIMIZERS = {
    "sgd": OptimizerSpec(lambda lr, _: optax.sgd(lr), "gradient descent"),
    "momentum": OptimizerSpec(lambda lr, m: optax.sgd(lr, momentum=m), "with heavy-ball momentum"),
    "nesterov": OptimizerSpec(
        lambda lr, m: optax.sgd(lr, momentum=m, nesterov=True), "with Nesterov's momentum"
    ),
    "adam": OptimizerSpec(
        lambda lr, _: optax.chain(_adam_direction(), optax.scale_by_learning_rate(lr)),
        "Adam (Kingma 2015), epsilon 1e-7 as in TFF and Keras",
    ),
    "adamw": OptimizerSpec(
        lambda lr, _: optax.chain(
            _adam_direction(), optax.add_decayed_weights(0.004), optax.scale_by_learning_rate(lr)
        ),
        "Adam with decoupled weight decay 0.004 (Loshchilov 2019)",
    ),
    "adagrad": OptimizerSpec(
        lambda lr, _: optax.adagrad(lr, initial_accumulator_value=0.1, eps=1e-7),
        "Adagrad (Duchi 2011), accumulator from 0.1",
    ),
    "rmsprop": OptimizerSpec(
        lambda lr, _: optax.rmsprop(lr, decay=0.9, eps=1e-7, eps_in_sqrt=False),
        "RMSprop, decay 0.9",
    ),
    "yogi": OptimizerSpec(
        lambda lr, _: optax.chain(_yogi_direction(), optax.scale_by_learning_rate(lr)),
        "Yogi (Zaheer 2018)",
    ),
}
"""Every optimizer by name, for clients and for the server."""
