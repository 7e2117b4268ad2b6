"""4-bit codes to bfloat16 or float32 at the speed of memory, on a Hopper GPU.

A thread loads 4 bytes (8 elements), looks each nibble up in a table of 16 float32 in shared memory,
multiplies by the scale in float32, rounds once and writes 16 bytes; its neighbours do the same for the next
4 bytes, so loads and stores are contiguous across a warp. A block of threads does this `rounds` times, with
all loads under way at once. The table has a column for every lane, so that lanes never wait for each
other's bank. The matrix is flat: a block of codes that straddles two rows needs no care.

Dense matrices may stand to the right of the decoded one and below it, in one result (`Frame`): further
threads copy them.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vlmlora_kernels.hopper.launch import Kernel

BLOCKSIZE = 64
ELEMENTS = 8  # of a word of codes
NESTED_CODES = 256
LANES = 32


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        warps: warps of a block of threads; a multiple of 4.
        rounds: words of codes that a thread has in flight.
    """

    warps: int = 4
    rounds: int = 8


@dataclasses.dataclass(frozen=True)
class Frame:
    """bfloat16 matrices around the decoded one; every number of columns is a multiple of 8.

    Of either the upper left part may be given alone, or to the right one that begins at a later column; the
    rest is zeros. What is given may have more rows, or below more columns, than are taken of it.

    Attributes:
        rows: of the decoded matrix.
        columns: of the decoded matrix.
        right: columns of the matrix to its right.
        below: rows of the matrix below, which is as wide as both together.
        right_start: the first of the columns to the right that are given.
        right_given: how many are.
        below_given: how many rows below are given.
        below_pitch: columns of what is given below.
    """

    rows: int
    columns: int
    right: int
    below: int
    right_start: int
    right_given: int
    below_given: int
    below_pitch: int

    @property
    def pitch(self) -> int:
        """Elements from row to row of the result."""
        return self.columns + self.right

    @property
    def right_words(self) -> int:
        """Words of 8 elements to the right."""
        return self.rows * self.right // ELEMENTS

    @property
    def below_words(self) -> int:
        """Words of 8 elements below."""
        return self.below * self.pitch // ELEMENTS

    def place(self, index: Any) -> Any:
        """Byte at which the decoded matrix's word `index` goes."""
        if not self.right:
            return index << 4
        return (index << 4) + (index // (self.columns // ELEMENTS)) * (2 * self.right)

    def place_right(self, index: Any) -> Any:
        """Byte at which word `index` of the matrix to the right goes."""
        width = self.right // ELEMENTS
        return (index // width) * (2 * self.pitch) + ((index % width) << 4) + 2 * self.columns

    def place_below(self, index: Any) -> Any:
        """Byte at which word `index` of the matrix below goes."""
        return (index + self.rows * self.pitch // ELEMENTS) << 4

    def source_right(self, t: ModuleType, index: Any) -> tuple[Any, Any]:
        """Whether word `index` of the matrix to the right is given (None: all are), and its number there."""
        width, given = self.right // ELEMENTS, self.right_given // ELEMENTS
        if given == width:
            return None, index
        column = index % width - self.right_start // ELEMENTS
        return column < given, (index // width) * given + column

    def source_below(self, t: ModuleType, index: Any) -> tuple[Any, Any]:
        """Likewise of the matrix below."""
        width, given = self.pitch // ELEMENTS, self.below_pitch // ELEMENTS
        row, column = index // width, index % width
        if given == width and self.below_given >= self.below:
            return None, index
        return t.both(row < self.below_given, column < given), row * given + column


def dequantize(
    book: np.ndarray,
    *,
    size: int,
    dtype: DTypeLike,
    nested: bool,
    frame: Frame | None = None,
    tuning: Tuning | None = None,
) -> Kernel:
    """The kernel that decodes `size` elements.

    Its inputs are the codes, uint8 [size / 2], then the scales: float32 [blocks], or the four arrays of
    doubly quantised scales, then what is given of the frame's matrices to the right and below, as far as they
    have any elements. Its result is flat.

    Args:
        book: the 16 values.
        size: elements, a multiple of 8; blocks have 64.
        dtype: bfloat16 or float32.
        nested: the scales are doubly quantised.
        frame: what stands around the decoded matrix; bfloat16 only.
        tuning: how the work is cut.
    """
    tuning = tuning or Tuning()
    threads = LANES * tuning.warps
    words = size // ELEMENTS
    per_block = threads * tuning.rounds
    whole = words % per_block == 0
    is_wide = jnp.dtype(dtype) == jnp.float32
    decoding_blocks = -(-words // per_block)
    parts = []  # of the frame: words, where each goes, where it is given, and whether any is
    if frame is not None:
        parts = [
            (frame.right_words, frame.place_right, frame.source_right, frame.right_given > 0),
            (frame.below_words, frame.place_below, frame.source_below, frame.below_given > 0),
        ]
        parts = [part for part in parts if part[0]]
    blocks = [-(-count // threads) for count, *_ in parts]
    given_parts = sum(is_given for *_, is_given in parts)

    def body(t: ModuleType, inputs: list, out: Any, scratch: list) -> None:
        if not parts:
            decode(t, inputs, out, scratch)
            return
        own = len(inputs) - given_parts
        inputs, beside = inputs[:own], iter(inputs[own:])
        with t.when(t.block() < decoding_blocks):
            decode(t, inputs, out, scratch)
        first = decoding_blocks
        for (count, place, source, is_given), size in zip(parts, blocks, strict=True):
            index = (t.block() - first) * threads + t.thread()
            with t.when(t.both(t.Word(first - 1) < t.block(), index < count)):
                words = [t.Word(0)] * 4
                if is_given:
                    is_there, number = source(t, index)
                    if is_there is not None:
                        number = t.select(is_there, number, t.Word(0))
                    loaded = t.load_words(next(beside), number << 4, 4)
                    words = [
                        word if is_there is None else t.select(is_there, word, t.Word(0)) for word in loaded
                    ]
                t.store_words(out, place(index), words)
            first += size

    def decode(t: ModuleType, inputs: list, out: Any, scratch: list) -> None:
        codes, *scales = inputs
        table, scale_table = scratch
        thread = t.thread()
        indices = [t.block() * per_block + thread + i * threads for i in range(tuning.rounds)]
        safe = indices if whole else [index.min(words - 1) for index in indices]
        loaded = [t.load_words(codes, index << 2, 1, once=True)[0] for index in safe]
        raw_scales = [load_scale(t, scales, index >> 3) for index in safe]
        offset = load_offset(t, scales)
        if nested:
            t.fill(scale_table, scales[2], NESTED_CODES, thread, threads)
        fill_table(t, table, book, thread, tuning.warps)
        t.barrier()
        for index, word, raw in zip(indices, loaded, raw_scales, strict=True):
            scale = decode_scale(t, offset, scale_table, raw)
            values = _decode_word(t, table, word, scale)
            if whole:
                _write(t, out, index, values, is_wide, frame)
            else:
                with t.when(index < words):
                    _write(t, out, index, values, is_wide, frame)

    return Kernel(
        body,
        shape=(size + ELEMENTS * sum(count for count, *_ in parts),),
        dtype=dtype,
        grid=decoding_blocks + sum(blocks),
        warps=tuning.warps,
        scratch=(16 * LANES, NESTED_CODES if nested else 1),
        name="nf4_dequantize",
    )


def load_scale(t: ModuleType, scales: list, number: Any) -> tuple:
    """Start loading the scale of a block: the scale itself, or its code and the scale of that."""
    if len(scales) == 1:
        return (t.load_float(scales[0], number << 2),)
    return t.load_byte(scales[0], number), t.load_float(scales[1], (number >> 8) << 2)


def load_offset(t: ModuleType, scales: list) -> Any:
    """Start loading what is added to every nested scale; None if the scales are not nested."""
    return t.load_float(scales[3], 0) if len(scales) > 1 else None


def decode_scale(t: ModuleType, offset: Any, scale_table: Any, raw: tuple) -> Any:
    """The scale whose loading was started: for a nested one a product, then a sum, each rounded."""
    if len(raw) == 1:
        return raw[0]
    code = t.load_shared_float(scale_table, raw[0] << 2)
    return t.add(t.multiply(code, raw[1]), offset)


def fill_table(t: ModuleType, table: Any, book: np.ndarray, thread: Any, warps: int) -> None:
    """Write the 16 values once for every lane: value `c` of lane `l` is word ``32 * c + l``."""
    warp = thread >> 5
    for first in range(0, 16, warps):
        mine = book[first : first + warps]
        value = t.constant(float(mine[0]))
        for i in range(1, len(mine)):
            value = t.select(warp.equals(i), t.constant(float(mine[i])), value)
        with t.when(warp < len(mine)):
            t.store_float(table, (thread + first * LANES) << 2, value)


def _decode_word(t: ModuleType, table: Any, word: Any, scale: Any) -> list:
    """The 8 float32 behind a word of codes, in the order of elements, times their scale."""
    own_column = t.lane() << 2
    values = []
    for nibble in range(ELEMENTS):
        # The first element of a byte is its high nibble; 7 bits are the bytes of a value's row of the table.
        shift = 8 * (nibble // 2) + (4 if nibble % 2 == 0 else 0) - 7
        moved = word >> shift if shift > 0 else word << -shift
        values.append(t.multiply(t.load_shared_float(table, (moved & 0x780) | own_column), scale))
    return values


def _write(t: ModuleType, out: Any, index: Any, values: list, is_wide: bool, frame: Frame | None) -> None:
    if is_wide:
        bits = [t.as_word(value) for value in values]
        t.store_words(out, index << 5, bits[:4])
        t.store_words(out, (index << 5) + 16, bits[4:])
    else:
        place = index << 4 if frame is None else frame.place(index)
        t.store_words(out, place, pack(t, values))


def pack(t: ModuleType, values: list) -> list:
    """Float32 rounded to bfloat16, two in a word."""
    return [t.pack_bfloat16(*values[i : i + 2]) for i in range(0, len(values), 2)]
