"""A decoded matrix with others around it: the kernel's threads, and the same from XLA."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import emulator
from tests.kernels.test_hopper import decoded, four_bit
from vlmlora_kernels import CODE_BOOKS, dequantize_4bit
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
    frame = Frame(out, columns, right, below)
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


def test_what_does_not_fit_is_refused():
    codes, absmax = jnp.zeros(120, jnp.uint8), jnp.ones(4)
    decode = {"shape": (6, 40), "dtype": jnp.bfloat16}
    with pytest.raises(ValueError, match=r"right has shape \[5, 8\].*needs 6 rows"):
        dequantize_4bit(codes, absmax, **decode, right=jnp.zeros((5, 8)))
    with pytest.raises(ValueError, match=r"below has shape \[2, 40\].*needs 48 columns"):
        dequantize_4bit(codes, absmax, **decode, right=jnp.zeros((6, 8)), below=jnp.zeros((2, 40)))
