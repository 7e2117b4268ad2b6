"""Several adapters on one base, against the real PEFT."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from flax import nnx

from tests.models.qwen2_5_vl_cases import Case, Visual, batches, random_torch_model, tiny_config
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.lora.apply import adapted_modules, trainable_parameters
from vlmlora.models.loading import load_model, read_config
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Trainable


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = tiny_config()
    directory = tmp_path_factory.mktemp("base")
    torch_model = random_torch_model(config)
    torch_model.save_pretrained(directory)
    config = read_config(directory)
    module = load_model(directory, config, dtype=np.float32, quantize=None, progress=False)
    return torch_model, FastVisionModel(module, config, name_or_path=str(directory))


@jax.jit
def logits(module, inputs):
    return module.logits(module(**model_inputs(inputs))[0])


def adapter(model, name, seed, **arguments):
    arguments = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "qkv"], **arguments}
    FastVisionModel.get_peft_model(model, **arguments, adapter_name=name, verbose=False)
    rng = np.random.default_rng(seed)
    state = nnx.state(model.module, Trainable)
    nnx.update(model.module, jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape), state))


@pytest.fixture
def model(base):
    """Two adapters on different modules; the second one trains more than matrices."""
    model = base[1]
    adapter(model, "default", 0)
    adapter(
        model, "other", 1, target_modules=["q_proj", "o_proj"], modules_to_save=["norm"], bias="lora_only"
    )
    yield model
    for name in list(model.adapters):
        model.delete_adapter(name)
    assert trainable_parameters(model.module) == 0


def tree(model):
    return jax.tree.map(np.asarray, nnx.state(model.module))


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_one_is_in_the_tree_and_the_others_beside_it(base, model, tmp_path, caplog):
    assert list(model.adapters) == ["default", "other"]
    assert model.active_adapter == "other"
    assert repr(model).endswith("adapters=[default, other (active)])")
    both = {"other": tree(model)}
    assert model.lora_config.bias == "lora_only"
    model.set_adapter("default")
    both["default"] = tree(model)
    # q_proj and qkv of two layers each, of rank 2.
    assert trainable_parameters(model.module) == 2 * 2 * (64 + 64 + 32 + 96)
    with model.disable_adapter():
        plain = tree(model)
        assert trainable_parameters(model.module) == 0
    assert_equal(tree(model), both["default"])

    model.save_pretrained(tmp_path)
    assert model.active_adapter == "default"
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "other"}
    model.load_adapter(tmp_path / "other", "again")
    assert model.active_adapter == "default"
    model.set_adapter("again")
    assert_equal(tree(model), both["other"])
    model.delete_adapter("default")
    model.delete_adapter("again")
    assert model.active_adapter == "other"
    assert "'again' is deleted; 'other' is active now" in caplog.text
    model.delete_adapter("other")
    assert_equal(tree(model), plain)
    assert (model.active_adapter, model.lora_config) == (None, None)
    assert_equal(tree(base[1]), plain)


def test_names_are_checked_and_a_failure_changes_nothing(model, tmp_path):
    before = tree(model)
    for call, message in [
        (lambda: model.set_adapter("othre"), "there is no adapter 'othre'; did you mean 'other'"),
        (lambda: model.delete_adapter("x"), r"there is no adapter 'x'; there are \['default', 'other'\]"),
        (lambda: model.save_pretrained(tmp_path / "no", ["x"]), "there is no adapter 'x'"),
        (lambda: adapter(model, "other", 0), "already has an adapter 'other'; give the new one another"),
        (lambda: adapter(model, "a.b", 0), "adapter_name='a.b'"),
        (lambda: adapter(model, "new", 0, modules_to_save=["proj"]), "adapted too"),
        (lambda: adapter(model, "new", 0, init_lora_weights="pissa"), "changes the base weights, on which"),
        (lambda: model.add_weighted_adapter(["default"], [1, 2], "new"), "1 adapters and 2 weights"),
        (lambda: model.add_weighted_adapter(["default", "other"], [1, 2], "new"), "bias='lora_only'"),
        (lambda: model.add_weighted_adapter(["default"], [1.0], "other"), "already has an adapter 'other'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotImplementedError, match="combination_type='ties'"):
        model.add_weighted_adapter(["default", "default"], [1.0, 2.0], "new", "ties")
    assert not (tmp_path / "no").exists()
    assert list(model.adapters) == ["default", "other"]
    assert_equal(tree(model), before)


def test_an_adapter_that_changed_the_base_is_alone(base):
    graphdef, state = nnx.split(base[1].module)
    # Its arrays are given away.
    module = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    fresh = FastVisionModel(module, base[1].config, name_or_path="base")
    adapter(fresh, "default", 0, init_lora_weights="olora")
    for call in (lambda: adapter(fresh, "b", 0), fresh.disable_adapter().__enter__):
        with pytest.raises(
            ValueError, match=r"'default' has changed .*'olora'.*save it, load the base model"
        ):
            call()


@pytest.mark.parametrize(
    ("combination_type", "weights", "other", "svd_rank"),
    [
        ("linear", [0.7, -0.4], {"r": 2, "lora_alpha": 5}, None),
        ("cat", [0.7, -0.4], {"r": 3, "use_rslora": False}, None),
        ("svd", [0.7, 1.4], {"r": 3}, None),
        ("svd", [0.7, -0.4], {"r": 3, "rank_pattern": {"o_proj": 1}, "alpha_pattern": {"q_proj": 7}}, 2),
        ("linear", [0.5], None, None),
    ],
)
def test_weighted_sums_equal_pefts(base, tmp_path, combination_type, weights, other, svd_rank):
    torch_model, model = base
    adapter(model, "default", 0)
    names = ["default"]
    if other is not None:
        adapter(model, "other", 1, target_modules=["q_proj", "o_proj"], **other)
        names.append("other")
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(names, weights, "sum", combination_type, svd_rank)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path / "saved", ["sum"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path)
        for name in names[1:]:
            theirs.load_adapter(tmp_path / name, name)
        theirs.add_weighted_adapter(names, weights, "sum", combination_type, svd_rank=svd_rank)
        theirs.load_adapter(tmp_path / "saved" / "sum", "ours")
    for spec, each, index in adapted_modules(model.module, model.module_table):
        layer = theirs.base_model.model.get_submodule(spec.name)
        expected = layer.get_delta_weight("sum").detach().numpy()
        arrays = (
            v.get_value() if index is None else v.get_value()[index] for v in (each.lora_A, each.lora_B)
        )
        lora_A, lora_B = map(np.asarray, arrays)
        assert each.r == layer.r["sum"]
        # A decomposition in float32 keeps about six digits of the largest entry.
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(lora_B @ lora_A * each.scaling.get_value().ravel()[0], expected, atol=atol)
        np.testing.assert_allclose(layer.get_delta_weight("ours").detach(), expected, atol=atol)
    found = {spec.name for spec, *_ in adapted_modules(model.module, model.module_table)}
    modules = theirs.base_model.model.named_modules()
    assert found == {name for name, m in modules if "sum" in getattr(m, "lora_A", {})}
    for name in list(model.adapters):
        model.delete_adapter(name)


def test_ranks_that_linear_cannot_add_are_refused_as_in_peft(base):
    model = base[1]
    adapter(model, "default", 0)
    adapter(model, "other", 1, r=3)
    with pytest.raises(ValueError, match=r"adapters of one rank; found default: 2, other: 3"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "linear")
    for name in list(model.adapters):
        model.delete_adapter(name)


def test_the_active_adapter_computes_as_in_peft(base, model, tmp_path):
    torch_model = base[0]
    theirs, ours, valid = batches(Case([[3, Visual(1, 4, 6), 5], [9]]), model.config)
    del theirs["labels"]
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path)
        loaded.load_adapter(tmp_path / "other", "other")
    for name in ("other", "default"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        found = np.asarray(logits(model.module, ours))
        expected = loaded(**theirs).logits.detach().numpy()
        if name == "default":
            # PEFT leaves the biases of an inactive adapter in the base; here the base is the base.
            with model.disable_adapter():
                plain = np.asarray(logits(model.module, ours))
            expected, found = torch_model(**theirs).logits.detach().numpy(), plain
        # float32 on both sides, in another order of sums.
        np.testing.assert_allclose(found[valid], expected[valid], atol=1e-4 * np.abs(expected).max())
