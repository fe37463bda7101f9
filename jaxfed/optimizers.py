r"""Optimizers by name, as optax transformations that equal TFF's.

| name | TFF 0.87 (`tff.learning.optimizers`) | optax's own default differs in |
|---|---|---|
| sgd, momentum | `build_sgdm` | nothing |
| nesterov | (Keras `SGD(nesterov=True)`) | nothing |
| adagrad | `build_adagrad`: `g / sqrt(s + 1e-7)`, s starts at 0.1 | nothing |
| rmsprop | `build_rmsprop`: decay 0.9, `g / (sqrt(s) + 1e-7)` | epsilon 1e-8 inside the root |
| adam, adamw | `build_adam`, `build_adamw`: epsilon 1e-7 beside the *uncorrected* root | epsilon 1e-8, beside the corrected root; weight decay 1e-4 instead of 4e-3 |
| yogi | `build_yogi`: epsilon 1e-3, first moment from 0, second from 1e-6, not corrected apart from the step size | first moment from 1e-6, second moment bias-corrected |
| fedadam, fedyogi, fedadagrad | none: Reddi et al. (2021), Algorithm 2, without bias correction, second moment from epsilon², epsilon (their tau) outside the root | |
"""  # noqa: E501

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.config.experiment import ClientConfig, ConfigError, ServerConfig
from jaxfed.core.local import Optimizer, OptimizerOfRound
from jaxfed.core.tree import Tree, matching, name_of

Scalar = float | jax.Array

DECAY = 0.99
"""Of the exponential schedule, per round, unless `lr_decay` is given."""


class MomentState(NamedTuple):
    """Step count and the moving averages of the gradient and of its square."""

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates


class Hyper(NamedTuple):
    """The numbers of an optimizer, floats or traced scalars; None where it has no such number."""

    lr: Scalar
    momentum: Any = None
    b1: Any = None
    b2: Any = None
    epsilon: Any = None
    weight_decay: Any = None


SecondMoment = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""`(g, v, b2) -> new v`."""


def _ema(g: jax.Array, v: jax.Array, b2: Any) -> jax.Array:
    return v + (1 - b2) * (g * g - v)


def _signed(g: jax.Array, v: jax.Array, b2: Any) -> jax.Array:
    return v + (1 - b2) * jnp.sign(g * g - v) * g * g


def _total(g: jax.Array, v: jax.Array, b2: Any) -> jax.Array:
    del b2
    return v + g * g


def _scale_by_moments(
    h: Hyper, initial_nu: Any, second_moment: SecondMoment, *, corrected: bool = True
) -> optax.GradientTransformation:
    r"""Adam's family, with epsilon beside the uncorrected root.

    $$u_t = c_t \frac{m_t}{\sqrt{v_t} + \epsilon}, \quad
      c_t = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}$$

    or $c_t = 1$ if not `corrected`, as Reddi et al. (2021) have it. With $c_t$ this is "epsilon
    hat" of Kingma & Ba (2015), end of section 2, as in TFF and Keras; `optax.scale_by_adam`
    implements their Algorithm 1, whose effective epsilon is smaller in the first steps.
    """
    b1, b2, epsilon = h.b1, h.b2, h.epsilon

    def init(params: optax.Params) -> MomentState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(lambda p: jnp.full_like(p, initial_nu), params)
        return MomentState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        updates: optax.Updates, state: MomentState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MomentState]:
        del params
        step = state.step + 1
        mu = jax.tree.map(lambda g, m: m + (1 - b1) * (g - m), updates, state.mu)
        nu = jax.tree.map(lambda g, v: second_moment(g, v, b2), updates, state.nu)

        def scaled(m: jax.Array, v: jax.Array) -> jax.Array:
            t = step.astype(m.dtype)
            correction = jnp.sqrt(1 - b2**t) / (1 - b1**t) if corrected else 1
            return correction * m / (jnp.sqrt(v) + epsilon)

        return jax.tree.map(scaled, mu, nu), MomentState(step, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _descend(direction: optax.GradientTransformation, h: Hyper) -> optax.GradientTransformation:
    return optax.chain(direction, optax.scale_by_learning_rate(h.lr))


def _sgd(h: Hyper, *, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.sgd(h.lr, momentum=h.momentum, nesterov=nesterov)


def _adam(h: Hyper) -> optax.GradientTransformation:
    return _descend(_scale_by_moments(h, 0.0, _ema), h)


def _adamw(h: Hyper) -> optax.GradientTransformation:
    direction = _scale_by_moments(h, 0.0, _ema)
    return _descend(optax.chain(direction, optax.add_decayed_weights(h.weight_decay)), h)


def _yogi(h: Hyper) -> optax.GradientTransformation:
    return _descend(_scale_by_moments(h, 1e-6, _signed), h)


def _adagrad(h: Hyper) -> optax.GradientTransformation:
    return optax.adagrad(h.lr, initial_accumulator_value=0.1, eps=h.epsilon)


def _rmsprop(h: Hyper) -> optax.GradientTransformation:
    return optax.rmsprop(h.lr, decay=h.b2, eps=h.epsilon, eps_in_sqrt=False)


def _reddi(h: Hyper, second_moment: SecondMoment) -> optax.GradientTransformation:
    return _descend(_scale_by_moments(h, h.epsilon**2, second_moment, corrected=False), h)


class OptimizerSpec(NamedTuple):
    """One row of `OPTIMIZERS`."""

    make: Callable[[Hyper], optax.GradientTransformation]
    defaults: Mapping[str, float | None]
    """The numbers that it has besides the learning rate, and their defaults."""
    summary: str
    client_lr: float
    server_lr: float
    """Default learning rates."""


ADAM = {"b1": 0.9, "b2": 0.999, "epsilon": 1e-7}
REDDI = {"b1": 0.9, "b2": 0.99, "epsilon": 1e-3}

OPTIMIZERS = {
    "sgd": OptimizerSpec(_sgd, {"momentum": None}, "gradient descent", 0.1, 1.0),
    "momentum": OptimizerSpec(_sgd, {"momentum": 0.9}, "with heavy-ball momentum", 0.1, 1.0),
    "nesterov": OptimizerSpec(
        lambda h: _sgd(h, nesterov=True), {"momentum": 0.9}, "with Nesterov's momentum", 0.1, 1.0
    ),
    "adam": OptimizerSpec(
        _adam, ADAM, "Adam (Kingma 2015), epsilon 1e-7 as in TFF and Keras", 0.001, 0.01
    ),
    "adamw": OptimizerSpec(
        _adamw, {**ADAM, "weight_decay": 0.004},
        "Adam with decoupled weight decay (Loshchilov 2019)", 0.001, 0.01,
    ),
    "adagrad": OptimizerSpec(
        _adagrad, {"epsilon": 1e-7}, "Adagrad (Duchi 2011), accumulator from 0.1", 0.01, 0.1
    ),
    "rmsprop": OptimizerSpec(
        _rmsprop, {"b2": 0.9, "epsilon": 1e-7}, "RMSprop, b2 is its decay", 0.001, 0.01
    ),
    "yogi": OptimizerSpec(_yogi, {**ADAM, "epsilon": 1e-3}, "Yogi (Zaheer 2018)", 0.01, 0.01),
    "fedadam": OptimizerSpec(
        lambda h: _reddi(h, _ema), REDDI, "FedAdam as published (Reddi 2021)", 0.001, 0.01
    ),
    "fedyogi": OptimizerSpec(
        lambda h: _reddi(h, _signed), REDDI, "FedYogi as published (Reddi 2021)", 0.001, 0.01
    ),
    "fedadagrad": OptimizerSpec(
        lambda h: _reddi(h, _total), {"b1": 0.0, "epsilon": 1e-3},
        "FedAdagrad as published (Reddi 2021)", 0.01, 0.1,
    ),
}  # fmt: skip
"""Every optimizer by name, for clients and for the server."""


def optimizer(
    name: str,
    lr: Scalar,
    momentum: Scalar | None = None,
    *,
    b1: Scalar | None = None,
    b2: Scalar | None = None,
    epsilon: Scalar | None = None,
    weight_decay: Scalar | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a row of `OPTIMIZERS`; every number may be traced.

    Args:
      name: one of `OPTIMIZERS`.
      lr: learning rate.
      momentum, b1, b2, epsilon: None for the optimizer's default.
      weight_decay: times the weights, added to the gradient (decoupled with `adamw`).

    Raises:
      ValueError: if the optimizer has no such number.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optimizer("sgd", 0.5)
      >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])))
      >>> updates.tolist()
      [-1.0]
    """
    given = {"momentum": momentum, "b1": b1, "b2": b2, "epsilon": epsilon}
    spec = OPTIMIZERS[name]
    for key, value in given.items():
        if value is not None and key not in spec.defaults:
            raise ValueError(f"optimizer {name}: got {key}, which it does not have; leave it out")
    filled = {
        key: default if given.get(key) is None else given[key]
        for key, default in spec.defaults.items()
        if key in given
    }
    if "weight_decay" in spec.defaults:
        decay = spec.defaults["weight_decay"] if weight_decay is None else weight_decay
        return spec.make(Hyper(lr, **filled, weight_decay=decay))
    made = spec.make(Hyper(lr, **filled))
    if weight_decay is None:
        return made
    return optax.chain(optax.add_decayed_weights(weight_decay), made)


# --- Of an experiment -----------------------------------------------------------------------


def client_optimizer(config: ClientConfig, rounds: int, frozen: str | None = None) -> Optimizer:
    """The local optimizer that an experiment describes, a function of the round if scheduled."""

    def at(factor: Scalar) -> optax.GradientTransformation:
        made = _configured(config, factor)
        if config.clip is not None:
            made = optax.chain(_clip(config.clip), made)
        return _freezing(made, frozen)

    if config.schedule in (None, "constant"):
        return at(1.0)
    return lambda round_: at(_factor(config, rounds, round_))


def server_optimizer(
    config: ServerConfig, rounds: int, frozen: str | None = None
) -> optax.GradientTransformation:
    """The server's optimizer that an experiment describes."""

    def at(factor: Scalar) -> optax.GradientTransformation:
        return _freezing(_configured(config, factor), frozen)

    if config.schedule in (None, "constant") and config.warmup is None:
        return at(1.0)

    def of_round(round_: jax.Array) -> optax.GradientTransformation:
        factor = _factor(config, rounds, round_)
        if config.warmup is not None:
            factor = factor * jnp.minimum(1.0, round_ / config.warmup)
        return at(factor)

    return by_round(of_round)


def by_round(of_round: OptimizerOfRound) -> optax.GradientTransformationExtraArgs:
    """A server optimizer that is another one every round, such as a schedule by round.

    `update` is called with the number of the round, from 1; the state goes on from one optimizer to
    the next, so all of them have the same structure.

    Example:
      >>> import jax.numpy as jnp
      >>> halving = by_round(lambda round_: optax.sgd(2.0 ** -round_))
      >>> halving.update(jnp.ones(1), halving.init(jnp.ones(1)), round=2)[0].tolist()
      [-0.25]
    """

    def update(updates: Any, state: Any, params: Any = None, *, round: Any, **others: Any) -> Any:  # noqa: A002
        made = optax.with_extra_args_support(of_round(round))
        return made.update(updates, state, params, **others)

    return optax.GradientTransformationExtraArgs(
        lambda params: of_round(jnp.ones((), int)).init(params),
        update,  # pyright: ignore[reportArgumentType]
    )


def _configured(
    config: ClientConfig | ServerConfig, factor: Scalar
) -> optax.GradientTransformation:
    lr = config.lr
    if lr is None:
        group = "client" if isinstance(config, ClientConfig) else "server"
        raise ConfigError(
            f"--{group}.lr: got none, since the algorithm does not declare it; list "
            f"'{group}.optimizer' and '{group}.lr' in Spec.uses"
        )
    lr = lr if isinstance(factor, float) and factor == 1.0 else factor * lr
    return optimizer(
        config.optimizer or "sgd", lr, config.momentum, b1=config.b1, b2=config.b2,
        epsilon=config.epsilon, weight_decay=config.weight_decay,
    )  # fmt: skip


def _factor(config: ClientConfig | ServerConfig, rounds: int, round_: jax.Array) -> Scalar:
    """Share of the learning rate in a round, counted from 1."""
    done = jnp.asarray(round_ - 1, float)
    if config.schedule == "exponential":
        return jnp.asarray(DECAY if config.lr_decay is None else config.lr_decay, float) ** done
    if config.schedule == "cosine":
        return (1 + jnp.cos(jnp.pi * done / rounds)) / 2
    return jnp.ones(())


def _clip(bound: Scalar) -> optax.GradientTransformation:
    def clipped(updates: Tree, _: Tree | None) -> Tree:
        # optax.clip_by_global_norm compares with a Python number; this one may be traced.
        size = optax.tree.norm(updates)
        factor = jnp.minimum(1.0, bound / jnp.where(size > 0, size, 1.0))
        return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), updates)

    return optax.stateless(clipped)


def _freezing(
    made: optax.GradientTransformation, frozen: str | None
) -> optax.GradientTransformation:
    """Leaves the parameters that match the patterns where they are."""
    if frozen is None:
        return made

    def stay(updates: Tree, _: Tree | None) -> Tree:
        names = matching(*frozen.split(","))(updates)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if name_of(path) in names else leaf, updates
        )

    return optax.chain(made, optax.stateless(stay))
