"""Unquantised checkpoints, compared array by array with the model that wrote them."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from rich.console import Console

from tests.loading.checkpoints import as_numpy, dense_parameters, rewrite, write_checkpoint
from vlmlora.models import loading
from vlmlora.models.checkpoint import read_checkpoint
from vlmlora.models.loading import load_model, read_config
from vlmlora.nn.variables import Frozen, Trainable

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def assert_same(model, theirs):
    ours = dense_parameters(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], as_numpy(tensor), err_msg=name)


@pytest.mark.parametrize(
    ("stored", "tied", "sharded"),
    [
        ("bfloat16", False, False),
        ("bfloat16", True, True),
        ("float32", True, False),
        ("float32", False, True),
        ("float16", False, False),
    ],
)
def test_every_array_is_the_stored_one(tmp_path, stored, tied, sharded):
    theirs = write_checkpoint(tmp_path, dtype=DTYPES[stored], tied=tied, sharded=sharded)
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    model = load_model(tmp_path, read_config(tmp_path), dtype=jnp.dtype(stored))
    assert_same(model, theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(stored)}


def test_casts_to_the_type_asked_for(tmp_path):
    theirs = write_checkpoint(tmp_path, dtype=torch.float32)
    model = load_model(tmp_path, read_config(tmp_path), dtype=jnp.bfloat16)
    assert_same(model, {name: tensor.to(torch.bfloat16) for name, tensor in theirs.items()})


def test_a_tied_head_may_be_stored_and_buffers_are_ignored(tmp_path):
    theirs = write_checkpoint(tmp_path / "tied", dtype=torch.bfloat16, tied=True)

    def add(tensors):
        embedding = next(t for key, t in tensors.items() if key.endswith("embed_tokens.weight"))
        extra = {"visual.rotary_pos_emb.inv_freq": torch.ones(4)}
        return tensors | extra | {"lm_head.weight": embedding.clone()}

    rewrite(tmp_path / "tied", tmp_path / "more", add)
    config = read_config(tmp_path / "more")
    assert_same(load_model(tmp_path / "more", config, dtype=jnp.bfloat16), theirs)


def test_full_finetuning_makes_every_parameter_trainable(bf16_checkpoint):
    directory, theirs = bf16_checkpoint
    frozen = load_model(directory, read_config(directory), dtype=jnp.float32)
    trainable = load_model(directory, read_config(directory), dtype=jnp.float32, trainable=True)
    assert not jax.tree.leaves(nnx.state(frozen, Trainable))
    assert not jax.tree.leaves(nnx.state(trainable, Frozen))
    assert_same(trainable, theirs)


def test_arrays_do_not_change_when_the_file_does(bf16_checkpoint, tmp_path):
    directory, theirs = bf16_checkpoint
    rewrite(directory, tmp_path / "copy", lambda tensors: tensors)
    model = load_model(tmp_path / "copy", read_config(directory), dtype=jnp.bfloat16)
    file = tmp_path / "copy" / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    assert_same(model, theirs)


def test_an_unpadded_header_makes_no_difference(bf16_checkpoint, tmp_path):
    """Older writers do not align the data."""
    directory, theirs = bf16_checkpoint
    rewrite(directory, tmp_path / "odd", lambda tensors: tensors)
    file = tmp_path / "odd" / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert len(header) % 2 == 1
    assert_same(load_model(tmp_path / "odd", read_config(directory), dtype=jnp.bfloat16), theirs)


def test_a_terminal_shows_bytes_and_rate(bf16_checkpoint, monkeypatch):
    directory, _ = bf16_checkpoint
    screen = io.StringIO()
    terminal = functools.partial(Console, file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(loading, "Console", lambda **_: terminal())
    load_model(directory, read_config(directory), dtype=jnp.bfloat16, progress=False)
    assert screen.getvalue() == ""
    load_model(directory, read_config(directory), dtype=jnp.bfloat16)
    size = sum(tensor.nbytes for tensor in read_checkpoint(directory).values())
    assert "Loading weights" in screen.getvalue()
    assert f"{size / 1000:.1f}/{size / 1000:.1f} kB" in screen.getvalue()
    assert "B/s" in screen.getvalue()
