"""Adapters in PEFT's format, written without a model."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedConfig

from vlmlora.models.module_table import module_table


def write_adapter(
    directory: Path, config: PreTrainedConfig, base: str | Path, *, r: int
) -> dict[str, np.ndarray]:
    """A random adapter of vision and language; returns what it adds to each weight."""
    rng = np.random.default_rng(0)
    tensors, names = {}, [spec for spec in module_table(config) if spec.part in ("vision", "language")]
    for spec in names:
        key = f"base_model.model.{spec.name}"
        tensors[f"{key}.lora_A.weight"] = rng.normal(0, 0.1, (r, spec.in_features)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.normal(0, 0.1, (spec.out_features, r)).astype(np.float32)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": r,
        "target_modules": "|".join(spec.name.replace(".", r"\.") for spec in names),
    }
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return {
        f"{spec.name}.weight": tensors[f"base_model.model.{spec.name}.lora_B.weight"]
        @ tensors[f"base_model.model.{spec.name}.lora_A.weight"]
        for spec in names
    }
