"""The adapter of a linear layer (https://arxiv.org/abs/2106.09685)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vlmlora.nn.variables import Frozen, Trainable


class Lora(nnx.Module):
    """Adds ``scaling · B A dropout(x)`` to what a linear layer computes.

    The arrays of an adapter on stacked layers have a leading axis over the layers that it adapts, which may
    be fewer than the stack has: the others hold no parameters and no optimizer state.

    Attributes:
        lora_A: [layers, r, in], or [r, in] on a layer that does not repeat; float32.
        lora_B: [layers, out, r], or [out, r]; float32.
        scaling: [layers], or a scalar; float32.
        layers: which layers of the stack they are, in ascending order; None on a layer that does not repeat.
        dropout: probability that an element of `x` is dropped.
        salt: makes a dropout key this module's own.
    """

    def __init__(
        self,
        lora_A: Float[Array, "*layers r in"],
        lora_B: Float[Array, "*layers out r"],
        scaling: Float[Array, "*layers"],
        *,
        layers: tuple[int, ...] | None = None,
        dropout: int | float = 0.0,
        salt: int = 0,
    ):
        self.lora_A = Trainable(lora_A)
        self.lora_B = Trainable(lora_B)
        self.scaling = Frozen(scaling)
        self.layers = layers
        self.dropout = dropout
        self.salt = salt

    @property
    def r(self) -> int:
        """The rank."""
        return self.lora_A.get_value().shape[-2]

    def __call__(
        self,
        x: Float[Array, "*batch in"],
        y: Float[Array, "*batch out"],
        *,
        base: Any,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch out"]:
        """The layer's output with the adapter's added.

        Args:
            x: the layer's input.
            y: the layer's output.
            base: the layer, for adapters that depend on its weight; this one does not.
            key: drives dropout; None switches it off.

        Raises:
            ValueError: the adapter has a layer axis; a scan over the layers slices it first.
        """
        lora_A, lora_B = self.lora_A.get_value(), self.lora_B.get_value()
        if lora_A.ndim != 2:
            raise ValueError(f"an adapter of {lora_A.shape[0]} stacked layers is called one layer at a time")
        if key is not None and self.dropout > 0:
            kept = jax.random.bernoulli(jax.random.fold_in(key, self.salt), 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        # Scaling B before the cast rounds once; a scaling such as alpha/sqrt(r) is no bfloat16 number.
        scaled_B = (self.scaling.get_value() * lora_B).astype(x.dtype)
        return y + ((x @ lora_A.astype(x.dtype).T) @ scaled_B.T).astype(y.dtype)

    def expand(self, stack: int) -> "Lora":
        """The same adapter with an entry for each of `stack` layers: zeros for those it does not adapt.

        Raises:
            ValueError: the adapter has no layer axis, or adapts a layer that the stack does not have.
        """
        if self.layers is None or max(self.layers) >= stack:
            raise ValueError(f"an adapter of layers {self.layers} does not fit {stack} stacked layers")
        if len(self.layers) == stack:
            return self

        def scatter(value: jax.Array) -> jax.Array:
            return jnp.zeros((stack, *value.shape[1:]), value.dtype).at[jnp.array(self.layers)].set(value)

        return type(self)(
            *(scatter(variable.get_value()) for variable in (self.lora_A, self.lora_B, self.scaling)),
            layers=tuple(range(stack)),
            dropout=self.dropout,
            salt=self.salt,
        )
