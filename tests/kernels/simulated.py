"""Run the fused kernel of many tokens on the CPU as warpgroups that take turns at random.

It checks who waits for whom, not what is computed: a tile in shared memory is where it was copied from, and a
sum is the steps that are in it. Barriers are those of the hardware, of which a thread knows whether the phase
it waits for is even or odd, so that one that is left behind by two phases waits for ever, here as there.
Copies arrive at any time after they were started.
"""

import contextlib
import dataclasses
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import jaxtyping
import numpy as np

from vlmlora_kernels.hopper import ring, scales, schedule, wgmma

BOOK = np.linspace(-1, 1, 16, dtype=np.float32)


class Stopped(Exception):
    """Another warpgroup has failed."""


class Overlay:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any):
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclasses.dataclass
class Agent:
    """A warpgroup of a block."""

    block: int
    rank: int
    group: int
    may_run: Callable[[], bool] = lambda: True
    doing: str = ""
    parities: dict = dataclasses.field(default_factory=dict)
    pending: list = dataclasses.field(default_factory=list)
    turn: threading.Semaphore = dataclasses.field(default_factory=lambda: threading.Semaphore(0))


class Scheduler:
    """Lets one agent run at a time, until it waits; or a copy arrive."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.agents: dict[int, Agent] = {}
        self.arriving: list[Callable] = []
        self.control = threading.Semaphore(0)
        self.error: BaseException | None = None

    @property
    def agent(self) -> Agent:
        return self.agents[threading.get_ident()]

    def wait(self, condition: Callable[[], bool], doing: str) -> None:
        agent = self.agent
        agent.may_run, agent.doing = condition, doing
        self.control.release()
        agent.turn.acquire()
        if self.error:
            raise Stopped

    def wait_for(self, barrier: "Barrier", doing: str) -> None:
        """Wait for the next phase of a barrier, of which an agent knows the parity."""
        parities = self.agent.parities
        parity = parities.get(id(barrier), 0)
        parities[id(barrier)] = parity ^ 1
        self.wait(lambda: barrier.phase & 1 != parity, doing)

    def run(self, agents: list[Agent], body: Callable) -> None:
        running = set(range(len(agents)))

        def one(number: int) -> None:
            self.agents[threading.get_ident()] = agents[number]
            agents[number].turn.acquire()
            try:
                if not self.error:
                    body(agents[number])
            except Stopped:
                pass
            except BaseException as error:
                self.error = self.error or error
            running.discard(number)
            self.control.release()

        threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(agents))]
        for thread in threads:
            thread.start()
        # Now and then one is much slower than the others.
        slow: Agent | None = None
        while running:
            if self.random.random() < 0.05:
                slow = self.random.choice([None, *agents])
            ready = [agents[number] for number in running if agents[number].may_run() or self.error]
            choices = [each for each in ready if each is not slow] + list(self.arriving) or ready
            if not choices:
                waiting = "; ".join(
                    f"block {a.block}.{a.rank} group {a.group}: {a.doing}"
                    for number, a in enumerate(agents)
                    if number in running
                )
                self.error = AssertionError(f"all wait: {waiting}")
                continue
            chosen = self.random.choice(choices)
            if isinstance(chosen, Agent):
                chosen.turn.release()
                self.control.acquire()
            else:
                self.arriving.remove(chosen)
                chosen()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error


class Barrier:
    """One ``mbarrier``: a phase ends when all have arrived, and all bytes."""

    def __init__(self, arrivals: int):
        self.arrivals, self.count, self.bytes, self.phase = arrivals, 0, 0, 0

    def change(self, count: int, size: int) -> None:
        self.count += count
        self.bytes += size
        assert self.count <= self.arrivals, "more arrivals than expected"
        if self.count == self.arrivals and not self.bytes:
            self.count, self.phase = 0, self.phase + 1


class Slots:
    """An array in shared memory, of which each slot holds the places it was copied from."""

    def __init__(self):
        self.content: dict = {}
        self.readers: dict = {}
        self.of_peer = self

    @property
    def at(self) -> "At":
        return At(self)

    def write(self, slot: Any, part: int, value: Any) -> None:
        assert not self.readers.get(slot), "a slot is written while a product reads it"
        self.content.setdefault(slot, {})[part] = value


class At:
    """What ``ref.at[...]`` gives."""

    def __init__(self, ref: Any, index: Any = None):
        self.ref, self.index = ref, index

    def __getitem__(self, index: Any) -> "At":
        return At(self.ref, index)

    T = property(lambda self: self)


@dataclasses.dataclass(frozen=True)
class Array:
    """Global memory."""

    name: str

    @property
    def at(self) -> At:
        return At(self)


@dataclasses.dataclass(frozen=True)
class Sum:
    """What warpgroups have added: (row, token, step) for each product."""

    parts: tuple
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        return 64, len(self.columns)

    def __getitem__(self, index: tuple) -> "Sum":
        return Sum(self.parts, self.columns[index[1]])

    def __add__(self, other: "Sum") -> "Sum":
        assert self.columns == other.columns
        return Sum(self.parts + other.parts, self.columns)


def run(
    *, tokens: int, shape: tuple[int, int], transposed: bool, tuning: wgmma.Tuning, blocks: int, seed: int
):
    """Run the kernel on a card that has so many multiprocessors.

    Returns:
        For each first token and first row of a part of the result, the steps that were added to it.
    """
    scheduler = Scheduler(seed)
    outputs: dict = {}
    sums: dict = {}

    def me() -> Agent:
        return scheduler.agent

    def fori_loop(start: Any, end: Any, body: Callable, carry: Any) -> Any:
        for i in range(int(start), int(end)):
            carry = body(i, carry)
        return carry

    def when(condition: Any) -> Callable:
        return lambda function: function() if condition else None

    def barrier_wait(at: At) -> None:
        (barriers, _), slot = at.ref[me().rank], at.index
        scheduler.wait_for(barriers[slot], f"waits for slot {slot}, phase {barriers[slot].phase}")

    def barrier_arrive(at: At) -> None:
        own = at.ref[me().rank]
        for barriers, is_shared in at.ref.values():
            if is_shared or barriers is own[0]:
                barriers[at.index].change(1, 0)

    def copy_in(source: At, target: At, barrier: At, collective_axes: str | None = None) -> None:
        slots = [target.ref, target.ref.of_peer] if collective_axes else [target.ref]
        part = me().rank if collective_axes else 0
        barrier_arrays = barrier.ref
        own = barrier_arrays[me().rank][0][barrier.index]
        others = [each[0][barrier.index] for each in barrier_arrays.values()] if collective_axes else [own]
        own.change(0, len(slots))
        own.change(1, 0)
        value = source.index
        for each in slots:
            assert not each.readers.get(target.index), "a copy into a slot that a product reads"

        def arrive() -> None:
            for each in slots:
                each.write(target.index, part, value)
            for each in others:
                each.change(0, -1)

        scheduler.arriving.append(arrive)

    class Accumulator(list):
        def __getitem__(self, index: Any) -> Sum:
            assert index is Ellipsis
            return Sum(tuple(self), range(tuning.tokens))

    def multiply(acc: Accumulator, w: tuple, x: At) -> None:
        (token, _), (at, _) = one_place(x)
        row, step = w
        assert at == step * wgmma.BLOCK, "tokens of another step"
        me().pending.append((x.ref, x.index))
        x.ref.readers.setdefault(x.index, []).append(me())
        acc.append((row, token, step))

    def one_place(at: At) -> Any:
        places = at.ref.content[at.index]
        assert len(places) == (tuning.cluster if at.ref.of_peer is not at.ref else 1)
        assert len(set(places.values())) == 1, "half of a tile is of another step"
        return places[0]

    def wgmma_wait(pending: int) -> None:
        while len(me().pending) > pending:
            slots, slot = me().pending.pop(0)
            slots.readers[slot].remove(me())
        scheduler.wait(lambda: True, "waits for a product")

    def operand(codes: At, of_scales: At, _: Any) -> Any:
        (row, _), (column, _) = one_place(codes)
        first_row, block = one_place(of_scales)
        if transposed:
            row, step = 2 * column, row // wgmma.BLOCK
            assert (first_row, block) == (step * wgmma.BLOCK, row // wgmma.BLOCK), "scales of another tile"
        else:
            step = column // (wgmma.BLOCK // 2)
            assert (first_row, block) == (row, step), "scales of another tile"
        return mock.Mock(astype=lambda _: (row, step))

    meetings: dict = {}

    def meet(who: Any, count: int) -> None:
        """Wait until `count` have come here as often."""
        arrived = meetings.setdefault(who, [])
        arrived.append(me())
        needed = -(-len(arrived) // count) * count
        scheduler.wait(lambda: len(arrived) >= needed, f"meets others at {who}")

    def add_halves(tokens: Slots, result: Sum) -> Sum:
        agent = me()
        meet(("both", agent.block, agent.rank), 2)
        assert not any(tokens.readers.values()), "sums in the place of tokens that a product reads"
        sums[agent.block, agent.rank, agent.group] = result
        meet(("cluster", agent.block), 6)
        half = tuning.tokens // 2
        return (result + sums[agent.block, 1 - agent.rank, agent.group])[:, agent.rank * half :][:, :half]

    def hand_over(self: schedule.Shares, number: Any, result: Sum) -> None:
        sums[int(self.place(number))] = result

    def add(self: schedule.Shares, number: Any, result: Sum) -> Sum:
        place = int(self.place(number))
        scheduler.wait(lambda: place in sums, f"waits for sum {place}")
        return result + sums[place]

    def write_out(piece: At, target: At) -> None:
        part = piece.ref.content[piece.index][0]
        (token, _), (row, _) = target.index
        assert (token, row) not in outputs, "written twice"
        outputs[token, row] = part

    inline = {
        "operand": operand,
        "meet": lambda: meet(("cluster", me().block), 6),
        "add.<locals>.run": add_halves,
        "write": lambda piece, part: piece.ref.content.__setitem__(piece.index, {0: part}),
        "fill": lambda *_: None,
    }

    def inline_mgpu(**_: Any) -> Callable:
        def decorate(function: Callable) -> Callable:
            return next(f for name, f in inline.items() if function.__qualname__.endswith(f"<locals>.{name}"))

        return decorate

    def kernel(body: Callable, *, out_type, grid, scratch_types, cluster=(1,), **_: Any) -> Callable:
        agents = [
            Agent(block, rank, group)
            for block, rank, group in itertools.product(range(grid[0]), range(cluster[0]), range(3))
        ]
        scratch: dict = {}
        for block in range(grid[0]):
            for position, each in enumerate(scratch_types):
                if isinstance(each, (wgmma.plgpu.Barrier, wgmma.plgpu.ClusterBarrier)):
                    is_shared = isinstance(each, wgmma.plgpu.ClusterBarrier)
                    arrivals = each.num_arrivals * (cluster[0] if is_shared else 1)
                    arrays = {
                        rank: ([Barrier(arrivals) for _ in range(int(np.prod(each.num_barriers)))], is_shared)
                        for rank in range(cluster[0])
                    }
                    made = [type("Barriers", (dict,), {"at": property(At)})(arrays)] * cluster[0]
                else:
                    made = [Slots() for _ in range(cluster[0])]
                    if tuning.cluster > 1 and position == 0:
                        made[0].of_peer, made[1].of_peer = made[1], made[0]
                for rank in range(cluster[0]):
                    scratch.setdefault((block, rank), []).append(made[rank])

        def start(agent: Agent, *inputs: Any) -> None:
            memory = scratch[agent.block, agent.rank]
            results = [Array("out")] + [Array("sums")] * (len(out_type) - 1)
            body(*inputs, *results, (memory[0], memory[0]), *memory[1:])

        def launch(*inputs: Any) -> list:
            arrays = [Array("x"), Array("codes"), *[Array("scales")] * (len(inputs) - 2)]
            scheduler.run(agents, lambda agent: start(agent, *arrays))
            return [None]

        return launch

    def axis_index(name: str) -> int:
        return {"warpgroup": me().group, "block": me().block, "pair": me().rank}[name]

    plgpu = Overlay(
        wgmma.plgpu,
        kernel=kernel,
        inline_mgpu=inline_mgpu,
        barrier_wait=barrier_wait,
        barrier_arrive=barrier_arrive,
        copy_gmem_to_smem=copy_in,
        copy_smem_to_gmem=write_out,
        wgmma=multiply,
        wgmma_wait=wgmma_wait,
        **dict.fromkeys(("set_max_registers", "wait_smem_to_gmem", "commit_smem"), lambda *_, **__: None),
    )
    pl = Overlay(
        wgmma.pl,
        when=when,
        ds=lambda start, size: (int(start), size),
        get_global=lambda _: None,
        run_scoped=lambda function, _: function(Accumulator()),
    )
    lax = Overlay(
        wgmma.lax, fori_loop=fori_loop, rem=lambda a, b: a % b, div=lambda a, b: a // b, axis_index=axis_index
    )
    numbers = Overlay(wgmma.jnp, minimum=min, maximum=np.maximum, where=np.where, clip=np.clip)
    numbers.logical_not = np.logical_not
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(jaxtyping.config, "jaxtyping_disable", True))
        for module in (wgmma, ring, schedule):
            for name, fake in (("plgpu", plgpu), ("pl", pl), ("lax", lax), ("jnp", numbers)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, fake))
        stack.enter_context(mock.patch.object(wgmma, "MULTIPROCESSORS", blocks))
        stack.enter_context(mock.patch.object(wgmma, "varying_like", lambda result, _: result))
        stack.enter_context(mock.patch.multiple(schedule.Shares, hand_over=hand_over, add=add))
        stack.enter_context(
            mock.patch.multiple(
                scales.TileScales,
                load=lambda self, _, row, block: (int(row), int(block)),
                load_offset=lambda *_: [],
                fill_table=lambda *_: None,
                write=lambda self, _, target, raw, offset: target.ref.write(target.index, 0, raw),
            )
        )
        product = wgmma.matmul(
            BOOK, tokens=tokens, shape=shape, transposed=transposed, nested=False, tuning=tuning
        )
        product(None, np.zeros(shape[0] * shape[1] // 2, np.uint8), None)
    return outputs
