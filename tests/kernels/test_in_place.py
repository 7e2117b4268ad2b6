"""Elementwise functions over their arguments: the kernel in Pallas' interpreter, and when it is taken."""

import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.test_hopper import H100
from vlmlora_kernels import elementwise_in_place
from vlmlora_kernels.hopper.in_place import BLOCK, in_place
from vlmlora_kernels.in_place import obstacle

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def gated_gradient(activation):
    """What the backward pass of a gated activation computes: its value, and both gradients."""

    def function(cotangent, gate, up):
        value, pull_back = jax.vjp(lambda gate, up: activation(gate) * up, gate, up)
        return value, *pull_back(cotangent)

    return function


def arrays(shape, dtype=jnp.bfloat16, scale=1.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [(scale * jax.random.normal(key, shape)).astype(dtype) for key in keys]


@pytest.mark.parametrize(("activation", "scale"), [("silu", 1.0), ("silu", 40.0), ("gelu_tanh", 1.0)])
def test_the_kernel_computes_in_float32_and_rounds_once(activation, scale):
    function = gated_gradient(ACTIVATIONS[activation])
    given = arrays((8, BLOCK // 4), scale=scale)
    found = in_place(function, *given, interpret=plgpu.InterpretGPUParams())
    for value, exact in zip(found, function(*(x.astype(jnp.float32) for x in given)), strict=True):
        assert value.dtype == jnp.bfloat16
        # Half a unit in bfloat16's last place, and a few in float32's where terms near 1 cancel.
        np.testing.assert_allclose(value.astype(jnp.float32), exact, rtol=2**-8 + 1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_lie_where_the_arguments_lay(activation):
    function = gated_gradient(ACTIVATIONS[activation])

    def step(x, _):
        value, *gradients = elementwise_in_place(function, x, x * 2, x * 3)
        return value + sum(gradients), None

    def layers(x):
        return jax.lax.scan(jax.checkpoint(step), x, length=3)[0]

    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(layers).trace(jax.ShapeDtypeStruct((4, BLOCK), jnp.bfloat16))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("output_operand_alias<") == 3
    assert "elementwise_in_place" in text


def test_it_says_why_it_cannot_run():
    silu = gated_gradient(jax.nn.silu)
    given = arrays((1, BLOCK))
    assert "default device is a cpu" in obstacle(silu, *given)
    with pytest.raises(ValueError, match="cannot run this: the kernels are for Hopper GPUs"):
        elementwise_in_place(silu, *given)
    with jax.sharding.use_abstract_mesh(H100):
        assert obstacle(silu, *given) is None
        assert "multiples of 2048 elements, and these are 2040" in obstacle(silu, *arrays((1, BLOCK - 8)))
        assert "16-bit arrays of one shape" in obstacle(silu, *arrays((1, BLOCK), jnp.float32))
        exact_gelu = gated_gradient(lambda x: jax.nn.gelu(x, approximate=False))
        assert re.search("knows no .*erfc", obstacle(exact_gelu, *given))
