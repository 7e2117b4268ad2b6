"""Products with low-rank factors in one: the same numbers as the two products apart."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jaxprs import equations
from tests.kernels.test_hopper import H100
from vlmlora.nn import low_rank
from vlmlora.nn.low_rank import (
    Factors,
    Norm,
    low_rank_block,
    low_rank_products,
    room_for,
    running_rarely,
    takes_norm,
)
from vlmlora.nn.mlp import Gated
from vlmlora.nn.norm import LayerNorm, RMSNorm
from vlmlora.quantization.stacks import stack_weights
from vlmlora.quantization.weights import DenseWeight, INT8Weight, NF4Weight
from vlmlora_kernels.hopper import low_rank_gradients as hopper
from vlmlora_kernels.hopper.in_place import BLOCK, in_place
from vlmlora_kernels.low_rank import LowRankGradients

KINDS = {
    "dense": DenseWeight,
    "nf4": NF4Weight.quantize,
    "int8": INT8Weight.quantize,
    "mixed": lambda w: stack_weights([DenseWeight(w), NF4Weight.quantize(w)]).layer(jnp.int32(1)),
}


def problem(features, outs, ranks, kind, tokens=(2, 5), seed=0):
    rng = np.random.default_rng(seed)

    def matrix(rows, columns):
        # Products stay near 1: sines of large numbers would magnify their rounding.
        return jnp.asarray(rng.normal(size=(rows, columns)) / columns**0.5, jnp.float32)

    x = jnp.asarray(rng.normal(size=(*tokens, features)), jnp.float32)
    weights = [KINDS[kind](matrix(out, features)) for out in outs]
    factors = [Factors(matrix(r, features), matrix(out, r)) for out, r in zip(outs, ranks, strict=True)]
    return x, weights, factors


def apart(x, weights, factors):
    return tuple(x @ w + (x @ f.a.T) @ f.b.T for w, f in zip(weights, factors, strict=True))


def close(found, expected):
    def compare(a, b):
        # float32 sums of tens of numbers in another order.
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5 * max(1, np.abs(b).max()))

    jax.tree.map(compare, found, expected)


@settings(max_examples=4, deadline=None)
@given(
    features=st.integers(2, 40),
    outs=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    ranks=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    kind=st.sampled_from(["dense", "nf4", "int8"]),
)
def test_values_and_gradients_are_those_of_two_products(features, outs, ranks, kind):
    x, weights, factors = problem(features, outs, ranks[: len(outs)], kind)

    def loss(products, x, factors):
        # Every output counts differently, and squares make the cotangents depend on the values.
        outputs = products(x, weights, factors)
        return sum((i + 1) * jnp.sum(jnp.sin(y)) for i, y in enumerate(outputs)), outputs

    (together, outputs), (expected, expected_outputs) = (
        jax.jit(jax.grad(functools.partial(loss, products), argnums=(0, 1), has_aux=True))(x, factors)
        for products in (low_rank_products, apart)
    )
    close(outputs, expected_outputs)
    close(together, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_room_is_left_and_used_between_two_products(kind):
    x, (up,), (first,) = problem(12, [20], [3], kind)
    _, (down,), (second,) = problem(20, [7], [5], kind, seed=1)
    room = room_for(20, [3, 5])
    assert (20 + room) * jnp.bfloat16.dtype.itemsize % 128 == 0

    def together(x, first, second):
        (wide,) = low_rank_products(x, [up], [first], room=room)
        hidden = jax.nn.silu(wide)
        return low_rank_products(hidden, [down], [second])[0], wide

    def one_after_another(x, first, second):
        (hidden,) = apart(x, [up], [first])
        return apart(jax.nn.silu(hidden), [down], [second])[0]

    y, wide = together(x, first, second)
    assert wide.shape[-1] == 20 + room
    np.testing.assert_array_equal(wide[..., 20:], 0)
    close(y, one_after_another(x, first, second))
    gradients = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2)))(x, first, second)
        for f in (lambda *a: together(*a)[0], one_after_another)
    ]
    close(*gradients)


@pytest.mark.parametrize("is_tight", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_before_the_product_is_part_of_it(kind, is_tight):
    x, (gate, up), first = problem(12, [20, 20], [3, 3], kind)
    _, (down,), second = problem(20, [7], [5], kind, seed=1)

    def hidden(gate, up):
        return jax.nn.silu(gate) * up

    def together(x, first, second):
        wide = low_rank_products(x, [gate, up], first, room=room_for(20, [3, 5]))
        return low_rank_products(wide, [down], second, function=hidden, is_tight=is_tight)[0]

    def one_after_another(x, first, second):
        return apart(hidden(*apart(x, [gate, up], first)), [down], second)[0]

    close(together(x, first, second), one_after_another(x, first, second))
    gradients = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2)))(x, first, second)
        for f in (together, one_after_another)
    ]
    close(*gradients)


def test_what_a_function_gives_is_not_saved():
    x, (down,), factors = problem(24, [7], [5], "dense")

    def loss(x, f):
        return jnp.sum(low_rank_products([x], [down], factors, function=f)[0])

    saved = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda x: loss(x, jnp.sin), x)[1])]
    assert saved.count(x.shape) == 1
    assert (*x.shape[:-1], 5) in saved


def test_of_an_x_without_room_that_itself_is_saved():
    x, (weight,), factors = problem(24, [7], [5], "dense")

    def saved(x):
        pulled = jax.vjp(lambda x: low_rank_products(x, [weight], factors)[0], x)[1]
        return [leaf.size for leaf in jax.tree.leaves(pulled) if leaf.ndim > 1]

    rows, room = x.size // 24, room_for(24, [5])
    assert x.size in saved(x)
    assert rows * (24 + room) not in saved(x)
    assert rows * (24 + room) in saved(jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, room)]))


def test_gradients_written_over_the_functions_arguments_are_the_same(monkeypatch):
    """The kernel, which only a GPU runs, in Pallas' interpreter."""
    x, (gate, up), first = problem(16, [24, 24], [4, 4], "nf4", tokens=(4, 8))
    _, (down,), second = problem(24, [8], [4], "nf4", seed=1)
    x, first, second = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, first, second))
    room = room_for(24, [4])
    assert x.size // 16 * (24 + room) == BLOCK
    written = []

    def write(function, *arrays):
        written.append(len(arrays))
        return in_place(function, *arrays, interpret=plgpu.InterpretGPUParams())

    monkeypatch.setattr(low_rank, "obstacle", lambda *_: None)
    monkeypatch.setattr(low_rank, "elementwise_in_place", write)

    def gradients(is_tight):
        def loss(x, first, second):
            wide = low_rank_products(x, [gate, up], first, room=room)
            options = {"function": lambda gate, up: jax.nn.silu(gate) * up, "is_tight": is_tight}
            (y,) = low_rank_products(wide, [down], second, **options)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, first, second)

    for plain, found in zip(*map(jax.tree.leaves, map(gradients, (False, True))), strict=True):
        plain, found = np.asarray(plain, np.float32), np.asarray(found, np.float32)
        # Rounded to bfloat16 in other places on the way, 2**-9 each time.
        assert np.linalg.norm(found - plain) < 2**-6 * np.linalg.norm(plain)
    assert written == [3]


def test_weights_get_no_gradient_and_factors_theirs_under_scan_and_checkpoint():
    x, weights, factors = problem(16, [16, 16, 16], [4, 4, 4], "nf4")
    stack = stack_weights(weights)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *factors)

    def loss(stacked, x):
        @jax.checkpoint
        def layer(x, step):
            weight, each = step
            return jnp.sin(low_rank_products(x, [weight], [each])[0]), None

        return jnp.sum(jax.lax.scan(layer, x, (stack, stacked))[0])

    def plain(stacked, x):
        for i in range(3):
            x = jnp.sin(apart(x, [stack.layer(i)], [jax.tree.map(lambda leaf, i=i: leaf[i], stacked)])[0])
        return jnp.sum(x)

    close(*(jax.jit(jax.grad(f, argnums=(0, 1)))(stacked, x) for f in (loss, plain)))


def hidden_of(gate, up):
    return jax.nn.silu(gate) * up


def block_problem(kind, features, ranks, dtype=jnp.float32, tokens=(2, 5)):
    """A gated block, the same in products of their own, and the arguments of both."""
    x, weights, factors = problem(12, [features] * 2, ranks[:2], kind, tokens=tokens)
    _, (down,), (last,) = problem(features, [7], ranks[2:], kind, seed=1)
    biases = [jnp.linspace(-1, 1, features), None]
    x, factors, last, biases = jax.tree.map(lambda leaf: leaf.astype(dtype), (x, factors, last, biases))

    def together(x, factors, biases, last, **options):
        options = {
            "room": room_for(features, ranks),
            "function": hidden_of,
            "names": ["gate", "up"],
        } | options
        return low_rank_block(x, weights, factors, biases, down, last, **options)[1]

    def one_after_another(x, factors, biases, last):
        gate, up = apart(x, weights, factors)
        return apart(hidden_of(gate + biases[0], up), [down], [last])[0]

    return together, one_after_another, (x, factors, biases, last)


FULL = [26, 26, 5]
"""Ranks of a block with which 12 features fill whole lines of 64."""


@pytest.mark.parametrize(
    ("kind", "is_tight", "ranks"),
    [*((kind, is_tight, [3, 2, 5]) for kind in KINDS for is_tight in (False, True)), ("nf4", False, FULL)],
    ids=str,
)
def test_a_block_is_its_products_one_after_another(kind, is_tight, ranks):
    together, one_after_another, arguments = block_problem(kind, 20, ranks)
    close(together(*arguments, is_tight=is_tight), one_after_another(*arguments))

    def gradients(f, **options):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a, **options))), argnums=(0, 1, 2, 3)))(
            *arguments
        )

    close(gradients(together, is_tight=is_tight), gradients(one_after_another))


@pytest.mark.parametrize(("ranks", "expected"), [([3, 2, 5], 0), (FULL, 1)])
def test_a_bias_is_part_of_the_product_where_there_is_room(ranks, expected):
    together, _, arguments = block_problem("dense", 20, ranks)
    added = [
        equation.outvars[0].aval.shape[-1:]
        for equation in equations(jax.make_jaxpr(together)(*arguments))
        if equation.primitive.name == "add"
    ]
    assert added.count((20 + room_for(20, ranks),)) == expected


@pytest.mark.parametrize("is_tight", [False, True])
def test_a_block_in_one_pass_has_the_same_gradients(is_tight, monkeypatch):
    """The kernel, which only a GPU runs, in Pallas' interpreter."""
    together, _, arguments = block_problem("nf4", 56, [4, 3, 2], jnp.bfloat16, tokens=(2, 32))

    def gradients():
        def loss(*arguments):
            return jnp.sum(jnp.sin(together(*arguments, is_tight=is_tight).astype(jnp.float32)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arguments)

    apart = gradients()
    calls = []

    def in_one_pass(*arguments, **options):
        calls.append(options)
        interpret = plgpu.InterpretGPUParams()
        return LowRankGradients(*hopper.low_rank_gradients(*arguments, interpret=interpret, **options))

    monkeypatch.setattr(low_rank.kernels, "obstacle", lambda *_: None)
    monkeypatch.setattr(low_rank.kernels, "low_rank_gradients", in_one_pass)
    joined = gradients()
    assert calls == [{"is_in_place": is_tight}]
    for found, expected in zip(jax.tree.leaves(joined), jax.tree.leaves(apart), strict=True):
        assert found.dtype == expected.dtype
        # Both round wide arrays and sums to bfloat16, at other places: a few units in the last place of
        # the largest, whose sums others are part of.
        expected = np.asarray(expected, np.float32)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2**-6 * largest)


@pytest.mark.parametrize("is_tight", [False, True])
def test_a_block_is_one_pass_on_an_h100(is_tight):
    together, _, arguments = block_problem("nf4", 56, [4, 3, 2], jnp.bfloat16, tokens=(2, 32))

    def loss(*arguments):
        return jnp.sum(together(*arguments, is_tight=is_tight).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "low_rank_gradients" in text
    assert text.count("output_operand_alias<") == (2 if is_tight else 0)


def test_a_kernel_that_takes_seconds_to_compile_is_shared_and_worth_it():
    together, _, arguments = block_problem("nf4", 56, [4, 3, 2], jnp.bfloat16, tokens=(2, 32))

    def kernels(*functions):
        def loss(*arguments):
            values = [together(*arguments, function=function) for function in functions]
            return sum(jnp.sum(value.astype(jnp.float32)) for value in values)

        with jax.sharding.use_abstract_mesh(H100):
            traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*arguments)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return sum("mosaic_gpu" in line and "low_rank_gradients" in line for line in text.splitlines())

    assert kernels(Gated(jax.nn.silu), Gated(jax.nn.silu)) == 1
    with running_rarely():
        assert kernels(Gated(jax.nn.silu)) == 0


@pytest.mark.parametrize(("is_block", "kind"), [(False, RMSNorm), (True, RMSNorm), (False, LayerNorm)])
def test_behind_a_norm_x_and_its_gradient_come_by_one_way(is_block, kind, monkeypatch):
    """As on a GPU, with the kernels' form in XLA."""
    x, weights, factors = problem(128, [24, 24], [3, 5], "nf4")
    _, (down,), (last,) = problem(24, [16], [3], "nf4", seed=1)
    scale, shift = jnp.linspace(0.5, 2, 128), jnp.linspace(-1, 3, 128)
    norm = kind(128, eps=0.1, dtype=x.dtype)
    norm.weight.set_value(scale)
    if kind is LayerNorm:
        norm.bias.set_value(shift)
    room = room_for(24, [3, 5])

    def hidden(gate, up):
        return jnp.sin(gate) * up

    def run(norm, x, factors, last):
        if not is_block:
            return low_rank_products(x, weights, factors, room=room, norm=norm)
        more = {"room": room, "function": hidden, "names": ["gate", "up"], "norm": norm}
        return low_rank_block(x, weights, factors, [None, jnp.ones(24)], down, last, **more)

    def loss(run, x, factors, last):
        same, *ys = run(x, factors, last)
        return jnp.sum(jnp.cos(same)) + sum(jnp.sum(jnp.sin(y)) for y in ys)

    def fused(x, factors, last):
        assert takes_norm(x, factors)
        return run(Norm(scale, shift if kind is LayerNorm else None, 0.1), x, factors, last)

    def apart(x, factors, last):
        ys = run(None, norm(x), factors, last)
        return x, *(ys[1:] if is_block else ys)

    assert not takes_norm(x, factors)
    monkeypatch.setattr(low_rank.norm_kernels, "obstacle", lambda *arrays, room=0: None)
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, form), argnums=(0, 1, 2)))(x, factors, last)
        for form in (fused, apart)
    )
    close(found, expected)
