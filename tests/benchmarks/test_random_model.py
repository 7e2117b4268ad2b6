"""Models with random weights: sizes, deviations, and training, on one device and on a mesh."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import train_step
from benchmarks.random_model import random_model
from benchmarks.shapes import CONFIGS, make_config
from vlmlora.distributed import make_mesh, mesh_of
from vlmlora.models.module_table import linear_modules, module_table
from vlmlora.quantization.weights import DenseWeight, INT8Weight, NF4Weight

SMALL = {"layers": 4, "vision_layers": 2, "shrink": 4}


@pytest.mark.parametrize(
    ("quant", "kind"),
    [
        ("nf4", NF4Weight),
        pytest.param("int8", INT8Weight, marks=pytest.mark.slow),
        pytest.param("none", DenseWeight, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name", ["qwen2_5_vl-7b", pytest.param("llama-3.2-11b-vision", marks=pytest.mark.slow)]
)
def test_decoded_weights_have_the_deviation_of_an_initialised_model(name, quant, kind):
    model = random_model(make_config(name, **SMALL), quant)
    for spec in module_table(model.config):
        weight = linear_modules(model.module)[spec.path].weight.get_value()
        assert isinstance(weight, kind if spec.part in ("vision", "language") else DenseWeight)
        if spec.layer in (None, 0):
            decoded = weight.dequantize(jnp.float32)
            assert float(jnp.std(decoded)) == pytest.approx(0.02, rel=0.03)
            assert abs(float(jnp.mean(decoded))) < 0.002


def test_seed_alone_decides():
    config = make_config("qwen2_5_vl-7b", layers=1, vision_layers=1, shrink=4)
    first, again, other = (
        linear_modules(random_model(config, seed=seed).module)["model.language_model.layers.mlp.up_proj"]
        for seed in (0, 0, 1)
    )
    codes = [linear.weight.get_value().codes for linear in (first, again, other)]
    assert jnp.array_equal(codes[0], codes[1])
    assert not jnp.array_equal(codes[0], codes[2])


def test_unknown_quantization_is_refused():
    with pytest.raises(ValueError, match="'nf4', 'int8', 'none'"):
        random_model(make_config("qwen2_5_vl-7b", **SMALL), "q4")


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_on_a_mesh_every_device_makes_its_part(quant):
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    model = random_model(make_config("qwen2_5_vl-7b", **SMALL), quant, mesh=mesh)
    weight = linear_modules(model.module)["model.language_model.layers.mlp.up_proj"].weight.get_value()
    assert mesh_of(weight) == mesh
    for array in jax.tree.leaves(weight.parts):
        if array.size > 10_000:
            assert {shard.data.size for shard in array.addressable_shards} == {array.size // 4}
    decoded = weight.layer(0).dequantize(jnp.float32)
    assert float(jnp.std(decoded)) == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("name", CONFIGS)
def test_shrunken_models_keep_their_build(name):
    whole = {spec.path for spec in module_table(make_config(name))}
    small = {spec.path for spec in module_table(make_config(name, **SMALL))}
    assert whole == small
    with pytest.raises(ValueError, match="does not divide"):
        make_config(name, shrink=7)


@pytest.mark.slow
def test_train_step_measures_and_saves(tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.json"
    small = ["--layers", "1", "--vision-layers", "1", "--shrink", "4", "--r", "4"]
    arguments = [*small, "--work", "1x300", "--policy", "True", "auto", "--steps", "1", "--profile"]
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments, "--out", str(out)])
    train_step.main()
    result = json.loads(out.read_text())
    work, chosen = result["work"]
    # A CPU has no limit.
    assert chosen["chosen"] == "'attention+mlp'"
    assert work["losses"][-1] < work["losses"][0]
    assert work["policy"] is True
    assert work["profile"]["parts_ms"].keys() >= {"vision", "language", "loss", "optimizer"}
    # One JSON line for each measurement as it is made.
    assert any(line.startswith('{"rows": 1') for line in capsys.readouterr().out.splitlines())
