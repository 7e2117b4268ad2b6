"""How the tiles of a product are shared out among blocks of threads, and how a block hands sums over.

Tiles rarely fill a whole number of waves. So each block first takes whole tiles and then an equal share of
the steps of the rest (stream-K, https://arxiv.org/abs/2301.03598): the block that has a tile's first step
waits for the sums of the others and adds them, always in the same order.
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
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from vlmlora_kernels.hopper import simt

_FEWEST_STEPS = 8  # of a block, if there are more blocks than tiles
_SHARING_STEPS = 6  # as long as it takes to hand a tile's sums over
_MOST_SHARING = 4  # blocks; one of them adds the sums of the others, one after the other


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which steps of which tiles each block of threads takes, in order.

    First come whole tiles, in turn. The steps of those that are left, one tile after the other, are cut into
    equal shares of the first blocks, or with none into whole tiles. Its methods take integers of Python or of
    JAX.

    Attributes:
        tiles: of the result.
        steps: along the summed axis of a tile.
        blocks: of threads.
        whole: tiles that each block takes whole.
        sharers: blocks that get an equal share of the rest; 0: that takes whole tiles too.
    """

    tiles: int
    steps: int
    blocks: int
    whole: int
    sharers: int

    @staticmethod
    def balanced(tiles: int, steps: int, most_blocks: int, split: bool) -> "Schedule":
        """The schedule that ends soonest.

        Args:
            tiles: of the result.
            steps: of a tile.
            most_blocks: that run at a time.
            split: allow shared tiles.
        """
        waves, rest = divmod(tiles, most_blocks)
        # Without sharing, the last wave lasts as long as a whole one.
        gain = steps * (1 - rest / most_blocks) if rest else 0
        if not split or gain <= _SHARING_STEPS:
            return Schedule(tiles, steps, min(tiles, most_blocks), waves, 0)
        blocks = max(1, min(most_blocks, tiles * steps // _FEWEST_STEPS))
        # At least a tile for each block is left, so that no more than two or three share one.
        return Schedule(tiles, steps, blocks, max(0, tiles // blocks - 1), blocks)

    @staticmethod
    def in_step(tiles: int, steps: int, most_blocks: int) -> "Schedule":
        """A schedule in which blocks are at the same steps of their tiles, or at a few.

        So what several tiles read at a step is read at about the same time, and but once from memory. Only
        the tiles of a last wave that is half empty or more are shared, each by as many blocks.

        Args:
            tiles: of the result.
            steps: of a tile.
            most_blocks: that run at a time.
        """
        waves, rest = divmod(tiles, most_blocks)
        sharing = min(_MOST_SHARING, most_blocks // rest, steps // _FEWEST_STEPS) if rest else 0
        if sharing < 2 or steps * (1 - 1 / sharing) <= _SHARING_STEPS:
            return Schedule(tiles, steps, min(tiles, most_blocks), waves, 0)
        return Schedule(tiles, steps, most_blocks if waves else rest * sharing, waves, rest * sharing)

    @property
    def shared(self) -> int:
        """Steps that are cut into shares."""
        return (self.tiles - self.whole * self.blocks) * self.steps

    def first(self, block: Any) -> Any:
        """The first of the shared steps that a block takes; those of the next block follow its own."""
        if self.sharers:
            return jnp.minimum(block, self.sharers) * self.shared // self.sharers
        return jnp.minimum(block * self.steps, self.shared)

    def count(self, block: Any) -> Any:
        """How many steps a block takes."""
        return self.whole * self.steps + self.first(block + 1) - self.first(block)

    def pieces(self, block: Any) -> Any:
        """Of how many tiles these are."""
        return self.whole + pl.cdiv(self.first(block + 1), self.steps) - self.first(block) // self.steps

    def position(self, block: Any, number: Any) -> tuple:
        """A block's step of this number: tile, and step of the tile."""
        own = self.whole * self.steps
        is_whole = number < own
        step = jnp.where(is_whole, number, number - own + self.first(block))
        tile = step // self.steps
        return jnp.where(
            is_whole, tile * self.blocks + block, self.whole * self.blocks + tile
        ), step % self.steps

    def piece(self, block: Any, number: Any) -> tuple:
        """A block's tile of this number: the block's first step of it, its end, and whether the tile starts
        and ends with them."""
        first, last = self.first(block), self.first(block + 1)
        start = (first // self.steps + number - self.whole) * self.steps
        stop = start + self.steps
        own = self.whole * self.steps - first
        is_whole = number < self.whole
        begin = jnp.where(is_whole, number * self.steps, jnp.maximum(start, first) + own)
        end = jnp.where(is_whole, (number + 1) * self.steps, jnp.minimum(stop, last) + own)
        return begin, end, is_whole | (start >= first), is_whole | (stop <= last)

    def last_sharing(self, block: Any) -> Any:
        """The last block that has steps of the tile of which `block` has the first one, and not the last."""
        stop = ((self.first(block + 1) - 1) // self.steps + 1) * self.steps
        return (stop * self.sharers - 1) // self.shared


@dataclasses.dataclass(frozen=True)
class Shares:
    """Where the warpgroups of blocks hand over their sums of tiles that are shared.

    Attributes:
        sums: in global memory, one row a share; None if no tile is shared.
        ready: semaphores that count to one when a share is there.
        first: number of the first share's semaphore.
        place: of a block, the number of this warpgroup's share.
    """

    sums: Any
    ready: Any
    first: int
    place: Callable[[Any], Any]

    def hand_over(self, block: Any, result: jax.Array) -> None:
        """Store this warpgroup's sums and say so."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def store(_, ref: Any, result: fragments.FragmentedArray) -> None:
            store_sums(simt, simt.Pointer(ref, simt.GLOBAL), pairs_of(result))

        store(self.sums.at[self.place(block)], result)
        plgpu.semaphore_signal(self.ready.at[self.first + self.place(block)], memory_scope="gpu")

    def add(self, block: Any, result: jax.Array) -> jax.Array:
        """`result` and another block's sums, when they are there."""
        plgpu.semaphore_wait(self.ready.at[self.first + self.place(block)], memory_scope="gpu")

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA),
            return_type=plgpu.ShapeDtypeStruct(result.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
        )
        def add(_, ref: Any, result: fragments.FragmentedArray) -> fragments.FragmentedArray:
            return in_wgmma_layout(add_sums(simt, simt.Pointer(ref, simt.GLOBAL), pairs_of(result)))

        return add(self.sums.at[self.place(block)], result)


def compute_pieces(
    schedule: Schedule,
    block: Any,
    shares: Shares,
    place: Callable[[Any], tuple],
    product: Callable[[Any, Any], jax.Array],
    write: Callable[[tuple, jax.Array], None],
) -> None:
    """Compute a block's tiles, and hand over what it has of one that another block starts.

    Args:
        schedule: of all blocks.
        block: whose turn it is.
        shares: where sums are handed over.
        place: of a block's step, where its tile is.
        product: the sum over a block's steps from the first argument up to the second.
        write: write a tile's result to its place.
    """

    def one(number: Any, _: None) -> None:
        start, end, starts, ends = schedule.piece(block, number)
        there = place(start)
        result = product(start, end)
        if not schedule.sharers:
            return write(there, result)

        @pl.when(jnp.logical_not(starts))
        def part() -> None:
            shares.hand_over(block, result)

        @pl.when(starts)
        def whole() -> None:
            last = jnp.where(ends, block, schedule.last_sharing(block))
            write(there, lax.fori_loop(block + 1, last + 1, shares.add, result))

    lax.fori_loop(0, schedule.pieces(block), one, None)


def store_sums(t: ModuleType, sums: Any, values: list[list]) -> None:
    """Write a warpgroup's sums, pairs of float32, 16 bytes a thread at a time."""
    thread = t.thread() & 127
    for i in range(0, len(values), 2):
        words = [t.as_word(value) for pair in values[i : i + 2] for value in pair]
        t.store_words(sums, (thread << 4) + 1024 * i, words)


def add_sums(t: ModuleType, sums: Any, values: list[list]) -> list[list]:
    """`values` and what `store_sums` wrote, added."""
    thread = t.thread() & 127
    result = []
    for i in range(0, len(values), 2):
        words = [t.as_float(word) for word in t.load_written(sums, (thread << 4) + 1024 * i, 4)]
        for pair, others in zip(values[i : i + 2], (words[:2], words[2:]), strict=True):
            result.append([t.add(value, other) for value, other in zip(pair, others, strict=True)])
    return result


def in_wgmma_layout(pairs: list[list[ir.Value]]) -> fragments.FragmentedArray:
    """What a thread holds, as a float32 array of 64 rows."""
    type_ = ir.VectorType.get((2,), simt.f32())
    registers = np.empty((1, len(pairs) // 2, 1, 1, 2, 1, 1, 1, 1), dtype=object)
    registers.flat = [vector.from_elements(type_, pair) for pair in pairs]
    return fragments.FragmentedArray(_registers=registers, _layout=fragments.WGMMA_LAYOUT, _is_signed=None)


def pairs_of(array: fragments.FragmentedArray) -> list[list[ir.Value]]:
    """What a thread holds of a float32 array in this layout."""
    positions = [ir.DenseI64ArrayAttr.get([i]) for i in range(2)]
    return [
        [vector.extract(register, dynamic_position=[], static_position=at) for at in positions]
        for register in array.registers.flat
    ]
