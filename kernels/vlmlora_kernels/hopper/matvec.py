"""``x @ W.T`` for few tokens and a 4-bit or 8-bit W that is read once, on a Hopper GPU.

Each block of threads owns a band of W's rows, its warps some of those rows and a share of the columns each.
A warp walks along its columns: it keeps the codes of the next columns in flight in registers, turns each
byte into two bfloat16 with a table in shared memory, and multiplies with the tensor cores
(``mma.m16n8k16``: rows of W by tokens). The sum over the 64 columns of a block of codes is multiplied by
the block's float32 scale and added to the total. So W is rounded once, to the bfloat16 of its 16 values,
and the scales are not rounded at all. At the end the warps that share rows add their totals, always in the
same order; with a `cluster`, the blocks that share a band do so too, through each other's shared memory.

`x` is read through the L1 cache, or, for more tokens, copied to shared memory ahead of its use
(``Tuning.stages``), where the warps that share columns find it together.

Which column stands where inside the 64 does not matter to a sum, so each thread of a row's four takes 16
neighbouring columns, and codes and `x` come in wide, contiguous loads. 16 bytes of 4-bit codes are 32
columns: threads load those, and two that are two apart swap halves.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlmlora_kernels.hopper.dequantize import LANES, NESTED_CODES, load_scale
from vlmlora_kernels.hopper.launch import Kernel

COLUMNS = 64  # of a piece: one block of codes
_MAGIC = 8388608.0  # 2 ** 23: a float32 whose low mantissa bits count ones.
_RECIPROCAL_127 = 7.874015718698502e-3


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        groups: groups of rows in the band of a block of threads.
        splits: warps that share the columns of a group.
        row_tiles: times 16 rows in a group.
        lookahead: loads of `x` that are under way while one is used.
        unit: blocks of 64 columns whose codes a warp loads together, 2 or 4.
        stages: units of `x` in shared memory, at least 2; with 0, `x` is read through the L1 cache.
        cluster: blocks of threads that share the columns of a band, 1 to 8.
        early_x: start a unit's first loads of `x` while the unit before is multiplied; without `stages`.
    """

    groups: int
    splits: int
    row_tiles: int = 1
    lookahead: int = 3
    unit: int = 4
    stages: int = 0
    cluster: int = 1
    early_x: bool = False

    @property
    def rows(self) -> int:
        """Rows of a band."""
        return 16 * self.row_tiles * self.groups

    @property
    def warps(self) -> int:
        """Warps of a block, in whole warpgroups; those beyond ``groups * splits`` idle."""
        return -(-self.groups * self.splits // 4) * 4

    @property
    def columns(self) -> int:
        """The fewest columns of W that this takes."""
        return COLUMNS * self.unit * self.splits * self.cluster

    def shared_words(self, tokens: int) -> int:
        """Words of shared memory for `x`, and for the totals of the warps in the same place afterwards."""
        padded = -(-tokens // 8) * 8
        x = self.stages * self.splits * self.unit * padded * COLUMNS // 2
        return max(x, self.groups * self.splits * padded * _padded_rows(self))


def _padded_rows(tuning: Tuning) -> int:
    return 16 * tuning.row_tiles + 4  # so that the lanes of a store meet different banks


class FourBit:
    """4-bit codes: 32 bytes for 64 columns, and one scale."""

    words = 2
    has_block_scales = True

    def __init__(self, book: np.ndarray, nested: bool):
        self.bits = [int(b) for b in book.astype(jnp.bfloat16).view(np.uint16)]
        self.nested = nested
        self.name = "nf4"
        self.scratch = (256 * LANES, NESTED_CODES if nested else 1)

    def start(self, t: ModuleType, scales: list, scratch: list, warps: int) -> "_FourBitDecoding":
        """Fill the table: both values of each byte, once for every lane."""
        table, scale_table = scratch
        thread, lane = t.thread(), t.lane()
        mine = t.Word(self.bits[0])
        for i in range(1, 16):
            mine = t.select((lane & 15).equals(i), t.Word(self.bits[i]), mine)
        # Eight threads write the 32 copies of a byte's pair, four each.
        for first in range(0, 256, warps * LANES // 8):
            entry = (thread >> 3) + first
            pair = t.permute(t.shuffle(mine, (entry >> 4) & 15), t.shuffle(mine, entry & 15), 0x5410)
            with t.when(entry < 256):
                t.store_words(table, (entry << 7) + ((thread & 7) << 4), [pair] * 4)
        offset = None
        if self.nested:
            t.fill(scale_table, scales[2], NESTED_CODES, thread, warps * LANES)
            offset = t.load_float(scales[3], 0)
        return _FourBitDecoding(t, scales, table, scale_table, lane << 2, offset)

    def quarter(self, quarter: Any) -> Any:
        """Which quarter of a piece's columns the thread holds after `arrange`."""
        return ((quarter & 1) << 1) | (quarter >> 1)

    def load(self, t: ModuleType, row: Any, quarter: Any, pieces: int) -> list:
        """Start loading an even number of pieces of a row: 16 bytes of each two."""
        at = row.shifted(quarter << 4)
        return [word for pair in range(pieces // 2) for word in t.load_words(at, pair * 64, 4, once=True)]

    def arrange(self, t: ModuleType, words: list, quarter: Any) -> list[list]:
        """The words of each piece: the low half of a row's threads loaded the first of two, and keeps its own
        first words and gets those of the second."""
        low = quarter < 2
        pieces = []
        for at in range(0, len(words), 4):
            first, second = words[at : at + 2], words[at + 2 : at + 4]
            sent = [t.select(low, b, a) for a, b in zip(first, second, strict=True)]
            received = [t.shuffle_xor(word, 2) for word in sent]
            pieces.append([t.select(low, a, b) for a, b in zip(first, received, strict=True)])
            pieces.append([t.select(low, a, b) for a, b in zip(received, second, strict=True)])
        return pieces


@dataclasses.dataclass
class _FourBitDecoding:
    t: ModuleType
    scales: list
    table: Any
    scale_table: Any
    lane4: Any
    offset: Any

    def pair(self, words: list, index: int) -> Any:
        """Columns ``2 * index`` and the next of the thread's 16, as bfloat16."""
        word, byte = words[index // 4], index % 4
        moved = word << 7 if byte == 0 else word >> (8 * byte - 7)
        return self.t.load_shared(self.table, (moved & 0x7F80) | self.lane4)

    def scale(self, raw: tuple) -> Any:
        """The bits of a block's scale whose loading was started."""
        t = self.t
        if len(raw) == 1:
            return t.as_word(raw[0])
        code = t.load_shared_float(self.scale_table, t.Word(raw[0]) << 2)
        return t.as_word(t.add(t.multiply(code, raw[1]), self.offset))


class EightBit:
    """8-bit values: 64 bytes for 64 columns, and one scale a row."""

    words = 4
    has_block_scales = False
    scratch: tuple[int, ...] = ()
    name = "int8"

    def start(self, t: ModuleType, scales: list, scratch: list, warps: int) -> "_EightBitDecoding":
        """Nothing to prepare."""
        return _EightBitDecoding(t)

    def quarter(self, quarter: Any) -> Any:
        """Which quarter of a piece's columns the thread holds."""
        return quarter

    def load(self, t: ModuleType, row: Any, quarter: Any, pieces: int) -> list:
        """Start loading pieces of a row."""
        at = row.shifted(quarter << 4)
        return [word for piece in range(pieces) for word in t.load_words(at, piece * 64, 4, once=True)]

    def arrange(self, t: ModuleType, words: list, quarter: Any) -> list[list]:
        """The words of each piece."""
        return [words[at : at + 4] for at in range(0, len(words), 4)]


@dataclasses.dataclass
class _EightBitDecoding:
    t: ModuleType

    def pair(self, words: list, index: int) -> Any:
        """Columns ``2 * index`` and the next of the thread's 16, as bfloat16; every int8 is one exactly."""
        t = self.t
        biased = words[index // 2] ^ 0x80808080
        low = 2 * (index % 2)
        floats = [t.as_float(t.permute(biased, t.Word(0x4B000000), 0x7540 | (low + i))) for i in range(2)]
        return t.pack_bfloat16(*[t.add(value, t.constant(-(_MAGIC + 128.0))) for value in floats])


def matmul(decoder: FourBit | EightBit, *, tokens: int, shape: tuple[int, int], tuning: Tuning) -> Kernel:
    """The kernel of ``x @ W.T``, in bfloat16.

    Its inputs are `x` [tokens, in], the codes, uint8 [out * in / 2] or int8 [out, in], and the scales:
    float32, one a block of codes or one a row, or the four arrays of doubly quantised scales.

    Args:
        decoder: what the codes mean.
        tokens: rows of `x`.
        shape: (out, in); `in` a multiple of 64, and ``tuning.columns`` or more.
        tuning: how the work is cut.
    """
    out_features, in_features = shape
    token_tiles = -(-tokens // 8)
    padded_tokens = 8 * token_tiles
    row_tiles, splits, warps, band = tuning.row_tiles, tuning.splits, tuning.warps, tuning.rows
    unit, stages, blocks_of_band = tuning.unit, tuning.stages, tuning.cluster
    halves = range(2 * row_tiles)
    group_rows = 16 * row_tiles
    threads = warps * LANES
    pieces = in_features // COLUMNS
    shares = splits * blocks_of_band
    piece_bytes = 16 * decoder.words
    has_tail = pieces % (unit * shares) != 0
    padded_rows = _padded_rows(tuning)
    group_words = padded_tokens * padded_rows
    tile_totals = 4 * token_tiles

    def body(t: ModuleType, inputs: list, out: Any, scratch: list) -> None:
        x, codes, *scales = inputs
        shared, *tables = scratch
        thread, lane, warp = t.thread(), t.lane(), t.warp()
        row_in_tile, quarter = lane >> 2, lane & 3
        columns = decoder.quarter(quarter)
        group, split = warp // splits, warp % splits
        works = warp < tuning.groups * splits
        if blocks_of_band == 1:
            rank, band_start = t.Word(0), t.block() * band
        else:
            rank, band_start = t.cluster_rank(), t.cluster() * band
        share = rank * splits + split
        first_piece = (share * pieces) // shares
        count = ((share + 1) * pieces) // shares - first_piece
        # Warps that wait for each other take as many steps, and the rest, up to a whole unit, as their tail.
        full = t.hidden(t.Word(pieces // shares // unit)) if stages else count // unit
        rows = [
            (band_start + group * group_rows + (row_in_tile + 8 * half)).min(out_features - 1)
            for half in halves
        ]
        starts = [row * pieces + first_piece for row in rows]
        code_rows = [codes.shifted(start * piece_bytes) for start in starts]

        def load_unit(number: Any) -> list[tuple[list, tuple]]:
            """Start the loads of a unit: for each row its codes, and one scale a thread."""
            loaded = []
            for row, start in zip(code_rows, starts, strict=True):
                words = decoder.load(t, row.shifted(number * (unit * piece_bytes)), quarter, unit)
                mine = start + number * unit + (quarter & (unit - 1))
                loaded.append((words, load_scale(t, scales, mine) if decoder.has_block_scales else ()))
            return loaded

        def load_tail(left: Any) -> list[tuple[list, tuple]]:
            """The same after the last whole unit, where `left` pieces are; further ones are those again."""
            loaded = []
            for row, start in zip(code_rows, starts, strict=True):
                at = row.shifted(full * (unit * piece_bytes) + columns * (piece_bytes // 4))
                words = []
                for index in range(unit):
                    offset = t.Word(index).min(left - 1) * piece_bytes
                    words += t.load_words(at, offset, decoder.words, once=True)
                mine = start + full * unit + quarter.min(left - 1)
                loaded.append((words, load_scale(t, scales, mine) if decoder.has_block_scales else ()))
            return loaded

        def from_cache(number: Any):
            """A function that loads the thread's 16 columns of a piece and a tile of tokens."""
            at = []
            for tile in range(token_tiles):
                token = row_in_tile + 8 * tile
                token = token.min(tokens - 1) if 8 * tile + 8 > tokens else token
                row = x.shifted(((token * pieces + first_piece) * COLUMNS + (columns << 4)) << 1)
                at.append(row.shifted(number * (unit * COLUMNS * 2)))

            def load(index: int, tile: int) -> list:
                offset = index * COLUMNS * 2
                return t.load_words(at[tile], offset, 4) + t.load_words(at[tile], offset + 16, 4)

            return load

        stage_bytes = unit * padded_tokens * COLUMNS * 2
        # A row of the table is a token's 64 columns, in eight parts that are permuted so that the lanes of
        # a load, and of a copy, meet different banks.
        parts = [(row_in_tile << 7) + ((((columns << 1) | half) ^ row_in_tile) << 4) for half in range(2)]

        def from_stage(number: Any):
            """The same from shared memory."""
            start = ((number % stages) * splits + split) * stage_bytes
            at = [shared.shifted(start + part) for part in parts]

            def load(index: int, tile: int) -> list:
                offset = (index * padded_tokens + 8 * tile) * COLUMNS * 2
                return t.load_words(at[0], offset, 4) + t.load_words(at[1], offset, 4)

            return load

        lanes_of_token = 8 * unit
        tokens_at_once = tuning.groups * (LANES // lanes_of_token)
        own_token = group * (LANES // lanes_of_token) + lane // lanes_of_token
        own_piece, own_part = (lane % lanes_of_token) >> 3, lane & 7
        x_source = x.shifted(
            ((own_token * pieces + first_piece) * COLUMNS << 1) + ((lane % lanes_of_token) << 4)
        )

        def start_x(number: Any) -> None:
            """Start copying a unit of `x`; the warps that share its columns do it together."""
            start = ((number % stages) * splits + split) * stage_bytes + own_piece * (padded_tokens * 128)
            source = x_source.shifted(number * (unit * COLUMNS * 2))
            is_inside = number * unit + own_piece < count  # the last unit may not be whole
            for first in range(0, tokens, tokens_at_once):
                token = own_token + first
                at = shared.shifted(start + (own_token << 7) + ((own_part ^ (token & 7)) << 4))
                needed = t.both(is_inside, token < tokens)
                if not has_tail and first + tokens_at_once <= tokens:
                    t.copy_async(at, first << 7, source, first * in_features * 2)
                else:
                    with t.when(needed):
                        t.copy_async(at, first << 7, source, first * in_features * 2)

        def multiply_piece(words: list, factors: list, xs: Any, totals: list) -> list:
            """Add the product of each row's `words` and ``xs(tile)`` to the totals."""
            totals = list(totals)
            # Of each tile of 16 rows: four steps of 16 columns, as PTX wants the first operand.
            a = [
                [
                    [words_pair(w, 2 * j + k) for k in range(2) for w in words[2 * r : 2 * r + 2]]
                    for j in range(4)
                ]
                for r in range(row_tiles)
            ]
            for tile in range(token_tiles):
                here = xs(tile)
                for r in range(row_tiles):
                    at = r * tile_totals + 4 * tile
                    old = totals[at : at + 4]
                    sums = [t.constant(0.0)] * 4 if decoder.has_block_scales else old
                    for j in range(4):
                        sums = t.mma(a[r][j], here[2 * j : 2 * j + 2], sums)
                    if decoder.has_block_scales:
                        sums = [t.fma(sums[k], factors[2 * r + k // 2], old[k]) for k in range(4)]
                    totals[at : at + 4] = sums
            return totals

        def factors_of(scales_of_row: list, index: int) -> list:
            source = (lane & 28) | index
            return [t.as_float(t.shuffle(scale, source)) for scale in scales_of_row]

        x_of_unit = [(index, tile) for index in range(unit) for tile in range(token_tiles)]
        first_x_of_unit = x_of_unit[: tuning.lookahead]

        def multiply_unit(loaded: list, coming: list, load_x: Any, load_next: Any, totals: list) -> tuple:
            """Add the products of a whole unit; start the next one's first loads of `x` if they are early."""
            words_of_row = [decoder.arrange(t, words, quarter) for words, _ in loaded]
            scales_of_row = [decoding.scale(raw) for _, raw in loaded if raw]
            coming = coming or [load_x(*item) for item in first_x_of_unit]
            waiting = [functools.partial(load_x, *item) for item in x_of_unit[tuning.lookahead :]]
            if tuning.early_x:
                waiting += [functools.partial(load_next, *item) for item in first_x_of_unit]

            def next_x(tile: int) -> list:
                if waiting:
                    coming.append(waiting.pop(0)())
                return coming.pop(0)

            for index in range(unit):
                words = [row[index] for row in words_of_row]
                totals = multiply_piece(words, factors_of(scales_of_row, index), next_x, totals)
            return coming, totals

        def multiply_tail(left: Any, totals: list) -> list:
            """Add the products of the pieces after the last whole unit, `left` of them."""
            if stages:
                wait_for_x()
            loaded = load_tail(left)
            scales_of_row = [decoding.scale(raw) for _, raw in loaded if raw]
            load_x = from_stage(full) if stages else from_cache(full)
            size = decoder.words
            for index in range(unit if stages else unit - 1):

                def one_piece(index: int = index, totals: list = totals) -> list:
                    words = [row[index * size : (index + 1) * size] for row, _ in loaded]
                    factors = factors_of(scales_of_row, index)
                    return multiply_piece(words, factors, lambda tile: load_x(index, tile), totals)

                totals = t.branch(t.Word(index) < left, totals, one_piece)
            return totals

        def wait_for_x() -> None:
            """Wait until all copies of this step are there, and none reads the stage that is written next."""
            t.wait_copies(stages - 2)
            t.barrier_among(split + 1, LANES * tuning.groups)

        units = full + 1 if has_tail else full
        if stages:
            for ahead in range(stages - 1):
                with t.when(t.both(works, t.Word(ahead) < units)):
                    start_x(t.Word(ahead))
                t.commit_copies()
        loaded = load_unit(t.Word(0))
        early = [from_cache(t.Word(0))(*item) for item in first_x_of_unit] if tuning.early_x else []
        decoding = decoder.start(t, scales, tables, warps)
        words_pair = decoding.pair
        t.barrier()
        layout = [(len(words), len(raw)) for words, raw in loaded]

        def flat(loaded: list, coming: list) -> list:
            values = [v for words, raw in loaded for v in (*words, *raw)]
            values += [word for words in coming for word in words]
            return [getattr(v, "value", v) for v in values]

        def unflat(values: list) -> tuple[list, list]:
            values, loaded = iter(values), []
            for count_of_words, count_of_raw in layout:
                words = [t.Word(next(values)) for _ in range(count_of_words)]
                raw = [next(values) for _ in range(count_of_raw)]
                loaded.append((words, tuple(raw)))
            coming = [[t.Word(next(values)) for _ in words] for words in early]
            return loaded, coming

        def one_step(step: Any, carry: list) -> list:
            if stages:
                wait_for_x()
                with t.when(step + (stages - 1) < units):
                    start_x(step + (stages - 1))
                t.commit_copies()
            following = (step + 1).min(full - 1)
            next_loaded = load_unit(following)
            loaded, coming = unflat(carry[:loads])
            load_x = from_stage(step) if stages else from_cache(step)
            load_next = from_cache(following) if tuning.early_x else None
            coming, totals = multiply_unit(loaded, coming, load_x, load_next, carry[loads:])
            return [*flat(next_loaded, coming), *totals]

        first = flat(loaded, early)
        loads = len(first)
        zeros = [t.constant(0.0)] * (row_tiles * tile_totals)
        steps = t.select(works, full, t.Word(0))
        totals = t.loop(steps, [*first, *zeros], one_step)[loads:]
        if has_tail:
            left = t.select(works, count - full * unit, t.Word(0))
            totals = t.branch(t.Word(0) < left, totals, lambda: multiply_tail(left, totals))
        if stages:
            t.barrier()  # the totals take the place of `x`
        with t.when(works):
            for r in range(row_tiles):
                for tile in range(token_tiles):
                    for k in range(4):
                        token = (quarter << 1) + (8 * tile + k % 2)
                        row = row_in_tile + (16 * r + 8 * (k // 2))
                        word = warp * group_words + token * padded_rows + row
                        t.store_float(shared, word << 2, totals[r * tile_totals + 4 * tile + k])
        results = -(-band * tokens // blocks_of_band)
        if blocks_of_band == 1:
            t.barrier()
        else:
            t.cluster_barrier()
        for first_index in range(0, results, threads):
            own = thread + first_index
            index = rank * results + own
            token, row = index // band, index % band
            at = band_start + row
            is_inside = t.both(t.both(own < results, index < band * tokens), at < out_features)
            with t.when(is_inside):
                start = (row // group_rows) * (splits * group_words) + token * padded_rows + row % group_rows
                value = t.constant(0.0)
                for peer in range(blocks_of_band):
                    for s in range(splits):
                        offset = (start + s * group_words) << 2
                        if blocks_of_band == 1:
                            part = t.load_shared_float(shared, offset)
                        else:
                            part = t.load_peer_float(shared, offset, peer)
                        value = t.add(value, part)
                if not decoder.has_block_scales:
                    scale = t.multiply(t.load_float(scales[0], at << 2), t.constant(_RECIPROCAL_127))
                    value = t.multiply(value, scale)
                t.store_bfloat16(out, (token * out_features + at) << 1, value)
        if blocks_of_band > 1:
            t.cluster_barrier()  # none leaves while another reads its totals

    return Kernel(
        body,
        shape=(tokens, out_features),
        dtype=jnp.bfloat16,
        grid=-(-out_features // band),
        warps=warps,
        scratch=(tuning.shared_words(tokens), *decoder.scratch),
        name=f"{decoder.name}_matmul_few_tokens",
        cluster=blocks_of_band,
    )
