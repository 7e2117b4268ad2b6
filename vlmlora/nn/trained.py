"""Parameters of the base model that train themselves, in whole or in part, beside their frozen originals.

Each stands where a `Frozen` stood and is read like one, so that the modules do not know of them; the original
is put back when the adapter is taken off. What trains is float32 and computed with in the original's type.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vlmlora.nn.variables import Frozen, Trainable
from vlmlora.quantization.weights import DenseWeight, Weight


class TrainedParameter(nnx.Module):
    """A parameter that trains whole, or in some layers of a stack.

    Attributes:
        frozen: the original; None for a head that the base model does not have, because it is tied.
        trained: what is used instead, float32; on stacked layers with a leading axis over those that train.
        dtype: type of the original.
        is_weight: whether the value is a `DenseWeight`.
        layers: which layers of the stack train, in ascending order; None for a parameter without layers.
        is_partial: whether other layers of the stack keep the original.
        is_tied: whether a head that is tied to this embedding follows it.
        is_copy: whether PEFT trains a copy of the parameter, as for ``modules_to_save``, and not itself, as
            for biases.
    """

    def __init__(
        self,
        frozen: Frozen | None,
        trained: Float[Array, "..."],
        *,
        dtype: DTypeLike,
        is_weight: bool,
        layers: tuple[int, ...] | None = None,
        is_partial: bool = False,
        is_tied: bool = False,
        is_copy: bool = True,
    ):
        self.frozen = nnx.data(frozen)
        self.trained = Trainable(trained)
        self.dtype = jnp.dtype(dtype)
        self.is_weight = is_weight
        self.layers = layers
        self.is_partial = is_partial
        self.is_tied = is_tied
        self.is_copy = is_copy

    def get_value(self) -> jax.Array | DenseWeight:
        """The parameter as its module sees it, with what has been trained in it, in the original's type."""
        value = self.trained.get_value().astype(self.dtype)
        if self.is_partial:
            original = self.frozen.get_value()
            original = original.value if self.is_weight else original
            value = original.at[np.array(self.layers)].set(value)
        return DenseWeight(value) if self.is_weight else value

    def take(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """Rows of an embedding."""
        return self.trained.get_value()[ids].astype(self.dtype)

    def as_head(self) -> Weight:
        """An embedding as the weight of the head that is tied to it, which follows if `is_tied`."""
        return DenseWeight(self.get_value() if self.is_tied else self.frozen.get_value())

    def expand(self, stack: int) -> "TrainedParameter | Trainable":
        """What a scan over `stack` layers can slice: every layer has an entry."""
        return Trainable(self.get_value()) if self.is_partial else self


class TrainedRows(nnx.Module):
    """An embedding table, or the weight of a head, of which some rows train: PEFT's trainable tokens.

    Attributes:
        frozen: the original.
        trained: the rows, [rows, features] float32.
        rows: which they are.
        is_tied: whether a head that is tied to this embedding follows it.
        is_copy: always; as for `TrainedParameter`.
    """

    def __init__(
        self,
        frozen: Frozen,
        trained: Float[Array, "rows features"],
        *,
        rows: tuple[int, ...],
        is_tied: bool = False,
    ):
        self.frozen = frozen
        self.trained = Trainable(trained)
        self.rows = rows
        self.is_tied = is_tied
        self.is_copy = True

    def get_value(self) -> "jax.Array | RowsWeight":
        """The whole table with the trained rows in it, or a head's weight that knows them."""
        original = self.frozen.get_value()
        if isinstance(original, Weight):
            return RowsWeight(original, self.trained.get_value(), self.rows)
        return original.at[np.array(self.rows)].set(self.trained.get_value().astype(original.dtype))

    def take(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """Rows of the table. The frozen ones get no gradient, nor is the table copied."""
        order = np.argsort(self.rows)
        ascending = jnp.asarray(np.array(self.rows)[order], ids.dtype)
        place = jnp.clip(jnp.searchsorted(ascending, ids), 0, len(self.rows) - 1)
        original = self.frozen.get_value()[ids]
        trained = self.trained.get_value()[jnp.asarray(order)[place]].astype(original.dtype)
        return jnp.where((ascending[place] == ids)[..., None], trained, original)

    def as_head(self) -> Weight:
        """The embedding as the weight of the head that is tied to it, which follows if `is_tied`."""
        original = DenseWeight(self.frozen.get_value())
        return RowsWeight(original, self.trained.get_value(), self.rows) if self.is_tied else original


TRAINED = (TrainedParameter, TrainedRows)
"""What may stand in a frozen parameter's place."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RowsWeight:
    """A weight of which some rows are others, without a copy of the rest.

    Attributes:
        base: the weight of the other rows.
        trained: the rows, [rows, in].
        rows: which they are.
    """

    base: Weight
    trained: Float[Array, "rows in"]
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.base.shape

    @property
    def stack(self) -> None:
        """There are no layers."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.base.nbytes + self.trained.size * self.trained.dtype.itemsize

    def __rmatmul__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`."""
        own = x @ DenseWeight(self.trained)
        return (x @ self.base).at[..., np.array(self.rows)].set(own)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "out in"]:
        """The whole matrix."""
        return self.base.dequantize(dtype).at[np.array(self.rows)].set(self.trained.astype(dtype))

    def layer(self, index: int) -> "Weight":
        """Not to be called.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"layer({index}) needs a weight with a layer axis; this one is a single {self.shape}"
        )
