"""The EVA start against the real PEFT, on the same model and the same batches."""

import copy
import warnings
from dataclasses import replace

import jax
import numpy as np
import peft
import pytest
from peft.tuners.lora.eva import initialize_lora_eva_weights as peft_eva
from peft.utils.incremental_pca import IncrementalPCA as PeftPCA

from tests.models.qwen2_5_vl_cases import Case, Visual, batches, random_torch_model, tiny_config
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.lora.apply import adapted_modules, trainable_parameters
from vlmlora.lora.config import EvaConfig
from vlmlora.lora.eva import IncrementalPCA, initialize_lora_eva_weights
from vlmlora.lora.peft_format import save_adapter
from vlmlora.models.loading import load_model, read_config

LANGUAGE = r".*language_model.*_proj"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model in both libraries, and batches with an image, unpadded."""
    directory = tmp_path_factory.mktemp("base")
    torch_model = random_torch_model(tiny_config())
    torch_model.save_pretrained(directory)
    config = read_config(directory)
    pairs = [
        batches(Case([[60 + seed % 2, Visual(1, 4, 4), 40 - seed % 2]]), config, seed) for seed in range(3)
    ]
    return directory, torch_model, [theirs for theirs, *_ in pairs], [ours for _, ours, _ in pairs]


@pytest.fixture
def model(data):
    directory, *_ = data
    config = read_config(directory)
    module = load_model(directory, config, dtype=np.float32, quantize=None, progress=False)
    return FastVisionModel(module, config, name_or_path=str(directory))


def adapt(model, **arguments):
    FastVisionModel.get_peft_model(model, **arguments, random_state=0, verbose=False)


def matrices(model):
    return {
        spec.name: tuple(
            np.asarray(v.get_value() if i is None else v.get_value()[i])
            for v in (adapter.lora_A, adapter.lora_B, adapter.scaling)
        )
        for spec, adapter, i in adapted_modules(model.module, model.module_table)
    }


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_subspaces_and_ranks_equal_pefts(data, model, tmp_path, rho):
    _, torch_model, theirs, ours = data
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE}
    eva = {"rho": rho, "tau": 0.9, "adjust_scaling_factors": rho == 2.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(
            copy.deepcopy(torch_model),
            peft.LoraConfig(**arguments, init_lora_weights="eva", eva_config=peft.EvaConfig(**eva)),
        )
        peft_eva(oracle, theirs, show_progress_bar=False)
    adapt(model, **arguments, init_lora_weights="eva", eva_config=eva)
    initialize_lora_eva_weights(model, ours)

    expected = {n: m for n, m in oracle.base_model.model.named_modules() if hasattr(m, "lora_A")}
    found = matrices(model)
    config = model.lora_config
    assert sum(A.shape[0] for A, *_ in found.values()) == 14 * 4
    if rho == 1:
        assert {A.shape[0] for A, *_ in found.values()} == {4}
        assert found.keys() == expected.keys()
    else:
        assert len({A.shape[0] for A, *_ in found.values()}) > 2

    # Modules with the same input explain the same, so which of them gets the last rank is chance: theirs and
    # ours agree on the ranks of all that share an input.
    def ranks(shapes):
        groups = {}
        for name, r in shapes.items():
            group = (
                name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
            )
            groups.setdefault(group, []).append(r)
        return {group: sum(found) for group, found in groups.items()}

    found_ranks = {name: A.shape[0] for name, (A, *_) in found.items()}
    wanted_ranks = {name: layer.r["default"] for name, layer in expected.items()}
    one, other = ranks(found_ranks), ranks(wanted_ranks)
    assert one.keys() == other.keys()
    # A component at the edge of the budget may fall to either of two groups.
    assert sum(abs(one[group] - other[group]) for group in one) <= 2

    compared = 0
    for name, (A, B, scaling) in found.items():
        assert not B.any()
        assert scaling == pytest.approx(2 if rho == 2 else 8 / A.shape[0])
        assert config.rank_of(name) == A.shape[0]
        assert config.scaling_of(name) == pytest.approx(float(scaling))
        np.testing.assert_allclose(A @ A.T, np.eye(len(A)), atol=1e-3)
        if name in expected and wanted_ranks[name] == len(A):
            # Both stop by randomised iterations: the spans agree up to what tau leaves open. Random ones of
            # four vectors in 64 dimensions would have 0.06 in common.
            wanted = expected[name].lora_A["default"].weight.detach().numpy()
            overlap = np.linalg.norm(A @ wanted.T) ** 2 / len(A)
            assert overlap > 0.8, (name, overlap)
            compared += 1
    assert compared >= 10
    assert trainable_parameters(model.module) == sum(A.size + B.size for A, B, _ in found.values())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(tmp_path, model.module, model.module_table, config)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path)
    layers = {n: m for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {name: layer.r["default"] for name, layer in layers.items()} == found_ranks


def test_towers_and_heads_have_taps_and_padding_does_not_count(data, model):
    directory, *_ = data
    padded = [
        batches(Case([[50, Visual(1, 4, 6), 30], [90]]), read_config(directory), seed)[1] for seed in range(2)
    ]
    arguments = {
        "r": 2,
        "target_modules": ["qkv", "merger.mlp.0", "merger.mlp.2", "lm_head"],
        "use_dora": True,
    }
    eva = {"rho": 1, "tau": 0.5, "use_label_mask": False, "whiten": True}
    adapt(model, **arguments, init_lora_weights="eva", eva_config=eva)
    before = matrices(model)
    initialize_lora_eva_weights(model, padded)
    once = matrices(model)
    assert once.keys() == before.keys()
    assert not any(np.array_equal(once[name][0], before[name][0]) for name in once)
    for batch in padded:
        # What stands in padding is nobody's business.
        hidden = batch["attention_mask"] == 0
        assert hidden.any()
        batch["input_ids"] = np.where(hidden, 7, batch["input_ids"])
        empty = batch["image_segment_ids"] == 0
        batch["pixel_values"] = np.where(empty[..., None], 3.0, batch["pixel_values"]).astype(np.float32)
    initialize_lora_eva_weights(model, padded)
    for name, (A, *_) in matrices(model).items():
        np.testing.assert_allclose(np.abs(A @ once[name][0].T), np.abs(A @ A.T), rtol=1e-2, atol=1e-3)


def test_what_it_cannot_do_is_refused_and_changes_nothing(data, model):
    *_, ours = data
    with pytest.raises(ValueError, match="init_lora_weights is None"):
        initialize_lora_eva_weights(model, ours)
    adapt(model, r=40, target_modules=["q_proj"], init_lora_weights="eva", eva_config={"rho": 1})
    before = matrices(model)
    with pytest.raises(ValueError, match="no batches"):
        initialize_lora_eva_weights(model, [])
    with pytest.raises(ValueError, match="is an iterator"):
        initialize_lora_eva_weights(model, iter(ours))
    few = [
        {**batch, "labels": np.where(np.arange(ours[0]["labels"].shape[1]) < 9, 1, -100)}
        for batch in ours[:1]
    ]
    with pytest.raises(ValueError, match=r"at most 9 that count\) as EVA may give it ranks \(40\)"):
        initialize_lora_eva_weights(model, few)
    model.lora_config = replace(model.lora_config, eva_config=EvaConfig(rho=2))
    with pytest.raises(ValueError, match="has 64 inputs, but EVA may give it 80 ranks"):
        initialize_lora_eva_weights(model, ours)
    model.module.mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    with pytest.raises(ValueError, match=r"call it before vlmlora\.distributed\.shard_model"):
        initialize_lora_eva_weights(model, ours)
    for name, (A, *_) in matrices(model).items():
        np.testing.assert_array_equal(A, before[name][0])


def test_incremental_decomposition_equals_pefts():
    import torch

    rng = np.random.default_rng(0)
    spread = 2.0 ** -np.arange(24)
    ours, theirs = IncrementalPCA(6), PeftPCA(n_components=6, lowrank=True, lowrank_seed=42)
    for _ in range(4):
        rows = (rng.normal(size=(40, 24)) * spread + rng.normal(size=24)).astype(np.float32)
        ours.update(rows)
        theirs.partial_fit(torch.tensor(rows))
    # Subspace iterations from two random starts, in float32, on a spectrum that halves.
    np.testing.assert_allclose(ours.singular_values, theirs.singular_values_, rtol=1e-3)
    np.testing.assert_allclose(ours.ratio, theirs.explained_variance_ratio_, rtol=2e-3)
    np.testing.assert_allclose(np.abs((ours.components * theirs.components_.numpy()).sum(1)), 1, atol=1e-3)
