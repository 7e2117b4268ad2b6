"""``x @ W.T`` for few tokens and a 4-bit or 8-bit W that is read once, on a Hopper GPU.

Each block of threads owns a band of W's rows, its warps some of those rows and a share of the columns each.
A warp walks along its columns by itself: it keeps the codes of the next columns in flight in registers,
turns each byte into two bfloat16 with a table in shared memory, and multiplies with the tensor cores
(``mma.m16n8k16``: rows of W by tokens). The sum over the 64 columns of a block of codes is multiplied by
the block's float32 scale and added to the total. So W is rounded once, to the bfloat16 of its 16 values,
and the scales are not rounded at all. At the end the warps that share rows add their totals, always in the
same order.

Which column stands where inside the 64 does not matter to a sum: thread `t` of a row's four takes the 16
columns from ``16 * t`` on, so codes and `x` come in wide, contiguous loads.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlmlora_kernels.hopper.dequantize import LANES, NESTED_CODES, load_scale
from vlmlora_kernels.hopper.launch import Kernel

COLUMNS = 64  # of a piece: one block of codes
UNIT = 4  # pieces that are loaded together
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
    """

    groups: int
    splits: int
    row_tiles: int = 1
    lookahead: int = 3

    @property
    def rows(self) -> int:
        """Rows of a band."""
        return 16 * self.row_tiles * self.groups

    @property
    def warps(self) -> int:
        """Warps of a block, in whole warpgroups; those beyond ``groups * splits`` idle."""
        return -(-self.groups * self.splits // 4) * 4


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
        shape: (out, in); `in` a multiple of 64, with 256 columns or more for each of the `splits`.
        tuning: how the work is cut.
    """
    out_features, in_features = shape
    token_tiles = -(-tokens // 8)
    row_tiles, splits, warps, band = tuning.row_tiles, tuning.splits, tuning.warps, tuning.rows
    group_rows = 16 * row_tiles
    threads = warps * LANES
    pieces = in_features // COLUMNS
    piece_bytes = 16 * decoder.words
    has_tail = pieces % (UNIT * splits) != 0
    padded = group_rows + 4  # so that the lanes of a store meet different banks
    group_words = 8 * token_tiles * padded
    tile_totals = 4 * token_tiles

    def body(t: ModuleType, inputs: list, out: Any, scratch: list) -> None:
        x, codes, *scales = inputs
        partial, *tables = scratch
        thread, lane, warp = t.thread(), t.lane(), t.warp()
        row_in_tile, quarter = lane >> 2, lane & 3
        group, split = warp // splits, warp % splits
        first_piece = (split * pieces) // splits
        count = ((split + 1) * pieces) // splits - first_piece
        full = count >> 2
        band_start = t.block() * band
        rows = [
            (band_start + group * group_rows + (row_in_tile + 8 * half)).min(out_features - 1)
            for half in range(2 * row_tiles)
        ]
        blocks = [row * pieces + first_piece for row in rows]
        code_bases = [codes.shifted(start * piece_bytes + quarter * (piece_bytes // 4)) for start in blocks]
        x_bases = []
        for tile in range(token_tiles):
            token = row_in_tile + 8 * tile
            token = token.min(tokens - 1) if 8 * tile + 8 > tokens else token
            x_bases.append(x.shifted(((token * pieces + first_piece) * COLUMNS + (quarter << 4)) << 1))

        def load_unit(unit: Any, left: Any = None) -> list:
            """Start the loads of a unit: for each row its codes and one of its four scales."""
            loaded = []
            for base, start in zip(code_bases, blocks, strict=True):
                at = base.shifted(unit * (UNIT * piece_bytes))
                for index in range(UNIT):
                    # Past its last piece a warp reads that one again.
                    offset = (
                        index * piece_bytes if left is None else t.Word(index).min(left - 1) * piece_bytes
                    )
                    loaded += [w.value for w in t.load_words(at, offset, decoder.words, once=True)]
                if decoder.has_block_scales:
                    mine = quarter if left is None else quarter.min(left - 1)
                    raw = load_scale(t, scales, start + unit * UNIT + mine)
                    loaded += [getattr(value, "value", value) for value in raw]
            return loaded

        def multiply_unit(decoding: Any, loaded: list, unit: Any, totals: list, left: Any = None) -> list:
            """Add the products of a unit's pieces to the totals."""
            size = UNIT * decoder.words
            each = len(loaded) // (2 * row_tiles)
            codes_of_row = [[t.Word(v) for v in loaded[at : at + size]] for at in range(0, len(loaded), each)]
            scale_of_row = [
                decoding.scale(tuple(loaded[at + size : at + each]))
                for at in range(0, len(loaded), each)
                if decoder.has_block_scales
            ]
            x_at = [base.shifted(unit * (UNIT * COLUMNS * 2)) for base in x_bases]

            def load_x(item: int) -> list:
                index, tile = divmod(item, token_tiles)
                offset = index * COLUMNS * 2
                return t.load_words(x_at[tile], offset, 4) + t.load_words(x_at[tile], offset + 16, 4)

            def multiply_piece(index: int, xs: Any, totals: list) -> list:
                totals = list(totals)
                words = [row[index * decoder.words : (index + 1) * decoder.words] for row in codes_of_row]
                # Of each tile of 16 rows: four steps of 16 columns, as PTX wants the first operand.
                a = [
                    [
                        [decoding.pair(w, 2 * j + k) for k in range(2) for w in words[2 * r : 2 * r + 2]]
                        for j in range(4)
                    ]
                    for r in range(row_tiles)
                ]
                source = (lane & 28) | index
                factors = [t.as_float(t.shuffle(scale, source)) for scale in scale_of_row]
                for tile in range(token_tiles):
                    here = xs(index * token_tiles + tile)
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

            if left is not None:
                for index in range(UNIT - 1):

                    def one_piece(index: int = index, totals: list = totals) -> list:
                        return multiply_piece(index, load_x, totals)

                    totals = t.branch(t.Word(index) < left, totals, one_piece)
                return totals
            items = UNIT * token_tiles
            coming = [load_x(item) for item in range(min(tuning.lookahead, items))]

            def next_x(item: int) -> list:
                if item + tuning.lookahead < items:
                    coming.append(load_x(item + tuning.lookahead))
                return coming.pop(0)

            for index in range(UNIT):
                totals = multiply_piece(index, next_x, totals)
            return totals

        works = warp < tuning.groups * splits
        loaded = load_unit(t.Word(0))
        decoding = decoder.start(t, scales, tables, warps)
        t.barrier()

        def one_step(step: Any, carry: list) -> list:
            following = load_unit((step + 1).min(full - 1))
            return [*following, *multiply_unit(decoding, carry[: len(loaded)], step, carry[len(loaded) :])]

        zeros = [t.constant(0.0)] * (row_tiles * tile_totals)
        steps = t.select(works, full, t.Word(0))
        totals = t.loop(steps, [*loaded, *zeros], one_step)[len(loaded) :]
        if has_tail:
            left = t.select(works, count & 3, t.Word(0))

            def tail() -> list:
                return multiply_unit(decoding, load_unit(full, left), full, totals, left)

            totals = t.branch(t.Word(0) < left, totals, tail)
        with t.when(works):
            for r in range(row_tiles):
                for tile in range(token_tiles):
                    for k in range(4):
                        token = (quarter << 1) + (8 * tile + k % 2)
                        word = warp * group_words + token * padded + (row_in_tile + (16 * r + 8 * (k // 2)))
                        t.store_float(partial, word << 2, totals[r * tile_totals + 4 * tile + k])
        t.barrier()
        for first in range(0, band * tokens, threads):
            index = thread + first
            token, row = index // band, index % band
            at = band_start + row
            with t.when(t.both(at < out_features, index < band * tokens)):
                start = (row // group_rows) * (splits * group_words) + token * padded + row % group_rows
                value = t.constant(0.0)
                for s in range(splits):
                    value = t.add(value, t.load_shared_float(partial, (start + s * group_words) << 2))
                if not decoder.has_block_scales:
                    scale = t.multiply(t.load_float(scales[0], at << 2), t.constant(_RECIPROCAL_127))
                    value = t.multiply(value, scale)
                t.store_bfloat16(out, (token * out_features + at) << 1, value)

    return Kernel(
        body,
        shape=(tokens, out_features),
        dtype=jnp.bfloat16,
        grid=-(-out_features // band),
        warps=warps,
        scratch=(tuning.groups * splits * group_words, *decoder.scratch),
        name=f"{decoder.name}_matmul_few_tokens",
    )
