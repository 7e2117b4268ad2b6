"""Row-wise int8 against bitsandbytes on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from vlmlora_kernels import dequantize_int8, matmul_int8, quantize_int8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def value_and_pullback(function, x, dy):
    def both(x, dy):
        y, pullback = jax.vjp(function, x)
        return y, pullback(dy)[0]

    return jax.jit(both)(x, dy)


def matrix(shape=(64, 70)):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_scales_and_decoding_are_those_of_bitsandbytes(dtype):
    tensor = torch.from_numpy(matrix((200, 70))).to(DTYPES[dtype])
    codes, scale, _ = bnb.int8_vectorwise_quant(tensor.half())
    weight = jnp.asarray(tensor.float().numpy()).astype(dtype)
    found, found_scale = jax.jit(quantize_int8)(weight)
    np.testing.assert_array_equal(found, codes.numpy())
    np.testing.assert_array_equal(found_scale, scale.numpy())
    decoded = jax.jit(dequantize_int8, static_argnames="dtype")(found, found_scale, dtype="float32")
    np.testing.assert_array_equal(decoded, bnb.int8_vectorwise_dequant(codes, scale).numpy())


def test_a_row_of_zeros_stays_zero():
    codes, scale = quantize_int8(jnp.zeros((2, 8)))
    assert not np.any(codes)
    assert not np.any(dequantize_int8(codes, scale, dtype="float32"))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_product_and_gradient_are_those_of_the_decoded_matrix(batch):
    codes, scale = quantize_int8(jnp.asarray(matrix()))
    dense = dequantize_int8(codes, scale, dtype="float32")
    x = jax.random.normal(jax.random.key(0), (*batch, 70))
    dy = jax.random.normal(jax.random.key(1), (*batch, 64))
    y, dx = value_and_pullback(lambda x: matmul_int8(x, codes, scale), x, dy)
    # float32: scaled before or after the sum of 70 products.
    np.testing.assert_allclose(y, x @ dense.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, dy @ dense, rtol=1e-5, atol=1e-6)


def test_product_has_the_type_of_x():
    codes, scale = quantize_int8(jnp.asarray(matrix()))
    for dtype in DTYPES:
        x, dy = jnp.ones((2, 70), dtype), jnp.ones((2, 64), dtype)
        y, dx = value_and_pullback(lambda x: matmul_int8(x, codes, scale), x, dy)
        assert y.dtype == dx.dtype == x.dtype
