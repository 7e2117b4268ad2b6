"""Weights of linear layers: small pytrees with one operation, ``x @ w``.

A weight has Hugging Face's orientation [out, in]. Layers that repeat share one weight whose every array has a
leading layer axis; `jax.lax.scan` slices it, and only a weight of one layer multiplies.
"""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from vlmlora_kernels.int8 import dequantize_int8, matmul_int8, quantize_int8
from vlmlora_kernels.nf4 import (
    DYNAMIC_CODE,
    NESTED_BLOCKSIZE,
    NestedAbsmax,
    Placed,
    dequantize_4bit,
    double_quantize,
    in_lines,
    matmul_4bit,
    quantize_4bit,
)

Shape = tuple[int, int]
Leaf = Any
"""An array; its `jax.ShapeDtypeStruct` in an abstract weight; anything while JAX rebuilds a tree."""
PerLayer = tuple[Leaf, Leaf]
"""Pool and position of every layer, or of one."""


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

    def __rmatmul__(self, x: Float[ArrayLike, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`."""

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*stack out in"]:
        """The whole matrix, or matrices, as a plain array."""

    def layer(self, index: int | Int[Array, ""]) -> "Weight":
        """The weight of one layer of a stack."""


@runtime_checkable
class Framable(Protocol):
    """A weight that gives out its matrix, of one layer, with others around it."""

    def framed(self, right: Placed, below: Placed, dtype: DTypeLike) -> Float[Array, "high wide"]:
        """``[[W, right], [below]]``; either may be empty."""


class _Arrays:
    """What follows from a weight's arrays alone."""

    # A numpy array on the left must leave `@` to the weight.
    __array_ufunc__ = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def layer(self, index: int | Int[Array, ""]) -> "Weight":
        """The weight of one layer of a stack.

        Raises:
            ValueError: the weight has no layer axis.
            IndexError: no such layer.
        """
        if self.stack is None:
            raise ValueError(
                f"layer(index) needs a weight with a layer axis; this one is a single {self.shape}"
            )
        if isinstance(index, jax.Array):
            slice_leaf = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
            return jax.tree.map(slice_leaf, self)
        if not 0 <= index < self.stack:
            raise IndexError(f"layer {index} of a weight with {self.stack} layers")
        return jax.tree.map(functools.partial(_layer_of, index=index), self)


class _Framed:
    """Other matrices around a weight's own, for one that decodes to an array of its own."""

    def framed(self, right: Placed, below: Placed, dtype: DTypeLike) -> Float[Array, "high wide"]:
        """``[[W, right], [below]]``; either may be empty."""
        rows = self.dequantize(dtype)
        # What is empty is left out: as a constant that a scan hoists out of `jax.shard_map` it crashes XLA
        # (jax 0.11).
        if right.size:
            rows = jnp.concatenate([rows, right.to_the_right(rows.shape[0], dtype)], axis=1)
        return jnp.concatenate([rows, below.below(rows.shape[1], dtype)]) if below.size else rows


def _layer_of(leaf: Leaf, index: int) -> Leaf:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[index]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseWeight(_Arrays, _Framed):
    """A weight stored as it is.

    Attributes:
        value: [out, in], or [layers, out, in].
    """

    value: Leaf

    @classmethod
    def abstract(
        cls, out_features: int, in_features: int, dtype: DTypeLike, stack: int | None = None
    ) -> "DenseWeight":
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

    def __rmatmul__(self, x: Float[ArrayLike, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`; differentiable in both."""
        x = _operand(x, self)
        # Contracts the last axes as they are: a transposed weight would be another array to save for the
        # backward pass, once for every layer of a scan.
        return jax.lax.dot_general(x, self.value.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*stack out in"]:
        """The array, cast to `dtype`."""
        return self.value.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NF4Weight(_Arrays):
    """A weight of 4 bits an element, as bitsandbytes stores it (NF4 or FP4).

    Attributes:
        codes: two codes a byte, uint8 [bytes] or [layers, bytes].
        absmax: the scale of each block, float32 [blocks] or doubly quantised; with the layer axis in front.
        shape: (out, in) of one layer.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share a scale.
        dtype: name of the type before quantisation, which a checkpoint records.
    """

    codes: Leaf
    absmax: Leaf | NestedAbsmax
    shape: Shape = dataclasses.field(metadata={"static": True})
    quant_type: str = dataclasses.field(default="nf4", metadata={"static": True})
    blocksize: int = dataclasses.field(default=64, metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    @classmethod
    def abstract(
        cls,
        out_features: int,
        in_features: int,
        stack: int | None = None,
        *,
        double_quant: bool = True,
        quant_type: str = "nf4",
        blocksize: int = 64,
        dtype: str = "bfloat16",
    ) -> "NF4Weight":
        """A weight of shapes only, for building a model before its arrays exist."""
        size = out_features * in_features
        blocks = -(-size // blocksize)
        if double_quant:
            absmax = NestedAbsmax(
                codes=_abstract((blocks,), jnp.uint8, stack),
                absmax=_abstract((-(-blocks // NESTED_BLOCKSIZE),), jnp.float32, stack),
                code=_abstract(DYNAMIC_CODE.shape, jnp.float32, stack),
                offset=_abstract((), jnp.float32, stack),
            )
        else:
            absmax = _abstract((blocks,), jnp.float32, stack)
        codes = _abstract((-(-size // 2),), jnp.uint8, stack)
        return cls(codes, absmax, (out_features, in_features), quant_type, blocksize, dtype)

    @classmethod
    def quantize(
        cls,
        weight: Float[Array, "*stack out in"],
        *,
        double_quant: bool = True,
        quant_type: str = "nf4",
        blocksize: int = 64,
    ) -> "NF4Weight":
        """Quantise a matrix, or a stack of them, as bitsandbytes does on a CPU.

        Args:
            weight: bfloat16, float16 or float32.
            double_quant: quantise the scales as well.
            quant_type: ``"nf4"`` or ``"fp4"``.
            blocksize: elements that share a scale.
        """
        return _quantize_4bit(weight, double_quant, quant_type, blocksize)

    @property
    def stack(self) -> int | None:
        """Number of layers on the leading axis; None for a weight of one layer."""
        return self.codes.shape[0] if len(self.codes.shape) == 2 else None

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised."""
        return isinstance(self.absmax, NestedAbsmax)

    def __rmatmul__(self, x: Float[ArrayLike, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`; a gradient for `x` only, and W is decoded again for it."""
        x = _operand(x, self)
        return matmul_4bit(
            x,
            self.codes,
            _sliced_by_kernel(self.absmax),
            shape=self.shape,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
        )

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*stack out in"]:
        """Decode to `dtype`."""
        decode = functools.partial(self._decode, dtype=dtype)
        return (decode if self.stack is None else jax.vmap(decode))(self.codes, self.absmax)

    def framed(self, right: Placed, below: Placed, dtype: DTypeLike) -> Float[Array, "high wide"]:
        """``[[W, right], [below]]``; either may be empty."""
        return self._decode(self.codes, self.absmax, dtype=dtype, right=right, below=below)

    def in_lines(self) -> "NF4Weight":
        """A stack as a scan slices it best: kernels then read a layer's scales where they lie."""
        return dataclasses.replace(self, absmax=in_lines(self.absmax))

    def _decode(self, codes: jax.Array, absmax: jax.Array | NestedAbsmax, **options: Any) -> jax.Array:
        return dequantize_4bit(
            codes,
            _sliced_by_kernel(absmax),
            shape=self.shape,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            **options,
        )


def _sliced_by_kernel(absmax: jax.Array | NestedAbsmax) -> jax.Array | NestedAbsmax:
    """The same scales: neither magnitudes nor their mean are negative.

    It changes how XLA slices them out of a stack of layers: by a kernel, and not by copies, which would queue
    up behind those of checkpointed layer inputs to and from host memory. Scales in lines are not sliced.
    """
    if not isinstance(absmax, NestedAbsmax) or absmax.offset.ndim:
        return absmax
    return absmax._replace(absmax=jnp.abs(absmax.absmax), offset=jnp.abs(absmax.offset))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class INT8Weight(_Arrays, _Framed):
    """A weight of 8 bits an element with one scale a row, as bitsandbytes stores it (LLM.int8()).

    Attributes:
        codes: int8 [out, in], or [layers, out, in].
        scale: largest magnitude of each row, float32 [out] or [layers, out]; ``W = codes * scale / 127``.
    """

    codes: Leaf
    scale: Leaf

    @classmethod
    def abstract(cls, out_features: int, in_features: int, stack: int | None = None) -> "INT8Weight":
        """A weight of shapes only, for building a model before its arrays exist."""
        codes = _abstract((out_features, in_features), jnp.int8, stack)
        return cls(codes, _abstract((out_features,), jnp.float32, stack))

    @classmethod
    def quantize(cls, weight: Float[Array, "*stack out in"]) -> "INT8Weight":
        """Quantise a matrix, or a stack of them, as bitsandbytes does on a CPU."""
        return _quantize_int8(weight)

    @property
    def shape(self) -> Shape:
        """(out, in) of one layer."""
        return self.codes.shape[-2:]

    @property
    def stack(self) -> int | None:
        """Number of layers on the leading axis; None for a weight of one layer."""
        return self.codes.shape[0] if len(self.codes.shape) == 3 else None

    def __rmatmul__(self, x: Float[ArrayLike, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`; a gradient for `x` only, and W is decoded again for it."""
        x = _operand(x, self)
        return matmul_int8(x, self.codes, self.scale)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*stack out in"]:
        """Decode to `dtype`."""
        return dequantize_int8(self.codes, self.scale, dtype=dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MixedWeight:
    """A stack whose layers are stored in different ways, as "dynamic" 4-bit checkpoints have it.

    A scan must not slice the pools, whose lengths differ. It closes over them and slices the rest::

        pools, per_layer = weight.split_for_scan()
        # in the body, with one slice of per_layer:
        y = x @ MixedWeight.join(pools, per_layer_slice)

    Attributes:
        pools: one stack for each way of storing.
        kind: which pool holds the layer, int32 [layers]; a scalar for a weight of one layer.
        index: where in that pool, likewise.
    """

    pools: tuple[Any, ...]
    kind: Leaf
    index: Leaf

    # As the other weights: a numpy array on the left leaves `@` to the weight.
    __array_ufunc__ = None

    @property
    def shape(self) -> Shape:
        """(out, in) of one layer."""
        return self.pools[0].shape

    @property
    def stack(self) -> int | None:
        """Number of layers; None for a weight of one layer."""
        return self.kind.shape[0] if self.kind.ndim else None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(pool.nbytes for pool in self.pools) + self.kind.nbytes + self.index.nbytes

    def split_for_scan(self) -> tuple[tuple[Weight, ...], PerLayer]:
        """The part that a scan over layers closes over, and the part that it slices."""
        return self.pools, (self.kind, self.index)

    @classmethod
    def join(cls, pools: tuple[Weight, ...], per_layer: PerLayer) -> "MixedWeight":
        """Undo `split_for_scan`, with all layers or with one."""
        return cls(pools, *per_layer)

    def __rmatmul__(self, x: Float[ArrayLike, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`; a gradient for `x` only."""
        x = _operand(x, self)
        return _switch_matmul(x, self.pools, self.kind, self.index)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*stack out in"]:
        """The matrix, or matrices, as a plain array."""

        def decode(per_layer: PerLayer) -> jax.Array:
            return _switch(per_layer[0], lambda pool: pool.layer(per_layer[1]).dequantize(dtype), self.pools)

        per_layer = (self.kind, self.index)
        return decode(per_layer) if self.stack is None else jax.lax.map(decode, per_layer)

    def framed(self, right: Placed, below: Placed, dtype: DTypeLike) -> Float[Array, "high wide"]:
        """``[[W, right], [below]]``; either may be empty."""
        return _switch(self.kind, lambda pool: pool.layer(self.index).framed(right, below, dtype), self.pools)

    def layer(self, index: int | Int[Array, ""]) -> Weight:
        """The weight of one layer as it is stored; under a trace, a mixed weight of one layer."""
        if self.stack is None:
            raise ValueError(
                f"layer(index) needs a weight with a layer axis; this one is a single {self.shape}"
            )
        kind, position = self.kind[index], self.index[index]
        if isinstance(kind, jax.core.Tracer):
            return MixedWeight(self.pools, kind, position)
        return self.pools[int(kind)].layer(int(position))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_4bit(weight, double_quant, quant_type, blocksize):
    def quantize(matrix):
        codes, absmax = quantize_4bit(matrix, quant_type=quant_type, blocksize=blocksize)
        return codes, double_quantize(absmax) if double_quant else absmax

    codes, absmax = (quantize if weight.ndim == 2 else jax.vmap(quantize))(weight)
    return NF4Weight(codes, absmax, weight.shape[-2:], quant_type, blocksize, weight.dtype.name)


@jax.jit
def _quantize_int8(weight):
    quantize = quantize_int8 if weight.ndim == 2 else jax.vmap(quantize_int8)
    return INT8Weight(*quantize(weight))


def _switch(kind, function, pools):
    return jax.lax.switch(kind, [functools.partial(function, pool) for pool in pools])


# Its own derivative, so that a scan saves no layer's weight: the pools are constants of the scan.
@jax.custom_vjp
def _switch_matmul(x, pools, kind, index):
    return _switch(kind, lambda pool: x @ pool.layer(index), pools)


def _switch_matmul_fwd(x, pools, kind, index):
    return _switch_matmul(x, pools, kind, index), (pools, kind, index)


def _switch_matmul_bwd(residuals, dy):
    pools, kind, index = residuals

    def transpose(pool: Weight) -> jax.Array:
        weight = pool.layer(index)
        x = jnp.zeros((*dy.shape[:-1], weight.shape[1]), dy.dtype)
        (dx,) = jax.vjp(lambda x: x @ weight, x)[1](dy)
        return dx

    return _switch(kind, transpose, pools), None, None, None


_switch_matmul.defvjp(_switch_matmul_fwd, _switch_matmul_bwd)


def _abstract(shape: tuple[int, ...], dtype: DTypeLike, stack: int | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape if stack is None else (stack, *shape), dtype)


def _operand(x: ArrayLike, weight: Weight) -> jax.Array:
    """`x` as a JAX array, refused if it does not fit or if the weight still has its layer axis."""
    x = jnp.asarray(x)
    if weight.stack is not None:
        raise ValueError(
            f"x @ weight needs the weight of one layer, but this one stacks {weight.stack}; "
            "slice it with .layer(i) or under jax.lax.scan"
        )
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x @ weight: x has shape {x.shape}, the weight has shape {weight.shape} [out, in]")
    return x
