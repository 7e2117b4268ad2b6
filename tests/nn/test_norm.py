"""Normalisation layers against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlmlora.models.init import init_parameters
from vlmlora.nn.norm import LayerNorm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm(dtype):
    rng = np.random.default_rng(0)
    # Far from mean 0 and variance 1, where a norm computed in 16 bit would show.
    x = torch.tensor(rng.normal(30, 5, (3, 24)), dtype=getattr(torch, dtype))
    theirs = torch.nn.LayerNorm(24, eps=1e-3, dtype=x.dtype)
    ours = LayerNorm(24, eps=1e-3, dtype=dtype)
    init_parameters(ours, jax.random.key(0))
    assert all(
        (np.asarray(getattr(ours, name).get_value()) == one).all()
        for name, one in (("weight", 1), ("bias", 0))
    )
    for name, parameter in theirs.named_parameters():
        value = torch.tensor(rng.normal(size=24), dtype=x.dtype)
        parameter.data.copy_(value)
        getattr(ours, name).set_value(jnp.asarray(value.float().numpy(), dtype))
    expected = theirs(x).detach().float().numpy()
    found = ours(jnp.asarray(x.float().numpy(), dtype))
    assert found.dtype == dtype
    # Rounded once from float32 to the type: at most one unit in its last place.
    rtol = {"float32": 1e-5, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(np.asarray(found.astype(jnp.float32)), expected, rtol=rtol, atol=1e-5)
