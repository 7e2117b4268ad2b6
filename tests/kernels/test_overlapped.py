"""The product that decodes W meanwhile: what its decoding threads do, one by one on the CPU."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import emulator
from tests.kernels.test_hopper import decoded, four_bit
from vlmlora_kernels import CODE_BOOKS
from vlmlora_kernels.hopper import overlapped

THREADS = 96


def memory(array):
    return emulator.Pointer(np.ascontiguousarray(array).reshape(1, -1).view(np.uint8))


def region(parts, band, chunk):
    """The part of W that a chunk is."""
    rows, columns = parts.chunk
    row, column = (chunk, band) if parts.transposed else (band, chunk)
    return slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)


@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=6, deadline=None)
@given(
    out=st.integers(1, 70).map(lambda n: 8 * n),
    blocks=st.integers(1, 9),
    nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    group=st.integers(1, 4),
)
def test_every_part_is_decoded_before_it_is_said_to_be(transposed, out, blocks, nested, quant_type, group):
    shape = (out, 64 * blocks)
    parts = overlapped.Parts(shape, transposed, group)
    codes, scales, absmax = four_bit(out * shape[1], nested, seed=out)
    expected = decoded(codes, absmax, out * shape[1], quant_type).astype(jnp.bfloat16).reshape(shape)
    weight = np.full(shape, np.nan, jnp.bfloat16)
    counts = [np.zeros(size, np.uint32) for size in (1, parts.bands, parts.bands * parts.chunks)]
    said = []

    def count_up(pointers):
        emulator_count_up(pointers)
        for chunk in np.flatnonzero(counts[2] == parts.per_chunk):
            where = region(parts, *divmod(int(chunk), parts.chunks))
            np.testing.assert_array_equal(weight[where], expected[where])
            said.append(chunk)

    emulator_count_up = emulator.count_up
    emulator._state.update(threads=THREADS, block_threads=THREADS, block=0, masks=[np.ones(THREADS, bool)])
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore"):
        patch.setattr(emulator, "count_up", count_up)
        overlapped.decode_parts(
            emulator,
            parts,
            CODE_BOOKS[quant_type],
            memory(codes),
            [memory(scale) for scale in scales],
            memory(weight.view(np.uint16)),
            tuple(memory(count) for count in counts),
            memory(np.full(256, np.nan, np.float32)),
        )
    np.testing.assert_array_equal(weight.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(counts[1], parts.chunks * parts.per_chunk)
    np.testing.assert_array_equal(counts[2], parts.per_chunk)
    assert set(said) == set(range(parts.bands * parts.chunks))


def test_parts_come_in_the_order_in_which_tiles_want_them():
    parts = overlapped.Parts((1024, 512), transposed=False, group=3)
    emulator._state.update(threads=1, block_threads=1, block=0, masks=[np.ones(1, bool)])
    places = [parts.place(emulator, emulator.Word(number))[:2] for number in range(parts.count)]
    found = [tuple(int(value.value[0]) for value in place) for place in places]
    wanted = [(band, chunk) for bands in ((0, 1, 2), (3,)) for chunk in range(4) for band in bands]
    assert list(dict.fromkeys(found)) == wanted
    assert all(found.count(place) == parts.per_chunk for place in wanted)
