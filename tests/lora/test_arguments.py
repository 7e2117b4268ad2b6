"""Combinations of arguments: what is trained equals the real PEFT's, and nothing is half built."""

import copy
import itertools
import re
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import peft
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.qwen2_5_vl_cases import Case, Visual, batches, random_torch_model, tiny_config
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.lora.apply import adapted_modules, trainable_parameters
from vlmlora.models.loading import load_model, read_config
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Trainable


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """A random model in transformers, its arrays here, and a function that makes a model of them."""
    config = tiny_config(text={"tie_word_embeddings": request.param}, tie_word_embeddings=request.param)
    directory = tmp_path_factory.mktemp("base")
    torch_model = random_torch_model(config)
    torch_model.save_pretrained(directory)
    config = read_config(directory)
    graphdef, state = nnx.split(
        load_model(directory, config, dtype=np.float32, quantize=None, progress=False)
    )

    def fresh():
        module = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        return FastVisionModel(module, config, name_or_path=str(directory))

    return torch_model, fresh, batches(Case([[3, Visual(1, 4, 6), 5], [9]]), config)


def optional(strategy):
    return st.one_of(st.none(), strategy)


LEAVES = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "qkv", "attn.proj", "merger.mlp.0"]
SHARED = {
    "r": st.integers(1, 4),
    "lora_alpha": st.integers(1, 8),
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "lora_bias": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "rank_pattern": st.sampled_from([{}, {"q_proj": 5}, {r"layers\.1\..*": 3, "qkv": 2}]),
    "alpha_pattern": st.sampled_from([{}, {"0.self_attn.q_proj": 5, "up_proj": 3}]),
    "exclude_modules": st.sampled_from([None, ["o_proj", "blocks.1.attn.qkv"], r".*layers\.0\..*"]),
    "modules_to_save": st.sampled_from(
        [
            *(None, ["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"], ["norm"], ["merger"]),
            *(["layers.1.mlp", "norm2"], ["o_proj"], ["patch_embed", "merger.mlp.2"], ["proj"], ["blocks"]),
        ]
    ),
    "trainable_token_indices": st.sampled_from([None, None, [7, 3], {"embed_tokens": [9]}]),
    "ensure_weight_tying": st.booleans(),
}
LAYERS = st.sampled_from([{}, {}, {"layers_to_transform": [1]}, {"layers_to_transform": 0}])
TARGETS = st.one_of(
    st.lists(st.sampled_from(LEAVES), min_size=1, max_size=4, unique=True),
    st.sampled_from([r".*language_model.*\.(q_proj|up_proj)", r".*blocks\.\d\.(attn\.qkv|mlp\..*_proj)"]),
)
QUIET = {"deadline": None, "derandomize": True, "database": None}
FIXTURES = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}

OURS_ALONE = (
    # PEFT trains the original of a module and a copy of it, or warns and goes on.
    r"is inside of|modules_to_save trains whole|no targeted module|matches no (linear )?module"
)


def peft_model(torch_model, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(torch_model), peft.LoraConfig(**arguments))


def adapted(model):
    return {spec.name for spec, *_ in adapted_modules(model.module, model.module_table)}


def adapted_by_peft(loaded):
    return {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}


def trainable_in(loaded):
    return sum(p.numel() for p in loaded.parameters() if p.requires_grad)


def assert_same_modules_and_count(base, arguments):
    torch_model, fresh, _ = base
    model = fresh()
    before = [id(leaf) for leaf in jax.tree.leaves(nnx.state(model.module))]
    try:
        FastVisionModel.get_peft_model(model, **arguments, verbose=False)
    except (ValueError, NotImplementedError) as error:
        assert [id(leaf) for leaf in jax.tree.leaves(nnx.state(model.module))] == before
        if not re.search(OURS_ALONE, str(error)):
            with pytest.raises((ValueError, TypeError)):
                peft_model(torch_model, arguments)
        return
    loaded = peft_model(torch_model, arguments)
    assert adapted(model) == adapted_by_peft(loaded)
    assert trainable_parameters(model.module) == trainable_in(loaded)


def select_arguments(shared, targets, layers):
    layers = {} if isinstance(targets, str) else layers
    return {**shared, **layers, "target_modules": targets}


@settings(max_examples=40, **QUIET, **FIXTURES)
@given(shared=st.fixed_dictionaries(SHARED), targets=TARGETS, layers=LAYERS)
def test_random_arguments_train_what_peft_trains(base, shared, targets, layers):
    assert_same_modules_and_count(base, select_arguments(shared, targets, layers))


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, **FIXTURES)
@given(shared=st.fixed_dictionaries(SHARED), targets=TARGETS, layers=LAYERS)
def test_many_random_arguments_train_what_peft_trains(base, shared, targets, layers):
    assert_same_modules_and_count(base, select_arguments(shared, targets, layers))


FLAGS = {
    "finetune_vision_layers": st.booleans(),
    "finetune_language_layers": st.booleans(),
    "finetune_attention_modules": st.booleans(),
    "finetune_mlp_modules": st.booleans(),
    "finetune_projector": st.booleans(),
    "finetune_last_n_layers": st.sampled_from([None, None, 1]),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal", "pissa", "olora"]),
}


@jax.jit
def logits(module, inputs):
    return module.logits(module(**model_inputs(inputs))[0])


def assert_both_ways(base, arguments):
    """Random values, saved here, computed by PEFT, saved by PEFT, and computed here again."""
    torch_model, fresh, (theirs, ours, valid) = base
    model = fresh()
    # The start of PiSSA and OLoRA gives the base's arrays away.
    state = nnx.state(model.module)
    nnx.update(model.module, jax.tree.map(jax.numpy.copy, state))
    try:
        FastVisionModel.get_peft_model(model, **arguments, verbose=False)
    except (ValueError, NotImplementedError):
        assert trainable_parameters(model.module) == 0
        return
    rng = np.random.default_rng(0)
    trained = nnx.state(model.module, Trainable)
    nnx.update(model.module, jax.tree.map(lambda a: a + 0.05 * rng.normal(size=a.shape), trained))
    found = np.asarray(logits(model.module, ours))
    inputs = {name: value for name, value in theirs.items() if name != "labels"}
    with TemporaryDirectory() as directory, warnings.catch_warnings():
        directory = Path(directory)
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings|.*lora_bias=True|.*ensure_weight_ty")
        # PEFT takes the one axis of its own lora_B.bias for a sign of lost shards.
        warnings.filterwarnings("ignore", message=r"(?s)Adapter 'default': .*lora_B\.bias:\(\d+,\)")
        # A pattern may be of modules that were not chosen.
        warnings.filterwarnings("ignore", message="The following .* keys did not match any targeted module")
        model.save_pretrained(directory / "ours")
        loaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(torch_model), directory / "ours", is_trainable=True
        )
        assert adapted(model) == adapted_by_peft(loaded)
        if arguments["init_lora_weights"] not in ("pissa", "olora"):
            assert trainable_parameters(model.module) == trainable_in(loaded)
        expected = loaded(**inputs).logits.detach().numpy()
        # float32 on both sides, in another order of sums.
        atol = 1e-4 * np.abs(expected[valid]).max()
        np.testing.assert_allclose(found[valid], expected[valid], atol=atol)
        loaded.save_pretrained(directory / "theirs", save_embedding_layers=False)
        again = fresh()
        again.load_adapter(directory / "theirs", "again")
    assert adapted(again) == adapted(model)
    np.testing.assert_allclose(np.asarray(logits(again.module, ours))[valid], expected[valid], atol=atol)


@settings(max_examples=3, **QUIET, **FIXTURES)
@given(shared=st.fixed_dictionaries(SHARED), flags=st.fixed_dictionaries(FLAGS), targets=optional(TARGETS))
def test_random_adapters_compute_the_same_in_peft(base, shared, flags, targets):
    assert_both_ways(base, {**shared, **flags, "target_modules": targets})


def test_the_bias_of_a_layer_that_is_saved_as_a_whole(base):
    """Which PEFT writes twice."""
    flags = {"finetune_vision_layers": False, "finetune_language_layers": False, "finetune_projector": True}
    trained = {"bias": "all", "modules_to_save": ["merger.mlp.2"]}
    assert_both_ways(base, {"r": 1, "init_lora_weights": True, **trained, **flags})


@pytest.mark.slow
@settings(max_examples=60, deadline=None, **FIXTURES)
@given(shared=st.fixed_dictionaries(SHARED), flags=st.fixed_dictionaries(FLAGS), targets=optional(TARGETS))
def test_many_random_adapters_compute_the_same_in_peft(base, shared, flags, targets):
    assert_both_ways(base, {**shared, **flags, "target_modules": targets})


VALUES = {
    "r": [3],
    "target_modules": [["q_proj", "qkv"], r".*\.(q_proj|fc1)", "all-linear"],
    "lora_alpha": [5],
    "lora_dropout": [0.1],
    "bias": ["all", "lora_only"],
    "finetune_vision_layers": [False],
    "finetune_language_layers": [False],
    "finetune_attention_modules": [False],
    "finetune_mlp_modules": [False],
    "finetune_last_n_layers": [1],
    "layers_to_transform": [[1]],
    "layers_pattern": ["layers"],
    "use_gradient_checkpointing": [False],
    "random_state": [1],
    "use_rslora": [True],
    "modules_to_save": [["merger"], ["lm_head", "embed_tokens"], ["q_proj"]],
    "init_lora_weights": [False, "gaussian", "orthogonal", "eva", "pissa", "loftq"],
    "loftq_config": [{"loftq_bits": 8}],
    "eva_config": [{"rho": 1.5}],
    "task_type": [None],
    "target_parameters": [["experts.down_proj"]],
    "ensure_weight_tying": [True],
    "finetune_projector": [True],
    "use_dora": [True],
    "rank_pattern": [{"q_proj": 5}],
    "alpha_pattern": [{r"layers\.1\..*": 5}],
    "exclude_modules": [["o_proj"]],
    "lora_bias": [True],
    "trainable_token_indices": [[3, 7]],
}
CHOICES = [(name, value) for name, values in VALUES.items() for value in values]
PAIRS = [(a, b) for a, b in itertools.combinations(CHOICES, 2) if a[0] != b[0]]


def assert_works_or_is_refused(fresh, arguments):
    model = fresh()
    before = [id(leaf) for leaf in jax.tree.leaves(nnx.state(model.module))]
    starts_from_base = arguments.get("init_lora_weights") in ("pissa", "loftq")
    if starts_from_base:
        nnx.update(model.module, jax.tree.map(jax.numpy.copy, nnx.state(model.module)))
    try:
        FastVisionModel.get_peft_model(model, **arguments, verbose=False)
    except (ValueError, NotImplementedError) as error:
        assert any(name in str(error) for name in arguments), (arguments, error)  # noqa: PT017
        assert (trainable_parameters(model.module), model.lora_config) == (0, None)
        if not starts_from_base:
            assert [id(leaf) for leaf in jax.tree.leaves(nnx.state(model.module))] == before
        return
    assert adapted(model)
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        if arguments.get("init_lora_weights") == "loftq":
            return
        again = fresh()
        again.load_adapter(directory, "again")
    assert adapted(again) == adapted(model)
    if not starts_from_base:
        assert trainable_parameters(again.module) == trainable_parameters(model.module)


def check_pairs(base, pairs):
    small = {"target_modules": ["q_proj", "qkv", "merger.mlp.0"]}
    for pair in pairs:
        arguments = dict(pair)
        # Few modules where the choice of modules is not what the pair is about.
        is_selection = any(name.startswith(("finetune", "target")) for name in arguments)
        assert_works_or_is_refused(base[1], arguments if is_selection else {**small, **arguments})


@pytest.mark.parametrize("base", [True], indirect=True, ids=["tied"])
def test_pairs_of_arguments_work_or_are_refused_whole(base):
    check_pairs(base, PAIRS[::7])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_pair_of_arguments_works_or_is_refused_whole(base):
    check_pairs(base, PAIRS)
