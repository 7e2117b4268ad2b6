"""Products with weights and low-rank factors in one: ``x W.T + (x A.T) B.T`` as ``[x, x A.T] [W, B].T``.

Apart, the low-rank part of a wide layer costs about as much memory traffic as the layer itself: its output is
written, read again and added. A quantised weight is decoded into an array of its own anyway, so its factors
are put beside it there, and a single product does both, forward and backward:

    forward    y  = [x, x A.T] [W, B].T          backward    dx = [dy, dy B] [W; A]

Layers that read the same x share the left-hand side, so that their A products are one; unless their results
are wide, their dy stand side by side too, above each other's W and A. For ``x A.T`` to find its place, x is
written with room to the right. Where that costs a pass over x, as between the products of a feed-forward
block, the product before can leave the room: columns of zeros. A feed-forward block's biases stand beside B,
against a column of ones, if the room has one to spare.

Between the wide projections of a feed-forward block and its last one stands a function, whose backward pass
and all low-rank products around it are one pass over the wide arrays where a kernel can.

Where x is what a norm gives, a kernel writes it with the room at once. In the backward pass another adds the
norm's gradient to the one that arrives beside the norm, in one pass; so x goes through here, too.

On a mesh every device does so with its rows of x and the whole weight, gathered.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmlora.nn.saved import computed, name_for_policies, naming
from vlmlora.quantization.sharded import ShardedWeight, with_whole_weights
from vlmlora.quantization.weights import Framable
from vlmlora_kernels import low_rank as kernels
from vlmlora_kernels import norm as norm_kernels
from vlmlora_kernels.in_place import elementwise_in_place, obstacle
from vlmlora_kernels.nf4 import Placed

MLP_LOW_RANK = "mlp_low_rank"
"""Name of what the A of a feed-forward block's last projection gives, for checkpoint policies."""
LOW_RANK = "low_rank"
"""Name of what every other A gives."""

_ALIGNMENT = 64  # elements: rows of 16-bit matrices are then whole lines of 128 bytes


class Factors(NamedTuple):
    """The factors of a low-rank addition to a weight [out, in].

    Either may have room: columns of zeros to the right of `a`, rows of zeros below `b`. As many as
    activations have save a copy, of the gradient too, which has them as well, and anything in them.

    Attributes:
        a: [r, in].
        b: [out, r], with the addition's scale in it.
    """

    a: Float[Array, "r in_and_room"]
    b: Float[Array, "out_and_room r"]


class Norm(NamedTuple):
    """A norm that is not trained.

    Attributes:
        weight: one for each feature.
        bias: likewise, of a layer norm; None for a root-mean-square norm.
        eps: added to the variance or mean square.
    """

    weight: Float[Array, " features"]
    bias: Float[Array, " features"] | None
    eps: float


def takes_norm(x: Float[Array, "*batch features"], factors: Sequence[Factors]) -> bool:
    """Whether kernels compute the norm of x, and its gradient, beside products with these factors."""
    x = _as_matrices(x)
    room = _room_of(x.shape[1], factors)
    return norm_kernels.obstacle(x, x, x) is None and norm_kernels.obstacle(x, room=room) is None


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
    norm: Norm | None = None,
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
        norm: of x, which has no room; the products are of what it gives, see `takes_norm`. Then x itself
            comes before the products. Whoever uses x also beside the norm takes that one.
    """
    if norm is not None:
        operands, static = (tuple(weights), tuple(factors)), (room, 0, None, False)
        x, products = _normed(_PRODUCTS, x, norm, operands, _room_of(x.shape[-1], factors), static)
        return x, *products
    xs = (x,) if function is None else tuple(x)
    room_of_x = xs[0].shape[-1] - weights[0].shape[1]
    return _products(xs, tuple(weights), tuple(factors), room, room_of_x, function, is_tight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _products(xs, weights, factors, room, room_of_x, function, is_tight):
    return _products_fwd(xs, weights, factors, room, room_of_x, function, is_tight)[0]


def _products_fwd(xs, weights, factors, room, room_of_x, function, is_tight, biases=None):
    def forward(weights, xs, others):
        factors, biases = others
        biases = [None] * len(factors) if biases is None else biases
        features = weights[0].shape[1]
        x = xs[0] if function is None else function(*xs)
        name = LOW_RANK if function is None else MLP_LOW_RANK
        ranks = sum(each.a.shape[0] for each in factors)

        def multiply(wide: jax.Array) -> jax.Array:
            return _contract(wide, _above_each_other(factors, wide.shape[1]), (1, 1))

        # A bias of its own would keep the product from being written where a scan keeps the result.
        has_ones = any(bias is not None for bias in biases) and room_for(features, [ranks]) > ranks
        wide, low_rank = _augment(
            x.reshape(-1, x.shape[-1]), features, ranks, multiply, name, has_ones=has_ones
        )
        width = wide.shape[1] - features
        products = []
        for weight, each, bias, start in zip(weights, factors, biases, _starts(factors), strict=True):
            right = Placed(each.b, width, start)
            if has_ones and bias is not None:
                columns = right.to_the_right(weight.shape[0], x.dtype)
                right = Placed(columns.at[:, ranks].set(bias.astype(x.dtype)), width)
            y = _contract(wide, weight.framed(right, Placed(None, room), x.dtype), (1, 1))
            products.append(y if has_ones else add_bias(y, bias))
        # The backward pass asks for x, not for what is beside it: to have that it would copy x once more.
        kept = x.reshape(-1, features) if x.shape[-1] == features else wide
        saved = (kept,) if function is None else ()
        return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in (*products, low_rank, *saved)), ()

    results, _ = with_whole_weights(forward, weights, xs, (factors, biases))
    products, (low_rank, *saved) = results[: len(weights)], results[len(weights) :]
    return tuple(products), (saved if function is None else xs, low_rank, weights, factors)


def _products_bwd(room, room_of_x, function, is_tight, residuals, cotangents):
    def backward(weights, of_rows, factors):
        batch = of_rows[1].shape[:-1]
        saved, low_rank, cotangents = _as_matrices(of_rows)
        sides = _sides(cotangents, low_rank, weights, factors, has_room=room > 0)

        def pull_back(dx: jax.Array, *saved: jax.Array) -> tuple[jax.Array, ...]:
            return (*saved, dx) if function is None else _PullBack(function)(dx, *saved)

        has_kernel = is_tight and obstacle(pull_back, saved[0], *saved) is None
        if function is None or (is_tight and not has_kernel):
            x = saved[0] if function is None else function(*saved)
            dx, da, dbs = _gradients(sides, x, room_of_x)
            _, *dxs = pull_back(dx, *saved)
        else:
            dbs = _gradients_of_b(sides)
            sides = _behind(sides, dbs)
            in_one_pass = functools.partial(elementwise_in_place, pull_back) if has_kernel else pull_back
            x, *dxs = in_one_pass(_gradient_of_x(sides, room_of_x), *saved)
            da = _gradient_of_a(sides, x)
            dxs, _ = jax.lax.optimization_barrier((dxs, da))
        dxs = tuple(dx.reshape(*batch, dx.shape[1]) for dx in dxs)
        return dxs, _as_factors(da, dbs, factors)

    saved, low_rank, weights, factors = residuals
    of_rows = tuple(saved), low_rank, cotangents
    dxs, gradients = with_whole_weights(backward, weights, of_rows, factors)
    return dxs, None, gradients


_products.defvjp(_products_fwd, _products_bwd)
_PRODUCTS = _products_fwd, _products_bwd


_RUNS_OFTEN: ContextVar[bool] = ContextVar("runs_often", default=True)


@contextmanager
def running_rarely() -> Iterator[None]:
    """What is traced here runs so rarely in a step that a kernel of its own would not be worth compiling.

    The one pass between the products of `low_rank_block` takes some seconds to compile, and spares 0.2 ms of
    4,096 tokens (7B, H100; benchmarks/results/low_rank_gradients.json).
    """
    token = _RUNS_OFTEN.set(False)
    try:
        yield
    finally:
        _RUNS_OFTEN.reset(token)


def low_rank_block(
    x: Float[Array, "*batch in_and_room"],
    weights: Sequence[Framable | ShardedWeight],
    factors: Sequence[Factors],
    biases: Sequence[Float[Array, " out"] | None],
    last_weight: Framable | ShardedWeight,
    last_factors: Factors,
    *,
    room: int,
    function: Callable[..., jax.Array],
    names: Sequence[str],
    is_tight: bool = False,
    norm: Norm | None = None,
) -> tuple[Float[Array, "*batch in_and_room"], Float[Array, "*batch last_out"]]:
    """x, and low-rank products of a function of low-rank products of it: ``last(function(*firsts(x)))``.

    Where a kernel can, the backward pass reads the wide arrays in between once for the function's gradients
    and the low-rank products of these; elsewhere, and within `running_rarely`, it is that of
    `low_rank_products`, twice.

    Args:
        x: see `low_rank_products`.
        weights: of the first layers, of as many output features each; all on one device or on one mesh.
        factors: of each.
        biases: of each; None where there is none.
        last_weight: of the layer behind the function.
        last_factors: its factors.
        room: columns to the right of the first layers' results, in which all adapters' products find place.
        function: of these results; elementwise, and of zeros zero.
        names: by which policies of `jax.checkpoint` know these results.
        is_tight: the backward pass writes over them, where a kernel can, see `low_rank_products`.
        norm: see `low_rank_products`.
    """
    room_of_x = x.shape[-1] - weights[0].shape[1]
    operands = tuple(weights), tuple(factors), tuple(biases), last_weight, last_factors
    static = room, room_of_x, function, tuple(map(naming, names)), is_tight, _RUNS_OFTEN.get()
    if norm is not None:
        return _normed(_BLOCK, x, norm, operands, _room_of(x.shape[-1], factors), static)
    return x, _block((x,), *operands, *static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10, 11))
def _block(xs, weights, factors, biases, last_weight, last_factors, *static):
    return _block_fwd(xs, weights, factors, biases, last_weight, last_factors, *static)[0]


def _block_fwd(xs, weights, factors, biases, last_weight, last_factors, *static):
    room, room_of_x, function, give_names, is_tight, _ = static
    ys, of_first = _products_fwd(xs, weights, factors, room, room_of_x, None, False, biases)
    ys = tuple(give_name(y) for y, give_name in zip(ys, give_names, strict=True))
    (result,), of_last = _products_fwd(ys, (last_weight,), (last_factors,), 0, room, function, is_tight)
    return result, (of_first, biases, of_last)


def _block_bwd(room, room_of_x, function, give_names, is_tight, runs_often, residuals, cotangent):
    of_first, biases, of_last = residuals
    if runs_often and _has_kernel(function, of_first, of_last):
        in_one_pass = _block_bwd_in_one_pass(room, room_of_x, function, is_tight, residuals, cotangent)
        dx, d_ys, d_factors, d_last = in_one_pass
    else:
        d_ys, _, (d_last,) = _products_bwd(0, room, function, is_tight, of_last, (cotangent,))
        (dx,), _, d_factors = _products_bwd(room, room_of_x, None, False, of_first, d_ys)
    d_biases = tuple(
        None if bias is None else _as_matrices(dy)[:, : bias.shape[0]].sum(0).astype(bias.dtype)
        for dy, bias in zip(d_ys, biases, strict=True)
    )
    return (dx,), None, d_factors, d_biases, None, d_last


_OfProducts = tuple[Sequence[jax.Array], jax.Array, Sequence[Any], Sequence[Factors]]
"""What `_products_fwd` keeps: x or a function's arguments, their product with A, weights, factors."""


def _has_kernel(function: Callable[..., jax.Array], of_first: _OfProducts, of_last: _OfProducts) -> bool:
    """Whether the backward pass between the layers can be one."""
    if any(isinstance(weight, ShardedWeight) for weight in of_last[2]):
        return False
    # Of the gradients that come from behind there are the shapes: those of what they are gradients of.
    ys, projected = _as_matrices((of_last[0], of_last[1]))
    bs = [each.b[: weight.shape[0]] for weight, each in zip(of_first[2], of_first[3], strict=True)]
    return kernels.obstacle(_PullBack(function), ys[0], ys, projected, _ranks_of(of_first), bs) is None


def _block_bwd_in_one_pass(
    room: int,
    room_of_x: int,
    function: Callable[..., jax.Array],
    is_tight: bool,
    residuals: tuple[_OfProducts, Any, _OfProducts],
    cotangent: jax.Array,
) -> tuple[jax.Array, list[jax.Array], tuple[Factors, ...], Factors]:
    """Gradients of x, of what the first layers give, of their factors, and of the last layer's."""
    of_first, _, (ys, last_low_rank, last_weights, last_factors) = residuals
    (x,), _, weights, factors = of_first
    cotangents, last_low_rank = _as_matrices(((cotangent,), last_low_rank))
    behind = _sides(cotangents, last_low_rank, last_weights, last_factors, has_room=False)
    last_dbs = _gradients_of_b(behind)
    behind = _behind(behind, last_dbs)
    found = kernels.low_rank_gradients(
        _PullBack(function),
        _gradient_of_x(behind, room),
        _as_matrices(ys),
        behind[0].product,
        _ranks_of(of_first),
        [each.b[: weight.shape[0]] for weight, each in zip(weights, factors, strict=True)],
        is_in_place=is_tight,
    )
    sides = []
    for layer in zip(weights, factors, found.gradients, found.products, found.gradient_sums, strict=True):
        weight, each, dy, product, db = layer
        product = product.astype(x.dtype)
        dy = _fill(dy, jnp.pad(product, ((0, 0), (0, room - product.shape[1]))), weight.shape[0])
        sides.append(_Side(dy, product, [db.astype(x.dtype)], [weight], [each]))
    dx, da, dbs = _gradients(sides, _as_matrices(x), room_of_x)
    (d_last,) = _as_factors(found.value_sum.T.astype(x.dtype), last_dbs, last_factors)
    d_factors = _as_factors(da, dbs, factors)
    return dx.reshape(*x.shape[:-1], -1), [side.dy for side in sides], d_factors, d_last


def _ranks_of(products: _OfProducts) -> list[Float[Array, "tokens _"]]:
    """Each layer's product with its A."""
    return jnp.split(_as_matrices(products[1]), _starts(products[3])[1:], axis=1)


_block.defvjp(_block_fwd, _block_bwd)
_BLOCK = _block_fwd, _block_bwd


def _normed(rules, x, norm, operands, room, static):
    return _normed_by(rules, x, norm.weight, norm.bias, operands, norm.eps, room, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def _normed_by(rules, x, weight, bias, operands, eps, room, static):
    return _normed_by_fwd(rules, x, weight, bias, operands, eps, room, static)[0]


def _normed_by_fwd(rules, x, weight, bias, operands, eps, room, static):
    matrix, options = _as_matrices(x), {"eps": eps, "room": room}
    if bias is None:
        wide = norm_kernels.rms_norm(matrix, weight, **options)
    else:
        wide = norm_kernels.layer_norm(matrix, weight, bias, **options)
    results, residuals = rules[0]((wide.reshape(*x.shape[:-1], -1),), *operands, *static)
    return (x, results), (x, weight, bias, residuals)


def _normed_by_bwd(rules, eps, room, static, residuals, cotangents):
    x, weight, bias, residuals = residuals
    beside, cotangents = cotangents
    (dy,), *d_operands = rules[1](*static, residuals, cotangents)
    matrix, *gradients = _as_matrices((x, dy, beside))
    gradient = norm_kernels.rms_norm_gradient if bias is None else norm_kernels.layer_norm_gradient
    dx = gradient(matrix, weight, *gradients, eps=eps)
    return dx.reshape(x.shape), None, None, tuple(d_operands)


_normed_by.defvjp(_normed_by_fwd, _normed_by_bwd)


def _room_of(features: int, factors: Sequence[Factors]) -> int:
    """Columns to the right of x in which its products with every A find place."""
    return room_for(features, [sum(each.a.shape[0] for each in factors)])


def add_bias(y: Float[Array, "*batch out_and_room"], bias: Float[Array, " out"] | None) -> jax.Array:
    """y with a bias, and as much room to the right as before."""
    if bias is None:
        return y
    return y + jnp.pad(bias.astype(y.dtype), (0, y.shape[-1] - bias.shape[0]))


@dataclass(frozen=True)
class _PullBack:
    """A function's value and the gradients of its arguments; equal for equal functions."""

    function: Callable[..., jax.Array]

    def __call__(self, dx: jax.Array, *saved: jax.Array) -> tuple[jax.Array, ...]:
        x, pull = jax.vjp(self.function, *saved)
        return x, *pull(dx)


def _as_matrices(tree: Any) -> Any:
    return jax.tree.map(lambda each: each.reshape(-1, each.shape[-1]), tree)


class _Side(NamedTuple):
    """Layers whose cotangents share one left-hand side of the backward pass.

    Attributes:
        dy: the cotangents side by side, and their product with the layers' B.
        product: that product, by itself.
        dbs: gradient of each B.
        weights: of each.
        factors: of each.
    """

    dy: Float[Array, "tokens outs_and_room"]
    product: Float[Array, "tokens ranks"]
    dbs: Sequence[Float[Array, "_ _"]]
    weights: Sequence[Framable]
    factors: Sequence[Factors]

    @classmethod
    def of(
        cls,
        cotangent: Float[Array, "tokens outs_and_room"],
        low_rank: Float[Array, "tokens ranks"],
        weights: Sequence[Framable],
        factors: Sequence[Factors],
    ) -> "_Side":
        """From the layers' cotangents and their products with A, side by side."""
        outs, ranks = sum(weight.shape[0] for weight in weights), low_rank.shape[1]

        def multiply(dy: jax.Array) -> jax.Array:
            if len(factors) == 1:
                return dy @ _fit(factors[0].b, 0, dy.shape[1])
            diagonal = [
                jnp.pad(each.b[: weight.shape[0]], ((0, 0), (start, ranks - start - each.b.shape[1])))
                for weight, each, start in zip(weights, factors, _starts(factors), strict=True)
            ]
            return dy @ _fit(jnp.concatenate(diagonal), 0, dy.shape[1])

        dy, product = _augment(cotangent, outs, ranks, multiply)
        # The gradient is taken of the augmented array and cut: the plain one need not exist beside it.
        gradient, dbs, row = _contract(dy, low_rank, (0, 0)), [], 0
        for weight, each, start in zip(weights, factors, _starts(factors), strict=True):
            (out, _), r = weight.shape, each.b.shape[1]
            dbs.append(gradient if len(factors) == 1 else gradient[row : row + out, start : start + r])
            row += out
        return cls(dy, product, dbs, weights, factors)

    def below(self, room_of_x: int) -> Float[Array, "outs_and_room in_and_room"]:
        """The weights, the layers' A under them, and zeros."""
        right, dtype = Placed(None, room_of_x), self.dy.dtype
        a = _above_each_other(self.factors, max(each.a.shape[1] for each in self.factors))
        rows = self.dy.shape[1] - sum(weight.shape[0] for weight in self.weights)
        *others, last = self.weights
        framed = [weight.framed(right, Placed(None, 0), dtype) for weight in others]
        return jnp.concatenate([*framed, last.framed(right, Placed(a, rows), dtype)])


def _sides(
    cotangents: Sequence[jax.Array],
    low_rank: Float[Array, "tokens ranks"],
    weights: Sequence[Framable],
    factors: Sequence[Factors],
    *,
    has_room: bool,
) -> list[_Side]:
    """One for each layer, if cotangents have room for products; if not, as room costs a copy, one for all."""
    # What computes a cotangent does so with wide loads, unless the room for its product is part of it.
    cotangents = jax.lax.optimization_barrier(cotangents)
    if has_room or len(cotangents) == 1:
        layers = zip(cotangents, weights, factors, _starts(factors), strict=True)
        return [
            _Side.of(dy, low_rank[:, start : start + each.b.shape[1]], [weight], [each])
            for dy, weight, each, start in layers
        ]
    outs, ranks = sum(weight.shape[0] for weight in weights), low_rank.shape[1]
    zeros = jnp.zeros((cotangents[0].shape[0], room_for(outs, [ranks])), cotangents[0].dtype)
    beside = jnp.concatenate([*cotangents, zeros], axis=1)
    return [_Side.of(beside, low_rank, weights, factors)]


def _gradients(
    sides: Sequence[_Side], x: Float[Array, "tokens in_and_room"], room_of_x: int
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Of x, of every A, of each B."""
    # Once the factors' gradients are there x is not needed any more, before its own takes memory.
    da, dbs = _gradient_of_a(sides, x), _gradients_of_b(sides)
    sides = _behind(sides, da, dbs)
    return _gradient_of_x(sides, room_of_x), da, dbs


def _gradient_of_x(sides: Sequence[_Side], room_of_x: int) -> Float[Array, "tokens in_and_room"]:
    return functools.reduce(jnp.add, (_contract(side.dy, side.below(room_of_x), (1, 0)) for side in sides))


def _gradient_of_a(sides: Sequence[_Side], x: Float[Array, "tokens in_and_room"]) -> jax.Array:
    """Of every A, one above the other, with the room that x has."""
    products = jnp.concatenate([side.product for side in sides], axis=1)
    return _contract(products, x, (0, 0))


def _gradients_of_b(sides: Sequence[_Side]) -> list[jax.Array]:
    return [db for side in sides for db in side.dbs]


def _behind(sides: Sequence[_Side], *others: Any) -> list[_Side]:
    """Sides whose products begin when all of this is there.

    The others themselves stay before the barrier: a product behind it would not write where a scan collects
    what it gives.
    """
    dys, _ = jax.lax.optimization_barrier(([side.dy for side in sides], others))
    return [side._replace(dy=dy) for side, dy in zip(sides, dys, strict=True)]


def _as_factors(
    da: Float[Array, "ranks _"], dbs: Sequence[Float[Array, "_ _"]], factors: Sequence[Factors]
) -> tuple[Factors, ...]:
    """Gradients of factors, with the room that these have."""
    das = jnp.split(da, list(accumulate(db.shape[1] for db in dbs))[:-1])
    # As parts of one array they would be copied to where a scan collects them; see `nn.stack`.
    das = das if len(das) == 1 else computed(das)
    return tuple(
        Factors(_fit(da, 1, each.a.shape[1]), _fit(db, 0, each.b.shape[0]))
        for da, db, each in zip(das, dbs, factors, strict=True)
    )


def _above_each_other(factors: Sequence[Factors], width: int) -> Float[Array, "ranks width"]:
    """Every A, with as much room as makes that width."""
    return jnp.concatenate([_fit(each.a, 1, width) for each in factors])


def _fit(x: Float[Array, "_ _"], axis: int, size: int) -> Float[Array, "_ _"]:
    """x with more room along an axis, or less."""
    more = max(0, size - x.shape[axis])
    x = jnp.pad(x, [(0, more if each == axis else 0) for each in range(2)]) if more else x
    return x if x.shape[axis] == size else jax.lax.slice_in_dim(x, 0, size, axis=axis)


def _augment(
    x: Float[Array, "tokens in_and_room"],
    features: int,
    r: int,
    multiply: Callable[[jax.Array], jax.Array],
    name: str | None = None,
    *,
    has_ones: bool = False,
) -> tuple[Float[Array, "tokens wide"], Float[Array, "tokens r"]]:
    """x, a product with it and zeros, as many columns as a multiple of `_ALIGNMENT`; and the product.

    They are put where x has room, if it has.

    Args:
        x: with room or without.
        features: without.
        r: width of the product.
        multiply: gives it, of x with room.
        name: by which policies of `jax.checkpoint` know the product.
        has_ones: the first of the zeros is a one, for which there is room.
    """
    room = room_for(features, [r])
    wide = x if x.shape[1] >= features + room else _widen(x, features + room - x.shape[1])
    # A barrier that only XLA needs: x is computed once and not again for the update.
    wide = jax.lax.optimization_barrier(wide)
    product = multiply(wide)
    if name is not None:
        product = name_for_policies(product, name)
    ones = [jnp.ones_like(product[:, :1])] if has_ones else []
    return _fill(wide, jnp.concatenate([product, *ones], axis=1), features), product


def _fill(
    wide: Float[Array, "tokens wide"], product: Float[Array, "tokens r"], start: int
) -> Float[Array, "tokens wide"]:
    """`wide` with a product from a column on, in place."""
    # Without the barrier XLA knew the start, made a concatenation and copied all.
    column = jax.lax.optimization_barrier(jnp.int32(start))
    return jax.lax.dynamic_update_slice(wide, product, (jnp.int32(0), column))


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
