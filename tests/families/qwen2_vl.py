"""Qwen2-VL for the parity tests. Batches are those of Qwen2.5-VL without windows."""

import functools

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from tests.families.description import Case, Count, Description, ProcessorCase
from tests.families.qwen2_5_vl import (
    MIXED,
    VIDEO_ATOL,
    before_4_52,
    check_positions,
    conversations,
    make_inputs,
    one_row,
    pack,
    place,
    processor_config,
)
from tests.models.qwen2_5_vl_cases import EOS, Visual
from tests.models.qwen2_5_vl_cases import tiny_config as tiny_qwen2_5_vl
from tests.processing.reference import hf_processor, small_tokenizer


def tiny_config(text: dict | None = None, vision: dict | None = None, **kwargs) -> Qwen2VLConfig:
    """A config of a few thousand parameters; `text` and `vision` override its fields."""
    fields = tiny_qwen2_5_vl(text).to_dict()
    text_config = {k: v for k, v in fields["text_config"].items() if k not in ("model_type", "layer_types")}
    vision_config = {
        "depth": 2,
        "embed_dim": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 8,
        "hidden_size": text_config["hidden_size"],
        **(vision or {}),
    }
    tokens = {key: value for key, value in fields.items() if key.endswith("token_id")}
    return Qwen2VLConfig(text_config=text_config, vision_config=vision_config, **tokens, **kwargs)


def config_7b() -> Qwen2VLConfig:
    """The shape of Qwen/Qwen2-VL-7B-Instruct."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    return Qwen2VLConfig(text_config=text)


CASES = {
    "untied": Case(tiny_config(), MIXED),
    "tied_video_gelu": Case(
        tiny_config(vision={"depth": 3, "mlp_ratio": 3, "hidden_act": "gelu"}, tie_word_embeddings=True),
        [[2, Visual(3, 4, 6), 3], [2, Visual(1, 6, 4), 1, Visual(2, 10, 10), 2]],
    ),
}

FAMILY = Description(
    model_class=Qwen2VLForConditionalGeneration,
    cases=CASES,
    make_inputs=make_inputs,
    one_row=one_row,
    end_token=EOS,
    greedy=("tied_video_gelu",),
    eras={"before 4.52": before_4_52, "4.52 to 4.57": lambda name: name},
    place=place,
    counts=(Count(config_7b(), {"r": 16}, 50_855_936),),
    left_in_16_bit=("layers.1.self_attn.q_proj", "layers.0.mlp.down_proj", "blocks.0.mlp.fc2"),
    check=check_positions,
    pack=pack,
    processor=ProcessorCase(
        reference=lambda: hf_processor(small_tokenizer(), processor_class=Qwen2VLProcessor),
        config=functools.partial(processor_config, tiny_config(vision={"patch_size": 14})),
        conversations=conversations,
        atol=VIDEO_ATOL,
    ),
    slow=("test_packing", "test_checkpointing"),
)
