"""Linear layer. It holds a weight that knows how to multiply, and perhaps an adapter."""

from collections.abc import Callable, Iterator, Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from vlmlora.nn.low_rank import (
    Factors,
    Norm,
    add_bias,
    low_rank_block,
    low_rank_products,
    room_for,
    takes_norm,
)
from vlmlora.nn.norm import LayerNorm, RMSNorm
from vlmlora.nn.saved import name_for_policies
from vlmlora.nn.trained import TRAINED
from vlmlora.nn.variables import Frozen, abstract_array, parameter
from vlmlora.quantization.sharded import BATCH, ShardedTable, batch_shards, is_whole, layout_of, row_spec
from vlmlora.quantization.weights import DenseWeight, Framable, Weight


class Linear(nnx.Module):
    """``y = x @ W.T + b``, plus what an adapter adds.

    Attributes:
        weight: a `vlmlora.quantization.weights.Weight` of shape [out_features, in_features].
        bias: [out_features], or None.
        adapter: None, or a module called as ``adapter(x, y, base=self, key=key)`` that returns the new y.
            Where all it does is to add a low-rank product, its method ``factors(dtype, key)`` says so.
        stack: number of layers on the leading axis of every array; None where the layer does not repeat.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: DTypeLike,
        stack: int | None = None,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.stack = stack
        shape = (out_features, in_features)
        self.weight = Frozen(DenseWeight(abstract_array(shape, dtype, stack)), init="normal")
        self.bias = nnx.data(parameter((out_features,), dtype, stack=stack, init="zeros") if bias else None)
        self.adapter = nnx.data(None)

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        """Apply the layer; `key` drives the adapter's dropout, and None switches it off."""
        return apply_to_same(x, self, key=key)[0]

    def _apply(self, x: jax.Array, key: PRNGKeyArray | None) -> jax.Array:
        x = x[..., : self.in_features]
        y = self._add_bias(x @ self.weight.get_value())
        return y if self.adapter is None else self.adapter(x, y, base=self, key=key)

    def _add_bias(self, y: jax.Array) -> jax.Array:
        return add_bias(y, None if self.bias is None else self.bias.get_value())


def apply_to_same(
    x: Float[Array, "*batch in_and_room"],
    *layers: Linear,
    key: PRNGKeyArray | None = None,
    before: Linear | None = None,
) -> tuple[Float[Array, "*batch out_and_room"], ...]:
    """What several layers make of the same x, their adapters' products in one with the layers' own.

    Args:
        x: the layers' input; columns beyond `in_features` are zero, and stand where a layer with `before`
            has left them.
        layers: of as many input features each.
        key: drives the adapters' dropout, and None switches it off.
        before: a layer to come. Where that saves a copy, the results, all of one width, have some columns of
            zeros more, in which this layer's adapter works; a function that is applied to them in between
            keeps zeros zero.
    """
    return apply_to_normed(None, x, *layers, key=key, before=before)[1]


def apply_to_normed(
    norm: nnx.Module | None,
    x: Float[Array, "*batch in_and_room"],
    *layers: Linear,
    key: PRNGKeyArray | None = None,
    before: Linear | None = None,
) -> tuple[Float[Array, "*batch in_and_room"], tuple[Float[Array, "*batch out_and_room"], ...]]:
    """x, and what several layers make of its norm; see `apply_to_same`.

    Whoever goes on with x, as a residual connection does, takes the one that is returned: in the backward
    pass the gradient that arrives there and the norm's are added where the latter is computed.

    Args:
        norm: of x; None for x itself.
        x, layers, key, before: see `apply_to_same`.
    """
    factors = [_factors_in_one_product(layer, x, key) for layer in layers]
    fused = _fused_norm(norm, x, factors)
    if norm is not None and fused is None:
        return x, apply_to_normed(None, norm(x), *layers, key=key, before=before)[1]
    room = 0
    if before is not None and all(factors) and (after := _factors_in_one_product(before, x, key)):
        room = _room_between(factors, before, after)
    joined = [(layer, each) for layer, each in zip(layers, factors, strict=True) if each]
    products: Iterator[jax.Array] = iter(())
    if joined:
        weights = [layer.weight.get_value() for layer, _ in joined]
        products = iter(low_rank_products(x, weights, [each for _, each in joined], room=room, norm=fused))
    x = x if fused is None else next(products)
    ys = tuple(
        layer._add_bias(next(products)) if each else layer._apply(x, key)
        for layer, each in zip(layers, factors, strict=True)
    )
    return x, ys


def apply_through(
    function: Callable[..., jax.Array],
    norm: nnx.Module | None,
    x: Float[Array, "*batch in_features"],
    layers: Sequence[Linear],
    last: Linear,
    *,
    names: Sequence[str],
    key: PRNGKeyArray | None = None,
    is_tight: bool = False,
) -> tuple[Float[Array, "*batch in_features"], Float[Array, "*batch out"]]:
    """x, and ``last(function(*(layer(norm(x)) for layer in layers)))``; see `apply_to_normed`.

    The backward pass reads what is between the layers once for all that it needs of it, as far as it can.

    Args:
        function: of the layers' results; elementwise, and of zeros zero.
        norm: of x; None for x itself.
        x: what is normalised.
        layers: of as many input and output features each.
        last: what is applied to the function's result.
        names: by which policies of `jax.checkpoint` know the layers' results.
        key: drives the adapters' dropout, and None switches it off.
        is_tight: the backward pass holds these results for this alone, and had better take no memory beside
            them.
    """
    factors = [_factors_in_one_product(layer, x, key) for layer in layers]
    last_factors = _factors_in_one_product(last, x, key)
    if last_factors is not None and all(factors):
        fused = _fused_norm(norm, x, factors)
        same, y = low_rank_block(
            x if norm is None or fused is not None else norm(x),
            [layer.weight.get_value() for layer in layers],
            factors,
            [None if layer.bias is None else layer.bias.get_value() for layer in layers],
            last.weight.get_value(),
            last_factors,
            room=_room_between(factors, last, last_factors),
            function=function,
            names=names,
            is_tight=is_tight,
            norm=fused,
        )
        return x if fused is None else same, last._add_bias(y)
    x, ys = apply_to_normed(norm, x, *layers, key=key)
    ys = [name_for_policies(y, name) for y, name in zip(ys, names, strict=True)]
    if last_factors is None:
        return x, last(function(*ys), key=key)
    weights = [last.weight.get_value()]
    (y,) = low_rank_products(ys, weights, [last_factors], function=function, is_tight=is_tight)
    return x, last._add_bias(y)


def _fused_norm(norm: nnx.Module | None, x: jax.Array, factors: Sequence[Factors | None]) -> Norm | None:
    """The norm as low-rank products take it, where kernels compute it beside all of them."""
    if not (factors and all(factors) and takes_norm(x, factors)):
        return None
    if isinstance(norm, RMSNorm) and isinstance(norm.weight, Frozen):
        return Norm(norm.weight.get_value(), None, norm.eps)
    if isinstance(norm, LayerNorm) and isinstance(norm.weight, Frozen) and isinstance(norm.bias, Frozen):
        weight, bias = norm.weight.get_value(), norm.bias.get_value()
        # The kernel takes them in x's type, to which the layer rounds its result alone.
        return Norm(weight, bias, norm.eps) if weight.dtype == bias.dtype == x.dtype else None
    return None


def _room_between(factors: Sequence[Factors], last: Linear, last_factors: Factors) -> int:
    """Columns to the right of layers' results in which their products and the next layer's find place."""
    return room_for(last.in_features, [each.a.shape[0] for each in (*factors, last_factors)])


def _factors_in_one_product(layer: Linear, x: jax.Array, key: PRNGKeyArray | None) -> Factors | None:
    """The adapter's factors, where one product with the weight does both and is worth it."""
    weight = layer.weight.get_value()
    layout = layout_of(weight)
    tokens = x.size // x.shape[-1]
    if layout is not None and row_spec(x.shape, layout.mesh)[0] == BATCH:
        tokens //= batch_shards(layout.mesh)
    # Of few tokens the weight is the larger part, and it is better left as it is stored.
    is_worth_it = 2 * tokens >= min(layer.in_features, layer.out_features)
    # On a mesh a product may be cut by features, and a mixed weight holds several that are.
    is_framable = isinstance(weight, Framable) if layout is None else is_whole(weight)
    if layer.adapter is None or not is_worth_it or not is_framable:
        return None
    return layer.adapter.factors(x.dtype, key)


class Embedding(nnx.Module):
    """Token embedding table.

    Attributes:
        weight: [num_embeddings, features].
        mesh: the devices over which it is cut; None on a single one.
    """

    def __init__(self, num_embeddings: int, features: int, *, dtype: DTypeLike):
        self.weight = parameter((num_embeddings, features), dtype, stack=None, init="normal")
        self.mesh = None

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Rows of the table: int [...] → [..., features]."""
        if isinstance(self.weight, TRAINED):
            return self.weight.take(input_ids)
        if self.mesh is not None:
            return ShardedTable.of(self.weight.get_value(), self.mesh).rows(input_ids)
        return self.weight.get_value()[input_ids]

    def as_head(self) -> Weight:
        """The table as the weight of a head that is tied to it."""
        if isinstance(self.weight, TRAINED):
            return self.weight.as_head()
        table = self.weight.get_value()
        return DenseWeight(table) if self.mesh is None else ShardedTable.of(table, self.mesh).as_weight()
