"""Random initialisation of an abstract model."""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

INITIALIZER_RANGE = 0.02


def init_parameters(model: nnx.Module, key: PRNGKeyArray, *, std: float = INITIALIZER_RANGE) -> None:
    """Fill every abstract array in place: normal(0, `std`), zeros or ones, as the module declares.

    An array's key depends on its path alone, so that the order of the modules changes nothing.
    """
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        fill = variable.get_metadata("init")
        leaf_key = jax.random.fold_in(key, zlib.crc32(".".join(map(str, path)).encode()))
        variable.set_value(
            jax.tree.map(lambda a, k=leaf_key, fill=fill: _fill(fill, k, a, std), variable.get_value())
        )


def _fill(fill: str, key: PRNGKeyArray, array: jax.ShapeDtypeStruct, std: float) -> jax.Array:
    if fill == "normal":
        return (std * jax.random.normal(key, array.shape, jnp.float32)).astype(array.dtype)
    return jnp.full(array.shape, {"zeros": 0, "ones": 1}[fill], array.dtype)
