"""The scales of a 4-bit weight, decoded and transposed, for a kernel that wants those of many rows at once.

A thread takes a few neighbouring blocks of one row, its neighbours those of the next rows, so that what they
write is contiguous.
"""

from types import ModuleType
from typing import Any

import jax.numpy as jnp

from vlmlora_kernels.hopper.dequantize import BLOCKSIZE, LANES, NESTED_CODES, decode_scale, load_scale
from vlmlora_kernels.hopper.launch import Kernel

_WARPS = 4
_RUN = 8  # blocks of a row that a thread takes


def scales_by_column(shape: tuple[int, int], *, nested: bool) -> Kernel:
    """The kernel that writes the scales of a weight of `shape` [out, in] as float32 [in / 64, out].

    Its inputs are the scales: float32 [out * in / 64], or the four arrays of doubly quantised scales.

    Args:
        shape: (out, in); `in` a multiple of 64.
        nested: the scales are doubly quantised.
    """
    rows, columns = shape[0], shape[1] // BLOCKSIZE
    threads = LANES * _WARPS
    row_groups = -(-rows // threads)
    has_words = nested and columns % 4 == 0

    def load_run(t: ModuleType, scales: list, row: Any, first: Any) -> list[tuple]:
        """Start loading a thread's run; what would be beyond the row is its last ones again."""
        start = row * columns
        if not has_words:
            return [load_scale(t, scales, start + (first + i).min(columns - 1)) for i in range(_RUN)]
        found = []
        for i in range(0, _RUN, 4):
            number = start + (first + i).min(columns - 4)
            (word,) = t.load_words(scales[0], number, 1)
            for j in range(4):
                code = t.permute(word, t.Word(0), 0x4440 | j)
                found.append((code, t.load_float(scales[1], ((number + j) >> 8) << 2)))
        return found

    def body(t: ModuleType, scales: list, out: Any, scratch: list) -> None:
        (scale_table,) = scratch
        own = (t.block() % row_groups) * threads + t.thread()
        first = (t.block() // row_groups) * _RUN
        loaded = load_run(t, scales, own.min(rows - 1), first)
        if nested:
            t.fill(scale_table, scales[2], NESTED_CODES, t.thread(), threads)
            t.barrier()
        for i, raw in enumerate(loaded):
            scale = decode_scale(t, scales, scale_table, raw)
            with t.when(t.both(own < rows, first + i < columns)):
                t.store_float(out, ((first + i) * rows + own) << 2, scale)

    return Kernel(
        body,
        shape=(columns, rows),
        dtype=jnp.float32,
        grid=row_groups * -(-columns // _RUN),
        warps=_WARPS,
        scratch=(NESTED_CODES if nested else 1,),
        name="nf4_scales",
    )
