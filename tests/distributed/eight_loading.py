"""A model that each of eight devices reads its part of is the model that one device reads."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from vlmlora.demo.handwriting import bundled_model
from vlmlora.distributed import attach_mesh, make_mesh, parameter_shardings
from vlmlora.models.load_plan import unstacked_parameters
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.registry import family_of
from vlmlora.quantization import bitsandbytes
from vlmlora.quantization.sharded import ShardedWeight, abstract_sharded
from vlmlora.quantization.weights import NF4Weight, Weight

MESH = make_mesh(data=2, fsdp=2, tensor=2)


def load(directory, quantize=None, mesh=None):
    config = read_config(directory)
    family = family_of(config)
    shardings = None
    if mesh is not None:
        shardings = parameter_shardings(family.model(config, dtype="bfloat16"), family, mesh)
    module = load_model(directory, config, dtype="bfloat16", quantize=quantize, shardings=shardings)
    if mesh is not None:
        attach_mesh(module, mesh)
    return module


@pytest.fixture
def directory(kind, tmp_path):
    """The bundled model: in 16 bit, as bitsandbytes' NF4, or with a layer of that left in 16 bit."""
    if kind == "bf16":
        return bundled_model()
    dense = dict(_parameters(load(bundled_model()))) if kind == "dynamic" else {}
    tensors = {}
    for name, value in _parameters(load(bundled_model(), "nf4")):
        if isinstance(value, NF4Weight) and not (dense and ".layers.1." in name):
            tensors |= bitsandbytes.write(name.removesuffix(".weight"), value)
        else:
            value = dense.get(name, value)
            tensors[name] = np.asarray(getattr(value, "value", value))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((bundled_model() / "config.json").read_text())
    return tmp_path


def _parameters(module):
    for _, name, layer, value in unstacked_parameters(module):
        if layer is not None:
            value = value.layer(layer) if isinstance(value, Weight) else value[layer]
        yield name, value


def _value_at(module, path):
    for part in path:
        module = getattr(module, part)
    return module.get_value()


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [
        ("bf16", "nf4"),
        pytest.param("dynamic", None, marks=pytest.mark.slow),
        pytest.param("bf16", None, marks=pytest.mark.slow),
        pytest.param("bf16", "int8", marks=pytest.mark.slow),
        pytest.param("nf4", None, marks=pytest.mark.slow),
    ],
)
def test_each_device_reads_its_part(directory, quantize):
    module, wanted = load(directory, quantize, MESH), load(directory, quantize)
    for (name, ours), (_, theirs) in zip(_parameters(module), _parameters(wanted), strict=True):
        if isinstance(theirs, Weight):
            ours, theirs = (weight.dequantize("float32") for weight in (ours, theirs))
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        ours, theirs = variable.get_value(), _value_at(wanted, path)
        layout = getattr(getattr(ours, "pools", (ours,))[0], "layout", None)
        if layout is not None:
            planned = jax.tree.leaves(abstract_sharded(theirs, layout))
            for found, plan in zip(jax.tree.leaves(ours), planned, strict=True):
                assert found.sharding.is_equivalent_to(plan.sharding, found.ndim), path
    assert_each_device_holds_its_share(module)


def assert_each_device_holds_its_share(module):
    weights = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(module))]
    cut = [weight for weight in weights if isinstance(weight, ShardedWeight)]
    total = sum(weight.nbytes for weight in cut)
    # No rule cuts the projector over ``tensor``; it is cut over ``fsdp`` alone.
    halved = sum(weight.nbytes for weight in cut if weight.layout.cut is None)
    for i in range(8):
        held = sum(leaf.addressable_shards[i].data.nbytes for leaf in jax.tree.leaves(cut))
        # A quarter or a half, padding and the 256 values behind the codes of scales.
        assert held < 0.27 * (total - halved) + 0.52 * halved, (held, halved, total)
