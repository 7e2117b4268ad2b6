import copy
import itertools
import re
import warnings

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.shapes import qwen2_5_vl_7b
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.module_table import module_table

FLAGS = [
    "finetune_vision_layers",
    "finetune_language_layers",
    "finetune_attention_modules",
    "finetune_mlp_modules",
]
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv", "gate_proj", "up_proj", "down_proj"]


def names(table, **arguments):
    return select(table, LoraConfig(**arguments)).names


def peft_names(model, **arguments):
    """What the real PEFT adapts."""
    with warnings.catch_warnings():
        # transformers 5.23 calls a property of its own that it deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **arguments))
    found = {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
    adapted.unload()
    return found


def tagged(table, part=None, role=None):
    return {s.name for s in table if part in (None, s.part) and role in (None, s.role)}


def test_the_table_names_the_linear_modules_of_transformers(table, torch_model):
    import torch

    assert {s.name for s in table} == {
        name for name, module in torch_model.named_modules() if isinstance(module, torch.nn.Linear)
    }


def test_default_flags_on_the_7b_shape_train_what_unsloth_trains():
    selection = select(module_table(qwen2_5_vl_7b()), LoraConfig(r=16))
    assert selection.parameters == 51_521_536
    by_part = {
        part: sum(m.parameters for m in selection.modules if m.spec.part == part)
        for part in ("language", "vision", "projector", "head")
    }
    assert by_part == {"language": 28 * 1_441_792, "vision": 32 * 348_480, "projector": 0, "head": 0}


@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=4)))
def test_flags_choose_parts_and_roles(table, flags):
    arguments = dict(zip(FLAGS, flags, strict=True))
    vision, language, attention, mlp = flags
    if not (vision or language) or not (attention or mlp):
        with pytest.raises(ValueError, match="leave nothing to train"):
            names(table, **arguments)
        return
    expected = set()
    for part in ["vision"] * vision + ["language"] * language:
        for role in ["attention"] * attention + ["mlp"] * mlp:
            expected |= tagged(table, part, role)
    assert names(table, **arguments) == expected


@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=4)))
def test_a_list_within_the_flags(table, flags):
    arguments = dict(zip(FLAGS, flags, strict=True))
    targets = ["q_proj", "gate_proj", "qkv"]
    try:
        flagged = names(table, **arguments)
    except ValueError:
        with pytest.raises(ValueError, match="leave nothing to train"):
            names(table, target_modules=targets, **arguments)
        return
    suffixed = {s.name for s in table if s.name.split(".")[-1] in targets}
    assert names(table, target_modules=targets, **arguments) == flagged & suffixed


def test_all_linear_turns_every_flag_on_and_leaves_projector_and_head(table):
    for flags in ({}, dict.fromkeys(FLAGS, False)):
        assert names(table, target_modules="all-linear", **flags) == names(table)
    assert {s.part for s in table if s.name in names(table)} == {"vision", "language"}


def test_the_projector_has_a_flag(table):
    projector = tagged(table, "projector")
    assert names(table, finetune_projector=True) == names(table) | projector
    assert names(table, target_modules="all-linear", finetune_projector=True) == names(table) | projector
    only = {"finetune_vision_layers": False, "finetune_language_layers": False, "finetune_projector": True}
    assert names(table, **only) == projector
    with pytest.raises(ValueError, match=r"names no module of the projector; add one of .*merger\.mlp\.0"):
        names(table, target_modules=["q_proj"], finetune_projector=True)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["gate_proj", "qkv"],
        ["self_attn.q_proj", "mlp.down_proj"],
        ["model.language_model.layers.1.self_attn.q_proj", "attn.qkv"],
        ["lm_head", "merger.mlp.0"],
        ["1.mlp.up_proj"],
    ],
)
def test_a_list_selects_as_peft_does(table, torch_model, targets):
    assert names(table, target_modules=targets) == peft_names(torch_model, target_modules=targets)


@pytest.mark.parametrize(
    "regex",
    [
        r".*language_model.*\.(q_proj|v_proj)",
        r"model\.visual\.blocks\.\d+\.(attn\.qkv|mlp\..*_proj)",
        r".*\.[0-1]\..*proj",
        r"lm_head|.*merger\.mlp\.[02]",
    ],
)
def test_a_string_is_a_regular_expression_and_ignores_the_flags(table, torch_model, regex):
    flags = dict.fromkeys(FLAGS, False)
    found = names(table, target_modules=regex, **flags)
    assert found == names(table, target_modules=regex) == peft_names(torch_model, target_modules=regex)


@pytest.fixture(scope="module")
def shared_torch_model(_torch_base):
    return copy.deepcopy(_torch_base)


@settings(max_examples=40, deadline=None)
@given(
    targets=st.lists(
        st.sampled_from([*LEAVES, "attn.proj", "merger.mlp.2", "lm_head"]), min_size=1, unique=True
    ),
    exclude=st.one_of(
        st.none(),
        st.lists(
            st.sampled_from([*LEAVES, "0.self_attn.q_proj", "blocks.1.attn.qkv"]), min_size=1, max_size=3
        ),
        st.sampled_from([r".*visual.*", r".*layers\.0\..*"]),
    ),
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 1), min_size=1, unique=True)),
    layers_pattern=st.sampled_from([None, "layers", ["blocks"], ["layers", "blocks"]]),
)
def test_random_lists_select_as_peft_does(
    table, shared_torch_model, targets, exclude, layers, layers_pattern
):
    arguments = {"target_modules": targets, "exclude_modules": exclude}
    if layers is not None:
        arguments |= {"layers_to_transform": layers, "layers_pattern": layers_pattern}
    try:
        expected = peft_names(shared_torch_model, **arguments)
    except ValueError:
        with pytest.raises(ValueError, match=r"no module is selected|no targeted module"):
            names(table, **arguments)
        return
    try:
        found = names(table, **arguments)
    except ValueError as error:
        # PEFT is silent about a layer number that no target has.
        assert "no targeted module" in str(error)  # noqa: PT017
        return
    assert found == expected


@pytest.mark.parametrize(
    "targets",
    [None, "all-linear", ["q_proj", "gate_proj", "qkv"], r".*(visual\.blocks|language_model).*_proj"],
)
def test_layers_work_with_every_kind_of_target(table, targets):
    full = names(table, target_modules=targets)
    first = names(table, target_modules=targets, layers_to_transform=0)
    assert first == {name for name in full if re.search(r"(layers|blocks)\.0\.", name)}
    decoder = names(table, target_modules=targets, layers_to_transform=[0, 2], layers_pattern="layers")
    assert decoder == {name for name in full if re.search(r"layers\.[02]\.", name)}
    last = names(table, target_modules=targets, finetune_last_n_layers=1)
    assert last == {name for name in full if "visual" in name or "layers.2." in name}


def test_rank_and_alpha_patterns(table):
    config = LoraConfig(r=8, rank_pattern={"q_proj": 4}, alpha_pattern={"layers.1.self_attn.q_proj": 32})
    chosen = {m.spec.name: m for m in select(table, config).modules}
    one, two = (chosen[f"model.language_model.layers.{i}.self_attn.q_proj"] for i in (1, 2))
    assert (one.r, one.scaling, two.r, two.scaling) == (4, 8.0, 4, 4.0)
    assert chosen["model.visual.blocks.0.attn.qkv"].r == 8
    mixed = select(table, LoraConfig(r=8, rank_pattern={"layers.1.self_attn.q_proj": 4}))
    assert [m.r for m in mixed.by_path["model.language_model.layers.self_attn.q_proj"]] == [8, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"target_modules: 'q_prj' matches no linear module.*did you mean q_proj",
        ),
        ({"target_modules": ["embed_tokens"]}, r"'embed_tokens' matches no linear.*trainable_token_indices"),
        ({"target_modules": ["q_proj", "zzzz"]}, r"'zzzz' matches no linear module.*names are .*q_proj"),
        ({"target_modules": "q_proj"}, r"no module is selected.*pass \['q_proj'\]"),
        ({"target_modules": r".*xyz"}, r"no module is selected by target_modules='\.\*xyz'"),
        (
            {"target_modules": ["qkv"], "finetune_vision_layers": False},
            r"no module is selected.*finetune_vision_layers",
        ),
        ({"exclude_modules": ["qvk"]}, r"exclude_modules: 'qvk' matches no linear module.*qkv"),
        ({"exclude_modules": r"visual"}, r"exclude_modules='visual' matches no module"),
        ({"exclude_modules": r".*proj|.*qkv"}, "no module is selected.*exclude_modules"),
        ({"layers_to_transform": [0, 7]}, r"layer number 7; layers found: 0 to 2"),
        ({"layers_to_transform": 2, "layers_pattern": "blocks"}, r"'blocks' has layer number 2"),
        ({"finetune_last_n_layers": 4}, r"finetune_last_n_layers=4, but the language model has 3 layers"),
        ({"rank_pattern": {"q_poj": 4}}, r"rank_pattern: 'q_poj' matches no linear module.*q_proj"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(table, arguments, message):
    with pytest.raises(ValueError, match=message):
        names(table, **arguments)


def test_a_model_without_a_vision_tower(table):
    text_only = tuple(spec for spec in table if spec.part in ("language", "head"))
    assert names(text_only) == tagged(table, "language")
    with pytest.raises(ValueError, match="the model has none"):
        names(text_only, finetune_language_layers=False)
    with pytest.raises(ValueError, match="has no projector"):
        names(text_only, finetune_projector=True)


def test_the_summary_shows_what_trains_and_what_does_not(table):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    selection = select(table, LoraConfig(r=2, finetune_mlp_modules=False))
    console.print(selection.summary())
    rows = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in console.export_text().splitlines()]
    rows = {tuple(row[:2]): [cell.strip() for cell in row[2:]] for row in rows if len(row) == 5}
    assert set(rows["language", "attention"][0].split(", ")) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert rows["language", "attention"][1] == "12 of 12"
    assert rows["vision", "mlp"] == ["–", "0 of 6", "0"]
    assert rows["total", ""][2] == f"{selection.parameters:,}"


def test_a_tied_head_as_a_target_is_refused_with_the_way_out(tiny_config):
    tied = copy.deepcopy(tiny_config)
    tied.tie_word_embeddings = tied.get_text_config().tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"no weight but the embedding's.*modules_to_save=\['lm_head'\]"):
        select(module_table(tied), LoraConfig(target_modules=["q_proj", "lm_head"]))
