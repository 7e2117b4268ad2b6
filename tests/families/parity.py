"""Both sides of a comparison, and how close they must be."""

from pathlib import Path

import jax
import numpy as np
import peft
import torch
from flax import nnx
from transformers import PreTrainedModel

from tests.families.description import Description, Inputs
from vlmlora.lora.apply import adapted_modules
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.module_table import ModuleTable
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Trainable
from vlmlora.training.loss import make_loss_fn

LOGITS = 1e-4
"""Of the largest logit. Both sides compute in float32 and sum in another order: measured differences are near
1e-6, those of a wrong mask, position or activation above 1e-2."""

LOSS = 1e-5
"""Relative; a mean over tokens of the same float32 logits."""

GRADIENT = 1e-3
"""Relative error of a matrix in the Frobenius norm. Sums over tokens and layers run in another order:
measured errors are below 1e-5."""

SAME = 1e-5
"""Relative; the same float32 products of this library in a program of another shape."""

POLICIES = (False, "unsloth", "attention+mlp")
"""Kinds of gradient checkpointing compared on one case of a family: none, layer inputs in host memory, values
by name. All other cases run True, which saves the layer inputs."""


def linear_names(model: PreTrainedModel, *, head: bool = True) -> list[str]:
    """The linear modules of a transformers model, with the language model's head or without."""
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (head or module is not output)
    ]


def load(directory: Path) -> nnx.Module:
    """This library's model of a checkpoint, in float32 as it is stored."""
    return load_model(directory, read_config(directory), dtype=np.float32, quantize=None, progress=False)


@jax.jit
def logits(module: nnx.Module, batch: dict) -> jax.Array:
    """This library's logits."""
    return module.logits(module(**model_inputs(batch))[0])


def evaluate(module: nnx.Module, inputs: Inputs, policies: tuple[bool | str, ...]):
    """Logits, and for each gradient-checkpointing policy loss and gradients, compiled as one program.

    Returns:
        The logits, the losses, and the model with gradients in place of its trainable parameters, for each
        policy.
    """
    graphdef, adapters, frozen = nnx.split(module, Trainable, ...)
    losses = [make_loss_fn(graphdef, gradient_checkpointing=policy, chunk_size=16) for policy in policies]

    @jax.jit
    def run(adapters, frozen, batch):
        merged = nnx.merge(graphdef, adapters, frozen)
        found = merged.logits(merged(**model_inputs(batch))[0])
        return found, [jax.value_and_grad(loss)(adapters, frozen, batch) for loss in losses]

    found, results = run(adapters, frozen, inputs.ours)
    values, gradients = zip(*results, strict=True)
    return found, values, [nnx.merge(graphdef, each, frozen) for each in gradients]


def assert_logits(found: jax.Array, expected: torch.Tensor, valid: np.ndarray) -> None:
    """Compare where tokens stand."""
    expected = expected.detach().numpy()[valid]
    difference = np.abs(np.asarray(found)[valid] - expected).max()
    assert difference <= LOGITS * np.abs(expected).max(), f"{difference / np.abs(expected).max():.2e}"


def assert_gradients(
    gradients: nnx.Module, table: ModuleTable, adapted: peft.PeftModel | peft.PeftMixedModel
) -> None:
    """Compare every LoRA matrix's gradient with PEFT's, which must all be met."""
    expected = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    compared = 0
    for spec, gradient, index in adapted_modules(gradients, table):
        for matrix in ("lora_A", "lora_B"):
            found = np.asarray(getattr(gradient, matrix).get_value())
            found = found if index is None else found[index]
            theirs = expected.pop(f"base_model.model.{spec.name}.{matrix}.default.weight")
            if theirs is None:
                # PyTorch leaves out what the batch did not use; here it is computed, as zero.
                assert not found.any()
                continue
            error = np.linalg.norm(found - theirs.numpy()) / np.linalg.norm(theirs.numpy())
            assert error <= GRADIENT, f"{spec.name}.{matrix}: {error:.2e}"
            compared += 1
    assert not expected
    assert compared > 0


def adapt_with_peft(model: PreTrainedModel, seed: int = 1) -> peft.PeftModel:
    """The real PEFT with random adapters on every linear module but the head."""
    arguments = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    torch.manual_seed(seed)
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=linear_names(model, head=False), **arguments)
    )


def cases_of(families: dict[str, Description]) -> list[tuple[str, str]]:
    """Every family's every case, by name."""
    return [(family, case) for family, each in families.items() for case in each.cases]
