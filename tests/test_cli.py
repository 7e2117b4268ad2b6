"""`vlmlora merge` on the bundled model."""

import json

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from tests.lora.adapter_files import write_adapter
from vlmlora.cli import app
from vlmlora.demo.handwriting import bundled_model
from vlmlora.models.loading import read_config


def run(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_merge_writes_what_transformers_loads(tmp_path):
    config = read_config(bundled_model())
    deltas = write_adapter(tmp_path / "adapter", config, bundled_model(), r=2)
    (tmp_path / "adapter" / "chat_template.jinja").write_text("of the adapter")
    result = run(tmp_path / "adapter", tmp_path / "merged", "--dtype", "float32", "--max-shard-size", "4MB")
    assert result.exit_code == 0, result.stderr
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"} <= names
    assert {"model-00001-of-00004.safetensors", "model.safetensors.index.json"} <= names
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "of the adapter"
    merged, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(bundled_model(), dtype=torch.float32)
    found = merged.state_dict()
    for name, array in base.state_dict().items():
        assert found[name].dtype == torch.float32
        expected = array.numpy() + deltas.get(name, 0)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_merge_says_in_one_line_what_is_wrong(tmp_path):
    for arguments, message in (
        ([tmp_path / "nowhere", tmp_path / "out"], "there is no directory"),
        ([bundled_model(), tmp_path / "out", "--dtype", "int8"], "dtype='int8'"),
        ([bundled_model(), tmp_path / "out", "--base", bundled_model()], "it is no adapter"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    result = run(tmp_path / "adapter", tmp_path / "out")
    assert "has no base_model_name_or_path" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
