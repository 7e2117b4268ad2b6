"""Activations of feed-forward blocks, against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlmlora.nn.mlp import gelu


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [
        # Both take float32's error function, each with an error of some units in the last place.
        ("float32", 1e-6, 1e-6),
        # Computed in float32 and rounded once, which a value in the middle between two may be either way.
        ("bfloat16", 2**-7, 1e-6),
    ],
)
def test_gelu_and_its_gradient_are_pytorchs(dtype, rtol, atol):
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    ours = jnp.asarray(x, dtype)
    value, pull_back = jax.vjp(gelu, ours)
    (gradient,) = pull_back(jnp.cos(ours))
    theirs = torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_()
    expected = torch.nn.GELU()(theirs)
    expected.backward(torch.from_numpy(np.array(jnp.cos(ours), np.float32)).to(theirs.dtype))
    assert value.dtype == gradient.dtype == ours.dtype
    for found, reference in ((value, expected), (gradient, theirs.grad)):
        found, reference = np.asarray(found, np.float32), reference.detach().float().numpy()
        np.testing.assert_allclose(found, reference, rtol=rtol, atol=atol)
