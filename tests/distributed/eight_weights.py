"""Weights that are cut over eight devices decode to the same bits and multiply alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.jaxprs import equations
from vlmlora.distributed import make_mesh
from vlmlora.nn.low_rank import Factors, low_rank_products
from vlmlora.quantization.sharded import Layout, ShardedTable, matrix_spec, shard_weight
from vlmlora.quantization.stacks import stack_weights
from vlmlora.quantization.weights import DenseWeight, INT8Weight, MixedWeight, NF4Weight, Weight

MESH = make_mesh(data=2, fsdp=2, tensor=2)
RNG = np.random.default_rng(0)
X = (8, 3)

ALIGNED = (64, 128)
"""Blocks of 64 lie within a part, whichever way it is cut."""
STRADDLING = (48, 36)
"""Blocks straddle rows (36 is no multiple of 64), and a cut by columns leaves runs of 18."""
NESTED = (1024, 64)
"""Cut by rows, a part has two whole blocks of the doubly quantised scales: 16384 elements each."""
ODD = (6, 35)
"""The last block is short, and nothing divides among the devices."""


def make(kind: str, shape: tuple[int, int]) -> Weight:
    values = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    match kind:
        case "dense":
            return DenseWeight(values)
        case "int8":
            return INT8Weight.quantize(values)
        case "nf4" | "fp4":
            return NF4Weight.quantize(values, quant_type=kind)
    return NF4Weight.quantize(values, double_quant=False)


def put(weight: Weight, cut: str | None, *, gather_output: bool = False) -> Weight:
    layout = Layout(MESH, cut, matrix_spec(weight.shape, cut, MESH), gather_output)
    return shard_weight(jax.tree.map(np.asarray, weight), layout)


@jax.jit
def product_and_gradient(x, weight, dy):
    y, transpose = jax.vjp(lambda x: x @ weight, x)
    return y, *transpose(dy)


@pytest.mark.parametrize(
    ("kind", "shape", "cut", "blocksize"),
    [
        ("nf4", ALIGNED, "rows", 64),
        ("nf4", ALIGNED, "columns", 64),
        ("nf4", NESTED, "rows", 64),
        ("nf4", STRADDLING, "rows", 32),
        ("nf4", STRADDLING, "columns", 64),
        ("fp4", STRADDLING, "rows", 32),
        ("nf4_single", ALIGNED, "columns", 64),
        ("nf4", ODD, None, 64),
        ("int8", STRADDLING, "rows", None),
        ("int8", STRADDLING, "columns", None),
        ("dense", STRADDLING, "rows", None),
        ("dense", STRADDLING, "columns", None),
        ("dense", ODD, None, None),
    ],
)
def test_a_cut_weight_is_the_same_weight(kind, shape, cut, blocksize):
    weight = make(kind, shape)
    sharded = put(weight, cut)
    assert isinstance(sharded, Weight)
    assert (sharded.shape, sharded.stack) == (weight.shape, None)
    np.testing.assert_array_equal(sharded.dequantize("float32"), weight.dequantize("float32"))
    if blocksize is not None:
        assert sharded.parts.blocksize == blocksize
        assert sharded.parts.double_quant == (
            kind == "nf4" and (shape == NESTED or sharded.parts.shape == shape)
        )
    x, dy = (jnp.asarray(RNG.normal(size=(*X, n)), jnp.float32) for n in (shape[1], shape[0]))
    # Sums over `in`, of which the devices hold a part each, are in another order.
    for found, wanted in zip(
        product_and_gradient(x, sharded, dy), product_and_gradient(x, weight, dy), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_every_device_stores_its_part_alone():
    weight = make("nf4", NESTED)
    sharded = put(weight, "rows")
    held = [
        sum(a.addressable_shards[i].data.nbytes for a in jax.tree.leaves(sharded.parts)) for i in range(8)
    ]
    constant = 4 * 256 + 4  # The values behind the scales' codes, and their mean.
    assert held == [(weight.nbytes - constant) // 4 + constant] * 8


def test_fused_rows_are_gathered_again():
    weight = make("nf4", (96, 64))
    sharded = put(weight, "rows", gather_output=True)
    x, dy = (jnp.asarray(RNG.normal(size=(*X, n)), jnp.float32) for n in (64, 96))
    found = product_and_gradient(x, sharded, dy)
    for ours, wanted in zip(found, product_and_gradient(x, weight, dy), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_layers_stored_in_different_ways():
    """A scan slices a mixed stack; one that holds sharded pools multiplies under the switch."""
    layers = [make(kind, ALIGNED) for kind in ("nf4", "dense", "nf4")]
    stack = stack_weights(layers)
    sharded = put(stack, "columns")
    assert isinstance(sharded, MixedWeight)
    pools, per_layer = sharded.split_for_scan()
    x = jnp.asarray(RNG.normal(size=(*X, ALIGNED[1])), jnp.float32)

    @jax.jit
    def scan(x, pools):
        return jax.lax.scan(lambda _, one: (_, x @ MixedWeight.join(pools, one)), 0, per_layer)[1]

    for found, layer in zip(scan(x, pools), layers, strict=True):
        np.testing.assert_allclose(found, x @ layer, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sharded.dequantize("float32"), stack.dequantize("float32"))


def test_a_dense_weight_that_learns_gets_its_gradient_where_it_lies():
    weight = make("dense", STRADDLING)
    x = jnp.asarray(RNG.normal(size=(*X, STRADDLING[1])), jnp.float32)

    def loss(weight, x):
        return jnp.sum(jnp.cos(0.1 * (x @ weight)))

    wanted = jax.grad(loss)(weight, x)
    for cut in ("rows", "columns"):
        sharded = put(weight, cut)
        found = jax.jit(jax.grad(loss))(sharded, x)
        assert found.parts.value.sharding == sharded.parts.value.sharding
        np.testing.assert_allclose(found.parts.value, wanted.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 3])
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("nf4", "int8")])
def test_low_rank_products_join_those_of_whole_weights(kinds, rows):
    """Rows that divide among the devices, and rows that do not: then every device has all of them."""
    weights = [make(kind, shape) for kind, shape in zip(kinds, [(48, 36), (20, 36)], strict=True)]
    whole = [put(weight, None) for weight in weights]
    factors = [
        Factors(jnp.asarray(RNG.normal(size=(3, 36))), jnp.asarray(RNG.normal(size=(weight.shape[0], 3))))
        for weight in weights
    ]
    x = jnp.asarray(RNG.normal(size=(rows, 5, 36)), jnp.float32)

    @jax.jit
    def outputs_and_gradients(x, weights, factors):
        def loss(x, factors):
            outputs = low_rank_products(x, weights, factors, room=4)
            return sum(jnp.sum(y**2) / 2 for y in outputs), outputs

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, factors)

    found = outputs_and_gradients(x, whole, factors)
    wanted = outputs_and_gradients(x, weights, factors)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # float32 sums over rows and features in another order.
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_no_empty_array_enters_or_leaves_a_shard_map(kind):
    """XLA crashes on one (jax 0.11), as scans make of the constants of their bodies."""
    stack = stack_weights([make(kind, (16, 16))] * 2)
    whole = shard_weight(jax.tree.map(np.asarray, stack), Layout(MESH, None, P(None, None)))
    factors = Factors(jnp.ones((2, 3, 16)), jnp.ones((2, 16, 3)))

    def loss(factors, x):
        def layer(x, step):
            weight, each = step
            return low_rank_products(x, [weight], [each])[0], None

        return jnp.sum(jax.lax.scan(layer, x, (whole, factors))[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(factors, jnp.ones((8, 4, 16)))
    crossing = [
        atom.aval
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "shard_map"
        for atom in (*equation.invars, *equation.outvars)
    ]
    assert crossing
    assert all(aval.size for aval in crossing)


def test_rows_that_do_not_divide_are_computed_everywhere():
    weight = make("nf4", ALIGNED)
    sharded = put(weight, "columns")
    x = jnp.asarray(RNG.normal(size=(3, ALIGNED[1])), jnp.float32)
    np.testing.assert_allclose(x @ sharded, x @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 8), (9, 7)], ids=["cut", "whole"])
def test_an_embedding_looks_up_what_other_devices_hold(shape):
    table = RNG.normal(size=shape).astype(np.float32)
    sharded = ShardedTable.of(table, MESH)
    value = jax.device_put(table, jax.NamedSharding(MESH, sharded.layout.spec))
    for ids in (RNG.integers(0, shape[0], X), RNG.integers(0, shape[0], (3, 2))):
        found = jax.jit(lambda value, ids: ShardedTable.of(value, MESH).rows(ids))(value, jnp.asarray(ids))
        np.testing.assert_array_equal(found, table[ids])
    x = jnp.asarray(RNG.normal(size=(*X, shape[1])), jnp.float32)
    head = ShardedTable.of(value, MESH).as_weight()
    np.testing.assert_allclose(x @ head, x @ DenseWeight(jnp.asarray(table)), rtol=1e-5, atol=1e-5)


def test_wrong_uses_are_refused():
    stack = put(stack_weights([make("nf4", ALIGNED)] * 2), "rows")
    assert (stack.stack, stack.shape) == (2, ALIGNED)
    with pytest.raises(ValueError, match="stacks 2"):
        jnp.ones((4, ALIGNED[1])) @ stack
    with pytest.raises(ValueError, match="x has shape"):
        jnp.ones((4, 7)) @ stack.layer(1)
    with pytest.raises(IndexError, match="layer 2"):
        stack.layer(2)
    with pytest.raises(ValueError, match="layer axis"):
        stack.layer(0).layer(0)
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=1 does not fit 8 devices"):
        make_mesh(data=3, fsdp=1)
