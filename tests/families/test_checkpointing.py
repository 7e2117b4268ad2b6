"""What checkpoint policies spare the layers of every family."""

import jax
import jax.numpy as jnp
from flax import nnx

from vlmlora.lora.apply import add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.init import init_parameters
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.attention import traced_as_fused
from vlmlora.nn.variables import Trainable
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.memory import gradient_cost


def test_with_all_names_saved_nothing_is_multiplied_again(family):
    config, lora = family.first.config, LoraConfig(r=2)
    module = family_of(config).model(config, dtype=jnp.float32)
    init_parameters(module, jax.random.key(0))
    add_adapters(module, select(module_table(config), lora), lora, jax.random.key(1))
    graphdef, adapters, frozen = nnx.split(module, Trainable, ...)
    batch = family.make_inputs(family.first.rows, config, 0).ours

    def flops(policy) -> int:
        loss = make_loss_fn(graphdef, gradient_checkpointing=policy)
        # XLA's attention keeps more than has a name.
        with traced_as_fused():
            return gradient_cost(loss, adapters, frozen, batch).products.flops

    assert flops("attention+mlp") == flops(False)
