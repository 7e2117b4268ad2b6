"""Values that checkpoint policies know by name."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_SAVED: ContextVar[Set[str] | None] = ContextVar("saved", default=None)
_IN_PLACE: ContextVar[Set[str]] = ContextVar("in_place", default=frozenset())
_STACKS_ARE_CARRIED: ContextVar[bool] = ContextVar("stacks_are_carried", default=True)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """`jax.checkpoint` of a layer's body, which learns what is kept of it.

    Attributes:
        kept: names of the values that the backward pass finds.
        policy: for `jax.checkpoint`; None keeps the body's arguments alone.
        in_place: those of `kept` that a scan computes in the stack in which they are kept, and reads there,
            see `vlmlora.nn.scan_in_place`. Where there are any, nothing is kept in host memory.
        on_host: those of `kept` that are kept in host memory.
        policy_on_device: `policy` for a scan that itself sends values to host memory: those are saved.
        spare: names of values that go to host memory as far as their copies leave beside a layer's work, the
            one that spares the most work first; those that do not are computed again.
        host_limit: bytes of host memory that values of all layers may take for that; None: any.
        with_on_host: the same checkpoint with some of `spare` in host memory, and none to spare.
        at_end: of the layer with which the backward pass begins, where that keeps something else; on the
            device alone.
    """

    kept: frozenset[str] = frozenset()
    policy: Callable[..., Any] | None = None
    in_place: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()
    policy_on_device: Callable[..., Any] | None = None
    spare: tuple[str, ...] = ()
    host_limit: int | None = None
    with_on_host: Callable[[Sequence[str]], "Checkpoint"] | None = None
    at_end: "Checkpoint | None" = None

    def __call__(self, body: Callable) -> Callable:
        """The body, checkpointed, for `jax.lax.scan`."""
        return self._checkpoint(body, self.kept, frozenset(), self.policy)

    def for_scan_in_place(self, body: Callable) -> Callable:
        """The body, checkpointed, for `vlmlora.nn.scan_in_place.scan_in_place`."""
        return self._checkpoint(body, self.kept, self.in_place, self.policy_on_device)

    def for_branch(self, branch: Callable) -> Callable:
        """A branch within such a body, checkpointed, for `vlmlora.nn.switch.switch_saving`.

        The body's checkpoint says where the values that it saves are kept.
        """
        return self._checkpoint(branch, self.kept, frozenset(), self.policy_on_device)

    def alone(self, body: Callable) -> Callable:
        """The body, checkpointed, for one layer outside of a scan."""
        # XLA would see there that what is computed again is there already, and keep it.
        return self._checkpoint(body, frozenset(), frozenset(), self.policy_on_device, prevent_cse=True)

    def _checkpoint(
        self,
        body: Callable,
        of_all: frozenset[str],
        in_place: frozenset[str],
        policy: Callable[..., Any] | None,
        *,
        prevent_cse: bool = False,
    ) -> Callable:
        @wraps(body)
        def knowing(*args: Any) -> Any:
            with saving(of_all, in_place):
                return body(*args)

        return jax.checkpoint(knowing, prevent_cse=prevent_cse, policy=policy)


def name_for_policies(x: jax.Array, name: str) -> jax.Array:
    """The same array under a name by which policies of `jax.checkpoint` know it."""
    return naming(name)(x)


def naming(name: str) -> Callable[[jax.Array], jax.Array]:
    """`name_for_policies` as of now, for what is traced later: the rules of a `jax.custom_vjp`."""
    if name in _IN_PLACE.get():
        return partial(checkpoint_name, name=name)
    # Without the barrier XLA runs a product that is used and saved twice: for its use, and again with the
    # stack of saved values as the place of its result. What is read there once it is saved is used once.
    return lambda x: checkpoint_name(jax.lax.optimization_barrier(x), name)


def computed(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The same arrays as results of a computation, which XLA, unlike a copy, neither drops nor moves."""
    true = jax.lax.optimization_barrier(jnp.bool_(True))  # XLA does not know that it is
    return [jax.lax.select_n(true, jax.lax.full_like(array, 0), array) for array in arrays]


@contextmanager
def saving(names: Set[str], in_place: Set[str] = frozenset()) -> Iterator[None]:
    """While the body traces, these names alone are known to be kept of all layers for the backward pass.

    Args:
        names: of what is kept.
        in_place: those of them that a scan computes where they are kept.
    """
    tokens = _SAVED.set(names), _IN_PLACE.set(in_place)
    try:
        yield
    finally:
        _SAVED.reset(tokens[0])
        _IN_PLACE.reset(tokens[1])


def is_of_one_layer(name: str) -> bool:
    """Whether the backward pass of what is traced surely finds a value of this name that is its own.

    It is computed anew, or kept of this layer alone.
    """
    names = _SAVED.get()
    return names is not None and name not in names


@contextmanager
def stacks_as_outputs() -> Iterator[None]:
    """What is traced here leaves saved values as outputs of `jax.lax.scan`, where they can be counted."""
    token = _STACKS_ARE_CARRIED.set(False)
    try:
        yield
    finally:
        _STACKS_ARE_CARRIED.reset(token)


def stacks_are_carried() -> bool:
    """Whether scans may compute saved values in place: not within `stacks_as_outputs`."""
    return _STACKS_ARE_CARRIED.get()
