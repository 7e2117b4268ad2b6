"""The end of a decoder where there are labels only, against all of it everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.jaxprs import output_shapes
from tests.models import mllama_cases, qwen2_5_vl_cases
from vlmlora.lora.apply import add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.init import init_parameters
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Trainable
from vlmlora.training import loss, remat
from vlmlora.training.loss import IGNORE_INDEX, make_loss_fn, next_token_labels


def qwen(layers=3):
    config = qwen2_5_vl_cases.tiny_config({"num_hidden_layers": layers})
    # Text alone, of which a program is compiled in half the time.
    case = qwen2_5_vl_cases.Case([[20], [5]])
    return config, jax.tree.map(jnp.asarray, qwen2_5_vl_cases.batches(case, config)[1])


def mllama():
    config = mllama_cases.tiny_config({"num_hidden_layers": 3, "cross_attention_layers": [1]})
    case = mllama_cases.Case([[15], [5]])
    return config, jax.tree.map(jnp.asarray, mllama_cases.batches(case, config)[1])


def parts_of(config, dropout=0.0):
    module = family_of(config).model(config, dtype=jnp.float32)
    init_parameters(module, jax.random.key(0), std=0.1)
    lora = LoraConfig(r=2, lora_dropout=dropout, init_lora_weights=False)
    add_adapters(module, select(module_table(config), lora), lora, jax.random.key(1))
    return nnx.split(module, Trainable, ...)


@pytest.mark.parametrize(
    ("make", "policy"), [(qwen, "attention+mlp"), (qwen, {"layer_input": "offload"}), (mllama, True)]
)
def test_loss_and_gradients_are_those_of_all_logits(make, policy, monkeypatch):
    """With layer inputs in host memory the layer before the last stands by itself too."""
    monkeypatch.setattr(loss, "BLOCK_SIZE", 6)
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    config, batch = make()
    graphdef, adapters, frozen = parts_of(config)

    def of_all_logits(adapters):
        model = nnx.merge(graphdef, adapters, frozen)
        logits = model.logits(model(**model_inputs(batch))[0])
        labels = next_token_labels(batch["labels"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        kept = labels != IGNORE_INDEX
        return jnp.sum(losses * kept) / jnp.sum(kept)

    loss_fn = make_loss_fn(graphdef, gradient_checkpointing=policy, chunk_size=4)
    # A key, of which nothing is dropped out.
    key = jax.random.key(2)
    found, gradients = jax.jit(jax.value_and_grad(loss_fn))(adapters, frozen, batch, key)
    expected, expected_gradients = jax.jit(jax.value_and_grad(of_all_logits))(adapters)
    # The same float32 products, summed in another order. Random weights magnify that: the gradients of all
    # logits without jit differ from those with it by up to 7e-4.
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.linalg.norm(ours - other) <= 3e-3 * np.linalg.norm(other)


def test_the_last_block_never_sees_all_tokens(monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_SIZE", 6)
    config, batch = qwen(1)
    width = config.text_config.intermediate_size
    assert width not in (config.vision_config.intermediate_size, config.text_config.hidden_size)
    graphdef, adapters, frozen = parts_of(config)
    gradient = jax.grad(make_loss_fn(graphdef, gradient_checkpointing=False, chunk_size=4))
    shapes = output_shapes(jax.make_jaxpr(gradient)(adapters, frozen, batch))
    rows = len(batch["labels"])
    found = {shape for shape in shapes if len(shape) == 3 and (shape[0], shape[-1]) == (rows, width)}
    assert found == {(rows, 6 // rows, width)}


def test_an_adapter_drops_out_the_same_whatever_the_chunks(monkeypatch):
    config, batch = qwen(2)
    graphdef, adapters, frozen = parts_of(config, dropout=0.5)
    found = []
    for block in (6, 1000):
        monkeypatch.setattr(loss, "BLOCK_SIZE", block)
        loss_fn = jax.jit(make_loss_fn(graphdef, gradient_checkpointing=True, chunk_size=4))
        found += [float(loss_fn(adapters, frozen, batch, key=jax.random.key(seed))) for seed in (0, 1)]
    np.testing.assert_allclose(found[:2], found[2:], rtol=1e-5)
    assert found[0] != found[1]
