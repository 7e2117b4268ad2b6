"""A decoded matrix with others around it: the kernel's threads, and the same from XLA."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import emulator
from tests.kernels.test_hopper import decoded, four_bit
from vlmlora_kernels import CODE_BOOKS, Placed, dequantize_4bit
from vlmlora_kernels.hopper.dequantize import Frame, dequantize


def matrices(out, columns, right, below, seed=0):
    rng = np.random.default_rng(seed)
    beside = rng.standard_normal((out, right)).astype(jnp.bfloat16)
    under = rng.standard_normal((below, columns + right)).astype(jnp.bfloat16)
    codes, scales, absmax = four_bit(out * columns, True, seed)
    matrix = decoded(codes, absmax, out * columns, "nf4").reshape(out, columns).astype(jnp.bfloat16)
    return codes, scales, beside, under, np.vstack([np.hstack([matrix, beside]), under])


@settings(max_examples=20, deadline=None)
@given(
    out=st.integers(1, 40),
    columns=st.integers(1, 30),
    right=st.integers(0, 4),
    below=st.integers(0, 20),
)
def test_the_kernel_puts_matrices_to_the_right_and_below(out, columns, right, below):
    columns, right = 8 * columns, 8 * right
    codes, scales, beside, under, expected = matrices(out, columns, right, below)
    frame = Frame(out, columns, right, below, 0, right, below, columns + right)
    size = out * columns
    kernel = dequantize(CODE_BOOKS["nf4"], size=size, dtype=jnp.bfloat16, nested=True, frame=frame)
    around = [part for part in (beside, under) if part.size]
    found = emulator.run(kernel, codes, *scales, *around).reshape(expected.shape)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(("right", "below"), [(16, 0), (0, 5), (3, 2), (0, 0)])
def test_xla_puts_them_there_too(right, below):
    codes, scales, beside, under, expected = matrices(6, 40, right, below)
    absmax = np.asarray(scales[2][scales[0]] * np.repeat(scales[1], 256)[: len(scales[0])] + scales[3])
    found = dequantize_4bit(
        jnp.asarray(codes),
        jnp.asarray(absmax),
        shape=(6, 40),
        dtype=jnp.bfloat16,
        right=jnp.asarray(beside),
        below=jnp.asarray(under),
    )
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=20, deadline=None)
@given(
    out=st.integers(1, 20),
    columns=st.integers(1, 20),
    starts=st.tuples(*[st.integers(0, 2)] * 3),
    more=st.tuples(*[st.integers(0, 3)] * 3),
    rows=st.integers(0, 6),
    wide=st.integers(-2, 2),
)
def test_the_kernel_puts_what_is_given_among_zeros(out, columns, starts, more, rows, wide):
    start, given, after = (8 * each for each in starts)
    size, width = start + given + after, 8 * columns
    rng = np.random.default_rng(0)
    right = rng.standard_normal((out + more[0], given)).astype(jnp.bfloat16)
    below = rng.standard_normal((rows, max(8, width + size + 8 * wide))).astype(jnp.bfloat16)
    codes, scales, absmax = four_bit(out * width, True, 0)
    frame = Frame(out, width, size, rows + more[1], start, given, rows, below.shape[1])
    kernel = dequantize(CODE_BOOKS["nf4"], size=out * width, dtype=jnp.bfloat16, nested=True, frame=frame)
    arrays = (codes, *scales, *(part for part in (right, below) if part.size))
    found = emulator.run(kernel, *arrays).reshape(out + rows + more[1], width + size)
    expected = np.zeros(found.shape, jnp.bfloat16)
    expected[:out, :width] = decoded(codes, absmax, out * width, "nf4").reshape(out, width)
    expected[:out, width + start : width + start + given] = right[:out]
    expected[out : out + rows, : below.shape[1]] = below[:, : width + size]
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
    in_xla = dequantize_4bit(
        jnp.asarray(codes),
        jnp.asarray(absmax),
        shape=(out, width),
        dtype=jnp.bfloat16,
        right=Placed(jnp.asarray(right), size, start) if given else Placed(None, size),
        below=Placed(jnp.asarray(below) if rows else None, rows + more[1]),
    )
    np.testing.assert_array_equal(in_xla, expected)


def test_what_does_not_fit_is_refused():
    codes, absmax = jnp.zeros(120, jnp.uint8), jnp.ones(4)
    decode = {"shape": (6, 40), "dtype": jnp.bfloat16}
    with pytest.raises(ValueError, match=r"right has shape \[5, 8\].*needs 6 rows"):
        dequantize_4bit(codes, absmax, **decode, right=jnp.zeros((5, 8)))
    with pytest.raises(ValueError, match=r"below has shape \[2, 40\].*needs 48 columns"):
        dequantize_4bit(codes, absmax, **decode, right=jnp.zeros((6, 8)), below=jnp.zeros((2, 40)))
    with pytest.raises(ValueError, match=r"right has shape \[5, 8\].*needs 6 rows or more"):
        dequantize_4bit(codes, absmax, **decode, right=Placed(jnp.zeros((5, 8)), 16))
    with pytest.raises(ValueError, match=r"right has shape \[6, 8\].*too large.*8 columns, from 8 on"):
        dequantize_4bit(codes, absmax, **decode, right=Placed(jnp.zeros((6, 8)), 8, 8))
    with pytest.raises(ValueError, match=r"below has shape \[3, 40\].*too large.*2 rows"):
        dequantize_4bit(codes, absmax, **decode, below=Placed(jnp.zeros((3, 40)), 2))
