"""Reader and writer against layers that bitsandbytes and transformers saved."""

import json

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from vlmlora.quantization.bitsandbytes import (
    abstract,
    is_quantized,
    quant_state_key,
    read,
    tensor_keys,
    write,
)
from vlmlora.quantization.weights import INT8Weight, NF4Weight

NAME = "model.layers.0.mlp.down_proj"
STATE = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4_single": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each way of storing: the file that transformers saved, and the model that it came from."""
    torch.manual_seed(0)
    # in = 36 in down_proj: blocks straddle rows.
    config = LlamaConfig(
        hidden_size=40,
        intermediate_size=36,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        tie_word_embeddings=False,
    )
    source = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    models = {}
    for kind, options in CONFIGS.items():
        model = LlamaForCausalLM.from_pretrained(
            source, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16, device_map="cpu"
        )
        path = tmp_path_factory.mktemp(kind)
        model.save_pretrained(path)
        models[kind] = (load_file(path / "model.safetensors"), model)
    return models


def decoded(kind, layer):
    if kind == "int8":
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).numpy()
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().numpy()


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_saved_decodes_as_bitsandbytes_decodes_it(saved, kind):
    tensors, model = saved[kind]
    for name, layer in model.named_modules():
        if not isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            continue
        assert is_quantized(tensors, name)
        weight = jax.tree.map(jnp.asarray, read(name, tensors))
        dtype = "float32" if kind == "int8" else "bfloat16"
        np.testing.assert_array_equal(weight.dequantize(dtype).astype("float32"), decoded(kind, layer))
    assert not is_quantized(tensors, "lm_head")
    assert tensor_keys(tensors, "lm_head") == ()


@pytest.mark.parametrize("kind", CONFIGS)
def test_writing_gives_back_the_same_bytes(saved, kind):
    tensors, _ = saved[kind]
    written = write(NAME, read(NAME, tensors))
    assert sorted(written) == sorted(tensor_keys(tensors, NAME))
    assert sorted(written) == sorted(key for key in tensors if key.startswith(NAME))
    for key, array in written.items():
        assert (array.dtype, array.shape) == (tensors[key].dtype, tensors[key].shape)
        assert array.tobytes() == tensors[key].tobytes()


@pytest.mark.parametrize("kind", CONFIGS)
def test_headers_describe_what_read_returns(saved, kind):
    tensors, _ = saved[kind]
    headers = {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in tensors.items()}
    key = quant_state_key(headers, NAME)
    found = abstract(NAME, headers, None if key is None else tensors[key])
    expected = read(NAME, tensors)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(found)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(expected)
    ]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_loads_what_we_quantised(quant_type, double_quant):
    values = jax.random.normal(jax.random.key(0), (5, 37), jnp.bfloat16)
    weight = NF4Weight.quantize(values, quant_type=quant_type, double_quant=double_quant)
    tensors = {key: torch.from_numpy(array.copy()) for key, array in write("x", weight).items()}
    codes = tensors.pop("x.weight")
    parameter = bnb.nn.Params4bit.from_prequantized(codes, tensors, device="cpu")
    expected = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert expected.dtype == torch.bfloat16
    np.testing.assert_array_equal(weight.dequantize("float32"), _in_float32(parameter))
    np.testing.assert_array_equal(weight.dequantize("bfloat16").astype("float32"), expected.float().numpy())


def _in_float32(parameter):
    parameter.quant_state.dtype = torch.float32
    result = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state).numpy()
    parameter.quant_state.dtype = torch.bfloat16
    return result


def test_bitsandbytes_loads_our_int8():
    weight = INT8Weight.quantize(jax.random.normal(jax.random.key(0), (5, 37)))
    layer = bnb.nn.Linear8bitLt(37, 5, bias=False, has_fp16_weights=False).to("cpu")
    layer.load_state_dict({k[2:]: torch.from_numpy(v.copy()) for k, v in write("x", weight).items()})
    np.testing.assert_array_equal(layer.weight.data.numpy(), weight.codes)
    np.testing.assert_array_equal(layer.weight.SCB.numpy(), weight.scale)


def test_codes_stored_in_another_type(saved):
    """``bnb_4bit_quant_storage=bfloat16``, which FSDP users choose, holds the same bytes."""
    tensors, _ = saved["nf4"]
    stored = dict(tensors)
    stored[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].reshape(-1).view(ml_dtypes.bfloat16).reshape(-1, 1)
    np.testing.assert_array_equal(read(NAME, stored).codes, read(NAME, tensors).codes)


def state_with(tensors, **changes):
    state = json.loads(bytes(tensors[STATE])) | changes
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


@pytest.mark.parametrize(
    ("key", "change", "error", "message"),
    [
        ("weight.absmax", None, KeyError, "missing {name}.weight.absmax"),
        ("weight.nested_absmax", None, KeyError, "missing {name}.weight.nested_absmax"),
        (
            "weight.absmax",
            lambda a: a[:-1],
            ValueError,
            r"absmax is uint8\[22\]; .* needs uint8\[23\]",
        ),
        ("weight.absmax", lambda a: a.astype("float32"), ValueError, "{name}.weight.absmax is float32"),
        (
            "weight",
            lambda a: a[:-1],
            ValueError,
            r"{name}.weight holds 719 bytes; .* needs 720",
        ),
        (
            "weight.quant_map",
            lambda a: a[::-1].copy(),
            ValueError,
            r"{name}.weight.quant_map is .*, not the values of nf4",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(saved, key, change, error, message):
    tensors = dict(saved["nf4"][0])
    array = tensors.pop(f"{NAME}.{key}")
    if change is not None:
        tensors[f"{NAME}.{key}"] = change(array)
    with pytest.raises(error, match=message.format(name=NAME)):
        read(NAME, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 63}, "blocksize is 63; supported: an even number"),
        ({"dtype": "int8"}, "dtype is 'int8'; supported: bfloat16 or float16 or float32"),
        ({"shape": [40, 36, 1]}, r"shape is \[40, 36, 1\]; supported: \[out, in\]"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4'; supported: nf4"),
        ({"nested_blocksize": 128}, "nested_blocksize is 128; supported: 256"),
    ],
)
def test_a_state_that_is_not_supported_is_named(saved, changes, message):
    tensors = dict(saved["nf4"][0])
    tensors[STATE] = state_with(tensors, **changes)
    with pytest.raises(ValueError, match=message):
        read(NAME, tensors)


def test_other_errors(saved):
    tensors = dict(saved["nf4"][0])
    tensors[STATE] = np.frombuffer(b"not json", np.uint8)
    with pytest.raises(ValueError, match="does not hold JSON"):
        read(NAME, tensors)
    with pytest.raises(KeyError, match="lm_head is not quantised"):
        read("lm_head", tensors)
    int8 = dict(saved["int8"][0])
    int8[f"{NAME}.weight_format"] = np.asarray(2, np.uint8)
    with pytest.raises(ValueError, match="weight_format is 2; only 0"):
        read(NAME, int8)
    int8[f"{NAME}.SCB"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"SCB is float32\[3\]; .* needs float32\[40\]"):
        read(NAME, int8)
