"""The weighted mean of the clients' messages."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxfed.core.federated import Aggregator, Message
from jaxfed.core.tree import Tree, divide, scale


def mean() -> Aggregator:
    r"""The weighted mean of the messages.

    $$m = \frac{\sum_k w_k m_k}{\sum_k w_k}$$

    Zeros if no client has any weight. Source: McMahan et al. (2017), Algorithm 1; TFF's
    `MeanFactory`.

    Example:
      >>> import jax
      >>> aggregator, key = mean(), jax.random.key(0)
      >>> sums = [aggregator.encode(None, jnp.array(m), jnp.array(w), key)[0]
      ...         for m, w in ((1.0, 3.0), (5.0, 1.0))]
      >>> total = jax.tree.map(lambda a, b: a + b, *sums)
      >>> float(aggregator.decode(None, total, None, key)[0])
      2.0
    """

    def encode(
        state: None, message: Message, weight: Float[Array, ""], key: PRNGKeyArray
    ) -> tuple[Tree, None]:
        del state, key
        return (weight, scale(weight, message)), None

    def decode(
        state: None, summed: Tree, gathered: None, key: PRNGKeyArray
    ) -> tuple[Message, None, dict[str, Array]]:
        del gathered, key
        weight, total = summed
        # TFF divides by 0 if nobody is left; its server then rejects the NaN, to the same effect.
        return divide(total, jnp.where(weight > 0, weight, 1)), state, {}

    return Aggregator(lambda _: None, encode, decode)
