"""The scales of a 4-bit weight, decoded into shared memory by the warpgroup that copies the codes there.

A step's tile has the codes of 128 rows of W and 64 columns, or of 64 rows and 128 columns: 128 scales, one
for each thread. Those of 64 rows come from memory at each step, so that they are loaded a few steps ahead.
"""

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from vlmlora_kernels.hopper import simt
from vlmlora_kernels.hopper.dequantize import (
    BLOCKSIZE,
    NESTED_CODES,
    decode_scale,
    load_offset,
    load_scale,
)

THREADS = 128  # of a warpgroup
_BARRIER = 14  # Mosaic GPU takes the low numbers, and `simt.barrier_of` the last


@dataclasses.dataclass(frozen=True)
class TileScales:
    """What the threads of a warpgroup do with the scales of the tiles of a weight.

    The scales are references to global memory: float32 [out * in / 64], or the four arrays of doubly
    quantised ones.

    Attributes:
        shape: (out, in) of W; `in` a multiple of 64.
        transposed: a tile has 64 rows of W and 128 columns, and not 128 rows and 64 columns.
        nested: the scales are doubly quantised.
    """

    shape: tuple[int, int]
    transposed: bool
    nested: bool

    @property
    def count(self) -> int:
        """Arrays that the scales are."""
        return 4 if self.nested else 1

    @property
    def tile(self) -> tuple[int, int]:
        """Shape of a tile's scales in shared memory, float32."""
        return (2, BLOCKSIZE) if self.transposed else (1, THREADS)

    @property
    def table(self) -> Any:
        """Shared memory for the values of nested scales."""
        return plgpu.SMEM((NESTED_CODES if self.nested else 1,), jnp.float32)

    def load(self, scales: Sequence[Any], row: Any, block: Any) -> jax.Array:
        """Start loading the scales of the tile that begins at this row and block of W; for `write`."""
        words = 2 if self.nested else 1

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),) * self.count + (plgpu.Layout.WG_SPLAT,) * 2,
            return_type=_type_of_threads(words),
        )
        def run(_, *given: Any) -> fragments.FragmentedArray:
            pointers = [simt.Pointer(ref, simt.GLOBAL) for ref in given[:-2]]
            first = [simt.Word(index.registers.item()) for index in given[-2:]]
            return _of_threads(load_tile_scale(simt, pointers, first, self.shape, self.transposed))

        return run(*scales, row, block)

    def load_offset(self, scales: Sequence[Any]) -> list[jax.Array]:
        """Start loading what is added to each nested scale; none if they are not nested."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * self.count, return_type=_type_of_threads(1))
        def run(_, *refs: Any) -> fragments.FragmentedArray:
            offset = load_offset(simt, [simt.Pointer(ref, simt.GLOBAL) for ref in refs])
            return _of_threads([simt.as_word(offset)])

        return [run(*scales)] if self.nested else []

    def fill_table(self, table: Any, scales: Sequence[Any]) -> None:
        """Write the values of nested scales to shared memory, and wait until that is done."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def run(_, target: Any, source: Any) -> None:
            target, source = simt.Pointer(target, simt.SHARED), simt.Pointer(source, simt.GLOBAL)
            simt.fill(target, source, NESTED_CODES, simt.thread() & (THREADS - 1), THREADS)
            simt.barrier_among(simt.Word(_BARRIER), THREADS)

        if self.nested:
            run(table, scales[2])

    def write(self, table: Any, target: Any, raw: jax.Array, offset: Sequence[jax.Array]) -> None:
        """Decode a tile's scales that `load` has loaded; of all, the offset."""
        arrays = (raw, *offset)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), *[_layout(each.shape[0]) for each in arrays])
        )
        def run(_, table: Any, target: Any, *arrays: fragments.FragmentedArray) -> None:
            table, target = (simt.Pointer(ref, simt.SHARED) for ref in (table, target))
            words = [word for array in arrays for word in _words_of_thread(array)]
            write_tile_scale(simt, table, target, words)

        run(table, target, *arrays)


def load_tile_scale(
    t: ModuleType, scales: Sequence[Any], first: Sequence[Any], shape: tuple[int, int], transposed: bool
) -> list:
    """Start loading a thread's scale of a tile: one word, or of doubly quantised scales two, the code and the
    scale of that.

    Args:
        t: `simt`.
        scales: of all blocks.
        first: row of W, and block in it. What is beyond W gets a scale of its last row or block.
        shape: (out, in) of W.
        transposed: as of `TileScales`.
    """
    row_blocks = shape[1] // BLOCKSIZE
    index = t.thread() & (THREADS - 1)
    row, block = (index & (BLOCKSIZE - 1), index >> 6) if transposed else (index, 0)
    row, block = (first[0] + row).min(shape[0] - 1), (first[1] + block).min(row_blocks - 1)
    raw = load_scale(t, scales, row * row_blocks + block)
    return [raw[0], t.as_word(raw[1])] if len(raw) > 1 else [t.as_word(raw[0])]


def write_tile_scale(t: ModuleType, table: Any, target: Any, raw: Sequence[Any]) -> None:
    """Decode what `load_tile_scale` has loaded, and write it to its place in the tile.

    Args:
        t: `simt`.
        table: shared memory with the values of nested scales.
        target: of the tile, float32.
        raw: the words, and of nested scales what is added to all.
    """
    scale = t.as_float(raw[0])
    if len(raw) > 1:
        code, nested, offset = raw
        scale = decode_scale(t, t.as_float(offset), table, (code, t.as_float(nested)))
    t.store_float(target, (t.thread() & (THREADS - 1)) << 2, scale)


def _layout(size: int) -> Any:
    return plgpu.Layout.WG_STRIDED((size,), vec_size=1)


def _type_of_threads(words: int) -> Any:
    return plgpu.ShapeDtypeStruct((THREADS * words,), jnp.int32, layout=_layout(THREADS * words))


def _of_threads(words: Sequence[simt.Word]) -> fragments.FragmentedArray:
    """Words of each thread of a warpgroup as an array."""
    type_ = ir.VectorType.get((1,), simt.i32())
    registers = np.empty((len(words),), dtype=object)
    registers[:] = [vector.from_elements(type_, [word.value]) for word in words]
    layout = fragments.WGStridedFragLayout((THREADS * len(words),), vec_size=1)
    return fragments.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _words_of_thread(array: fragments.FragmentedArray) -> list[simt.Word]:
    at = ir.DenseI64ArrayAttr.get([0])
    return [
        simt.Word(vector.extract(register, dynamic_position=[], static_position=at))
        for register in array.registers.flat
    ]
