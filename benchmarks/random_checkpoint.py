"""Write a bfloat16 checkpoint of a known model's shape with random weights.

python -m benchmarks.random_checkpoint DIRECTORY [--model qwen2_5_vl-7b]
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from benchmarks.shapes import CONFIGS
from vlmlora.models.module_table import layer_names
from vlmlora.models.registry import family_of
from vlmlora.quantization.weights import DenseWeight

SHARD_BYTES = 4 << 30


def write(directory: Path, model: str) -> int:
    """Write config.json, shards and index; returns the number of bytes."""
    config = CONFIGS[model]()
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    noise = (np.random.default_rng(0).standard_normal(1 << 26, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    shards, shard, size, total = [], {}, 0, 0
    module = family_of(config).model(config, dtype=jnp.bfloat16)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = variable.get_value()
        value = value.value if isinstance(value, DenseWeight) else value
        for layer, name in layer_names(module, ".".join(map(str, path))):
            shape = value.shape if layer is None else value.shape[1:]
            shard[name] = _fill(variable.get_metadata("init"), shape, noise)
            size += 2 * int(np.prod(shape))
            if size >= SHARD_BYTES:
                shards.append(_write_shard(directory, len(shards), shard))
                total, shard, size = total + size, {}, 0
    if shard:
        shards.append(_write_shard(directory, len(shards), shard))
        total += size
    weight_map = {name: file for file, names in shards for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _fill(init: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    if init == "normal":
        return np.resize(noise, shape)
    return np.full(shape, {"zeros": 0, "ones": 1}[init], ml_dtypes.bfloat16)


def _write_shard(directory: Path, number: int, tensors: dict[str, np.ndarray]) -> tuple[str, list[str]]:
    file = f"model-{number:05}.safetensors"
    save_file(tensors, directory / file)
    return file, list(tensors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=CONFIGS, default="qwen2_5_vl-7b")
    arguments = parser.parse_args()
    print(f"{write(arguments.directory, arguments.model) / 1e9:.1f} GB in {arguments.directory}")
