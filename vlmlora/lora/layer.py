"""The adapter of a linear layer: LoRA (https://arxiv.org/abs/2106.09685), DoRA, and ranks that differ.

Layers of one stacked module may have different ranks. Their adapter then consists of one `Lora` for each
rank, which holds exactly the parameters that PEFT would. Compile time stays bounded: the adapter is padded
with zeros to the largest rank outside of the scan over the layers (a pad for each rank, then one scatter for
each kind of array), so the scan's body sees one adapter of one rank, however many ranks and layers there are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vlmlora.nn.low_rank import Factors, room_for
from vlmlora.nn.variables import Frozen, Prepared, Trainable

# What a layer needs to compute; `initial_A` and `initial_B` are for saving only and never enter a scan.
_PER_LAYER = ("lora_A", "lora_B", "scaling", "lora_bias", "magnitude")


class Lora(nnx.Module):
    """Adds ``scaling · (B A dropout(x) + lora_bias)`` to what a linear layer computes.

    With a magnitude it is DoRA (https://arxiv.org/abs/2402.09353): the rows of ``W + scaling · B A`` are
    scaled to the lengths `magnitude`. As in PEFT no gradient flows through the lengths that they had, and
    dropout applies to what the rescaling changes as well.

    The arrays of an adapter on stacked layers have a leading axis over the layers that it adapts, which may
    be fewer than the stack has: the others hold no parameters and no optimizer state.

    Attributes:
        lora_A: [layers, r, in], or [r, in] on a layer that does not repeat; float32.
        lora_B: [layers, out, r], or [out, r]; float32.
        scaling: [layers], or a scalar; float32.
        lora_bias: what B adds, [layers, out] or [out], float32; None without.
        magnitude: DoRA's lengths, [layers, out] or [out], float32; None without.
        initial_A: A at the start, where it was taken out of the base weight; not trained. None elsewhere.
        initial_B: likewise.
        adapts: which layers have an adapter, bool [layers]; None where each has.
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
        lora_bias: Float[Array, "*layers out"] | None = None,
        magnitude: Float[Array, "*layers out"] | None = None,
        initial_A: Float[Array, "*layers r in"] | None = None,
        initial_B: Float[Array, "*layers out r"] | None = None,
        adapts: Bool[Array, "*layers"] | None = None,
        layers: tuple[int, ...] | None = None,
        dropout: int | float = 0.0,
        salt: int = 0,
    ):
        self.lora_A = Trainable(lora_A)
        self.lora_B = Trainable(lora_B)
        self.scaling = Frozen(scaling)
        self.lora_bias = nnx.data(None if lora_bias is None else Trainable(lora_bias))
        self.magnitude = nnx.data(None if magnitude is None else Trainable(magnitude))
        self.initial_A = nnx.data(None if initial_A is None else Frozen(initial_A))
        self.initial_B = nnx.data(None if initial_B is None else Frozen(initial_B))
        self.adapts = nnx.data(None if adapts is None else Frozen(adapts))
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
            base: the layer, whose weight and bias DoRA needs; else it is not looked at.
            key: drives dropout; None switches it off.

        Raises:
            ValueError: the adapter has a layer axis; a scan over the layers slices it first.
        """
        drops = key is not None and self.dropout > 0
        if drops:
            kept = jax.random.bernoulli(jax.random.fold_in(key, self.salt), 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        scaling = self.scaling.get_value()
        a, b = self._cast_factors(x.dtype)
        change = ((x @ a.T) @ b.T).astype(y.dtype)
        if self.lora_bias is not None:
            change = change + (scaling * self.lora_bias.get_value()).astype(y.dtype)
        if self.magnitude is None:
            return y + change
        weight = base.weight.get_value()
        # One layer's matrix is decoded for the lengths of its rows; the backward pass does not keep it.
        scale = self._row_scale(jax.lax.stop_gradient(weight.dequantize(jnp.float32)))
        if drops:
            plain = (x @ weight).astype(y.dtype)
        else:
            plain = y if base.bias is None else y - base.bias.get_value().astype(y.dtype)
        return y + (scale - 1).astype(y.dtype) * plain + scale.astype(y.dtype) * change

    def factors(self, dtype: DTypeLike, key: PRNGKeyArray | None) -> Factors | None:
        """A [r, in] and the scaled B [out, r] in `dtype`, where adding their product is all that is done.

        None with a magnitude, with a bias on B, and where dropout changes the input.

        Raises:
            ValueError: the adapter has a layer axis; a scan over the layers slices it first.
        """
        if self.magnitude is not None or self.lora_bias is not None or (key is not None and self.dropout > 0):
            return None
        return self._cast_factors(dtype)

    def _cast_factors(self, dtype: DTypeLike) -> Factors:
        lora_A = self.lora_A.get_value()
        if lora_A.ndim != 2:
            raise ValueError(f"an adapter of {lora_A.shape[0]} stacked layers is called one layer at a time")
        # Scaling B before the cast rounds once; a scaling such as alpha/sqrt(r) is no bfloat16 number.
        b = self.scaling.get_value() * self.lora_B.get_value()
        return Factors(lora_A.astype(dtype), b.astype(dtype))

    def prepared(self, dtype: DTypeLike) -> "Lora | PreparedLora":
        """What a scan over the layers computes with, as far as that is the same for each: see `PreparedLora`.

        The adapter itself where a low-rank product is not all that it may add.
        """
        if self.magnitude is not None or self.lora_bias is not None or self.dropout > 0:
            return self
        scaling, r = self.scaling.get_value()[:, None, None], self.r

        def with_room(factor: jax.Array, axis: int) -> jax.Array:
            room = [(0, 0)] * 3
            room[axis] = (0, room_for(factor.shape[axis], [r]))
            return jnp.pad(factor.astype(dtype), room)

        a, b = self.lora_A.get_value(), scaling * self.lora_B.get_value()
        return PreparedLora(with_room(a, 2), with_room(b, 1))

    def merged(self, weight: Float[Array, "out in"], index: int | None) -> Float[Array, "out in"]:
        """The layer's weight with this adapter in it.

        Args:
            weight: the layer's own, in float32.
            index: of the layer on the adapter's layer axis; None where there is none.
        """
        layer = self._layer(index)
        merged = weight + layer._delta()
        return merged if layer.magnitude is None else layer._row_scale(weight)[:, None] * merged

    def merged_bias(
        self, bias: Float[Array, " out"] | None, index: int | None
    ) -> Float[Array, " out"] | None:
        """The layer's bias with this adapter in it; None where neither has one.

        Args:
            bias: the layer's own, in float32, or None.
            index: of the layer on the adapter's layer axis; None where there is none.
        """
        layer = self._layer(index)
        if layer.lora_bias is None:
            return bias
        change = layer.scaling.get_value() * layer.lora_bias.get_value()
        return change if bias is None else bias + change

    def expand(self, stack: int) -> "Lora":
        """The same adapter with an entry for each of `stack` layers: zeros for those it does not adapt.

        Raises:
            ValueError: the adapter has no layer axis, or adapts a layer that the stack does not have.
        """
        whole = self.layers is not None and len(self.layers) == stack == max(self.layers) + 1
        if whole and self.initial_A is None:
            return self
        return _expand([self], stack)

    def _layer(self, index: int | None) -> "Lora":
        """The adapter of one layer."""
        if index is None:
            return self
        values = (getattr(self, name) for name in _PER_LAYER)
        values = [None if variable is None else variable.get_value()[index] for variable in values]
        return Lora(*values[:3], lora_bias=values[3], magnitude=values[4])

    def _delta(self) -> Float[Array, "out in"]:
        return self.scaling.get_value() * (self.lora_B.get_value() @ self.lora_A.get_value())

    def _row_scale(self, weight: Float[Array, "out in"]) -> Float[Array, " out"]:
        """DoRA's factor on each row of ``W + scaling · B A``, whose length is a constant to the gradient."""
        norm = row_norms(weight + jax.lax.stop_gradient(self._delta()))
        scale = self.magnitude.get_value() / jnp.where(norm > 0, norm, 1)
        return scale if self.adapts is None else jnp.where(self.adapts.get_value(), scale, 1)


class PreparedLora(nnx.Module):
    """An adapter that adds a low-rank product and no more, as a scan over the layers is given it.

    What every layer would do to its factors is done to those of all layers at once: they are cast, B is
    scaled, and both get the room that products with them need (`vlmlora.nn.low_rank.Factors`). Then products
    read a layer's factors where they lie, and write their gradients where these are collected.

    Attributes:
        lora_A: [layers, r, in and room], or [r, in and room] of one layer, in the type of activations.
        lora_B: [layers, out and room, r], or [out and room, r].
    """

    def __init__(self, lora_A: Float[Array, "*layers r _"], lora_B: Float[Array, "*layers _ r"]):
        self.lora_A = Prepared(lora_A)
        self.lora_B = Prepared(lora_B)

    def __call__(
        self,
        x: Float[Array, "*batch in"],
        y: Float[Array, "*batch out"],
        *,
        base: Any,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch out"]:
        """The layer's output with the adapter's added; see `Lora`."""
        del base, key
        a, b = self.factors(x.dtype, None)
        return y + ((x @ a[:, : x.shape[-1]].T) @ b[: y.shape[-1]].T).astype(y.dtype)

    def factors(self, dtype: DTypeLike, key: PRNGKeyArray | None) -> Factors:
        """A and the scaled B, with their room, in `dtype`."""
        del key
        return Factors(self.lora_A.get_value().astype(dtype), self.lora_B.get_value().astype(dtype))


class MixedRankLora(nnx.Module):
    """The adapter of a stacked module whose layers have different ranks.

    Attributes:
        groups: one adapter for each rank, of the layers that have it.
    """

    def __init__(self, groups: Sequence[Lora]):
        self.groups = nnx.List(groups)

    def __call__(
        self, x: jax.Array, y: jax.Array, *, base: Any, key: PRNGKeyArray | None = None
    ) -> jax.Array:
        """Not to be called: a scan over the layers expands the adapter first.

        Raises:
            ValueError: always.
        """
        ranks = sorted(group.r for group in self.groups)
        raise ValueError(f"an adapter of stacked layers with ranks {ranks} is called one layer at a time")

    def factors(self, dtype: DTypeLike, key: PRNGKeyArray | None) -> None:
        """None: there are several."""

    def expand(self, stack: int) -> Lora:
        """One adapter with an entry for each of `stack` layers, padded with zeros to the largest rank.

        Raises:
            ValueError: a layer is not one of the stack's.
        """
        return _expand(list(self.groups), stack)


def groups_of(adapter: nnx.Module | None) -> tuple[Lora, ...]:
    """The adapters of one rank that the adapter of a linear layer consists of."""
    if adapter is None:
        return ()
    return tuple(adapter.groups) if isinstance(adapter, MixedRankLora) else (adapter,)


def row_norms(weight: Float[Array, "*layers out in"]) -> Float[Array, "*layers out"]:
    """Lengths of a weight's rows: where DoRA's magnitude starts."""
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=-1))


def _expand(groups: Sequence[Lora], stack: int) -> Lora:
    layers = [layer for group in groups for layer in group.layers or ()]
    if not layers or max(layers) >= stack:
        raise ValueError(f"an adapter of layers {layers or None} does not fit {stack} stacked layers")

    def spread(name: str) -> jax.Array | None:
        if getattr(groups[0], name) is None:
            return None
        values = [getattr(group, name).get_value() for group in groups]
        shape = tuple(max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True))
        padded = [_padded(value, shape) for value in values]
        whole = padded[0] if len(padded) == 1 else jnp.concatenate(padded)
        return _spread(whole, layers, stack)

    arrays = {name: spread(name) for name in _PER_LAYER}
    adapts = None
    if arrays["magnitude"] is not None and len(layers) < stack:
        adapts = jnp.asarray(np.isin(np.arange(stack), layers))
    return Lora(
        **arrays,
        adapts=adapts,
        layers=tuple(range(stack)),
        dropout=groups[0].dropout,
        salt=groups[0].salt,
    )


def _spread(values: jax.Array, layers: Sequence[int], stack: int) -> jax.Array:
    """The values at these places of an axis of `stack`, and zeros at the others."""
    steps = set(np.diff(layers).tolist()) or {1}
    if len(steps) == 1 and min(steps) > 0:
        # Layers at one distance from each other take a pad; a scatter is slow to trace.
        place = (layers[0], stack - 1 - layers[-1], min(steps) - 1)
        zero = jnp.zeros((), values.dtype)
        return jax.lax.pad(values, zero, [place, *[(0, 0, 0)] * (values.ndim - 1)])
    return jnp.zeros((stack, *values.shape[1:]), values.dtype).at[jnp.array(layers)].set(values)


def _padded(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros after a layer's entries, up to `shape`."""
    if value.shape[1:] == shape:
        return value
    more = [(0, to - size, 0) for to, size in zip(shape, value.shape[1:], strict=True)]
    return jax.lax.pad(value, jnp.zeros((), value.dtype), [(0, 0, 0), *more])
