"""The scan that computes saved values where they are kept, against `jax.lax.scan`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tests.jaxprs import equations
from vlmlora.distributed import make_mesh
from vlmlora.nn import stack
from vlmlora.nn.linear import Linear
from vlmlora.nn.saved import name_for_policies, stacks_as_outputs
from vlmlora.nn.scan_in_place import scan_in_place
from vlmlora.nn.stack import scan_layers
from vlmlora.quantization.sharded import Layout, ShardedWeight
from vlmlora.quantization.weights import DenseWeight
from vlmlora.training import remat
from vlmlora.training.remat import remat_policy

STEPS, ROWS, WIDTH = 5, 3, 8
VALUE = 2 * WIDTH * 4  # bytes of a float32 value of two rows
SAVED = ("wide", "copied")


def make(seed=0, steps=STEPS):
    """Parameters of every step, what no gradient flows to, x, and a factor that all steps share."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (steps, WIDTH, WIDTH), "v": (steps, WIDTH, WIDTH), "b": (steps, WIDTH)}
    trained = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    frozen = {
        "m": jnp.asarray(rng.normal(size=(steps, WIDTH)), jnp.float32),
        "shift": jnp.asarray(rng.integers(0, WIDTH, steps), jnp.int32),
        "key": jax.random.split(jax.random.key(seed), steps),
    }
    x, shared = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((ROWS, WIDTH), (WIDTH,)))
    return trained, frozen, x, shared


def make_loss(scan, remat, frozen, *, uses=("x", "y")):
    """A loss of the last x, of what the steps put out, or of both."""
    mask = jnp.arange(WIDTH) % 2

    def loss(trained, x, shared):
        def body(x, step):
            parameters, fixed = step
            wide = checkpoint_name(x @ parameters["w"] / WIDTH + parameters["b"], "wide")
            kept = jax.random.bernoulli(fixed["key"], 0.8, wide.shape)
            turned = jnp.where(kept, jnp.roll(jnp.sin(wide) * fixed["m"], fixed["shift"], axis=-1), 0)
            copied = checkpoint_name(turned @ parameters["v"], "copied") * shared
            x = x + jnp.tanh(copied) * wide + mask
            return x, {"sum": copied.sum(), "count": (copied > 0).sum(), "none": None}

        x, y = scan(remat(body), x, (trained, frozen))
        parts = {
            "x": lambda: jnp.sum(x * jnp.cos(x)),
            "y": lambda: y["sum"] @ jnp.arange(1.0, 1 + len(y["sum"])),
        }
        return sum(parts[name]() for name in uses), y

    return loss


def scanning(**options):
    """The scan in the form of `jax.lax.scan`."""
    return lambda *args: scan_in_place(*args, **options)[:2]


def keeping(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)


@pytest.mark.parametrize(
    ("in_place", "uses", "argnums"),
    [
        ((), ("x", "y"), (0, 1, 2)),
        (("wide",), ("x", "y"), (0, 1, 2)),
        (SAVED, ("x", "y"), (0, 1, 2)),
        (SAVED, ("x",), (0,)),
        (SAVED, ("y",), (0, 1, 2)),
        (SAVED, ("x", "y"), (1,)),
        (SAVED, ("x", "y"), (2,)),
    ],
    ids=str,
)
def test_value_outputs_and_gradients_are_those_of_a_scan(in_place, uses, argnums):
    trained, frozen, x, shared = make()
    scan = scanning(in_place=frozenset(in_place))
    found, expected = (
        jax.jit(jax.value_and_grad(loss, argnums=argnums, has_aux=True))(trained, x, shared)
        for loss in (
            make_loss(scan, keeping(*SAVED), frozen, uses=uses),
            make_loss(jax.lax.scan, lambda body: body, frozen, uses=uses),
        )
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected[1]))
    # The same float32 sums, which XLA may take in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("steps", "in_place", "on_host"),
    [
        (5, (), ("copied",)),
        (5, ("wide",), ("copied", "x")),
        (5, (), ("x",)),
        (4, ("wide",), ("copied",)),
        (4, (), ("copied", "x")),
        (1, (), ("copied", "x")),
    ],
)
def test_through_host_memory_and_back(steps, in_place, on_host):
    trained, frozen, x, shared = make(steps=steps)
    scan = scanning(in_place=frozenset(in_place), on_host=frozenset(on_host), name_of_x="x")
    loss = make_loss(scan, keeping(*SAVED), frozen)
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    plain = make_loss(jax.lax.scan, lambda body: body, frozen)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2), has_aux=True))(trained, x, shared)
    found = jax.jit(gradient)(trained, x, shared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    moved = [
        ("host" if "<host>" in str(equation.outvars[0].aval) else "device", equation.outvars[0].aval.ndim)
        for equation in equations(jax.make_jaxpr(gradient)(trained, x, shared))
        if equation.primitive.name == "device_put"
    ]
    # Of each the room for all steps, and what the two steps in a loop's body send and fetch. A step before
    # the loop sends nothing; what one behind it fetches nobody reads.
    of_each = [("host", 3)] + [("host", 2), ("device", 2)] * 2 + [("device", 2)] * (steps % 2)
    assert sorted(moved) == sorted(of_each * len(on_host))


@pytest.mark.parametrize(
    ("keep", "uses", "on_host"),
    [
        ((0,), ("kept",), ()),
        ((1, 3), ("x", "kept"), ("x",)),
        ((0, STEPS - 1), ("x", "kept"), ()),
        ((0, STEPS - 1), ("x",), ("x",)),
    ],
    ids=str,
)
def test_carries_of_some_steps_are_returned_with_gradients(keep, uses, on_host):
    trained, _, x, _ = make()
    options = {"in_place": frozenset({"wide"}), "on_host": frozenset(on_host), "name_of_x": "x", "keep": keep}

    def loss(scan, trained, x):
        def body(x, step):
            wide = checkpoint_name(x @ step["w"] / WIDTH, "wide")
            return jnp.tanh(wide) + x, None

        x, kept = scan(body, x, trained)
        parts = {"x": lambda: jnp.sum(x * jnp.cos(x)), "kept": lambda: jnp.sum(jnp.sin(kept) * kept[:1])}
        return sum(parts[name]() for name in uses), (x, kept)

    def ours(body, x, steps):
        x, _, kept = scan_in_place(keeping("wide")(body), x, steps, **options)
        return x, kept

    def plain(body, x, steps):
        x, every = jax.lax.scan(lambda x, step: (body(x, step)[0],) * 2, x, steps)
        return x, every[np.array(keep)]

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, scan), argnums=(0, 1), has_aux=True))(trained, x)
        for scan in (ours, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    np.testing.assert_allclose(loss(ours, trained, x)[0], expected[0][0], rtol=1e-5)


def test_what_leaves_is_sent_by_the_next_step():
    """All of which it has for that; the last step's stays where it is."""
    trained, frozen, x, shared = make()
    scan = scanning(on_host=frozenset({"copied"}))
    loss = make_loss(scan, keeping("copied"), frozen)
    forward, backward = (
        equation
        for equation in equations(jax.make_jaxpr(jax.grad(loss, has_aux=True))(trained, x, shared))
        if equation.primitive.name == "while"
        and any(e.primitive.name == "device_put" for e in equations(equation.params["body_jaxpr"]))
    )
    body = forward.params["body_jaxpr"].jaxpr
    first, second = (equation for equation in body.eqns if "jaxpr" in equation.params)
    step = first.params["jaxpr"].jaxpr
    makers = {out: equation for equation in step.eqns for out in equation.outvars}
    (sent,) = [e.invars[0] for e in step.eqns if e.primitive.name == "device_put"]
    barrier = makers[sent]
    assert barrier.primitive.name == "optimization_barrier"
    given = barrier.invars[barrier.outvars.index(sent)]
    place = first.outvars.index(second.invars[step.invars.index(given)])
    barrier = makers[step.outvars[place]]
    assert barrier.primitive.name == "optimization_barrier"
    following = barrier.outvars[0]
    used = [e for e in step.eqns if following in e.invars]
    assert any(e.primitive.name in ("broadcast_in_dim", "dynamic_update_slice") for e in used), "the next x"
    last = forward.outvars[body.outvars.index(second.outvars[place])]
    assert last in backward.invars


@pytest.mark.parametrize(
    ("in_place", "on_host", "expected"), [((), ("x",), 2), (SAVED, ("x",), 0), ((), (), 0)]
)
def test_beside_copies_to_the_host_what_stays_is_computed_into_its_stack(in_place, on_host, expected):
    """Not where a product itself computes it there, nor where nothing goes to the host."""
    trained, frozen, x, shared = make(steps=4)
    scan = scanning(in_place=frozenset(in_place), on_host=frozenset(on_host), name_of_x="x")
    gradient = jax.grad(make_loss(scan, keeping(*SAVED), frozen), has_aux=True)
    forward = next(
        equation
        for equation in equations(jax.make_jaxpr(gradient)(trained, x, shared))
        if equation.primitive.name == "while"
    )
    inside = list(equations(forward.params["body_jaxpr"]))
    makers = {out: equation for equation in inside for out in equation.outvars}
    computed = 0
    for update in (e for e in inside if e.primitive.name == "dynamic_update_slice"):
        lifted = makers[update.invars[1]]
        maker = makers.get(lifted.invars[0])
        computed += maker is not None and maker.primitive.name == "select_n"
    steps = 2 if on_host else 1
    assert computed == steps * expected


def test_without_a_gradient_it_is_a_scan():
    trained, frozen, x, shared = make()
    scan = scanning(in_place=frozenset(SAVED))
    found, _ = make_loss(scan, keeping(*SAVED), frozen)(trained, x, shared)
    expected, _ = make_loss(jax.lax.scan, lambda body: body, frozen)(trained, x, shared)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_it_can_be_mapped_and_run_within_another_scan():
    """As over micro-batches, whose gradients are added up."""
    trained, frozen, x, shared = make()
    scans = (scanning(in_place=frozenset(SAVED)), keeping(*SAVED))
    losses = [make_loss(*each, frozen) for each in (scans, (jax.lax.scan, lambda body: body))]
    xs = jnp.stack([x, 2 * x, -x])

    def summed(loss):
        def add(total, x):
            gradients = jax.grad(loss, argnums=(0, 2), has_aux=True)(trained, x, shared)[0]
            return jax.tree.map(jnp.add, total, gradients), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (trained, shared)), xs)[0]

    def mapped(loss):
        return jax.vmap(jax.grad(lambda x: loss(trained, x, shared)[0]))(xs)

    for way in (summed, mapped):
        found, expected = (jax.jit(functools.partial(way, loss))() for loss in losses)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)


def test_saved_values_are_written_once_into_memory_that_was_not_filled():
    """Of what is saved only the stacks themselves are as large as a stack; no product runs again."""
    trained, frozen, x, shared = make()
    scan = scanning(in_place=frozenset(SAVED))
    loss = make_loss(scan, keeping(*SAVED), frozen)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(trained, x, shared)
    of_stacks = [
        equation.primitive.name
        for equation in equations(jaxpr)
        for out in equation.outvars
        if out.aval.shape in {(STEPS, ROWS, WIDTH), (STEPS + 1, ROWS, WIDTH)}
    ]
    loops = of_stacks.count("while")
    assert loops == 1 + len(SAVED)
    assert of_stacks.count("empty") == of_stacks.count("optimization_barrier") + 1 == 1 + len(SAVED)
    # What enters the first step, and within the loop one for each stack.
    assert of_stacks.count("dynamic_update_slice") == 1 + loops
    assert set(of_stacks) == {"while", "empty", "optimization_barrier", "dynamic_update_slice"}
    # Two forward, and of each two backward.
    dots = [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]
    assert sum(equation.outvars[0].aval.ndim == 2 for equation in dots) == 2 + 4


def test_layers_use_it_on_one_device_for_what_can_be_kept_there(monkeypatch):
    """Not where a policy keeps nothing or what it has no use for, and not for layers on a mesh."""
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    used = []

    def scan(body, x, steps, *, in_place, on_host, **_):
        used.append((in_place, on_host))
        return x, None, None

    monkeypatch.setattr(stack, "scan_in_place", scan)

    def uses(policy, layers):
        used.clear()
        scan_layers(layers, jnp.ones((2, WIDTH)), lambda layer, x, _, *, key: (x, None), remat=policy)
        return used == [(policy.in_place, policy.on_host)]

    layers = Layers()
    assert uses(remat_policy("mlp"), layers)
    assert uses(remat_policy({"attention_residual": "save"}), layers)
    assert uses(remat_policy("unsloth"), layers)
    assert uses(remat_policy({"layer_input": "offload", "mlp_up": "save"}), layers)
    assert uses(remat_policy({"layer_input": "offload", "qkv": "offload"}), layers)
    for policy in (True, {"qkv": "save"}):
        assert not uses(remat_policy(policy), layers)
    with stacks_as_outputs():
        assert not uses(remat_policy("mlp"), layers)
    mesh = make_mesh(devices=jax.devices()[:1])
    layout = Layout(mesh, None, jax.sharding.PartitionSpec())
    weight = layers.linear.weight.get_value()
    layers.linear.weight.set_value(ShardedWeight(weight, weight.shape, layout))
    assert not uses(remat_policy("mlp"), layers)


@pytest.mark.parametrize(
    ("flops_per_byte", "host_limit", "differs", "expected"),
    [
        (5, None, False, {"layer_input"}),
        (2, None, False, {"layer_input", "attention_output"}),
        (2, STEPS * VALUE, False, {"layer_input"}),
        (1, None, False, {"layer_input", "attention_output", "attention_residual", "qkv"}),
        (1, STEPS * 3 * VALUE, False, {"layer_input", "attention_output", "attention_residual"}),
        (1, None, True, {"layer_input"}),
    ],
)
def test_as_much_goes_to_the_host_as_leaves_while_a_layer_runs(
    flops_per_byte, host_limit, differs, expected, monkeypatch
):
    """The most worthwhile first, nothing of layers that differ, with the gradient of a plain scan."""
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    monkeypatch.setattr(remat, "_spare_host_bytes", lambda: host_limit)
    monkeypatch.setattr(stack, "HOST_FLOPS_PER_BYTE", flops_per_byte)
    layers, x = Layers(), jnp.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
    weights = jax.random.normal(jax.random.key(0), (STEPS, WIDTH, WIDTH))
    layers.linear.weight.set_value(DenseWeight(weights))

    def call(layer, x, _, *, key):
        def other(x):
            return name_for_policies(jnp.cos(x), "mlp_up") if differs else jnp.cos(x)

        qkv = name_for_policies(layer.linear(x), "qkv")
        attended = name_for_policies(jnp.sin(qkv), "attention_output")
        x = name_for_policies(x + attended**2, "attention_residual")
        return jax.lax.cond(x[0, 0] > 0, other, jnp.sin, x), None

    def gradient(policy, layers):
        return jax.grad(lambda x: jnp.sum(scan_layers(layers, x, call, remat=policy)[0] ** 2))

    spare = dict.fromkeys(("mlp_up", "qkv", "attention_residual", "attention_output"), "offload_or_recompute")
    policy = remat_policy({"layer_input": "offload"} | spare)
    assert stack._with_what_leaves(layers, x, call, None, STEPS, None, policy).on_host == expected
    jaxpr = jax.make_jaxpr(gradient(policy, layers))(x)
    moved = [e for e in equations(jaxpr) if e.primitive.name == "device_put"]
    # By the two steps in the loop's body, and by the one behind it.
    assert sum("<host>" not in str(e.outvars[0].aval) for e in moved) == 3 * len(expected)
    # The same float32 operations.
    np.testing.assert_allclose(
        jax.jit(gradient(policy, layers))(x), gradient(remat_policy(True), layers)(x), rtol=1e-5, atol=1e-6
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    layout = Layout(mesh, None, jax.sharding.PartitionSpec())
    weight = layers.linear.weight.get_value()
    layers.linear.weight.set_value(ShardedWeight(weight, weight.shape, layout))
    assert stack._with_what_leaves(layers, x, call, None, STEPS, None, policy) is policy


class Layers(nnx.Module):
    """Linear layers of zeros."""

    def __init__(self):
        self.stack = STEPS
        self.linear = Linear(WIDTH, WIDTH, dtype=jnp.float32, stack=STEPS)
        self.linear.weight.set_value(DenseWeight(jnp.zeros((STEPS, WIDTH, WIDTH))))
        self.linear.bias.set_value(jnp.zeros((STEPS, WIDTH)))
