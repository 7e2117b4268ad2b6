"""Elementwise functions that write their results over their arguments."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from vlmlora_kernels.dispatch import obstacle_to_in_place
from vlmlora_kernels.hopper import in_place as hopper
from vlmlora_kernels.lowering import on_cuda, one_by_one


def elementwise_in_place(
    function: Callable[..., Sequence[jax.Array]], *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """``function(*arrays)``, each result in the memory of an argument that is not needed any more.

    The gradient of a gated activation, for example, reads three wide arrays and writes three; XLA would take
    memory for six of them. The function is computed in float32 and rounded once.

    Args:
        function: elementwise; as many results as arguments.
        arrays: of one shape and type. What is needed later is copied.

    Returns:
        The results, in the type of the arguments.

    Raises:
        ValueError: no kernel takes this here; `obstacle` says so beforehand.

    Example:
        >>> import jax.numpy as jnp
        >>> from vlmlora_kernels.in_place import obstacle
        >>> obstacle(lambda x, y: (x + y, x - y), jnp.ones(4), jnp.ones(4))
        'the kernel takes 16-bit arrays of one shape and type, and these are float32[4], float32[4]'
    """
    if reason := obstacle(function, *arrays):
        raise ValueError(f"elementwise_in_place cannot run this: {reason}")
    kernel = one_by_one(lambda *arrays: hopper.in_place(function, *arrays))

    def in_xla(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        results = function(*(array.astype(jnp.float32) for array in arrays))
        return tuple(y.astype(x.dtype) for x, y in zip(arrays, results, strict=True))

    return on_cuda(kernel, in_xla, *arrays)


def obstacle(function: Callable[..., Sequence[jax.Array]], *arrays: jax.Array) -> str | None:
    """Why `elementwise_in_place` cannot run a function on arrays where this is traced; None if it can."""
    primitives = hopper.primitives_of(function, len(arrays))
    return obstacle_to_in_place([jax.typeof(array) for array in arrays], primitives)
