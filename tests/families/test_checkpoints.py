"""Checkpoints of every version of transformers and of bitsandbytes, read and written."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from tests.families.parity import assert_logits, load, logits
from tests.loading.checkpoints import as_numpy, decoded, dense_parameters, parameters
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.module_table import linear_modules
from vlmlora.models.saving import save_checkpoint
from vlmlora.quantization.weights import DenseWeight, INT8Weight, MixedWeight, NF4Weight

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = {
    "nf4": NF4 | {"bnb_4bit_use_double_quant": False},
    "nf4 and 16 bit": NF4 | {"bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def stored(family, tmp_path_factory):
    """A checkpoint in bfloat16 as transformers writes it, and the model's parameters by today's names."""
    directory = tmp_path_factory.mktemp("stored")
    model = family.random_model(family.first.config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return directory, dict(model.named_parameters())


def assert_same(module, theirs):
    ours = dense_parameters(module)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], as_numpy(tensor), err_msg=name)


def test_keys_of_every_era_are_read(family, stored, tmp_path):
    directory, theirs = stored
    config = read_config(directory)
    spellings = {era: {rename(name) for name in theirs} for era, rename in family.eras.items()}
    assert set(load_file(directory / "model.safetensors")) in spellings.values()
    for era, rename in family.eras.items():
        renamed = tmp_path / era
        renamed.mkdir()
        tensors = {rename(name): tensor.detach().contiguous() for name, tensor in theirs.items()}
        save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
        assert_same(load_model(renamed, config, dtype=jnp.bfloat16, progress=False), theirs)


def test_transformers_reads_what_is_written(family, stored, tmp_path):
    directory, theirs = stored
    config = read_config(directory)
    save_checkpoint(load_model(directory, config, dtype=jnp.bfloat16, progress=False), config, tmp_path)
    model, info = family.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    found = dict(model.named_parameters())
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(as_numpy(found[name]), as_numpy(tensor), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_bitsandbytes_quantised_is_decoded_and_computes(family, stored, tmp_path, kind):
    directory, _ = stored
    arguments = dict(KINDS[kind])
    if kind == "nf4 and 16 bit":
        arguments["llm_int8_skip_modules"] = list(family.left_in_16_bit)
    theirs = family.model_class.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(**arguments), dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path)
    config = read_config(tmp_path)

    module = load_model(tmp_path, config, dtype=jnp.bfloat16, progress=False)
    ours = parameters(module)
    expected = {f"{name}.weight": w for name, m in theirs.named_modules() if (w := decoded(m)) is not None}
    quantised = INT8Weight if kind == "int8" else NF4Weight
    weights = {name: w for name, w in ours.items() if isinstance(w, quantised)}
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        dtype = "float32" if expected[name].dtype == torch.float32 else "bfloat16"
        np.testing.assert_array_equal(
            np.asarray(weight.dequantize(dtype).astype(np.float32)), as_numpy(expected[name]), err_msg=name
        )
    for name, parameter in theirs.named_parameters():
        if name not in expected:
            found = ours[name].value if isinstance(ours[name], DenseWeight) else ours[name]
            np.testing.assert_array_equal(np.asarray(found.astype(np.float32)), as_numpy(parameter))
    kinds = {type(linear.weight.get_value()) for linear in linear_modules(module).values()}
    assert (MixedWeight in kinds) == (kind == "nf4 and 16 bit")

    if kind == "nf4":
        return
    # transformers computes with the same weights, decoded beforehand.
    module = load(tmp_path)
    dense = family.model_class(config).float().eval()
    dense.load_state_dict({name: torch.tensor(value) for name, value in dense_parameters(module).items()})
    inputs = family.make_inputs(family.first.rows, config, 0)
    with torch.no_grad():
        assert_logits(logits(module, inputs.ours), dense(**inputs.theirs).logits, inputs.valid)
