"""Mllama (Llama 3.2 Vision) as Flax modules with Hugging Face's names.

Matches transformers' ``models/mllama/modeling_mllama.py``. The decoder's layers are of two kinds that stand
in one list of the checkpoint: those with self-attention are stacked as ``layers``, those with cross-attention
to the images as ``cross_attention_layers``.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from transformers import MllamaConfig, MllamaTextConfig

from vlmlora.models.mllama.cache import ImageCache, MllamaCache
from vlmlora.models.mllama.vision import VisionModel, gated
from vlmlora.nn.attention import QKV, attention
from vlmlora.nn.cache import KVCache
from vlmlora.nn.linear import Embedding, Linear, apply_to_normed, apply_to_same
from vlmlora.nn.mlp import GatedMLP
from vlmlora.nn.norm import RMSNorm
from vlmlora.nn.rotary import Rotary, apply_rotary, rotary, scaled_inverse_frequencies
from vlmlora.nn.saved import name_for_policies
from vlmlora.nn.stack import (
    SAVE_ALL,
    LayerList,
    Remat,
    TowerRemats,
    add_attended,
    last_layer,
    scan_layers,
    scan_mixed_layers,
)
from vlmlora.nn.switch import switch_saving
from vlmlora.nn.tail import Tail
from vlmlora.nn.variables import parameter

EXTRA_EMBEDDINGS = 8
"""Rows of the embedding table beyond the head's vocabulary; the image token is one of them."""

_SELF, _CROSS = 0, 1


class SelfAttention(nnx.Module):
    """Causal grouped-query attention of the decoder."""

    def __init__(self, config: MllamaTextConfig, *, dtype: DTypeLike, stack: int):
        self.head_dim = config.hidden_size // config.num_attention_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * self.head_dim
        shared = {"bias": False, "dtype": dtype, "stack": stack}
        self.q_proj = Linear(width, width, **shared)
        self.k_proj = Linear(width, kv_width, **shared)
        self.v_proj = Linear(width, kv_width, **shared)
        self.o_proj = Linear(width, width, **shared)

    def add_to(
        self,
        x: Float[Array, "batch tokens hidden"],
        norm: nnx.Module,
        rotary: Rotary,
        *,
        cache: KVCache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], tuple[jax.Array, jax.Array]]:
        """``x + attention(norm(x))``, within the row or to one layer's `cache` too.

        Also returns the tokens' keys and values.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        x, projected = apply_to_normed(norm, x, self.q_proj, self.k_proj, self.v_proj, key=key)
        query, keys, values = (each.reshape(heads) for each in projected)
        query, keys = apply_rotary(query, rotary), apply_rotary(keys, rotary)
        if cache is None:
            out = attention(query, keys, values, is_causal=True)
        else:
            filled = cache.append(keys, values)
            out = attention(query, filled.keys, filled.values, mask=filled.mask(query.shape[1]))
        return add_attended(x, self.o_proj(out.reshape(x.shape), key=key)), (keys, values)


class CrossAttention(nnx.Module):
    """Attention of text tokens to the images' features."""

    def __init__(self, config: MllamaTextConfig, *, dtype: DTypeLike, stack: int):
        self.head_dim = config.hidden_size // config.num_attention_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * self.head_dim
        shared = {"dtype": dtype, "stack": stack}
        self.q_proj = Linear(width, width, bias=False, **shared)
        self.k_proj = Linear(width, kv_width, bias=False, **shared)
        self.v_proj = Linear(width, kv_width, bias=False, **shared)
        self.o_proj = Linear(width, width, bias=False, **shared)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps, **shared)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps, **shared)

    def project(
        self, features: Float[Array, "batch image_tokens hidden"], *, key: PRNGKeyArray | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the images, each [batch, image_tokens, kv_heads, head_dim]."""
        heads = (*features.shape[:2], -1, self.head_dim)
        projected = apply_to_same(features, self.k_proj, self.v_proj, key=key)
        keys, values = (name_for_policies(each, QKV).reshape(heads) for each in projected)
        return self.k_norm(keys), values

    def beside(
        self,
        x: Float[Array, "batch tokens hidden"],
        norm: nnx.Module,
        keys: Float[Array, "batch image_tokens kv_heads head_dim"],
        values: Float[Array, "batch image_tokens kv_heads head_dim"],
        sight: "Sight",
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], Float[Array, "batch tokens hidden"]]:
        """x, and what ``norm(x)`` attends to: the tiles that each token sees."""
        x, (query,) = apply_to_normed(norm, x, self.q_proj, key=key)
        query = self.q_norm(name_for_policies(query, QKV).reshape(*x.shape[:2], -1, self.head_dim))
        return x, self.o_proj(sight.attend(query, keys, values).reshape(x.shape), key=key)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["in_span", "num_tiles", "fills_canvases"],
    meta_fields=["max_tiles"],
)
@dataclass(frozen=True)
class Sight:
    """Which tiles of the images each token sees.

    A token sees the tiles of the images in whose span it stands. One that stands in none sees all tiles of
    its row's images, unfilled ones included, as in transformers; but its feed-forward block adds nothing.

    Attributes:
        in_span: whether a token stands in the span of each image.
        num_tiles: filled tiles of each image of a row; 0 where there is no image.
        fills_canvases: whether every image has all tiles filled.
        max_tiles: tiles of every image.
    """

    in_span: Bool[Array, "batch tokens images"]
    num_tiles: Int[Array, "batch images"]
    fills_canvases: Bool[Array, ""]
    max_tiles: int

    @classmethod
    def of(
        cls,
        position_ids: Int[Array, "batch tokens"],
        image_spans: Int[Array, "batch images 2"],
        num_tiles: Int[Array, "batch images"],
        max_tiles: int,
    ) -> "Sight":
        """What tokens at these positions see."""
        positions = position_ids[:, :, None]
        starts, ends = image_spans[:, None, :, 0], image_spans[:, None, :, 1]
        in_span = (positions >= starts) & (positions < ends) & (num_tiles > 0)[:, None]
        return cls(in_span, num_tiles, jnp.all(num_tiles == max_tiles), max_tiles)

    @property
    def sees(self) -> Bool[Array, "batch tokens 1"]:
        """Whether a token stands in the span of an image."""
        return self.in_span.any(-1, keepdims=True)

    @property
    def has_image(self) -> Bool[Array, "batch 1 1"]:
        """Whether the row has an image."""
        return (self.num_tiles > 0).any(-1)[:, None, None]

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """Attention over the tiles in sight. Of queries and keys policies know what is not yet normalised."""
        attend = functools.partial(attention, is_named=False)
        images = self.num_tiles.shape[1]
        patches = keys.shape[1] // (images * self.max_tiles)
        if images > 1:
            return attend(query, keys, values, mask=self._mask(patches))
        # Of one image a token sees the first tiles or all, and neither needs an array of tokens × patches.
        filled = jnp.maximum(self.num_tiles[:, 0], 1) * patches
        seen = attend(query, keys, values, kv_lengths=filled.astype(jnp.int32))

        @jax.checkpoint  # What is kept of a branch takes room in layers of every kind.
        def with_all_tiles(sees: jax.Array, operands: tuple[jax.Array, ...]) -> jax.Array:
            seen, *projections = operands
            return jnp.where(sees, seen, attend(*projections))

        # Where every canvas is full the two are the same.
        return switch_saving(
            [with_all_tiles, lambda _, operands: operands[0]],
            self.fills_canvases.astype(jnp.int32),
            self.sees[..., None],
            (seen, query, keys, values),
            named_primitives={},
        )

    def _mask(self, patches: int) -> Bool[Array, "batch tokens image_tokens"]:
        filled = jnp.arange(self.max_tiles) < self.num_tiles[:, :, None]
        in_sight = self.in_span[..., None] & filled[:, None]
        exists = jnp.broadcast_to((self.num_tiles > 0)[:, None, :, None], in_sight.shape)
        tiles = jnp.where(self.sees[..., None], in_sight, exists)
        return jnp.repeat(tiles.reshape(*tiles.shape[:2], -1), patches, axis=-1)


class SelfAttentionLayer(nnx.Module):
    """Pre-norm decoder layer with self-attention."""

    def __init__(self, config: MllamaTextConfig, numbers: tuple[int, ...], *, dtype: DTypeLike):
        self.stack = len(numbers)
        self.layer_list = LayerList("layers", numbers)
        shared = {"dtype": dtype, "stack": self.stack}
        self.self_attn = SelfAttention(config, **shared)
        self.mlp = _mlp(config, **shared)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **shared)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **shared)

    def __call__(
        self, x: jax.Array, rotary: Rotary, *, cache: KVCache | None, key: PRNGKeyArray | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attention and MLP, each with a residual connection; also the new tokens' keys and values."""
        x, new = self.attend(x, rotary, cache=cache, key=key)
        return self.feed_forward(x, key=key), new

    def attend(
        self, x: jax.Array, rotary: Rotary, *, cache: KVCache | None, key: PRNGKeyArray | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The first half, with its residual connection."""
        return self.self_attn.add_to(x, self.input_layernorm, rotary, cache=cache, key=key)

    def feed_forward(self, x: jax.Array, *, key: PRNGKeyArray | None = None) -> jax.Array:
        """The second half, with its residual connection; every token by itself."""
        return self.mlp.add_to(x, self.post_attention_layernorm, key=key)


class CrossAttentionLayer(nnx.Module):
    """Pre-norm decoder layer with gated cross-attention."""

    def __init__(self, config: MllamaTextConfig, numbers: tuple[int, ...], *, dtype: DTypeLike):
        self.stack = len(numbers)
        self.layer_list = LayerList("layers", numbers)
        shared = {"dtype": dtype, "stack": self.stack}
        self.cross_attn = CrossAttention(config, **shared)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **shared)
        self.cross_attn_attn_gate = parameter((1,), dtype, stack=self.stack, init="zeros")
        self.mlp = _mlp(config, **shared)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **shared)
        self.cross_attn_mlp_gate = parameter((1,), dtype, stack=self.stack, init="zeros")

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        keys: Float[Array, "batch image_tokens kv_heads head_dim"],
        values: Float[Array, "batch image_tokens kv_heads head_dim"],
        sight: Sight,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        """Attention and MLP, each gated and with a residual connection; a row without an image stays."""
        x, attended = self.cross_attn.beside(x, self.input_layernorm, keys, values, sight, key=key)
        x = add_attended(x, gated(self.cross_attn_attn_gate, jnp.where(sight.has_image, attended, 0)))
        x, hidden = self.mlp.beside(x, self.post_attention_layernorm, key=key)
        return x + gated(self.cross_attn_mlp_gate, jnp.where(sight.sees, hidden, 0))


class TextModel(nnx.Module):
    """The decoder: embeddings, layers of two kinds, and the final norm.

    Raises:
        ValueError: a cross-attention layer that there is not, or no self-attention layer.
    """

    def __init__(self, config: MllamaTextConfig, *, max_tiles: int, dtype: DTypeLike):
        _check_config(config)
        crossing = sorted(set(config.cross_attention_layers))
        numbers = range(config.num_hidden_layers)
        self.order = tuple(_CROSS if number in crossing else _SELF for number in numbers)
        self.max_tiles = max_tiles
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.rope_parameters = tuple(sorted(config.rope_parameters.items()))
        self.embed_tokens = Embedding(config.vocab_size + EXTRA_EMBEDDINGS, config.hidden_size, dtype=dtype)
        self.layers = SelfAttentionLayer(config, tuple(n for n in numbers if n not in crossing), dtype=dtype)
        self.cross_attention_layers = nnx.data(
            CrossAttentionLayer(config, tuple(crossing), dtype=dtype) if crossing else None
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        inputs_embeds: Float[Array, "batch tokens hidden"],
        position_ids: Int[Array, "batch tokens"],
        features: Float[Array, "batch image_tokens hidden"] | None = None,
        image_spans: Int[Array, "batch images 2"] | None = None,
        num_tiles: Int[Array, "batch images"] | None = None,
        *,
        cache: MllamaCache | None = None,
        remat: Remat | None = None,
        key: PRNGKeyArray | None = None,
        is_unfinished: bool = False,
    ) -> tuple[Float[Array, "batch tokens hidden"], MllamaCache | None]:
        """Embeddings → final hidden states, or what comes before the tail; the cache where one was given.

        Args:
            inputs_embeds: of the tokens.
            position_ids: place of every token in its row.
            features: of each row's images, side by side; None: those in the cache, if there are any.
            image_spans: see `MllamaForConditionalGeneration.__call__`.
            num_tiles: filled tiles of each image of a row; 0 where there is no image.
            cache: keys and values of earlier tokens and of images.
            remat: wraps the body of the layers' scan.
            key: for adapter dropout.
            is_unfinished: leave out the tail, if there is one.
        """
        angles = rotary(position_ids, scaled_inverse_frequencies(self.head_dim, dict(self.rope_parameters)))
        image_key, layer_key = (None, None) if key is None else jax.random.split(key)
        if self.cross_attention_layers is None:
            features = None
        if cache is not None and features is not None:
            keys, values = self._project(features, image_key)
            cache = MllamaCache(cache.text, ImageCache(keys, values, image_spans, num_tiles))
        images = None if cache is None else cache.images
        if images is not None:
            image_spans, num_tiles = images.image_spans, images.num_tiles
        has_images = features is not None or images is not None
        sight = Sight.of(position_ids, image_spans, num_tiles, self.max_tiles) if has_images else None

        def attend_to_text(layer, x, _, constant, arrays, *, key):
            angles, marks, _ = constant
            x, new = layer(x, angles, cache=None if marks is None else KVCache(*arrays, *marks), key=key)
            return x, None if marks is None else new

        def attend_to_images(layer, x, features, constant, arrays, *, key):
            _, marks, sight = constant
            keys, values = layer.cross_attn.project(features, key=key) if arrays is None else arrays
            x = layer(x, keys, values, sight, key=key)
            nothing = jnp.zeros((*x.shape[:2], self.num_key_value_heads, self.head_dim), x.dtype)
            return x, None if marks is None else (nothing, nothing)

        order = [kind for kind in self.order if kind == _SELF or has_images]
        is_unfinished = is_unfinished and self.has_tail
        if is_unfinished:
            order = order[:-1]
        x, new = scan_mixed_layers(
            [self.layers, *([self.cross_attention_layers] if has_images else [])],
            inputs_embeds,
            [attend_to_text, attend_to_images][: 1 + has_images],
            order=order,
            shared=features if images is None else None,
            constant=(angles, None if cache is None else (cache.text.filled, cache.text.index), sight),
            per_layer=None
            if cache is None
            else [
                (cache.text.keys, cache.text.values),
                *([(images.keys, images.values)] if has_images else []),
            ],
            key=layer_key,
            remat=remat,
        )
        if is_unfinished:
            last_key = None if layer_key is None else jax.random.fold_in(layer_key, len(order))
            return last_layer(self.layers).attend(x, angles, cache=None, key=last_key)[0], None
        if cache is not None:
            steps = jnp.array([step for step, kind in enumerate(order) if kind == _SELF])
            text = cache.text.append(*(array[steps] for array in new))
            cache = MllamaCache(text.advance(text.keys, text.values, x.shape[1]), images)
        return self.norm(x), cache

    @property
    def has_tail(self) -> bool:
        """Whether the last layer's feed-forward block is of each token alone: not of what it sees."""
        return self.order[-1] == _SELF

    def _project(
        self, features: Float[Array, "batch image_tokens hidden"], key: PRNGKeyArray | None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the images in every cross-attention layer, stacked."""

        def call(layer, features, _, *, key):
            return features, layer.cross_attn.project(features, key=key)

        return scan_layers(self.cross_attention_layers, features, call, key=key)[1]


class MllamaModel(nnx.Module):
    """Vision tower, projector and decoder."""

    def __init__(self, config: MllamaConfig, *, dtype: DTypeLike):
        vision, text = config.vision_config, config.text_config
        self.vision_model = VisionModel(vision, dtype=dtype)
        self.language_model = TextModel(text, max_tiles=vision.max_num_tiles, dtype=dtype)
        self.multi_modal_projector = Linear(vision.vision_output_dim, text.hidden_size, dtype=dtype)


class MllamaForConditionalGeneration(nnx.Module):
    """Mllama with its language-model head.

    The head is never tied to the embeddings, which have more rows (as in transformers).

    Args:
        config: transformers' config.
        dtype: type of the dense parameters and of the computation.

    Raises:
        ValueError: the config contradicts itself, or asks for a kind of scaled rotary positions that is not
            supported.
    """

    def __init__(self, config: MllamaConfig, *, dtype: DTypeLike):
        text = config.text_config
        self.model = MllamaModel(config, dtype=dtype)
        self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False, dtype=dtype)

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        position_ids: Int[Array, "batch tokens"],
        pixel_values: Float[Array, "images tiles channels height width"] | None = None,
        aspect_ratio_ids: Int[Array, " images"] | None = None,
        num_tiles: Int[Array, " images"] | None = None,
        image_index: Int[Array, "batch row_images"] | None = None,
        image_spans: Int[Array, "batch row_images 2"] | None = None,
        *,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        cache: MllamaCache | None = None,
        remat: TowerRemats = SAVE_ALL,
        key: PRNGKeyArray | None = None,
        is_unfinished: bool = False,
    ) -> tuple[Float[Array, "batch tokens hidden"], MllamaCache | None]:
        """Final hidden states (`logits` turns them into logits), and the cache where one was given.

        A row's result does not depend on the other rows. One without an image is that of a batch without
        images in transformers, where the cross-attention layers are left out.

        Args:
            input_ids: token ids, padded on the right.
            position_ids: place of every token in its row.
            pixel_values: the batch's images, in tiles; see `VisionModel`.
            aspect_ratio_ids: the canvas of every image.
            num_tiles: filled tiles of every image.
            image_index: the images of each row, by their place in `pixel_values`; -1 for none.
            image_spans: the positions, from the first to before the second, of the tokens that see each image
                of a row. Generated tokens see those whose span reaches as far.
            segment_ids: packed rows, which are refused.
            cache: keys and values of earlier tokens; of images, once they were given with some tokens.
            remat: wraps the body of each tower's scans over its layers.
            key: for adapter dropout.
            is_unfinished: give the residual stream after the last attention, for `tail`, if there is one. The
                backward pass begins there, so that `remat` does not apply to this attention. Without a cache.

        Raises:
            NotImplementedError: `segment_ids` is given.
        """
        if segment_ids is not None:
            raise NotImplementedError(
                "rows that hold several samples (segment_ids) are not supported for mllama, whose tokens see "
                "images through cross-attention; put one sample into a row"
            )
        vision_key, text_key = (None, None) if key is None else jax.random.split(key)
        features = row_tiles = None
        if pixel_values is not None:
            features = self.model.vision_model(
                pixel_values, aspect_ratio_ids, num_tiles, remat=remat.vision, key=vision_key
            )
            features = self.model.multi_modal_projector(features)
            features = _of_rows(features, image_index)
            row_tiles = jnp.where(image_index >= 0, num_tiles[image_index], 0)
        return self.model.language_model(
            self.model.language_model.embed_tokens(input_ids),
            position_ids,
            features,
            image_spans,
            row_tiles,
            cache=cache,
            remat=remat.language,
            key=text_key,
            is_unfinished=is_unfinished,
        )

    def tail(self) -> Tail | None:
        """What turns an unfinished result into logits, one token at a time; None if the last layer cannot."""
        text = self.model.language_model
        return Tail(text.layers, text.norm, self.lm_head) if text.has_tail else None

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Logits of final hidden states."""
        return self.lm_head(hidden)

    def init_cache(self, batch: int, length: int) -> MllamaCache:
        """An empty cache for `batch` rows of `length` tokens, in the type of the embeddings."""
        text = self.model.language_model
        dtype = text.embed_tokens.weight.get_value().dtype
        return MllamaCache(
            KVCache.empty(
                text.layers.stack, batch, length, text.num_key_value_heads, text.head_dim, dtype=dtype
            )
        )


def _of_rows(
    features: Float[Array, "images tiles patches hidden"], image_index: Int[Array, "batch row_images"]
) -> Float[Array, "batch image_tokens hidden"]:
    """Each row's images side by side, zeros where there is none."""
    # A sum over images, since the gradient of indexing would add them up one after another. As a product the
    # compiler would pad the images to eight: of two images four times the features.
    picks = image_index[..., None] == jnp.arange(features.shape[0])
    rows = jnp.where(picks[..., None, None, None], features, 0).sum(axis=2, dtype=features.dtype)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _mlp(config: MllamaTextConfig, *, dtype: DTypeLike, stack: int) -> GatedMLP:
    return GatedMLP(
        config.hidden_size,
        config.intermediate_size,
        hidden_act=config.hidden_act,
        bias=False,
        dtype=dtype,
        stack=stack,
    )


def _check_config(config: MllamaTextConfig) -> None:
    layers = config.cross_attention_layers
    if outside := [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]:
        raise ValueError(
            f"text_config.cross_attention_layers={list(layers)}: there is no layer "
            f"{', '.join(map(str, outside))} among {config.num_hidden_layers}"
        )
    if len(set(layers)) == config.num_hidden_layers:
        raise ValueError("text_config.cross_attention_layers names every layer; one must have self-attention")
    scaled_inverse_frequencies(2, config.rope_parameters)
