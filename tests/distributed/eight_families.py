"""Every family's loss and gradients on a mesh are those of one device, by the same rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.families.description import descriptions
from vlmlora.distributed import make_mesh, shard_model
from vlmlora.lora.apply import add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.init import init_parameters
from vlmlora.models.module_table import linear_modules, module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.weights import NF4Weight
from vlmlora.training.loss import make_loss_fn

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=2, init_lora_weights=False)


@pytest.mark.parametrize("family", descriptions())
def test_gradients_on_a_mesh_are_those_of_one_device(family):
    description = descriptions()[family]
    config = description.first.config
    batch = description.make_inputs(list(description.first.rows) * 4, config, 0).ours
    found = []
    for mesh in (None, make_mesh(data=2, fsdp=2, tensor=2)):
        module = family_of(config).model(config, dtype=jnp.float32)
        init_parameters(module, jax.random.key(0), std=0.1)
        for linear in linear_modules(module).values():
            if linear.stack is not None:
                linear.weight.set_value(NF4Weight.quantize(linear.weight.get_value().value))
        add_adapters(module, select(module_table(config), LORA), LORA, jax.random.key(1))
        if mesh is not None:
            shard_model(module, family_of(config), mesh)
        graphdef, adapters, frozen = nnx.split(module, Trainable, ...)
        loss_fn = make_loss_fn(graphdef, gradient_checkpointing=True)
        loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(adapters, frozen, batch)
        found.append((loss, jax.tree.map(np.asarray, gradients)))
    (wanted, wanted_gradients), (loss, gradients) = found
    # float32 sums in another order, through two towers of random weights. On one device, adapters that differ
    # by half a unit in their last place move a gradient by up to 7e-4 of its largest element.
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    leaves = jax.tree.leaves(wanted_gradients)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(gradients), leaves, strict=True):
        atol = 2e-3 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
