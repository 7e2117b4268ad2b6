"""Save sharded states one after another in a process with four CPU devices, to be killed meanwhile."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlmlora.training.state import Checkpoints
from vlmlora.training.step import TrainState

# Long enough to write that a kill falls into it.
SHAPE = (4096, 4096)


def state_at(step, place=jnp.asarray):
    """A state whose content says which step it is of."""
    rng = np.random.default_rng(step)
    adapters = {"lora_A": place(rng.normal(size=SHAPE).astype(np.float32))}
    moments = {"mu": place(rng.normal(size=(8, 4)).astype(np.float32))}
    return TrainState(adapters, moments, jnp.int32(step))


def main(directory):
    """Save step 1 from one mesh, read it on another, then save on until killed."""
    row = NamedSharding(jax.make_mesh((4,), ("a",)), PartitionSpec("a"))
    both = NamedSharding(jax.make_mesh((2, 2), ("a", "b")), PartitionSpec("b", "a"))
    checkpoints = Checkpoints(directory, keep=2)
    first = state_at(1, lambda array: jax.device_put(array, row))
    checkpoints.save(first, key=jax.random.key(7))
    checkpoints.wait()
    restored = checkpoints.restore(state_at(0, lambda array: jax.device_put(array, both)))
    for now, then in zip(jax.tree.leaves(restored.state), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(now, then)
    assert restored.state.adapters["lora_A"].sharding == both
    assert restored.state.opt_state["mu"].sharding == both
    print("restored on another mesh", flush=True)
    for step in range(2, 1000):
        checkpoints.save(state_at(step, lambda array: jax.device_put(array, both)))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main(sys.argv[1])
