"""What is learned: a network with its loss and metrics, as pure functions of rows of the data.

| task | outputs | targets | loss | other metrics |
|---|---|---|---|---|
| `classification` | `[batch, classes]` | integers `[batch]` | softmax cross-entropy | accuracy |
| `next_token` | `[batch, length, vocabulary]` | integers `[batch, length]`, negative: ignored | softmax cross-entropy per token | accuracy per token |
| `regression` | `[batch, ...]` | floats `[batch, ...]` | squared error | absolute error |
| `multilabel` | `[batch, labels]` | 0 or 1 `[batch, labels]` | sigmoid cross-entropy per label | accuracy per label |
| `supervised` | anything | anything | yours | yours |
"""  # noqa: E501

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxfed.core import tree
from jaxfed.core.model import Model, Variables
from jaxfed.core.tree import Tree

PIXELS = (0.0, 1.0)
"""The default range of pixels: uint8 values 0 to 255 are mapped to it."""


Pixels = tuple[int | float, int | float]


class Examples(NamedTuple):
    """Data that stays on the device; plans refer to it by row."""

    inputs: Tree
    """An array, or a tree of arrays, with a leading axis `[examples]`."""
    targets: Tree
    """Likewise."""


class Mean(NamedTuple):
    """A mean as two sums, so that batches, clients and devices can be added up.

    Example:
      >>> float(Mean(jnp.array(6.0), jnp.array(4.0)).value())
      1.5
    """

    total: Float[Array, "*axes"]
    count: Float[Array, "*axes"]  # pyright: ignore[reportIncompatibleMethodOverride]

    def value(self) -> Float[Array, "*axes"]:
        """`total / count`; NaN if nothing was counted."""
        return self.total / self.count


Metrics = dict[str, Mean]
"""The metrics of some examples; the entry `loss` is what is minimized."""

Gradient = Callable[[Variables, Examples, Array, PRNGKeyArray], tuple[Tree, Tree, Metrics]]
"""`(variables, examples, rows [batch], key) -> (gradient of the mean loss, statistics, metrics)`"""

Elementwise = Callable[[Tree, Tree], Float[Array, "batch ..."]]
"""`(outputs, targets) -> values [batch, ...]`, one per example or per position of an example."""


class Problem(NamedTuple):
    """A network and its metrics on a batch.

    The mean loss of a batch is `metrics["loss"].value()`, over the rows (and positions) that count.
    """

    init: Callable[[PRNGKeyArray], Variables]
    metrics: Callable[[Variables, Examples, Array, bool, PRNGKeyArray], tuple[Metrics, Tree]]
    """`(variables, examples, rows [batch], train, key) -> (metrics, statistics)`; a row of -1 is
    padding and counts nowhere."""
    score: str = "loss"
    """The metric by which reports rank runs and `stop_at` ends them."""
    maximize: bool = False
    """Whether a higher score is better."""

    def gradient(
        self, variables: Variables, examples: Examples, rows: Int[Array, " batch"],
        key: PRNGKeyArray,
    ) -> tuple[Tree, Tree, Metrics]:  # fmt: skip
        r"""Returns $\nabla_w$ of the batch's mean loss, the new statistics, and the metrics."""

        def objective(params: Tree) -> tuple[Array, tuple[Tree, Metrics]]:
            metrics, stats = self.metrics(
                Variables(params, variables.stats), examples, rows, True, key
            )
            loss = metrics["loss"]
            # TFF: the mean runs over the rows that are there, also in a smaller last batch.
            return loss.total / jnp.maximum(loss.count, 1), (stats, metrics)

        gradient, (stats, metrics) = jax.grad(objective, has_aux=True)(variables.params)
        return gradient, stats, metrics


def supervised(
    model: Model,
    loss: Elementwise,
    metrics: Mapping[str, Elementwise] | None = None,
    *,
    counted: Callable[[Tree], Bool[Array, "batch ..."]] | None = None,
    pixels: Pixels | None = None,
    dtype: DTypeLike = jnp.float32,
    score: str = "loss",
    maximize: bool = False,
) -> Problem:
    """A problem from a network and functions of its outputs and the targets.

    Args:
      model: the network.
      loss: `(outputs, targets) -> losses [batch, ...]`.
      metrics: other functions of that form by name.
      counted: `targets -> mask [batch, ...]`, positions that count; None: all do.
      pixels: the range that uint8 inputs 0 to 255 are mapped to; None: no input is an image.
      dtype: of the computation; float inputs and targets are cast to it.
      score: the metric that runs are ranked by.
      maximize: whether a higher score is better.

    Raises:
      TypeError: when called with uint8 inputs while `pixels` is None.

    Example:
      >>> from jaxfed import Examples, from_nnx
      >>> from flax import nnx
      >>> model = from_nnx(lambda rngs: nnx.Linear(2, 1, rngs=rngs))
      >>> huber = supervised(model, lambda y, t: optax.huber_loss(y[:, 0], t))
      >>> data = Examples(jnp.ones((4, 2)), jnp.zeros(4))
      >>> found, _ = huber.metrics(
      ...     model.init(jax.random.key(0)), data, jnp.array([0, 1, -1]), False, jax.random.key(0))
      >>> float(found["loss"].count)
      2.0
    """
    functions = {"loss": loss, **(metrics or {})}

    def of_batch(
        variables: Variables, examples: Examples, rows: Array, train: bool, key: PRNGKeyArray
    ) -> tuple[Metrics, Tree]:
        inputs, targets, mask = take_batch(examples, rows, dtype, pixels)
        outputs, stats = model.apply(variables, inputs, mask, train, key)
        present = mask
        if counted is not None:
            positions = counted(targets)
            present = _spread(mask, positions.ndim) & positions
        found = {name: _mean(each(outputs, targets), present) for name, each in functions.items()}
        return found, stats

    return Problem(model.init, of_batch, score, maximize)


def _mean(values: Float[Array, "batch ..."], present: Bool[Array, "batch ..."]) -> Mean:
    present = jnp.broadcast_to(_spread(present, values.ndim), values.shape)
    return Mean(jnp.where(present, values, 0).sum(), present.sum(dtype=values.dtype))


def _spread(mask: Bool[Array, "batch ..."], ndim: int) -> Bool[Array, "batch ..."]:
    return mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim))


def take_batch(
    examples: Examples, rows: Int[Array, " batch"], dtype: DTypeLike,
    pixels: Pixels | None = None,
) -> tuple[Tree, Tree, Bool[Array, " batch"]]:  # fmt: skip
    """Gathers rows; -1 gives a row of padding, False in the mask that is returned last.

    Raises:
      TypeError: for uint8 inputs if `pixels` is None.
    """
    mask, rows = rows >= 0, jnp.maximum(rows, 0)

    def taken(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)[rows]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # Padding shows row 0, where another client may hold NaN.
        return jnp.where(_spread(mask, leaf.ndim), leaf, 0).astype(dtype)

    def scaled(leaf: Array) -> Array:
        if leaf.dtype != jnp.uint8:
            return leaf
        if pixels is None:
            raise TypeError(
                "inputs: got uint8, expected pixels=(low, high) for images, or another dtype for "
                "data that are no images (int32 for tokens, float32 for features)"
            )
        low, high = pixels
        unit = leaf.astype(dtype) / 255
        return unit if (low, high) == PIXELS else unit * (high - low) + low

    inputs, targets = jax.tree.map(taken, (examples.inputs, examples.targets))
    return jax.tree.map(scaled, inputs), targets, mask


# --- Tasks ----------------------------------------------------------------------------------


def cross_entropy(
    logits: Float[Array, "*axes classes"], labels: Int[Array, "*axes"], smoothing: Any = None
) -> Float[Array, "*axes"]:
    r"""Softmax cross-entropy with integer labels, at least in float32.

    $$(1 - s)(-\log p_y) - \frac{s}{C} \sum_c \log p_c$$ with label smoothing $s$.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing is None:
        return losses
    return (1 - smoothing) * losses - smoothing * jax.nn.log_softmax(logits).mean(-1)


def _correct(logits: Float[Array, "*axes classes"], labels: Int[Array, "*axes"]) -> Array:
    right = jnp.argmax(logits, axis=-1) == labels
    return right.astype(jnp.promote_types(logits.dtype, jnp.float32))


def classification(
    model: Model, *, pixels: Pixels | None = None, label_smoothing: Any = None,
    dtype: DTypeLike = jnp.float32,
) -> Problem:  # fmt: skip
    """One class per example: softmax cross-entropy, accuracy. Arguments as in `supervised`.

    Labels are smoothed in training only; the test loss is plain cross-entropy.

    Raises:
      ValueError: while tracing, for outputs or targets of other shapes.
    """

    def made(smoothing: Any) -> Problem:
        def loss(logits: Array, labels: Array) -> Array:
            if logits.ndim != 2 or labels.ndim != 1:
                raise ValueError(
                    f"classification: got outputs {logits.shape} and targets {labels.shape}, "
                    "expected [batch, classes] and [batch]; for a class per position use next_token"
                )
            return cross_entropy(logits, labels, smoothing)

        return supervised(
            model, loss, {"accuracy": _correct}, pixels=pixels, dtype=dtype,
            score="accuracy", maximize=True,
        )  # fmt: skip

    return _smoothed(made, label_smoothing)


def _smoothed(made: Callable[[Any], Problem], smoothing: Any) -> Problem:
    """The problem with smoothed labels in training, and without in inference."""
    plain = made(None)
    if smoothing is None:
        return plain
    smooth = made(smoothing)

    def metrics(
        variables: Variables, examples: Examples, rows: Array, train: bool, key: PRNGKeyArray
    ) -> tuple[Metrics, Tree]:
        return (smooth if train else plain).metrics(variables, examples, rows, train, key)

    return plain._replace(metrics=metrics)


def next_token(
    model: Model, *, label_smoothing: Any = None, dtype: DTypeLike = jnp.float32
) -> Problem:
    """One class per position; means run over tokens, and a negative target counts nowhere.

    Raises:
      ValueError: while tracing, for outputs or targets of other shapes.
    """

    def made(smoothing: Any) -> Problem:
        def loss(logits: Array, tokens: Array) -> Array:
            if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
                raise ValueError(
                    f"next_token: got outputs {logits.shape} and targets {tokens.shape}, expected "
                    "[batch, length, vocabulary] and [batch, length]"
                )
            return cross_entropy(logits, jnp.maximum(tokens, 0), smoothing)

        return supervised(
            model, loss, {"accuracy": _correct}, counted=lambda tokens: tokens >= 0, dtype=dtype,
            score="accuracy", maximize=True,
        )  # fmt: skip

    return _smoothed(made, label_smoothing)


def regression(
    model: Model, *, pixels: Pixels | None = None, dtype: DTypeLike = jnp.float32
) -> Problem:
    """Numbers: mean squared error (the loss) and mean absolute error."""

    def residual(outputs: Array, targets: Array) -> Array:
        if outputs.size != targets.size:
            raise ValueError(
                f"regression: got outputs {outputs.shape} and targets {targets.shape}, expected "
                "one output per target"
            )
        return outputs.reshape(targets.shape) - targets

    return supervised(
        model,
        lambda outputs, targets: residual(outputs, targets) ** 2,
        {"absolute_error": lambda outputs, targets: jnp.abs(residual(outputs, targets))},
        pixels=pixels,
        dtype=dtype,
    )


def multilabel(
    model: Model, *, pixels: Pixels | None = None, dtype: DTypeLike = jnp.float32
) -> Problem:
    """Any number of labels per example: sigmoid cross-entropy and accuracy per label."""

    def checked(logits: Array, targets: Array) -> Array:
        if logits.shape != targets.shape:
            raise ValueError(
                f"multilabel: got outputs {logits.shape} and targets {targets.shape}, expected "
                "[batch, labels] for both"
            )
        return targets

    def loss(logits: Array, targets: Array) -> Array:
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        wanted = checked(logits, targets).astype(logits.dtype)
        return optax.sigmoid_binary_cross_entropy(logits, wanted)

    def right(logits: Array, targets: Array) -> Array:
        dtype = jnp.promote_types(logits.dtype, jnp.float32)
        return ((logits > 0) == (targets > 0)).astype(dtype)

    return supervised(
        model, loss, {"accuracy": right}, pixels=pixels, dtype=dtype,
        score="accuracy", maximize=True,
    )  # fmt: skip


def constant(problem: Problem, chosen: Callable[[Tree], frozenset[str]]) -> Problem:
    """The problem with some parameters constant: their gradient is zero.

    Args:
      problem: to be changed.
      chosen: names of the constant parameters, given the parameters; see `matching`.
    """

    def metrics(
        variables: Variables, examples: Examples, rows: Array, train: bool, key: PRNGKeyArray
    ) -> tuple[Metrics, Tree]:
        params = variables.params
        names = chosen(params)
        stopped = {
            name: jax.lax.stop_gradient(leaf) for name, leaf in tree.select(params, names).items()
        }
        variables = variables._replace(params=tree.replace(params, stopped))
        return problem.metrics(variables, examples, rows, train, key)

    return problem._replace(metrics=metrics)
