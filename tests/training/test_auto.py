"""Gradient checkpointing by memory: what is chosen under a budget, and what is refused."""

import ast
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlmlora
from tests.models.qwen2_5_vl_cases import Case, Visual, batches, tiny_config
from vlmlora.lora.apply import add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.init import init_parameters
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import family_of
from vlmlora.nn import stack
from vlmlora.nn.variables import Trainable
from vlmlora.training import auto, remat
from vlmlora.training import loss as loss_module
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.memory import gradient_cost
from vlmlora.training.optimizer import adamw
from vlmlora.training.remat import POLICIES, policy_by_part, remat_policy
from vlmlora.training.step import choose_policy, init_train_state, make_train_step

CONFIG = tiny_config(text={"num_hidden_layers": 6, "intermediate_size": 256})
BATCH = batches(Case([[3, Visual(1, 4, 4), 4], [9]]), CONFIG)[1]
# Text alone, of which a program is compiled in half the time; its activations are most of what a step takes.
TEXT = {
    name: np.repeat(BATCH[name][..., :1], 64, axis=-1) for name in ("input_ids", "position_ids", "labels")
}
OPTIMIZER = adamw(0.01, total_steps=10)
AUTO_TEXT = {"vision": True, "language": "auto"}


@pytest.fixture(scope="module")
def parts():
    module = family_of(CONFIG).model(CONFIG, dtype=jnp.float32)
    init_parameters(module, jax.random.key(0), std=0.1)
    lora = LoraConfig(r=2, init_lora_weights=False)
    add_adapters(module, select(module_table(CONFIG), lora), lora, jax.random.key(1))
    return nnx.split(module, Trainable, ...)


@pytest.fixture(scope="module")
def programs(parts):
    """Policies' own steps as (bytes, loss), each compiled once."""
    graphdef, adapters, frozen = parts
    known = {}

    def measure(policy):
        if str(policy) not in known:
            step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=policy), OPTIMIZER)
            _, metrics = step(init_train_state(adapters, OPTIMIZER), frozen, TEXT)
            (program,) = step._programs.values()
            known[str(policy)] = program.needed, float(metrics["loss"])
        return known[str(policy)]

    return measure


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vlmlora" / "policies"


@pytest.fixture
def compilations():
    """Names of the programs that are compiled."""
    seen = []

    def listen(event, duration, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def automatic(parts, **given):
    graphdef, adapters, frozen = parts
    loss = make_loss_fn(graphdef, gradient_checkpointing=AUTO_TEXT)
    return make_train_step(loss, OPTIMIZER, **given), init_train_state(adapters, OPTIMIZER), frozen


def test_without_a_limit_everything_is_saved_and_compiled_once(parts, compilations, capsys):
    step, state, frozen = automatic(parts)
    batch = jax.device_put(TEXT)
    compilations.clear()
    state, metrics = step(state, frozen, batch)
    assert len(compilations) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "gradient_checkpointing={'vision': True, 'language': 'attention+mlp'} chosen for 2 rows of" in text
    assert "there is no limit" in text
    assert np.isfinite(metrics["loss"])
    compilations.clear()
    step(state, frozen, batch)
    assert not compilations
    assert not capsys.readouterr().out


def test_a_budget_is_kept_with_the_least_work_and_remembered(parts, programs, monkeypatch, cache, capsys):
    (most, _), (least, expected) = programs("attention+mlp"), programs(True)
    budget = (most + least) // 2
    step, state, frozen = automatic(parts, memory_budget=budget)
    assert step.policy(state, frozen, TEXT) not in (AUTO_TEXT | {"language": auto.ALL}, policy_by_part(True))
    _, metrics = step(state, frozen, TEXT)
    # The same float32 operations, fused in another way.
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert least < kept["needed"] <= budget
    assert "should" not in capsys.readouterr().out

    # Who remembers traces nothing.
    monkeypatch.setattr(auto, "Planner", None)
    graphdef, adapters, frozen = parts
    state = init_train_state(adapters, OPTIMIZER)
    loss = make_loss_fn(graphdef, gradient_checkpointing=AUTO_TEXT)
    found = choose_policy(loss, OPTIMIZER, state, frozen, TEXT, memory_budget=budget)
    assert found == kept["policy"]
    assert "It was chosen in an earlier run" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match=r"call vlmlora\.choose_policy"):
        loss(adapters, frozen, jax.device_put(TEXT))


def test_what_was_remembered_counts_only_where_it_holds(cache, monkeypatch):
    program = auto.Program({"vision": True, "language": {"qkv": "save"}}, None, needed=900)
    arguments = (None, {"a": np.zeros(3)}, {"input_ids": np.zeros((2, 5))}, None)

    def key():
        return auto._cache_key("auto", arguments, False, {"memory_budget": None})

    auto._write(key(), program, available=1000)
    (file,) = cache.iterdir()
    assert auto._read(key(), 1000) == auto._read(key(), 900) == program.policy
    # Less than it needs; so much more that something else may fit.
    assert auto._read(key(), 899) is None
    assert auto._read(key(), 1100) is None
    whole = file.read_text()
    damaged = (
        whole[:-5],
        "[]",
        whole.replace('"qkv"', '"kvq"'),
        whole.replace("true", '"auto"'),
        whole.replace('"save"', "1"),
    )
    for text in damaged:
        assert text != whole
        file.write_text(text)
        assert auto._read(key(), 1000) is None
    file.write_text(whole)
    assert auto._read(key(), 1000) == program.policy
    with monkeypatch.context() as context:
        context.setattr(vlmlora, "__version__", "9")
        assert auto._read(key(), 1000) is None
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert auto._read(key(), 1000) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_what_cannot_fit_is_refused_before_training_with_what_would(parts, programs):
    graphdef, adapters, frozen = parts
    (most, _), (least, _) = programs("attention+mlp"), programs(True)
    budget = (most + least) // 2
    loss = make_loss_fn(graphdef, gradient_checkpointing=False)
    step = make_train_step(loss, OPTIMIZER, memory_budget=budget)
    state = init_train_state(adapters, OPTIMIZER)
    with pytest.raises(auto.StepTooLargeError) as raised:
        step(state, frozen, TEXT)
    text = str(raised.value)
    rows, tokens = TEXT["input_ids"].shape
    assert (
        f"a training step of {rows} rows of {tokens} tokens with gradient_checkpointing=False needs" in text
    )
    assert f"{budget / 2**20:.2f} MiB are available" in text
    for name in ("frozen weights", "adapters and optimizer", "batch", "activations and temporaries"):
        assert re.search(rf"[\d.]+ [MK]iB {name}", text)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in text
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    # What it says would fit does.
    policy = ast.literal_eval(re.search(r"trained\. gradient_checkpointing=(.*?) should fit", text)[1])
    assert programs(policy)[0] <= budget
    # There is no policy that fits this.
    step, state, frozen = automatic(parts, memory_budget=least // 2)
    with pytest.raises(MemoryError, match=r"needs .* available") as raised:
        step(state, frozen, TEXT)
    assert "should fit" not in str(raised.value)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_the_rows_that_would_fit_are_counted():
    arguments = (None, {"w": np.zeros(1000, np.uint8)}, {"input_ids": np.zeros((8, 4), np.uint8)}, None)
    program = auto.Program(None, None, needed=9032)
    text = str(auto.too_large(program, arguments, available=5500))
    assert "some 4 of the 8 rows" in text
    assert "rows should fit" not in str(auto.too_large(program, arguments, available=1100))


@pytest.mark.slow
def test_memory_and_work_of_policies_are_ordered_as_they_are(parts, programs):
    graphdef, adapters, frozen = parts
    loss = make_loss_fn(graphdef, gradient_checkpointing="auto")
    arguments = (init_train_state(adapters, OPTIMIZER), frozen, TEXT, None)
    planner = auto.Planner(loss, arguments)
    costs = [planner.cost(policy) for policy in (True, "attention", "attention+mlp", False)]
    assert costs == sorted(costs, key=lambda cost: cost.memory)
    assert costs == sorted(costs, key=lambda cost: -cost.work)
    # Costs add up: what two towers and two halves of a layer save together has no trace of its own.
    candidates = {str(each.policy): each for each in planner.candidates()}
    together = {"attention_output": "save", "mlp_low_rank": "save", "mlp_up": "save"}
    added = candidates[str({"vision": together, "language": together})]
    traced = planner.cost({"vision": together, "language": together})
    assert (added.memory, added.work) == (traced.memory, traced.work)
    # What the compiler allocates in addition is what the traces say.
    more = programs("attention+mlp")[0] - programs(True)[0]
    assert costs[2].memory - costs[0].memory == pytest.approx(more, rel=0.3)


@pytest.mark.slow
def test_a_part_may_be_left_to_choose(parts):
    graphdef, adapters, frozen = parts
    loss = make_loss_fn(graphdef, gradient_checkpointing={"vision": "unsloth", "language": "auto"})
    arguments = (init_train_state(adapters, OPTIMIZER), frozen, BATCH, None)
    policies = [each.policy for each in auto.Planner(loss, arguments).candidates()]
    assert {str(policy["vision"]) for policy in policies} == {"unsloth"}
    assert len({str(policy["language"]) for policy in policies}) == len(policies) > len(POLICIES)


@pytest.mark.slow
def test_what_leaves_beside_the_layers_spares_work_and_costs_none(parts, monkeypatch):
    graphdef, adapters, frozen = parts
    monkeypatch.setattr(auto, "has_pinned_host", lambda: True)
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    monkeypatch.setattr(stack, "HOST_FLOPS_PER_BYTE", 1)
    loss = make_loss_fn(graphdef, gradient_checkpointing={"vision": True, "language": "auto"})
    planner = auto.Planner(loss, (init_train_state(adapters, OPTIMIZER), frozen, BATCH, None))
    candidates = {str(each.policy["language"]): each for each in planner.candidates()}
    nothing, inputs, more = (
        candidates[str(policy)] for policy in ({}, {"layer_input": "offload"}, auto.INPUTS_AND_SPARE)
    )
    assert more.work < inputs.work
    assert inputs.work > nothing.work
    assert more.memory < nothing.memory
    assert more.memory == inputs.memory
    best = planner.cheapest(inputs.memory)
    assert best.policy["language"] == auto.INPUTS_AND_SPARE


def test_what_the_end_of_the_decoder_keeps_is_gone_when_layers_are_computed_again(parts, monkeypatch):
    monkeypatch.setattr(loss_module, "BLOCK_SIZE", 8)
    graphdef, adapters, frozen = parts
    loss = make_loss_fn(graphdef, gradient_checkpointing=AUTO_TEXT, chunk_size=8)
    state = init_train_state(adapters, OPTIMIZER)
    planner = auto.Planner(loss, (state, frozen, TEXT, None))
    at_end = remat_policy({"layer_input": "offload"}, offloads=True)
    policies = [{"vision": True, "language": each} for each in (replace(at_end, at_end=None), at_end)]
    costs = [gradient_cost(loss.with_checkpointing(each), adapters, frozen, TEXT) for each in policies]
    # It saves a whole layer more, and less is computed again; but that does not lie beside the others.
    assert costs[1].products.flops < costs[0].products.flops
    more = planner.cost(policies[1]).memory - planner.cost(policies[0]).memory
    assert 0 <= more < costs[1].saved.device - costs[0].saved.device


def test_others_memory_is_not_available():
    stats = {"bytes_limit": 1000, "bytes_in_use": 300}
    (device,) = (array := jnp.zeros(25, jnp.float32)).devices()
    assert auto._free_bytes(device, stats, [array]) == 800
    assert auto._free_bytes(device, None, [array]) is None
    assert auto.available_bytes({"a": jnp.zeros(3)}, None) is None
    assert auto.available_bytes({"a": jnp.zeros(3)}, 5) == 5
