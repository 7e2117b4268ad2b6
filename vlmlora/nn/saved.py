"""Values that checkpoint policies know by name."""

import jax
from jax.ad_checkpoint import checkpoint_name


def name_for_policies(x: jax.Array, name: str) -> jax.Array:
    """The same array under a name by which policies of `jax.checkpoint` know it."""
    # Without the barrier XLA runs a product that is used and saved twice: for its use, and again with the
    # stack of saved values as the place of its result.
    return checkpoint_name(jax.lax.optimization_barrier(x), name)
