"""Logits, loss, gradients, adapters and greedy tokens against transformers and PEFT, in float32."""

import copy
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.families.description import descriptions
from tests.families.parity import (
    LOGITS,
    LOSS,
    POLICIES,
    SAME,
    adapt_with_peft,
    assert_gradients,
    assert_logits,
    evaluate,
    linear_names,
    load,
    logits,
)
from vlmlora.generation.greedy import greedy_decode
from vlmlora.lora.apply import adapted_modules, add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.peft_format import load_adapter_into, save_adapter
from vlmlora.lora.selection import select
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import supported_model_types
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Trainable
from vlmlora.training import remat
from vlmlora.training.loss import make_loss_fn


def test_every_family_is_described():
    """A family without ``tests/families/<model_type>.py`` would be compared with nothing."""
    assert list(descriptions()) == supported_model_types()


def test_peft_adapter_gives_transformers_logits_loss_and_gradients(family_case, tmp_path, monkeypatch):
    """A checkpoint of transformers and an adapter of PEFT, loaded here; the first by several policies."""
    family, name = family_case
    case = family.cases[name]
    model = family.random_model(case.config)
    model.save_pretrained(tmp_path / "base")
    adapted = adapt_with_peft(model)
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = family.make_inputs(case.rows, case.config, 0)
    if family.check is not None:
        family.check(model, inputs)
    module, table = load(tmp_path / "base"), module_table(case.config)
    load_adapter_into(module, table, tmp_path / "adapter")
    # A CPU has memory to offload to as well, though there is nothing to gain by it.
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    policies = POLICIES if case is family.first else (True,)
    found, losses, gradients = evaluate(module, inputs, policies)

    output = adapted(**inputs.theirs)
    output.loss.backward()
    assert_logits(found, output.logits, inputs.valid)
    for loss, gradient in zip(losses, gradients, strict=True):
        np.testing.assert_allclose(loss, output.loss.item(), rtol=LOSS)
        assert_gradients(gradient, table, adapted)
    first, *others = (jax.tree.leaves(nnx.state(each, Trainable)) for each in gradients)
    for one, other in ((a, b) for each in others for a, b in zip(first, each, strict=True)):
        assert np.linalg.norm(one - other) <= SAME * np.linalg.norm(one)


def test_real_peft_computes_the_logits_of_an_exported_adapter(family, tmp_path):
    case = family.first
    model = family.random_model(case.config)
    model.save_pretrained(tmp_path / "base")
    inputs = family.make_inputs(case.rows, case.config, 0)
    theirs = {name: value for name, value in inputs.theirs.items() if name != "labels"}
    module, table = load(tmp_path / "base"), module_table(case.config)
    # DoRA and two ranks in every stack: more than plain adapters need of a family's scan.
    config = LoraConfig(
        r=3,
        lora_alpha=2,
        use_dora=True,
        rank_pattern={r".*\.1\..*": 5},
        finetune_projector=any(spec.part == "projector" for spec in table),
    )
    add_adapters(module, select(table, config), config, jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = nnx.state(module, Trainable)
    # About as large as the base's weights, so that no softmax is saturated and magnifies rounding.
    nnx.update(module, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.25, a.shape), a.dtype), adapters))
    save_adapter(tmp_path / "adapter", module, table, config)

    plain = model(**theirs).logits.detach().numpy()[inputs.valid]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    expected = loaded(**theirs).logits
    assert np.abs(expected.detach().numpy()[inputs.valid] - plain).max() > 100 * LOGITS * np.abs(plain).max()
    assert_logits(logits(module, inputs.ours), expected, inputs.valid)


def test_adapters_of_every_era_load_and_select_alike(family, tmp_path):
    """PEFT's files under the module names of each version, and what ours select there."""
    config = family.first.config
    model = family.random_model(config)
    model.save_pretrained(tmp_path / "base")
    names = linear_names(model, head=False)
    adapted = adapt_with_peft(model)
    adapted.save_pretrained(tmp_path / "today")
    tensors = load_file(tmp_path / "today" / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "today" / "adapter_config.json").read_text())
    for era, rename in family.eras.items():
        renamed = {name: rename(f"{name}.weight").removesuffix(".weight") for name in names}
        of_era = {
            f"base_model.model.{renamed[name]}.{matrix}.weight": tensors[
                f"base_model.model.{name}.{matrix}.weight"
            ]
            for name in names
            for matrix in ("lora_A", "lora_B")
        }
        (tmp_path / era).mkdir()
        save_file(of_era, tmp_path / era / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = fields | {"target_modules": list(renamed.values())}
        (tmp_path / era / "adapter_config.json").write_text(json.dumps(targets))
        module, table = load(tmp_path / "base"), module_table(config)
        lora = load_adapter_into(module, table, tmp_path / era)
        found = 0
        for spec, adapter, index in adapted_modules(module, table):
            for matrix in ("lora_A", "lora_B"):
                array = np.asarray(getattr(adapter, matrix).get_value())
                array = array if index is None else array[index]
                np.testing.assert_array_equal(array, tensors[f"base_model.model.{spec.name}.{matrix}.weight"])
                found += 1
        assert found == len(tensors)

        save_adapter(tmp_path / f"{era} again", module, table, lora)
        written = json.loads((tmp_path / f"{era} again" / "adapter_config.json").read_text())
        every = {rename(f"{spec.name}.weight").removesuffix(".weight") for spec in table}
        selected = {name for name in every if re.fullmatch(written["target_modules"], name)}
        assert selected == set(renamed.values())


def test_greedy_tokens_with_a_cache(family, tmp_path):
    for name in family.greedy:
        case, end = family.cases[name], family.end_token
        model = family.random_model(case.config, seed=2)
        model.save_pretrained(tmp_path / name)
        inputs = family.make_inputs(case.rows, case.config, 3)
        tokens = greedy_decode(
            *nnx.split(load(tmp_path / name)),
            inputs.ours,
            max_new_tokens=12,
            eos_token_ids=(end,),
            pad_token_id=end,
        )
        # transformers continues prompts that are padded on the left, so each row goes in alone.
        for row, length in enumerate(inputs.valid.sum(1)):
            prompt = family.one_row(inputs.theirs, row, length)
            expected = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=end)
            expected = expected[0, length:].numpy()
            np.testing.assert_array_equal(np.asarray(tokens)[row, : len(expected)], expected)
            assert (np.asarray(tokens)[row, len(expected) :] == end).all()


def test_samples_packed_into_one_row_do_not_see_each_other(family, tmp_path):
    if family.pack is None:
        pytest.skip("the family does not pack samples")
    case = family.first
    family.random_model(case.config).save_pretrained(tmp_path)
    inputs = family.make_inputs(case.rows, case.config, 0)
    graphdef, adapters, frozen = nnx.split(load(tmp_path), Trainable, ...)
    loss_fn = make_loss_fn(graphdef, gradient_checkpointing=False, chunk_size=16)

    @jax.jit
    def run(adapters, frozen, batch):
        module = nnx.merge(graphdef, adapters, frozen)
        return module.logits(module(**model_inputs(batch))[0]), loss_fn(adapters, frozen, batch)

    separate, loss = run(adapters, frozen, inputs.ours)
    found, packed_loss = run(adapters, frozen, family.pack(inputs))
    separate = np.asarray(separate)[inputs.valid]
    assert np.abs(np.asarray(found)[0] - separate).max() <= SAME * np.abs(separate).max()
    np.testing.assert_allclose(packed_loss, loss, rtol=LOSS)
