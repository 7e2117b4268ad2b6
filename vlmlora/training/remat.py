"""Gradient checkpointing by name, in terms of `jax.checkpoint`."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vlmlora.nn.attention import ATTENTION_OUTPUT, FUSED_ATTENTION, QKV
from vlmlora.nn.mlp import MLP_HIDDEN
from vlmlora.nn.stack import LAYER_INPUT, Remat

logger = logging.getLogger(__name__)

NAMES = (LAYER_INPUT, QKV, ATTENTION_OUTPUT, MLP_HIDDEN)
"""What a dict of policies may name, in the order in which a layer computes it."""
PLACES = ("save", "offload", "recompute")
"""Where a named value waits for the backward pass: device memory, pinned host memory, or nowhere."""

NAMED_POLICIES: dict[str, dict[str, str]] = {
    "unsloth": {LAYER_INPUT: "offload"},
    "attention": {QKV: "save", ATTENTION_OUTPUT: "save"},
    "mlp": {MLP_HIDDEN: "save"},
    "attention+mlp": {QKV: "save", ATTENTION_OUTPUT: "save", MLP_HIDDEN: "save"},
}
"""The policies with a name of their own, as dicts."""

POLICIES = (False, True, *NAMED_POLICIES)
"""What `use_gradient_checkpointing` takes, beside a dict."""

GradientCheckpointing = bool | str | Mapping[str, str] | Remat


def remat_policy(policy: GradientCheckpointing, *, offloads: bool | None = None) -> Remat | None:
    """How the body of a tower's scan over layers is rematerialised.

    A dict says for each name in `NAMES` whether the value is saved (``"save"``), saved in pinned host memory
    (``"offload"``), or computed again (``"recompute"``, also for names left out). The names are

    - ``layer_input``: what enters a layer, [tokens, hidden]. It is saved in any case and can be offloaded.
    - ``qkv``: queries, keys and values with their positions applied.
    - ``attention_output``: the attention's result, before its output projection, and on a GPU what the fused
      kernel's backward pass needs, so that attention is not computed twice.
    - ``mlp_hidden``: what the wide projections of the feed-forward block give, the largest of all.

    On a backend that has no host memory apart from its own, what should be offloaded is saved, which a
    warning says once.

    Args:
        policy: False saves every intermediate result. True saves a layer's input alone and computes the rest
            again in the backward pass. ``"unsloth"`` does the same and keeps the layer inputs in pinned host
            memory. ``"attention"``, ``"mlp"`` and ``"attention+mlp"`` save what their names say. Or a dict.
            A function is returned as it is.
        offloads: whether there is host memory apart from the device's; None asks the default device.

    Raises:
        ValueError: unknown policy, name or place.
    """
    if policy is False:
        return None
    if callable(policy):
        return policy
    if policy is True:
        return functools.partial(jax.checkpoint, prevent_cse=False)
    places = _places(policy)
    saved = [name for name, place in places.items() if place == "save"]
    offloaded = [name for name, place in places.items() if place == "offload"]
    if offloaded and not (_offloads_to_host() if offloads is None else offloads):
        saved, offloaded = saved + offloaded, []
    kept = [name for name in saved if name != LAYER_INPUT]
    if not kept and not offloaded:
        return remat_policy(True)
    return functools.partial(jax.checkpoint, prevent_cse=False, policy=_keep(kept, offloaded))


def _places(policy: str | Mapping[str, str]) -> Mapping[str, str]:
    if isinstance(policy, str) and policy in NAMED_POLICIES:
        return NAMED_POLICIES[policy]
    if not isinstance(policy, Mapping):
        raise ValueError(
            f"use_gradient_checkpointing={policy!r} is unknown; needed one of "
            f"{', '.join(map(repr, POLICIES))}, or a dict of names to {', '.join(map(repr, PLACES))}"
        )
    for name, place in policy.items():
        if name not in NAMES or place not in PLACES:
            raise ValueError(
                f"use_gradient_checkpointing has {name!r}: {place!r}; the names are {', '.join(NAMES)}, "
                f"and each is one of {', '.join(map(repr, PLACES))}"
            )
    return policy


def _keep(saved: list[str], offloaded: list[str]) -> Callable[..., Any]:
    """A `jax.checkpoint` policy for named values."""
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        # The fused kernel's backward pass needs its softmax statistics too, which have no name.
        if ATTENTION_OUTPUT in saved and primitive.name.startswith(FUSED_ATTENTION):
            return True
        return by_name(primitive, *args, **params)

    return policy


@functools.cache
def _offloads_to_host() -> bool:
    """Whether the default device has host memory apart from its own."""
    device = jax.devices()[0]
    offloads = device.platform != "cpu" and any(
        m.kind == "pinned_host" for m in device.addressable_memories()
    )
    if not offloads:
        logger.warning(
            "use_gradient_checkpointing: %s has no host memory apart from its own; "
            "what would be offloaded stays",
            device.platform,
        )
    return offloads
