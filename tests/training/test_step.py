import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from tests.jaxprs import equations
from tests.models.qwen2_5_vl_cases import Case, Visual, batches, tiny_config
from vlmlora.distributed import make_mesh
from vlmlora.lora.apply import add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.init import init_parameters
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import family_of
from vlmlora.nn import low_rank, stack
from vlmlora.nn.low_rank import LOW_RANK, MLP_LOW_RANK
from vlmlora.nn.mlp import MLP_UP
from vlmlora.nn.saved import is_of_one_layer
from vlmlora.nn.variables import Trainable
from vlmlora.training import remat
from vlmlora.training.loop import fit
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.memory import saved_arrays
from vlmlora.training.optimizer import adamw
from vlmlora.training.remat import NAMES, keeps_on_host, name_of_policy, remat_policy
from vlmlora.training.step import _compiler_options, init_train_state, make_train_step

CONFIG = tiny_config()
BATCH = batches(Case([[3, Visual(1, 4, 4), 4], [5]]), CONFIG)[1]


@pytest.fixture(scope="module", autouse=True)
def narrow_room():
    """Rows of whole lines would make layers of this size as wide as others, from which tests tell them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "_ALIGNMENT", 8)
        yield


def widths(arrays):
    """Last axes, without the columns in which an adapter works."""
    parts = (CONFIG.vision_config, CONFIG.text_config)
    known = [size for part in parts for size in (part.hidden_size, part.intermediate_size)]
    return {max(size for size in known if size <= array.shape[-1]) for array in arrays}


@pytest.fixture(scope="module")
def parts():
    """Structure, adapters with dropout, and frozen parameters of a small random model."""
    module = family_of(CONFIG).model(CONFIG, dtype=jnp.float32)
    init_parameters(module, jax.random.key(0), std=0.1)
    lora = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False)
    add_adapters(module, select(module_table(CONFIG), lora), lora, jax.random.key(1))
    return nnx.split(module, Trainable, ...)


@pytest.fixture(scope="module")
def trained(parts):
    """Three steps on one batch: the state after them, their losses, and what they started from."""
    graphdef, adapters, frozen = parts
    before = jax.tree.map(np.asarray, (adapters, frozen))
    optimizer = adamw(0.05, total_steps=100, warmup_steps=1)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=True), optimizer)
    state = init_train_state(adapters, optimizer)
    state, history = fit(step, state, frozen, iter([BATCH] * 5), total_steps=3)
    return step, state, history, before


def test_steps_learn_and_leave_the_model_alone(parts, trained):
    _, adapters, frozen = parts
    _, state, history, before = trained
    assert int(state.step) == 3
    assert history.losses[2] < history.losses[0]
    assert history.tokens == [BATCH["input_ids"].size] * 3
    # The step donates its state; what `split` returned is still there, and unchanged.
    for now, then in zip(jax.tree.leaves((adapters, frozen)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(now, then)


def test_optimizer_state_exists_for_adapters_alone(parts, trained):
    _, adapters, _ = parts
    moments = [leaf.size for leaf in jax.tree.leaves(trained[1].opt_state) if leaf.ndim]
    assert sum(moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapters))


def test_dropout_follows_the_key_and_is_off_without_one(parts):
    graphdef, adapters, frozen = parts
    loss = jax.jit(make_loss_fn(graphdef, gradient_checkpointing=False))
    with_key = [float(loss(adapters, frozen, BATCH, key=jax.random.key(k))) for k in (0, 0, 1)]
    without = float(loss(adapters, frozen, BATCH))
    assert with_key[0] == with_key[1] != with_key[2]
    assert without not in with_key


def test_a_state_is_donated(trained, parts):
    step, state, *_ = trained
    copy = jax.tree.map(jnp.copy, state)
    step(copy, parts[2], BATCH, None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy.adapters))


def test_a_state_committed_to_its_device_compiles_no_second_program(trained, parts, caplog):
    """As steps return it on a GPU whose host memory they use; the first state is not committed."""
    step, state, _, _ = trained
    copy = jax.tree.map(jnp.copy, state)
    committed = jax.device_put(copy, jax.devices()[0])
    assert not jax.tree.leaves(copy)[0].committed
    assert jax.tree.leaves(committed)[0].committed
    with jax.log_compiles():
        step(committed, parts[2], BATCH)
    assert not [record for record in caplog.records if "jit(step)" in record.getMessage()]


def test_offload_moves_layer_inputs_to_host_memory(parts, monkeypatch):
    graphdef, adapters, frozen = parts
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    gradient = jax.grad(make_loss_fn(graphdef, gradient_checkpointing="unsloth"))
    jaxpr = jax.make_jaxpr(gradient)(adapters, frozen, BATCH)
    assert "<host>" in str(jaxpr)


@pytest.mark.slow
def test_through_host_memory_loss_and_gradients_are_the_same(parts, monkeypatch):
    """With adapter dropout, and room for all that attention computes."""
    graphdef, adapters, frozen = parts
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    monkeypatch.setattr(stack, "HOST_FLOPS_PER_BYTE", 1)
    batch = jax.device_put(BATCH)

    def gradient(policy):
        loss = make_loss_fn(graphdef, gradient_checkpointing=policy)
        return jax.value_and_grad(lambda adapters: loss(adapters, frozen, batch, key=jax.random.key(3)))

    jaxpr = jax.make_jaxpr(gradient("unsloth"))(adapters)
    on_host = {
        e.outvars[0].aval.shape
        for e in equations(jaxpr)
        if e.primitive.name == "device_put" and "<host>" in str(e.outvars[0].aval)
    }
    config, rows = CONFIG.text_config, BATCH["input_ids"].shape
    head_dim = config.hidden_size // config.num_attention_heads
    for heads in (config.num_attention_heads, config.num_key_value_heads):
        assert (*rows, heads, head_dim) in {shape[-4:] for shape in on_host}
    (found, gradients), (expected, others) = (jax.jit(gradient(p))(adapters) for p in ("unsloth", True))
    # The same float32 operations, fused in another way.
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradients, others)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-9


def test_unsloth_checkpointing_on_a_cpu_is_plain_and_says_so_once(caplog):
    remat._offloads_to_host.cache_clear()
    with caplog.at_level("INFO", logger="vlmlora.training.remat"):
        plain = [remat_policy("unsloth") for _ in range(2)]
    assert len(caplog.records) == 1
    assert "cpu has no host memory apart from its own" in caplog.text
    assert all(each.kept == {MLP_LOW_RANK, LOW_RANK} and not each.in_place for each in plain)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(True, True), ("unsloth", True), ("mlp", False), ({"mlp_up": "offload"}, False), (lambda f: f, False)],
)
def test_layers_know_what_is_surely_of_one_layer(policy, expected):
    """Computed again, or kept of the layer with which the backward pass begins."""
    found = []

    def body(x):
        found.append(is_of_one_layer(MLP_UP))
        return x

    jax.eval_shape(remat_policy(policy, offloads=True)(body), 1.0)
    jax.eval_shape(remat_policy("unsloth", offloads=True).at_end.alone(body), 1.0)
    assert found == [expected, True]
    assert not is_of_one_layer(MLP_UP)


def test_what_is_saved_is_not_computed_twice(parts):
    graphdef, adapters, frozen = parts
    count = {}
    for policy in (False, True, "attention", "mlp", "attention+mlp"):
        gradient = jax.grad(make_loss_fn(graphdef, gradient_checkpointing=policy))
        jaxpr = jax.make_jaxpr(gradient)(adapters, frozen, BATCH)
        count[policy] = sum(e.primitive.name == "dot_general" for e in equations(jaxpr))
    assert count[False] < count["attention+mlp"] < min(count["attention"], count["mlp"])
    assert max(count["attention"], count["mlp"]) < count[True]


def test_with_all_names_saved_no_product_with_a_base_weight_is_computed_twice(parts):
    graphdef, adapters, frozen = parts
    base = {leaf.shape[1:] for leaf in jax.tree.leaves(frozen) if leaf.ndim == 3}

    def products(policy):
        gradient = jax.grad(make_loss_fn(graphdef, gradient_checkpointing=policy))
        dots = (e for e in equations(jax.make_jaxpr(gradient)(adapters, frozen, BATCH)))
        dots = (e for e in dots if e.primitive.name == "dot_general")
        return sum(any(v.aval.shape in base for v in e.invars) for e in dots)

    everything = dict.fromkeys(NAMES[1:], "save")
    all_but_one = [{k: v for k, v in everything.items() if k != name} for name in everything]
    once = products(False)
    assert products(everything) == products("attention+mlp") == once
    for policy in all_but_one:
        # What attention computes is no such product, nor are those with A.
        assert (products(policy) > once) == ({"attention_output", "mlp_low_rank", "low_rank"} <= set(policy))


def test_each_part_may_have_a_policy_of_its_own(parts, monkeypatch):
    graphdef, adapters, frozen = parts
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    sizes = {"vision": CONFIG.vision_config, "language": CONFIG.text_config}
    assert len({(each.hidden_size, each.intermediate_size) for each in sizes.values()}) == 2

    def saved(policy):
        """Widths of what is saved of every layer, on the device and on the host."""
        loss = make_loss_fn(graphdef, gradient_checkpointing=policy)
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in BATCH.items()}
        arrays, *_ = saved_arrays(loss, adapters, frozen, shapes)
        layers = [a for a in arrays if a.ndim == 4]
        on_host = widths(a for a in layers if "host" in str(a))
        return widths(layers) - on_host, on_host

    vision, language = sizes["vision"], sizes["language"]
    assert saved({"vision": "mlp", "language": "unsloth"}) == (
        {vision.hidden_size, vision.intermediate_size},
        {language.hidden_size},
    )
    assert saved({"language": {"layer_input": "offload", "mlp_gate": "save"}}) == (
        {vision.hidden_size, language.intermediate_size},
        {language.hidden_size},
    )
    assert saved({"vision": True, "language": True}) == saved(True)


def test_a_policy_is_written_as_short_as_it_can_be():
    assert name_of_policy({"vision": {}, "language": True}) == "True"
    spare = dict.fromkeys(("qkv", "attention_output", "attention_residual"), "offload_or_recompute")
    unsloth = spare | {"mlp_up": "recompute", "layer_input": "offload", "low_rank": "save"}
    unsloth["mlp_low_rank"] = "save"
    assert name_of_policy(unsloth) == "'unsloth'"
    each = {"vision": "mlp", "language": {"mlp_up": "save", "layer_input": "save"}}
    assert name_of_policy(each) == "{'vision': 'mlp', 'language': {'mlp_up': 'save'}}"


@pytest.mark.parametrize(
    ("policy", "on_host"),
    [
        (False, False),
        ("attention+mlp", False),
        ({"vision": True, "language": "mlp"}, False),
        ("unsloth", True),
        ({"vision": "mlp", "language": {"layer_input": "offload"}}, True),
        ("auto", True),
        (jax.checkpoint, True),
    ],
)
def test_graphs_hold_reads_of_stacks_where_nothing_goes_to_the_host(parts, policy, on_host):
    loss = make_loss_fn(parts[0], gradient_checkpointing=policy)
    assert keeps_on_host(policy) == on_host

    def in_graphs(loss, mesh):
        return "DYNAMIC_SLICE_FUSION" in _compiler_options(loss, mesh)["xla_gpu_enable_command_buffer"]

    assert in_graphs(loss, None) == (not on_host)
    assert not in_graphs(loss, make_mesh(devices=jax.devices()[:1]))
    assert not in_graphs(lambda *_, **__: 0.0, None)


@pytest.mark.parametrize(
    ("policy", "is_saving"),
    [
        (False, True),
        ("attention+mlp", True),
        ({"vision": True, "language": "mlp"}, True),
        (True, False),
        ({"layer_input": "save", "mlp_up": "recompute"}, False),
        ("unsloth", False),
        ({"layer_input": "offload", "mlp_up": "save"}, False),
    ],
)
def test_graphs_run_side_by_side_only_in_steps_that_save_values_on_the_device(parts, policy, is_saving):
    loss = make_loss_fn(parts[0], gradient_checkpointing=policy)
    options = _compiler_options(loss, None)
    assert (options.get("xla_gpu_command_buffer_scheduling_mode") == "CONCURRENT") == is_saving
    on_mesh = _compiler_options(loss, make_mesh(devices=jax.devices()[:1]))
    assert "xla_gpu_command_buffer_scheduling_mode" not in on_mesh


@pytest.mark.parametrize(("policy", "is_own"), [("unsloth", False), ({"vision": jax.checkpoint}, True)])
def test_xla_moves_copies_to_the_host_only_where_no_scan_of_ours_does(parts, policy, is_own):
    def moves(loss, mesh):
        return "xla_gpu_enable_pipelined_host_offloading" in _compiler_options(loss, mesh)

    loss = make_loss_fn(parts[0], gradient_checkpointing=policy)
    assert moves(loss, None) == is_own
    assert moves(loss, make_mesh(devices=jax.devices()[:1]))
    assert moves(lambda *_, **__: 0.0, None)


@pytest.mark.slow
def test_named_policies_leave_the_gradient_as_it_is(parts):
    graphdef, adapters, frozen = parts

    def gradient(policy):
        loss = make_loss_fn(graphdef, gradient_checkpointing=policy)
        return jax.tree.leaves(jax.jit(jax.grad(loss))(adapters, frozen, BATCH))

    plain = gradient(True)
    by_part = {"vision": {"mlp_up": "save"}, "language": {"attention_residual": "save", "mlp_gate": "save"}}
    for policy in (False, "attention", "mlp", "attention+mlp", by_part):
        for a, b in zip(plain, gradient(policy), strict=True):
            # The same operations fused in another way: float32 rounding, as much as between us and PEFT.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(a).max())


def test_a_dict_saves_offloads_and_recomputes_by_name(parts, monkeypatch):
    graphdef, adapters, frozen = parts
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    policy = {"layer_input": "save", "qkv": "recompute", "mlp_up": "offload"}
    gradient = jax.grad(make_loss_fn(graphdef, gradient_checkpointing=policy))
    jaxpr = jax.make_jaxpr(gradient)(adapters, frozen, BATCH)
    on_host = (
        e.outvars[0].aval
        for e in equations(jaxpr)
        if e.primitive.name == "device_put" and "<host>" in str(e.outvars[0].aval)
    )
    assert widths(on_host) == {CONFIG.text_config.intermediate_size, CONFIG.vision_config.intermediate_size}


def test_wrong_arguments_are_refused(trained, parts):
    step, state, *_ = trained
    with pytest.raises(ValueError, match="use_gradient_checkpointing='unslot'"):
        remat_policy("unslot")
    with pytest.raises(ValueError, match="'layer': 'save'; the names are layer_input, qkv"):
        remat_policy({"layer": "save"})
    with pytest.raises(ValueError, match=r"'qkv': 'host'; .*'save', 'offload', 'offload_or_recompute'"):
        remat_policy({"qkv": "host"})
    with pytest.raises(ValueError, match=r"'visual': True; .* the parts vision, language"):
        make_loss_fn(parts[0], gradient_checkpointing={"visual": True, "language": True})
    with pytest.raises(ValueError, match=r"'some' is unknown; .*'attention\+mlp', 'auto', .*'recompute'"):
        make_loss_fn(parts[0], gradient_checkpointing={"language": "some"})
    with pytest.raises(ValueError, match="chunk_size=0"):
        make_loss_fn(parts[0], chunk_size=0)
    with pytest.raises(ValueError, match="memory_budget=0"):
        make_train_step(make_loss_fn(parts[0]), optax.sgd(1.0), memory_budget=0)
    without_labels = {"input_ids": jnp.asarray(BATCH["input_ids"])}
    with pytest.raises(ValueError, match="the batch has no labels, only input_ids"):
        make_loss_fn(parts[0])(parts[1], parts[2], without_labels)
    with pytest.raises(ValueError, match=r"warmup_steps=7 .*warmup_steps=0 goes without"):
        adamw(total_steps=7, warmup_steps=7)
    for rate in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"learning_rate={rate}"):
            adamw(rate, total_steps=7)
    with pytest.raises(ValueError, match="schedule='step'"):
        adamw(total_steps=7, schedule="step")
    with pytest.raises(ValueError, match="no batch"):
        fit(step, state, parts[2], [], total_steps=3)


def test_a_loss_that_is_not_finite_stops_the_run(parts):
    def step(state, frozen, batch, key):
        return state, {"loss": jnp.float32(np.nan)}

    state = init_train_state(parts[1], optax.sgd(1.0))
    with pytest.raises(FloatingPointError, match="step 0 is nan"):
        fit(step, state, parts[2], [BATCH], total_steps=1)


def test_the_bar_shows_loss_rate_and_time_left(parts):
    def step(state, frozen, batch, key):
        return state, {"loss": jnp.float32(1.25)}

    console = Console(record=True, width=120, force_terminal=True)
    state = init_train_state(parts[1], optax.sgd(1.0))
    fit(step, state, parts[2], [BATCH] * 3, total_steps=3, console=console)
    text = console.export_text()
    assert "3/3" in text
    assert "loss 1.250" in text
    assert "tokens/s" in text
