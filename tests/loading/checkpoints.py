"""Small checkpoints as transformers and bitsandbytes write them, and a model's parameters by name."""

import copy
import json
import shutil
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from tests.models.qwen2_5_vl_cases import random_torch_model, tiny_config
from vlmlora.models.load_plan import unstacked_parameters
from vlmlora.quantization.weights import Weight

ODD_VISION = {"intermediate_size": 51}
"""An MLP width that is no multiple of 64: blocks of 4-bit scales straddle rows."""


def write_checkpoint(
    directory: Path, *, dtype: torch.dtype, tied: bool = False, sharded: bool = False
) -> dict[str, torch.Tensor]:
    """Save a random model; returns its parameters by transformers' own names."""
    model = random_torch_model(tiny_config(vision=ODD_VISION, tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(directory, max_shard_size="100KB" if sharded else "5GB")
    return dict(model.named_parameters())


def write_quantized(
    source: Path, directory: Path, **kwargs: bool | str
) -> Qwen2_5_VLForConditionalGeneration:
    """Quantise a checkpoint by bitsandbytes through transformers, and save it; returns the model."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**kwargs), dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(directory)
    return model


def rewrite(source: Path, directory: Path, change) -> Path:
    """Copy a checkpoint of one file with ``change(tensors)`` applied to its tensors by key."""
    shutil.copytree(source, directory)
    file = directory / "model.safetensors"
    tensors = change(load_file(file))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return directory


def edit_config(directory: Path, **fields) -> None:
    """Overwrite fields of ``config.json``."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def parameters(model: nnx.Module) -> dict[str, Weight | np.ndarray]:
    """Every parameter of one layer by its un-stacked name: an array, or a linear layer's weight."""
    found = {}
    for _, name, layer, value in unstacked_parameters(model):
        if layer is None:
            found[name] = value
        else:
            found[name] = value.layer(layer) if isinstance(value, Weight) else value[layer]
    return found


def dense_parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """The same with every weight as a plain float32 array."""
    return {
        name: np.asarray(
            value.dequantize(np.float32) if isinstance(value, Weight) else value.astype(np.float32)
        )
        for name, value in parameters(model).items()
    }


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A torch tensor in float32."""
    return tensor.detach().float().numpy()


def decoded(module: torch.nn.Module) -> torch.Tensor | None:
    """A linear layer's weight as bitsandbytes decodes it; None for one that is not quantised."""
    weight = getattr(module, "weight", None)
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        # As one row: on a CPU with AVX-512, bitsandbytes 0.50 decodes blocks that straddle rows wrongly.
        state = copy.copy(weight.quant_state)
        state.shape = torch.Size((1, state.shape.numel()))
        return bitsandbytes.functional.dequantize_4bit(weight.data, state).reshape(weight.quant_state.shape)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.CB, weight.SCB)
    return None
