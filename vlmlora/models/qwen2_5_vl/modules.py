"""Qwen2.5-VL as Flax modules with Hugging Face's names.

Matches transformers' ``models/qwen2_5_vl/modeling_qwen2_5_vl.py``. Repeated layers are one module whose
arrays have a leading layer axis.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray
from transformers import PreTrainedConfig

from vlmlora.nn.attention import attention, attention_by_flag
from vlmlora.nn.batch import attend_on_mesh, put_image_tokens
from vlmlora.nn.cache import KVCache
from vlmlora.nn.linear import Embedding, Linear, apply_to_normed
from vlmlora.nn.mlp import GatedMLP, gelu
from vlmlora.nn.norm import RMSNorm
from vlmlora.nn.rotary import Rotary, apply_rotary, axial_rotary, inverse_frequencies, multimodal_rotary
from vlmlora.nn.segments import Segments
from vlmlora.nn.stack import SAVE_ALL, Remat, TowerRemats, add_attended, last_layer, scan_layers
from vlmlora.nn.tail import Tail, apply_head
from vlmlora.nn.variables import parameter
from vlmlora.quantization.sharded import layout_of
from vlmlora.quantization.weights import DenseWeight


class PatchEmbed(nnx.Module):
    """Linear embedding of flattened patches; its kernel is stored as the convolution that it is."""

    def __init__(self, config, width: int, *, dtype: DTypeLike):
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = PatchConv(config.in_channels, width, kernel, dtype=dtype)

    def __call__(
        self, pixel_values: Float[Array, "rows patches values"]
    ) -> Float[Array, "rows patches hidden"]:
        """Embed every patch."""
        return self.proj(pixel_values)


class PatchConv(nnx.Module):
    """A convolution whose stride is its kernel, applied to patches that are already cut out."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...], *, dtype: DTypeLike):
        self.weight = parameter((out_channels, in_channels, *kernel), dtype, stack=None, init="normal")

    def __call__(self, patches: Float[Array, "*batch values"]) -> Float[Array, "*batch hidden"]:
        """Multiply each flattened patch by the flattened kernel."""
        kernel = self.weight.get_value()
        return patches.astype(kernel.dtype) @ DenseWeight(kernel.reshape(kernel.shape[0], -1))


class VisionAttention(nnx.Module):
    """Multi-head attention with rotary positions; the tower says which patches see each other."""

    def __init__(self, width: int, num_heads: int, *, dtype: DTypeLike, stack: int):
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.qkv = Linear(width, 3 * width, bias=True, dtype=dtype, stack=stack)
        self.proj = Linear(width, width, bias=True, dtype=dtype, stack=stack)

    def add_to(
        self,
        x: Float[Array, "rows patches hidden"],
        norm: nnx.Module,
        rotary: Rotary,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "rows patches hidden"]:
        """``x + attention(norm(x))``.

        It projects, calls ``attend(query, keys, values)``, each [rows, patches, heads, head_dim], and
        projects.
        """
        x, (qkv,) = apply_to_normed(norm, x, self.qkv, key=key)
        qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        # Gradients of parts that are split off stand side by side; those of parts by their index are padded
        # and added.
        query, keys, values = (each.squeeze(2) for each in jnp.split(qkv, 3, axis=2))
        query, keys = apply_rotary(query, rotary), apply_rotary(keys, rotary)
        return add_attended(x, self.proj(attend(query, keys, values).reshape(x.shape), key=key))


class VisionBlock(nnx.Module):
    """Pre-norm transformer block of the vision tower, of norms and an MLP of any kind."""

    def __init__(
        self, norm1: nnx.Module, norm2: nnx.Module, attn: VisionAttention, mlp: nnx.Module, *, stack: int
    ):
        self.stack = stack
        self.norm1 = norm1
        self.norm2 = norm2
        self.attn = attn
        self.mlp = mlp

    def __call__(self, x, rotary: Rotary, attend: Callable, *, key: PRNGKeyArray | None = None):
        """Attention and MLP, each with a residual connection."""
        x = self.attn.add_to(x, self.norm1, rotary, attend, key=key)
        return self.mlp.add_to(x, self.norm2, key=key)


class PatchMerger(nnx.Module):
    """Joins each square of neighbouring patches into one token of the language model."""

    def __init__(self, ln_q: nnx.Module, width: int, out_features: int, *, dtype: DTypeLike):
        self.ln_q = ln_q
        self.mlp = MergerMLP(width, out_features, dtype=dtype)
        self.width = width

    def __call__(self, x: Float[Array, "rows patches hidden"]) -> Float[Array, "rows tokens d_model"]:
        """Normalise, concatenate and project."""
        x = self.ln_q(x)
        return self.mlp(x.reshape(x.shape[0], -1, self.width))


class MergerMLP(nnx.Module):
    """Two linear layers, numbered as in the checkpoint."""

    def __init__(self, width: int, out_features: int, *, dtype: DTypeLike):
        setattr(self, "0", Linear(width, width, bias=True, dtype=dtype))
        setattr(self, "2", Linear(width, out_features, bias=True, dtype=dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``linear(gelu(linear(x)))``."""
        return getattr(self, "2")(gelu(getattr(self, "0")(x)))


class VisionTower(nnx.Module):
    """Vision transformer in which every patch sees all patches of its frame.

    Args:
        patch_embed: patches → the tower's width.
        blocks: the stacked layers.
        merger: the tower's width → tokens of the language model.
        theta: base of the rotary frequencies.

    Attributes:
        has_gaps: whether a frame's patches may have empty slots among them.
    """

    has_gaps = False

    def __init__(self, patch_embed: PatchEmbed, blocks: VisionBlock, merger: PatchMerger, *, theta: float):
        self.theta = theta
        self.rotary_dim = blocks.attn.head_dim // 2
        self.patch_embed = patch_embed
        self.blocks = blocks
        self.merger = merger

    def __call__(
        self,
        pixel_values: Float[Array, "rows patches values"],
        patch_positions: Int[Array, "rows patches 2"],
        segments: Segments | None = None,
        *,
        remat: Remat | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "rows tokens d_model"]:
        """Patches → image tokens in the same order.

        Args:
            pixel_values: flattened patches; those of one token stand together.
            patch_positions: row and column of every patch.
            segments: the frames of a row of patches; padding is an empty slot. None: every row is one frame
                without an empty slot.
            remat: wraps the body of the layers' scan.
            key: for adapter dropout.
        """
        x = self.patch_embed(pixel_values)
        rotary = axial_rotary(patch_positions, inverse_frequencies(self.rotary_dim, self.theta))

        def call(block, x, flag, *, key):
            attend = functools.partial(self.attend, segments=segments, flag=flag)
            return block(x, rotary, attend, key=key), None

        x, _ = scan_layers(self.blocks, x, call, per_layer=self.flags(), key=key, remat=remat)
        return self.merger(x)

    def flags(self) -> Array | None:
        """What `attend` needs to know of each layer, with a leading layer axis."""
        return None

    def attend(
        self, query: jax.Array, keys: jax.Array, values: jax.Array, *, segments: Segments | None, flag
    ) -> jax.Array:
        """Attention among the patches of a segment."""
        return attention(query, keys, values, segments=segments)


class WindowedVisionTower(VisionTower):
    """Vision transformer in some of whose layers a patch sees only its window of the frame.

    Patches come in window order: each attention window fills one aligned block of slots.
    """

    has_gaps = True

    def __init__(self, config, *, dtype: DTypeLike):
        width, merge = config.hidden_size, config.spatial_merge_size**2
        self.window = window_slots(config)
        self.is_full = tuple(i in config.fullatt_block_indexes for i in range(config.depth))
        shared = {"dtype": dtype, "stack": config.depth}
        blocks = VisionBlock(
            RMSNorm(width, eps=1e-6, **shared),
            RMSNorm(width, eps=1e-6, **shared),
            VisionAttention(width, config.num_heads, **shared),
            GatedMLP(width, config.intermediate_size, hidden_act=config.hidden_act, bias=True, **shared),
            stack=config.depth,
        )
        ln_q = RMSNorm(width, eps=1e-6, dtype=dtype)
        super().__init__(
            PatchEmbed(config, width, dtype=dtype),
            blocks,
            PatchMerger(ln_q, width * merge, config.out_hidden_size, dtype=dtype),
            theta=rope_theta(config, default=10000.0),
        )

    def __call__(self, pixel_values: jax.Array, *args, **kwargs) -> jax.Array:
        """As `VisionTower`, in window order.

        Raises:
            ValueError: the number of slots is no multiple of the window's.
        """
        if pixel_values.shape[1] % self.window:
            raise ValueError(
                f"pixel_values has {pixel_values.shape[1]} patch slots a row, "
                f"needed a multiple of the attention window's {self.window}"
            )
        return super().__call__(pixel_values, *args, **kwargs)

    def flags(self) -> Array | None:
        """Which layers attend to the whole frame, where they differ."""
        return jnp.array(self.is_full) if len(set(self.is_full)) > 1 else None

    def attend(
        self, query: jax.Array, keys: jax.Array, values: jax.Array, *, segments: Segments | None, flag
    ) -> jax.Array:
        """Attention to the whole segment where `flag` says so, else to the window that a patch stands in."""

        def full(query, keys, values, segments):
            return attention(query, keys, values, segments=segments)

        def windowed(query, keys, values, segments):
            blocks = [a.reshape(-1, self.window, *a.shape[2:]) for a in (query, keys, values)]
            lengths = None
            if segments is not None:
                filled = (segments.ids.reshape(-1, self.window) > 0).sum(-1)
                # A key too many in an empty window keeps its softmax finite; nothing reads the result.
                lengths = jnp.maximum(filled, 1).astype(jnp.int32)
            return attention(*blocks, kv_lengths=lengths).reshape(query.shape)

        def choose(query, keys, values, segments, flag):
            if flag is None:
                return (full if self.is_full[0] else windowed)(query, keys, values, segments)
            return attention_by_flag(flag, full, windowed, query, keys, values, segments)

        layout = layout_of(self.blocks.attn.qkv.weight.get_value())
        mesh = None if layout is None else layout.mesh
        return attend_on_mesh(choose, mesh, query, keys, values, segments, flag)


class Attention(nnx.Module):
    """Causal grouped-query attention of the decoder."""

    def __init__(self, config, *, dtype: DTypeLike, stack: int):
        self.head_dim = config.hidden_size // config.num_attention_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * self.head_dim
        shared = {"dtype": dtype, "stack": stack}
        self.q_proj = Linear(width, width, bias=True, **shared)
        self.k_proj = Linear(width, kv_width, bias=True, **shared)
        self.v_proj = Linear(width, kv_width, bias=True, **shared)
        self.o_proj = Linear(width, width, bias=False, **shared)

    def add_to(
        self,
        x: Float[Array, "batch tokens hidden"],
        norm: nnx.Module,
        rotary: Rotary,
        *,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], KVCache | None]:
        """``x + attention(norm(x))``, within the row or to one layer's `cache`.

        The latter is returned with the new tokens in it.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        x, projected = apply_to_normed(norm, x, self.q_proj, self.k_proj, self.v_proj, key=key)
        query, keys, values = (each.reshape(heads) for each in projected)
        query, keys = apply_rotary(query, rotary), apply_rotary(keys, rotary)
        if cache is None:
            out = attention(query, keys, values, is_causal=True, segments=segments)
        else:
            cache = cache.append(keys, values)
            out = attention(query, cache.keys, cache.values, mask=cache.mask(query.shape[1]))
        return add_attended(x, self.o_proj(out.reshape(x.shape), key=key)), cache


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config, *, dtype: DTypeLike, stack: int):
        self.stack = stack
        shared = {"dtype": dtype, "stack": stack}
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **shared)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **shared)
        self.self_attn = Attention(config, **shared)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, hidden_act=config.hidden_act, bias=False, **shared
        )

    def __call__(self, x, rotary: Rotary, *, segments=None, cache=None, key: PRNGKeyArray | None = None):
        """Attention and MLP, each with a residual connection; returns the layer's cache too."""
        x, cache = self.attend(x, rotary, segments=segments, cache=cache, key=key)
        return self.feed_forward(x, key=key), cache

    def attend(self, x, rotary: Rotary, *, segments=None, cache=None, key: PRNGKeyArray | None = None):
        """The first half, with its residual connection."""
        norm = self.input_layernorm
        return self.self_attn.add_to(x, norm, rotary, segments=segments, cache=cache, key=key)

    def feed_forward(self, x, *, key: PRNGKeyArray | None = None):
        """The second half, with its residual connection; every token by itself."""
        return self.mlp.add_to(x, self.post_attention_layernorm, key=key)


class TextModel(nnx.Module):
    """The decoder: embeddings, layers and the final norm."""

    def __init__(self, config, *, dtype: DTypeLike):
        self.mrope_section = tuple(config.rope_parameters["mrope_section"])
        self.theta = rope_theta(config, default=1_000_000.0)
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = DecoderLayer(config, dtype=dtype, stack=config.num_hidden_layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        inputs_embeds: Float[Array, "batch tokens hidden"],
        position_ids: Int[Array, "3 batch tokens"],
        segments: Segments | None = None,
        *,
        cache: KVCache | None = None,
        remat: Remat | None = None,
        key: PRNGKeyArray | None = None,
        is_unfinished: bool = False,
    ) -> tuple[Float[Array, "batch tokens hidden"], KVCache | None]:
        """Embeddings → final hidden states, or what comes before the tail; the cache where one was given."""
        rotary = multimodal_rotary(
            position_ids, inverse_frequencies(self.head_dim, self.theta), self.mrope_section
        )

        def call(layer, x, layer_arrays, *, key):
            layer_cache = None if cache is None else cache.with_layer(*layer_arrays)
            x, layer_cache = layer(x, rotary, segments=segments, cache=layer_cache, key=key)
            return x, None if layer_cache is None else (layer_cache.keys, layer_cache.values)

        if is_unfinished:
            count = self.layers.stack - 1
            x, _ = scan_layers(
                self.layers, inputs_embeds, call, count=count, key=key, remat=remat, begins_backward=True
            )
            last_key = None if key is None else jax.random.fold_in(key, count)
            return last_layer(self.layers).attend(x, rotary, segments=segments, key=last_key)
        arrays = None if cache is None else (cache.keys, cache.values)
        x, arrays = scan_layers(self.layers, inputs_embeds, call, per_layer=arrays, key=key, remat=remat)
        return self.norm(x), None if cache is None else cache.advance(*arrays, inputs_embeds.shape[1])


class VisionLanguageModel(nnx.Module):
    """Vision tower and decoder."""

    def __init__(self, visual: VisionTower, language_model: TextModel):
        self.visual = visual
        self.language_model = language_model


class Qwen2_5_VLForConditionalGeneration(nnx.Module):
    """Qwen2.5-VL with its language-model head.

    Args:
        config: transformers' config.
        dtype: type of the dense parameters and of the computation.

    Raises:
        ValueError: the config asks for something that the decoder does not have (sliding windows, scaled
            rotary positions).
    """

    tower: type[VisionTower] = WindowedVisionTower

    def __init__(self, config: PreTrainedConfig, *, dtype: DTypeLike):
        _check_config(config)
        text = config.text_config
        visual = self.tower(config.vision_config, dtype=dtype)
        self.model = VisionLanguageModel(visual, TextModel(text, dtype=dtype))
        tied = config.tie_word_embeddings
        self.lm_head = nnx.data(
            None if tied else Linear(text.hidden_size, text.vocab_size, bias=False, dtype=dtype)
        )

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        position_ids: Int[Array, "3 batch tokens"],
        segment_ids: Int[Array, "batch tokens"] | None = None,
        pixel_values: Float[Array, "rows patches values"] | None = None,
        patch_positions: Int[Array, "rows patches 2"] | None = None,
        image_segment_ids: Int[Array, "rows patches"] | None = None,
        image_token_index: Int[Array, "batch tokens"] | None = None,
        segment_offsets: Int[Array, "batch bounds"] | None = None,
        image_segment_offsets: Int[Array, "rows image_bounds"] | None = None,
        *,
        cache: KVCache | None = None,
        remat: TowerRemats = SAVE_ALL,
        key: PRNGKeyArray | None = None,
        is_unfinished: bool = False,
    ) -> tuple[Float[Array, "batch tokens hidden"], KVCache | None]:
        """Final hidden states (`logits` turns them into logits), and the cache where one was given.

        Args:
            input_ids: token ids.
            position_ids: temporal, height and width position of every token.
            segment_ids: the sample of a packed row that a token belongs to, from 1; 0 marks padding. None:
                one sample a row, padded on the right, which causal attention alone keeps apart.
            pixel_values: flattened patches of the batch's images; see `VisionTower`.
            patch_positions: row and column of every patch.
            image_segment_ids: frame of every patch.
            image_token_index: for an image token, its place among the vision tower's flattened output; -1
                elsewhere.
            segment_offsets: bounds of the samples of a packed row; with `segment_ids`, see `Segments`.
            image_segment_offsets: bounds of the frames of a row of patches, empty slots within included.
            cache: keys and values of earlier tokens.
            remat: wraps the body of each tower's scan over its layers.
            key: for adapter dropout.
            is_unfinished: give the residual stream after the last attention, for `tail`. The backward pass
                begins there, so that `remat` does not apply to this attention. Without a cache.
        """
        embeds = self.model.language_model.embed_tokens(input_ids)
        vision_key, text_key = (None, None) if key is None else jax.random.split(key)
        if pixel_values is not None:
            frames = None
            if image_segment_ids is not None:
                frames = Segments(image_segment_ids, image_segment_offsets, self.tower.has_gaps)
            features = self.model.visual(
                pixel_values, patch_positions, frames, remat=remat.vision, key=vision_key
            )
            features = features.reshape(-1, features.shape[-1]).astype(embeds.dtype)
            embeds = put_image_tokens(embeds, features, image_token_index, getattr(self, "mesh", None))
        samples = None if segment_ids is None else Segments(segment_ids, segment_offsets)
        return self.model.language_model(
            embeds,
            position_ids,
            samples,
            cache=cache,
            remat=remat.language,
            key=text_key,
            is_unfinished=is_unfinished,
        )

    def tail(self) -> Tail:
        """What turns an unfinished result into logits, one token at a time."""
        text = self.model.language_model
        return Tail(text.layers, text.norm, self.head)

    @property
    def head(self) -> Linear | Embedding:
        """What turns hidden states into logits: the head's layer, or the embedding that it is tied to."""
        return self.lm_head or self.model.language_model.embed_tokens

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Logits of final hidden states."""
        return apply_head(self.head, hidden)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of `length` tokens, in the type of the embeddings."""
        text = self.model.language_model
        dtype = text.embed_tokens.weight.get_value().dtype
        return KVCache.empty(
            text.layers.stack, batch, length, text.num_key_value_heads, text.head_dim, dtype=dtype
        )


def window_slots(config) -> int:
    """Patch slots of one attention window."""
    merge = config.spatial_merge_size
    return (config.window_size // config.patch_size // merge) ** 2 * merge**2


def rope_theta(config, *, default: float) -> float:
    """Base of the rotary frequencies of a part's config."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta", default))


def _check_config(config: PreTrainedConfig) -> None:
    text = config.text_config
    rope_type = text.rope_parameters.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(
            f"rope_type={rope_type!r} is not supported for {config.model_type}; needed 'default'"
        )
    if "sliding_attention" in (text.layer_types or []):
        raise ValueError(f"sliding-window attention is not supported for {config.model_type}")
