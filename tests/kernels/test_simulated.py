"""Whatever the order in which warpgroups run, the fused product of many tokens ends with every step added."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import simulated
from vlmlora_kernels.hopper import schedule, wgmma
from vlmlora_kernels.hopper.wgmma import BLOCK, ROWS, Tuning

TUNINGS = [
    *(Tuning(256, 4, schedule=name) for name in schedule.SCHEDULES),
    Tuning(128, 6),
    Tuning(256, 4, cluster=2),
    Tuning(256, 4, halved=True),
    Tuning(128, 6, halved=True),
]


@given(
    seed=st.integers(0, 2**32),
    tuning=st.sampled_from(TUNINGS),
    transposed=st.booleans(),
    row_tiles=st.integers(1, 3),
    token_tiles=st.integers(1, 2),
    steps=st.integers(2, 16),
    blocks=st.integers(2, 6),
)
@settings(deadline=None, max_examples=30)
def test_every_step_is_added_once(seed, tuning, transposed, row_tiles, token_tiles, steps, blocks):
    tokens = tuning.tokens * token_tiles
    kept, summed = ROWS * tuning.cluster * row_tiles, BLOCK * steps
    shape = (summed, kept) if transposed else (kept, summed)
    outputs = simulated.run(
        tokens=tokens, shape=shape, transposed=transposed, tuning=tuning, blocks=blocks, seed=seed
    )
    assert sorted(outputs) == [(token, row) for token in range(0, tokens, 64) for row in range(0, kept, 64)]
    for (token, row), part in outputs.items():
        first = token // tuning.tokens * tuning.tokens
        assert part.columns == range(token - first, token - first + 64)
        expected = [(row // ROWS * ROWS, first, step) for step in range(steps)]
        assert sorted(part.parts) == expected


def test_a_lost_arrival_is_found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wgmma.Ring, "release", lambda self, free, step: None)
        with pytest.raises(AssertionError, match="all wait"):
            simulated.run(
                tokens=256, shape=(128, 64 * 9), transposed=False, tuning=Tuning(), blocks=2, seed=0
            )


def test_a_slot_that_is_let_go_of_too_early_is_found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wgmma.Ring, "wait", lambda self, free, step: None)
        with pytest.raises(AssertionError, match=r"a copy into a slot|more arrivals|of another"):
            simulated.run(
                tokens=256, shape=(128, 64 * 9), transposed=False, tuning=Tuning(), blocks=2, seed=0
            )


def test_who_is_left_behind_by_two_phases_waits_for_ever():
    def run(seed, laps):
        """One completes phases without a look at the other, who waits for each."""
        scheduler, barrier = simulated.Scheduler(seed), simulated.Barrier(1)

        def body(agent):
            for _ in range(laps):
                if agent.group == 0:
                    barrier.change(1, 0)
                    scheduler.wait(lambda: True, "goes on")
                else:
                    scheduler.wait_for(barrier, "waits for a phase")

        scheduler.run([simulated.Agent(0, 0, 0), simulated.Agent(0, 0, 1)], body)

    def hangs(seed, laps):
        with contextlib.suppress(AssertionError):
            run(seed, laps)
            return False
        return True

    assert not any(hangs(seed, laps=1) for seed in range(20))
    assert any(hangs(seed, laps=2) for seed in range(20))
