"""What a decoder with cross-attention keeps of earlier tokens and of the images."""

from dataclasses import dataclass, replace
from functools import partial

import jax
from jaxtyping import Array, Bool, Float, Int

from vlmlora.nn.cache import KVCache


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "image_spans", "num_tiles"],
    meta_fields=[],
)
@dataclass(frozen=True)
class ImageCache:
    """Keys and values that the cross-attention layers make of a batch's images.

    Attributes:
        keys: [layers, batch, image_tokens, kv_heads, head_dim].
        values: the same.
        image_spans: positions that see each image of a row, see `MllamaForConditionalGeneration.__call__`.
        num_tiles: filled tiles of each image of a row; 0 where there is no image.
    """

    keys: Float[Array, "layers batch image_tokens kv_heads head_dim"]
    values: Float[Array, "layers batch image_tokens kv_heads head_dim"]
    image_spans: Int[Array, "batch images 2"]
    num_tiles: Int[Array, "batch images"]


@partial(jax.tree_util.register_dataclass, data_fields=["text", "images"], meta_fields=[])
@dataclass(frozen=True)
class MllamaCache:
    """The cache of the self-attention layers, and that of the cross-attention layers once there are images.

    Attributes:
        text: keys and values of earlier tokens.
        images: keys and values of the images; None before the first call, and without images.
    """

    text: KVCache
    images: ImageCache | None = None

    def mark(self, valid: Bool[Array, "batch tokens"]) -> "MllamaCache":
        """Say which of the tokens about to be appended may be seen; call before the model."""
        return replace(self, text=self.text.mark(valid))
