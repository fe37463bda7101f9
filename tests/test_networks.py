"""The laws of the engine on the real networks, and runs in every precision and algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import assert_close, averaged, clients_of, naive_round, plan_of

from jaxfed import (
    ClientConfig,
    Cohort,
    DataConfig,
    Examples,
    Experiment,
    ModelConfig,
    ServerConfig,
    from_linen,
    from_nnx,
    run,
)
from jaxfed.core.problem import PIXELS
from jaxfed.models import MODELS, builder

SMALL = [name for name in MODELS if not name.startswith("mobilenet")]


def images(side, count=8):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, side, side, 1), dtype=np.uint8)
    return Examples(jnp.asarray(pixels), jnp.asarray(rng.integers(0, 10, count, dtype=np.int32)))


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        *((name, chunk) for name in SMALL for chunk in (None, 1)),
        pytest.param("mobilenet-v1", None, marks=pytest.mark.slow),
        pytest.param("mobilenet-v2", 1, marks=pytest.mark.slow),
        pytest.param("mobilenet-v3-small", None, marks=pytest.mark.slow),
    ],
)
def test_engine_equals_the_naive_loop_on_every_network(name, chunk, x64):
    """A padded row in every batch, and a padded step, pass through every layer of every network.

    MobileNetV3-large is the code of V3-small with another table.
    """
    large = name not in SMALL
    side = MODELS[name].min_image_size
    width = 0.25 if large else 0.5 if name != "logistic" else 1.0
    # On batches of three the gradient of a new MobileNet is in the hundreds: a small rate keeps
    # the second step from multiplying the rounding of the first.
    rate = 1e-6 if large else 1e-3
    build = builder(name, (side, side, 1), 10, width=width, dtype=jnp.float64)
    model, data = from_nnx(without_dropout(build)), images(side, 9)
    server, plan = optax.sgd(1.0), plan_of(clients_of(6, 3), batch_size=3)
    padded = plan._replace(rows=np.pad(plan.rows, ((0, 0), (0, 0), (0, 1)), constant_values=-1))
    algorithm = averaged(
        model, optax.sgd(rate), server, batch_stats="mean", chunk=chunk, pixels=PIXELS
    )
    start = jax.jit(model.init)(jax.random.key(0))
    state, _ = jax.jit(algorithm.round)(algorithm.init(start), Cohort(data, padded))

    def naive(plan):
        opt_state = server.init(start.params)
        return naive_round(model, optax.sgd(rate), server, start, opt_state, data, plan)[0]

    def gap(left, right):
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), left.params, right.params)
        return max(map(float, jax.tree.leaves(gaps)))

    expected = naive(plan)
    moved = gap(expected, start)
    # How much a network makes of rounding is its own affair: MobileNetV2 ends at one pixel, where
    # BatchNorm divides by the spread of three numbers. So the naive loop says it itself, by what
    # the order of the rows in a batch changes; a fault of the mask moves the update itself.
    orders = (plan._replace(rows=np.roll(plan.rows, shift, axis=-1)) for shift in (1, 2))
    noise = max(gap(expected, naive(order)) for order in orders)
    assert gap(state.variables, expected) <= np.clip(20 * noise, 1e-12 * moved, 1e-8 * moved)
    assert_close(state.variables.stats, expected.stats, 1e-10)


def without_dropout(build):
    """The same network with every rate of dropout at 0."""
    from flax import nnx

    def built(rngs):
        module = build(rngs)
        for _, child in nnx.iter_modules(module):
            if isinstance(child, nnx.Dropout):
                child.rate = 0.0
        return module

    return built


def test_dropout_differs_between_steps_clients_rounds_and_seeds_only():
    """One key a (seed, round, client, step): equal ones give equal masks, all others do not."""
    build = builder("cnn-dropout", (6, 6, 1), 10, width=0.25)
    model, data = from_nnx(build), images(6)
    algorithm = averaged(model, pixels=PIXELS, dtype=jnp.float32)
    start = model.init(jax.random.key(0))
    step = jax.jit(algorithm.round)
    one = plan_of(clients_of(4, 4), 1)

    def weights(plan):
        state, _ = step(algorithm.init(start), Cohort(data, plan))
        return np.asarray(jax.tree.leaves(state.variables.params)[0])

    reference = weights(one)
    assert np.array_equal(reference, weights(one))
    same = one.round
    for other in (
        one._replace(round=same + 1),
        one._replace(seed=one.seed + 1),
        one._replace(clients=one.clients + 2),
    ):
        assert not np.array_equal(reference, weights(other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_precision_learns(dtype):
    result = run(Experiment(rounds=8, dtype=dtype, eval_every=8, model=ModelConfig(name="mlp")))
    assert result.summary["final_test_accuracy"] > 0.85
    kept = np.float64 if dtype == "float64" else np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(result.variables)} == {np.dtype(kept)}
    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "experiment",
    [
        Experiment(algorithm="fedprox", client=ClientConfig(mu=0.1)),
        Experiment(algorithm="fedsgd", server=ServerConfig(lr=0.5)),
        Experiment(algorithm="central", client=ClientConfig(optimizer="adam", lr=1e-3)),
        Experiment(server=ServerConfig(optimizer="yogi", lr=0.03), weighting="uniform"),
        Experiment(data=DataConfig(partition="quantity"), clients_per_round=4, parallel=3),
        Experiment(data=DataConfig(partition="dirichlet", alpha=0.2), parallel="loop"),
    ],
    ids=["fedprox", "fedsgd", "central", "fedyogi", "quantity", "dirichlet"],
)
def test_every_algorithm_learns(experiment):
    from jaxfed.config import override

    changes = {"model.name": "logistic", "rounds": 20, "eval_every": 20}
    result = run(override(experiment, changes))
    assert result.summary["final_test_accuracy"] > 0.7


@pytest.mark.parametrize("policy", ["mean", "pooled", "local", "recalibrate"])
def test_every_policy_learns_where_the_frozen_one_cannot(policy):
    """BatchNorm on digits, many rounds of momentum 0.99: only `frozen` evaluates at chance."""

    def accuracy(policy):
        model = ModelConfig(name="mlp", width=0.25, norm="batch", batch_stats=policy)
        result = run(Experiment(rounds=30, eval_every=30, model=model))
        return result.summary["final_test_accuracy"]

    assert accuracy(policy) > 0.9
    if policy == "mean":
        assert accuracy("frozen") < accuracy("mean") - 0.1


def test_parallel_is_an_argument_not_a_result():
    model = ModelConfig(name="mlp", width=0.25)
    results = [
        run(Experiment(rounds=2, parallel=parallel, dtype="float64", model=model))
        for parallel in ("loop", "vmap", 3, "auto")
    ]
    for other in results[1:]:
        assert_close(other.variables, results[0].variables, 1e-13)


def test_a_linen_module_works_the_same(x64):
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train=False, mask=None):
            x = linen.Dense(5, param_dtype=jnp.float64, use_bias=False)(x)
            where = None if mask is None else mask[:, None]
            norm = linen.BatchNorm(momentum=0.9, param_dtype=jnp.float64)
            x = norm(x, use_running_average=not train, mask=where)
            x = linen.Dropout(0.0)(x, deterministic=not train)
            return linen.Dense(3, param_dtype=jnp.float64)(jnp.tanh(x))

    from toys import examples

    model, data, plan = from_linen(Net(), (6,)), examples(20), plan_of(clients_of(9, 11))
    algorithm = averaged(model, optax.sgd(0.1), batch_stats="mean")
    start = model.init(jax.random.key(0))
    state, _ = jax.jit(algorithm.round)(algorithm.init(start), Cohort(data, plan))
    server = optax.sgd(1.0)
    expected, _, _ = naive_round(
        model, optax.sgd(0.1), server, start, server.init(start.params), data, plan
    )
    assert_close(state.variables.params, expected.params, 1e-12)
    # Linen keeps statistics in float32.
    assert_close(state.variables.stats, expected.stats, 1e-6)


def test_a_bare_pair_of_functions_works_the_same(x64):
    from toys import examples

    from jaxfed import Model, Variables

    def init(key):
        return Variables(jax.random.normal(key, (6, 3)), {})

    def apply(variables, x, mask, train, key):
        del mask, train, key
        return x @ variables.params, variables.stats

    model, data, plan = Model(init, apply), examples(20), plan_of(clients_of(9, 11))
    algorithm = averaged(model, optax.sgd(0.1))
    start = model.init(jax.random.key(0))
    state, _ = jax.jit(algorithm.round)(algorithm.init(start), Cohort(data, plan))
    server = optax.sgd(1.0)
    expected, _, _ = naive_round(
        model, optax.sgd(0.1), server, start, server.init(start.params), data, plan
    )
    assert_close(state.variables.params, expected.params, 1e-13)


def test_modules_that_would_go_wrong_are_refused():
    from flax import linen, nnx

    class NoMask(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    class LinenNoMask(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            return linen.BatchNorm(use_running_average=not train)(x)

    class Odd(nnx.Module):
        def __init__(self, rngs):
            del rngs
            self.count = nnx.Variable(jnp.zeros(()))

        def __call__(self, x):
            return x

    with pytest.raises(TypeError, match="takes no mask"):
        from_nnx(NoMask)
    with pytest.raises(TypeError, match=r"neither nnx\.Param nor"):
        from_nnx(Odd)
    with pytest.raises(TypeError, match="takes no mask"):
        from_linen(LinenNoMask(), (3,)).init(jax.random.key(0))
