"""Initial weights of the bundled model."""

import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from transformers import Qwen2_5_VLConfig

from vlmlora.models.registry import family_of

_STACKS = ("model.visual.blocks", "model.language_model.layers")
_RESIDUAL_OUTPUTS = ("attn.proj", "o_proj", "down_proj")
_EMBEDDING_STD = 0.1


def write_initial_weights(directory: Path, *, seed: int) -> int:
    """Writes `model.safetensors` in float32 beside the config.

    Matrices are normal with variance 1/fan-in; those that write to the residual stream are smaller by the
    root of twice the depth, so that the stream's size does not grow with depth (GPT-2's scheme).

    Returns:
        The number of parameters.
    """
    config = Qwen2_5_VLConfig.from_pretrained(directory)
    depths = dict(
        zip(_STACKS, (config.vision_config.depth, config.text_config.num_hidden_layers), strict=True)
    )
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(family_of(config).model(config, dtype=jnp.float32))):
        name = ".".join(map(str, path))
        (leaf,) = jax.tree.leaves(variable.get_value())
        stack = next((stack for stack in _STACKS if name.startswith(stack + ".")), None)
        shape = leaf.shape if stack is None else leaf.shape[1:]
        values = _initial(name, leaf.shape, shape, depths.get(stack, 1), seed)
        if stack is None:
            tensors[name] = values
        else:
            rest = name.removeprefix(stack)
            tensors |= {f"{stack}.{layer}{rest}": values[layer] for layer in range(depths[stack])}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.size for tensor in tensors.values())


def _initial(name: str, full: tuple[int, ...], shape: tuple[int, ...], depth: int, seed: int) -> np.ndarray:
    if len(shape) == 1:
        return np.full(full, float(name.endswith("weight")), np.float32)
    if "embed_tokens" in name:
        std = _EMBEDDING_STD
    else:
        std = math.prod(shape[1:]) ** -0.5
        if name.removesuffix(".weight").endswith(_RESIDUAL_OUTPUTS):
            std *= (2 * depth) ** -0.5
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return (std * rng.standard_normal(full)).astype(np.float32)
