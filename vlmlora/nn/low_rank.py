"""Products with weights and low-rank factors in one: ``x W.T + (x A.T) B.T`` as ``[x, x A.T] [W, B].T``.

Apart, the low-rank part of a wide layer costs about as much memory traffic as the layer itself: its output is
written, read again and added. A quantised weight is decoded into an array of its own anyway, so its factors
are put beside it there, and a single product does both, forward and backward:

    forward    y  = [x, x A.T] [W, B].T          backward    dx = [dy, dy B] [W; A]

Layers that read the same x share the left-hand side, so that their A products are one; unless their results
are wide, their dy stand side by side too, above each other's W and A. For ``x A.T`` to find its place, x is
written with room to the right. Where that costs a pass over x, as between the products of a feed-forward
block, the product before can leave the room: columns of zeros.

On a mesh every device does so with its rows of x and the whole weight, gathered.
"""

import functools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmlora.nn.saved import name_for_policies
from vlmlora.quantization.sharded import ShardedWeight, with_whole_weights
from vlmlora.quantization.weights import Framable
from vlmlora_kernels.in_place import elementwise_in_place, obstacle

MLP_LOW_RANK = "mlp_low_rank"
"""Name of what the A of a feed-forward block's last projection gives, for checkpoint policies."""

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
    x: Float[Array, "*batch in_and_room"] | Sequence[Float[Array, "*batch in_and_room"]],
    weights: Sequence[Framable | ShardedWeight],
    factors: Sequence[Factors],
    *,
    room: int = 0,
    function: Callable[..., jax.Array] | None = None,
    is_tight: bool = False,
) -> tuple[Float[Array, "*batch out_and_room"], ...]:
    """``x W.T + (x A.T) B.T`` for several weights, in the type of `x`.

    There is a gradient for `x` and the factors, and none for the weights.

    Args:
        x: activations; with columns of zeros to the right where the product before left room. With `function`
            its arguments.
        weights: each of shape [out, in], out as it likes; all on one device, or all on one mesh and whole
            there (`vlmlora.quantization.sharded.is_whole`).
        factors: of each weight, in the type of `x`.
        room: columns of zeros that are left to the right of the results.
        function: elementwise, and of zeros zero; the products are of what it gives. The backward pass has not
            kept that, and computes it again beside the gradients of the arguments, in one pass over them.
        is_tight: that pass writes over the arguments, where a kernel can; where none can there are two, which
            take less memory.
    """
    xs = (x,) if function is None else tuple(x)
    room_of_x = xs[0].shape[-1] - factors[0].a.shape[1]
    return _products(xs, tuple(weights), tuple(factors), room, room_of_x, function, is_tight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _products(xs, weights, factors, room, room_of_x, function, is_tight):
    return _products_fwd(xs, weights, factors, room, room_of_x, function, is_tight)[0]


def _products_fwd(xs, weights, factors, room, room_of_x, function, is_tight):
    def forward(weights, xs, factors):
        features = factors[0].a.shape[1]
        x = xs[0] if function is None else function(*xs)
        a = jnp.concatenate([each.a for each in factors]).T
        name = None if function is None else MLP_LOW_RANK
        wide, low_rank = _augment(x.reshape(-1, x.shape[-1]), a, name)
        width = wide.shape[1] - features
        products = []
        for weight, each, start in zip(weights, factors, _starts(factors), strict=True):
            right = jnp.pad(each.b, ((0, 0), (start, width - start - each.b.shape[1])))
            below = jnp.zeros((room, wide.shape[1]), x.dtype)
            products.append(_contract(wide, weight.framed(right, below), (1, 1)))
        saved = (wide,) if function is None else ()
        return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in (*products, low_rank, *saved)), ()

    results, _ = with_whole_weights(forward, weights, xs, factors)
    products, (low_rank, *saved) = results[: len(weights)], results[len(weights) :]
    return tuple(products), (saved if function is None else xs, low_rank, weights, factors)


def _products_bwd(room, room_of_x, function, is_tight, residuals, cotangents):
    def backward(weights, of_rows, factors):
        batch = of_rows[1].shape[:-1]
        saved, low_rank, cotangents = jax.tree.map(lambda each: each.reshape(-1, each.shape[-1]), of_rows)
        features = factors[0].a.shape[1]
        # What computes a cotangent does so with wide loads, unless the room for its product is part of it.
        sides = _sides(jax.lax.optimization_barrier(cotangents), weights, factors, has_room=room > 0)
        dys, projected, dbs = [], [], []
        for side, start in zip(sides, accumulate(side.ranks for side in sides), strict=True):
            dy, product = _augment(side.cotangent, side.b)
            dys.append(dy)
            projected.append(product)
            # Gradients are taken of the augmented arrays and cut: the plain ones need not exist beside them.
            dbs += side.cut(_contract(dy, low_rank[:, start - side.ranks : start], (0, 0)))

        def gradient_of_a(x: jax.Array) -> jax.Array:
            return _contract(jnp.concatenate(projected, axis=1), x, (0, 0))[:, :features]

        def gradient_of_x(dys: Sequence[jax.Array]) -> jax.Array:
            products = (
                _contract(dy, side.below(dy.shape[1], room_of_x), (1, 0))
                for dy, side in zip(dys, sides, strict=True)
            )
            return functools.reduce(jnp.add, products)

        def pull_back(dx: jax.Array, *saved: jax.Array) -> tuple[jax.Array, ...]:
            if function is None:
                return *saved, dx
            x, pull = jax.vjp(function, *saved)
            return x, *pull(dx)

        has_kernel = is_tight and obstacle(pull_back, saved[0], *saved) is None
        if function is None or (is_tight and not has_kernel):
            # Once the factors' gradients are there x is not needed any more, before its own takes memory.
            x = saved[0] if function is None else function(*saved)
            dys, da, dbs = jax.lax.optimization_barrier((dys, gradient_of_a(x), dbs))
            _, *dxs = pull_back(gradient_of_x(dys), *saved)
        else:
            dys, dbs = jax.lax.optimization_barrier((dys, dbs))
            in_one_pass = functools.partial(elementwise_in_place, pull_back) if has_kernel else pull_back
            x, *dxs = in_one_pass(gradient_of_x(dys), *saved)
            dxs, da = jax.lax.optimization_barrier((dxs, gradient_of_a(x)))
        das = jnp.split(da, _starts(factors)[1:])
        dxs = tuple(dx.reshape(*batch, dx.shape[1]) for dx in dxs)
        return dxs, tuple(Factors(*each) for each in zip(das, dbs, strict=True))

    saved, low_rank, weights, factors = residuals
    of_rows = tuple(saved), low_rank, cotangents
    dxs, gradients = with_whole_weights(backward, weights, of_rows, factors)
    return dxs, None, gradients


_products.defvjp(_products_fwd, _products_bwd)


class _Side(NamedTuple):
    """Layers whose cotangents share one left-hand side of the backward pass.

    Attributes:
        cotangent: of the layers, side by side.
        weights: of each.
        factors: of each.
    """

    cotangent: Float[Array, "tokens outs_and_room"]
    weights: Sequence[Framable]
    factors: Sequence[Factors]

    @property
    def ranks(self) -> int:
        """The layers' ranks, in sum."""
        return sum(each.b.shape[1] for each in self.factors)

    @property
    def b(self) -> Float[Array, "outs ranks"]:
        """The layers' B on the diagonal."""
        rows = [
            jnp.pad(each.b, ((0, 0), (start, self.ranks - start - each.b.shape[1])))
            for each, start in zip(self.factors, _starts(self.factors), strict=True)
        ]
        return jnp.concatenate(rows)

    def below(self, width: int, room_of_x: int) -> Float[Array, "width in_and_room"]:
        """The weights, the layers' A under them, and zeros."""
        *others, last = (
            (weight, jnp.zeros((each.b.shape[0], room_of_x), each.b.dtype))
            for weight, each in zip(self.weights, self.factors, strict=True)
        )
        a = jnp.concatenate([each.a for each in self.factors])
        rows = sum(each.b.shape[0] for each in self.factors) + a.shape[0]
        a = jnp.pad(a, ((0, width - rows), (0, room_of_x)))
        empty = jnp.zeros((0, a.shape[1]), a.dtype)
        framed = [weight.framed(right, empty) for weight, right in others]
        return jnp.concatenate([*framed, last[0].framed(last[1], a)])

    def cut(self, gradient: Float[Array, "width ranks"]) -> list[Float[Array, "out r"]]:
        """Each layer's part of the gradient of `b`."""
        parts, row = [], 0
        for each, start in zip(self.factors, _starts(self.factors), strict=True):
            out, r = each.b.shape
            parts.append(gradient[row : row + out, start : start + r])
            row += out
        return parts


def _sides(
    cotangents: Sequence[jax.Array],
    weights: Sequence[Framable],
    factors: Sequence[Factors],
    *,
    has_room: bool,
) -> list[_Side]:
    """One for each layer, if cotangents have room for products; if not, as room costs a copy, one for all."""
    if has_room or len(cotangents) == 1:
        each_alone = zip(cotangents, weights, factors, strict=True)
        return [_Side(dy, [weight], [each]) for dy, weight, each in each_alone]
    outs, ranks = (sum(each.b.shape[axis] for each in factors) for axis in (0, 1))
    zeros = jnp.zeros((cotangents[0].shape[0], room_for(outs, [ranks])), cotangents[0].dtype)
    return [_Side(jnp.concatenate([*cotangents, zeros], axis=1), weights, factors)]


def _augment(
    x: Float[Array, "tokens in_and_room"], right: Float[Array, "in r"], name: str | None = None
) -> tuple[Float[Array, "tokens wide"], Float[Array, "tokens r"]]:
    """``[x, x @ right]`` and zeros up to a multiple of `_ALIGNMENT`, in place where x has room; the product.

    Args:
        x: with room or without.
        right: the product's other side.
        name: by which policies of `jax.checkpoint` know the product.
    """
    features, r = right.shape
    room = room_for(features, [r])
    wide = x if x.shape[1] >= features + room else _widen(x, features + room - x.shape[1])
    # Two barriers that only XLA needs. Behind the first, x is computed once and not again for the update;
    # behind the second, it does not know the start, with which it would make a concatenation and copy x.
    wide = jax.lax.optimization_barrier(wide)
    product = wide @ jnp.pad(right, ((0, wide.shape[1] - features), (0, 0)))
    if name is not None:
        product = name_for_policies(product, name)
    start = jax.lax.optimization_barrier(jnp.int32(features))
    return jax.lax.dynamic_update_slice(wide, product, (jnp.int32(0), start)), product


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
