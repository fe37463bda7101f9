"""Many clients at once, and the sums that the server makes of them.

Everything a client contributes is a *sum* (weighted delta, weight, counts), so clients can be
computed one after another, all at once, or in chunks, and chunks added up, with memory for one
chunk only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from jaxfed.core.tree import Tree


def map_sum(
    contribute: Callable[[Any, Any], tuple[Tree, Tree]],
    shared: Any,
    seats: Any,
    chunk: int | None,
    mesh: Mesh | None = None,
    work: Int[Array, " clients"] | None = None,
) -> tuple[Tree, Tree]:
    """Runs `contribute(shared, seat) -> (summands, report)` for every seat of a cohort.

    Evaluation does the same with batches in place of clients.

    Args:
      contribute: pure function of one seat. An empty seat has to contribute zeros. It closes over
        no arrays: what all seats need is passed as `shared`, so that every device has it.
      shared: pytree of arrays.
      seats: pytree of arrays with a leading axis `[clients]`. In integer leaves -1 stands for
        an empty seat or a row of padding.
      chunk: clients computed at once on a device: None for all (vmap), 1 for one after another,
        n for chunks of n; the cohort is filled up with empty seats to a multiple of n.
      mesh: devices that share the clients evenly, whatever the mesh's axes; None is one device.
        Each adds up its own clients; one all-reduce of the sums and one all-gather of the reports
        end the round.
      work: how long each seat takes, in any unit; None if they are alike. Seats that take as long
        share a chunk, which takes as long as its longest, and every device has its share of them.

    Returns:
      The summands added over all clients, and the reports stacked on a leading axis.
    """
    count, devices = jax.tree.leaves(seats)[0].shape[0], 1 if mesh is None else mesh.size
    if work is not None and (devices > 1 or chunk not in (None, 1)):
        return _sorted(contribute, shared, seats, chunk, mesh, work)
    if mesh is None or devices == 1:
        return _sum(lambda seat: contribute(shared, seat), seats, chunk)
    missing = -count % devices
    seats = jax.tree.map(lambda leaf: _filled(leaf, missing), seats)
    axes = mesh.axis_names

    def of_device(shared: Any, seats: Any) -> tuple[Tree, Tree]:
        total, reports = _sum(lambda seat: contribute(shared, seat), seats, chunk)
        summed, total_of = _vectors(total)
        reported, reports_of = _vectors(reports)
        total = total_of(jax.lax.psum(summed, axes))
        reports = jax.vmap(reports_of, axis_size=devices)(jax.lax.all_gather(reported, axes))
        return total, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), reports)

    total, reports = jax.shard_map(
        of_device, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(), check_vma=False
    )(shared, seats)
    return total, jax.tree.map(lambda leaf: leaf[:count], reports)


def _vectors(tree: Tree) -> tuple[list[Array], Callable[[list[Array]], Tree]]:
    """All leaves of a dtype as one vector, and the way back; truth values go with the floats.

    On CPU every array more in a collective operation is another meeting of all devices.
    """
    leaves, structure = jax.tree.flatten(tree)
    kinds = [jnp.dtype(jnp.float32) if leaf.dtype == bool else leaf.dtype for leaf in leaves]
    packed = {
        kind: ravel_pytree([leaf for leaf, k in zip(leaves, kinds, strict=True) if k == kind])
        for kind in dict.fromkeys(kinds)
    }

    def back(vectors: list[Array]) -> Tree:
        parts = {
            kind: iter(unravel(vector))
            for (kind, (_, unravel)), vector in zip(packed.items(), vectors, strict=True)
        }
        return structure.unflatten([next(parts[kind]) for kind in kinds])

    return [vector for vector, _ in packed.values()], back


def _sorted(
    contribute: Callable[[Any, Any], tuple[Tree, Tree]], shared: Any, seats: Any,
    chunk: int | None, mesh: Mesh | None, work: Int[Array, " clients"],
) -> tuple[Tree, Tree]:  # fmt: skip
    """The longest first, and dealt out to the devices in turn."""
    count, devices = work.shape[0], 1 if mesh is None else mesh.size
    missing = -count % devices
    order = jnp.argsort(-_filled(work, missing), stable=True)
    order = order.reshape(-1, devices).T.reshape(-1)
    if mesh is not None:  # or each device would sort its part of them, and all meet once more
        order = jax.lax.with_sharding_constraint(order, NamedSharding(mesh, P()))
    ordered = jax.tree.map(lambda leaf: _filled(leaf, missing)[order], seats)
    total, reports = map_sum(contribute, shared, ordered, chunk, mesh)
    back = jnp.argsort(order)[:count]
    return total, jax.tree.map(lambda leaf: leaf[back], reports)


def _sum(
    contribute: Callable[[Any], tuple[Tree, Tree]], seats: Any, chunk: int | None
) -> tuple[Tree, Tree]:
    count = jax.tree.leaves(seats)[0].shape[0]

    def of_chunk(seats: Any) -> tuple[Tree, Tree]:
        summands, reports = jax.vmap(contribute)(seats)
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), summands), reports

    if chunk is None or chunk >= count:
        return of_chunk(seats)
    chunk = max(chunk, 1)
    missing = -count % chunk
    # One at a time without a batch axis of size one: a smaller program.
    one_chunk = of_chunk if chunk > 1 else contribute
    grouped = seats
    if chunk > 1:
        grouped = jax.tree.map(lambda leaf: _grouped(leaf, missing, chunk), seats)
    shapes = jax.eval_shape(one_chunk, jax.tree.map(lambda leaf: leaf[0], grouped))[0]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: Tree, seats: Any) -> tuple[Tree, Tree]:
        summands, reports = one_chunk(seats)
        return jax.tree.map(jnp.add, total, summands), reports

    total, reports = jax.lax.scan(add, zeros, grouped)
    if chunk > 1:
        reports = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], reports)
    return total, reports


def _grouped(
    leaf: Shaped[Array, "clients ..."], missing: int, chunk: int
) -> Shaped[Array, "chunks chunk ..."]:
    return _filled(leaf, missing).reshape(-1, chunk, *leaf.shape[1:])


def _filled(leaf: Shaped[Array, "clients ..."], missing: int) -> Shaped[Array, "seats ..."]:
    return jnp.concatenate([leaf, jnp.full((missing, *leaf.shape[1:]), -1, leaf.dtype)])
