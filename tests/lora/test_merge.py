"""Merged models and checkpoints against transformers and PEFT, on the same adapters."""

import copy
import inspect
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from huggingface_hub import HfApi
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.loading.checkpoints import as_numpy, dense_parameters, write_quantized
from tests.lora.adapter_files import write_adapter
from tests.models.qwen2_5_vl_cases import Case, Visual, batches, random_torch_model, tiny_config
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.lora import merge
from vlmlora.merging import merge_checkpoint
from vlmlora.models import hub
from vlmlora.models.load_plan import unstacked_parameters
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.registry import family_of
from vlmlora.quantization.weights import DenseWeight, NF4Weight

ADAPTERS = {
    "everything": {
        "finetune_projector": True,
        "rank_pattern": {"layers.1.*": 5, "blocks.0.mlp.*": 2},
        "use_rslora": True,
        "bias": "all",
        "trainable_token_indices": [3, 7, 200],
    },
    "dora on one layer and modules": {
        "use_dora": True,
        "layers_to_transform": [1],
        "bias": "lora_only",
        "modules_to_save": ["lm_head", "merger.mlp.0"],
    },
    "by name, with their bias": {"target_modules": ["q_proj", "merger.mlp.2", "qkv"], "lora_bias": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model in float32, with an untied head."""
    directory = tmp_path_factory.mktemp("base")
    random_torch_model(tiny_config(tie_word_embeddings=False)).save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


def load(directory, randomise, *, dtype="float32", quantize=None, **arguments):
    """A model with a random adapter."""
    config = read_config(directory)
    module = load_model(directory, config, dtype=dtype, quantize=quantize, progress=False)
    model = FastVisionModel(module, config, name_or_path=str(directory), directory=directory)
    FastVisionModel.get_peft_model(model, **{"r": 3, "lora_alpha": 2, "verbose": False, **arguments})
    randomise(module, std=0.2)
    return model


def of_transformers(directory, dtype=torch.float32):
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def of_peft(base, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()


def parameters_of(model):
    return {name: as_numpy(tensor) for name, tensor in model.state_dict().items()}


def inputs():
    theirs, *_ = batches(Case([[3, Visual(1, 4, 4), 4], [5]]), tiny_config())
    del theirs["labels"]
    return theirs


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("arguments", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_merged_is_what_peft_merges(checkpoint, randomise, tmp_path, arguments):
    model = load(checkpoint, randomise, **arguments)
    model.save_pretrained(tmp_path / "adapter")
    before = jax.tree.map(np.asarray, model.split()[1:])
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", max_shard_size="100KB")
    jax.tree.map(np.testing.assert_array_equal, before, model.split()[1:])

    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors.index.json", "generation_config.json", "tokenizer.json"} <= files
    assert len([name for name in files if name.endswith(".safetensors")]) > 3
    assert "adapter_config.json" not in files

    base = of_transformers(checkpoint)
    merged = of_transformers(tmp_path / "merged")
    adapted = of_peft(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(**inputs()).logits
        assert (base(**inputs()).logits - expected).abs().max() > 0.1 * expected.abs().max()
        # float32, another order of sums.
        torch.testing.assert_close(merged(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)
    theirs = parameters_of(adapted.merge_and_unload())
    found = parameters_of(merged)
    assert found.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)

    # From files to files, with no model in between.
    merge_checkpoint(tmp_path / "adapter", tmp_path / "again", dtype="float32")
    again = parameters_of(of_transformers(tmp_path / "again"))
    for name, array in found.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-6, atol=1e-7, err_msg=name)

    # In memory: the same numbers in a model without a trainable parameter.
    assert model.merge_and_unload() is model
    assert not jax.tree.leaves(model.split()[1])
    assert model.lora_config is None
    for name, array in dense_parameters(model.module).items():
        np.testing.assert_allclose(array, found[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_head_that_is_no_longer_tied_is_written(randomise, tmp_path):
    random_torch_model(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", randomise, target_modules=["o_proj"], modules_to_save=["embed_tokens"])
    original = dense_parameters(model.module)["model.language_model.embed_tokens.weight.frozen"]
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32")
    merged = of_transformers(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    found = parameters_of(merged)
    np.testing.assert_array_equal(found["lm_head.weight"], original)
    assert np.abs(found["model.language_model.embed_tokens.weight"] - original).max() > 0.1
    model.merge_and_unload()
    in_memory = dense_parameters(model.module)
    assert in_memory.keys() == found.keys()
    for name, array in found.items():
        np.testing.assert_allclose(in_memory[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
    assert model.config.tie_word_embeddings is False


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A bfloat16 checkpoint, and bitsandbytes' NF4 checkpoint of it."""
    root = tmp_path_factory.mktemp("quantized")
    config = tiny_config(tie_word_embeddings=False)
    random_torch_model(config).to(torch.bfloat16).save_pretrained(root / "bf16")
    kwargs = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    write_quantized(root / "bf16", root / "nf4", load_in_4bit=True, **kwargs)
    return root / "bf16", root / "nf4"


def test_a_4bit_base_is_decoded_or_replaced(quantized, randomise, tmp_path):
    plain, nf4 = quantized
    model = load(nf4, randomise, dtype="bfloat16", layers_to_transform=[0])
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    up_proj = model.module.model.language_model.layers.mlp.up_proj
    assert isinstance(up_proj.weight.get_value(), NF4Weight)
    adapter = up_proj.adapter
    delta = adapter.scaling.get_value()[0] * (adapter.lora_B.get_value()[0] @ adapter.lora_A.get_value()[0])
    decoded = up_proj.weight.get_value().dequantize(jnp.float32)
    model.save_pretrained(tmp_path / "adapter")

    model.save_pretrained_merged(tmp_path / "decoded")
    assert "quantization_config" not in json.loads((tmp_path / "decoded" / "config.json").read_text())
    found = of_transformers(tmp_path / "decoded", dtype="auto")
    assert {tensor.dtype for tensor in found.parameters()} == {torch.bfloat16}
    expected = np.asarray((decoded[0] + delta).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(parameters_of(found)[name], expected)

    # Onto the weights behind the base: one rounding of float32 sums, so that nearly all are PEFT's own.
    model.save_pretrained_merged(tmp_path / "replaced", base=plain)
    merge_checkpoint(tmp_path / "adapter", tmp_path / "from files", base=plain)
    adapted = of_peft(of_transformers(plain), tmp_path / "adapter")
    with torch.no_grad():
        logits = adapted(**inputs()).logits
    theirs = {
        key: as_numpy(tensor.to(torch.bfloat16))
        for key, tensor in adapted.merge_and_unload().state_dict().items()
    }
    for directory in ("replaced", "from files"):
        found = of_transformers(tmp_path / directory, dtype="auto")
        ours = parameters_of(found)
        assert ours.keys() == theirs.keys()
        assert np.mean([np.mean(ours[key] == theirs[key]) for key in theirs]) > 0.999
        with torch.no_grad():
            merged = found.float()(**inputs()).logits
        # Merged weights are rounded to 8 bits of mantissa once, 0.4 % at most of each.
        assert (merged - logits).abs().max() < 0.02 * logits.abs().max()

    # In memory, adapted stacks come out dense, whole, and others stay as they are.
    model.merge_and_unload()
    merged_stack = up_proj.weight.get_value()
    assert isinstance(merged_stack, DenseWeight)
    assert merged_stack.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(merged_stack.value[0].astype(jnp.float32)), expected)
    np.testing.assert_array_equal(
        np.asarray(merged_stack.value[1]), np.asarray(decoded[1].astype(jnp.bfloat16))
    )

    # A quantised model without an adapter is decoded.
    merge_checkpoint(nf4, tmp_path / "plain", dtype="float32")
    np.testing.assert_array_equal(
        parameters_of(of_transformers(tmp_path / "plain"))[name], np.asarray(decoded[0])
    )


def test_an_adapter_that_came_out_of_the_base_is_merged_into_the_untouched_one(
    checkpoint, randomise, tmp_path
):
    model = load(checkpoint, lambda *_, **__: None, init_lora_weights="olora", target_modules=["q_proj"])
    state = jax.tree.map(lambda a: a + 0.1, model.split()[1])
    model.update(state)
    model.save_pretrained_merged(tmp_path / "own", dtype="float32")
    model.save_pretrained_merged(tmp_path / "base", dtype="float32", base=checkpoint)
    own, base = (parameters_of(of_transformers(tmp_path / name)) for name in ("own", "base"))
    for name, array in own.items():
        # The sums of what was taken out and put back round in float32.
        np.testing.assert_allclose(base[name], array, atol=1e-5, err_msg=name)


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(checkpoint, randomise, tmp_path, monkeypatch):
    out = tmp_path / "out"
    model = load(checkpoint, randomise, target_modules=["o_proj"], lora_bias=True)
    with pytest.raises(ValueError, match=r"bias of model\.language_model\.layers\.0\.self_attn\.o_proj"):
        model.save_pretrained_merged(out)
    with pytest.raises(ValueError, match="o_proj"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="save_method='merged_4bit' is not supported: rounding"):
        model.save_pretrained_merged(out, save_method="merged_4bit")
    with pytest.raises(TypeError, match="did you mean 'save_method'"):
        model.save_pretrained_merged(out, safe_method="lora")

    model = load(checkpoint, randomise, target_modules=["o_proj"])
    random_torch_model(tiny_config(text={"hidden_size": 32})).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other has .* that do not fit"):
        model.save_pretrained_merged(out, base=tmp_path / "other")
    with pytest.raises(ValueError, match="max_shard_size='5 parsecs'"):
        model.save_pretrained_merged(out, max_shard_size="5 parsecs")
    with pytest.raises(ValueError, match="dtype='int8': it must be one of bfloat16"):
        model.save_pretrained_merged(out, dtype="int8")
    with monkeypatch.context() as patched:
        adapted = list(merge.adapted_modules(model.module, model.module_table))
        patched.setattr(merge, "adapted_modules", lambda *_: adapted[:1])
        with pytest.raises(RuntimeError, match="384 of 768 trained parameters were merged"):
            model.save_pretrained_merged(out)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}

    bare = FastVisionModel(model.module, model.config, name_or_path="")
    with pytest.raises(ValueError, match="no adapter to merge"):
        bare.save_pretrained_merged(out)
    assert not out.exists()

    model.save_pretrained_merged(out, save_method="lora")
    assert (out / "adapter_model.safetensors").exists()
    with pytest.raises(FileExistsError, match="not the merged weights beside it; name another"):
        model.save_pretrained_merged(out)
    assert not (out / "config.json").exists()
    with pytest.raises(ValueError, match="it is no adapter"):
        merge_checkpoint(checkpoint, tmp_path / "merged", base=checkpoint)


def test_memory_holds_a_few_tensors_and_not_the_model(tmp_path):
    """From files to files, in a process of its own. The base is a sparse file of zeros."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 1000}
    config = tiny_config(text=text | {"num_attention_heads": 32, "num_key_value_heads": 16})
    config.save_pretrained(tmp_path / "base")
    header, offset = {}, 0
    for _, name, layer, value in unstacked_parameters(family_of(config).model(config, dtype=jnp.float32)):
        (array,) = jax.tree.leaves(value)
        shape = array.shape if layer is None else array.shape[1:]
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (tmp_path / "base" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    write_adapter(tmp_path / "adapter", config, tmp_path / "base", r=1)
    program = Path(__file__).with_name("merge_in_fresh_process.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path / "adapter", tmp_path / "merged"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert written > 2.3e8
    # The largest tensor has 4 MB. The rest is what the compiler takes, whatever the model's size.
    assert int(done.stdout) < 1e8


class RecordingApi:
    """What of `huggingface_hub.HfApi` an upload calls, and what it is called with."""

    calls: ClassVar[list] = []

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **arguments):
        self.calls.append(("create_repo", repo_id, arguments))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **arguments):
        self.calls.append(("create_branch", repo_id, arguments))

    def upload_folder(self, *, folder_path, **arguments):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload_folder", files, arguments))
        return SimpleNamespace(commit_url="https://huggingface.co/commit")


def test_push_to_hub_uploads_what_is_saved(checkpoint, randomise, tmp_path, monkeypatch):
    for signature, used in ((HfApi.create_repo, ["private", "exist_ok"]), (HfApi.create_branch, ["branch"])):
        assert set(used) <= set(inspect.signature(signature).parameters)
    monkeypatch.setattr(hub, "HfApi", RecordingApi)
    monkeypatch.setattr(RecordingApi, "calls", [])
    model = load(checkpoint, randomise, target_modules=["o_proj"])
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged")
    assert (
        model.push_to_hub("adapter", token="t", private=True, revision="dev")
        == "https://huggingface.co/commit"
    )
    assert model.push_to_hub_merged("merged", commit_message="done", create_pr=True)
    names = [call[0] for call in RecordingApi.calls]
    assert names == [
        *("token", "create_repo", "create_branch", "upload_folder"),
        *("token", "create_repo", "upload_folder"),
    ]
    calls = RecordingApi.calls
    assert calls[0] == ("token", "t")
    assert calls[1] == ("create_repo", "adapter", {"private": True, "exist_ok": True})
    assert calls[2][1:] == ("me/adapter", {"branch": "dev", "exist_ok": True})
    for call, directory in ((calls[3], "adapter"), (calls[6], "merged")):
        assert call[1] == {path.name: path.read_bytes() for path in (tmp_path / directory).iterdir()}
        assert set(call[2]) <= set(inspect.signature(HfApi.upload_folder).parameters)
    assert (calls[3][2]["repo_id"], calls[3][2]["revision"]) == ("me/adapter", "dev")
    assert (calls[6][2]["commit_message"], calls[6][2]["create_pr"]) == ("done", True)
    with pytest.raises(TypeError, match="did you mean 'private'"):
        model.push_to_hub("adapter", privat=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="'not/a/repository' is no repository id"):
        model.push_to_hub("not/a/repository")
