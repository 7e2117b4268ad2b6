"""Products with weights and low-rank factors in one: ``x W.T + (x A.T) B.T`` as ``[x, x A.T] [W, B].T``.

Apart, the low-rank part of a wide layer costs about as much memory traffic as the layer itself: its output is
written, read again and added. A quantised weight is decoded into an array of its own anyway, so its factors
are put beside it there, and a single product does both, forward and backward:

    forward    y  = [x, x A.T] [W, B].T          backward    dx = [dy, dy B] [W; A]

Layers that read the same x share the left-hand side, so that their A products are one. For ``x A.T`` to find
its place, x is written with room to the right. Where that costs a pass over x, as between the products of a
feed-forward block, the product before can leave the room: columns of zeros.

On a mesh every device does so with its rows of x and the whole weight, gathered.
"""

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmlora.quantization.sharded import ShardedWeight, with_whole_weights
from vlmlora.quantization.weights import Framable

_ALIGNMENT = 8  # elements: rows of 16-bit matrices are then whole words of 16 bytes, which fast products need


class Factors(NamedTuple):
    """The factors of a low-rank addition to a weight [out, in].

    Attributes:
        a: [r, in].
        b: [out, r], with the addition's scale in it.
    """

    a: Float[Array, "r in"]
    b: Float[Array, "out r"]


def room_for(features: int, ranks: Sequence[int]) -> int:
    """Columns to the right of `features` others in which low-rank products of these ranks find place."""
    room = max(ranks)
    return room + -(features + room) % _ALIGNMENT


def low_rank_products(
    x: Float[Array, "*batch in_and_room"],
    weights: Sequence[Framable | ShardedWeight],
    factors: Sequence[Factors],
    *,
    room: int = 0,
) -> tuple[Float[Array, "*batch out_and_room"], ...]:
    """``x W.T + (x A.T) B.T`` for several weights, in the type of `x`.

    There is a gradient for `x` and the factors, and none for the weights.

    Args:
        x: activations; with columns of zeros to the right where the product before left room.
        weights: each of shape [out, in], out as it likes; all on one device, or all on one mesh and whole
            there (`vlmlora.quantization.sharded.is_whole`).
        factors: of each weight, in the type of `x`.
        room: columns of zeros that are left to the right of the results.
    """
    room_of_x = x.shape[-1] - factors[0].a.shape[1]
    return _products(x, tuple(weights), tuple(factors), room, room_of_x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _products(x, weights, factors, room, room_of_x):
    return _products_fwd(x, weights, factors, room, room_of_x)[0]


def _products_fwd(x, weights, factors, room, room_of_x):
    def forward(weights, x, factors):
        features = factors[0].a.shape[1]
        flat = x.reshape(-1, x.shape[-1])
        wide = _augment(flat, jnp.concatenate([each.a for each in factors]).T)
        width = wide.shape[1] - features
        products = []
        for weight, each, start in zip(weights, factors, _starts(factors), strict=True):
            right = jnp.pad(each.b, ((0, 0), (start, width - start - each.b.shape[1])))
            below = jnp.zeros((room, wide.shape[1]), x.dtype)
            products.append(_contract(wide, weight.framed(right, below), (1, 1)))
        return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in (*products, wide)), ()

    (*products, wide), _ = with_whole_weights(forward, weights, x, factors)
    return tuple(products), (wide, weights, factors)


def _products_bwd(room, room_of_x, residuals, cotangents):
    def backward(weights, of_rows, factors):
        wide, cotangents = of_rows
        features = factors[0].a.shape[1]
        starts = _starts(factors)
        flat = wide.reshape(-1, wide.shape[-1])
        # What computes a cotangent does so with wide loads, unless the room for its product is part of it.
        cotangents = jax.lax.optimization_barrier([dy.reshape(-1, dy.shape[-1]) for dy in cotangents])
        dys = [_augment(dy, each.b) for dy, each in zip(cotangents, factors, strict=True)]
        projected, dbs = [], []
        for each, start, dy in zip(factors, starts, dys, strict=True):
            out, r = each.b.shape
            projected.append(dy[:, out : out + r])
            # Both gradients are taken of the augmented arrays and cut: the plain ones need not exist beside
            # them.
            dbs.append(_contract(dy, flat[:, features + start : features + start + r], (0, 0))[:out])
        da = _contract(jnp.concatenate(projected, axis=1), flat, (0, 0))[:, :features]
        # Once the factors' gradients are there x is not needed any more, before its own gradient takes
        # memory.
        dys, da, dbs = jax.lax.optimization_barrier((dys, da, dbs))
        dx = 0
        for weight, each, dy in zip(weights, factors, dys, strict=True):
            out, r = each.b.shape
            right = jnp.zeros((out, room_of_x), wide.dtype)
            below = jnp.pad(each.a, ((0, dy.shape[1] - out - r), (0, room_of_x)))
            dx += _contract(dy, weight.framed(right, below), (1, 0))
        das = jnp.split(da, starts[1:])
        gradients = tuple(Factors(*each) for each in zip(das, dbs, strict=True))
        return dx.reshape(*wide.shape[:-1], dx.shape[1]), gradients

    wide, weights, factors = residuals
    dx, gradients = with_whole_weights(backward, weights, (wide, cotangents), factors)
    return dx, None, gradients


_products.defvjp(_products_fwd, _products_bwd)


def _augment(
    x: Float[Array, "tokens in_and_room"], right: Float[Array, "in r"]
) -> Float[Array, "tokens wide"]:
    """``[x, x @ right]`` and zeros up to a multiple of `_ALIGNMENT`; in place where x has room."""
    features, r = right.shape
    room = room_for(features, [r])
    wide = x if x.shape[1] >= features + room else _widen(x, features + room - x.shape[1])
    # Two barriers that only XLA needs. Behind the first, x is computed once and not again for the update;
    # behind the second, it does not know the start, with which it would make a concatenation and copy x.
    wide = jax.lax.optimization_barrier(wide)
    product = wide @ jnp.pad(right, ((0, wide.shape[1] - features), (0, 0)))
    start = jax.lax.optimization_barrier(jnp.int32(features))
    return jax.lax.dynamic_update_slice(wide, product, (jnp.int32(0), start))


def _widen(x: Float[Array, "tokens in"], room: int) -> Float[Array, "tokens wide"]:
    """Zeros to the right of x."""
    # In groups of columns that are padding or not as a whole, XLA reads several elements at a time.
    group = math.gcd(x.shape[1], room)
    groups = x.reshape(x.shape[0], -1, group)
    return jnp.pad(groups, ((0, 0), (0, room // group), (0, 0))).reshape(x.shape[0], -1)


def _contract(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())))


def _starts(factors: Sequence[Factors]) -> list[int]:
    """Where each layer's columns begin among those of all."""
    return [0, *accumulate(each.a.shape[0] for each in factors[:-1])]
