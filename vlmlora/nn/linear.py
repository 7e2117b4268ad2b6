"""Linear layer. It holds a weight that knows how to multiply, and perhaps an adapter."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from vlmlora.nn.low_rank import Factors, low_rank_products
from vlmlora.nn.trained import TRAINED
from vlmlora.nn.variables import Frozen, abstract_array, parameter
from vlmlora.quantization.sharded import ShardedTable
from vlmlora.quantization.weights import Augmentable, DenseWeight, Weight


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
        y = self._add_bias(x @ self.weight.get_value())
        return y if self.adapter is None else self.adapter(x, y, base=self, key=key)

    def _add_bias(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


def apply_to_same(
    x: Float[Array, "*batch in_features"], *layers: Linear, key: PRNGKeyArray | None = None
) -> tuple[Float[Array, "*batch out_features"], ...]:
    """What several layers make of the same x, their adapters' first products computed as one.

    Args:
        x: the layers' input.
        layers: of as many input features each.
        key: drives the adapters' dropout, and None switches it off.
    """
    factors = [_factors_in_one_product(layer, x, key) for layer in layers]
    joined = [(layer, each) for layer, each in zip(layers, factors, strict=True) if each is not None]
    weights = [layer.weight.get_value() for layer, _ in joined]
    products = iter(low_rank_products(x, weights, [each for _, each in joined]) if joined else ())
    return tuple(
        layer._apply(x, key) if each is None else layer._add_bias(next(products))
        for layer, each in zip(layers, factors, strict=True)
    )


def _factors_in_one_product(layer: Linear, x: jax.Array, key: PRNGKeyArray | None) -> Factors | None:
    """The adapter's factors, where one product with the weight does both and is worth it."""
    weight = layer.weight.get_value()
    # Of few tokens the weight is the larger part, and it is better left as it is stored.
    if layer.adapter is None or 2 * x.size < x.shape[-1] ** 2 or not isinstance(weight, Augmentable):
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
