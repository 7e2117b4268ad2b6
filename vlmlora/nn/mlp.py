"""Feed-forward blocks."""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from vlmlora.nn.linear import Linear, apply_through
from vlmlora.nn.saved import is_of_one_layer

MLP_UP = "mlp_up"
"""Name of what the first, wide projection of a feed-forward block computes, for checkpoint policies."""
MLP_GATE = "mlp_gate"
"""Name of what the projection beside it computes, where the block is gated."""


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, as ``torch.nn.GELU()``: ``x`` times the normal distribution's integral up to there.

    From the error function, as there, in float32 or x's own type if that is wider. `jax.nn.gelu` takes the
    complementary one, with which a GPU needs twice the time.
    """
    wide = _widened(x)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    wide = _widened(x)
    cdf = _normal_cdf(wide)
    slope = cdf + wide * jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (wide * cdf).astype(x.dtype), (slope * dx).astype(x.dtype)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 2**-0.5))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU with the tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that a Hugging Face config calls `name`.

    Raises:
        ValueError: unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class FeedForward(nnx.Module):
    """A block that takes every token by itself."""

    def __call__(
        self, x: Float[Array, "*batch hidden"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch hidden"]:
        """Apply the block; `key` drives adapter dropout."""
        return self.beside(x, None, key=key)[1]

    def add_to(
        self, x: Float[Array, "*batch hidden"], norm: nnx.Module, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch hidden"]:
        """``x + block(norm(x))``."""
        x, y = self.beside(x, norm, key=key)
        return x + y

    @abc.abstractmethod
    def beside(
        self, x: Float[Array, "*batch hidden"], norm: nnx.Module | None, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "*batch hidden"], Float[Array, "*batch hidden"]]:
        """x for a residual connection, and ``block(norm(x))`` or, without a norm, ``block(x)``.

        See `apply_to_normed`.
        """


class MLP(FeedForward):
    """``fc2(act(fc1(x)))``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str,
        dtype: DTypeLike,
        stack: int | None = None,
    ):
        self.fc1 = Linear(hidden_size, intermediate_size, bias=True, dtype=dtype, stack=stack)
        self.fc2 = Linear(intermediate_size, hidden_size, bias=True, dtype=dtype, stack=stack)
        self.act = activation(hidden_act)

    def beside(self, x: jax.Array, norm: nnx.Module | None, *, key: PRNGKeyArray | None = None):
        """See `FeedForward.beside`."""
        return apply_through(self.act, norm, x, [self.fc1], self.fc2, names=[MLP_UP], key=key)


@dataclass(frozen=True)
class Gated:
    """What stands between a gated block's projections.

    Equal for equal activations, so that what is compiled for one layer serves all.
    """

    act: Callable[[jax.Array], jax.Array]

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """``act(gate) * up``."""
        return self.act(gate) * up


class GatedMLP(FeedForward):
    """``down(act(gate(x)) * up(x))`` (SwiGLU with silu, https://arxiv.org/abs/2002.05202)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str,
        bias: bool,
        dtype: DTypeLike,
        stack: int | None = None,
    ):
        shared = {"bias": bias, "dtype": dtype, "stack": stack}
        self.gate_proj = Linear(hidden_size, intermediate_size, **shared)
        self.up_proj = Linear(hidden_size, intermediate_size, **shared)
        self.down_proj = Linear(intermediate_size, hidden_size, **shared)
        self.act = activation(hidden_act)

    def beside(self, x: jax.Array, norm: nnx.Module | None, *, key: PRNGKeyArray | None = None):
        """See `FeedForward.beside`."""
        is_tight = is_of_one_layer(MLP_GATE) and is_of_one_layer(MLP_UP)
        wide, names = [self.gate_proj, self.up_proj], [MLP_GATE, MLP_UP]
        return apply_through(
            Gated(self.act), norm, x, wide, self.down_proj, names=names, key=key, is_tight=is_tight
        )
