"""What is wrong with a checkpoint is said before anything is loaded, with every tensor concerned."""

import json
import shutil

import pytest
import torch

from tests.loading.checkpoints import edit_config, rewrite, write_checkpoint, write_quantized
from vlmlora.models.checkpoint import read_header
from vlmlora.models.loading import load_model, read_config


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint of several shards."""
    directory = tmp_path_factory.mktemp("sharded")
    write_checkpoint(directory, dtype=torch.float32, sharded=True)
    return directory


def load(directory, **kwargs):
    return load_model(directory, read_config(directory), dtype="float32", **kwargs)


def edit_index(directory, change):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_missing_extra_and_misshaped_tensors_are_all_named_in_one_error(bf16_checkpoint, tmp_path):
    def spoil(tensors):
        del tensors["visual.blocks.1.attn.qkv.weight"], tensors["model.layers.0.input_layernorm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(2, 2)
        tensors["model.norm.weight"] = torch.ones(65)
        tensors["visual.merger.mlp.0.bias"] = torch.ones(128, dtype=torch.int8)
        return tensors

    directory = rewrite(bf16_checkpoint[0], tmp_path / "spoiled", spoil)
    with pytest.raises(ValueError, match="is missing 2 of 57 tensors") as error:
        load(directory)
    message = str(error.value)
    for part in (
        "model.visual.blocks.1.attn.qkv.weight",
        "model.language_model.layers.0.input_layernorm.weight",
        "model.layers.7.mlp.up_proj.weight",
        "model.language_model.norm.weight [65], needed [64]",
        "model.visual.merger.mlp.0.bias is int8[128], needed 16- or 32-bit floats",
    ):
        assert part in message


def test_an_untied_head_must_be_stored(bf16_checkpoint, tmp_path):
    directory = rewrite(
        bf16_checkpoint[0],
        tmp_path / "headless",
        lambda tensors: {key: t for key, t in tensors.items() if key != "lm_head.weight"},
    )
    with pytest.raises(ValueError, match=r"missing 1 of 57 tensors: lm_head\.weight"):
        load(directory)


def test_one_tensor_under_two_names(bf16_checkpoint, tmp_path):
    def twice(tensors):
        return tensors | {"model.visual.merger.ln_q.weight": torch.ones(32)}

    directory = rewrite(bf16_checkpoint[0], tmp_path / "twice", twice)
    with pytest.raises(ValueError, match=r"both .*visual.merger.ln_q.weight and .*visual.merger.ln_q.weight"):
        load(directory)


def write_header(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{]", "no JSON"),
        (b"[1]", "no JSON object"),
        (b"\xff\xfe", "no JSON"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "end at byte .* but it has"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "x needs 8 bytes"),
        ({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 4]}}, "entry for x"),
        ({"x": {"dtype": "F32", "shape": 2}}, "entry for x"),
        ({"x": 3}, "entry for x"),
        ({"x": {"dtype": "F4", "shape": [], "data_offsets": [0, 4]}}, "x has type 'F4'.*supported: .*BF16"),
    ],
)
def test_corrupt_headers(tmp_path, header, message):
    file = tmp_path / "model.safetensors"
    write_header(file, header)
    with pytest.raises(ValueError, match=message) as error:
        read_header(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_truncated_file(bf16_checkpoint, tmp_path, kept):
    directory = tmp_path / "short"
    shutil.copytree(bf16_checkpoint[0], directory)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
        load(directory)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "C:\\x.safetensors", "..\\x", ""],
)
def test_an_index_that_points_outside_of_its_directory(sharded, tmp_path, shard):
    directory = shutil.copytree(sharded, tmp_path / "copy")
    edit_index(directory, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    with pytest.raises(ValueError, match="points outside of its directory"):
        load(directory)


def test_a_missing_shard(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "copy")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of \d+ shards .*{shard.name}; download"):
        load(directory)


def test_an_index_that_names_what_its_shards_lack(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "copy")
    edit_index(directory, lambda weight_map: weight_map.update({"nothing": next(iter(weight_map.values()))}))
    with pytest.raises(ValueError, match="names 1 tensors that its shards do not hold: nothing"):
        load(directory)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_corrupt_index(sharded, tmp_path, content):
    directory = shutil.copytree(sharded, tmp_path / "copy")
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is corrupt"):
        load(directory)


def test_pickle_files_are_refused(bf16_checkpoint, tmp_path):
    directory = shutil.copytree(bf16_checkpoint[0], tmp_path / "copy")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickle files \(pytorch_model\.bin\).*safetensors"):
        load(directory)


def test_a_directory_without_weights(bf16_checkpoint, tmp_path):
    directory = shutil.copytree(bf16_checkpoint[0], tmp_path / "copy")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load(directory)


def test_config_errors(bf16_checkpoint, tmp_path):
    directory = shutil.copytree(bf16_checkpoint[0], tmp_path / "copy")
    edit_config(directory, model_type="gpt2")
    with pytest.raises(ValueError, match=r"model_type='gpt2' is not supported; supported: .*qwen2_5_vl"):
        read_config(directory)
    edit_config(directory, model_type="qwen2_5_vl", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match="quantised by 'gptq'; supported: bitsandbytes"):
        read_config(directory)
    edit_config(directory, model_type=None)
    with pytest.raises(ValueError, match="has no model_type"):
        read_config(directory)
    (directory / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_config(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_config(directory)


def test_a_config_never_runs_code(bf16_checkpoint, tmp_path):
    directory = shutil.copytree(bf16_checkpoint[0], tmp_path / "copy")
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    edit_config(directory, auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.C"})
    load(directory)
    assert not (tmp_path / "ran").exists()


def test_a_4bit_checkpoint_neither_trains_in_full_nor_loads_in_8_bit(bf16_checkpoint, tmp_path):
    write_quantized(bf16_checkpoint[0], tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match="full fine-tuning needs unquantised weights"):
        load(tmp_path, trainable=True)
    with pytest.raises(ValueError, match="stored in 4 bit and cannot be loaded in 8 bit"):
        load(tmp_path, quantize="int8")

    def spoil(tensors):
        (key,) = [key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight.absmax")]
        (other,) = [key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight.absmax")]
        del tensors[key]
        tensors[other] = tensors[other][:-1]
        return tensors

    directory = rewrite(tmp_path, tmp_path / "spoiled", spoil)
    with pytest.raises(ValueError, match="2 that do not fit") as error:
        load(directory)
    for layer in (0, 1):
        assert f"layers.{layer}.mlp.up_proj.weight.absmax" in str(error.value)
