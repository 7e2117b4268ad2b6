"""The two kinds of parameter. ``nnx.split(module, Trainable, ...)`` parts what learns from what does not."""

import jax
from flax import nnx
from jax.typing import DTypeLike


class Trainable(nnx.Param):
    """A parameter that receives a gradient and optimizer state."""


class Prepared(Trainable):
    """What is computed of a parameter for all layers before a scan; products read a layer's in the stack."""


class Frozen(nnx.Variable):
    """A parameter that never does: no gradient, no optimizer state, no float copy."""


def parameter(shape: tuple[int, ...], dtype: DTypeLike, *, stack: int | None, init: str) -> Frozen:
    """Declare an array by shape alone; loading or random initialisation fills it.

    Args:
        shape: shape of one layer's array.
        dtype: its type.
        stack: number of layers stacked on a new leading axis; None for an array that does not repeat.
        init: how random initialisation fills it: ``"normal"``, ``"zeros"`` or ``"ones"``.
    """
    return Frozen(abstract_array(shape, dtype, stack), init=init)


def abstract_array(shape: tuple[int, ...], dtype: DTypeLike, stack: int | None) -> jax.ShapeDtypeStruct:
    """Shape and type of an array, with the leading layer axis where there is one."""
    return jax.ShapeDtypeStruct(shape if stack is None else (stack, *shape), dtype)
