"""Stacks of weights: building one from its layers and filling one layer by layer."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmlora.quantization.weights import MixedWeight, Weight


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
