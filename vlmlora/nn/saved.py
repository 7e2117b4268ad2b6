"""Values that checkpoint policies know by name."""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.ad_checkpoint import checkpoint_name

_SAVED: ContextVar[Set[str] | None] = ContextVar("saved", default=None)


def name_for_policies(x: jax.Array, name: str) -> jax.Array:
    """The same array under a name by which policies of `jax.checkpoint` know it."""
    # Without the barrier XLA runs a product that is used and saved twice: for its use, and again with the
    # stack of saved values as the place of its result.
    return checkpoint_name(jax.lax.optimization_barrier(x), name)


@contextmanager
def saving(names: Set[str]) -> Iterator[None]:
    """While the body traces, these names alone are known to be kept for the backward pass."""
    token = _SAVED.set(names)
    try:
        yield
    finally:
        _SAVED.reset(token)


def is_computed_again(name: str) -> bool:
    """Whether the backward pass of what is traced surely computes a value of this name anew."""
    names = _SAVED.get()
    return names is not None and name not in names
