"""What a batch holds beside the model's inputs, and how its images reach their rows."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from vlmlora.quantization.sharded import BATCH, TENSOR, batch_shards


def model_inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The entries of a batch that the model reads.

    ``labels`` are the loss's. ``attention_mask`` [batch, tokens] tells tokens from padding for generation;
    the model needs none, since rows are padded on the right, where causal attention never looks. Rows that
    hold several samples come with ``segment_ids``, which the model does read.
    """
    return {name: array for name, array in batch.items() if name not in ("labels", "attention_mask")}


def put_image_tokens(
    embeds: Float[Array, "batch tokens d_model"],
    features: Float[Array, "image_tokens d_model"],
    index: Int[Array, "batch tokens"],
    mesh: Mesh | None = None,
) -> Float[Array, "batch tokens d_model"]:
    """Put the vision tower's output where a row's image tokens stand.

    Args:
        embeds: embeddings of the text.
        features: of all images of the batch, one after another.
        index: for an image token, its place in `features`; -1 elsewhere.
        mesh: the devices of a model on many. A row's images may lie on others than the row, so that the
            features of all are gathered once.
    """

    def take(features: jax.Array, index: jax.Array) -> jax.Array:
        return features[jnp.where(index >= 0, index, 0)]

    def gather_and_take(features: jax.Array, index: jax.Array) -> jax.Array:
        return take(jax.lax.all_gather(features, BATCH, tiled=True), index)

    shards = batch_shards(mesh)
    if shards > 1 and index.shape[0] % shards == features.shape[0] % shards == 0:
        rows = P(BATCH)
        found = jax.shard_map(gather_and_take, mesh=mesh, in_specs=(rows, rows), out_specs=rows)(
            features, index
        )
    else:
        found = take(features, index)
    return jnp.where((index >= 0)[..., None], found, embeds)


def attend_on_mesh(
    attend: Callable[..., jax.Array],
    mesh: Mesh | None,
    query: Float[Array, "rows tokens heads head_dim"],
    keys: Float[Array, "rows tokens heads head_dim"],
    values: Float[Array, "rows tokens heads head_dim"],
    *others: PyTree,
) -> Float[Array, "rows tokens heads head_dim"]:
    """``attend(query, keys, values, *others)``, by each device of a mesh for its rows and heads.

    The compiler cuts attention alike by itself, but for what a conditional hands to its backward pass, which
    it gathers, to compute it for all rows on every device.

    Args:
        attend: attention that keeps rows and heads apart.
        mesh: the devices of a model on many; None on a single one.
        query, keys, values: projections.
        others: trees of arrays [rows, ...], of scalars, or None.
    """
    shards = batch_shards(mesh)
    if mesh is None or query.shape[0] % shards:
        return attend(query, keys, values, *others)
    heads = P(BATCH, None, TENSOR if query.shape[2] % mesh.shape[TENSOR] == 0 else None)
    leaves, structure = jax.tree.flatten(others)

    def attend_locally(query: jax.Array, keys: jax.Array, values: jax.Array, *leaves: jax.Array) -> jax.Array:
        return attend(query, keys, values, *jax.tree.unflatten(structure, leaves))

    specs = (heads, heads, heads, *(P(BATCH) if leaf.ndim else P() for leaf in leaves))
    return jax.shard_map(attend_locally, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        query, keys, values, *leaves
    )
