"""The kernels under JAX's transformations, run on the CPU by the emulator.

What is tested is the way from `matmul_4bit` and `matmul_int8` to a kernel: batching rules, the custom
gradient, the slices of a scan. The XLA form of the same function is the reference.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from tests.kernels import emulator
from tests.kernels.test_hopper import decoded, four_bit
from vlmlora_kernels import NestedAbsmax, matmul_4bit, matmul_int8, nf4, quantize_4bit, quantize_int8
from vlmlora_kernels.hopper.launch import Kernel

SHAPE = (24, 256)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Kernels run in the emulator; the names of those that ran."""
    names = []

    def call(kernel, *inputs):
        def run(*arrays):
            names.append(kernel.name)
            return emulator.run(kernel, *[np.asarray(array) for array in arrays])

        result = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
        return jax.pure_callback(run, result, *inputs, vmap_method="sequential")

    monkeypatch.setattr(Kernel, "launch", call)
    # A traced kernel is known again, with the list of the test that it was traced in.
    nf4._dequantize.clear_cache()
    yield names
    nf4._dequantize.clear_cache()


def weight(seed, kind):
    """A quantised matrix of SHAPE."""
    dense = jax.random.normal(jax.random.key(seed), SHAPE) * 0.02
    return quantize_int8(dense) if kind == "int8" else quantize_4bit(dense)


def product(x, weight, kind, how):
    if kind == "int8":
        return matmul_int8(x, *weight, implementation=how)
    return matmul_4bit(x, *weight, shape=SHAPE, implementation=how)


def tokens(seed, *batch):
    return jax.random.normal(jax.random.key(seed), (*batch, SHAPE[1]), jnp.bfloat16)


def assert_close(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    # Both round the result to bfloat16; the XLA form rounds W as well.
    assert np.linalg.norm(found - expected) <= 5e-3 * np.linalg.norm(expected)


CASES = [("nf4", "fused"), ("nf4", "decode"), ("int8", "fused")]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_jit_and_grad(kind, how, launched):
    x, w = tokens(1, 2, 3), weight(0, kind)
    dy = jax.random.normal(jax.random.key(2), (2, 3, SHAPE[0]), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def both(how, x):
        y, pullback = jax.vjp(lambda x: product(x, w, kind, how), x)
        return y, pullback(dy)[0]

    for found, expected in zip(both(how, x), both("xla", x), strict=True):
        assert found.dtype == jnp.bfloat16
        assert_close(found, expected)
    assert launched, "a kernel"


@pytest.mark.parametrize("is_remat", [False, True])
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_scan_over_stacked_weights(kind, how, is_remat, launched):
    layers = [weight(seed, kind) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = tokens(1, 4)

    def layer(how, x, w):
        y = product(x, w, kind, how)
        return x + jnp.pad(y, ((0, 0), (0, SHAPE[1] - SHAPE[0]))), None

    def scanned(x, how):
        body = functools.partial(layer, how)
        body = jax.checkpoint(body, prevent_cse=False) if is_remat else body
        return jax.lax.scan(body, x, stack)[0].astype(jnp.float32).sum()

    value, grad = jax.jit(jax.value_and_grad(scanned), static_argnums=1)(x, how)
    assert len(launched) >= len(layers)
    expected, expected_grad = jax.jit(jax.value_and_grad(scanned), static_argnums=1)(x, "xla")
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    assert_close(grad, expected_grad)
    one_by_one = x
    for w in layers:
        one_by_one = layer(how, one_by_one, w)[0]
    np.testing.assert_allclose(value, one_by_one.astype(jnp.float32).sum(), rtol=1e-5)


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_vmap_over_tokens_and_over_weights(kind, how, launched):
    layers = [weight(seed, kind) for seed in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    xs = tokens(1, 2, 3)
    run = functools.partial(product, kind=kind, how=how)
    for found, x in zip(jax.vmap(run, (0, None))(xs, layers[0]), xs, strict=True):
        np.testing.assert_array_equal(found, run(x, layers[0]))
    launched.clear()
    for found, x, w in zip(jax.vmap(run)(xs, stack), xs, layers, strict=True):
        np.testing.assert_array_equal(found, run(x, w))
    assert len(launched) == 4, "one for each weight, and each of the two beside it"
    outer = jax.vmap(jax.grad(lambda x, w: run(x, w).astype(jnp.float32).sum()))(xs, stack)
    assert outer.shape == xs.shape


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_shard_map(kind, how, launched):
    w = weight(0, kind)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = tokens(1, 2 * jax.device_count())
    spec, replicated = PartitionSpec("data"), PartitionSpec()

    dy = jax.random.normal(jax.random.key(2), (len(x), SHAPE[0]), jnp.bfloat16)

    def shard(how):
        run = functools.partial(product, kind=kind, how=how)
        sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec, replicated), out_specs=spec)

        def both(x, dy):
            y, pullback = jax.vjp(lambda x: sharded(x, w), x)
            return y, pullback(dy)[0]

        return jax.jit(both)(x, dy)

    for found, expected in zip(shard(how), shard("xla"), strict=True):
        assert_close(found, expected)
    assert launched


@settings(max_examples=5, deadline=None)
@given(
    out=st.integers(1, 40),
    pieces=st.integers(4, 12),
    batch=st.lists(st.integers(1, 5), max_size=2),
    kind=st.sampled_from(["nf4", "nested", "int8"]),
)
def test_any_shape_through_the_public_function(out, pieces, batch, kind):
    shape = (out, 64 * pieces)
    rng = np.random.default_rng(out)
    x = rng.standard_normal((*batch, shape[1])).astype(jnp.bfloat16)
    if kind == "int8":
        values, scale = rng.integers(-127, 128, shape, np.int8), rng.uniform(0.1, 1, out).astype(np.float32)
        dense = values * scale[:, None] / 127
        found = matmul_int8(*map(jnp.asarray, (x, values, scale)), implementation="fused")
    else:
        codes, scales, absmax = four_bit(out * shape[1], kind == "nested", seed=out)
        dense = decoded(codes, absmax, out * shape[1], "nf4").reshape(shape)
        scales = [jnp.asarray(array) for array in scales]
        absmax = NestedAbsmax(*scales) if kind == "nested" else scales[0]
        arrays = jnp.asarray(x), jnp.asarray(codes), absmax
        found = matmul_4bit(*arrays, shape=shape, implementation="fused")
    x, dense = x.astype(np.float64), dense.astype(np.float64)
    # Roundings of 2**-9 at most, in W and in the result, each relative to the terms of a sum.
    bound = 2**-7 * np.linalg.norm(np.sqrt(x**2 @ (dense**2).T))
    assert found.shape == (*batch, out)
    assert np.linalg.norm(np.asarray(found, np.float64) - x @ dense.T) <= bound
