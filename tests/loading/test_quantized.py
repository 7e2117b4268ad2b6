"""Checkpoints that bitsandbytes quantised, and 16-bit ones quantised on load, against bitsandbytes itself."""

import bitsandbytes
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.loading.checkpoints import (
    as_numpy,
    decoded,
    dense_parameters,
    parameters,
    rewrite,
    write_checkpoint,
    write_quantized,
)
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.module_table import module_table
from vlmlora.quantization.weights import DenseWeight, INT8Weight, MixedWeight, NF4Weight

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def quantized(bf16_checkpoint, tmp_path_factory):
    """Each way of storing → (directory, transformers' quantised model)."""
    directory, _ = bf16_checkpoint
    made = {}
    for kind, arguments in KINDS.items():
        target = tmp_path_factory.mktemp(kind)
        made[kind] = target, write_quantized(directory, target, **arguments)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_to_what_bitsandbytes_decodes(quantized, kind):
    directory, theirs = quantized[kind]
    ours = parameters(load_model(directory, read_config(directory), dtype=jnp.bfloat16, quantize="nf4"))
    expected = {f"{name}.weight": w for name, m in theirs.named_modules() if (w := decoded(m)) is not None}
    weights = {name: w for name, w in ours.items() if isinstance(w, NF4Weight | INT8Weight)}
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert isinstance(weight, INT8Weight if kind == "int8" else NF4Weight)
        assert getattr(weight, "double_quant", False) == (kind == "nf4_double")
        dtype = "float32" if expected[name].dtype == torch.float32 else "bfloat16"
        np.testing.assert_array_equal(
            np.asarray(weight.dequantize(dtype).astype(np.float32)), as_numpy(expected[name]), err_msg=name
        )
    for name, parameter in theirs.named_parameters():
        if name not in expected:
            found = ours[name].value if isinstance(ours[name], DenseWeight) else ours[name]
            np.testing.assert_array_equal(np.asarray(found.astype(np.float32)), as_numpy(parameter))


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
def test_quantising_on_load_gives_what_bitsandbytes_stores(bf16_checkpoint, quantized, kind):
    directory, _ = bf16_checkpoint
    config = read_config(directory)
    ours = parameters(load_model(directory, config, dtype="bfloat16", quantize=kind.partition("_")[0]))
    stored = parameters(load_model(quantized[kind][0], config, dtype="bfloat16"))
    parts = {f"{row.name}.weight": row.part for row in module_table(config)}
    for name, part in parts.items():
        if part not in ("vision", "language"):
            assert isinstance(ours[name], DenseWeight), name
            continue
        assert type(ours[name]) is type(stored[name])
        if kind == "int8":
            np.testing.assert_array_equal(ours[name].codes, stored[name].codes, err_msg=name)
            np.testing.assert_array_equal(ours[name].scale, stored[name].scale, err_msg=name)
            continue
        np.testing.assert_array_equal(ours[name].codes, stored[name].codes, err_msg=name)
        np.testing.assert_array_equal(ours[name].absmax.codes, stored[name].absmax.codes, err_msg=name)
        # The mean of the scales is summed in another order by torch: some units in the last place.
        for field in ("absmax", "offset"):
            np.testing.assert_allclose(
                getattr(ours[name].absmax, field), getattr(stored[name].absmax, field), rtol=2e-6
            )


def test_casts_before_it_quantises(tmp_path):
    """As transformers, which loads in the type asked for and then quantises."""
    theirs = write_checkpoint(tmp_path, dtype=torch.float32)
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    ours = parameters(load_model(tmp_path, read_config(tmp_path), dtype="bfloat16", quantize="nf4"))[name]
    codes, _ = bitsandbytes.functional.quantize_4bit(
        theirs[name].data.to(torch.bfloat16), quant_type="nf4", compress_statistics=True
    )
    np.testing.assert_array_equal(ours.codes, codes.numpy().reshape(-1))
    assert ours.dtype == "bfloat16"


@pytest.fixture(scope="module")
def dynamic(bf16_checkpoint, quantized, tmp_path_factory):
    """A "dynamic" 4-bit checkpoint, which leaves some layers dense: directory, and those layers' names."""
    dense = bf16_checkpoint[1]
    suffixes = ("layers.1.self_attn.q_proj", "layers.0.mlp.down_proj", "blocks.0.mlp.down_proj")
    left = {name for name in dense if name.removesuffix(".weight").endswith(suffixes)}

    def leave_dense(tensors):
        for name in left:
            (key,) = (key for key in tensors if key.endswith(name.split(".", 2)[2]))
            tensors = {k: t for k, t in tensors.items() if k != key and not k.startswith(key + ".")}
            tensors[key] = dense[name].data
        return tensors

    directory = tmp_path_factory.mktemp("dynamic") / "checkpoint"
    return rewrite(quantized["nf4_double"][0], directory, leave_dense), left


def test_layers_of_one_stack_may_be_stored_differently(bf16_checkpoint, quantized, dynamic):
    """Each tensor is what the file says it is."""
    directory, left = dynamic
    config = read_config(directory)
    model = load_model(directory, config, dtype="bfloat16", quantize="nf4")
    layers = model.model.language_model.layers
    assert isinstance(layers.self_attn.q_proj.weight.get_value(), MixedWeight)
    assert isinstance(layers.self_attn.k_proj.weight.get_value(), NF4Weight)
    uniform = dense_parameters(load_model(quantized["nf4_double"][0], config, dtype="bfloat16"))
    for name, value in dense_parameters(model).items():
        expected = as_numpy(bf16_checkpoint[1][name]) if name in left else uniform[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)
