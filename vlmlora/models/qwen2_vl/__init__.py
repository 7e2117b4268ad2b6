"""Qwen2-VL (https://arxiv.org/abs/2409.12191).

The decoder, the multimodal positions and the image processing are those of Qwen2.5-VL, which came of it.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, Qwen2VLConfig

from vlmlora.models.qwen2_vl.modules import Qwen2VLForConditionalGeneration
from vlmlora.models.qwen2_vl.shapes import batch_shapes
from vlmlora.models.registry import Family, register


def _load_processor(directory: Path, config: PreTrainedConfig) -> Any:
    # Imported when it is needed: transformers' image processors take long, and a model's shape needs none.
    from vlmlora.models.qwen2_vl.processing import load_processor

    return load_processor(directory, config)


register(
    Family(
        model_type="qwen2_vl",
        config_class=Qwen2VLConfig,
        model=Qwen2VLForConditionalGeneration,
        parts=(
            ("model.visual.blocks", "vision"),
            ("model.visual.merger", "projector"),
            ("model.language_model", "language"),
            ("lm_head", "head"),
        ),
        roles=(("self_attn", "attention"), ("attn", "attention"), ("mlp", "mlp")),
        key_renames=(
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
        ),
        ignored_keys=(r"\.inv_freq$",),
        processor=_load_processor,
        batch_shapes=batch_shapes,
        tensor_cuts=(("merger.mlp.0", "rows"), ("merger.mlp.2", "columns")),
    )
)
