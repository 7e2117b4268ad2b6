import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig

from tests.jaxprs import equations
from vlmlora.lora.abstract import add_abstract_adapters
from vlmlora.lora.apply import (
    LoraArrays,
    adapted_modules,
    add_adapters,
    make_adapter,
    remove_adapters,
    trainable_parameters,
)
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.init import init_lora
from vlmlora.lora.layer import Lora, PreparedLora
from vlmlora.lora.selection import select
from vlmlora.models.module_table import LinearSpec, linear_modules, module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.linear import Linear
from vlmlora.nn.stack import scan_layers
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.weights import DenseWeight

IN, OUT, R = 6, 5, 2


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linear_with(adapter, *, stack=None, seed=0):
    linear = Linear(IN, OUT, bias=True, dtype=jnp.float32, stack=stack)
    lead = () if stack is None else (stack,)
    linear.weight.set_value(DenseWeight(draw(seed, *lead, OUT, IN)))
    linear.bias.set_value(draw(seed + 1, *lead, OUT))
    linear.adapter = adapter
    return linear


def stacked_adapter(layers, **kwargs):
    n = len(layers)
    scaling = jnp.arange(1.0, n + 1)
    return Lora(draw(2, n, R, IN), draw(3, n, OUT, R), scaling, layers=tuple(layers), **kwargs)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_and_gradients_equal_peft(use_rslora):
    config = {"r": R, "lora_alpha": 3, "use_rslora": use_rslora}
    oracle = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(IN, OUT)),
        peft.LoraConfig(**config, target_modules=["0"], init_lora_weights=False),
    ).base_model.model[0]
    A, B = (oracle.lora_A["default"].weight, oracle.lora_B["default"].weight)
    as_jax = [jnp.asarray(p.detach().numpy()) for p in (oracle.weight, oracle.bias, A, B)]
    scaling = jnp.float32(LoraConfig(**config).scaling_of("0"))
    linear = linear_with(Lora(as_jax[2], as_jax[3], scaling))
    linear.weight.set_value(DenseWeight(as_jax[0]))
    linear.bias.set_value(as_jax[1])
    x = draw(4, 7, IN)

    graphdef, adapters, frozen = nnx.split(linear, Trainable, ...)
    value, grads = jax.value_and_grad(lambda a: jnp.sum(nnx.merge(graphdef, a, frozen)(x) ** 2))(adapters)
    expected = (oracle(torch.tensor(np.asarray(x))) ** 2).sum()
    expected.backward()
    # float32 on both sides; only the order of sums differs.
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(grads["adapter"]["lora_A"].get_value(), A.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["adapter"]["lora_B"].get_value(), B.grad, rtol=1e-4, atol=1e-5)


def test_computes_in_the_type_of_its_input_and_keeps_float32_parameters():
    adapter = Lora(draw(2, R, IN), draw(3, OUT, R), jnp.float32(0.7))
    x = draw(4, 3, IN)
    full = adapter(x, jnp.zeros((3, OUT)), base=None)
    half = adapter(x.astype(jnp.bfloat16), jnp.zeros((3, OUT), jnp.bfloat16), base=None)
    assert half.dtype == jnp.bfloat16
    assert adapter.lora_A.get_value().dtype == jnp.float32
    # bfloat16 keeps 8 bits, and the sums have few terms.
    np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=0.05, atol=0.05)


def test_dropout_scales_what_it_keeps_and_is_off_without_a_key():
    p = 0.25
    adapter = Lora(jnp.eye(IN), jnp.eye(IN), jnp.float32(1.0), dropout=p)
    x, zero = jnp.ones((2000, IN)), jnp.zeros((2000, IN))
    key = jax.random.key(0)
    y = adapter(x, zero, base=None, key=key)
    assert set(np.unique(y)) == {0.0, np.float32(1 / (1 - p))}
    # Twelve thousand draws: the mean of y has standard deviation 0.005.
    assert abs(float(y.mean()) - 1) < 0.03
    np.testing.assert_array_equal(y, adapter(x, zero, base=None, key=key))
    np.testing.assert_array_equal(adapter(x, zero, base=None), x)


def test_modules_that_share_a_key_drop_different_elements():
    x, zero, key = jnp.ones((64, IN)), jnp.zeros((64, IN)), jax.random.key(0)
    one, two = (Lora(jnp.eye(IN), jnp.eye(IN), jnp.float32(1), dropout=0.5, salt=salt) for salt in (1, 2))
    assert bool(jnp.any(one(x, zero, base=None, key=key) != two(x, zero, base=None, key=key)))


@pytest.mark.parametrize("layers", [[1, 3], [0, 1, 2, 3]])
def test_a_scan_applies_the_adapter_to_its_layers_only(layers):
    stack = 4
    adapter = stacked_adapter(layers)

    class Tower(nnx.Module):
        def __init__(self):
            self.stack = stack
            self.proj = linear_with(adapter, stack=stack)

    tower = Tower()
    x = draw(5, 3, IN)

    def outputs(adapters):
        module = nnx.merge(graphdef, adapters, frozen)
        return scan_layers(module, x, lambda layer, x, _, *, key: (x, layer.proj(x, key=key)))[1]

    graphdef, adapters, frozen = nnx.split(tower, Trainable, ...)
    found = outputs(adapters)
    for layer in range(stack):
        plain = x @ tower.proj.weight.get_value().value[layer].T + tower.proj.bias.get_value()[layer]
        if layer in layers:
            i = layers.index(layer)
            A, B = adapter.lora_A.get_value()[i], adapter.lora_B.get_value()[i]
            plain = plain + (i + 1) * (x @ A.T) @ B.T
        np.testing.assert_allclose(found[layer], plain, rtol=1e-4, atol=1e-4)

    grads = jax.grad(lambda a: jnp.sum(outputs(a) ** 2))(adapters)
    moments = optax.adam(1e-3).init(adapters)[0].mu
    for tree in (grads, moments):
        assert [leaf.shape[0] for leaf in jax.tree.leaves(tree)] == [len(layers)] * 2
    assert all(bool(jnp.any(leaf != 0, axis=(1, 2)).all()) for leaf in jax.tree.leaves(grads))


def test_layers_of_different_ranks_hold_their_own_parameters_and_share_one_scan():
    stack, ranks = 5, {0: 3, 2: 1, 3: 2, 4: 3}

    class Tower(nnx.Module):
        def __init__(self, ranks):
            self.stack = stack
            specs = [LinearSpec(f"t.{i}.m", "language", "mlp", i, IN, OUT, True, "t.m") for i in ranks]
            arrays = [
                LoraArrays(np.asarray(draw(10 + i, r, IN)), np.asarray(draw(20 + i, OUT, r)), 1.0 + i)
                for i, r in ranks.items()
            ]
            self.proj = linear_with(make_adapter(specs, arrays, dropout=0), stack=stack)

    x = draw(5, 3, IN)

    def outputs(adapters, graphdef, frozen):
        module = nnx.merge(graphdef, adapters, frozen)
        return scan_layers(module, x, lambda layer, x, _, *, key: (x, layer.proj(x, key=key)))[1]

    def loss(adapters, *rest):
        return jnp.sum(outputs(adapters, *rest) ** 2)

    tower = Tower(ranks)
    graphdef, adapters, frozen = nnx.split(tower, Trainable, ...)
    assert trainable_parameters(tower) == sum(r * (IN + OUT) for r in ranks.values())
    found = outputs(adapters, graphdef, frozen)
    grads = jax.grad(loss)(adapters, graphdef, frozen)
    groups = {group.r: (i, group) for i, group in enumerate(tower.proj.adapter.groups)}
    for layer in range(stack):
        weight, bias = tower.proj.weight.get_value().value[layer], tower.proj.bias.get_value()[layer]
        expected = x @ weight.T + bias
        if layer in ranks:
            i, group = groups[ranks[layer]]
            n = group.layers.index(layer)
            A, B = group.lora_A.get_value()[n], group.lora_B.get_value()[n]
            expected = expected + (1.0 + layer) * (x @ A.T) @ B.T
            np.testing.assert_allclose(
                x @ group.merged(weight, n).T + group.merged_bias(bias, n), expected, rtol=1e-4, atol=1e-4
            )
            # d sum(y²) / dB = scaling · 2 yᵀ (x Aᵀ).
            wanted = (1.0 + layer) * 2 * expected.T @ (x @ A.T)
            grad = grads["proj"]["adapter"]["groups"][i]["lora_B"].get_value()[n]
            np.testing.assert_allclose(grad, wanted, rtol=1e-3, atol=1e-2)
        np.testing.assert_allclose(found[layer], expected, rtol=1e-4, atol=1e-4)

    # However many ranks there are, the scan's body is the same program; each adds three pads outside of it.
    def program(ranks):
        split = nnx.split(Tower(ranks), Trainable, ...)
        jaxpr = jax.make_jaxpr(lambda adapters: outputs(adapters, split[0], split[2]))(split[1])
        scans = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]
        (body,) = [len(list(equations(eqn.params["jaxpr"]))) for eqn in scans]
        return body, len(list(equations(jaxpr)))

    (body, size), (one_body, one_size) = program(ranks), program(dict.fromkeys(ranks, 2))
    assert body == one_body
    assert size - one_size <= 40


@pytest.mark.parametrize("tokens", [1, 8], ids=["apart", "in one product"])
def test_a_prepared_adapter_adds_the_same(tokens):
    """To few tokens by itself, else in one product with the weight; the gradients are alike too."""
    adapter, x = stacked_adapter([0, 1]), draw(7, tokens, IN)

    def loss(a, b, is_prepared):
        arrays, kind = (a, b, adapter.scaling.get_value()), Lora
        if is_prepared:
            prepared, kind = Lora(*arrays, layers=(0, 1)).prepared(jnp.float32), PreparedLora
            arrays = prepared.lora_A.get_value(), prepared.lora_B.get_value()
        layers = (linear_with(kind(*(array[layer] for array in arrays))) for layer in range(2))
        return sum(jnp.sum(jnp.sin(linear(x))) for linear in layers)

    factors = adapter.lora_A.get_value(), adapter.lora_B.get_value()
    expected, found = (
        jax.value_and_grad(loss, argnums=(0, 1))(*factors, is_prepared) for is_prepared in (False, True)
    )
    # float32 sums in another order, for the zeros in between.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    prepared = adapter.prepared(jnp.bfloat16)
    assert prepared.lora_A.get_value().shape == (2, R, 64)
    assert prepared.lora_B.get_value().shape == (2, 64, R)
    assert prepared.lora_A.get_value().dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "more", [{"magnitude": draw(5, 2, OUT)}, {"lora_bias": draw(5, 2, OUT)}, {"dropout": 0.5}]
)
def test_what_adds_more_than_a_product_is_not_prepared(more):
    adapter = stacked_adapter([0, 1], **more)
    assert adapter.prepared(jnp.bfloat16) is adapter


def test_a_stacked_adapter_is_not_called_whole_nor_expanded_too_short():
    adapter = stacked_adapter([0, 3])
    with pytest.raises(ValueError, match="one layer at a time"):
        adapter(draw(0, 3, IN), draw(0, 3, OUT), base=None)
    with pytest.raises(ValueError, match="does not fit 3 stacked layers"):
        adapter.expand(3)


@pytest.mark.parametrize("method", [True, False, "gaussian", "orthogonal"])
def test_initialisation_has_pefts_distribution(method):
    n_in, n_out, r = 64, 48, 16
    torch.manual_seed(0)
    oracle = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(n_in, n_out)),
        peft.LoraConfig(r=r, target_modules=["0"], init_lora_weights=method),
    ).base_model.model[0]
    A, B = init_lora(jax.random.key(0), "m", in_features=n_in, out_features=n_out, r=r, method=method)
    for ours, theirs in ((A, oracle.lora_A["default"].weight), (B, oracle.lora_B["default"].weight)):
        theirs = theirs.detach().numpy()
        assert ours.shape == theirs.shape
        # At least 768 draws each: a standard deviation is known to about 3 %, a mean to 0.04 of one.
        assert float(ours.std()) == pytest.approx(theirs.std(), rel=0.15)
        assert abs(float(ours.mean()) - theirs.mean()) <= 0.2 * theirs.std()
        if method is True and theirs.any():
            bound = n_in**-0.5
            assert 0.95 * bound < np.abs(ours).max() <= bound
    # All but False leave the model as it is; the products are of float32 numbers.
    assert (np.abs(B @ A).max() < 1e-6) == (method is not False)


def test_a_modules_start_depends_on_its_name_and_the_key_only(table, flax_model, tiny_config):
    def start(config, seed=0):
        remove_adapters(flax_model)
        add_adapters(flax_model, select(table, config), config, jax.random.key(seed))
        return {
            spec.name: np.asarray(adapter.lora_A.get_value() if i is None else adapter.lora_A.get_value()[i])
            for spec, adapter, i in adapted_modules(flax_model, table)
        }

    full = start(LoraConfig(r=2, finetune_projector=True))
    some = start(LoraConfig(r=2, target_modules=["up_proj", "merger.mlp.2"], layers_to_transform=1))
    assert set(some) < set(full)
    for name, value in some.items():
        np.testing.assert_array_equal(value, full[name])
    assert len({value.tobytes() for value in full.values()}) == len(full)
    other = start(LoraConfig(r=2), seed=1)
    assert not any(np.array_equal(other[name], full[name]) for name in other)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"finetune_language_layers": False},
        {"layers_to_transform": [1]},
        {"finetune_last_n_layers": 2, "rank_pattern": {"qkv": 3, "layers.2.*": 1}, "use_dora": True},
        {"target_modules": "all-linear", "layers_to_transform": 1, "lora_bias": True},
        {"target_modules": ["lm_head", "merger.mlp.0", "o_proj"]},
    ],
)
def test_only_chosen_layers_hold_parameters(table, flax_model, arguments):
    config = LoraConfig(r=2, **arguments)
    selection = select(table, config)
    add_adapters(flax_model, selection, config, jax.random.key(0))
    assert trainable_parameters(flax_model) == selection.parameters
    assert {spec.name for spec, *_ in adapted_modules(flax_model, table)} == selection.names
    for spec, adapter, i in adapted_modules(flax_model, table):
        found = adapter.scaling.get_value() if i is None else adapter.scaling.get_value()[i]
        assert float(found) == pytest.approx(config.scaling_of(spec.name))


TARGETS = {
    "flags": {"finetune_mlp_modules": False},
    "all-linear": {"target_modules": "all-linear"},
    "list": {"target_modules": ["q_proj", "qkv", "merger.mlp.0", "lm_head"]},
    "regex": {"target_modules": r".*(layers|blocks)\.\d\..*(o_proj|down_proj)"},
}


def test_counts_equal_pefts_for_every_kind_of_target_and_layers(table, flax_model, torch_model):
    kinds = (
        {"layers_to_transform": [1]},
        {"finetune_last_n_layers": 2, "use_dora": True},
        {"rank_pattern": {"layers.1.*": 3, "proj": 2}},
    )
    for targets, kind in itertools.product(TARGETS.values(), kinds):
        config = LoraConfig(r=4, **targets, **kind)
        selection = select(table, config)
        add_adapters(flax_model, selection, config, jax.random.key(0))
        oracle = peft.get_peft_model(
            torch_model,
            peft.LoraConfig(
                r=4,
                target_modules=sorted(selection.names),
                rank_pattern=config.rank_pattern,
                use_dora=config.use_dora,
            ),
        )
        expected = oracle.get_nb_trainable_parameters()[0]
        assert trainable_parameters(flax_model) == expected == selection.parameters
        moments = optax.adam(1e-3).init(nnx.state(flax_model, Trainable))[0]
        assert sum(leaf.size for leaf in jax.tree.leaves((moments.mu, moments.nu))) == 2 * expected
        oracle.unload()
        remove_adapters(flax_model)


def test_the_program_does_not_grow_with_the_number_of_layers(tiny_config):
    def program(layers, ranks):
        text = {**tiny_config.text_config.to_dict(), "num_hidden_layers": layers, "layer_types": None}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=tiny_config.vision_config.to_dict())
        model = family_of(config).model(config, dtype=jnp.float32)
        pattern = {rf"layers\.{i}\..*": ranks[i % len(ranks)] for i in range(layers)}
        lora = LoraConfig(r=2, finetune_vision_layers=False, use_dora=True, rank_pattern=pattern)
        add_abstract_adapters(model, select(module_table(config), lora), lora)
        graphdef, adapters, frozen = nnx.split(model, Trainable, ...)
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((3, 1, 8), jnp.int32)
        jaxpr = jax.make_jaxpr(
            jax.grad(
                lambda adapters, frozen, *inputs: nnx.merge(graphdef, adapters, frozen)(*inputs)[0].sum()
            )
        )(adapters, frozen, *tokens)
        names = [equation.primitive.name for equation in equations(jaxpr)]
        return len(names), names.count("scan")

    few, mixed = program(2, [2]), program(6, [2, 3, 4])
    # One scan forward and one backward.
    assert few[1] == mixed[1] == 2
    assert program(12, [2]) == few
    assert program(12, [2, 3, 4]) == mixed
    # Seven modules and four arrays: what each of the three ranks adds, forward and backward.
    assert mixed[0] - few[0] <= 7 * 4 * 3 * 10


def test_adapting_twice_is_an_error_and_removing_restores(table, flax_model):
    config = LoraConfig(r=2)
    before = jax.tree.structure(nnx.state(flax_model))
    add_adapters(flax_model, select(table, config), config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"already has adapters, on .* remove_adapters"):
        add_adapters(flax_model, select(table, config), config, jax.random.key(0))
    remove_adapters(flax_model)
    assert trainable_parameters(flax_model) == 0
    assert jax.tree.structure(nnx.state(flax_model)) == before
    assert all(linear.adapter is None for linear in linear_modules(flax_model).values())
