"""The kernels on a Hopper GPU, with fresh random inputs, against XLA and float64."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmlora_kernels import (
    DYNAMIC_CODE,
    NestedAbsmax,
    dequantize_4bit,
    dequantize_int8,
    explain,
    matmul_4bit,
    matmul_int8,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _hopper():
    choice = explain(1, (512, 512))
    if choice.implementation != "fused":
        pytest.skip(str(choice))
    # What a kernel does not write is NaN.
    jax.block_until_ready(jnp.full((2**28,), jnp.nan)).delete()


@pytest.fixture
def key():
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return jax.random.key(seed)


def four_bit(key, shape, nested=True):
    one, two, three = jax.random.split(key, 3)
    blocks = -(-shape[0] * shape[1] // 64)
    codes = jax.random.bits(one, (shape[0] * shape[1] // 2,), jnp.uint8)
    if not nested:
        return codes, jax.random.uniform(two, (blocks,), minval=0.01)
    return codes, NestedAbsmax(
        jax.random.bits(two, (blocks,), jnp.uint8),
        jax.random.uniform(three, (-(-blocks // 256),), minval=0.001, maxval=0.01),
        jnp.asarray(DYNAMIC_CODE),
        jnp.float32(0.03),
    )


def relative_error(value, reference):
    value = np.asarray(value, np.float64)
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(3584, 3584), (1000, 3420), (77, 40)])
def test_decoding_equals_xla_bit_for_bit(key, shape, dtype, quant_type):
    weight = four_bit(key, shape, nested=shape[1] != 40)

    @jax.jit
    def differing(codes, absmax):
        ours, xla = (
            dequantize_4bit(
                codes, absmax, shape=shape, dtype=dtype, quant_type=quant_type, implementation=how
            )
            for how in ("decode", "xla")
        )
        # Zeros of either sign are equal.
        return jnp.sum(ours != xla)

    assert differing(*weight) == 0


@pytest.mark.parametrize("tokens", [1, 13, 64, 300])
@pytest.mark.parametrize("shape", [(3584, 3584), (515, 1088), (40, 3420)])
def test_products_forward_and_backward(key, shape, tokens):
    one, two, three = jax.random.split(key, 3)
    codes, absmax = four_bit(one, shape)
    x = jax.random.normal(two, (tokens, shape[1]), jnp.bfloat16)
    dy = jax.random.normal(three, (tokens, shape[0]), jnp.bfloat16)

    @jax.jit
    def both(x, dy):
        y, pullback = jax.vjp(lambda x: matmul_4bit(x, codes, absmax, shape=shape), x)
        return y, pullback(dy)[0]

    y, dx = both(x, dy)
    weight = dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.float32, implementation="xla")
    weight = np.asarray(weight, np.float64)
    # The weight's 16 values and the result are rounded to bfloat16.
    assert relative_error(y, np.asarray(x, np.float64) @ weight.T) < 4e-3
    assert relative_error(dx, np.asarray(dy, np.float64) @ weight) < 4e-3
    np.testing.assert_array_equal(y, both(x, dy)[0])


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_int8(key, tokens):
    one, two = jax.random.split(key)
    values = jax.random.randint(one, (515, 1088), -127, 128, jnp.int8)
    scale = jnp.linspace(0.1, 1, 515)
    x = jax.random.normal(two, (tokens, 1088), jnp.bfloat16)
    weight = np.asarray(dequantize_int8(values, scale, dtype=jnp.float32), np.float64)
    y = jax.jit(matmul_int8)(x, values, scale)
    assert relative_error(y, np.asarray(x, np.float64) @ weight.T) < 4e-3


def test_scan_checkpoint_and_vmap(key):
    shape, layers = (512, 512), 3
    one, two = jax.random.split(key)
    weights = [four_bit(k, shape) for k in jax.random.split(one, layers)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = jax.random.normal(two, (4, 512), jnp.bfloat16)

    def product(x, weight):
        return matmul_4bit(x, *weight, shape=shape) * jnp.bfloat16(0.1)

    scanned = jax.jit(lambda x: jax.lax.scan(jax.checkpoint(lambda x, w: (product(x, w), None)), x, stack)[0])
    expected = x
    for weight in weights:
        expected = product(expected, weight)
    np.testing.assert_array_equal(scanned(x), expected)
    assert jnp.isfinite(jax.jit(jax.grad(lambda x: scanned(x).sum().astype(jnp.float32)))(x)).all()
    batched = jax.jit(jax.vmap(product, (None, 0)))(x, stack)
    for i, weight in enumerate(weights):
        np.testing.assert_array_equal(batched[i], product(x, weight))
    xs = jnp.stack([x, -x])
    np.testing.assert_array_equal(jax.vmap(product, (0, None))(xs, weights[0])[1], -product(x, weights[0]))
