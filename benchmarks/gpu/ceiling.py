"""What the device can do at best: large matrix products and a large copy."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.gpu.measure import PRECISIONS, Case, Found, Row, median_seconds


def cases(tiny: bool, _: Found) -> Iterator[Case]:
    side, length = (256, 2**16) if tiny else (8192, 2**28)
    for name in PRECISIONS:
        yield Case({"what": f"matmul {name}"}, partial(matmul, name, side, 2 if tiny else 10))
    yield Case({"what": "copy"}, partial(copy, length, 2 if tiny else 10))


def matmul(name: str, side: int, repeats: int) -> list[Row]:
    """TFLOP/s of [side, side] x [side, side], one product after another."""
    precision = PRECISIONS[name]
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(key, (side, side), precision.dtype) for key in keys)
    w = w / side**0.5  # keeps the size of x from product to product
    with jax.default_matmul_precision(precision.matmul):
        chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, repeats, lambda _, y: y @ w, x))
        seconds = median_seconds(lambda: chain(x, w)) / repeats
    return [{"side": side, "ms": 1e3 * seconds, "tflops": 2e-12 * side**3 / seconds}]


def copy(length: int, repeats: int) -> list[Row]:
    """GB/s, read and written, of adding one to a float32 array."""
    x = jnp.zeros(length, jnp.float32)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, y: y + 1, x))
    seconds = median_seconds(lambda: chain(x)) / repeats
    return [{"side": length, "ms": 1e3 * seconds, "gb_per_second": 8e-9 * length / seconds}]
