import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import save_until_killed
from vlmlora.lora.config import LoraConfig
from vlmlora.training.loop import fit
from vlmlora.training.state import Checkpoints
from vlmlora.training.step import init_train_state, make_train_step

LORA = LoraConfig(r=2, lora_dropout=0.5)
OPTIMIZER = optax.adamw(0.1)
TOTAL = 7


def loss_fn(adapters, frozen, batch, key=None):
    """A regression with dropout: its result depends on state, key and batch alike."""
    kept = 1.0 if key is None else jax.random.bernoulli(key, 0.5, batch["input_ids"].shape)
    predicted = (batch["input_ids"] * kept) @ frozen @ adapters["lora_A"]
    return jnp.mean((predicted - batch["labels"]) ** 2)


STEP = make_train_step(loss_fn, OPTIMIZER)
FROZEN = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))


def initial():
    return init_train_state({"lora_A": jnp.ones((3, 2), jnp.float32)}, OPTIMIZER)


def batches():
    """Another batch each step, in an order that grain shuffles."""
    rng = np.random.default_rng(1)
    rows = [
        {
            "input_ids": rng.normal(size=4).astype(np.float32),
            "labels": rng.normal(size=2).astype(np.float32),
        }
        for _ in range(10)
    ]
    return grain.MapDataset.source(rows).shuffle(seed=3).batch(2).repeat(None)


def run(checkpoints=None, *, data=None, total_steps=TOTAL, key=5, **kwargs):
    key = None if key is None else jax.random.key(key)
    data = batches() if data is None else data
    return fit(
        STEP, initial(), FROZEN, data, total_steps=total_steps, key=key, checkpoints=checkpoints, **kwargs
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoints of a run that ended early, and the state and losses of one that did not."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(directory, every=2, keep=2, lora_config=LORA) as checkpoints:
        run(checkpoints, total_steps=5)
    return directory, *run()


def copy_of(saved, tmp_path, **kwargs):
    directory = tmp_path / "run"
    shutil.copytree(saved[0], directory)
    return Checkpoints(directory, **{"every": 2, "keep": 2, "lora_config": LORA, **kwargs})


def assert_equal(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for now, then in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(now, then)


def test_the_last_checkpoints_are_kept(saved):
    assert Checkpoints(saved[0]).steps == [4, 5]
    assert sorted(p.name for p in saved[0].iterdir()) == ["4", "5"]


class Iterated:
    """Batches that can be iterated over alone; counts what it gave."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        for batch in batches():
            self.given += 1
            yield batch


@pytest.mark.parametrize("kind", ["sliced", "iterated"])
def test_a_resumed_run_goes_on_bit_for_bit(saved, tmp_path, kind):
    data = Iterated() if kind == "iterated" else batches()
    # The key is the checkpoint's, whatever is passed.
    with copy_of(saved, tmp_path) as checkpoints:
        state, history = run(checkpoints, data=data, key=None, resume=True)
        assert checkpoints.steps == [6, 7]
    _, expected, uninterrupted = saved
    assert_equal(state, expected)
    assert history.first_step == 5
    assert history.losses == uninterrupted.losses[5:]
    assert len(set(uninterrupted.losses)) == TOTAL
    if kind == "iterated":
        assert data.given == TOTAL


def test_an_iterator_with_a_state_resumes_at_it(saved, tmp_path):
    def data():
        return batches().to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))

    with Checkpoints(tmp_path / "run", every=3) as checkpoints:
        run(checkpoints, data=data(), total_steps=3)
        state, history = run(checkpoints, data=data(), key=None, resume=True)
        assert history.first_step == 3
        assert_equal(state, saved[1])
        resumed = checkpoints.restore(initial(), step=3)
        assert resumed.iterator_state == {"next_index": 3}


def test_a_run_that_is_complete_takes_no_step(saved, tmp_path):
    with copy_of(saved, tmp_path) as checkpoints:
        state, history = run(checkpoints, total_steps=5, resume=True)
    assert history.losses == []
    assert int(state.step) == 5


def test_a_run_starts_at_its_beginning_where_there_is_no_checkpoint_yet(saved, tmp_path):
    with Checkpoints(tmp_path / "new" / "run", every=100) as checkpoints:
        state, _ = run(checkpoints, resume=True)
        assert checkpoints.steps == [TOTAL]
    assert_equal(state, saved[1])


def test_what_the_state_is_placed_on_is_kept(saved):
    placed = jax.device_put(initial(), jax.devices()[0])
    for state in (initial(), placed):
        restored = Checkpoints(saved[0], lora_config=LORA).restore(state).state
        found = [leaf.committed for leaf in jax.tree.leaves(restored)]
        assert found == [leaf.committed for leaf in jax.tree.leaves(state)]


def test_what_does_not_fit_is_refused(saved, tmp_path):
    directory = saved[0]
    with pytest.raises(FileExistsError, match="up to step 5; pass resume=True"):
        run(Checkpoints(directory, lora_config=LORA))
    with pytest.raises(ValueError, match="resume=True needs checkpoints"):
        run(resume=True)
    other = replace(LORA, r=4, target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match=r"r was 2 and is 4 now; target_modules was None and is \['q_proj'\]"
    ):
        run(Checkpoints(directory, lora_config=other), resume=True)
    with pytest.raises(ValueError, match="has an adapter's arguments, and this run no adapter's arguments"):
        Checkpoints(directory).restore(initial())
    wide = init_train_state({"lora_A": jnp.ones((3, 5), jnp.float32)}, OPTIMIZER)
    with pytest.raises(ValueError, match=r"lora_A was float32\[3,2\] and is float32\[3,5\] now"):
        Checkpoints(directory, lora_config=LORA).restore(wide)
    sgd = init_train_state({"lora_A": jnp.ones((3, 2), jnp.float32)}, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"opt_state.*mu.lora_A was float32\[3,2\] and is absent now"):
        Checkpoints(directory, lora_config=LORA).restore(sgd)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; it has 4, 5"):
        Checkpoints(directory, lora_config=LORA).restore(initial(), step=3)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Checkpoints(tmp_path / "nowhere").restore(initial())
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        Checkpoints(tmp_path).restore(initial())
    with pytest.raises(ValueError, match="keep=0: it must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(FileExistsError, match="checkpoint of step 5 already"):
        Checkpoints(directory).save(replace(initial(), step=jnp.int32(5)))


def test_another_place_of_the_base_model_is_only_reported(saved, caplog):
    moved = replace(LORA, base_model_name_or_path="elsewhere")
    Checkpoints(saved[0], lora_config=moved).restore(initial())
    assert "base_model_name_or_path=None, and this run 'elsewhere'" in caplog.text


def unfinished_in(directory):
    return [path.name for path in directory.iterdir() if "tmp" in path.name]


def stopped_while_saving(child, directory):
    """The names of what the stopped child was writing; none, and it goes on, if it was not."""
    if unfinished_in(directory):
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.01)
        if unfinished := unfinished_in(directory):
            return unfinished
        child.send_signal(signal.SIGCONT)
    time.sleep(0.001)
    return []


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    """The child also restores what it saved on four devices in a row to a mesh of two by two."""
    directory = tmp_path / "run"
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-m", save_until_killed.__name__, directory],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout.readline() == b"restored on another mesh\n"
        while not (unfinished := stopped_while_saving(child, directory)):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert unfinished == unfinished_in(directory)
    with Checkpoints(directory, keep=2) as checkpoints:
        last = checkpoints.steps[-1]
        assert not any(name.startswith(f"{last}.") for name in unfinished)
        restored = checkpoints.restore(save_until_killed.state_at(0))
        assert_equal(restored.state, save_until_killed.state_at(last))
        assert restored.state.adapters["lora_A"].devices() == {jax.devices()[0]}
        checkpoints.save(save_until_killed.state_at(last + 1))
        checkpoints.wait()
        assert not unfinished_in(directory)
        assert checkpoints.steps[-1] == last + 1
