"""``x @ W.T`` and ``dy @ W`` for many tokens and a 4-bit W that is never written, on a Hopper GPU.

A block of threads owns 128 rows of the transposed result (outputs of ``x @ W.T``, inputs of ``dy @ W``) and
a tile of tokens. One warpgroup keeps the copies into shared memory going, of tokens and of codes, 64 of the
summed axis at a time, and puts the scales of these codes beside them, decoded. Two others decode 64 rows
each, straight into the registers from which ``wgmma`` takes its first operand, while their last product is
still under way; the second operand is the tile of tokens in shared memory. A byte of codes is looked up in a
table of pairs of float32, multiplied by the scale in float32 and rounded once, so W is what `dequantize`
writes, bit for bit.

Which row of W stands in which row of the operand does not matter as long as the result is written where it
belongs: a thread takes neighbours, so that it writes pairs.

Blocks of threads get about as many steps along the summed axis each (`Schedule`), so a tile may be shared:
the block that has its first step waits for the sums of the others and adds them, always in the same order
(https://arxiv.org/abs/2301.03598). Where there are about half as many tiles as multiprocessors, two blocks
form a cluster and share each tile: they read half of each other's sums in shared memory.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jaxtyping import Array, BFloat16, UInt8

from vlmlora_kernels.hopper import simt
from vlmlora_kernels.hopper.launch import MULTIPROCESSORS, varying_like
from vlmlora_kernels.hopper.ring import Ring
from vlmlora_kernels.hopper.scales import TileScales
from vlmlora_kernels.hopper.schedule import (
    SCHEDULES,
    Schedule,
    Shares,
    add_halves,
    compute_pieces,
    in_wgmma_layout,
    pairs_of,
)

BLOCK = 64  # elements that share a scale, and the step along the summed axis
ROWS = 128  # rows of the transposed result that a block of threads owns
_GROUP_ROWS = 64  # of which a warpgroup multiplies
_TABLE_WORDS = 256 * 32  # 128 bytes for each byte of codes
_PIECE = 64  # tokens that are written at a time
_AHEAD = 3  # steps whose scales are on their way
_SWIZZLE = (plgpu.SwizzleTransform(128),)
# The same bytes in the words of ``wgmma``. A copy in these words would have to end at a multiple of 8 tokens.
_TILED_SWIZZLE = (plgpu.TilingTransform((8, 64)), *_SWIZZLE)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        tokens: of a block of threads; a multiple of 64, at most 256.
        stages: steps whose tiles are in shared memory or on their way.
        cluster: blocks of threads with the same tokens that load them together: 1 or 2.
        schedule: how blocks share the tiles; one of `schedule.SCHEDULES`.
        halved: two blocks of threads form a cluster, compute the sums of half of the steps of one tile each
            and add them, in place of `schedule`; with a `cluster` of 1, and two steps or more.
    """

    tokens: int = 256
    stages: int = 4
    cluster: int = 1
    schedule: str = "fastest"
    halved: bool = False


def matmul(
    book: np.ndarray,
    *,
    tokens: int,
    shape: tuple[int, int],
    transposed: bool,
    nested: bool,
    tuning: Tuning | None = None,
) -> Callable[..., BFloat16[Array, "tokens kept"]]:
    """The kernel of ``x @ W.T``, or of ``dy @ W`` if `transposed`, in bfloat16.

    Called with `x` [tokens, in] or `dy` [tokens, out], the codes, uint8 [out * in / 2], and the scales:
    float32 [out * in / 64], or the four arrays of doubly quantised ones.

    Args:
        book: the 16 values.
        tokens: rows of `x`.
        shape: (out, in) of W; `in` a multiple of 64, `out` of 8.
        transposed: multiply by W and not by its transpose.
        nested: the scales are doubly quantised.
        tuning: how the work is cut.
    """
    tuning = tuning or Tuning()
    out_features, in_features = shape
    summed, kept = (out_features, in_features) if transposed else (in_features, out_features)
    token_tiles = pl.cdiv(tokens, tuning.tokens)
    row_tiles = pl.cdiv(kept, ROWS * tuning.cluster)
    stages, width, cluster = tuning.stages, tuning.tokens, tuning.cluster
    tiles, steps = row_tiles * token_tiles, pl.cdiv(summed, BLOCK)
    if halved := tuning.halved:
        schedule = Schedule.halved(tiles, steps)
    else:
        schedule = SCHEDULES[tuning.schedule](tiles, steps, MULTIPROCESSORS // cluster)
    shares_in_memory = 0 if halved else schedule.shares * cluster * 2
    blocks_of_cluster = 2 if halved else cluster
    ring = Ring(stages, cluster)
    decode = decode_columns if transposed else decode_rows
    code_transforms = (plgpu.SwizzleTransform(64),) if transposed else ()
    collective = {"collective_axes": "pair"} if cluster > 1 else {}
    tile_scales = TileScales(shape, transposed, nested)

    def body(x, codes, *rest) -> None:
        scales, (out, *rest) = rest[: tile_scales.count], rest[tile_scales.count :]
        sums, rest = (rest[0], rest[1:]) if shares_in_memory else (None, rest)
        x_views, code_tiles, scale_tiles, table, scale_table, pieces, full, free = rest
        x_tiles, x_operands = x_views
        group = lax.axis_index("warpgroup")
        rank = lax.axis_index("pair") if cluster > 1 else 0
        if halved:
            block = 2 * lax.axis_index("block") + lax.axis_index("pair")
        else:
            # Blocks start in the order of their numbers: none waits for one that starts later.
            block = schedule.blocks - 1 - lax.axis_index("block")
        count = schedule.count(block)
        ready = None
        if shares_in_memory:
            ready = pl.get_global(plgpu.SemaphoreType.REGULAR((shares_in_memory,)))

        def place(number: Any) -> tuple:
            """First row and first token of the tile of a block's step, and the step of the tile."""
            tile, step = schedule.position(block, number)
            row_tile = lax.div(tile, token_tiles) * cluster + rank
            return row_tile * ROWS, lax.rem(tile, token_tiles) * width, step

        @plgpu.inline_mgpu()
        def meet(_) -> None:
            simt.cluster_barrier()

        def copy(step: Any) -> None:
            """Start a step's copies when its slot is free."""
            row, token, at = place(step)
            slot = ring.of(step)
            ring.wait(free, step)
            if transposed:
                code_part = (pl.ds(at * BLOCK, BLOCK), pl.ds(lax.div(row, 2), ROWS // 2))
            else:
                code_part = (pl.ds(row, ROWS), pl.ds(at * (BLOCK // 2), BLOCK // 2))
            plgpu.copy_gmem_to_smem(codes.at[code_part], code_tiles.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(token, width), pl.ds(at * BLOCK, BLOCK)],
                x_tiles.at[slot],
                full.at[slot],
                **collective,
            )

        def load_scales(step: Any) -> jax.Array:
            row, _, at = place(jnp.minimum(step, count - 1))
            first = (at * BLOCK, lax.div(row, BLOCK)) if transposed else (row, at)
            return tile_scales.load(scales, *first)

        @pl.when(group == 2)
        def load() -> None:
            plgpu.set_max_registers(40, action="decrease")
            # What comes from memory at first is all on its way before any of it is waited for.
            ahead = [load_scales(step) for step in range(_AHEAD)]
            offset = tile_scales.load_offset(scales)
            filled = jnp.minimum(count, stages)
            lax.fori_loop(0, filled, lambda step, _: copy(step), None)
            tile_scales.fill_table(scale_table, scales)

            def some(number: Any, ahead: list) -> list:
                """As many steps as there are loads ahead, each of which loads into the registers it has read.

                In a loop of single steps they would move from there to others, and that waits for them.
                """
                following = []
                for i, raw in enumerate(ahead):
                    step = number * _AHEAD + i

                    @pl.when(step < count)
                    def one(step: Any = step, raw: jax.Array = raw) -> None:
                        pl.when(step >= filled)(lambda: copy(step))
                        tile_scales.write(scale_table, scale_tiles.at[ring.of(step)], raw, offset)
                        plgpu.barrier_arrive(full.at[ring.of(step)])

                    following.append(load_scales(step + _AHEAD))
                return following

            lax.fori_loop(0, lax.div(count + _AHEAD - 1, _AHEAD), some, ahead)
            ring.leave(free, count)
            if halved:
                meet()  # as often as those who multiply
                meet()

        @pl.when(group < 2)
        def multiply() -> None:
            plgpu.set_max_registers(232, action="increase")

            @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
            def fill(_, ref: Any) -> None:
                fill_table(simt, book, simt.Pointer(ref, simt.SHARED), 256)

            fill(table)

            def decoded(step: Any) -> jax.Array:
                """Wait for a step's tiles and decode 64 rows of W."""
                slot = ring.of(step)
                plgpu.barrier_wait(full.at[slot])

                @plgpu.inline_mgpu(
                    arg_types=(plgpu.RefType(code_transforms), plgpu.RefType(), plgpu.RefType()),
                    return_type=plgpu.ShapeDtypeStruct(
                        (_GROUP_ROWS, BLOCK), jnp.float32, layout=plgpu.Layout.WGMMA
                    ),
                )
                def operand(_, *refs: Any) -> fragments.FragmentedArray:
                    pointers = [simt.Pointer(ref, simt.SHARED) for ref in refs]
                    return in_wgmma_layout(decode(simt, *pointers))

                values = operand(code_tiles.at[slot], scale_tiles.at[slot], table)
                return values.astype(jnp.bfloat16)

            def product(start: Any, end: Any) -> jax.Array:
                """The sum over a block's steps from `start` up to `end`."""

                def products(acc: Any) -> jax.Array:
                    def start_step(step: Any) -> None:
                        w = decoded(step)
                        plgpu.wgmma(acc, w, x_operands.at[ring.of(step)].T)

                    ring.multiply(free, start, end, start_step, takes_turns=True)
                    return acc[...]

                return pl.run_scoped(products, plgpu.ACC((_GROUP_ROWS, width), jnp.float32))

            def write_tile(there: tuple, result: jax.Array) -> None:
                row, token, _ = there
                for index in range(result.shape[1] // _PIECE):
                    piece = pieces.at[group, index % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    part = result[:, index * _PIECE : (index + 1) * _PIECE]

                    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_SWIZZLE), plgpu.Layout.WGMMA))
                    def write(_, ref: Any, part: fragments.FragmentedArray) -> None:
                        write_piece(simt, simt.Pointer(ref, simt.SHARED), pairs_of(part), transposed)

                    write(piece, part)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        piece,
                        out.at[
                            pl.ds(token + index * _PIECE, _PIECE),
                            pl.ds(row + group * _GROUP_ROWS, _GROUP_ROWS),
                        ],
                    )

            def add(result: jax.Array) -> jax.Array:
                """This block's half of the tile's tokens, for which both blocks have half of the sum."""

                @plgpu.inline_mgpu(
                    arg_types=(plgpu.RefType(_SWIZZLE), plgpu.Layout.WGMMA),
                    return_type=plgpu.ShapeDtypeStruct(
                        (_GROUP_ROWS, width // 2), jnp.float32, layout=plgpu.Layout.WGMMA
                    ),
                )
                def run(_, ref: Any, result: fragments.FragmentedArray) -> fragments.FragmentedArray:
                    simt.barrier_of(256)  # both warpgroups have read the last tokens, whose place it takes
                    sums = simt.Pointer(ref, simt.SHARED)
                    return in_wgmma_layout(add_halves(simt, sums, pairs_of(result)))

                return run(x_tiles, result)

            if halved:
                row, token, step = place(0)
                token += lax.axis_index("pair") * (width // 2)
                write_tile((row, token, step), add(product(0, count)))
                meet()  # none leaves while the other reads its sums
            else:
                shares = Shares(sums, ready, 0, lambda number: (number * cluster + rank) * 2 + group)
                compute_pieces(schedule, block, shares, place, product, write_tile)
            plgpu.wait_smem_to_gmem(0)

    code_tile = (BLOCK, ROWS // 2) if transposed else (ROWS, BLOCK // 2)
    out_type = [jax.ShapeDtypeStruct((tokens, kept), jnp.bfloat16)]
    if shares_in_memory:
        out_type.append(jax.ShapeDtypeStruct((shares_in_memory, _GROUP_ROWS * width), jnp.float32))
    run = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(tiles if halved else schedule.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.RefUnion(
                plgpu.SMEM((stages, width, BLOCK), jnp.bfloat16, transforms=_SWIZZLE),
                plgpu.SMEM((stages, width, BLOCK), jnp.bfloat16, transforms=_TILED_SWIZZLE),
            ),
            plgpu.SMEM((stages, *code_tile), jnp.uint8, transforms=code_transforms),
            plgpu.SMEM((stages, *tile_scales.tile), jnp.float32),
            plgpu.SMEM((_TABLE_WORDS,), jnp.float32),
            tile_scales.table,
            plgpu.SMEM((2, 2, _PIECE, _GROUP_ROWS), jnp.bfloat16, transforms=_SWIZZLE),
            plgpu.Barrier(num_barriers=stages, num_arrivals=3),
            ring.free(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="nf4_matmul_transposed" if transposed else "nf4_matmul",
        **({"cluster": (2,), "cluster_names": ("pair",)} if blocks_of_cluster > 1 else {}),
    )

    def call(x: jax.Array, codes: UInt8[Array, " bytes"], *scales: jax.Array) -> jax.Array:
        inputs = (x, codes.reshape(out_features, in_features // 2), *scales)
        return varying_like(run(*inputs)[0], inputs)

    return call


def fill_table(t: ModuleType, book: np.ndarray, table: Any, threads: int) -> None:
    """Write both float32 of each byte, the high nibble's first, once for each lane of half a warp.

    A load of 8 bytes serves so many at a time.
    """
    thread, lane = t.thread(), t.lane()
    bits = [int(b) for b in book.astype(np.float32).view(np.uint32)]
    mine = t.Word(bits[0])
    for i in range(1, 16):
        mine = t.select((lane & 15).equals(i), t.Word(bits[i]), mine)
    # Eight threads write the 128 bytes of an entry.
    for first in range(0, 256, threads // 8):
        entry = (thread >> 3) + first
        high, low = t.shuffle(mine, (entry >> 4) & 15), t.shuffle(mine, entry & 15)
        t.store_words(table, (entry << 7) + ((thread & 7) << 4), [high, low] * 2)
    t.barrier_of(threads)


class _Table:
    """Where a thread finds the values of a byte."""

    def __init__(self, t: ModuleType, table: Any):
        self.t, self.zero, self.mine = t, t.Word(0), table.shifted((t.lane() & 15) << 3)

    def __call__(self, word: Any, selector: Any) -> list:
        """The two float32 of the byte that `selector` (PTX ``prmt``) takes from the word."""
        offset = self.t.permute(word, self.zero, selector) << 7
        return [self.t.as_float(value) for value in self.t.load_constant(self.mine, offset, 2)]


def _load_pair(t: ModuleType, pointer: Any, offset: Any) -> list:
    return [t.as_float(word) for word in t.load_words(pointer, offset, 2)]


def decode_rows(t: ModuleType, codes: Any, scales: Any, table: Any) -> list[list]:
    """128 rows of W by 64 columns; the pairs that a thread of 256 holds.

    Each 16 rows are a warp's. A thread's two rows are neighbours, its columns those that ``wgmma`` wants.
    """
    look_up = _Table(t, table)
    lane, warp = t.lane(), t.thread() >> 5
    selector = (lane & 3) | 0x4440
    row = (warp << 4) + ((lane >> 2) << 1)
    words = [t.load_words(codes, (row << 5) + 16 * i, 4) for i in range(4)]
    rows = (words[0] + words[1], words[2] + words[3])
    factors = _load_pair(t, scales, row << 2)
    result = []
    for j in range(BLOCK // 8):
        for row_words, factor in zip(rows, factors, strict=True):
            result.append([t.multiply(value, factor) for value in look_up(row_words[j], selector)])
    return result


def decode_columns(t: ModuleType, codes: Any, scales: Any, table: Any) -> list[list]:
    """128 columns of W by 64 rows; the pairs that a thread of 256 holds.

    Each 32 columns are two warps', whose threads take pairs of neighbours in turn; a thread's rows are those
    that ``wgmma`` wants.
    """
    look_up = _Table(t, table)
    lane, warp = t.lane(), t.thread() >> 5
    turn, chunk = warp & 1, warp >> 1
    selectors = [turn | 0x4440, turn | 0x4442]
    words = []
    for first in (0, 32):
        row = lane + first
        words += t.load_transposed(codes, (row << 6) + ((chunk ^ ((row >> 1) & 3)) << 4))
    result = []
    for j, word in enumerate(words):
        factors = _load_pair(t, scales, ((warp >> 2) << 8) + ((lane & 3) << 3) + 32 * j)
        columns = ([], [])
        for selector, factor in zip(selectors, factors, strict=True):
            for column, value in zip(columns, look_up(word, selector), strict=True):
                column.append(t.multiply(value, factor))
        result += columns
    return result


def write_piece(t: ModuleType, piece: Any, values: list[list], transposed: bool) -> None:
    """Write a warpgroup's 64 rows by 64 tokens to [token, row] in shared memory, with its swizzle.

    Args:
        t: `simt`.
        piece: where to.
        values: for each 8 tokens and each of a thread's two rows, two tokens.
        transposed: the rows are those of `decode_columns`, and not of `decode_rows`.
    """
    lane, warp = t.lane(), t.thread() >> 5
    if transposed:
        byte = (((warp >> 1) & 1) << 6) + ((lane >> 2) << 3) + ((warp & 1) << 2)
    else:
        byte = ((warp & 3) << 5) + ((lane >> 2) << 2)
    for i in range(2):
        token = ((lane & 3) << 1) + i
        start = (token << 7) + (((byte >> 4) ^ token) << 4) + (byte & 15)
        for j in range(len(values) // 2):
            t.store_words(piece, start + 1024 * j, [t.pack_bfloat16(values[2 * j][i], values[2 * j + 1][i])])
