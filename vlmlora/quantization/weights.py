"""Weights of linear layers: small pytrees with one operation, ``x @ w``.

A weight has Hugging Face's orientation [out, in]. Layers that repeat share one weight whose every array has a
leading layer axis; `jax.lax.scan` slices it, and only a weight of one layer multiplies.
"""

import dataclasses
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Shape = tuple[int, int]


@runtime_checkable
class Weight(Protocol):
    """What a linear layer, a loader and an adapter need to know of a weight."""

    @property
    def shape(self) -> Shape:
        """(out, in) of one layer."""

    @property
    def stack(self) -> int | None:
        """Number of layers on the leading axis; None for a weight of one layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""

    def __rmatmul__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`."""

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*stack out in"]:
        """The whole matrix, or matrices, as a plain array."""

    def layer(self, index: int) -> "Weight":
        """The weight of one layer of a stack."""


class _Arrays:
    """What follows from a weight's arrays alone."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def layer(self, index: int) -> Self:
        """The weight of one layer of a stack.

        Raises:
            ValueError: the weight has no layer axis.
            IndexError: no such layer.
        """
        _require_stack(self, "layer(index)")
        if not isinstance(index, jax.Array) and not -self.stack <= index < self.stack:
            raise IndexError(f"layer {index} of a weight with {self.stack} layers")
        return jax.tree.map(lambda leaf: leaf[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseWeight(_Arrays):
    """A weight stored as it is.

    Attributes:
        value: [out, in], or [layers, out, in].
    """

    value: Float[Array, "*stack out in"]

    @classmethod
    def abstract(
        cls, out_features: int, in_features: int, dtype: DTypeLike, stack: int | None = None
    ) -> Self:
        """A weight of shapes only, for building a model before its arrays exist."""
        return cls(_abstract((out_features, in_features), dtype, stack))

    @property
    def shape(self) -> Shape:
        """(out, in) of one layer."""
        return self.value.shape[-2:]

    @property
    def stack(self) -> int | None:
        """Number of layers on the leading axis; None for a weight of one layer."""
        return self.value.shape[0] if len(self.value.shape) == 3 else None

    def __rmatmul__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`; differentiable in both."""
        _check_operand(x, self)
        return jnp.matmul(x, self.value.astype(x.dtype).T)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*stack out in"]:
        """The array itself, cast if `dtype` is given."""
        return self.value if dtype is None else self.value.astype(dtype)


def _abstract(shape: tuple[int, ...], dtype: DTypeLike, stack: int | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape if stack is None else (stack, *shape), dtype)


def _check_operand(x: Any, weight: Weight) -> None:
    _require_single(weight, "x @ weight")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x @ weight: x has shape {x.shape}, the weight takes {weight.shape[1]} features (shape {weight.shape})"
        )


def _require_single(weight: Weight, operation: str) -> None:
    if weight.stack is not None:
        raise ValueError(
            f"{operation} needs the weight of one layer, but this one stacks {weight.stack}; "
            "slice it with .layer(i) or under jax.lax.scan"
        )


def _require_stack(weight: Weight, operation: str) -> None:
    if weight.stack is None:
        raise ValueError(f"{operation} needs a weight with a layer axis; this one is a single {weight.shape}")
