"""The fused product for many tokens: what its threads do, one by one on the CPU, and who does which steps."""

from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import emulator
from vlmlora_kernels import CODE_BOOKS, DYNAMIC_CODE, NestedAbsmax, double_dequantize
from vlmlora_kernels.hopper import scales, schedule, wgmma

THREADS = 256


def shared(array):
    return emulator.Pointer(np.ascontiguousarray(array).reshape(1, -1).view(np.uint8))


@pytest.fixture
def threads():
    emulator._state.update(threads=THREADS, block_threads=THREADS, block=0, masks=[np.ones(THREADS, bool)])
    with np.errstate(over="ignore"):
        yield


def swizzled(array, width):
    """As TMA writes rows of 64 or 128 bytes: pieces of 16 bytes in an order that depends on the row."""
    pieces = array.view(np.uint8).reshape(len(array), -1, 16)
    rows = np.arange(len(array))[:, None]
    order = np.arange(pieces.shape[1]) ^ rows // (128 // width) % (width // 16)
    return np.take_along_axis(pieces, order[..., None], axis=1).reshape(array.view(np.uint8).shape)


def operand(pairs):
    """The array [2, 64, 64] of two warpgroups behind the registers of their threads (PTX, ``wgmma``)."""
    thread = np.arange(THREADS)
    group, warp, lane = thread // 128, thread // 32 % 4, thread % 32
    result = np.full((2, 64, 64), np.nan, np.float32)
    for i, pair in enumerate(pairs):
        for k, value in enumerate(pair):
            result[group, 16 * warp + lane // 4 + 8 * (i % 2), 8 * (i // 2) + 2 * (lane % 4) + k] = value
    return result


def rows_of_operand(transposed):
    """Which of the 128 rows of the transposed result each row of both warpgroups' operands is."""
    group, warp, half, lane = np.meshgrid(
        np.arange(2), np.arange(4), np.arange(2), np.arange(8), indexing="ij"
    )
    if transposed:
        row = 64 * group + 32 * (warp // 2) + 4 * lane + 2 * (warp % 2) + half
    else:
        row = 64 * group + 16 * warp + 2 * lane + half
    assert sorted(row.reshape(-1)) == list(range(128))
    return row.reshape(2, 64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_threads_decode_every_element_of_a_tile(threads, transposed, quant_type):
    rng = np.random.default_rng(0)
    book = CODE_BOOKS[quant_type]
    shape = (64, 64) if transposed else (128, 32)
    codes = rng.integers(0, 256, shape, np.uint8)
    scales = rng.uniform(0.01, 1, (2, 64) if transposed else (1, 128)).astype(np.float32)
    table = shared(np.full(wgmma._TABLE_WORDS, np.nan, np.float32))
    wgmma.fill_table(emulator, book, table, THREADS)
    decode = wgmma.decode_columns if transposed else wgmma.decode_rows
    pairs = decode(emulator, shared(swizzled(codes, 64) if transposed else codes), shared(scales), table)
    nibbles = np.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), -1)
    factors = np.repeat(scales, 64, axis=0).T if transposed else scales.T
    expected = book[nibbles] * factors
    expected = expected.T if transposed else expected
    np.testing.assert_array_equal(operand(pairs), expected[rows_of_operand(transposed)])


@pytest.mark.parametrize("transposed", [False, True])
def test_threads_write_every_element_of_the_result_where_it_belongs(threads, transposed):
    rows = rows_of_operand(transposed)
    thread = np.arange(THREADS)
    group, warp, lane = thread // 128, thread // 32 % 4, thread % 32
    rng = np.random.default_rng(1)
    result = rng.standard_normal((128, 64)).astype(ml_dtypes.bfloat16)  # [row, token]
    values = [
        [
            result[
                rows[group, 16 * warp + lane // 4 + 8 * (i % 2)], 8 * (i // 2) + 2 * (lane % 4) + k
            ].astype(np.float32)
            for k in range(2)
        ]
        for i in range(16)
    ]
    pieces = np.full((2, 64, 64), np.nan, ml_dtypes.bfloat16)
    memory = shared(pieces)
    wgmma.write_piece(emulator, memory.shifted(group * 64 * 128), values, transposed)
    for half in range(2):
        expected = result[64 * half : 64 * half + 64].T
        np.testing.assert_array_equal(
            pieces[half].view(np.uint16), swizzled(np.ascontiguousarray(expected), 128).view(np.uint16)
        )


def test_sums_that_are_handed_over_are_added_where_they_belong(threads):
    rng = np.random.default_rng(2)
    mine, theirs = (rng.standard_normal((32, 2, THREADS)).astype(np.float32) for _ in range(2))
    memory = shared(np.full(128 * 64, np.nan, np.float32))
    emulator._state["masks"] = [np.arange(THREADS) < 128]  # one warpgroup
    schedule.store_sums(emulator, memory, [list(pair) for pair in theirs])
    total = np.array(schedule.add_sums(emulator, memory, [list(pair) for pair in mine]))
    np.testing.assert_array_equal(total[..., :128], (mine + theirs)[..., :128])


@given(
    tiles=st.integers(1, 700),
    steps=st.integers(1, 300),
    most_blocks=st.integers(1, 132),
    how=st.sampled_from(["in step, no lead", *schedule.SCHEDULES]),
)
@settings(deadline=None)
def test_every_step_is_taken_once_and_every_sum_is_waited_for(tiles, steps, most_blocks, how):
    plan = schedule.SCHEDULES.get(how, schedule.Schedule.in_step)(tiles, steps, most_blocks)
    taken = np.zeros((tiles, steps), int)
    handed, awaited = {}, {}
    with mock.patch.object(schedule, "jnp", np):  # which compiles nothing
        counts = [int(plan.count(block)) for block in range(plan.blocks)]
        for block, count in enumerate(counts):
            tile, step = plan.position(block, np.arange(count))
            np.add.at(taken, (tile, step), 1)
            begin, end, starts, ends = plan.piece(block, np.arange(plan.pieces(block)))
            # The pieces are the runs of steps of the same tile.
            np.testing.assert_array_equal(begin, np.flatnonzero(np.diff(tile, prepend=-1)))
            np.testing.assert_array_equal(end, [*begin[1:], count][: len(begin)])
            np.testing.assert_array_equal(
                step, np.repeat(step[begin] - begin, end - begin) + np.arange(count)
            )
            np.testing.assert_array_equal(starts, step[begin] == 0)
            np.testing.assert_array_equal(ends, step[end - 1] == steps - 1)
            for number in np.flatnonzero(~starts):
                place = int(plan.handed_over(block, number))
                assert place not in handed
                assert 0 <= place < plan.shares
                handed[place] = tile[begin[number]], block
            for number in np.flatnonzero(starts & ~ends):
                assert number == len(begin) - 1, "it has nothing else to do meanwhile"
                for place in range(*map(int, plan.awaited(block))):
                    awaited[place] = tile[begin[number]], block
    assert (taken == 1).all()
    assert handed.keys() == awaited.keys()
    for place, (tile, block) in handed.items():
        assert awaited[place][0] == tile
        assert awaited[place][1] < block, "a block waits for none that starts after it"
    assert plan.helpers or not handed
    assert plan.longest == max(counts)
    if how == "even":
        assert np.ptp(counts) <= 1
    else:
        assert max(counts) <= steps * -(-tiles // most_blocks), "no longer than without sharing"


@pytest.mark.parametrize("how", schedule.SCHEDULES)
def test_a_kernel_finds_the_same_places_as_python(how):
    plan = schedule.SCHEDULES[how](80, 128, 132)
    block = np.arange(plan.blocks, dtype=np.int32)
    number, piece = np.int32(plan.longest // 2), np.int32(0)

    def places(block, number, piece):
        found = [plan.count(block), plan.pieces(block), plan.handed_over(block, piece)]
        return [*found, *plan.position(block, number), *plan.piece(block, piece)]

    found = jax.jit(places)(block, number, piece)
    with mock.patch.object(schedule, "jnp", np):
        expected = places(block, number, piece)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("tiles", "steps", "expected"),
    [
        (128, 224, "unshared"),  # 4 of 132 blocks idle
        (64, 224, "in_step"),
        (80, 128, "headed"),
        (296, 56, "even"),  # short
        (28, 296, "even"),  # few tiles, each of many blocks
    ],
)
def test_blocks_are_at_the_same_steps_where_that_is_faster(tiles, steps, expected):
    plans = {name: plan(tiles, steps, 132) for name, plan in schedule.SCHEDULES.items()}
    assert [name for name, plan in plans.items() if plan == plans["fastest"]][:2] == ["fastest", expected]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(200, 64 * 12), (77, 64 * 17), (16, 64)])
def test_threads_decode_the_scales_of_each_tile(threads, shape, transposed, nested):
    rng = np.random.default_rng(3)
    rows, columns = shape[0], shape[1] // 64
    absmax = rng.uniform(0.01, 1, rows * columns).astype(np.float32)
    arrays, expected = (absmax,), absmax
    if nested:
        arrays = NestedAbsmax(
            rng.integers(0, 256, rows * columns, np.uint8),
            rng.uniform(0.001, 0.01, -(-rows * columns // 256)).astype(np.float32),
            DYNAMIC_CODE,
            np.full((), 0.03, np.float32),
        )
        expected = np.asarray(double_dequantize(jax.tree.map(jnp.asarray, arrays)))
    expected = expected.reshape(rows, columns)
    pointers = [shared(np.atleast_1d(np.asarray(array))) for array in arrays]
    table = shared(np.full(256, np.nan, np.float32))
    emulator._state.update(threads=128, block_threads=128, masks=[np.ones(128, bool)])
    if nested:
        emulator.fill(table, pointers[2], 256, emulator.thread(), 128)
    for row in range(0, rows, 64 if transposed else 128):
        for block in range(0, columns, 2 if transposed else 1):
            memory = shared(np.full((2, 64) if transposed else (1, 128), np.nan, np.float32))
            first = emulator.Word(row), emulator.Word(block)
            raw = scales.load_tile_scale(emulator, pointers, first, shape, transposed)
            offset = [emulator.as_word(emulator.load_float(pointers[3], 0))] if nested else []
            scales.write_tile_scale(emulator, table, memory, [*raw, *offset])
            found = memory.memory.view(np.float32).reshape((2, 64) if transposed else (1, 128))
            wanted = expected[row:, block:][:64, :2].T if transposed else expected[row:, block][None, :128]
            np.testing.assert_array_equal(found[: wanted.shape[0], : wanted.shape[1]], wanted)
            assert np.isfinite(found).all(), "what is beyond W is multiplied by zeros"


def test_two_blocks_add_each_half_of_their_sums():
    rng = np.random.default_rng(4)
    pairs = 8
    values = rng.standard_normal((pairs, 2, 2, THREADS)).astype(np.float32)  # pair, of it, block, thread
    memory = emulator.Pointer(np.full((2, 2 * 1024 * pairs // 2), 0xFF, np.uint8))
    emulator._state.update(threads=2 * THREADS, block_threads=THREADS, masks=[np.ones(2 * THREADS, bool)])
    memory.row = emulator.cluster_rank().value
    total = schedule.add_halves(emulator, memory, [list(pair) for pair in values.reshape(pairs, 2, -1)])
    total = np.array(total).reshape(pairs // 2, 2, 2, THREADS)
    expected = values.sum(axis=2)
    np.testing.assert_array_equal(total[:, :, 0], expected[: pairs // 2])
    np.testing.assert_array_equal(total[:, :, 1], expected[pairs // 2 :])


@given(tiles=st.integers(1, 66), steps=st.integers(2, 300))
@settings(deadline=None)
def test_two_blocks_take_half_of_the_steps_of_a_tile_each(tiles, steps):
    plan = schedule.Schedule.halved(tiles, steps)
    with mock.patch.object(schedule, "jnp", np):
        for block in range(2 * tiles):
            tile, step = plan.position(block, np.arange(plan.count(block)))
            np.testing.assert_array_equal(tile, block // 2)
            half = steps // 2
            np.testing.assert_array_equal(step, np.arange(half, steps) if block % 2 else np.arange(half))
