import json
import re
import warnings

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from vlmlora.lora import peft_format
from vlmlora.lora.apply import adapted_modules, add_adapters, remove_adapters, trainable_parameters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.peft_format import load_adapter_into, read_adapter, save_adapter, target_regex
from vlmlora.lora.selection import select
from vlmlora.models.module_table import LinearSpec

ADAPTERS = {
    "full": {},
    "vision only": {"finetune_language_layers": False},
    "language only": {"finetune_vision_layers": False},
    "attention only": {"finetune_mlp_modules": False},
    "mlp only": {"finetune_attention_modules": False},
    "some layers": {"layers_to_transform": [1]},
    "last layers": {"finetune_last_n_layers": 2},
    "one tower's layer": {"layers_to_transform": [0], "layers_pattern": "blocks"},
    "projector": {"finetune_projector": True},
    "head and merger": {"target_modules": ["lm_head", "merger.mlp.0"]},
    "exclusion": {"exclude_modules": ["gate_proj"]},
    "patterns": {
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"layers.1.mlp.up_proj": 5},
        "use_rslora": True,
    },
    "dora": {"use_dora": True, "finetune_last_n_layers": 1},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "merger.mlp.0"]},
    "mixed ranks": {"rank_pattern": {"layers.[12].self_attn.q_proj": 3, "blocks.0.attn.qkv": 5}},
}


@pytest.fixture
def adapted(table, flax_model, randomise):
    def make(**arguments):
        config = LoraConfig(**{"r": 2, "lora_alpha": 3, **arguments})
        add_adapters(flax_model, select(table, config), config, jax.random.key(0))
        randomise(flax_model)
        return flax_model, config

    return make


def arrays(module, table):
    """A, B and scaling of every adapted module."""
    return {
        spec.name: tuple(
            np.asarray(v.get_value() if i is None else v.get_value()[i])
            for v in (adapter.lora_A, adapter.lora_B, adapter.scaling, adapter.lora_bias, adapter.magnitude)
            if v is not None
        )
        for spec, adapter, i in adapted_modules(module, table)
    }


def load_in_peft(model, directory):
    """Load with the real PEFT, which only warns about tensors it has no use for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(model, directory)
    return {n: m for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("arguments", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_real_peft_and_we_load_what_was_trained_and_nothing_else(
    table, adapted, torch_model, tmp_path, arguments
):
    module, config = adapted(**arguments)
    save_adapter(tmp_path / "adapter", module, table, config)
    ours, theirs = arrays(module, table), load_in_peft(torch_model, tmp_path / "adapter")
    assert set(theirs) == set(ours)
    for name, (A, B, scaling, *vectors) in ours.items():
        for vector in vectors:
            found = theirs[name].lora_B["default"].bias
            found = theirs[name].lora_magnitude_vector["default"].weight if found is None else found
            np.testing.assert_array_equal(found.detach(), vector)
        np.testing.assert_array_equal(theirs[name].lora_A["default"].weight.detach(), A)
        np.testing.assert_array_equal(theirs[name].lora_B["default"].weight.detach(), B)
        delta = theirs[name].get_delta_weight("default").detach()
        # float32 products of rank 3 at most.
        np.testing.assert_allclose(delta, scaling * B @ A, rtol=1e-5, atol=1e-5)

    remove_adapters(module)
    reloaded = load_adapter_into(module, table, tmp_path / "adapter")
    again = arrays(module, table)
    assert again.keys() == ours.keys()
    for name in ours:
        for one, other in zip(ours[name], again[name], strict=True):
            np.testing.assert_array_equal(one, other)
    save_adapter(tmp_path / "again", module, table, reloaded)
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    assert first.keys() == second.keys()


PEFT_CONFIGS = [
    {"target_modules": ["q_proj", "gate_proj"]},
    {"target_modules": ["q_proj", "qkv"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"], "layers_pattern": None},
    {"target_modules": r".*visual\.blocks\.\d\.mlp\.down_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["v_proj"], "use_rslora": True, "alpha_pattern": {"layers.2.self_attn.v_proj": 9}},
    {"target_modules": ["v_proj", "o_proj"], "rank_pattern": {"v_proj": 3}, "lora_dropout": 0.1},
    {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
]


@pytest.mark.parametrize("arguments", PEFT_CONFIGS, ids=lambda arguments: str(arguments)[:60])
def test_reads_what_peft_writes(table, flax_model, torch_model, tmp_path, arguments):
    arguments = {"init_lora_weights": False, **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(torch_model, peft.LoraConfig(r=2, lora_alpha=3, **arguments))
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = load_adapter_into(flax_model, table, tmp_path)
    expected = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    found = arrays(flax_model, table)
    assert found.keys() == expected.keys()
    for name, (A, B, scaling) in found.items():
        np.testing.assert_array_equal(A, expected[name].lora_A["default"].weight.detach())
        np.testing.assert_array_equal(B, expected[name].lora_B["default"].weight.detach())
        assert scaling == pytest.approx(expected[name].scaling["default"])
        assert config.scaling_of(name) == pytest.approx(expected[name].scaling["default"])
    assert config.lora_dropout == arguments.get("lora_dropout", 0)


def old_name(name):
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write(directory, tensors, **fields):
    directory.mkdir(exist_ok=True)
    defaults = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**defaults, **fields}))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def tensors_for(table, names, *, r=2, rename=lambda name: name):
    rng = np.random.default_rng(0)
    tensors = {}
    for spec in table:
        if spec.name in names:
            key = f"base_model.model.{rename(spec.name)}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(size=(r, spec.in_features)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(size=(spec.out_features, r)).astype(np.float32)
    return tensors


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "qkv"]},
        {"target_modules": r"(model\.layers\.\d\.self_attn\.q_proj|visual\..*\.qkv)"},
        {"target_modules": ["q_proj", "qkv"], "alpha_pattern": {"model.layers.0.self_attn.q_proj": 7}},
    ],
)
def test_reads_names_from_before_transformers_4_52(table, flax_model, tmp_path, fields):
    names = {s.name for s in table if s.name.endswith(("q_proj", "qkv"))}
    tensors = tensors_for(table, names, rename=old_name)
    config = load_adapter_into(flax_model, table, write(tmp_path, tensors, **fields))
    found = arrays(flax_model, table)
    assert found.keys() == names
    for name, (A, B, scaling) in found.items():
        key = f"base_model.model.{old_name(name)}"
        np.testing.assert_array_equal(A, tensors[f"{key}.lora_A.weight"])
        np.testing.assert_array_equal(B, tensors[f"{key}.lora_B.weight"])
        alpha = 7 if "alpha_pattern" in fields and "layers.0" in name else 3
        assert scaling == pytest.approx(alpha / 2)
    # Saved again under today's names, the pattern still finds its module.
    save_adapter(tmp_path / "new", flax_model, table, config)
    assert read_adapter(tmp_path / "new")[1].keys() == read_adapter(tmp_path)[1].keys()


def test_bfloat16_tensors_become_float32(table, flax_model, tmp_path):
    import ml_dtypes

    names = {s.name for s in table if s.name.endswith("q_proj")}
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors_for(table, names).items()}
    load_adapter_into(flax_model, table, write(tmp_path, tensors))
    assert {A.dtype for A, *_ in arrays(flax_model, table).values()} == {np.dtype(np.float32)}


def spec(name, part, role, layer):
    path = re.sub(r"\.\d+(?=\.)", "", name) if layer is not None else name
    return LinearSpec(name, part, role, layer, 4, 4, False, path)


ERAS = {
    "mllama": (
        [
            *(f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(3)),
            *(f"model.vision_model.transformer.layers.{i}.self_attn.q_proj" for i in range(3)),
            *(f"model.vision_model.global_transformer.layers.{i}.self_attn.q_proj" for i in range(3)),
        ],
        [
            ("model.language_model.", "language_model.model."),
            ("model.vision_model.", "vision_model."),
        ],
        [],
    ),
    "gemma3": (
        [
            *(f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(3)),
            *(f"model.vision_tower.vision_model.encoder.layers.{i}.self_attn.q_proj" for i in range(3)),
        ],
        [("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower.")],
        [("vision_tower.vision_model.", "vision_tower.")],
    ),
    "qwen2.5-vl": (
        [
            *(f"model.language_model.layers.{i}.mlp.up_proj" for i in range(3)),
            *(f"model.visual.blocks.{i}.mlp.up_proj" for i in range(3)),
        ],
        [("model.language_model.", "model."), ("model.visual.", "visual.")],
        [],
    ),
}


@pytest.mark.parametrize("family", ERAS)
@pytest.mark.parametrize("chosen", ["layers.1", "0", "language_model", "vis", "proj"])
def test_target_modules_selects_the_same_in_every_era(family, chosen):
    names, old, new = ERAS[family]
    table = tuple(spec(name, "vision", "attention", int(re.search(r"\d+", name)[0])) for name in names)
    selected = {name for name in names if chosen in name}
    regex = target_regex(table, selected)
    for renames in ([], old, new):

        def renamed(name, renames=renames):
            for one, other in renames:
                name = name.replace(one, other)
            return name

        found = {name for name in names if re.fullmatch(regex, renamed(name))}
        assert found == selected


def test_exported_regex_is_short_where_whole_towers_train(table):
    names = select(table, LoraConfig()).names
    assert len(target_regex(table, names)) < 500


def test_config_has_the_classic_fields_only(table, adapted, tmp_path):
    module, config = adapted(base_model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct", revision="main")
    save_adapter(tmp_path, module, table, config)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(fields) == {
        *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
        *("alpha_pattern", "modules_to_save", "use_rslora", "use_dora", "init_lora_weights"),
        *("fan_in_fan_out", "inference_mode", "revision", "peft_version"),
    }
    assert fields["base_model_name_or_path"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    card = (tmp_path / "README.md").read_text()
    assert "base_model: Qwen/Qwen2.5-VL-7B-Instruct" in card
    assert "library_name: peft" in card


def test_saving_keeps_other_files_and_a_card_that_is_there(table, adapted, tmp_path):
    module, config = adapted()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("mine")
    save_adapter(tmp_path, module, table, config)
    save_adapter(tmp_path, module, table, config)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "README.md").read_text() == "mine"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("fails_at", ["tensors", "second file"])
def test_a_failed_save_changes_nothing(table, adapted, tmp_path, monkeypatch, existing, fails_at):
    module, config = adapted()
    target = tmp_path / "adapter"
    if existing:
        save_adapter(target, module, table, config)
        (target / "README.md").unlink()
    before = {path.name: path.read_bytes() for path in target.iterdir()} if existing else None

    def fail(*_, **__):
        raise OSError("disk full")

    if fails_at == "tensors":
        monkeypatch.setattr(peft_format, "save_file", fail)
    elif existing:
        replace = peft_format.os.replace

        def fail_on_config(source, destination):
            if destination == target / "adapter_config.json" and "previous" not in source.parts:
                fail()
            replace(source, destination)

        monkeypatch.setattr(peft_format.os, "replace", fail_on_config)
    else:
        monkeypatch.setattr(peft_format.Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(target, module, table, config)
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in target.iterdir()} if target.exists() else None
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if existing else [])


def test_saving_refuses_a_file_an_unadapted_model_and_a_foreign_config(table, adapted, flax_model, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(tmp_path / "a", flax_model, table, LoraConfig(r=2))
    module, config = adapted()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        save_adapter(tmp_path / "file", module, table, config)
    with pytest.raises(ValueError, match=r"has rank 2 and scaling 1.5.* rank 4 and scaling"):
        save_adapter(tmp_path / "a", module, table, LoraConfig(r=4))
    assert not (tmp_path / "a").exists()


Q = "model.language_model.layers.{}.self_attn.q_proj"


def adding(name, *, suffixes=("lora_A.weight", "lora_B.weight"), shape=None):
    shapes = {"lora_A.weight": (2, 32), "lora_B.weight": (32, 2)}

    def change(tensors):
        for suffix in suffixes:
            value = np.ones(shape or shapes.get(suffix, (32,)), np.float32)
            tensors[f"base_model.model.{name}.{suffix}"] = value

    return change


def dropping(name, *matrices):
    def change(tensors):
        for matrix in matrices:
            del tensors[f"base_model.model.{name}.{matrix}.weight"]

    return change


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (
            adding("model.layers.9.self_attn.q_proj"),
            {},
            r"1 module \(model.layers.9.self_attn.q_proj\) that the base model does not have",
        ),
        (adding("lm_head", suffixes=["weight"]), {}, r"1 key \(base_model.model.lm_head.weight\)"),
        (dict.copy, {"modules_to_save": ["lm_head"]}, r"lacks 1 key \(base_model.model.lm_head.weight\)"),
        (dict.copy, {"bias": "lora_only"}, r"lacks 3 keys \(.*q_proj.bias.*\) that .* says are trained"),
        (
            adding("lm_head", suffixes=["weight"], shape=(64, 31)),
            {"modules_to_save": ["lm_head"]},
            r"lm_head.weight is \[64, 31\], not \[64, 32\]",
        ),
        (adding(Q.format(0), suffixes=["lora_magnitude_vector"]), {}, "q_proj.lora_magnitude_vector"),
        (
            dropping(Q.format(1), "lora_B"),
            {},
            r"lacks 1 key \(base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight\)",
        ),
        (
            dropping(Q.format(1), "lora_A", "lora_B"),
            {},
            r"lacks tensors of 1 module \(model.language_model.layers.1.self_attn.q_proj\)",
        ),
        (dict.clear, {}, "holds no tensors"),
        (
            adding(Q.format(0), suffixes=["lora_A.weight"], shape=(2, 31)),
            {},
            r"layers.0.self_attn.q_proj.lora_A.weight is \[2, 31\], not \[2, 32\]",
        ),
        (adding(Q.format(0).replace("language_model.", "")), {}, "which are one module"),
        (dict.copy, {"r": 4}, r"lora_A.weight is \[2, 32\], not \[4, 32\]"),
        (dict.copy, {"peft_type": "LOHA"}, "peft_type='LOHA'; only 'LORA'"),
        (dict.copy, {"r": None}, "lacks r"),
    ],
)
def test_what_does_not_fit_is_an_error_that_lists_it(table, flax_model, tmp_path, change, fields, message):
    tensors = tensors_for(table, {Q.format(i) for i in range(3)})
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load_adapter_into(flax_model, table, write(tmp_path, tensors, **fields))
    assert trainable_parameters(flax_model) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa_niter_4"},
        {"layer_replication": [[0, 2]]},
        {"use_qalora": True},
    ],
)
def test_an_unsupported_adapter_is_refused(table, flax_model, tmp_path, fields):
    tensors = tensors_for(table, {Q.format(i) for i in range(3)})
    with pytest.raises(NotImplementedError, match=f"adapter_config.json: {next(iter(fields))}="):
        load_adapter_into(flax_model, table, write(tmp_path, tensors, **fields))


def test_missing_pickled_and_broken_files(table, flax_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no PEFT adapter directory"):
        read_adapter(tmp_path)
    directory = write(tmp_path, tensors_for(table, {Q.format(i) for i in range(3)}))
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_adapter(directory)
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which is never read"):
        read_adapter(directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_adapter(directory)
