"""One optimizer step as one compiled program."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

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
        step: steps taken.
    """

    adapters: PyTree
    opt_state: PyTree
    step: Int[Array, ""]


Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def init_train_state(adapters: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    `adapters` is copied: the step donates its state, and the model keeps its own arrays.
    """
    adapters = jax.tree.map(jnp.copy, adapters)
    return TrainState(adapters, optimizer.init(adapters), jnp.int32(0))


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> TrainStep:
    """``state, metrics = step(state, frozen, batch, key=None)``, jitted, the old state donated.

    Args:
        loss_fn: from `vlmlora.training.loss.make_loss_fn`.
        optimizer: any optax transformation.

    Returns:
        The step. Its metrics are ``loss`` (before the update) and ``grad_norm``, float32 scalars on the
        device. `key` drives adapter dropout; each step folds its number in.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, frozen: PyTree, batch: Mapping[str, jax.Array], key: PRNGKeyArray | None = None
    ) -> tuple[TrainState, Metrics]:
        step_key = None if key is None else jax.random.fold_in(key, state.step)
        loss, grads = jax.value_and_grad(loss_fn)(state.adapters, frozen, batch, key=step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(adapters, opt_state, state.step + 1), metrics

    return step
