"""Weights under the transformations that models use: jit, grad, vmap, a scan over layers, checkpointing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jaxprs import output_shapes
from vlmlora.quantization import stacks
from vlmlora.quantization.stacks import allocate, set_layer, stack_weights
from vlmlora.quantization.weights import DenseWeight, INT8Weight, MixedWeight, NF4Weight, Weight

LAYERS, OUT, IN = 4, 48, 70
KINDS = ["dense", "nf4", "fp4", "nf4_single", "int8"]


@functools.cache
def make(kind, seed=0):
    values = jax.random.normal(jax.random.key(seed), (OUT, IN)) * 0.1
    match kind:
        case "dense":
            return DenseWeight(values)
        case "int8":
            return INT8Weight.quantize(values)
        case "nf4" | "fp4":
            return NF4Weight.quantize(values, quant_type=kind)
        case "nf4_single":
            return NF4Weight.quantize(values, double_quant=False)


def mixed_layers():
    return [make(kind, seed) for seed, kind in enumerate(["nf4", "dense", "nf4", "int8"])]


@pytest.mark.parametrize("kind", KINDS)
def test_protocol(kind):
    weight = make(kind)
    stack = stack_weights([make(kind, seed) for seed in range(LAYERS)])
    assert isinstance(weight, Weight)
    assert (weight.shape, weight.stack, stack.shape, stack.stack) == ((OUT, IN), None, (OUT, IN), LAYERS)
    assert stack.nbytes == LAYERS * weight.nbytes
    assert stack.dequantize("bfloat16").shape == (LAYERS, OUT, IN)
    np.testing.assert_array_equal(stack.layer(2).dequantize("float32"), make(kind, 2).dequantize("float32"))


@pytest.mark.parametrize("kind", KINDS)
def test_abstract_describes_what_quantize_makes(kind):
    match kind:
        case "dense":
            abstract = DenseWeight.abstract(OUT, IN, "float32", LAYERS)
        case "int8":
            abstract = INT8Weight.abstract(OUT, IN, LAYERS)
        case _:
            abstract = NF4Weight.abstract(
                OUT, IN, LAYERS, double_quant=kind != "nf4_single", quant_type=kind[:3], dtype="float32"
            )
    stack = stack_weights([make(kind, seed) for seed in range(LAYERS)])
    assert jax.tree.structure(abstract) == jax.tree.structure(stack)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(abstract)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(stack)
    ]
    assert abstract.nbytes == stack.nbytes


def test_four_bits_and_an_eighth():
    weight = NF4Weight.abstract(1024, 1024)
    # 4 bits a code, 8 bits a block of 64; the code book of 1 KiB counts little.
    assert weight.nbytes * 8 / 1024**2 == pytest.approx(4.127, abs=0.02)


def test_a_stack_quantises_as_its_layers_do():
    values = jax.random.normal(jax.random.key(0), (LAYERS, OUT, IN))
    for cls in (NF4Weight, INT8Weight):
        stack = cls.quantize(values)
        for i in range(LAYERS):
            for found, expected in zip(
                jax.tree.leaves(stack.layer(i)), jax.tree.leaves(cls.quantize(values[i])), strict=True
            ):
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_on_the_left(kind):
    x = np.ones((2, IN), np.float32)
    weight = make(kind)
    np.testing.assert_allclose(
        jnp.asarray(x) @ weight, x @ np.asarray(weight.dequantize("float32")).T, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(Exception, match=r"x @ weight|Array"):
        x[:, :-1] @ weight


def test_dense_gradient_reaches_the_weight():
    x, dy = jnp.ones((2, IN)), jnp.ones((2, OUT))
    weight = make("dense")
    gradient = jax.grad(lambda weight: jnp.sum((x @ weight) * dy))(weight)
    np.testing.assert_allclose(gradient.value, dy.T @ x)


def scan(weight, x, remat):
    """A chain of layers as a model runs it: square, so IN columns of every output are fed back."""
    pools, per_layer = weight.split_for_scan() if isinstance(weight, MixedWeight) else (None, weight)

    def body(x, layer):
        layer = layer if pools is None else MixedWeight.join(pools, layer)
        return x + jnp.pad(jnp.tanh(x @ layer), ((0, 0), (0, IN - OUT))), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, per_layer)[0].sum()


def loop(layers, x):
    for layer in layers:
        x = x + jnp.pad(jnp.tanh(x @ layer.dequantize("float32").T), ((0, 0), (0, IN - OUT)))
    return x.sum()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_scan_over_layers(kind, remat):
    layers = mixed_layers() if kind == "mixed" else [make(kind, seed) for seed in range(LAYERS)]
    stack = stack_weights(layers)
    assert isinstance(stack, MixedWeight) == (kind == "mixed")
    x = jax.random.normal(jax.random.key(9), (3, IN))
    value, gradient = jax.jit(jax.value_and_grad(scan, argnums=1), static_argnums=2)(stack, x, remat)
    expected, expected_gradient = jax.jit(jax.value_and_grad(loop, argnums=1))(layers, x)
    # float32 through four layers, in another order of summation.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "nf4_single", "int8", "mixed"])
def test_no_copy_of_the_weights_is_saved_for_the_backward_pass(kind, remat):
    """Neither decoded matrices nor the codes are among what the scans put out."""
    layers = mixed_layers() if kind == "mixed" else [make(kind, seed) for seed in range(LAYERS)]
    stack = stack_weights(layers)
    x = jnp.ones((3, IN))
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: scan(stack, x, remat)))(x)
    per_layer = {shape for shape in output_shapes(jaxpr) if shape[:1] == (LAYERS,)}
    assert per_layer, "the scan saves something for each layer"
    assert max(np.prod(shape) for shape in per_layer) <= LAYERS * 3 * IN


def test_mixed_stack_of_one_layer_traced_or_not():
    layers = mixed_layers()
    stack = stack_weights(layers)
    assert [type(stack.layer(i)) for i in range(LAYERS)] == [type(layer) for layer in layers]
    np.testing.assert_array_equal(
        stack.dequantize("float32"), jnp.stack([layer.dequantize("float32") for layer in layers])
    )
    x = jax.random.normal(jax.random.key(0), (2, IN))
    multiply = jax.jit(lambda x, stack, i: x @ MixedWeight.layer(stack, i))
    for i, layer in enumerate(layers):
        np.testing.assert_allclose(multiply(x, stack, i), x @ layer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_filling_a_stack_layer_by_layer(kind):
    layers = mixed_layers() if kind == "mixed" else [make(kind, seed) for seed in range(LAYERS)]
    abstract = stack_weights([jax.eval_shape(lambda layer=layer: layer) for layer in layers])
    stack = allocate(abstract)
    for i, layer in enumerate(layers):
        stack = set_layer(stack, i, jax.tree.map(np.asarray, layer))
    for found, expected in zip(jax.tree.leaves(stack), jax.tree.leaves(stack_weights(layers)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_filling_compiles_once_and_donates():
    stack = allocate(NF4Weight.abstract(OUT, IN, LAYERS, dtype="float32"))
    before = stack.codes
    layer = make("nf4")
    stack = set_layer(stack, 0, layer)
    assert before.is_deleted()
    compiled = stacks._set_layer._cache_size()
    set_layer(stack, 3, layer)
    assert stacks._set_layer._cache_size() == compiled


def test_vmap_over_layers():
    stack = stack_weights([make("nf4", seed) for seed in range(LAYERS)])
    x = jax.random.normal(jax.random.key(0), (2, IN))
    y = jax.vmap(lambda weight: x @ weight)(stack)
    np.testing.assert_allclose(y[1], x @ stack.layer(1), rtol=1e-5, atol=1e-6)


def test_errors_say_what_to_do():
    stack = stack_weights([make("nf4", seed) for seed in range(LAYERS)])
    with pytest.raises(ValueError, match=r"stacks 4; slice it with \.layer\(i\)"):
        jnp.ones((2, IN)) @ stack
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), the weight has shape \(48, 70\)"):
        jnp.ones((2, 3)) @ make("nf4")
    with pytest.raises(IndexError, match="layer 4 of a weight with 4 layers"):
        stack.layer(4)
    with pytest.raises(ValueError, match="needs a weight with a layer axis"):
        make("nf4").layer(0)
    with pytest.raises(ValueError, match=r"stored as .*stack_weights"):
        set_layer(stack, 0, make("int8"))
    with pytest.raises(ValueError, match="one shape"):
        stack_weights([make("nf4"), DenseWeight(jnp.ones((2, 2)))])
