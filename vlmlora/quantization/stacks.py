"""Stacks of weights: building one from its layers, filling one layer by layer, layers stored differently."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vlmlora.quantization.weights import Shape, Weight, check_operand

PerLayer = tuple[Int[Array, "*stack"], Int[Array, "*stack"]]


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

    pools: tuple[Weight, ...]
    kind: Int[Array, "*stack"]
    index: Int[Array, "*stack"]

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

    def __rmatmul__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`; a gradient for `x` only."""
        check_operand(x, self)
        return _switch_matmul(x, self.pools, self.kind, self.index)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*stack out in"]:
        """The matrix, or matrices, as a plain array."""

        def decode(per_layer: PerLayer) -> jax.Array:
            return _switch(per_layer[0], lambda pool: pool.layer(per_layer[1]).dequantize(dtype), self.pools)

        per_layer = (self.kind, self.index)
        return decode(per_layer) if self.stack is None else jax.lax.map(decode, per_layer)

    def layer(self, index: int) -> Weight:
        """The weight of one layer as it is stored; under a trace, a mixed weight of one layer."""
        if self.stack is None:
            raise ValueError(
                f"layer(index) needs a weight with a layer axis; this one is a single {self.shape}"
            )
        kind, position = self.kind[index], self.index[index]
        if isinstance(kind, jax.core.Tracer):
            return MixedWeight(self.pools, kind, position)
        return self.pools[int(kind)].layer(int(position))


def stack_weights(layers: Sequence[Weight]) -> Weight:
    """Stack weights of single layers.

    Works on arrays and on shapes (`jax.ShapeDtypeStruct` leaves) alike.

    Returns:
        A weight of the layers' own type where all are stored alike, else a `MixedWeight`.

    Raises:
        ValueError: no layers, or layers that differ in (out, in).
    """
    shapes = {tuple(layer.shape) for layer in layers}
    if len(shapes) != 1:
        raise ValueError(f"a stack needs layers of one shape (out, in); found {sorted(shapes)}")
    pools: dict[Any, list[Weight]] = {}
    positions = []
    for layer in layers:
        leaves, structure = jax.tree.flatten(layer)
        pool = pools.setdefault((structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)), [])
        positions.append((pool, len(pool)))
        pool.append(layer)
    stacks = tuple(jax.tree.map(_stack_leaves, *pool) for pool in pools.values())
    if len(stacks) == 1:
        return stacks[0]
    kind_of = {id(pool): kind for kind, pool in enumerate(pools.values())}
    kind = np.asarray([kind_of[id(pool)] for pool, _ in positions], np.int32)
    return MixedWeight(stacks, kind, np.asarray([index for _, index in positions], np.int32))


def allocate(weight: Weight) -> Weight:
    """Zeros in place of shapes, to be filled with `set_layer`; arrays stay as they are."""
    return jax.tree.map(
        lambda leaf: (
            jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else jnp.asarray(leaf)
        ),
        weight,
    )


def set_layer(stack: Weight, index: int, layer: Weight) -> Weight:
    """Put one layer into a stack, in place: the arrays of `stack` are donated and must not be used again.

    Args:
        stack: a weight with a layer axis, on the device.
        index: which layer.
        layer: the weight of one layer, stored as that layer of the stack is; on the host or the device.

    Returns:
        The stack with the layer in it.

    Raises:
        IndexError: no such layer.
        ValueError: `layer` is stored in another way or has another shape.
    """
    if stack.stack is None or not 0 <= index < stack.stack:
        raise IndexError(f"layer {index} of a weight with {stack.stack} layers")
    if isinstance(stack, MixedWeight):
        kind = int(stack.kind[index])
        pool = set_layer(stack.pools[kind], int(stack.index[index]), layer)
        pools = (*stack.pools[:kind], pool, *stack.pools[kind + 1 :])
        return dataclasses.replace(stack, pools=pools)
    expected = jax.eval_shape(lambda weight: weight.layer(0), stack)
    if _signature(expected) != _signature(layer):
        raise ValueError(
            f"layer {index} of the stack is stored as {_signature(expected)}, not as {_signature(layer)}; "
            "build the stack from all its layers with stack_weights"
        )
    return _set_layer(stack, np.int32(index), layer)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, index, layer):
    return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, index, axis=0), stack, layer
    )


def _signature(weight: Weight) -> str:
    leaves, structure = jax.tree.flatten(weight)
    arrays = ", ".join(f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}" for leaf in leaves)
    return f"{structure} of ({arrays})"


def _stack_leaves(*leaves):
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    return jnp.stack(leaves)


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
