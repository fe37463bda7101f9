"""A training step of one convolution for many clients, each with its own kernel, several ways."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.measure import (
    PRECISIONS,
    Case,
    Found,
    Row,
    ceiling_of,
    gap,
    median_seconds,
    one_line,
    ratio,
)  # fmt: skip
from jaxfed.models.conv import patches_conv


class Layer(NamedTuple):
    """One convolution with stride 1 on images [batch, side, side, inputs]."""

    name: str
    side: int
    kernel: int
    inputs: int
    outputs: int
    padding: str
    depthwise: bool = False

    @property
    def reads_images(self) -> bool:
        """True for a first layer, whose input needs no gradient."""
        return self.inputs <= 3

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """[kh, kw, I, F] of one client."""
        return self.kernel, self.kernel, 1 if self.depthwise else self.inputs, self.outputs

    @property
    def out_side(self) -> int:
        """Side of the output."""
        return self.side if self.padding == "SAME" else self.side - self.kernel + 1


LAYERS = (
    Layer("3x3x1x32 on 28x28", 28, 3, 1, 32, "VALID"),
    Layer("3x3x32x64 on 13x13", 13, 3, 32, 64, "VALID"),
    Layer("depthwise 3x3x64 on 16x16", 16, 3, 64, 64, "SAME", depthwise=True),
    Layer("1x1x64x128 on 16x16", 16, 1, 64, 128, "VALID"),
    Layer("5x5x32x64 on 14x14", 14, 5, 32, 64, "SAME"),
    Layer("3x3x3x32 on 32x32", 32, 3, 3, 32, "VALID"),
)
TINY_LAYERS = (
    Layer("3x3x1x4 on 8x8", 8, 3, 1, 4, "VALID"),
    Layer("5x5x4x6 on 8x8", 8, 5, 4, 6, "SAME"),
    Layer("depthwise 3x3x4 on 8x8", 8, 3, 4, 4, "SAME", depthwise=True),
)
LIMITS = {"float32": 1e-4, "tf32": 3e-3, "bfloat16": 3e-2}
"""How far a lowering may be from the first one in float32: rounding, with room."""
RATE = 1e-5
"""So small that bfloat16, which loses the steps, stays near float32."""


def cases(tiny: bool, found: Found) -> Iterator[Case]:
    sizes = [(3, 2)] if tiny else [(k, b) for b in (20, 10) for k in (10, 100, 1)]
    for clients, batch in sizes:
        for layer in TINY_LAYERS if tiny else LAYERS:
            label = {"layer": layer.name, "clients": clients, "batch": batch}
            steps = 2 if tiny else 20
            yield Case(label, partial(shoot_out, layer, clients, batch, steps, found))


def shoot_out(layer: Layer, clients: int, batch: int, steps: int, found: Found) -> list[Row]:
    """A row for every precision and lowering; one that fails has an error."""
    rng = np.random.default_rng(0)
    fan_in = np.prod(layer.kernel_shape[:3])
    images = rng.standard_normal((clients, batch, layer.side, layer.side, layer.inputs))
    kernels = rng.standard_normal((clients, *layer.kernel_shape)) / np.sqrt(fan_in)
    first, rows = None, []
    for precision, limit in LIMITS.items():
        matmul, dtype = PRECISIONS[precision]
        x, w = jnp.asarray(images, dtype), jnp.asarray(kernels, dtype)
        for name, (convolve, mapped) in lowerings(layer).items():
            row: Row = {"precision": precision, "lowering": name}
            rows.append(row)
            try:
                with jax.default_matmul_precision(matmul):
                    program = jax.jit(partial(train, layer, convolve, mapped, steps))
                    results = [np.asarray(leaf, np.float32) for leaf in program(x, w)]
                    seconds = median_seconds(lambda: program(x, w), 5) / steps  # noqa: B023
                first = results if first is None else first
                row["gap"] = gap(results, first)
                row |= speed(layer, clients, batch, precision, seconds, found)
                if not row["gap"] <= limit:  # NaN is not
                    raise ValueError(
                        f"{name}: got {row['gap']:.1e} from the first lowering, expected at most "
                        f"{limit:.0e} in {precision}; do not use it"
                    )
            except Exception as error:
                row["error"] = one_line(error)
    return rows


def lowerings(layer: Layer) -> dict[str, tuple[Callable, Callable]]:
    """By name: the convolution, and what maps a client's step over all."""
    ours = "shifts" if layer.depthwise else "patches"
    return {
        "sequential": (lax.conv_general_dilated, one_by_one),
        "grouped": (lax.conv_general_dilated, jax.vmap),
        ours: (patches_conv, jax.vmap),
        f"{ours}, sequential": (patches_conv, one_by_one),
    }


def one_by_one(step: Callable) -> Callable:
    """`lax.map` with the arguments of `vmap`."""
    return lambda x, w: lax.map(lambda seat: step(*seat), (x, w))


def train(
    layer: Layer, convolve: Callable, mapped: Callable, steps: int, x: Any, w: Any
) -> list[Any]:
    """Trains the kernels [clients, kh, kw, I, F] to give zeros; samples of the last step.

    The steps are one loop on the device, as in a round, and each needs the one before, so that
    none can be left out.
    """

    def forward(x: Any, w: Any) -> Any:
        return convolve(
            x, w, (1, 1), layer.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=layer.inputs if layer.depthwise else 1,
        )  # fmt: skip

    def client_step(x: Any, w: Any) -> tuple[Any, ...]:
        if layer.reads_images:
            y, pullback = jax.vjp(lambda w: forward(x, w), w)
            return y, *pullback(y)
        y, pullback = jax.vjp(lambda w, x: forward(x, w), w, x)
        return y, *pullback(y)

    all_clients = mapped(client_step)

    def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        x, w = carry
        y, dw, *dx = all_clients(x, w)
        # Images that stay as they are would have their patches taken once, before the loop.
        x -= RATE * (dx[0] if dx else dw.mean(axis=(1, 2, 3, 4)).reshape(-1, 1, 1, 1, 1))
        return (x, w - RATE / y[0, ..., 0].size * dw), None

    (x, w), _ = lax.scan(body, (x, w), length=steps - 1)
    y, dw, *dx = all_clients(x, w)
    return [y[:, 0], dw, *(leaf[:, 0] for leaf in dx)]


def speed(
    layer: Layer, clients: int, batch: int, precision: str, seconds: float, found: Found
) -> Row:
    """Of one step that took so long: ms, TFLOP/s, and the fractions of the device's limits."""
    read, written, gradients = (
        batch * layer.side**2 * layer.inputs,
        batch * layer.out_side**2 * layer.outputs,
        1 if layer.reads_images else 2,
    )
    kernel = int(np.prod(layer.kernel_shape))
    products = clients * batch * layer.out_side**2 * kernel  # of one pass; depthwise: I = 1
    tflops = 2e-12 * products * (1 + gradients) / seconds
    numbers = clients * (1 + gradients) * (read + written + kernel)
    size = jnp.dtype(PRECISIONS[precision].dtype).itemsize
    bandwidth = next((r["gb_per_second"] for r in found.get("ceiling", [])
                      if "gb_per_second" in r), None)  # fmt: skip
    return {
        "ms": 1e3 * seconds,
        "tflops": tflops,
        "of_ceiling": ratio(tflops, ceiling_of(found, precision)),
        "of_bandwidth": ratio(1e-9 * size * numbers / seconds, bandwidth),
    }
