"""A checkpoint of several hundred megabytes, loaded by a process of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.models.qwen2_5_vl_cases import tiny_config
from vlmlora.models.load_plan import unstacked_parameters
from vlmlora.models.registry import family_of

PROGRAM = Path(__file__).with_name("load_in_fresh_process.py")


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """383 MB of zeros in bfloat16. The file is sparse and takes no time to write."""
    directory = tmp_path_factory.mktemp("large")
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32_000}
    config = tiny_config(text=text | {"num_attention_heads": 64, "num_key_value_heads": 32})
    config.save_pretrained(directory)
    header, offset = {}, 0
    for _, name, layer, value in unstacked_parameters(family_of(config).model(config, dtype=jnp.bfloat16)):
        (array,) = jax.tree.leaves(value)
        shape = array.shape if layer is None else array.shape[1:]
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return directory


def test_memory_holds_the_model_once(large_checkpoint):
    """On a CPU, whose memory is the device's: the model, and no more than a few tensors besides.

    torch cannot be imported there, so this also proves that loading needs none.
    """
    done = subprocess.run(
        [sys.executable, PROGRAM, large_checkpoint], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["None"]["model"] > 3.8e8 > 2e8 > found["nf4"]["model"]
    for mode in found.values():
        # What is in flight and what the compiler needs; a second copy would take 383 MB.
        assert mode["peak"] - mode["model"] < 3e8
