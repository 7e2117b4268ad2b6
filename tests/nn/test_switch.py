"""The conditional that keeps what a policy names of its branches, against `jax.lax.switch`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from tests.jaxprs import equations
from vlmlora.nn.saved import Checkpoint
from vlmlora.nn.switch import pair_up, switch_saving

ROWS, WIDTH = 6, 8
NAMES = ("alike", "narrow", "wide")


def narrow(constants, operands):
    """Saves a value that every branch has, and one of its own shape."""
    x, w = operands
    alike = checkpoint_name(x @ w, "alike")
    half = checkpoint_name((jnp.sin(alike) * constants["shift"])[:, ::2], "narrow")
    return {"x": x + jnp.repeat(jnp.cos(half), 2, axis=1), "sum": half.sum()}


def wide(constants, operands):
    x, w = operands
    doubled = checkpoint_name(jnp.concatenate([x, x @ w], axis=1), "wide")
    alike = checkpoint_name(jnp.tanh(doubled[:, WIDTH:] * constants["factors"][constants["place"]]), "alike")
    return {"x": x * jnp.sin(alike) + doubled[:, :WIDTH] ** 2, "sum": alike.mean()}


def make(seed=0):
    rng = np.random.default_rng(seed)
    x, w, factors = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((ROWS, WIDTH), (WIDTH, WIDTH), (3, WIDTH))
    )
    return {"shift": jnp.float32(0.7), "factors": factors, "place": jnp.int32(2)}, (x, w)


def checkpoint(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return Checkpoint(kept=frozenset(names), policy=policy, policy_on_device=policy)


def loss_of(switch):
    def loss(index, constants, operands):
        out = switch(index, constants, operands)
        return jnp.sum(out["x"]) + out["sum"]

    return loss


def saving(remat):
    """The switch in a checkpointed body, as a scan runs it."""
    branches = [narrow, wide] if remat is None else [remat.for_branch(each) for each in (narrow, wide)]

    def switch(*arguments):
        return switch_saving(branches, *arguments, named_primitives={})

    return switch if remat is None else remat(switch)


REMATS = [None, checkpoint(), checkpoint("alike"), checkpoint(*NAMES)]


@pytest.mark.parametrize("remat", REMATS, ids=["all", "nothing", "alike", "named"])
@pytest.mark.parametrize("index", [0, 1])
def test_values_and_gradients_are_those_of_a_plain_switch(index, remat):
    index, (constants, operands) = jnp.int32(index), make()

    def plain(index, constants, operands):
        return jax.lax.switch(index, [narrow, wide], constants, operands)

    expected, found = (
        jax.jit(jax.value_and_grad(loss_of(switch), argnums=2))(index, constants, operands)
        for switch in (plain, saving(remat))
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
    # The same float32 operations, which XLA may fuse in another way.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    np.testing.assert_allclose(
        saving(remat)(index, constants, operands)["x"], plain(index, constants, operands)["x"]
    )


@pytest.mark.parametrize(
    ("remat", "expected"),
    [
        (REMATS[1], []),
        (REMATS[2], [(ROWS, WIDTH)]),
        # What is alike in both branches has one place.
        (REMATS[3], [(ROWS, WIDTH), (ROWS, WIDTH // 2), (ROWS, 2 * WIDTH)]),
    ],
    ids=["nothing", "alike", "named"],
)
def test_what_is_named_is_kept_once_and_not_computed_again(remat, expected):
    constants, operands = make()
    loss = loss_of(saving(remat))
    pull = jax.eval_shape(
        lambda operands: jax.vjp(lambda o: loss(jnp.int32(1), constants, o), operands)[1], operands
    )
    given = [leaf.shape for leaf in jax.tree.leaves((constants, operands))]
    kept = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.ndim == 2]
    for shape in given:
        if shape in kept:
            kept.remove(shape)
    assert sorted(kept) == sorted(expected)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=2))(jnp.int32(1), constants, operands)
    dots = sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))
    # One in either branch forward and two backward; and one more where it is computed again.
    computed_again = {0: 2, 1: 1, 3: 0}[len(expected)]
    assert dots == 2 * 3 + computed_again


def test_what_leaves_and_enters_the_conditional_is_computed():
    """Not copied, which XLA would do on the streams of what goes through host memory."""
    constants, operands = make()
    loss = loss_of(saving(REMATS[3]))
    found = list(equations(jax.make_jaxpr(jax.grad(loss, argnums=2))(jnp.int32(1), constants, operands)))
    makers = {out: equation.primitive.name for equation in found for out in equation.outvars}
    kept = {(ROWS, WIDTH // 2), (ROWS, 2 * WIDTH)}
    leaving = [e for e in found if e.primitive.name == "name" and makers.get(e.invars[0]) == "select_n"]
    assert kept <= {e.outvars[0].aval.shape for e in leaving}
    entering = [
        makers.get(variable)
        for equation in found
        if equation.primitive.name == "cond"
        for variable in equation.invars
        if variable.aval.shape in kept
    ]
    assert entering == ["select_n"] * len(kept)


def test_it_runs_within_a_scan_and_under_vmap():
    constants, (x, w) = make()
    indices = jnp.array([0, 1, 1, 0])

    def loss_of_scan(switch):
        def loss(x, w):
            def body(x, index):
                out = switch(index, constants, (x, w))
                return out["x"] / WIDTH, out["sum"]

            x, sums = jax.lax.scan(body, x, indices)
            return jnp.sum(x**2) + jnp.sum(sums)

        return loss

    def plain(index, constants, operands):
        return jax.lax.switch(index, [narrow, wide], constants, operands)

    xs = jnp.stack([x, -x, x / 2])
    expected, found = (
        jax.jit(jax.vmap(jax.grad(loss_of_scan(switch), argnums=(0, 1)), (0, None)))(xs, w)
        for switch in (plain, saving(checkpoint(*NAMES)))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_values_of_as_many_elements_share_a_place_and_returned_ones_need_none():
    def branch(shape):
        def call(_, operands):
            (x,) = operands
            inner = checkpoint_name(jnp.sin(x.reshape(shape)), "inner")
            return checkpoint_name(jnp.cos(inner) * 3, "result").reshape(x.shape)

        return checkpoint("inner", "result").for_branch(call)

    shapes = [(ROWS // 2, 2 * WIDTH), (ROWS * WIDTH,)]
    branches = list(map(branch, shapes))

    def loss(index, x):
        return jnp.sum(switch_saving(branches, index, (), (x,), named_primitives={}) ** 2)

    x = make()[1][0]
    found = list(equations(jax.make_jaxpr(jax.grad(loss, argnums=1))(jnp.int32(0), x)))
    forward, _ = (equation for equation in found if equation.primitive.name == "cond")
    assert [out.aval.shape for out in forward.outvars] == [x.shape, shapes[0]]
    makers = {out: equation.primitive.name for equation in found for out in equation.outvars}
    leaving = [e for e in found if e.primitive.name == "name" and makers.get(e.invars[0]) == "select_n"]
    assert sorted(equation.params["name"] for equation in leaving) == ["inner", "result"]
    for index in range(2):
        expected = 18 * jnp.cos(jnp.sin(x)) * -jnp.sin(jnp.sin(x)) * jnp.cos(x)
        np.testing.assert_allclose(jax.grad(loss, argnums=1)(jnp.int32(index), x), expected, rtol=1e-5)


def test_things_that_are_alike_go_together():
    first, second = pair_up([["a", "b", "a"], ["b", "a", "c", "b"]])
    assert first == [("a", 0), ("b", 0), ("a", 1)]
    assert second == [("b", 0), ("a", 0), ("c", 0), ("b", 1)]
