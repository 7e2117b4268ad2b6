"""Several processes of two CPU devices each train as one process does; when one dies, the others end."""

import json
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.multi_process.processes import ended, says, start
from tests.multi_process.train_bundled_model import (
    BATCH_SIZE,
    EPOCHS,
    HEARTBEAT,
    SAMPLES,
    STEPS,
    Conversations,
    parts,
)
from vlmlora.data.loader import make_batches
from vlmlora.training.loop import fit
from vlmlora.training.state import Checkpoints


@pytest.fixture(scope="module")
def alone():
    """What one process with one device learns."""
    model, processor, step, state, frozen = parts()
    batches = make_batches(Conversations(), processor, batch_size=BATCH_SIZE, num_epochs=EPOCHS)
    state, history = fit(step, state, frozen, batches, total_steps=STEPS, key=jax.random.key(5))
    return model, state, history.losses


@pytest.mark.parametrize(
    ("count", "axis"),
    [
        (2, "data"),
        pytest.param(2, "fsdp", marks=pytest.mark.slow),
        pytest.param(4, "data", marks=pytest.mark.slow),
        pytest.param(4, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_processes_train_as_one_and_end_with_one(alone, tmp_path, count, axis):
    model, state, losses = alone
    with start("tests.multi_process.train_bundled_model", count, tmp_path, axis) as processes:
        for process in processes:
            assert says(process, "trained"), process.stderr.read()
        processes[-1].kill()
        since = time.monotonic()
        messages = [ended(process, within=HEARTBEAT + 30) for process in processes[:-1]]
        took = time.monotonic() - since

    # Every process ends, by itself, with an error that names the one that died and what was seen of it.
    assert took < HEARTBEAT + 30
    for process, message in zip(processes[:-1], messages, strict=True):
        assert process.returncode not in (0, None)
        assert f"tasks are unhealthy (stopped sending heartbeats):\n{count - 1}\n" in message

    results = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(count)]
    # Sums of float32 in another order: the mean over the batch is taken in parts.
    for result in results:
        np.testing.assert_allclose(result["losses"], losses, rtol=2e-5)
    # One of them reads a sample to measure the budget, and one in an epoch, whose last batch is not full.
    assert sorted(i for result in results for i in result["measured"]) == list(range(SAMPLES))
    read = sorted(i for result in results for i in result["read"])
    assert read == sorted(EPOCHS * list(range(SAMPLES)))

    # The first process wrote the adapter; all of them together the checkpoints, which one device reads.
    with Checkpoints(tmp_path / "checkpoints", lora_config=model.lora_config) as checkpoints:
        assert checkpoints.steps == [3, STEPS]
        resumed = checkpoints.restore(parts()[3])
    assert jax.random.key_data(resumed.key).tolist() == jax.random.key_data(jax.random.key(5)).tolist()
    model.update(resumed.state.adapters)
    model.save_pretrained(tmp_path / "restored")
    saved, restored = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "restored"))
    assert saved.keys() == restored.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(array, restored[name])
    # Adam divides by the root of a mean of squares, which makes differences of rounding larger.
    for ours, theirs in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=2e-3)
