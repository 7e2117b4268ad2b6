"""Full checkpoints that transformers reads back whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.loading.checkpoints import as_numpy, dense_parameters, write_checkpoint
from vlmlora.models import saving
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.saving import save_checkpoint


def assert_transformers_reads(directory, theirs):
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    found = dict(model.named_parameters())
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(as_numpy(found[name]), as_numpy(tensor), err_msg=name)


@pytest.mark.parametrize(("dtype", "tied", "sharded"), [("bfloat16", False, True), ("float32", True, False)])
def test_transformers_reads_every_tensor(tmp_path, dtype, tied, sharded):
    theirs = write_checkpoint(tmp_path / "theirs", dtype=getattr(torch, dtype), tied=tied)
    config = read_config(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", config, dtype=dtype, trainable=True)
    save_checkpoint(model, config, tmp_path / "ours", max_shard_size=50_000 if sharded else 10**9)
    shards = sorted(tmp_path.glob("ours/*.safetensors"))
    assert (len(shards) > 1) == sharded
    assert_transformers_reads(tmp_path / "ours", theirs)
    again = load_model(tmp_path / "ours", read_config(tmp_path / "ours"), dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, dense_parameters(again), dense_parameters(model))
    if sharded:
        # Only a tensor that is larger by itself may pass the limit.
        for shard in shards:
            with safe_open(shard, "np") as file:
                keys = list(file.keys())
            assert shard.stat().st_size < 50_000 + 5_000 or len(keys) == 1


def test_writes_another_type_and_decodes_what_is_quantised(bf16_checkpoint, tmp_path):
    directory, _ = bf16_checkpoint
    config = read_config(directory)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model = load_model(directory, config, dtype="bfloat16", quantize="nf4")
    save_checkpoint(model, config, tmp_path / "ours", dtype=jnp.float32)
    theirs = {name: torch.tensor(value) for name, value in dense_parameters(model).items()}
    assert_transformers_reads(tmp_path / "ours", theirs)
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization_config" not in fields
    assert fields["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert fields["dtype"] == "float32"


def test_replaces_weights_and_keeps_other_files(bf16_checkpoint, tmp_path):
    directory, theirs = bf16_checkpoint
    config = read_config(directory)
    model = load_model(directory, config, dtype="bfloat16")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_checkpoint(model, config, tmp_path, max_shard_size=50_000)
    save_checkpoint(model, config, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert_transformers_reads(tmp_path, theirs)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_everything_as_it_was(bf16_checkpoint, tmp_path, monkeypatch, existing):
    directory, _ = bf16_checkpoint
    config = read_config(directory)
    model = load_model(directory, config, dtype="bfloat16")
    target = tmp_path / "target"
    if existing:
        save_checkpoint(model, config, target)
    before = {path.name: path.read_bytes() for path in target.glob("*")}
    failing = saving._write_safetensors
    calls = []

    def disk_full(path, tensors):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("No space left on device")
        failing(path, tensors)

    monkeypatch.setattr(saving, "_write_safetensors", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, config, target, max_shard_size=50_000)
    assert {path.name: path.read_bytes() for path in target.glob("*")} == before
    assert target.exists() == existing
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if existing else [])


def test_adapters_must_be_merged_first(bf16_checkpoint, tmp_path):
    directory, _ = bf16_checkpoint
    config = read_config(directory)
    model = load_model(directory, config, dtype="bfloat16")
    model.lm_head.adapter = nnx.Module()
    with pytest.raises(ValueError, match=r"adapters on 1 modules \(lm_head"):
        save_checkpoint(model, config, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
