"""One optimizer step as one compiled program."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from vlmlora.distributed import mesh_of, place_batch, replicate_unplaced
from vlmlora.training.loss import LossFn


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["adapters", "opt_state", "step"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
        adapters: trainable parameters.
        opt_state: the optimizer's state for them.
        step: steps taken, int32 [] (or what stands for it while JAX handles the tree).
    """

    adapters: PyTree
    opt_state: PyTree
    step: PyTree


Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def init_train_state(adapters: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    `adapters` is copied: the step donates its state, and the model keeps its own arrays. On a mesh, the
    optimizer's moments are cut as the parameters are.
    """
    adapters = jax.tree.map(jnp.copy, adapters)
    opt_state, step = optimizer.init(adapters), jnp.int32(0)
    if (mesh := mesh_of(adapters)) is not None:
        # Moments lie where their parameters do; counters have no place yet.
        opt_state, step = replicate_unplaced((opt_state, step), mesh)
    return TrainState(adapters, opt_state, step)


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> TrainStep:
    """``state, metrics = step(state, frozen, batch, key=None)``, jitted, the old state donated.

    Args:
        loss_fn: from `vlmlora.training.loss.make_loss_fn`.
        optimizer: any optax transformation.

    Returns:
        The step. Its metrics are ``loss`` (before the update) and ``grad_norm``, float32 scalars on the
        device. `key` drives adapter dropout; each step folds its number in. If the state lies on a mesh, the
        rows of a batch of host arrays are put on its devices, and the new state lies as the old one.

    Raises:
        ValueError: when the step is called on a mesh with a batch whose rows do not divide among its devices.
    """

    def step(
        state: TrainState, frozen: PyTree, batch: Mapping[str, jax.Array], key: PRNGKeyArray | None = None
    ) -> tuple[TrainState, Metrics]:
        step_key = None if key is None else jax.random.fold_in(key, state.step)
        loss, grads = jax.value_and_grad(loss_fn)(state.adapters, frozen, batch, key=step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(adapters, opt_state, state.step + 1), metrics

    return _Step(step)


_COMPILER_OPTIONS = {
    # The copies of one layer's input to and from host memory overlap the computation of its neighbours: they
    # begin a layer early, and on streams of their own, of which XLA has none by default.
    "xla_gpu_enable_pipelined_host_offloading": True,
    "xla_gpu_executable_num_compute_streams": 4,
}


class _Step:
    """A step, compiled once for a device and once for each way in which a state lies on a mesh."""

    def __init__(self, step: TrainStep):
        self._step = step
        self._on_device = jax.jit(step, donate_argnums=0, compiler_options=_COMPILER_OPTIONS)
        self._on_mesh = functools.cache(self._jit_on_mesh)

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: Mapping[str, Any], key: PRNGKeyArray | None = None
    ) -> tuple[TrainState, Metrics]:
        """The new state and the metrics."""
        jitted, batch = self._prepare(state, batch)
        return jitted(state, frozen, batch, key)

    def lower(
        self, state: TrainState, frozen: PyTree, batch: Mapping[str, Any], key: PRNGKeyArray | None = None
    ) -> jax.stages.Lowered:
        """The step's program for these arguments, as ``jax.jit(...).lower``."""
        jitted, batch = self._prepare(state, batch)
        return jitted.lower(state, frozen, batch, key)

    def _prepare(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        mesh = mesh_of(state)
        if mesh is None:
            return self._on_device, batch
        leaves, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, state))
        return self._on_mesh(tuple(leaves), structure), place_batch(batch, mesh)

    def _jit_on_mesh(self, leaves: tuple[NamedSharding, ...], structure: Any) -> Any:
        replicated = NamedSharding(leaves[0].mesh, PartitionSpec())
        out_shardings = (jax.tree.unflatten(structure, leaves), replicated)
        return jax.jit(
            self._step, donate_argnums=0, out_shardings=out_shardings, compiler_options=_COMPILER_OPTIONS
        )
