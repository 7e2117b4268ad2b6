"""How the tiles of a product are shared out among blocks of threads, and how a block hands sums over.

Tiles rarely fill a whole number of waves. So each block first takes whole tiles and then a share of the steps
of the rest (stream-K, https://arxiv.org/abs/2301.03598): the block that has a tile's first step waits for the
sums of the others and adds them, always in the same order.
"""

import dataclasses
import functools
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
_LEAD = 4  # steps that a head is longer than an equal share, for the time that helpers take to hand sums over
_LONG = 96  # steps of a tile, from which on it pays that blocks are at the same ones
_MOST_SHARING = 4  # blocks; one of them adds the sums of the others, one after the other


def _quotient(a: Any, b: Any) -> Any:
    """``a // b`` of integers of Python or of JAX, none of them negative.

    That operator looks at signs, for which Pallas starts a compiler each time it is lowered (jax 0.11).
    """
    return lax.div(a, b) if isinstance(a, jax.Array) else a // b


def _remainder(a: Any, b: Any) -> Any:
    """``a % b`` of the same."""
    return lax.rem(a, b) if isinstance(a, jax.Array) else a % b


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which steps of which tiles each block of threads takes, in order.

    First come whole tiles, in turn. Of each tile that is left the first steps, its head, may be one block's;
    the others, one tile after the other, are cut into equal parts of the remaining blocks, the helpers. Its
    methods take integers of Python or of JAX.

    Heads are all at the same step at a time, so that what several tiles read at a step is read at about the
    same time, and but once from memory.

    Attributes:
        tiles: of the result.
        steps: along the summed axis of a tile.
        blocks: of threads.
        whole: tiles that each block takes whole.
        head: steps of each tile that is left which one block takes; 0: helpers take all.
        helpers: blocks that share the others.
    """

    tiles: int
    steps: int
    blocks: int
    whole: int
    head: int
    helpers: int

    @staticmethod
    def unshared(tiles: int, steps: int, most_blocks: int) -> "Schedule":
        """The schedule of whole tiles alone."""
        return Schedule(tiles, steps, min(tiles, most_blocks), tiles // most_blocks, steps, 0)

    @staticmethod
    def even(tiles: int, steps: int, most_blocks: int) -> "Schedule":
        """A schedule without heads: each block takes as many steps as any other, or one more."""
        blocks = max(1, min(most_blocks, tiles * steps // _FEWEST_STEPS))
        # At least a tile for each block is left, so that no more than two or three share one.
        return Schedule(tiles, steps, blocks, max(0, tiles // blocks - 1), 0, blocks)

    @staticmethod
    def headed(tiles: int, steps: int, most_blocks: int) -> "Schedule":
        """A schedule in which the heads of tiles are all at the same step at a time."""
        waves, rest = divmod(tiles, most_blocks)
        blocks = min(most_blocks, rest * steps // _FEWEST_STEPS)
        head = pl.cdiv(rest * steps, blocks) + _LEAD if blocks > rest else steps
        if head >= steps:
            return Schedule.unshared(tiles, steps, most_blocks)
        return Schedule(tiles, steps, most_blocks if waves else blocks, waves, head, blocks - rest)

    @staticmethod
    def in_step(tiles: int, steps: int, most_blocks: int, lead: int = 0) -> "Schedule":
        """A schedule in which blocks are at the same steps of their tiles, or at a few.

        So what several tiles read at a step is read at about the same time, and but once from memory. Only
        the tiles of a last wave that is half empty or more are shared, each by as many blocks.

        Args:
            tiles: of the result.
            steps: of a tile.
            most_blocks: that run at a time.
            lead: steps that a head is longer than what a helper takes of the tile.
        """
        waves, rest = divmod(tiles, most_blocks)
        sharing = min(_MOST_SHARING, most_blocks // rest, steps // _FEWEST_STEPS) if rest else 0
        if sharing < 2 or steps * (1 - 1 / sharing) <= _SHARING_STEPS:
            return Schedule.unshared(tiles, steps, most_blocks)
        blocks = most_blocks if waves else rest * sharing
        head = (steps + lead * (sharing - 1)) // sharing
        return Schedule(tiles, steps, blocks, waves, head, rest * (sharing - 1))

    @staticmethod
    def fastest(tiles: int, steps: int, most_blocks: int) -> "Schedule":
        """The schedule that ends soonest, as far as measured.

        Blocks that are at the same steps are so much faster that they may take a few more, where the summed
        axis is long; where it is short, the wait for the helpers' sums at the end costs more than that.

        Args:
            tiles: of the result.
            steps: of a tile.
            most_blocks: that run at a time.
        """
        unshared = Schedule.unshared(tiles, steps, most_blocks)
        even = Schedule.even(tiles, steps, most_blocks)
        if unshared.longest <= max(1.1 * even.longest, even.longest + _SHARING_STEPS):
            return unshared
        if steps < _LONG or 3 * (tiles % most_blocks) < most_blocks:
            return even
        in_step = Schedule.in_step(tiles, steps, most_blocks, _LEAD)
        headed = Schedule.headed(tiles, steps, most_blocks)
        return in_step if in_step.longest <= 1.02 * headed.longest else headed

    @staticmethod
    def halved(tiles: int, steps: int) -> "Schedule":
        """A schedule in which two blocks share each tile, one half after the other, and take no other."""
        return Schedule(tiles, steps, 2 * tiles, 0, 0, 2 * tiles)

    @property
    def rest(self) -> int:
        """Tiles that are not taken whole in turn."""
        return self.tiles - self.whole * self.blocks

    @property
    def heads(self) -> int:
        """Blocks that take a head."""
        return self.rest if self.head else 0

    @property
    def longest(self) -> int:
        """The most steps that a block takes."""
        shared = -(-self.rest * (self.steps - self.head) // self.helpers) if self.helpers else 0
        return self.whole * self.steps + max(self.head if self.rest else 0, shared)

    @property
    def shares(self) -> int:
        """Places for the sums that are handed over."""
        return self.rest + self.helpers - 1 if self.helpers else 0

    def _helped(self, helper: Any) -> Any:
        """The first of the helpers' steps that one takes; those of the next one follow its own."""
        steps = jnp.clip(helper, 0, self.helpers) * (self.rest * (self.steps - self.head))
        return _quotient(steps, max(self.helpers, 1))

    def _helper(self, step: Any) -> Any:
        """Which helper takes one of their steps."""
        return _quotient((step + 1) * self.helpers - 1, max(self.rest * (self.steps - self.head), 1))

    def _line(self, block: Any) -> tuple:
        """What a block takes of the tiles that are not whole, in a line of heads or of what follows them: the
        first step there, the one after the last, how many of a tile stand there, and how many before them do
        not."""
        helper = block - self.heads
        is_head = helper < 0
        first = jnp.where(is_head, block * self.head, self._helped(helper))
        end = jnp.where(is_head, (block + 1) * self.head, self._helped(helper + 1))
        tail = max(self.steps - self.head, 1)
        return first, end, jnp.where(is_head, self.head, tail), jnp.where(is_head, 0, self.head)

    def count(self, block: Any) -> Any:
        """How many steps a block takes."""
        first, end, _, _ = self._line(block)
        return self.whole * self.steps + end - first

    def pieces(self, block: Any) -> Any:
        """Of how many tiles these are."""
        first, end, length, _ = self._line(block)
        return self.whole + _quotient(end + length - 1, length) - _quotient(first, length)

    def position(self, block: Any, number: Any) -> tuple:
        """A block's step of this number: tile, and step of the tile."""
        first, _, length, before = self._line(block)
        own = self.whole * self.steps
        step = number - own + first
        is_whole = number < own
        return (
            jnp.where(
                is_whole,
                _quotient(number, self.steps) * self.blocks + block,
                self.whole * self.blocks + _quotient(step, length),
            ),
            jnp.where(is_whole, _remainder(number, self.steps), before + _remainder(step, length)),
        )

    def piece(self, block: Any, number: Any) -> tuple:
        """A block's tile of this number: the block's first step of it, its end, and whether the tile starts
        and ends with them."""
        first, end, length, before = self._line(block)
        is_whole = number < self.whole
        start = (_quotient(first, length) + number - self.whole) * length
        stop = start + length
        own = self.whole * self.steps - first
        return (
            jnp.where(is_whole, number * self.steps, jnp.maximum(start, first) + own),
            jnp.where(is_whole, (number + 1) * self.steps, jnp.minimum(stop, end) + own),
            is_whole | ((before == 0) & (start >= first)),
            is_whole | ((before + length == self.steps) & (stop <= end)),
        )

    def handed_over(self, block: Any, number: Any) -> Any:
        """The place of the sum of a block's piece of this number among those that are handed over."""
        first, _, length, _ = self._line(block)
        return _quotient(first, length) + number - self.whole + block - self.heads

    def awaited(self, block: Any) -> tuple:
        """The places of the other sums of the tile of which `block` has the first steps and not the last: the
        first one, and the one after the last."""
        _, end, length, _ = self._line(block)
        tile = _quotient(end - 1, length)
        tail = self.steps - self.head
        helper = block - self.heads
        following = jnp.where(helper < 0, self._helper(tile * tail), helper + 1)
        return tile + following, tile + self._helper((tile + 1) * tail - 1) + 1


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "fastest": Schedule.fastest,
    "unshared": Schedule.unshared,
    "even": Schedule.even,
    "headed": Schedule.headed,
    "in_step": functools.partial(Schedule.in_step, lead=_LEAD),
}
"""Ways to share tiles out, by name; each takes how many there are, their steps, and how many blocks run at a
time."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """Where the warpgroups of blocks hand over their sums of tiles that are shared.

    Attributes:
        sums: in global memory, one row a share; None if no tile is shared.
        ready: semaphores that count to one when a share is there.
        first: number of the first share's semaphore.
        place: of a sum's place among all that are handed over, the number of this warpgroup's share.
    """

    sums: Any
    ready: Any
    first: int
    place: Callable[[Any], Any]

    def hand_over(self, number: Any, result: jax.Array) -> None:
        """Store this warpgroup's sums and say so."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def store(_, ref: Any, result: fragments.FragmentedArray) -> None:
            store_sums(simt, simt.Pointer(ref, simt.GLOBAL), pairs_of(result))

        store(self.sums.at[self.place(number)], result)
        plgpu.semaphore_signal(self.ready.at[self.first + self.place(number)], memory_scope="gpu")

    def add(self, number: Any, result: jax.Array) -> jax.Array:
        """`result` and another block's sums, when they are there."""
        plgpu.semaphore_wait(self.ready.at[self.first + self.place(number)], memory_scope="gpu")

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA),
            return_type=plgpu.ShapeDtypeStruct(result.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
        )
        def add(_, ref: Any, result: fragments.FragmentedArray) -> fragments.FragmentedArray:
            return in_wgmma_layout(add_sums(simt, simt.Pointer(ref, simt.GLOBAL), pairs_of(result)))

        return add(self.sums.at[self.place(number)], result)


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
        if not schedule.helpers:
            return write(there, result)

        @pl.when(jnp.logical_not(starts))
        def part() -> None:
            shares.hand_over(schedule.handed_over(block, number), result)

        @pl.when(starts)
        def whole() -> None:
            first, last = schedule.awaited(block)
            write(there, lax.fori_loop(first, jnp.where(ends, first, last), shares.add, result))

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


def add_halves(t: ModuleType, sums: Any, values: list[list]) -> list[list]:
    """`values` and the other block's of a cluster of two, added: the first half of them, or in the second
    block the other half.

    Args:
        t: `simt`.
        sums: shared memory for half the values of two warpgroups, at the same place in both blocks.
        values: pairs of float32.
    """
    half = len(values) // 2
    rank = t.cluster_rank()
    is_first = rank.equals(0)
    own = sums.shifted((t.thread() >> 7) * (1024 * half))

    def chosen(i: int, j: int) -> list:
        return [t.select(is_first, a, b) for a, b in zip(values[i], values[j], strict=True)]

    store_sums(t, own, [chosen(i + half, i) for i in range(half)])
    t.cluster_barrier()
    start = (t.thread() & 127) << 4
    words = [t.load_peer_words(own, start + 1024 * i, (rank + 1) & 1) for i in range(0, half, 2)]
    others = [t.as_float(word) for four in words for word in four]
    kept = [value for i in range(half) for value in chosen(i, i + half)]
    total = [t.add(*two) for two in zip(kept, others, strict=True)]
    return [total[i : i + 2] for i in range(0, len(total), 2)]


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
