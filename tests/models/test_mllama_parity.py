"""Logits, loss, gradients and greedy tokens of Mllama against transformers and PEFT, in float32."""

import functools

import jax
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from tests.models.mllama_cases import EOS, Case, Tiles, batches, random_torch_model, tiny_config
from vlmlora.generation.greedy import greedy_decode
from vlmlora.lora.apply import adapted_modules
from vlmlora.lora.peft_format import load_adapter_into
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.module_table import module_table
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Trainable
from vlmlora.training.loss import IGNORE_INDEX, cross_entropy, next_token_labels
from vlmlora.training.remat import remat_policy

ONE_EACH = Case([[3, Tiles(1, 2), 5], [Tiles(2, 2), 7], [2, Tiles(1, 1), 2], [9]])
"""Canvases of two, four and one of four tiles, a row without an image; rows of several lengths."""
SEVERAL = Case([[3, Tiles(1, 2), 5, Tiles(3, 1), 3], [1, Tiles(1, 1), Tiles(1, 3), 4], [9]])
"""Images that later ones replace, two together, and a row without an image."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that the head's frequencies lie on both sides of its bounds, and between.
    "original_max_position_embeddings": 64,
}

CASES = {
    "one_image": (tiny_config(), ONE_EACH),
    "several_images": (
        tiny_config(text={"cross_attention_layers": [0, 1, 4], "num_hidden_layers": 5}),
        SEVERAL,
    ),
    "llama3_rotary": (
        tiny_config(
            text={
                "cross_attention_layers": [2],
                "num_key_value_heads": 4,
                "hidden_size": 64,
                "rope_parameters": LLAMA3,
            },
            vision={"intermediate_layers_indices": [2, 0], "num_global_layers": 1},
        ),
        Case([[40, Tiles(4, 1), 30]]),
    ),
    "other_tiles": (
        tiny_config(
            text={"cross_attention_layers": [0, 3], "num_key_value_heads": 1, "tie_word_embeddings": True},
            vision={
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                "image_size": 24,
                "hidden_act": "quick_gelu",
            },
        ),
        Case([[4, Tiles(1, 2), 5], [Tiles(1, 1), 3]]),
    ),
    "text_only": (tiny_config(), Case([[7], [12], [1]])),
    "no_cross_attention": (tiny_config(text={"cross_attention_layers": []}), ONE_EACH),
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
        target_modules=r".*(_proj|fc1|fc2|multi_modal_projector)",
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


def test_logits_loss_and_gradients(case):
    directory, adapted, theirs, ours, valid = case
    module = load(directory)

    graphdef, adapters, frozen = nnx.split(module, Trainable, ...)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_logits(adapters, frozen, batch):
        model = nnx.merge(graphdef, adapters, frozen)
        hidden, _ = model(**model_inputs(batch), remat=remat_policy(True))
        labels = next_token_labels(batch["labels"])
        total = cross_entropy(hidden.reshape(-1, hidden.shape[-1]), model.logits, labels.reshape(-1))
        return total / (labels != IGNORE_INDEX).sum(), model.logits(hidden)

    output = adapted(**theirs)
    output.loss.backward()
    expected = output.logits.detach().numpy()
    (loss, logits), gradients = loss_and_logits(adapters, frozen, ours)
    difference = np.abs(np.asarray(logits) - expected)[valid].max()
    # Both compute in float32, in another order: measured differences are near 1e-6 of the largest logit.
    assert difference <= 1e-4 * np.abs(expected[valid]).max()

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


@pytest.mark.parametrize("name", ["one_image", "several_images", "text_only"])
def test_greedy_tokens_and_logits_of_rows_alone(name, tmp_path):
    """A row gives what it gives alone, so that transformers' batches, with blank images, need not be made."""
    config, case = CASES[name]
    model = random_torch_model(config, seed=2)
    model.save_pretrained(tmp_path)
    theirs, ours, valid = batches(case, config, seed=3)
    if "image_index" in ours:
        ours["image_index"] = np.where(ours["image_spans"][..., 1] > 0, ours["image_index"], -1)
    module = load_model(tmp_path, read_config(tmp_path), dtype=np.float32, quantize=None, progress=False)
    logits = np.asarray(compute_logits(module, ours))
    tokens = greedy_decode(
        *nnx.split(module), ours, max_new_tokens=10, eos_token_ids=(EOS,), pad_token_id=EOS
    )

    for row, length in enumerate(valid.sum(1)):
        inputs = _row(theirs, ours, row, length)
        with torch.no_grad():
            expected = model(**inputs).logits[0].numpy()
        # The tolerance of the batch's logits.
        assert np.abs(logits[row, :length] - expected).max() <= 1e-4 * np.abs(expected).max()
        expected = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=EOS)
        expected = expected[0, length:].numpy()
        np.testing.assert_array_equal(np.asarray(tokens)[row, : len(expected)], expected)
        assert (np.asarray(tokens)[row, len(expected) :] == EOS).all()


def _row(theirs, ours, row, length):
    """One row of transformers' inputs without its padding, with its own images alone."""
    out = {name: theirs[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
    images = int((ours["image_index"][row] >= 0).sum()) if "image_index" in ours else 0
    if images:
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            out[name] = theirs[name][row : row + 1, :images]
        out["cross_attention_mask"] = theirs["cross_attention_mask"][row : row + 1, :length, :images]
    return out
