"""4-bit codes, scales and products against bitsandbytes on the CPU."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmlora_kernels import (
    CODE_BOOKS,
    DYNAMIC_CODE,
    NestedAbsmax,
    dequantize_4bit,
    double_dequantize,
    double_quantize,
    in_lines,
    matmul_4bit,
    quantize_4bit,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Whole blocks, blocks that straddle rows, a short last block, an odd number of elements.
SHAPES = [(8, 128), (4, 48), (6, 70), (5, 37)]

quantize = jax.jit(quantize_4bit, static_argnames=("quant_type", "blocksize"))
dequantize = jax.jit(dequantize_4bit, static_argnames=("shape", "dtype", "quant_type"))


def matrix(shape, dtype, seed=0):
    """The same random matrix for torch and for JAX, with rows of zeros at both ends."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.02
    values[0] = values[-1] = 0
    tensor = torch.from_numpy(values).to(DTYPES[dtype])
    return tensor, jnp.asarray(tensor.float().numpy()).astype(dtype)


def decoded_by_bitsandbytes(codes, state):
    """As one row: on a CPU with AVX-512, bitsandbytes 0.50 decodes blocks that straddle rows wrongly."""
    one_row = copy.copy(state)
    one_row.shape = torch.Size((1, state.shape.numel()))
    return bnb.dequantize_4bit(codes, one_row).reshape(state.shape)


def value_and_pullback(function, x, dy):
    def both(x, dy):
        y, pullback = jax.vjp(function, x)
        return y, pullback(dy)[0]

    return jax.jit(both)(x, dy)


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def test_code_books_are_those_of_bitsandbytes():
    for quant_type, book in CODE_BOOKS.items():
        np.testing.assert_array_equal(bits(book), bits(bnb.get_4bit_type(quant_type, "cpu").numpy()))
    np.testing.assert_array_equal(bits(DYNAMIC_CODE), bits(bnb.create_dynamic_map().numpy()))


CASES = [(shape, "float32", "nf4") for shape in SHAPES]
CASES += [((5, 37), dtype, quant_type) for dtype in DTYPES for quant_type in CODE_BOOKS]


@pytest.mark.parametrize(("shape", "dtype", "quant_type"), CASES)
def test_codes_and_scales_are_those_of_bitsandbytes(shape, dtype, quant_type):
    tensor, weight = matrix(shape, dtype)
    expected, state = bnb.quantize_4bit(tensor, quant_type=quant_type)
    codes, absmax = quantize(weight, quant_type=quant_type)
    np.testing.assert_array_equal(codes, expected.numpy()[:, 0])
    np.testing.assert_array_equal(bits(absmax), bits(state.absmax.numpy()))


@settings(max_examples=3, deadline=None)
@given(
    out=st.integers(1, 20),
    features=st.integers(1, 90),
    scale=st.sampled_from([1e-6, 0.02, 3e3]),
    seed=st.integers(0, 99),
)
def test_any_shape_quantises_as_bitsandbytes(out, features, scale, seed):
    values = np.random.default_rng(seed).standard_normal((out, features)).astype(np.float32) * np.float32(
        scale
    )
    expected, state = bnb.quantize_4bit(torch.from_numpy(values), quant_type="nf4")
    codes, absmax = quantize(jnp.asarray(values))
    np.testing.assert_array_equal(codes, expected.numpy()[:, 0])
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    decoded = dequantize(codes, absmax, shape=values.shape, dtype="float32")
    np.testing.assert_array_equal(decoded, decoded_by_bitsandbytes(expected, state).numpy())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_between_two_codes_fall_as_in_bitsandbytes(quant_type):
    book = np.sort(CODE_BOOKS[quant_type])
    middle = (book[:-1] + book[1:]) / np.float32(2)
    values = np.concatenate(
        [middle, np.nextafter(middle, np.float32(-2)), np.nextafter(middle, np.float32(2)), book]
    )
    values = np.concatenate([values, np.ones(64 - values.size % 64, np.float32)]).reshape(-1, 64)
    values[:, -1] = 1
    # XLA flushes subnormal numbers to zero.
    values[(values != 0) & (np.abs(values) < 1e-37)] = 1e-37
    expected, _ = bnb.quantize_4bit(torch.from_numpy(values), quant_type=quant_type)
    np.testing.assert_array_equal(
        quantize(jnp.asarray(values), quant_type=quant_type)[0], expected.numpy()[:, 0]
    )


@pytest.mark.parametrize("blocksize", [32, 128])
def test_other_block_sizes(blocksize):
    tensor, weight = matrix((6, 70), "bfloat16")
    expected, state = bnb.quantize_4bit(tensor, quant_type="nf4", blocksize=blocksize)
    codes, absmax = quantize(weight, blocksize=blocksize)
    np.testing.assert_array_equal(codes, expected.numpy()[:, 0])
    decoded = dequantize_4bit(codes, absmax, shape=(6, 70), dtype="bfloat16", blocksize=blocksize)
    np.testing.assert_array_equal(
        decoded.astype("float32"), decoded_by_bitsandbytes(expected, state).float().numpy()
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("shape", "dtype", "quant_type"), CASES)
def test_decoding_is_that_of_bitsandbytes_bit_for_bit(shape, dtype, quant_type, double_quant):
    tensor, _ = matrix(shape, dtype)
    packed, state = bnb.quantize_4bit(tensor, quant_type=quant_type, compress_statistics=double_quant)
    absmax = jnp.asarray(state.absmax.numpy())
    if double_quant:
        nested = [state.state2.absmax, state.state2.code, state.offset]
        absmax = NestedAbsmax(absmax, *(jnp.asarray(array.numpy()) for array in nested))
    decoded = dequantize(
        jnp.asarray(packed.numpy()[:, 0]), absmax, shape=shape, dtype=dtype, quant_type=quant_type
    )
    expected = decoded_by_bitsandbytes(packed, state).float().numpy()
    np.testing.assert_array_equal(decoded.astype("float32"), expected)


@pytest.mark.parametrize("blocks", [1, 256, 700, 40_000])
def test_doubly_quantised_scales_are_those_of_bitsandbytes(blocks):
    absmax = np.abs(np.random.default_rng(blocks).standard_normal(blocks).astype(np.float32)) * 0.01 + 0.02
    tensor = torch.from_numpy(absmax)
    offset = tensor.mean()
    codes, state = bnb.quantize_blockwise(tensor - offset, blocksize=256)
    found = jax.jit(double_quantize)(jnp.asarray(absmax), offset=jnp.asarray(offset.numpy()))
    np.testing.assert_array_equal(found.codes, codes.numpy())
    np.testing.assert_array_equal(bits(found.absmax), bits(state.absmax.numpy()))
    expected = bnb.dequantize_blockwise(codes, state)
    expected += offset
    np.testing.assert_array_equal(bits(jax.jit(double_dequantize)(found)), bits(expected.numpy()))

    # torch's order of summation differs between machines: the mean agrees to some units in the last place,
    # and a scale that lies on the edge between two codes may take either.
    own = jax.jit(double_quantize)(jnp.asarray(absmax))
    np.testing.assert_array_max_ulp(own.offset, offset.numpy(), maxulp=8)
    moved = np.asarray(own.codes, int) - codes.numpy()
    assert np.abs(moved).max() <= 1
    assert np.mean(moved != 0) <= 1e-3


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_product_and_gradient_are_those_of_the_decoded_matrix(batch, double_quant):
    shape = (24, 70)
    codes, absmax = quantize(matrix(shape, "float32")[1])
    absmax = double_quantize(absmax) if double_quant else absmax
    dense = dequantize(codes, absmax, shape=shape, dtype="float32")
    x = jax.random.normal(jax.random.key(0), (*batch, 70))
    dy = jax.random.normal(jax.random.key(1), (*batch, 24))
    y, dx = value_and_pullback(lambda x: matmul_4bit(x, codes, absmax, shape=shape), x, dy)
    # float32: two orders of summation of 70 products.
    np.testing.assert_allclose(y, x @ dense.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, dy @ dense, rtol=1e-5, atol=1e-6)


def test_product_has_the_type_of_x():
    codes, absmax = quantize(matrix((24, 70), "float32")[1])
    for dtype in DTYPES:
        x, dy = jnp.ones((2, 70), dtype), jnp.ones((2, 24), dtype)
        y, dx = value_and_pullback(lambda x: matmul_4bit(x, codes, absmax, shape=(24, 70)), x, dy)
        assert y.dtype == dx.dtype == x.dtype


def test_vmap_over_stacked_weights():
    weights = jnp.stack([matrix((6, 70), "float32", seed)[1] for seed in range(3)])
    codes, absmax = jax.jit(jax.vmap(quantize_4bit))(weights)
    x = jax.random.normal(jax.random.key(0), (3, 2, 70))
    multiply = jax.jit(jax.vmap(lambda x, c, a: matmul_4bit(x, c, a, shape=(6, 70))))
    for i, y in enumerate(multiply(x, codes, absmax)):
        expected = matmul_4bit(x[i], codes[i], absmax[i], shape=(6, 70))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_in_lines_are_the_same_scales(double_quant):
    def quantize_one(weight):
        codes, absmax = quantize_4bit(weight)
        return codes, double_quantize(absmax) if double_quant else absmax

    shape = (40, 1000)
    codes, absmax = jax.vmap(quantize_one)(
        jnp.stack([matrix(shape, "float32", seed)[1] for seed in range(3)])
    )
    aligned = in_lines(absmax)
    assert all(leaf[0].nbytes % 256 == 0 for leaf in jax.tree.leaves(aligned))
    x = jax.random.normal(jax.random.key(0), (2, 1000))
    for layer in range(3):
        plain, filled = (jax.tree.map(lambda leaf, n=layer: leaf[n], tree) for tree in (absmax, aligned))
        decode = functools.partial(dequantize_4bit, codes[layer], shape=shape, dtype="float32")
        np.testing.assert_array_equal(*(bits(decode(scales)) for scales in (plain, filled)))
        multiply = functools.partial(matmul_4bit, x, codes[layer], shape=shape)
        np.testing.assert_array_equal(multiply(plain), multiply(filled))
    with pytest.raises(ValueError, match="absmax"):
        dequantize_4bit(codes[0, :500], filled, shape=(1, 1000), dtype="float32")


def test_errors_name_what_does_not_fit():
    codes, absmax = quantize(matrix((6, 70), "float32")[1])
    with pytest.raises(
        ValueError, match=r"shape \(6, 80\) needs codes \[240\] and absmax \[8\].*found \[210\]"
    ):
        dequantize_4bit(codes, absmax, shape=(6, 80), dtype="float32")
    with pytest.raises(ValueError, match="quant_type='int4' is not supported; supported: nf4, fp4"):
        quantize_4bit(jnp.ones((2, 64)), quant_type="int4")
    with pytest.raises(ValueError, match="blocksize=63"):
        quantize_4bit(jnp.ones((2, 64)), blocksize=63)
