"""Clients that keep a part of the network to themselves."""

from collections.abc import Callable

from jaxtyping import Array

from jaxfed.core.federated import Broadcast, Client, Memory, Sent
from jaxfed.core.local import Work
from jaxfed.core.model import Variables
from jaxfed.core.tree import replace, select, subtract, zeros


def keeping(client: Client, own: Callable[[Variables], frozenset[str]]) -> Client:
    """A client that keeps a part of the network to itself: FedBN, FedPer.

    The kept leaves go on from the client's own values, their message is zero, and the client's
    network is the server's with them in place.

    Args:
      client: whose messages are weights before minus weights after.
      own: `variables -> names` of the leaves that stay, such as `params/out/kernel`; see
        `matching`.

    Example:
      >>> from jaxfed import keeping, matching
      >>> def fedper(client):
      ...     return keeping(client, matching("params/out/*"))

    Source: Li et al. (2021), FedBN; Arivazhagan et al. (2019), FedPer.
    """

    def joined(variables: Variables, leaves: dict[str, Array]) -> Variables:
        return replace(variables, leaves)

    def init(variables: Variables) -> tuple[dict[str, Array], Memory]:
        return select(variables, own(variables)), client.init(variables)

    def update(sent: Broadcast, memory: tuple[dict[str, Array], Memory], work: Work) -> Sent:
        mine, inner = memory
        start = joined(sent.variables, mine)
        got = client.update(sent._replace(variables=start), inner, work)
        trained = Variables(subtract(start.params, got.message), got.stats)
        message = replace({"params": got.message}, zeros(mine))["params"]
        kept = select(trained, frozenset(mine))
        return got._replace(message=message, memory=(kept, got.memory))

    def personal(variables: Variables, memory: tuple[dict[str, Array], Memory]) -> Variables:
        return joined(variables, memory[0])

    return client._replace(init=init, update=update, personal=personal)
