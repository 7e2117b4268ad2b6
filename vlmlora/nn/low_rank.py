"""Products with weights and low-rank factors in one: ``x W.T + (x A.T) B.T`` as ``[x, x A.T] [W, B].T``.

Apart, the low-rank part of a wide layer costs about as much memory traffic as the layer itself: its output is
written, read again and added. A quantised weight is decoded into an array of its own anyway, so its factors
are put beside it there, and a single product does both, forward and backward:

    forward    y  = [x, x A.T] [W, B].T          backward    dx = [dy, dy B] [W; A]

Layers that read the same x share the left-hand side, so that their A products are one.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmlora.quantization.weights import Augmentable

_ALIGNMENT = 8  # elements: rows of 16-bit matrices are then whole words of 16 bytes, which fast products need


class Factors(NamedTuple):
    """The factors of a low-rank addition to a weight [out, in].

    Attributes:
        a: [r, in].
        b: [out, r], with the addition's scale in it.
    """

    a: Float[Array, "r in"]
    b: Float[Array, "out r"]


def low_rank_products(
    x: Float[Array, "*batch in"], weights: Sequence[Augmentable], factors: Sequence[Factors]
) -> tuple[Float[Array, "*batch out"], ...]:
    """``x W.T + (x A.T) B.T`` for several weights, in the type of `x`.

    There is a gradient for `x` and the factors, and none for the weights.

    Args:
        x: activations.
        weights: each of shape [out, in], out as it likes.
        factors: of each weight, in the type of `x`.
    """
    flat = x.reshape(-1, x.shape[-1])
    products = _products(flat, tuple(weights), tuple(factors))
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in products)


@jax.custom_vjp
def _products(x, weights, factors):
    return _products_fwd(x, weights, factors)[0]


def _products_fwd(x, weights, factors):
    a = jnp.concatenate([each.a for each in factors])
    wide = _augment(x, a.T)
    room = wide.shape[1] - x.shape[1]
    products = []
    for weight, each, start in zip(weights, factors, _starts(factors), strict=True):
        columns = jnp.pad(each.b, ((0, 0), (start, room - start - each.b.shape[1])))
        products.append(_contract(wide, weight.with_columns(columns), (1, 1)))
    return tuple(products), (wide, weights, factors)


def _products_bwd(residuals, cotangents):
    wide, weights, factors = residuals
    features = factors[0].a.shape[1]
    dx, found = 0, []
    for weight, each, start, dy in zip(weights, factors, _starts(factors), cotangents, strict=True):
        out, r = each.b.shape
        dy = _augment(dy, each.b)
        dx += _contract(dy, weight.with_rows(jnp.pad(each.a, ((0, dy.shape[1] - out - r), (0, 0)))), (1, 0))
        # Both gradients are taken of the augmented arrays and cut: the plain ones need not exist beside them.
        projected = wide[:, features + start : features + start + r]
        db = _contract(dy, projected, (0, 0))[:out]
        found.append((dy[:, out : out + r], db))
    da = _contract(jnp.concatenate([d_projected for d_projected, _ in found], axis=1), wide, (0, 0))
    das = jnp.split(da[:, :features], _starts(factors)[1:])
    return dx, None, tuple(Factors(each, db) for each, (_, db) in zip(das, found, strict=True))


_products.defvjp(_products_fwd, _products_bwd)


def _augment(x: Float[Array, "tokens in"], right: Float[Array, "in r"]) -> Float[Array, "tokens wide"]:
    """``[x, x @ right]`` and zeros up to a multiple of `_ALIGNMENT`."""
    features, r = right.shape
    room = r + -(features + r) % _ALIGNMENT
    # The array is written with room, by whatever computes x, and the product is put in its place. With a
    # start that XLA knew it would make a concatenation of it, which copies x.
    wide = jnp.pad(x, ((0, 0), (0, room)))
    product = wide @ jnp.pad(right, ((0, room), (0, 0)))
    start = jax.lax.optimization_barrier(jnp.int32(features))
    return jax.lax.dynamic_update_slice(wide, product, (jnp.int32(0), start))


def _contract(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())))


def _starts(factors: Sequence[Factors]) -> list[int]:
    """Where each layer's columns begin among those of all."""
    return [0, *accumulate(each.a.shape[0] for each in factors[:-1])]
