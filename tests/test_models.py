"""The networks: counted, compared with `lax.conv`, with the smaller batch, with Keras' rules."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxfed import from_nnx
from jaxfed.config import ConfigError
from jaxfed.models import MODELS, build, builder
from jaxfed.models.conv import patches_conv
from jaxfed.models.layers import BatchNorm, GroupNorm, LayerNorm, conv, max_pool, norm, relu6

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed, *shape, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(got, expected, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# --- Parameter counts -----------------------------------------------------------------------


def count(name, shape, classes, width=1.0):
    """Parameters and moving statistics, without allocating any."""
    module = nnx.eval_shape(lambda: build(name, shape, classes, width=width, rngs=nnx.Rngs(0)))
    state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
    return sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "width", "expected"),
    [
        ("cnn", (28, 28, 1), 10, 1.0, 34_826),
        ("cnn-small", (28, 28, 1), 10, 1.0, 27_210),
        ("cnn-mcmahan", (28, 28, 1), 10, 1.0, 1_663_370),  # McMahan et al. 2017, section 3
        ("cnn-dropout", (28, 28, 1), 62, 1.0, 1_206_590),  # Reddi et al. 2021, table 4
        ("mlp", (28, 28, 1), 10, 1.0, 199_210),  # McMahan et al. 2017, section 3
        ("logistic", (28, 28, 1), 10, 1.0, 7_850),
        # keras.applications
        ("mobilenet-v1", (224, 224, 3), 1000, 1.0, 4_253_864),
        ("mobilenet-v2", (224, 224, 3), 1000, 1.0, 3_538_984),
        ("mobilenet-v3-small", (224, 224, 3), 1000, 1.0, 2_554_968),
        ("mobilenet-v3-large", (224, 224, 3), 1000, 1.0, 5_507_432),
        ("mobilenet-v1", (32, 32, 1), 10, 0.25, 220_970),
        ("mobilenet-v2", (32, 32, 1), 10, 0.35, 422_730),
    ],
)
def test_number_of_weights(name, shape, classes, width, expected):
    assert count(name, shape, classes, width) == expected


# --- Convolution ----------------------------------------------------------------------------


class Case(NamedTuple):
    image: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, int]
    padding: Any
    groups: int = 1


CONVOLUTIONS = [
    Case((7, 6, 3), (3, 3, 3, 5), (1, 1), "VALID"),
    Case((7, 6, 3), (3, 3, 3, 5), (1, 1), "SAME"),
    Case((7, 6, 3), (3, 3, 3, 5), (2, 2), "SAME"),
    Case((7, 6, 1), (5, 3, 1, 4), (2, 1), "SAME"),
    Case((8, 9, 2), (3, 2, 2, 3), (3, 2), ((0, 1), (2, 0))),
    Case((7, 6, 9), (3, 2, 9, 4), (2, 1), "SAME"),
    Case((6, 5, 4), (1, 1, 4, 3), (1, 1), "SAME"),
    Case((6, 5, 4), (1, 1, 4, 3), (2, 2), "VALID"),
    Case((7, 6, 4), (3, 3, 1, 4), (1, 1), "SAME", 4),
    Case((7, 6, 4), (3, 3, 1, 4), (2, 2), "VALID", 4),
    Case((9, 8, 4), (5, 5, 1, 4), (2, 2), "SAME", 4),
    Case((8, 7, 4), (3, 3, 1, 4), (2, 2), ((0, 1), (0, 1)), 4),
    Case((1, 2, 4), (3, 3, 1, 4), (1, 1), "SAME", 4),
    Case((7, 6, 4), (3, 3, 2, 6), (1, 1), "SAME", 2),  # these two fall back to lax
    Case((7, 6, 4), (3, 3, 1, 8), (1, 1), "SAME", 4),
]


def value_and_pullback(conv, case):
    def apply(x, kernel):
        return conv(
            x,
            kernel,
            case.stride,
            case.padding,
            dimension_numbers=NHWC,
            feature_group_count=case.groups,
        )

    def both(x, kernel):
        y, pullback = jax.vjp(apply, x, kernel)
        return y, pullback(jnp.cos(y))

    return both


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution_and_gradients_equal_lax(x64, case):
    x, k = normal(0, 2, *case.image), normal(1, *case.kernel)
    got, expected = (
        jax.jit(value_and_pullback(f, case))(x, k) for f in (patches_conv, lax.conv_general_dilated)
    )
    assert_close(got, expected)


@pytest.mark.parametrize("case", CONVOLUTIONS[1:12:3], ids=str)
def test_convolution_of_many_clients(x64, case):
    x, k = normal(0, 3, 2, *case.image), normal(1, 3, *case.kernel)
    got = jax.jit(jax.vmap(value_and_pullback(patches_conv, case)))(x, k)
    one_by_one = value_and_pullback(lax.conv_general_dilated, case)
    mapped = jax.jit(lambda x, k: lax.map(lambda pair: one_by_one(*pair), (x, k)))
    assert_close(got, mapped(x, k))


def test_bfloat16_products_are_added_up_in_float32():
    case = Case((9, 9, 16), (3, 3, 16, 8), (1, 1), "SAME")
    x, k = normal(0, 4, *case.image), normal(1, *case.kernel)
    x, k = x.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    got = jax.jit(lambda x, k: patches_conv(x, k, (1, 1), "SAME", dimension_numbers=NHWC))(x, k)
    wide = lax.conv_general_dilated(
        x.astype(jnp.float32), k.astype(jnp.float32), (1, 1), "SAME", dimension_numbers=NHWC
    )
    assert got.dtype == jnp.bfloat16
    # One rounding at the end; sums in bfloat16 would be off by several.
    assert jnp.all(jnp.abs(got.astype(jnp.float32) - wide) <= jnp.abs(wide) * 2**-8 + 1e-6)


def test_dilated_convolution_falls_back_to_lax(x64):
    x, k = normal(0, 2, 9, 9, 3), normal(1, 3, 3, 3, 4)
    arguments = (x, k, (1, 1), "SAME")
    options = {"rhs_dilation": (2, 2), "dimension_numbers": NHWC}
    assert_close(
        patches_conv(*arguments, **options), lax.conv_general_dilated(*arguments, **options)
    )


def test_second_derivative(x64):
    x, k = normal(0, 2, 5, 5, 2), normal(1, 3, 3, 2, 3)

    def hessian_product(conv):
        def loss(k):
            return jnp.sum(jnp.sin(conv(x, k, (2, 2), "SAME", dimension_numbers=NHWC)))

        return jax.jit(jax.grad(lambda k: jnp.vdot(jax.grad(loss)(k), k)))(k)

    assert_close(hessian_product(patches_conv), hessian_product(lax.conv_general_dilated))


@pytest.mark.parametrize("name", ["cnn", "mobilenet-v1"])
def test_many_clients_need_no_convolution_op(name):
    """`vmap` over clients must not come back as a grouped convolution: the point of it all."""
    shape = (32, 32, 1)
    make = builder(name, shape, 10, width=0.25)

    def loss(params, x):
        module = make(nnx.Rngs(0))
        nnx.update(module, params)
        module.eval()
        return jnp.sum(module(x) ** 2)

    one = nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    clients = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), one)
    images = jax.ShapeDtypeStruct((3, 2, *shape), jnp.float32)
    text = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)))).lower(clients, images).as_text()
    assert "dot_general" in text
    assert "convolution" not in text


# --- Pooling and ReLU6 ----------------------------------------------------------------------


def test_max_pool(x64):
    x = normal(0, 2, 7, 6, 3)
    expected = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    assert_close(max_pool(x), expected, 0)


def test_max_pool_gives_the_gradient_to_the_first_maximum():
    """Row by row, as TensorFlow does; `jnp.maximum` would divide it among equals."""
    windows = np.array(np.meshgrid(*[[0.0, 1.0]] * 4)).reshape(4, -1).T  # every pattern of ties
    x = jnp.asarray(windows.reshape(-1, 2, 2, 1), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x)))(x).reshape(-1, 4)
    np.testing.assert_array_equal(gradient, np.eye(4)[np.argmax(windows, axis=1)])


def test_relu6_is_flat_at_its_corners():
    x = jnp.array([-1.0, 0.0, 3.0, 6.0, 7.0])
    np.testing.assert_array_equal(relu6(x), [0, 0, 3, 6, 6])
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu6))(x), [0, 0, 1, 0, 0])


# --- Normalisation --------------------------------------------------------------------------


def batch_norm(x, mask):
    """Output of the real rows, gradients of a loss of those, moving statistics."""
    layer = BatchNorm(x.shape[-1], momentum=0.9, dtype=x.dtype)
    layer.scale[...] = 1 + normal(8, x.shape[-1]) / 3
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
    weight = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    def loss(params, x):
        layer = nnx.merge(graph, params, stats, copy=True)
        y = layer(x, mask)
        real = jnp.ones(len(x), bool) if mask is None else mask
        total = jnp.sum(jnp.sin(y) * weight * real.reshape(-1, *(1,) * (x.ndim - 1)))
        return total, (y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)))

    gradients = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (dparams, dx), (y, new) = jax.jit(gradients)(params, x)
    return y, nnx.to_pure_dict(dparams), dx, new


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (5, 3)])
def test_masked_batch_norm_is_batch_norm_of_the_smaller_batch(x64, shape):
    x = normal(0, *shape)
    mask = jnp.array([True, True, True, False, False])
    y, dparams, dx, stats = batch_norm(x.at[3:].set(1e3), mask)
    expected_y, expected_dparams, expected_dx, expected_stats = batch_norm(x[:3], None)
    assert_close(
        (y[:3], dparams, dx[:3], stats), (expected_y, expected_dparams, expected_dx, expected_stats)
    )
    assert_close(dx[3:], jnp.zeros_like(dx[3:]), 0)


def test_batch_norm_follows_keras(x64):
    x = normal(0, 6, 4, 4, 2)
    y, _, _, stats = batch_norm(x, None)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    scale = 1 + normal(8, 2) / 3
    assert_close(y, (x - mean) / jnp.sqrt(var + 1e-3) * scale)
    rate = float(np.float32(1 - 0.9))
    assert_close(stats, {"mean": rate * mean, "var": 1 - rate + rate * var})


def test_batch_norm_of_padding_alone():
    x = normal(0, 4, 3, 3, 2, dtype=jnp.float32)
    y, dparams, dx, stats = batch_norm(x, jnp.zeros(4, bool))
    np.testing.assert_array_equal(stats["mean"], jnp.zeros(2))
    np.testing.assert_array_equal(stats["var"], jnp.ones(2))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((y, dparams, dx)))


def test_batch_norm_in_evaluation_uses_and_keeps_its_statistics():
    layer = BatchNorm(2)
    layer.mean[...], layer.var[...] = jnp.array([1.0, 2.0]), jnp.array([4.0, 9.0])
    layer.eval()
    x = normal(0, 3, 2, dtype=jnp.float32)
    expected = (x - jnp.array([1.0, 2.0])) / jnp.sqrt(jnp.array([4.0, 9.0]) + 1e-3)
    assert_close(layer(x), expected, 1e-6)
    np.testing.assert_array_equal(layer.mean[...], [1.0, 2.0])


def test_batch_norm_moments_of_bfloat16_are_float32():
    x = (100 + normal(0, 64, 4, 4, 1)).astype(jnp.bfloat16)
    layer = BatchNorm(1, momentum=0.0, dtype=jnp.bfloat16)
    assert layer(x).dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    assert layer.var[...].dtype == jnp.float32
    np.testing.assert_allclose(layer.var[...], wide.var((0, 1, 2)), rtol=1e-5)


def test_group_norm(x64):
    x = normal(0, 2, 3, 3, 16)
    grouped = x.reshape(2, 9, 8, 2)
    mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
    expected = ((grouped - mean) / jnp.sqrt(var + 1e-3)).reshape(x.shape)
    assert_close(GroupNorm(16, dtype=jnp.float64)(x), expected)


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 8), (24, 8), (12, 6), (7, 7), (11, 1), (1, 1)]
)
def test_group_norm_fits_any_width(channels, groups):
    assert GroupNorm(channels).groups == groups


def test_layer_norm_is_over_channels(x64):
    x = normal(0, 2, 3, 3, 5)
    mean, var = (f(x, axis=-1, keepdims=True) for f in (jnp.mean, jnp.var))
    assert_close(LayerNorm(5, dtype=jnp.float64)(x), (x - mean) / jnp.sqrt(var + 1e-3))


def test_unknown_norm():
    name: Any = "instance"
    with pytest.raises(Exception, match="instance"):  # jaxtyping's error or, without it, ours
        norm(name, 8, dtype=jnp.float32)


# --- Whole networks -------------------------------------------------------------------------


def small(name, **options):
    """The network at its smallest image size and few channels."""
    size = MODELS[name].min_image_size
    width = 1.0 if name == "logistic" else 0.25
    return build(name, (size, size, 1), 3, width=width, rngs=nnx.Rngs(0), **options), size


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("mobilenet") else ())
        for name in MODELS
    ],
)
def test_network_at_its_smallest_image(name):
    size = MODELS[name].min_image_size
    width = 1.0 if name == "logistic" else 0.25
    model = from_nnx(builder(name, (size, size, 1), 3, width=width))
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(random.uniform(0, 0.1, leaf.shape), leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    x, mask = normal(0, 2, size, size, 1, dtype=jnp.float32), jnp.array([True, False])

    def both_modes(variables, x):
        return [
            model.apply(variables, x, mask, train, jax.random.key(0)) for train in (True, False)
        ]

    (trained, new), (evaluated, old) = jax.jit(both_modes)(variables, x)
    assert trained.shape == evaluated.shape == (2, 3)
    assert all(
        bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((trained, new, evaluated))
    )
    assert_close(old, variables.stats, 0)


@pytest.mark.parametrize("name", ["cnn", "mlp", "mobilenet-v1", "mobilenet-v2"])
@pytest.mark.parametrize("norm_name", ["batch", "group", "layer", "none"])
def test_norm_variants(name, norm_name):
    size = MODELS[name].min_image_size
    make = builder(name, (size, size, 1), 3, width=0.25, norm=norm_name)
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    stats = jax.tree.leaves(nnx.state(module, nnx.BatchStat))
    assert bool(stats) == (norm_name == "batch")
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    assert any(path[-1] == "scale" for path in paths) == (norm_name != "none")
    assert {path[-1] for path in paths} <= {"kernel", "bias", "scale"}
    shape = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    assert nnx.eval_shape(lambda m, x: m(x), module, shape).shape == (2, 3)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("mobilenet")])
def test_without_norm_every_convolution_has_a_bias(name):
    module = nnx.eval_shape(lambda: small(name, norm="none")[0])
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert all((*path[:-1], "bias") in paths for path in paths)


@pytest.mark.parametrize("name", ["cnn-dropout", "mobilenet-v1"])
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")],
)
def test_dtypes(x64, name, dtype, parameters):
    module = nnx.eval_shape(lambda: small(name, dtype=jnp.dtype(dtype))[0])

    def state_dtypes():
        state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
        return {str(leaf.dtype) for leaf in jax.tree.leaves(state)}

    assert state_dtypes() == {parameters}
    size = MODELS[name].min_image_size
    images = jax.ShapeDtypeStruct((2, size, size, 1), dtype)
    mask = jax.ShapeDtypeStruct((2,), bool)
    logits = nnx.eval_shape(lambda m, x, mask: m(x, mask), module, images, mask)
    assert str(logits.dtype) == dtype
    assert state_dtypes() == {parameters}


@pytest.mark.parametrize("name", ["cnn", "mobilenet-v1"])
def test_width_scales_the_channels(name):
    counts = [count(name, (32, 32, 1), 10, width) for width in (0.5, 1.0, 1.5)]
    assert counts == sorted(counts)
    assert len(set(counts)) == 3


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "fans"),
    [(1, 32, 1, 9 * 1 + 9 * 32), (64, 64, 64, 9 * 64 + 9 * 1)],  # Keras: those of (3, 3, 64, 1)
)
def test_kernels_start_glorot_uniform(inputs, outputs, groups, fans):
    rngs = nnx.Rngs(0)
    layer = conv(inputs, outputs, 3, groups=groups, dtype=jnp.float32, rngs=rngs)
    assert 0.95 < jnp.abs(layer.kernel[...]).max() / (6 / fans) ** 0.5 <= 1
    assert layer.bias is not None
    np.testing.assert_array_equal(layer.bias[...], jnp.zeros(outputs))


def test_refusals():
    with pytest.raises(ConfigError, match="got resnet, expected one of cnn, "):
        builder("resnet", (28, 28, 1), 10)
    with pytest.raises(ConfigError, match=r"28 x 28.*expects 32 x 32"):
        builder("mobilenet-v1", (28, 28, 1), 10)
    with pytest.raises(ConfigError, match=r"logistic with width 0\.5"):
        builder("logistic", (28, 28, 1), 10, width=0.5)
