"""``x @ W.T`` and ``dy @ W`` for many tokens, and a 4-bit W that is decoded meanwhile, on a Hopper GPU.

A block of threads computes tiles of 128 tokens by 256 of what W leaves. One warp keeps the copies of tokens
and of W into shared memory going, 64 of the summed axis at a time; two warpgroups multiply them with
``wgmma``. Three more warps decode W into memory, as `dequantize` does and bit for bit the same, in the order
in which the tiles will want it, a little ahead of them: the copying warp waits until a part has been decoded.
So the tensor cores need not wait for a decoding that moves 2.5 bytes an element, and what was just decoded
comes from the L2 cache.

Which warp of which block decodes a part is settled while the kernel runs: each takes the next one that is
left. A part that a block waits for has been taken by warps that wait for nothing, or will be by its own.

Two blocks form a cluster, which shares the tiles of W.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
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
from vlmlora_kernels.hopper.dequantize import (
    BLOCKSIZE,
    LANES,
    NESTED_CODES,
    decode_scale,
    load_offset,
    load_scale,
    pack,
)
from vlmlora_kernels.hopper.launch import MULTIPROCESSORS, varying_like
from vlmlora_kernels.hopper.ring import Ring
from vlmlora_kernels.hopper.schedule import Schedule, Shares, compute_pieces

STEP = 64  # along the summed axis
BAND = 256  # rows of W, or columns, that a tile takes
TOKENS = 128  # of a tile
_GROUP_TOKENS = 64  # of which a warpgroup multiplies
_PIECE = 64  # columns of the result that are written at a time
_STAGES = 4  # steps whose tiles are in shared memory or on their way
_CLUSTER = 2  # blocks of threads with the same part of W, which they load together
_BANDS = 8  # of W, the fewest that are multiplied at a time
_DECODERS = 3  # warps
_ROUNDS = 2  # blocks that share a scale of a part, for each two lanes
_SWIZZLE = (plgpu.SwizzleTransform(128),)
# The same bytes in the words of ``wgmma``. A copy in these words would have to end at a multiple of 8 rows.
_TILED_SWIZZLE = (plgpu.TilingTransform((8, 64)), *_SWIZZLE)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts in which W is decoded, and their order: that in which the tiles of the result want them.

    W's bands are `BAND` rows, or columns if it is not transposed for the product. A chunk is what one band
    has of a piece of the summed axis, and one wait; a warp decodes a part of it at a time.

    Attributes:
        shape: (out, in) of W.
        transposed: the product is ``dy @ W``: bands are of columns.
        group: bands that are decoded together, chunk by chunk.
    """

    shape: tuple[int, int]
    transposed: bool
    group: int

    @property
    def chunk(self) -> tuple[int, int]:
        """Rows and columns of W in a chunk."""
        return (64, BAND) if self.transposed else (BAND, 128)

    @property
    def chunk_steps(self) -> int:
        """Steps along the summed axis in a chunk."""
        return self.chunk[0 if self.transposed else 1] // STEP

    @property
    def bands(self) -> int:
        """Bands of W."""
        return -(-self.shape[1 if self.transposed else 0] // BAND)

    @property
    def chunks(self) -> int:
        """Chunks of a band."""
        return -(-self.shape[0 if self.transposed else 1] // (STEP * self.chunk_steps))

    @property
    def blocks(self) -> int:
        """Blocks that share a scale in a row of a chunk."""
        return self.chunk[1] // BLOCKSIZE

    @property
    def per_chunk(self) -> int:
        """Parts of a chunk."""
        return self.chunk[0] * self.blocks // (LANES // 2 * _ROUNDS)

    @property
    def count(self) -> int:
        """Parts of all of W."""
        return self.bands * self.chunks * self.per_chunk

    def place(self, t: ModuleType, number: Any) -> tuple[Any, Any, Any, Any]:
        """Of the part of this number: its band, its chunk, and its first row and column of W."""
        of_group = self.group * self.chunks * self.per_chunk
        first_band = number // of_group * self.group
        number = number % of_group
        # The last group may have fewer bands.
        together = (t.Word(self.bands) - first_band).min(self.group) * self.per_chunk
        chunk, number = number // together, number % together
        band, part = first_band + number // self.per_chunk, number % self.per_chunk
        rows = self.chunk[0] // self.per_chunk
        if self.transposed:
            return band, chunk, chunk * self.chunk[0] + part * rows, band * BAND
        return band, chunk, band * BAND + part * rows, chunk * self.chunk[1]


def matmul(
    book: np.ndarray,
    *,
    tokens: int,
    shape: tuple[int, int],
    transposed: bool,
    nested: bool,
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
    """
    out_features, in_features = shape
    summed, kept = (out_features, in_features) if transposed else (in_features, out_features)
    token_tiles = pl.cdiv(tokens, TOKENS * _CLUSTER)
    clusters = MULTIPROCESSORS // _CLUSTER
    bands = pl.cdiv(kept, BAND)
    # About as many bands as tiles of tokens at a time, but all tokens before the next bands if they are few.
    together = min(bands, max(_BANDS, pl.cdiv(clusters, token_tiles)))
    parts = Parts(shape, transposed, together)
    ring = Ring(_STAGES, _CLUSTER)
    steps = pl.cdiv(summed, STEP)
    schedule = Schedule.in_step(bands * token_tiles, steps, clusters)
    scale_count = 4 if nested else 1
    shared_sums = schedule.shares * _CLUSTER * 2
    # Of the semaphores: the next part to decode, decoded parts of bands and of chunks, sums handed over.
    first_chunk = 1 + bands
    first_share = first_chunk + bands * parts.chunks

    def body(x, codes, *rest) -> None:
        scales, (out, weight, *rest) = rest[:scale_count], rest[scale_count:]
        sums, rest = (rest[0], rest[1:]) if schedule.helpers else (None, rest)
        x_views, w_views, piece_views, scale_table, full, free = rest
        x_tiles, x_operands = x_views
        w_tiles, w_operands = w_views
        pieces, written_pieces = piece_views
        group = lax.axis_index("warpgroup")
        rank = lax.axis_index("pair")
        # Blocks start in the order of their numbers: none waits for the sums of one that starts later.
        block = schedule.blocks - 1 - lax.axis_index("block")
        progress = pl.get_global(plgpu.SemaphoreType.REGULAR((first_share + shared_sums,)))

        def place(step: Any) -> tuple:
            """Band and first token of the cluster's tile at a block's step, and the step of the tile."""
            tile, at = schedule.position(block, step)
            first_band = lax.div(tile, together * token_tiles) * together
            tile = lax.rem(tile, together * token_tiles)
            width = jnp.minimum(together, bands - first_band)
            return first_band + lax.rem(tile, width), lax.div(tile, width) * (TOKENS * _CLUSTER), at

        def load() -> None:
            def wait_for_chunk(band: Any, number: Any) -> None:
                @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
                def wait(_, ref: Any) -> None:
                    simt.wait_for_count(simt.Pointer(ref, simt.GLOBAL), parts.per_chunk)

                wait(progress.at[first_chunk + band * parts.chunks + number])

            def whole_band(band: Any) -> Any:
                """Whether all of a band has been decoded."""

                @plgpu.inline_mgpu(
                    arg_types=(plgpu.RefType(),),
                    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
                )
                def count(_, ref: Any) -> fragments.FragmentedArray:
                    found = simt.load_count(simt.Pointer(ref, simt.GLOBAL))
                    return fragments.FragmentedArray.splat(found.value, (), is_signed=True)

                return count(progress.at[1 + band]) == parts.chunks * parts.per_chunk

            def one_piece(number: Any, _: None) -> None:
                start, end, _, _ = schedule.piece(block, number)
                band, token, first = place(start)
                is_decoded = whole_band(band)

                def one(step: Any, _: None) -> None:
                    at = first + step - start
                    slot = ring.of(step)
                    ring.wait(free, step)
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(token + rank * TOKENS, TOKENS), pl.ds(at * STEP, STEP)],
                        x_tiles.at[slot],
                        full.at[slot],
                    )

                    @pl.when((step == start) | (lax.rem(at, parts.chunk_steps) == 0))
                    def next_chunk() -> None:
                        pl.when(jnp.logical_not(is_decoded))(
                            lambda: wait_for_chunk(band, lax.div(at, parts.chunk_steps))
                        )

                    part = (pl.ds(band * BAND, BAND), pl.ds(at * STEP, STEP))
                    plgpu.copy_gmem_to_smem(
                        weight.at[part[::-1] if transposed else part],
                        w_tiles.at[slot],
                        full.at[slot],
                        collective_axes="pair",
                    )

                lax.fori_loop(start, end, one, None)

            lax.fori_loop(0, schedule.pieces(block), one_piece, None)
            ring.leave(free, schedule.count(block))

        def decode() -> None:
            refs = (codes, *scales, weight, progress.at[0], progress.at[1], progress.at[first_chunk])

            @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(refs) + 1))
            def run(_, *refs: Any) -> None:
                pointers = [simt.Pointer(ref, simt.GLOBAL) for ref in refs[:-1]]
                codes, *scales, weight, next_part, of_bands, of_chunks = pointers
                counts = (next_part, of_bands, of_chunks)
                table = simt.Pointer(refs[-1], simt.SHARED)
                decode_parts(simt, parts, book, codes, scales, weight, counts, table)

            run(*refs, scale_table)

        @pl.when(group == 2)
        def serve() -> None:
            plgpu.set_max_registers(120, action="decrease")

            @plgpu.warp_map
            def by_warp(warp: Any) -> None:
                pl.when(warp == 0)(load)
                pl.when(warp > 0)(decode)

        @pl.when(group < 2)
        def multiply() -> None:
            plgpu.set_max_registers(192, action="increase")

            def product(start: Any, end: Any) -> jax.Array:
                """The sum over a block's steps from `start` up to `end`."""

                def products(acc: Any) -> jax.Array:
                    def start_step(step: Any) -> None:
                        slot = ring.of(step)
                        plgpu.barrier_wait(full.at[slot])
                        w = w_operands.at[slot]
                        own = pl.ds(group * _GROUP_TOKENS, _GROUP_TOKENS)
                        plgpu.wgmma(acc, x_operands.at[slot, own], w if transposed else w.T)

                    ring.multiply(free, start, end, start_step)
                    return acc[...]

                return pl.run_scoped(products, plgpu.ACC((_GROUP_TOKENS, BAND), jnp.float32))

            def write_tile(there: tuple, result: jax.Array) -> None:
                band, token, _ = there
                first = token + rank * TOKENS + group * _GROUP_TOKENS
                result = result.astype(jnp.bfloat16)
                for index in range(BAND // _PIECE):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    written_pieces[group] = result[:, index * _PIECE : (index + 1) * _PIECE]
                    plgpu.commit_smem()
                    columns = pl.ds(band * BAND + index * _PIECE, _PIECE)
                    plgpu.copy_smem_to_gmem(pieces.at[group], out.at[pl.ds(first, _GROUP_TOKENS), columns])

            shares = Shares(
                sums, progress, first_share, lambda number: (number * _CLUSTER + rank) * 2 + group
            )
            compute_pieces(schedule, block, shares, place, product, write_tile)
            plgpu.wait_smem_to_gmem(0)

    out_type = [
        jax.ShapeDtypeStruct((tokens, kept), jnp.bfloat16),
        jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    ]
    if schedule.helpers:
        out_type.append(jax.ShapeDtypeStruct((shared_sums, _GROUP_TOKENS * BAND), jnp.float32))

    def both_views(*shape: int) -> plgpu.RefUnion:
        """Shared memory as copies take it, and as ``wgmma`` and stores of a result do."""
        views = [plgpu.SMEM(shape, jnp.bfloat16, transforms=each) for each in (_SWIZZLE, _TILED_SWIZZLE)]
        return plgpu.RefUnion(*views)

    if transposed:
        w_tile = plgpu.SMEM((_STAGES, STEP, BAND), jnp.bfloat16, transforms=_TILED_SWIZZLE)
        w_scratch = plgpu.RefUnion(w_tile, w_tile)
    else:
        w_scratch = both_views(_STAGES, BAND, STEP)
    run = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(schedule.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            both_views(_STAGES, TOKENS, STEP),
            w_scratch,
            both_views(2, _GROUP_TOKENS, _PIECE),
            plgpu.SMEM((NESTED_CODES if nested else 1,), jnp.int32),
            plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2),
            ring.free(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="nf4_overlapped_transposed" if transposed else "nf4_overlapped",
        cluster=(_CLUSTER,),
        cluster_names=("pair",),
    )

    def call(x: jax.Array, codes: UInt8[Array, " bytes"], *scales: jax.Array) -> jax.Array:
        inputs = (x, codes, *scales)
        return varying_like(run(*inputs)[0], inputs)

    return call


def decode_parts(
    t: ModuleType,
    parts: Parts,
    book: np.ndarray,
    codes: Any,
    scales: Sequence[Any],
    weight: Any,
    counts: tuple[Any, Any, Any],
    scale_table: Any,
) -> None:
    """Take parts of W, decode them and say so, until none is left.

    Args:
        t: `simt`.
        parts: what is decoded.
        book: the 16 values.
        codes: packed codes.
        scales: of the blocks, as `matmul` takes them.
        weight: where to.
        counts: the next part, and how many have been decoded of each band and of each chunk.
        scale_table: shared memory for the values of nested scales.
    """
    next_part, of_bands, of_chunks = counts
    threads = LANES * _DECODERS
    rows, row_blocks = parts.shape[0], parts.shape[1] // BLOCKSIZE
    if len(scales) > 1:
        t.fill(scale_table, scales[2], NESTED_CODES, t.thread() % threads, threads)
        t.barrier_of(threads)
    pair, half = t.lane() >> 1, t.lane() & 1
    is_second = half.equals(1)

    def blocks_of(first_row: Any, first_block: Any) -> list[tuple[Any, Any]]:
        """The blocks that two lanes decode, or others near by, and whether they are in W."""
        found = []
        for i in range(_ROUNDS):
            index = pair + i * (LANES // 2)
            row, block = first_row + index // parts.blocks, first_block + index % parts.blocks
            is_inside = t.both(row < rows, block < row_blocks)
            found.append((row.min(rows - 1) * row_blocks + block.min(row_blocks - 1), is_inside))
        return found

    def load(*at: Any) -> list[list]:
        """Start loading a lane's half of the codes of a part's blocks, and their scales."""
        loaded = []
        for block, _ in blocks_of(*at):
            words = t.load_words(codes, (block << 5) + (half << 4), 4, once=True)
            loaded.append([*words, *load_scale(t, scales, block)])
        return loaded

    def decoded(words: list, raw_scale: tuple) -> list[list]:
        """Every second word of a block as bfloat16, from the first or the second on.

        A lane has loaded four words in turn. It decodes every second one, so that two lanes together write
        32 bytes in turn.
        """
        wanted = [t.shuffle_xor(t.select(is_second, words[i], words[i + 1]), 1) for i in (0, 2)]
        own = [t.select(is_second, words[i + 1], words[i]) for i in (0, 2)]
        # The first lane's own are words 0 and 2, and those it wants 4 and 6; the second's own are 5 and 7.
        words = [t.select(is_second, *two) for two in zip(wanted + own, own + wanted, strict=True)]
        scale = decode_scale(t, load_offset(t, scales), scale_table, raw_scale)
        return decode_words(t, book, words, scale)

    def say(band: Any, chunk: Any) -> None:
        """That a part of a chunk has been written; no band: there was none."""
        with t.when(band < parts.bands):
            number = band * parts.chunks + chunk
            t.count_up([of_bands.shifted(band << 2), of_chunks.shifted(number << 2)])

    def place(part: Any) -> list:
        """Of a part, or of the last one if there are no more: band, chunk, first row and block in it."""
        band, chunk, row, column = parts.place(t, part.min(parts.count - 1))
        return [band, chunk, row, column // BLOCKSIZE]

    def plain(values: list) -> list:
        return [getattr(value, "value", value) for value in values]

    def one(carry: list) -> list:
        _, following, *places = (t.Word(value) for value in carry[:8])
        (band, chunk, *at), before = places[:4], places[4:]
        # What this waits for was written while the loads of this part were under way.
        say(*before)
        following = t.shuffle(following, t.Word(0))
        after = t.take(next_part)
        next_place = place(following)
        ahead = load(*next_place[2:])
        loaded = itertools.batched(carry[8:], len(ahead[0]))
        for (block, is_inside), (*words, scale) in zip(blocks_of(*at), loaded, strict=True):
            raw_scale = (t.Word(words.pop()), scale) if len(scales) > 1 else (scale,)
            values = decoded([t.Word(word) for word in words], raw_scale)
            with t.when(is_inside):
                for j, word in enumerate(values):
                    t.store_words(weight, (block << 7) + (half << 4) + 32 * j, word)
        return plain([following, after, *next_place, band, chunk, *itertools.chain(*ahead)])

    first, following = t.shuffle(t.take(next_part), t.Word(0)), t.take(next_part)
    start = place(first)
    no_band = [t.Word(parts.bands), t.Word(0)]
    carry = plain([first, following, *start, *no_band, *itertools.chain(*load(*start[2:]))])
    last = t.loop_while(carry, lambda carry: t.Word(carry[0]) < parts.count, one)
    say(t.Word(last[6]), t.Word(last[7]))


def decode_words(t: ModuleType, book: np.ndarray, words: list, scale: Any) -> list[list]:
    """Words of codes of one block as bfloat16, four words for each.

    The 16 values times the scale are made first, and each nibble picks one of them, byte by byte, by
    permutations: of the first eight values, of the others, and of both results by the nibble's highest bit.
    Nothing is looked up in shared memory, which the tensor cores keep busy.
    """
    products = pack(t, [t.multiply(t.constant(float(value)), scale) for value in book])
    planes = [  # the low bytes of each four values, then the high ones
        [t.permute(products[i], products[i + 1], selector) for i in range(0, 8, 2)]
        for selector in (0x6420, 0x7531)
    ]
    result = []
    for word in words:
        index, which = word & 0x77777777, ((word >> 1) & 0x44444444) | 0x32103210
        found = []
        for shift in (0, 16):
            low, high = (
                t.permute(
                    t.permute(plane[0], plane[1], index >> shift),
                    t.permute(plane[2], plane[3], index >> shift),
                    which >> shift,
                )
                for plane in planes
            )
            # The first element of a byte is its high nibble.
            found += [t.permute(low, high, 0x4051), t.permute(low, high, 0x6273)]
        result.append(found)
    return result
