"""Llama 3.2 Vision, which transformers calls Mllama (https://arxiv.org/abs/2407.21783, section 7)."""

from pathlib import Path
from typing import Any

from transformers import MllamaConfig, PreTrainedConfig

from vlmlora.models.mllama.modules import MllamaForConditionalGeneration
from vlmlora.models.mllama.shapes import batch_shapes
from vlmlora.models.registry import Family, register


def _load_processor(directory: Path, config: PreTrainedConfig) -> Any:
    # Imported when it is needed: transformers' image processors take long, and a model's shape needs none.
    from vlmlora.models.mllama.processing import load_processor

    return load_processor(directory, config)


register(
    Family(
        model_type="mllama",
        config_class=MllamaConfig,
        model=MllamaForConditionalGeneration,
        parts=(
            ("model.vision_model", "vision"),
            ("model.multi_modal_projector", "projector"),
            ("model.language_model", "language"),
            ("lm_head", "head"),
        ),
        roles=(("self_attn", "attention"), ("cross_attn", "attention"), ("mlp", "mlp")),
        key_renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^(vision_model|multi_modal_projector)\.", r"model.\1."),
        ),
        ignored_keys=(r"\.inv_freq$",),
        processor=_load_processor,
        batch_shapes=batch_shapes,
    )
)
