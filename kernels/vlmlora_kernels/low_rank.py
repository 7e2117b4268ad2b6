"""The backward pass of an elementwise function between products with low-rank factors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmlora_kernels.dispatch import obstacle_to_low_rank_gradients
from vlmlora_kernels.hopper import low_rank_gradients as hopper
from vlmlora_kernels.hopper.in_place import primitives_of
from vlmlora_kernels.lowering import on_cuda, one_by_one


class LowRankGradients(NamedTuple):
    """What `low_rank_gradients` finds.

    Attributes:
        gradients: of each argument, [tokens, width] in its type. Columns to the right of the features hold
            nothing of use.
        products: ``gradient @ b`` of each, float32 [tokens, r].
        value_sum: ``value.T @ projected``, float32 [features, r].
        gradient_sums: ``gradient.T @ low_rank`` of each, float32 [features, r].
    """

    gradients: list[Float[Array, "tokens width"]]
    products: list[Float[Array, "tokens _"]]
    value_sum: Float[Array, "features _"]
    gradient_sums: list[Float[Array, "features _"]]


def low_rank_gradients(
    function: Callable[..., Sequence[jax.Array]],
    cotangent: Float[Array, "tokens width"],
    xs: Sequence[Float[Array, "tokens width"]],
    projected: Float[Array, "tokens _"],
    low_ranks: Sequence[Float[Array, "tokens _"]],
    bs: Sequence[Float[Array, "features _"]],
    *,
    is_in_place: bool = False,
) -> LowRankGradients:
    """The gradients of an elementwise function's arguments, and each wide array's product with its factor.

    In a feed-forward block with LoRA (https://arxiv.org/abs/2106.09685) the arguments are ``x W.T + l B.T``
    with ``l = x A.T``, and the value meets the A of the last projection. Each of the products alone would
    read a wide array again. The function is computed in float32 and its results are rounded once, before they
    are multiplied.

    Args:
        function: elementwise, called as ``function(cotangent, *xs)``; gives the value and the gradients. The
            kernel takes seconds to compile: calls with equal functions and alike arrays share it.
        cotangent: gradient of the value.
        xs: the arguments, 16-bit. Columns to the right of the features are room for others' use, and finite.
        projected: gradient of the value's product with its A.
        low_ranks: for each argument its l.
        bs: for each argument its B.
        is_in_place: the gradients take the place of the arguments, which are copied if they are needed later.

    Raises:
        ValueError: no kernel takes this here; `obstacle` says so beforehand.

    Example:
        >>> import jax.numpy as jnp
        >>> from vlmlora_kernels.low_rank import obstacle
        >>> wide, narrow, b = jnp.ones((2, 8)), jnp.ones((2, 1)), jnp.ones((8, 1))
        >>> obstacle(lambda d, x: (x * x, 2 * x * d), wide, [wide], narrow, [narrow], [b])
        'the kernel takes 16-bit matrices of one shape and type, and these are float32[2, 8], float32[2, 8]'
    """
    if reason := obstacle(function, cotangent, xs, projected, low_ranks, bs):
        raise ValueError(f"low_rank_gradients cannot run this: {reason}")

    arguments = cotangent, list(xs), projected, list(low_ranks), list(bs)
    return _low_rank_gradients(*arguments, function=function, is_in_place=is_in_place)


@functools.partial(jax.jit, static_argnames=("function", "is_in_place"))
def _low_rank_gradients(cotangent, xs, projected, low_ranks, bs, *, function, is_in_place):
    def kernel(*arguments: Any) -> LowRankGradients:
        return LowRankGradients(*hopper.low_rank_gradients(function, *arguments, is_in_place=is_in_place))

    def in_xla(cotangent, xs, projected, low_ranks, bs) -> LowRankGradients:
        results = function(*(x.astype(jnp.float32) for x in (cotangent, *xs)))
        value, *gradients = (y.astype(cotangent.dtype) for y in results)
        features = bs[0].shape[0]

        def contract(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
            dimensions = (((axis,), (0,)), ((), ()))
            a = a[:, :features]
            return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

        products = [contract(d, b, 1) for d, b in zip(gradients, bs, strict=True)]
        sums = [contract(d, low_rank, 0) for d, low_rank in zip(gradients, low_ranks, strict=True)]
        return LowRankGradients(gradients, products, contract(value, projected, 0), sums)

    return on_cuda(one_by_one(kernel), in_xla, cotangent, xs, projected, low_ranks, bs)


def obstacle(
    function: Callable[..., Sequence[jax.Array]],
    cotangent: Float[Array, "tokens width"],
    xs: Sequence[Float[Array, "tokens width"]],
    projected: Float[Array, "tokens _"],
    low_ranks: Sequence[Float[Array, "tokens _"]],
    bs: Sequence[Float[Array, "features _"]],
) -> str | None:
    """Why `low_rank_gradients` cannot run where this is traced; None if it can."""
    wide = [jax.typeof(array) for array in (cotangent, *xs)]
    ranks = [array.shape[1] for array in (projected, *low_ranks, *bs)]
    return obstacle_to_low_rank_gradients(wide, ranks, primitives_of(function, len(wide)))
