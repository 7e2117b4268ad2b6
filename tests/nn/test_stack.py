"""Layers of several kinds in one scan, against a loop over them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jaxprs import equations
from vlmlora.lora.layer import Lora
from vlmlora.nn import stack
from vlmlora.nn.linear import Linear
from vlmlora.nn.norm import RMSNorm
from vlmlora.nn.saved import name_for_policies
from vlmlora.nn.stack import scan_layers, scan_layers_and_keep, scan_mixed_layers
from vlmlora.nn.trained import TrainedParameter
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.weights import DenseWeight, NF4Weight
from vlmlora.training import remat
from vlmlora.training.remat import remat_policy

WIDTH = 64
ORDER = (0, 1, 1, 0, 1, 0, 0)


class Layer(nnx.Module):
    """A linear layer and a norm, whose arrays are random."""

    def __init__(self, layers: int, seed: int, *, quantized: bool):
        rng = np.random.default_rng(seed)
        self.stack = layers
        self.linear = Linear(WIDTH, WIDTH, dtype=jnp.float32, stack=layers)
        self.norm = RMSNorm(WIDTH, eps=1e-6, dtype=jnp.float32, stack=layers)
        weight = jnp.asarray(rng.normal(0, WIDTH**-0.5, (layers, WIDTH, WIDTH)), jnp.float32)
        self.linear.weight.set_value(NF4Weight.quantize(weight) if quantized else DenseWeight(weight))
        self.linear.bias.set_value(jnp.asarray(rng.normal(size=(layers, WIDTH)), jnp.float32))
        self.norm.weight.set_value(jnp.asarray(rng.normal(size=(layers, WIDTH)), jnp.float32))
        # An adapter on all layers but the first, and one trained bias of the last.
        A, B = (jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32) for shape in ((2, WIDTH), (WIDTH, 2)))
        adapted = tuple(range(1, layers))
        repeat = functools.partial(jnp.repeat, repeats=len(adapted), axis=0)
        self.linear.adapter = Lora(repeat(A[None]), repeat(B[None]), jnp.ones(len(adapted)), layers=adapted)
        self.linear.bias = TrainedParameter(
            self.linear.bias,
            self.linear.bias.get_value()[-1:] + 1,
            dtype=jnp.float32,
            is_weight=False,
            layers=(layers - 1,),
            is_partial=True,
        )


def even(layer, x, shared, constant, arrays, *, key):
    up = name_for_policies(layer.linear(layer.norm(x), key=key), "mlp_up")
    x = jnp.tanh(up) + constant * shared + arrays
    return x, x.sum()


def odd(layer, x, shared, constant, arrays, *, key):
    up = name_for_policies(layer.linear(x, key=key), "mlp_up")
    gate = name_for_policies(up[:, ::2] * arrays[::2], "mlp_gate")
    x = jnp.sin(up * shared) - constant * layer.norm(x) + arrays + jnp.repeat(gate**2, 2, axis=1)
    return x, x.mean()


def make(seed=0):
    """Two stacks, the input and the arrays that the steps read."""
    rng = np.random.default_rng(seed)
    stacks = [Layer(ORDER.count(0), 1, quantized=True), Layer(ORDER.count(1), 2, quantized=False)]
    x, shared = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, WIDTH), (WIDTH,)))
    arrays = [jnp.asarray(rng.normal(size=(each.stack, WIDTH)), jnp.float32) for each in stacks]
    return stacks, x, shared, arrays


def assert_close(found, expected):
    """The same float32 products, added up in another order."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def loss_of(run, graphdefs, frozen, arrays):
    def loss(trained, x, shared):
        stacks = [nnx.merge(*parts) for parts in zip(graphdefs, trained, frozen, strict=True)]
        x, out = run(stacks, x, shared, jnp.float32(0.7), arrays)
        return jnp.sum(x * jnp.cos(x)) + jnp.sum(out * jnp.arange(1.0, len(out) + 1))

    return loss


def in_a_loop(stacks, x, shared, constant, arrays):
    """One layer after the other, by plain slices."""
    out, seen = [], [0] * len(stacks)
    for kind in ORDER:

        def pick(layer, x, _, *, key, place=seen[kind], kind=kind):
            mine = arrays[kind][place]
            new, value = (even, odd)[kind](layer, x, shared, constant, mine, key=key)
            return x, (new, value)

        _, (news, values) = scan_layers(stacks[kind], x, pick)
        x = news[seen[kind]]
        out.append(values[seen[kind]])
        seen[kind] += 1
    return x, jnp.stack(out)


def test_mixed_layers_equal_a_loop(monkeypatch):
    """Value and every gradient, by each policy; no frozen weight is copied, stacked or saved."""
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    stacks, x, shared, arrays = make()
    graphdefs, trained, frozen = zip(*(nnx.split(each, Trainable, ...) for each in stacks), strict=True)
    losses = [loss_of(in_a_loop, graphdefs, frozen, arrays)]
    for policy in (False, True, "unsloth", "mlp", {"layer_input": "offload", "mlp_up": "offload"}):

        def run(stacks, x, shared, constant, arrays, policy=policy):
            return scan_mixed_layers(
                stacks,
                x,
                [even, odd],
                order=ORDER,
                shared=shared,
                constant=constant,
                per_layer=arrays,
                remat=remat_policy(policy),
            )

        losses.append(loss_of(run, graphdefs, frozen, arrays))
        jaxpr = jax.make_jaxpr(jax.grad(losses[-1], argnums=(0, 1, 2)))(trained, x, shared)
        sizes = {leaf.shape for each in frozen for leaf in jax.tree.leaves(each) if leaf.size >= WIDTH**2 / 2}
        per_step = {(len(ORDER), *shape[1:]) for shape in sizes}
        for equation in equations(jaxpr):
            for out in equation.outvars:
                assert out.aval.shape not in sizes | per_step, f"{policy}: {equation.primitive} {out.aval}"
        on_host = any("<host>" in str(out.aval) for eqn in equations(jaxpr) for out in eqn.outvars)
        assert on_host == ("offload" in str(policy) or policy == "unsloth")

    def all_of(trained, x, shared):
        return [jax.value_and_grad(loss, argnums=(0, 1, 2))(trained, x, shared) for loss in losses]

    (value, gradients), *others = jax.jit(all_of)(tuple(trained), x, shared)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    for other_value, other_gradients in others:
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        jax.tree.map(assert_close, other_gradients, gradients)


@pytest.mark.parametrize(
    ("policy", "again", "steps"),
    [(True, 2, 1), ({"mlp_up": "save"}, 0, 1), ("mlp", 0, 1), ("unsloth", 2, 3)],
    ids=str,
)
def test_what_mixed_layers_keep_is_not_computed_again(policy, again, steps, monkeypatch):
    """Of either kind the product with the frozen weight, where its result is not kept.

    Of every step that the program has: one to a loop's body or, with host memory, two and another beside it.
    """
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    stacks, x, shared, arrays = make()
    graphdefs, trained, frozen = zip(*(nnx.split(each, Trainable, ...) for each in stacks), strict=True)

    def products(policy):
        def run(stacks, x, shared, constant, arrays):
            given = {
                "shared": shared,
                "constant": constant,
                "per_layer": arrays,
                "remat": remat_policy(policy),
            }
            return scan_mixed_layers(stacks, x, [even, odd], order=ORDER, **given)

        loss = loss_of(run, graphdefs, frozen, arrays)
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(trained, x, shared)
        return sum(
            equation.primitive.name == "dot_general" and equation.invars[1].aval.shape == (WIDTH, WIDTH)
            for equation in equations(jaxpr)
        )

    assert products(policy) == steps * (products(False) + again)


def test_gradients_go_to_the_layer_of_the_step_and_what_is_alike_shares_an_array():
    """Kinds of four and three layers: two arrays alike in other places, one of another type, two alone."""

    def array(layers, *shape, dtype=np.float32):
        size = layers * int(np.prod(shape))
        return jnp.arange(size, dtype=dtype).reshape(layers, *shape) + 100 * len(shape)

    first = {"a": array(4, 2, 5), "b": array(4, 2, 5) + 1000, "c": array(4, 3), "half": array(4, 6)}
    second = {"other": array(3, 3) + 7, "half": array(3, 6, dtype=jnp.bfloat16), "z": array(3, 2, 5) + 9}
    # The last of the first kind is left out, as by a decoder that is unfinished.
    kinds, places = np.array(ORDER[:-1]), np.array([0, 0, 1, 1, 2, 2])

    def layers(trainables):
        receivers, direct = stack._gradients_by_step(trainables, kinds, places)
        # "a" with "z", "c" with "other"; "b" and both halves alone.
        assert len(receivers) == 5
        assert {len(each) for each in receivers} == {len(kinds)}
        for step, (kind, place) in enumerate(zip(ORDER[:-1], places, strict=True)):
            layer = jax.tree.map(lambda leaf, i=place: jax.lax.stop_gradient(leaf[i]), trainables[kind])
            yield layer, direct(kind, layer, [each[step] for each in receivers])

    def total(trainables):
        leaves = jax.tree.leaves([directed for _, directed in layers(trainables)])
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in leaves)

    for layer, directed in layers((first, second)):
        jax.tree.map(np.testing.assert_array_equal, directed, layer)
    gradients = jax.grad(total)((first, second))
    expected = jax.tree.map(lambda leaf: 2 * leaf, (first, second))
    for name in first:
        expected[0][name] = expected[0][name].at[3].set(0)
    jax.tree.map(np.testing.assert_array_equal, gradients, expected)


def test_the_program_does_not_grow_with_the_number_of_layers():
    def size(order):
        stacks = [Layer(order.count(kind), kind, quantized=False) for kind in (0, 1)]
        arrays = [jnp.zeros((each.stack, WIDTH)) for each in stacks]
        graphdefs, trained, frozen = zip(*(nnx.split(each, Trainable, ...) for each in stacks), strict=True)

        def run(stacks, x, shared, constant, arrays):
            remat = remat_policy(True)
            given = {"shared": shared, "constant": constant, "per_layer": arrays, "remat": remat}
            return scan_mixed_layers(stacks, x, [even, odd], order=order, **given)

        loss = loss_of(run, graphdefs, frozen, arrays)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(trained, jnp.zeros((3, WIDTH)), jnp.zeros(WIDTH))
        return sum(1 for _ in equations(jaxpr))

    assert size([0, 1, 1, 0]) == size([1, 0, 0, 0, 1] * 8)


@pytest.mark.parametrize("policy", [None, "attention+mlp"])
@pytest.mark.parametrize("keep", [(), (0,), (4, 1, 1, -2), (2, 0)])
def test_kept_layers_are_those_of_a_loop(keep, policy):
    layers, (_, x, _, _) = Layer(5, 3, quantized=False), make()
    remat = None if policy is None else remat_policy(policy)

    def call(layer, x, _, *, key):
        x = jnp.tanh(layer.linear(layer.norm(x), key=key))
        return x, x

    def both(x):
        last, every = scan_layers(layers, x, call)
        return last, every[np.array(keep, int)]

    def loss(run, x):
        last, kept = run(x)
        return jnp.sum(jnp.cos(last)) + jnp.sum(jnp.sin(3 * kept)), (last, kept)

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), has_aux=True))(x)
        for run in (lambda x: scan_layers_and_keep(layers, x, call, keep, remat=remat), both)
    )
    # float32 sums in another order, of terms up to ten.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_the_layer_with_which_the_backward_pass_begins_computes_no_product_again(monkeypatch):
    """Where inputs go to host memory; elsewhere it is like the others."""
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    layers, (_, x, _, _) = Layer(5, 3, quantized=True), make()
    graphdef, trained, frozen = nnx.split(layers, Trainable, ...)

    def call(layer, x, _, *, key):
        up = name_for_policies(layer.linear(layer.norm(x), key=key), "mlp_up")
        return jnp.tanh(up), None

    def gradient(policy, **options):
        def loss(trained, x):
            layers = nnx.merge(graphdef, trained, frozen)
            x, _ = scan_layers(layers, x, call, count=4, remat=remat_policy(policy), **options)
            return jnp.sum(jnp.cos(3 * x))

        return jax.value_and_grad(loss, argnums=(0, 1))

    def products(policy, **options):
        jaxpr = jax.make_jaxpr(gradient(policy, **options))(trained, x)
        decoded = (WIDTH, WIDTH)
        dots = (each for each in equations(jaxpr) if each.primitive.name == "dot_general")
        return sum(any(atom.aval.shape == decoded for atom in each.invars) for each in dots)

    options = {"begins_backward": True}
    like_the_others = dataclasses.replace(remat_policy("unsloth"), at_end=remat_policy(True))
    assert products(like_the_others, **options) == products("unsloth", **options) + 1
    for policy in (False, True, "mlp"):
        assert products(policy, **options) == products(policy)
        assert remat_policy(policy) is None or remat_policy(policy).at_end is None
    (value, gradients), *others = jax.jit(
        lambda *given: [gradient(policy, **options)(*given) for policy in (False, "unsloth")]
    )(trained, x)
    # The trained bias is that of the layer which does not run.
    assert [bool(np.any(leaf)) for leaf in jax.tree.leaves(gradients)].count(False) == 1
    for other_value, other_gradients in others:
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        jax.tree.map(assert_close, other_gradients, gradients)
