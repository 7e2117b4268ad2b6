"""Keys and values of earlier tokens, for generation."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "filled", "index"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """Slots for the keys and values of every layer, or of one layer where the layer axis is sliced off.

    Attributes:
        keys: [layers, batch, slots, kv_heads, head_dim].
        values: the same.
        filled: slots that hold a token which later ones may see; padding stays False.
        index: the next slot, the same in every row.
    """

    keys: Float[Array, "*layers batch slots kv_heads head_dim"]
    values: Float[Array, "*layers batch slots kv_heads head_dim"]
    filled: Bool[Array, "batch slots"]
    index: Int[Array, ""]

    @classmethod
    def empty(
        cls, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, *, dtype: DTypeLike
    ) -> "KVCache":
        """A cache without a token."""
        zeros = jnp.zeros((layers, batch, slots, kv_heads, head_dim), dtype)
        return cls(zeros, zeros, jnp.zeros((batch, slots), bool), jnp.int32(0))

    def mark(self, valid: Bool[Array, "batch tokens"]) -> "KVCache":
        """Say which of the tokens about to be appended may be seen; call before the model."""
        return replace(self, filled=jax.lax.dynamic_update_slice(self.filled, valid, (0, self.index)))

    def with_layer(self, keys: jax.Array, values: jax.Array) -> "KVCache":
        """The same slots with one layer's arrays."""
        return replace(self, keys=keys, values=values)

    def append(self, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Write new tokens [*layers, batch, tokens, kv_heads, head_dim] from `index` on."""
        at = (*[0] * (self.keys.ndim - 3), self.index, 0, 0)
        return replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys.astype(self.keys.dtype), at),
            values=jax.lax.dynamic_update_slice(self.values, values.astype(self.values.dtype), at),
        )

    def mask(self, tokens: int) -> Bool[Array, "batch tokens slots"]:
        """Which slots each of the `tokens` newest tokens may see: filled ones up to its own."""
        slots = jnp.arange(self.filled.shape[1])
        causal = slots[None, :] <= (self.index + jnp.arange(tokens))[:, None]
        return causal[None] & self.filled[:, None, :]

    def advance(self, keys: jax.Array, values: jax.Array, tokens: int) -> "KVCache":
        """The cache after a forward pass over `tokens` tokens that returned these arrays."""
        return replace(self, keys=keys, values=values, index=self.index + tokens)
