"""Biases, whole modules and rows of tokens that train beside the adapters, against the real PEFT."""

import copy
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.jaxprs import output_shapes
from tests.models.qwen2_5_vl_cases import Case, Visual, batches, random_torch_model, tiny_config
from vlmlora.lora.apply import add_adapters, remove_adapters, trainable_parameters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.peft_format import load_adapter_into, save_adapter
from vlmlora.lora.selection import select
from vlmlora.lora.trained import BaseModel, attach_trained, plan_trained
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.module_table import module_table
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Trainable
from vlmlora.training.loss import make_loss_fn


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """One random model, in transformers and here, and one batch with an image and without."""
    config = tiny_config(text={"tie_word_embeddings": request.param}, tie_word_embeddings=request.param)
    directory = tmp_path_factory.mktemp("base")
    torch_model = random_torch_model(config)
    torch_model.save_pretrained(directory)
    config = read_config(directory)
    module = load_model(directory, config, dtype=np.float32, quantize=None, progress=False)
    return torch_model, module, module_table(config), batches(Case([[3, Visual(1, 4, 6), 5], [9]]), config)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    config = tiny_config()
    directory = tmp_path_factory.mktemp("untied")
    random_torch_model(config).save_pretrained(directory)
    return directory, read_config(directory)


@jax.jit
def logits(module, inputs):
    return module.logits(module(**model_inputs(inputs))[0])


def adapt(module, table, randomise=None, **arguments):
    """What `get_peft_model` does, and random values for what trains."""
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "qkv"], **arguments})
    selection = select(table, config)
    parts = plan_trained(BaseModel.of(module), config, selection.names)
    add_adapters(module, selection, config, jax.random.key(0))
    attach_trained(module, parts)
    if randomise is not None:
        state = nnx.state(module, Trainable)
        rng = np.random.default_rng(0)
        # Near the base's own values, so that no softmax is saturated and magnifies rounding.
        nnx.update(module, jax.tree.map(lambda a: a + randomise * rng.normal(size=a.shape), state))
    return config


def load_in_peft(torch_model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
        return peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), directory, is_trainable=True)


EVERYTHING = {"bias": "all", "modules_to_save": ["merger", "norm", "lm_head", "layers.0.mlp"]}
CASES = {
    "biases of adapted layers": {"bias": "lora_only", "layers_to_transform": [1]},
    "every bias, modules and a layer": EVERYTHING,
    "head and embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one copy of both": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [200, 3, 77], "modules_to_save": ["visual"]},
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_peft_trains_saves_and_computes_the_same(base, tmp_path, arguments):
    torch_model, module, table, (theirs, ours, valid) = base
    if "visual" in str(arguments):
        arguments = {**arguments, "target_modules": ["q_proj"]}
    before = jax.tree.map(np.asarray, nnx.state(module))
    config = adapt(module, table, 0.1, **arguments)
    count = trainable_parameters(module)
    save_adapter(tmp_path / "ours", module, table, config)
    found = np.asarray(logits(module, ours))

    loaded = load_in_peft(torch_model, tmp_path / "ours")
    assert count == sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    keys = [set(load_file(tmp_path / d / "adapter_model.safetensors")) for d in ("ours", "theirs")]
    # PEFT also saves the untrained original of a bias that `modules_to_save` copies.
    assert keys[0] == {k for k in keys[1] if "original_module" not in k and "modules_to_save" not in k}
    inputs = {name: value for name, value in theirs.items() if name != "labels"}
    expected = loaded(**inputs).logits.detach().numpy()
    plain = torch_model(**inputs).logits.detach().numpy()
    scale = np.abs(expected[valid]).max()
    assert np.abs(expected - plain)[valid].max() > 0.1 * scale
    # float32 on both sides, in another order of sums: measured differences are near 2e-6.
    assert np.abs(found - expected)[valid].max() <= 1e-4 * scale

    remove_adapters(module)
    after = nnx.state(module)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    load_adapter_into(module, table, tmp_path / "theirs")
    assert trainable_parameters(module) == count
    np.testing.assert_array_equal(np.asarray(logits(module, ours)), found)
    remove_adapters(module)


@pytest.mark.parametrize("base", [True], indirect=True, ids=["tied"])
def test_gradients_equal_pefts(base, tmp_path):
    torch_model, module, table, (theirs, ours, _) = base
    arguments = {
        "bias": "all",
        "modules_to_save": ["merger", "norm", "layers.0.mlp"],
        "trainable_token_indices": [int(token) for token in theirs["input_ids"][0, [1, 0]]],
    }
    config = adapt(module, table, 0.1, **arguments)
    save_adapter(tmp_path / "values", module, table, config)
    graphdef, adapters, frozen = nnx.split(module, Trainable, ...)
    loss = make_loss_fn(graphdef, gradient_checkpointing=True)
    value, grads = jax.jit(jax.value_and_grad(loss))(adapters, frozen, ours)
    loaded = load_in_peft(torch_model, tmp_path / "values")
    expected = loaded(**theirs).loss
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)

    # The file's keys tell which gradient belongs to which: save the gradients as if they were parameters.
    nnx.update(module, grads)
    save_adapter(tmp_path / "ours", module, table, config)
    remove_adapters(module)
    for parameter in loaded.parameters():
        parameter.data = parameter.data if parameter.grad is None else parameter.grad
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    found, wanted = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    for key, gradient in found.items():
        scale = np.abs(wanted[key]).max()
        # float32 sums over a few dozen tokens, in another order.
        np.testing.assert_allclose(gradient, wanted[key], atol=2e-4 * scale + 1e-7, err_msg=key)


def test_rows_of_tokens_leave_the_table_without_gradient_or_copy(base):
    _, module, table, (_, ours, _) = base
    adapt(module, table, trainable_token_indices=[3, 1])
    graphdef, adapters, frozen = nnx.split(module, Trainable, ...)
    loss = make_loss_fn(graphdef, gradient_checkpointing=True)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters, frozen, ours)
    shape = module.model.language_model.embed_tokens.weight.get_value().shape
    remove_adapters(module)
    assert shape not in output_shapes(jaxpr)


def test_trains_in_float32_and_computes_in_the_models_type(untied):
    directory, config = untied
    module = load_model(directory, config, dtype=jnp.bfloat16, quantize="nf4", progress=False)
    table = module_table(config)
    batch = batches(Case([[3, Visual(1, 4, 4)]]), config)[1]
    inputs = model_inputs(jax.tree.map(jnp.asarray, batch))
    adapt(
        module,
        table,
        bias="all",
        modules_to_save=["norm", "merger", "patch_embed", "lm_head"],
        trainable_token_indices=[3],
    )
    trainable = jax.tree.leaves(nnx.state(module, Trainable))
    assert {a.dtype for a in trainable} == {np.dtype(np.float32)}
    hidden = jax.eval_shape(lambda module: module(**inputs)[0], module)
    assert hidden.dtype == jnp.bfloat16
    found = np.asarray(logits(module, inputs), np.float32)
    remove_adapters(module)
    # They start from the original's values, which float32 holds exactly.
    np.testing.assert_array_equal(found, np.asarray(logits(module, inputs), np.float32))
    with pytest.raises(ValueError, match=r"2 weights that are quantised .*layers\.0\.mlp.*load_in_16bit"):
        adapt(module, table, modules_to_save=["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"])


REFUSED = [
    ({"modules_to_save": ["embed_token"]}, r"'embed_token' matches no module.*did you mean embed_tokens"),
    ({"modules_to_save": ["blocks"]}, r"model\.visual\.blocks, a list of layers.*blocks\.0"),
    ({"modules_to_save": ["mlp", "up_proj"]}, r"up_proj .* is inside of .*mlp .*leave one out"),
    ({"modules_to_save": ["proj"]}, r"'proj' matches .*q_proj, but .*q_proj is adapted too.*whole names"),
    ({"modules_to_save": ["elf_attn"]}, r"self_attn, but .*q_proj is adapted too"),
    ({"modules_to_save": ["q_proj", "qkv"]}, r"no module is selected by .*modules_to_save"),
    ({"trainable_token_indices": [250]}, r"250 is no row of .*embed_tokens, which has 250"),
    ({"trainable_token_indices": {"q_proj": [1]}}, r"matches .*q_proj, but only rows of the input embedding"),
    ({"trainable_token_indices": {"embed_tokns": [1]}}, r"'embed_tokns' matches no module.*embed_tokens"),
    (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        r"rows of .*embed_tokens, which modules_to_save trains whole",
    ),
]
REFUSED_TIED = [
    ({"trainable_token_indices": {"lm_head": [1]}}, r"lm_head rows of its own, but it is tied"),
    (
        {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}, "ensure_weight_tying": True},
        r"ensure_weight_tying=True, but .* different rows \(\[2\] and \[1\]\)",
    ),
    (
        {"trainable_token_indices": [1], "modules_to_save": ["lm_head"]},
        r"rows of lm_head, which modules_to_save trains whole",
    ),
]


def test_what_cannot_be_trained_is_refused_before_anything_is_built(base):
    _, module, table, _ = base
    refused = REFUSED + (REFUSED_TIED if module.lm_head is None else [])
    for arguments, message in refused:
        with pytest.raises((ValueError, NotImplementedError), match=message):
            adapt(module, table, **arguments)
        assert trainable_parameters(module) == 0


@pytest.mark.parametrize("base", [False], indirect=True, ids=["untied"])
def test_names_from_before_transformers_4_52_are_read(base, tmp_path):
    _, module, table, _ = base
    arguments = {"bias": "lora_only", "modules_to_save": ["visual.merger", "model.language_model.norm"]}
    config = adapt(module, table, 0.1, **arguments, trainable_token_indices={"embed_tokens": [3, 1]})
    expected = jax.tree.map(np.asarray, nnx.state(module, Trainable))
    save_adapter(tmp_path, module, table, config)
    remove_adapters(module)

    def old(name):
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")

    file = tmp_path / "adapter_model.safetensors"
    save_file({old(key): value for key, value in load_file(file).items()}, file)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == ["visual.merger", "model.language_model.norm"]
    fields["modules_to_save"] = ["visual.merger", "model.norm"]
    fields["trainable_token_indices"] = {"model.embed_tokens": [3, 1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    load_adapter_into(module, table, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(module, Trainable), expected)
    remove_adapters(module)
