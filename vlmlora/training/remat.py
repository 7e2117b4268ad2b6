"""Gradient checkpointing by name, in terms of `jax.checkpoint`."""

import functools
import logging

import jax

from vlmlora.nn.stack import LAYER_INPUT, Remat

logger = logging.getLogger(__name__)

POLICIES = (False, True, "unsloth")
"""What `use_gradient_checkpointing` takes."""


def remat_policy(name: bool | str) -> Remat | None:
    """How the body of a tower's scan over layers is rematerialised.

    Args:
        name: False saves every intermediate result. True saves a layer's input alone and computes the rest
            again in the backward pass. ``"unsloth"`` does the same and keeps the layer inputs in pinned host
            memory; on a backend without such memory it is True, which a warning says once.

    Raises:
        ValueError: unknown name.
    """
    if name is False:
        return None
    if name is True or (name == "unsloth" and not _offloads_to_host()):
        return functools.partial(jax.checkpoint, prevent_cse=False)
    if name == "unsloth":
        return functools.partial(jax.checkpoint, prevent_cse=False, policy=offload_layer_inputs())
    raise ValueError(f"use_gradient_checkpointing={name!r} is unknown; needed one of {POLICIES}")


def offload_layer_inputs():
    """The policy that saves nothing on the device and the inputs of the layers in pinned host memory."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )


@functools.cache
def _offloads_to_host() -> bool:
    """Whether the default device has host memory apart from its own."""
    device = jax.devices()[0]
    offloads = device.platform != "cpu" and any(
        m.kind == "pinned_host" for m in device.addressable_memories()
    )
    if not offloads:
        logger.warning(
            'use_gradient_checkpointing="unsloth": %s has no host memory apart from its own; inputs stay',
            device.platform,
        )
    return offloads
