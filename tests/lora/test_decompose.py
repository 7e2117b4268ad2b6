"""Starts that take the adapter out of the base weight, against the real PEFT on the same weights."""

import copy
import inspect
import warnings

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from peft.tuners.lora import layer as peft_layer
from peft.utils import loftq_utils

from tests.models.qwen2_5_vl_cases import Case, Visual, batches, random_torch_model, tiny_config
from vlmlora.lora.apply import adapted_modules, add_adapters, remove_adapters, trainable_parameters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.decompose import loftq, split_weight
from vlmlora.lora.peft_format import load_adapter_into, save_adapter
from vlmlora.lora.selection import select
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.module_table import linear_modules, module_table
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.trained import RowsWeight
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.bitsandbytes import read
from vlmlora.quantization.weights import NF4Weight

# On a CPU bitsandbytes decodes matrices wrongly whose rows are no whole number of blocks of 64.
TARGETS = ["q_proj", "layers.0.mlp.up_proj", "merger.mlp.2"]
MIXED = {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "target_modules": TARGETS}
STARTS = {
    "pissa": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa_niter": {"init_lora_weights": "pissa_niter_20", "lora_alpha": 6},
    "olora": {
        "init_lora_weights": "olora",
        "use_rslora": True,
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
    "loftq": {"init_lora_weights": "loftq", "lora_alpha": 4, "loftq_config": {"loftq_iter": 1}},
    "loftq, 3 iterations": {
        "init_lora_weights": "loftq",
        "lora_alpha": 4,
        "loftq_config": {"loftq_bits": 4, "loftq_iter": 3},
    },
}


@pytest.fixture
def loftq_on_a_cpu(monkeypatch):
    """PEFT's own function, which knows no device but a GPU, with the device's name replaced."""
    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"cuda"') == 1
    scope = dict(vars(loftq_utils))
    exec(source.replace('"cuda"', '"cpu"'), scope)
    monkeypatch.setattr(peft_layer, "loftq_init", scope["loftq_init"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    random_torch_model(tiny_config()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(directory):
    config = read_config(directory)
    theirs, ours, valid = batches(Case([[3, Visual(1, 4, 6), 5], [9]]), config)
    del theirs["labels"]
    return random_torch_model(tiny_config()), module_table(config), theirs, ours, valid


@pytest.fixture
def module(directory):
    return load_model(directory, read_config(directory), dtype=np.float32, quantize=None, progress=False)


@jax.jit
def logits(module, inputs):
    return module.logits(module(**model_inputs(inputs))[0])


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def adapted(model):
    return {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}


def own_arrays(module, table):
    """Base weight, scaling · B A, and the rank of every adapted module."""
    linears = linear_modules(module)
    for spec, adapter, index in adapted_modules(module, table):
        weight = linears[spec.path].weight.get_value()
        weight = weight if index is None else weight.layer(spec.layer)
        dense = np.asarray(weight.dequantize(jnp.float32))
        plain = copy.copy(adapter)
        plain.magnitude = None
        zero = jnp.zeros_like(dense)
        yield spec.name, dense, np.asarray(plain.merged(zero, index)), adapter.r


@pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS.keys())
def test_start_equals_pefts_and_the_saved_adapter_is_right_on_the_right_base(
    base, module, loftq_on_a_cpu, tmp_path, arguments
):
    torch_model, table, theirs, ours, valid = base
    arguments = {**MIXED, "lora_alpha": 2, **arguments}
    config = LoraConfig(**arguments)
    plain = torch_model(**theirs).logits.detach().numpy()
    scale = np.abs(plain[valid]).max()
    untouched = {
        path: np.asarray(linear.weight.get_value().dequantize(jnp.float32))
        for path, linear in linear_modules(module).items()
    }

    if config.loftq_config:
        arguments["loftq_config"] = config.loftq_config
    oracle = quiet(peft.get_peft_model, copy.deepcopy(torch_model), peft.LoraConfig(**arguments))
    selection = select(table, config)
    add_adapters(module, selection, config, jax.random.key(0))
    expected = adapted(oracle)
    found = list(own_arrays(module, table))
    assert {name for name, *_ in found} == expected.keys()
    assert trainable_parameters(module) == oracle.get_nb_trainable_parameters()[0] == selection.parameters
    for name, weight, delta, r in found:
        theirs_weight = expected[name].base_layer.weight.detach().numpy()
        theirs_delta = expected[name].scaling["default"] * (
            expected[name].lora_B["default"].weight @ expected[name].lora_A["default"].weight
        )
        assert r == expected[name].r["default"]
        size = np.abs(theirs_weight).max()
        if "niter" in config.init_lora_weights:
            # Two random projections of weights without a gap in their spectrum: as much of the weight is
            # caught, if not the same.
            rest, wanted = (
                np.linalg.norm(weight + delta - d) for d in (delta, theirs_delta.detach().numpy())
            )
            assert rest == pytest.approx(wanted, rel=5e-3)
            best = np.linalg.svd(weight + delta, compute_uv=False)[r:]
            assert rest == pytest.approx(np.linalg.norm(best), rel=5e-3)
        else:
            # float32 decompositions by different routines. Where LoftQ quantises what is left of a first
            # adapter, an element between two levels may fall to either side.
            close = np.isclose(delta, theirs_delta.detach(), atol=1e-4 * size)
            assert close.mean() > (1 if "loftq" not in config.init_lora_weights else 0.99) - 1e-9
            close = np.isclose(weight, theirs_weight, atol=1e-4 * size)
            assert close.mean() > (1 if "loftq" not in config.init_lora_weights else 0.999) - 1e-9
    for path, linear in linear_modules(module).items():
        if linear.adapter is None:
            np.testing.assert_array_equal(linear.weight.get_value().value, untouched[path])
    if "loftq" not in config.init_lora_weights:
        # The start changes nothing: float32, another order of sums.
        assert np.abs(np.asarray(logits(module, ours)) - plain)[valid].max() <= 1e-4 * scale

    rng = np.random.default_rng(0)
    state = nnx.state(module, Trainable)
    noise = lambda a: a + jnp.asarray(rng.normal(0, 0.03, a.shape), a.dtype)  # noqa: E731
    nnx.update(module, jax.tree.map(noise, state))
    trained = np.asarray(logits(module, ours))
    assert np.abs(trained - plain)[valid].max() > 0.05 * scale

    save_adapter(tmp_path, module, table, config)
    remove_adapters(module)
    if not config.loftq_config:
        for path, linear in linear_modules(module).items():
            np.testing.assert_allclose(linear.weight.get_value().value, untouched[path], atol=1e-6)
    right_base = copy.deepcopy(torch_model)
    if config.loftq_config and config.loftq_config["loftq_iter"] == 1:
        for name, linear in right_base.named_modules():
            if name in expected:
                quantize_as_bitsandbytes(linear)
    loaded = quiet(peft.PeftModel.from_pretrained, right_base, tmp_path)
    again = loaded(**theirs).logits.detach().numpy()
    # As in the comparison with PEFT's logits; LoftQ repeated by PEFT may round single elements otherwise.
    tolerance = 1e-2 if config.loftq_config and config.loftq_config["loftq_iter"] > 1 else 2e-4
    assert np.abs(trained - again)[valid].max() <= tolerance * scale


def quantize_as_bitsandbytes(linear):
    """Put the decoded NF4 values, without doubly quantised scales, into a linear layer."""
    codes, state = bnb.functional.quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=False
    )
    linear.weight.data = bnb.functional.dequantize_4bit(codes, state).reshape(linear.weight.shape)


def test_loftq_with_8_bits_equals_pefts(loftq_on_a_cpu):
    torch.manual_seed(0)
    weight = torch.randn(48, 64) * 0.1
    base, lora_A, lora_B = peft_layer.loftq_init(weight, 8, 4, 2)
    found_A, found_B, found = loftq(jnp.asarray(weight.numpy()), 4, bits=8, iterations=2)
    # Steps of an 8-bit code are near 1e-3 here; float32 decompositions by different routines.
    np.testing.assert_allclose(found, base, atol=1e-6)
    np.testing.assert_allclose(found_B @ found_A, lora_B @ lora_A, atol=1e-6)


def test_a_base_that_does_not_allow_the_start_is_refused_and_stays(flax_model, table):
    linears = linear_modules(flax_model)
    path = "model.language_model.layers.self_attn.q_proj"
    dense = linears[path].weight.get_value()
    config = {"target_modules": ["k_proj", "q_proj"], "r": 2}
    linears[path].weight.set_value(NF4Weight.quantize(dense.value))
    before = jax.tree.leaves(nnx.state(flax_model))
    for init in ("pissa", "pissa_niter_2", "loftq"):
        refused = LoraConfig(**config, init_lora_weights=init)
        with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is quantised: .*load_in_16bit=True"):
            add_adapters(flax_model, select(table, refused), refused, jax.random.key(0))
    after = jax.tree.leaves(nnx.state(flax_model))
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert all(linear.adapter is None for linear in linears.values())
    with pytest.raises(ValueError, match=r"q_proj \[32, 32\] a rank of at most 32, not 33"):
        select(table, LoraConfig(init_lora_weights="olora", r=33, target_modules=["q_proj"]))
    linears[path].weight.set_value(RowsWeight(dense, jnp.ones((1, 32)), (0,)))
    olora = LoraConfig(**config, init_lora_weights="olora")
    with pytest.raises(ValueError, match="stored as RowsWeight; make the adapter first"):
        add_adapters(flax_model, select(table, olora), olora, jax.random.key(0))


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_an_adapter_that_peft_saved_unconverted_repeats_its_start(
    base, module, loftq_on_a_cpu, tmp_path, init
):
    torch_model, table, *_ = base
    arguments = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    if init == "loftq":
        arguments["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 2}
    oracle = quiet(peft.get_peft_model, copy.deepcopy(torch_model), peft.LoraConfig(**arguments))
    expected = adapted(oracle)
    with torch.no_grad():
        for layer in expected.values():
            layer.lora_B["default"].weight.add_(0.1)
    quiet(oracle.save_pretrained, tmp_path)
    config = load_adapter_into(module, table, tmp_path)
    for name, weight, delta, _ in own_arrays(module, table):
        np.testing.assert_allclose(delta, expected[name].get_delta_weight("default").detach(), atol=1e-5)
        size = np.abs(weight).max()
        close = np.isclose(weight, expected[name].base_layer.weight.detach(), atol=1e-4 * size)
        assert close.mean() >= (1 if init != "loftq" else 0.999)
    save_adapter(tmp_path / "again", module, table, config)
    if init != "loftq":
        again = quiet(peft.PeftModel.from_pretrained, copy.deepcopy(torch_model), tmp_path / "again")
        for name, layer in adapted(again).items():
            merged = layer.base_layer.weight + layer.get_delta_weight("default")
            wanted = expected[name].base_layer.weight + expected[name].get_delta_weight("default")
            np.testing.assert_allclose(merged.detach(), wanted.detach(), atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_olora_quantises_the_rest_as_peft_does(double_quant):
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(
        64, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double_quant
    ).to("cpu")

    def state_of(layer):
        state = layer.state_dict()
        return read("x", {f"x.{key}": value.numpy() for key, value in state.items()})

    weight = jax.tree.map(jnp.asarray, state_of(linear))
    oracle = peft.get_peft_model(
        torch.nn.Sequential(linear),
        peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"], init_lora_weights="olora"),
    ).base_model.model[0]
    config = LoraConfig(r=4, lora_alpha=2, init_lora_weights="olora")
    lora_A, lora_B, rest = split_weight(weight, config, r=4, scaling=0.5)
    np.testing.assert_allclose(lora_A, oracle.lora_A["default"].weight.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lora_B, oracle.lora_B["default"].weight.detach(), rtol=1e-4, atol=1e-5)
    expected = state_of(oracle.base_layer)
    assert jax.tree.structure(rest) == jax.tree.structure(weight)
    # An element between two levels may fall to either side.
    assert (np.asarray(rest.codes) == expected.codes).mean() > 0.995
