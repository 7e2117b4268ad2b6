"""Logits, positions, loss, gradients and greedy tokens against transformers and PEFT, in float32."""

import jax
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from tests.models.qwen2_5_vl_cases import (
    EOS,
    Case,
    Visual,
    batches,
    random_torch_model,
    tiny_config,
)
from vlmlora.generation.greedy import greedy_decode
from vlmlora.lora.apply import adapted_modules
from vlmlora.lora.peft_format import load_adapter_into
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.module_table import module_table
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Trainable
from vlmlora.training.loss import make_loss_fn

MIXED = Case([[3, Visual(1, 8, 8), 5], [9], [2, Visual(1, 4, 12), 1, Visual(1, 6, 10), 4]])
"""One image that fills its window, none, and two with under-full windows; rows of three lengths."""

CASES = {
    "untied": (tiny_config(), MIXED),
    "tied": (tiny_config(tie_word_embeddings=True), MIXED),
    "multi_head": (tiny_config(text={"num_key_value_heads": 4}), MIXED),
    "multi_query": (tiny_config(text={"num_key_value_heads": 1}), MIXED),
    "no_full_attention_block": (tiny_config(vision={"depth": 3, "fullatt_block_indexes": []}), MIXED),
    "only_full_attention": (tiny_config(vision={"depth": 2, "fullatt_block_indexes": [0, 1]}), MIXED),
    "deep_vision_odd_mlp": (
        tiny_config(vision={"depth": 5, "fullatt_block_indexes": [1, 4], "intermediate_size": 51}),
        Case([[1, Visual(1, 18, 10), 2, Visual(1, 2, 2), 2], [4, Visual(1, 2, 30), 3]]),
    ),
    "hub_patches": (
        tiny_config(vision={"patch_size": 14, "window_size": 112, "num_heads": 4}),
        Case([[2, Visual(1, 12, 20), 3], [3, Visual(1, 8, 16), 2, Visual(1, 8, 6), 3]]),
    ),
    "odd_text_sizes": (
        tiny_config(
            text={
                "hidden_size": 60,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "intermediate_size": 77,
                "num_hidden_layers": 3,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]},
            }
        ),
        MIXED,
    ),
    "video": (tiny_config(), Case([[2, Visual(3, 4, 6), 3], [2, Visual(1, 6, 4), 1, Visual(2, 10, 10), 2]])),
    "text_only": (tiny_config(), Case([[7], [12], [1]])),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A random model with random adapters on disk, as transformers and PEFT write them, and its batch."""
    config, case = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    model = random_torch_model(config)
    model.save_pretrained(directory / "base")
    theirs, ours, valid = batches(case, config)
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        init_lora_weights=False,
        target_modules=r".*(_proj|qkv|attn\.proj|merger\.mlp\.[02])",
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(directory / "adapter")
    return directory, adapted, theirs, ours, valid


@jax.jit
def compute_logits(module, batch):
    return module.logits(module(**model_inputs(batch))[0])


def load(directory):
    """This library's model, its adapters set, from the same files."""
    config = read_config(directory / "base")
    module = load_model(directory / "base", config, dtype=np.float32, quantize=None, progress=False)
    load_adapter_into(module, module_table(config), directory / "adapter")
    return module


def test_logits_positions_loss_and_gradients(case):
    directory, adapted, theirs, ours, valid = case
    module = load(directory)

    base = adapted.get_base_model()
    positions, _ = base.model.get_rope_index(
        **{k: v for k, v in theirs.items() if k not in ("labels", "pixel_values", "pixel_values_videos")}
    )
    np.testing.assert_array_equal(ours["position_ids"][:, valid], positions.numpy()[:, valid])

    output = adapted(**theirs)
    output.loss.backward()
    expected = output.logits.detach().numpy()
    logits = compute_logits(module, ours)
    difference = np.abs(np.asarray(logits) - expected)[valid].max()
    # Both compute in float32, in another order: measured differences are near 1e-6 of the largest logit.
    assert difference <= 1e-4 * np.abs(expected[valid]).max()

    graphdef, adapters, frozen = nnx.split(module, Trainable, ...)
    loss_fn = make_loss_fn(graphdef, gradient_checkpointing=True, chunk_size=16)
    loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(adapters, frozen, ours)
    np.testing.assert_allclose(loss, output.loss.item(), rtol=1e-5)

    expected_gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    compared = 0
    for spec, gradient, index in adapted_modules(
        nnx.merge(graphdef, gradients, frozen), module_table(read_config(directory / "base"))
    ):
        for matrix in ("lora_A", "lora_B"):
            found = np.asarray(getattr(gradient, matrix).get_value())
            found = found if index is None else found[index]
            expected = expected_gradients.pop(f"base_model.model.{spec.name}.{matrix}.default.weight")
            if expected is None:
                # PyTorch leaves out what the batch did not use; here it is computed, as zero.
                assert not found.any()
                continue
            # Sums over tokens and layers in another order: measured relative errors are below 1e-5.
            error = np.linalg.norm(found - expected.numpy()) / np.linalg.norm(expected.numpy())
            assert error <= 1e-3, f"{spec.name}.{matrix}: {error:.2e}"
            compared += 1
    assert not expected_gradients
    assert compared > 0


def test_samples_packed_into_one_row_do_not_see_each_other(tmp_path):
    config, case = CASES["untied"]
    random_torch_model(config).save_pretrained(tmp_path)
    _, batch, valid = batches(case, config)
    module = load_model(tmp_path, read_config(tmp_path), dtype=np.float32, quantize=None, progress=False)
    images = {k: batch[k] for k in ("pixel_values", "patch_positions", "image_segment_ids")}
    packed = images | {
        name: batch[name][..., valid][..., None, :]
        for name in ("input_ids", "position_ids", "labels", "image_token_index")
    }
    packed["segment_ids"] = (np.nonzero(valid)[0] + 1).astype(np.int32)[None]

    separate = np.asarray(compute_logits(module, batch))[valid]
    found = np.asarray(compute_logits(module, packed))[0]
    # The same float32 products in longer rows.
    assert np.abs(found - separate).max() <= 1e-5 * np.abs(separate).max()
    graphdef, adapters, frozen = nnx.split(module, Trainable, ...)
    loss = jax.jit(make_loss_fn(graphdef, chunk_size=16))
    np.testing.assert_allclose(loss(adapters, frozen, packed), loss(adapters, frozen, batch), rtol=1e-5)


@pytest.mark.parametrize("name", ["tied", "video", "text_only"])
def test_greedy_tokens(name, tmp_path):
    config, case = CASES[name]
    model = random_torch_model(config, seed=2)
    model.save_pretrained(tmp_path)
    theirs, ours, valid = batches(case, config, seed=3)
    module = load_model(tmp_path, read_config(tmp_path), dtype=np.float32, quantize=None, progress=False)
    tokens = greedy_decode(
        *nnx.split(module), ours, max_new_tokens=12, eos_token_ids=(EOS,), pad_token_id=EOS
    )

    # transformers continues prompts that are padded on the left, so each row goes in alone.
    for row, length in enumerate(valid.sum(1)):
        inputs = _row(theirs, row, length)
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=EOS)
        expected = expected[0, length:].numpy()
        np.testing.assert_array_equal(np.asarray(tokens)[row, : len(expected)], expected)
        assert (np.asarray(tokens)[row, len(expected) :] == EOS).all()


def _row(inputs, row, length):
    """One row of transformers' inputs without its padding, with its own images and videos."""
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    out = {name: inputs[name][row : row + 1, :length] for name in tokens}
    for pixels, grid, kind in (
        ("pixel_values", "image_grid_thw", 1),
        ("pixel_values_videos", "video_grid_thw", 2),
    ):
        if pixels not in inputs:
            continue
        types = inputs["mm_token_type_ids"]
        starts = ((types == kind) & (torch.roll(types, 1, dims=1) != kind)).sum(1)
        first, count = int(starts[:row].sum()), int(starts[row])
        if not count:
            continue
        patches = inputs[grid].prod(1)
        at = int(patches[:first].sum())
        out[grid] = inputs[grid][first : first + count]
        out[pixels] = inputs[pixels][at : at + int(patches[first : first + count].sum())]
        if kind == 2:
            out["second_per_grid_ts"] = inputs["second_per_grid_ts"][first : first + count]
    return out
