import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlmlora.models.module_table import linear_modules, module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.weights import DenseWeight

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}


@pytest.fixture(scope="session")
def tiny_config():
    """Three decoder layers over two vision blocks, so that their numbers overlap but differ."""
    return Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def table(tiny_config):
    return module_table(tiny_config)


@pytest.fixture(scope="session")
def _torch_base(tiny_config):
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration._from_config(tiny_config, dtype=torch.float32).eval()


@pytest.fixture
def torch_model(_torch_base):
    """A transformers model that PEFT may change."""
    return copy.deepcopy(_torch_base)


@pytest.fixture
def flax_model(tiny_config):
    """The model with zeros in place of its linear weights; adapters do not depend on them."""
    model = family_of(tiny_config).model(tiny_config, dtype=jnp.float32)
    for linear in linear_modules(model).values():
        shape = linear.weight.get_value().value.shape
        linear.weight.set_value(DenseWeight(jnp.zeros(shape, jnp.float32)))
    return model


@pytest.fixture
def randomise():
    """Fill every trainable array with normal numbers, so that no matrix of an adapter is zero."""

    def fill(model: nnx.Module, std: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        state = nnx.state(model, Trainable)
        nnx.update(model, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, std, a.shape), a.dtype), state))

    return fill
