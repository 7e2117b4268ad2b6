"""The hub's config of Qwen2-VL, which predates the nested form."""

import json

from tests.families.qwen2_vl import config_7b
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.loading import read_config
from vlmlora.models.module_table import module_table

HUB = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


def test_a_flat_config_describes_the_same_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    config = read_config(tmp_path)
    table = module_table(config)
    assert table == module_table(config_7b())
    assert select(table, LoraConfig(r=16)).parameters == 50_855_936
    rope = config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["mrope_section"]) == (1e6, [16, 24, 24])
    assert not config.tie_word_embeddings
