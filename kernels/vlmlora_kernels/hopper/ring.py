"""Slots of shared memory that copies fill and products read, step after step, in turn."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax


@dataclasses.dataclass(frozen=True)
class Ring:
    """Its methods take the barriers of `free`, of which one tells for each slot that it has been read.

    Attributes:
        slots: steps whose tiles are in shared memory or on their way.
        cluster: blocks of threads of the axis ``"pair"`` that read a copy: 1 or 2.
        readers: warpgroups of a block that read a slot.
    """

    slots: int
    cluster: int
    readers: int = 2

    def free(self) -> plgpu.Barrier | plgpu.ClusterBarrier:
        """The barriers, as scratch of a kernel."""
        if self.cluster == 1:
            return plgpu.Barrier(num_barriers=self.slots, num_arrivals=self.readers)
        return plgpu.ClusterBarrier(
            collective_axes=("pair",), num_barriers=self.slots, num_arrivals=self.readers
        )

    def of(self, step: Any) -> Any:
        """A step's slot."""
        return lax.rem(step, self.slots)

    def wait(self, free: Any, step: Any) -> None:
        """Wait until what was in a step's slot has been read."""

        @pl.when(step >= self.slots)
        def used() -> None:
            plgpu.barrier_wait(free.at[self.of(step)])

    def release(self, free: Any, step: Any) -> None:
        """Say that a step's tiles have been read."""
        plgpu.barrier_arrive(free.at[self.of(step)])

    def leave(self, free: Any, steps: Any) -> None:
        """After all steps: stay until the other block, which says so here, has read the last slots."""
        if self.cluster > 1:
            self.drain(free, steps)

    def drain(self, free: Any, steps: Any) -> None:
        """After all steps: wait until all slots have been read."""
        lax.fori_loop(steps, steps + self.slots, lambda step, _: self.wait(free, step), None)

    def multiply(
        self, free: Any, start: Any, end: Any, start_step: Callable[[Any], None], *, takes_turns: bool = False
    ) -> None:
        """Start the product of each step while that of the one before is under way, and let go of what that
        read when it ends; stay until all have ended.

        Args:
            free: the barriers.
            start: the first step.
            end: the step after the last.
            start_step: wait for a step's tiles and start its product.
            takes_turns: a product reads registers, which must not change while it is under way: steps are
                compiled two by two, so that each of two has a set of its own.
        """

        def one(step: Any, pending: int) -> None:
            start_step(step)
            plgpu.wgmma_wait(pending)
            self.release(free, step - 1)

        def two(step: Any) -> None:
            one(step, 1)
            one(step + 1, 1)

        start_step(start)
        if takes_turns:
            pairs = lax.div(end - start - 1, 2)
            rest = end - 2 * pairs
            lax.fori_loop(start + 1, rest, lambda step, _: one(step, 0), None)
            lax.fori_loop(0, pairs, lambda pair, _: two(rest + 2 * pair), None)
        else:
            lax.fori_loop(start + 1, end, lambda step, _: one(step, 1), None)
        plgpu.wgmma_wait(0)
        self.release(free, end - 1)
