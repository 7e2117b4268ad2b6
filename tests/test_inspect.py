"""What `inspect` says, against transformers, PEFT, the compiler, and a GPU that was measured."""

import json

import jax
import jax.numpy as jnp
import peft
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from benchmarks.shapes import qwen2_5_vl_7b
from tests.models.qwen2_5_vl_cases import tiny_config
from vlmlora import inspection
from vlmlora.cli import app
from vlmlora.inspection import inspect_model
from vlmlora.lora.abstract import add_abstract_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.variables import Trainable
from vlmlora.training import memory
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.memory import saved_arrays

GIB = 1 << 30


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny_config().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """What the command says of the 7B shape, whose directory holds nothing but its config."""
    directory = tmp_path_factory.mktemp("7b")
    qwen2_5_vl_7b().save_pretrained(directory)
    result = run(directory, "--json", "--batch-size", 8, "--max-seq-length", 2048)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_counts_of_the_7b_model_are_the_peers(large):
    assert list(large) == ["model_type", "trainable_parameters", "total_parameters", "modules", "memory"]
    # Measured with Unsloth and PEFT at r = 16.
    assert large["trainable_parameters"] == 51_521_536
    assert large["total_parameters"] == 51_521_536 + 8_292_166_656
    assert len(large["modules"]) == 359
    assert large["modules"][0] == {
        "name": "lm_head",
        "part": "head",
        "role": "other",
        "layer": None,
        "in_features": 3584,
        "out_features": 152064,
        "selected": False,
        "r": None,
        "lora_alpha": None,
    }


def test_the_plan_agrees_with_a_step_measured_on_a_gpu(large):
    """Peak memory of one H200: benchmarks/results/peers_qwen2_5_vl-7b_h200.json, NF4, "unsloth".

    Measured were 10.01 GiB for 8 rows of 2,048 tokens, before the layer with which the backward pass begins
    kept what it does, for which the compiler takes 0.2 GiB. The plan knows no allocator and no temporaries of
    kernels, and counts one layer's activations without the compiler's reuse: a tenth either way.
    """
    assert large["memory"]["batch"] == {"rows": 8, "tokens": 2048, "images": 8}
    assert large["memory"]["total"]["nf4"]["unsloth"]["device"] == pytest.approx(10.01 * GIB, rel=0.1)
    kept = large["memory"]["activations"]
    # In bfloat16 of a layer: input, attention's output, the residual stream and queries; keys and values.
    # That is what "unsloth" moves to the host, of 28 layers but the last two.
    attention = 4 * 3584 + 2 * 512
    assert kept["unsloth"]["per_1000_tokens"]["host"] == 26 * 1000 * attention * 2
    # It keeps the products with the A of each layer's seven projections, for r = 16; and all of the layer
    # with which the backward pass begins, whose wide projections have room for the products.
    low_rank = 7 * 16
    at_end = attention + 2 * (18944 + 64) + low_rank
    moved = kept["true"]["per_1000_tokens"]["device"] - kept["unsloth"]["per_1000_tokens"]["device"]
    assert moved == pytest.approx(1000 * (27 * 3584 - 26 * low_rank - at_end) * 2, rel=1e-6)


ARGUMENTS = {
    "r": 4,
    "rank_pattern": {"q_proj": 2},
    "layers_to_transform": [1],
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["merger"],
    "trainable_token_indices": [3, 7, 8, 9],
}
OPTIONS = (
    *("--r", "4", "--rank-pattern", "q_proj=2", "--layers-to-transform", "1", "--use-dora", "--bias", "all"),
    *("--modules-to-save", "merger", "--trainable-token-indices", "3,7-9"),
)


@pytest.fixture(scope="module")
def small(tiny):
    """With two policies, each of which takes three traces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "POLICIES", (False, "unsloth"))
        return inspect_model(tiny, **ARGUMENTS)


def test_modules_and_counts_are_those_of_transformers_and_peft(small):
    found = small.to_json()
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(tiny_config())
    linears = {name: m for name, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
    rows = {row["name"]: row for row in found["modules"]}
    assert rows.keys() == linears.keys()
    for name, linear in linears.items():
        assert (rows[name]["in_features"], rows[name]["out_features"]) == (
            linear.in_features,
            linear.out_features,
        )
    selected = [name for name, row in rows.items() if row["selected"]]
    assert {rows[name]["layer"] for name in selected} == {1}
    lora = peft.LoraConfig(**{**ARGUMENTS, "layers_to_transform": None, "target_modules": selected})
    trainable, _ = peft.get_peft_model(theirs, lora).get_nb_trainable_parameters()
    assert found["trainable_parameters"] == trainable
    plain = sum(
        parameter.numel() for parameter in Qwen2_5_VLForConditionalGeneration(tiny_config()).parameters()
    )
    biases = sum(
        each.bias.numel() for name, each in linears.items() if each.bias is not None and "merger" not in name
    )
    assert found["total_parameters"] == plain + trainable - biases


def test_saved_activations_are_what_the_compiler_allocates():
    """Against XLA's own account of its temporaries, on this machine."""
    config = tiny_config(text={"num_hidden_layers": 6, "intermediate_size": 256})
    module = family_of(config).model(config, dtype=jnp.float32)
    lora = LoraConfig(r=4)
    add_abstract_adapters(module, select(module_table(config), lora), lora)
    graphdef, adapters, frozen = nnx.split(module, Trainable, ...)
    batch = family_of(config).batch_shapes(config, 1, 256)
    saved, layer, passing, temporary = {}, {}, {}, {}
    for policy in (False, True, "attention"):
        loss = make_loss_fn(graphdef, gradient_checkpointing=policy)
        arrays, layer[policy], passing[policy] = saved_arrays(loss, adapters, frozen, batch)
        saved[policy] = sum(array.size * array.dtype.itemsize for array in arrays)
        compiled = jax.jit(jax.grad(loss)).lower(adapters, frozen, batch).compile()
        temporary[policy] = compiled.memory_analysis().temp_size_in_bytes
    # With everything saved, that is nearly all; the rest is what one layer's backward pass computes.
    assert saved[False] < temporary[False] < 1.25 * saved[False]
    # With checkpointing one layer is computed again, and its gradients lie beside it; by then the end of the
    # decoder is done.
    needed = saved[True] - passing[True] + layer[False]
    assert needed < temporary[True] < 1.8 * needed
    # What another policy saves in addition is allocated in addition.
    more = saved["attention"] - saved[True]
    assert temporary["attention"] - temporary[True] == pytest.approx(more, rel=0.15)


def test_options_are_the_arguments_and_the_output_is_the_report(tiny, small, monkeypatch):
    calls = []

    def record(path, **arguments):
        calls.append(arguments)
        return small

    monkeypatch.setattr(inspection, "inspect_model", record)
    for options in (OPTIONS, (*OPTIONS, "--json")):
        result = run(tiny, *options)
        assert result.exit_code == 0, result.stderr
        given = calls.pop()
        assert {name: given.pop(name) for name in ARGUMENTS} == ARGUMENTS
        assert (
            LoraConfig(**{name: given[name] for name in given.keys() & vars(LoraConfig()).keys()})
            == LoraConfig()
        )
        if "--json" in options:
            assert json.loads(result.stdout) == small.to_json()
            continue
        lines = result.stdout.splitlines()
        assert any("layers[0–1]" in line for line in lines)
        (q_proj,) = (line for line in lines if "q_proj " in line and "→" in line)
        assert q_proj.split("q_proj")[1].split() == ["64", "→", "64", "r", "=", "2", "in", "1"]
        assert any("lm_head" in line and "r =" not in line for line in lines)
        assert "of them beside the adapters" in result.stdout
        assert any("'unsloth'" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no directory"),
        (["TINY", "--target-modules", "q_prj"], "did you mean q_proj"),
        (["TINY", "--layers-to-transform", "a"], "needed numbers and ranges"),
        (["TINY", "--rank-pattern", "q_proj"], "an equals sign and a number"),
        (["TINY", "--batch-size", "0"], "batch_size=0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tiny, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*(tiny if argument == "TINY" else argument for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr
