"""DoRA and the adapter's bias against the real PEFT, on one layer and in a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from tests.jaxprs import output_shapes
from vlmlora.lora.apply import LoraArrays, make_adapter
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.layer import Lora
from vlmlora.models.module_table import LinearSpec
from vlmlora.nn.linear import Linear
from vlmlora.nn.stack import scan_layers
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.weights import DenseWeight, INT8Weight, NF4Weight

IN, OUT, R = 64, 48, 2
STORES = {"dense": DenseWeight, "nf4": NF4Weight.quantize, "int8": INT8Weight.quantize}


def draw(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def to_torch(array):
    return torch.tensor(np.asarray(array))


class SetMask(torch.nn.Module):
    """Dropout whose draw is given."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


CASES = {
    "dora": ({"use_dora": True}, "dense", 0.0),
    "dora, rslora, dropout": ({"use_dora": True, "use_rslora": True}, "dense", 0.25),
    "dora on nf4, dropout": ({"use_dora": True}, "nf4", 0.25),
    "dora on int8": ({"use_dora": True}, "int8", 0.0),
    "bias, dropout": ({"lora_bias": True}, "dense", 0.25),
}


@pytest.mark.parametrize(("arguments", "store", "dropout"), CASES.values(), ids=CASES.keys())
def test_forward_and_gradients_equal_peft(arguments, store, dropout):
    weight, bias = STORES[store](draw(0, OUT, IN)), draw(1, OUT)
    arguments = {"r": R, "lora_alpha": 3, "lora_dropout": dropout, **arguments}
    torch_linear = torch.nn.Linear(IN, OUT)
    with torch.no_grad():
        # What PEFT sees of a quantised layer is its decoded weight.
        torch_linear.weight.copy_(to_torch(weight.dequantize(jnp.float32)))
        torch_linear.bias.copy_(to_torch(bias))
    oracle = peft.get_peft_model(
        torch.nn.Sequential(torch_linear),
        peft.LoraConfig(**arguments, target_modules=["0"], init_lora_weights=False),
    ).base_model.model[0]
    theirs = {"lora_A": oracle.lora_A["default"].weight, "lora_B": oracle.lora_B["default"].weight}
    if "use_dora" in arguments:
        theirs["magnitude"] = oracle.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            # Away from the start, where a wrong factor would not show.
            theirs["magnitude"].mul_(to_torch(1 + draw(2, OUT, scale=0.1)))
    else:
        theirs["lora_bias"] = oracle.lora_B["default"].bias
    parameters = {name: jnp.asarray(value.detach().numpy()) for name, value in theirs.items()}
    adapter = Lora(
        **parameters, scaling=jnp.float32(LoraConfig(**arguments).scaling_of("0")), dropout=dropout, salt=7
    )
    linear = Linear(IN, OUT, bias=True, dtype=jnp.float32)
    linear.weight.set_value(weight)
    linear.bias.set_value(bias)
    linear.adapter = adapter
    x, key = draw(4, 5, IN), jax.random.key(0) if dropout else None
    if dropout:
        ones = Lora(jnp.eye(IN), jnp.eye(IN), jnp.float32(1), dropout=dropout, salt=7)
        mask = ones(jnp.ones_like(x), jnp.zeros_like(x), base=None, key=key)
        oracle.lora_dropout["default"] = SetMask(to_torch(mask))

    graphdef, adapters, frozen = nnx.split(linear, Trainable, ...)

    @jax.jit
    @jax.value_and_grad
    def loss(trained):
        return jnp.sum(nnx.merge(graphdef, trained[0], frozen)(trained[1], key=key) ** 2)

    value, (grads, dx) = loss((adapters, x))
    torch_x = to_torch(x).requires_grad_()
    expected = (oracle(torch_x) ** 2).sum()
    expected.backward()
    # float32 on both sides; only the order of sums differs.
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    scale = float(jnp.abs(dx).max())
    np.testing.assert_allclose(dx, torch_x.grad, rtol=1e-4, atol=1e-5 * scale)
    for name, parameter in theirs.items():
        scale = parameter.grad.abs().max().item()
        found = grads["adapter"][name].get_value()
        np.testing.assert_allclose(found, parameter.grad, rtol=1e-4, atol=1e-5 * scale)

    if store == "dense":
        oracle.merge()
        dense = weight.dequantize(jnp.float32)
        np.testing.assert_allclose(adapter.merged(dense, None), oracle.weight.detach(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            adapter.merged_bias(bias, None), oracle.bias.detach(), rtol=1e-5, atol=1e-6
        )


def test_in_a_scan_layers_without_an_adapter_are_left_exactly_and_no_decoded_stack_exists():
    stack, ranks = 4, {0: 2, 2: 3}
    specs = [LinearSpec(f"t.{i}.m", "language", "mlp", i, IN, OUT, True, "t.m") for i in ranks]
    arrays = [
        LoraArrays(
            np.asarray(draw(10 + i, r, IN)),
            np.asarray(draw(20 + i, OUT, r)),
            0.5,
            magnitude=np.asarray(5 + draw(30 + i, OUT)),
        )
        for i, r in ranks.items()
    ]

    class Tower(nnx.Module):
        def __init__(self):
            self.stack = stack
            self.proj = Linear(IN, OUT, bias=True, dtype=jnp.float32, stack=stack)
            self.proj.weight.set_value(NF4Weight.quantize(draw(0, stack, OUT, IN)))
            self.proj.bias.set_value(draw(1, stack, OUT))

    x = draw(5, 3, IN)

    def outputs(module):
        return scan_layers(module, x, lambda layer, x, _, *, key: (x, layer.proj(x, key=key)))[1]

    tower = Tower()
    plain = jax.jit(outputs)(tower)
    tower.proj.adapter = make_adapter(specs, arrays, dropout=0)
    graphdef, adapters, frozen = nnx.split(tower, Trainable, ...)
    assert sum(a.size for a in jax.tree.leaves(adapters)) == sum(r * (IN + OUT) + OUT for r in ranks.values())
    step = jax.value_and_grad(
        lambda a: (lambda y: (jnp.sum(y**2), y))(outputs(nnx.merge(graphdef, a, frozen))), has_aux=True
    )
    assert not {(stack, OUT, IN), (stack, IN, OUT)} & output_shapes(jax.make_jaxpr(step)(adapters))
    (_, found), grads = jax.jit(step)(adapters)
    weights = tower.proj.weight.get_value().dequantize(jnp.float32)
    for layer in range(stack):
        if layer not in ranks:
            np.testing.assert_array_equal(found[layer], plain[layer])
            continue
        group = next(g for g in tower.proj.adapter.groups if layer in g.layers)
        index = group.layers.index(layer)
        expected = x @ group.merged(weights[layer], index).T + tower.proj.bias.get_value()[layer]
        # float32, in another order of sums.
        np.testing.assert_allclose(found[layer], expected, rtol=1e-4, atol=1e-3)
    leaves = jax.tree.leaves(grads)
    assert all(bool(jnp.isfinite(leaf).all() and jnp.any(leaf != 0)) for leaf in leaves)


def test_a_row_of_zeros_stays_finite():
    linear = Linear(IN, OUT, bias=False, dtype=jnp.float32)
    linear.weight.set_value(DenseWeight(jnp.zeros((OUT, IN))))
    linear.adapter = Lora(draw(0, R, IN), jnp.zeros((OUT, R)), jnp.float32(1), magnitude=jnp.zeros(OUT))
    graphdef, adapters, frozen = nnx.split(linear, Trainable, ...)
    grads = jax.grad(lambda a: jnp.sum(nnx.merge(graphdef, a, frozen)(draw(1, 3, IN))))(adapters)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
