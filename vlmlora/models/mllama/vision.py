"""Mllama's vision tower: tiles of an image through a transformer and a gated, global one.

Matches transformers' ``models/mllama/modeling_mllama.py``.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from transformers import MllamaVisionConfig

from vlmlora.nn.attention import attention, hide_keys
from vlmlora.nn.linear import Embedding, Linear, apply_to_normed
from vlmlora.nn.mlp import MLP
from vlmlora.nn.norm import LayerNorm
from vlmlora.nn.stack import Remat, add_attended, scan_layers_and_keep
from vlmlora.nn.variables import parameter
from vlmlora.quantization.weights import DenseWeight

# The number of a tile's patches is padded to a multiple of this.
_PATCH_MULTIPLE = 8


def gated(gate: nnx.Variable, x: jax.Array) -> jax.Array:
    """``tanh(gate) * x`` in the type of `x`."""
    return jnp.tanh(gate.get_value().astype(x.dtype)) * x


class PatchEmbedding(nnx.Module):
    """The convolution that embeds a tile's patches; its stride is its kernel, and it has no bias."""

    def __init__(self, config: MllamaVisionConfig, *, dtype: DTypeLike):
        self.patch_size = config.patch_size
        shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
        self.weight = parameter(shape, dtype, stack=None, init="normal")

    def __call__(
        self, tiles: Float[Array, "*batch channels height width"]
    ) -> Float[Array, "*batch patches hidden"]:
        """Cut every tile into patches, row by row, and embed them."""
        kernel = self.weight.get_value()
        *batch, channels, height, width = tiles.shape
        size = self.patch_size
        grid = tiles.reshape(*batch, channels, height // size, size, width // size, size)
        patches = jnp.moveaxis(grid, (-5, -3, -1), (-3, -2, -1))
        patches = patches.reshape(*batch, -1, channels * size * size).astype(kernel.dtype)
        return patches @ DenseWeight(kernel.reshape(kernel.shape[0], -1))


class AspectRatioEmbedding(nnx.Module):
    """An embedding of a tile's place in its image, gated."""

    def __init__(self, config: MllamaVisionConfig, *, dtype: DTypeLike):
        self.shape = (config.max_num_tiles, 1, config.hidden_size)
        self.embedding = Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * config.hidden_size, dtype=dtype
        )
        self.gate = parameter((1,), dtype, stack=None, init="zeros")

    def __call__(
        self, x: Float[Array, "images tiles patches hidden"], aspect_ratio_ids: Int[Array, " images"]
    ) -> Float[Array, "images tiles patches hidden"]:
        """Add the embedding to every patch of a tile."""
        return x + gated(self.gate, self.embedding(aspect_ratio_ids).reshape(-1, *self.shape).astype(x.dtype))


class PositionEmbedding(nnx.Module):
    """An embedding of a patch's place in its tile, and one of its place in its image; a gate mixes them."""

    def __init__(self, config: MllamaVisionConfig, *, dtype: DTypeLike):
        patches = num_patches(config)
        self.shape = (config.max_num_tiles, patches, config.hidden_size)
        self.gate = parameter((1,), dtype, stack=None, init="zeros")
        self.embedding = parameter((patches, config.hidden_size), dtype, stack=None, init="normal")
        self.tile_embedding = Embedding(
            config.max_aspect_ratio_id + 1,
            config.max_num_tiles * patches * config.hidden_size,
            dtype=dtype,
        )

    def __call__(
        self, x: Float[Array, "images tiles patches hidden"], aspect_ratio_ids: Int[Array, " images"]
    ) -> Float[Array, "images tiles patches hidden"]:
        """Add both embeddings."""
        place = self.embedding.get_value().astype(x.dtype)
        tiles = self.tile_embedding(aspect_ratio_ids).reshape(-1, *self.shape).astype(x.dtype)
        return x + (place - gated(self.gate, place)) + gated(self.gate, tiles)


class VisionAttention(nnx.Module):
    """Multi-head attention over all patches of an image's tiles."""

    def __init__(self, config: MllamaVisionConfig, *, dtype: DTypeLike, stack: int):
        self.head_dim = config.hidden_size // config.attention_heads
        shared = {"bias": False, "dtype": dtype, "stack": stack}
        self.q_proj = Linear(config.hidden_size, config.hidden_size, **shared)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, **shared)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, **shared)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, **shared)

    def beside(
        self,
        x: Float[Array, "images patches hidden"],
        norm: nnx.Module,
        is_padding: Bool[Array, "images patches"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "images patches hidden"], Float[Array, "images patches hidden"]]:
        """x, and what ``norm(x)`` attends to: all patches, padding not to padding (transformers' mask)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        x, projected = apply_to_normed(norm, x, self.q_proj, self.k_proj, self.v_proj, key=key)
        query, keys, values = (each.reshape(heads) for each in projected)
        query, keys, values = hide_keys(query, keys, values, is_padding, is_padding)
        out = attention(query, keys, values, scale=self.head_dim**-0.5)
        return x, self.o_proj(out[..., : self.head_dim].reshape(x.shape), key=key)


class VisionEncoderLayer(nnx.Module):
    """Pre-norm transformer block, whose two residual branches may have gates."""

    def __init__(self, config: MllamaVisionConfig, *, is_gated: bool, dtype: DTypeLike, stack: int):
        self.stack = stack
        shared = {"dtype": dtype, "stack": stack}
        self.self_attn = VisionAttention(config, **shared)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, hidden_act=config.hidden_act, **shared)
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.norm_eps, **shared)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.norm_eps, **shared)
        self.is_gated = is_gated
        if is_gated:
            self.gate_attn = parameter((1,), dtype, stack=stack, init="ones")
            self.gate_ffn = parameter((1,), dtype, stack=stack, init="ones")

    def __call__(
        self, x: jax.Array, is_padding: jax.Array, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "images patches hidden"]:
        """Attention and MLP, each with a residual connection."""
        x, attended = self.self_attn.beside(x, self.input_layernorm, is_padding, key=key)
        x = add_attended(x, gated(self.gate_attn, attended) if self.is_gated else attended)
        x, hidden = self.mlp.beside(x, self.post_attention_layernorm, key=key)
        return x + (gated(self.gate_ffn, hidden) if self.is_gated else hidden)


class VisionEncoder(nnx.Module):
    """A stack of blocks."""

    def __init__(self, config: MllamaVisionConfig, layers: int, *, is_gated: bool, dtype: DTypeLike):
        self.layers = VisionEncoderLayer(config, is_gated=is_gated, dtype=dtype, stack=layers)

    def __call__(
        self,
        x: Float[Array, "images patches hidden"],
        is_padding: Bool[Array, "images patches"],
        keep: tuple[int, ...] = (),
        *,
        remat: Remat | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "images patches hidden"], Float[Array, "kept images patches hidden"]]:
        """The last block's output, and those of the blocks in `keep`."""

        def call(layer, x, _, *, key):
            return layer(x, is_padding, key=key), None

        return scan_layers_and_keep(self.layers, x, call, keep, key=key, remat=remat)


class VisionModel(nnx.Module):
    """The vision tower.

    Raises:
        ValueError: an image's or patch's sides differ, or its output is not as wide as the config says.
    """

    def __init__(self, config: MllamaVisionConfig, *, dtype: DTypeLike):
        _check_config(config)
        self.intermediate_layers = tuple(config.intermediate_layers_indices)
        self.patch_embedding = PatchEmbedding(config, dtype=dtype)
        self.class_embedding = parameter((config.hidden_size,), dtype, stack=None, init="normal")
        self.gated_positional_embedding = PositionEmbedding(config, dtype=dtype)
        self.pre_tile_positional_embedding = AspectRatioEmbedding(config, dtype=dtype)
        self.post_tile_positional_embedding = AspectRatioEmbedding(config, dtype=dtype)
        self.layernorm_pre = LayerNorm(config.hidden_size, eps=1e-5, dtype=dtype)
        self.layernorm_post = LayerNorm(config.hidden_size, eps=1e-5, dtype=dtype)
        self.transformer = VisionEncoder(config, config.num_hidden_layers, is_gated=False, dtype=dtype)
        self.global_transformer = VisionEncoder(config, config.num_global_layers, is_gated=True, dtype=dtype)

    def __call__(
        self,
        pixel_values: Float[Array, "images tiles channels height width"],
        aspect_ratio_ids: Int[Array, " images"],
        num_tiles: Int[Array, " images"],
        *,
        remat: Remat | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "images tiles patches features"]:
        """Images to features of their patches, a class token before those of each tile.

        Args:
            pixel_values: the tiles of every image; those after its `num_tiles` are zero.
            aspect_ratio_ids: the canvas that an image was cut from, from 1; 0 for none.
            num_tiles: tiles of every image.
            remat: wraps the body of the layers' scans.
            key: for adapter dropout.

        Returns:
            For each patch the output of the global transformer, then for each of its features the outputs of
            the intermediate layers.
        """
        x = self.patch_embedding(pixel_values)
        x = self.pre_tile_positional_embedding(x, aspect_ratio_ids)
        images, tiles, patches, hidden = x.shape
        first = jnp.broadcast_to(self.class_embedding.get_value().astype(x.dtype), (images, tiles, 1, hidden))
        x = jnp.concatenate([first, x], axis=2)
        x = self.layernorm_pre(self.gated_positional_embedding(x, aspect_ratio_ids))

        patches += 1
        padded = -(-patches // _PATCH_MULTIPLE) * _PATCH_MULTIPLE
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - patches), (0, 0)))
        shape = x.shape
        is_padding = (jnp.arange(tiles)[:, None] >= jnp.maximum(num_tiles, 1)[:, None, None]) | (
            jnp.arange(padded) >= patches
        )
        is_padding = is_padding.reshape(images, -1)
        first_key, second_key = (None, None) if key is None else jax.random.split(key)
        x, kept = self.transformer(
            x.reshape(images, -1, hidden),
            is_padding,
            self.intermediate_layers,
            remat=remat,
            key=first_key,
        )
        x = self.post_tile_positional_embedding(self.layernorm_post(x).reshape(shape), aspect_ratio_ids)
        x, _ = self.global_transformer(x.reshape(images, -1, hidden), is_padding, remat=remat, key=second_key)
        kept = jnp.moveaxis(kept, 0, -1).reshape(*shape[:3], -1)
        return jnp.concatenate([x.reshape(shape), kept], axis=-1)[:, :, :patches]


def num_patches(config: MllamaVisionConfig) -> int:
    """Patches of a tile, the class token included."""
    return (config.image_size // config.patch_size) ** 2 + 1


def _check_config(config: MllamaVisionConfig) -> None:
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ValueError(f"vision_config.{name}={getattr(config, name)!r}: it must be one number")
    if not config.intermediate_layers_indices:
        raise ValueError("vision_config.intermediate_layers_indices is empty; it must name a layer")
    width = config.hidden_size * (1 + len(config.intermediate_layers_indices))
    if config.vision_output_dim != width:
        raise ValueError(
            f"vision_config.vision_output_dim={config.vision_output_dim}, but the tower's output and its "
            f"{len(config.intermediate_layers_indices)} intermediate layers make {width} features"
        )
