"""Run an activation through layers whose parameters are stacked on a leading axis."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PRNGKeyArray, PyTree

from vlmlora.nn.linear import Linear
from vlmlora.nn.trained import TRAINED
from vlmlora.quantization.weights import MixedWeight

LAYER_INPUT = "layer_input"
"""Name of a layer's input, for checkpoint policies that save or offload it."""

Remat = Callable[[Callable], Callable]
"""A transformation of the layer's body, e.g. ``functools.partial(jax.checkpoint, policy=...)``."""


def scan_layers(
    layers: nnx.Module,
    x: jax.Array,
    call: Callable[..., tuple[jax.Array, PyTree]],
    *,
    per_layer: PyTree = None,
    key: PRNGKeyArray | None = None,
    remat: Remat | None = None,
) -> tuple[jax.Array, PyTree]:
    """``x, y = call(layer, x, per_layer[i], key=key_i)`` for every layer, as one ``jax.lax.scan``.

    Args:
        layers: one layer's module in which every array has a leading axis over the layers.
        x: input of the first layer.
        call: applies one layer; returns the next layer's input and an output of its own, or None.
        per_layer: arrays with a leading layer axis that `call` receives slices of.
        key: split into one key a layer for dropout; None for none.
        remat: wraps the body of the scan; the layer's input is named `LAYER_INPUT` inside of it.

    Returns:
        The last layer's output, and the layers' own outputs stacked.
    """
    graphdef, state = nnx.split(_expand_adapters(layers))
    leaves, treedef = jax.tree.flatten(state, is_leaf=_is_mixed)
    pools = [leaf.split_for_scan()[0] if _is_mixed(leaf) else None for leaf in leaves]
    sliced = [leaf.split_for_scan()[1] if _is_mixed(leaf) else leaf for leaf in leaves]
    keys = None if key is None else jax.random.split(key, layers.stack)

    def body(x: jax.Array, slices: Any) -> tuple[jax.Array, PyTree]:
        layer_leaves, layer_inputs, layer_key = slices
        x = checkpoint_name(x, LAYER_INPUT)
        joined = [
            leaf if pool is None else MixedWeight.join(pool, leaf)
            for pool, leaf in zip(pools, layer_leaves, strict=True)
        ]
        layer = nnx.merge(graphdef, jax.tree.unflatten(treedef, joined))
        return call(layer, x, layer_inputs, key=layer_key)

    return jax.lax.scan(body if remat is None else remat(body), x, (sliced, per_layer, keys))


def _is_mixed(leaf: Any) -> bool:
    return isinstance(leaf, MixedWeight)


def _expand_adapters(layers: nnx.Module) -> nnx.Module:
    """A copy in which every adapter and trained parameter has an entry for every layer.

    An adapter has zeros where it has no parameters of its own, a trained parameter the original.
    """
    layers = nnx.merge(*nnx.split(layers))
    for _, module in list(nnx.iter_modules(layers)):
        for name, value in list(vars(module).items()):
            if isinstance(value, TRAINED) or (name == "adapter" and isinstance(module, Linear) and value):
                setattr(module, name, value.expand(layers.stack))
    return layers
