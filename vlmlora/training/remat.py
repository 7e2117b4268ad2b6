"""Gradient checkpointing by name, in terms of `jax.checkpoint`."""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from vlmlora.nn.attention import ATTENTION_OUTPUT, FUSED_ATTENTION, QKV
from vlmlora.nn.low_rank import LOW_RANK, MLP_LOW_RANK
from vlmlora.nn.mlp import MLP_GATE, MLP_UP
from vlmlora.nn.saved import Checkpoint
from vlmlora.nn.stack import ATTENTION_RESIDUAL, LAYER_INPUT, Remat, TowerRemats

logger = logging.getLogger(__name__)

NAMES = (LAYER_INPUT, QKV, ATTENTION_OUTPUT, ATTENTION_RESIDUAL, MLP_GATE, MLP_UP, MLP_LOW_RANK, LOW_RANK)
"""What a dict of policies may name, in the order in which a layer computes it; the last is of all of it."""
IN_PLACE = frozenset((ATTENTION_RESIDUAL, MLP_GATE, MLP_UP))
"""What elementwise work reads, which finds it in a stack of saved values as well as anywhere. A fused
attention kernel would have its arguments copied from there."""
SPARE = "offload_or_recompute"
"""In pinned host memory as far as the copies leave beside a layer's work, else nowhere."""
PLACES = ("save", "offload", SPARE, "recompute")
"""Where a named value waits for the backward pass: device memory, pinned host memory, or nowhere."""
_WORTH = (ATTENTION_OUTPUT, ATTENTION_RESIDUAL, QKV, MLP_LOW_RANK, LOW_RANK, MLP_UP, MLP_GATE, LAYER_INPUT)
"""The names by the work that a byte spares. Of several that spare the same the smallest comes first."""
PARTS = tuple(field.name for field in fields(TowerRemats))
"""The parts of a model that may have a policy each, as in the module table."""

_ATTENTION = {QKV: "save", ATTENTION_OUTPUT: "save", ATTENTION_RESIDUAL: "save"}
_MLP = {MLP_GATE: "save", MLP_UP: "save", MLP_LOW_RANK: "save", LOW_RANK: "save"}

NAMED_POLICIES: dict[str, dict[str, str]] = {
    "unsloth": {
        LAYER_INPUT: "offload",
        QKV: SPARE,
        ATTENTION_OUTPUT: SPARE,
        ATTENTION_RESIDUAL: SPARE,
        MLP_LOW_RANK: "save",
        LOW_RANK: "save",
    },
    "attention": _ATTENTION,
    "mlp": _MLP,
    "attention+mlp": _ATTENTION | _MLP,
}
"""The policies with a name of their own, as dicts."""

POLICIES = (False, True, *NAMED_POLICIES)
"""What `remat_policy` takes, beside a dict."""
AUTO = "auto"
"""The policy that `vlmlora.training.step.make_train_step` chooses when it sees the first batch."""

GradientCheckpointing = bool | str | Mapping[str, Any] | Remat


@dataclass(frozen=True, eq=False)
class CheckpointedLoss:
    """A loss as ``loss(adapters, frozen, batch, key=None)``, and the policy by which its towers checkpoint.

    Attributes:
        compute: the loss as ``compute(remats, adapters, frozen, batch, key)``, for any `TowerRemats`.
        gradient_checkpointing: the policy, see `tower_remats`. With ``"auto"`` the loss can be given to
            `vlmlora.training.step.make_train_step`, but not called.
    """

    compute: Callable[..., Float[Array, ""]]
    gradient_checkpointing: GradientCheckpointing

    def __post_init__(self) -> None:
        if not has_auto(self.gradient_checkpointing):
            _ = self.remats

    @cached_property
    def remats(self) -> TowerRemats:
        """The policy in terms of `jax.checkpoint`."""
        return tower_remats(self.gradient_checkpointing)

    def __call__(
        self,
        adapters: PyTree,
        frozen: PyTree,
        batch: Mapping[str, jax.Array],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, ""]:
        """The loss.

        Raises:
            ValueError: the policy is still to be chosen.
        """
        return self.compute(self.remats, adapters, frozen, batch, key)

    def with_checkpointing(self, policy: GradientCheckpointing) -> "CheckpointedLoss":
        """The same loss with another policy."""
        return replace(self, gradient_checkpointing=policy)


def remat_policy(policy: GradientCheckpointing, *, offloads: bool | None = None) -> Remat | None:
    """How the body of one tower's scan over layers is rematerialised.

    A dict says for each name in `NAMES` whether the value is saved (``"save"``), saved in pinned host memory
    (``"offload"``), or computed again (``"recompute"``, also for names left out). With
    ``"offload_or_recompute"`` it is saved in host memory where its copy leaves beside a layer's work, see
    `vlmlora.nn.stack.scan_layers`, and otherwise computed again. The names are

    - ``layer_input``: what enters a layer, [tokens, hidden]. It is saved in any case and can be offloaded.
    - ``qkv``: queries, keys and values with their positions applied, or before the norm that they have.
    - ``attention_output``: the attention's result, before its output projection, and on a GPU what the fused
      kernel's backward pass needs, so that attention is not computed twice.
    - ``attention_residual``: the layer's input with the attention added, [tokens, hidden], so that the output
      projection is not computed twice.
    - ``mlp_gate``, ``mlp_up``: what the wide projections of the feed-forward block give, the largest of all;
      a block without a gate has ``mlp_up`` alone.
    - ``mlp_low_rank``: of a gated block's last projection the adapter's product with A, [tokens, r], where
      that is part of the projection's own product. It is small, and to compute it reads the widest array.
    - ``low_rank``: of every other projection the same. To compute it reads a whole input of some projections.

    Where layer inputs go to host memory, a decoder's layer with which the backward pass begins saves all of
    these, and computes no product with a base weight again: that takes memory for a short time only.

    On a backend that has no host memory apart from its own, what should be offloaded is saved, which a
    warning says once.

    Args:
        policy: False saves every intermediate result. True saves a layer's input alone and computes the rest
            again in the backward pass. ``"unsloth"`` does the same, but keeps the layer inputs in pinned host
            memory, and with them what else of attention leaves beside a layer's work, and saves
            ``mlp_low_rank`` and ``low_rank``. ``"attention"`` and ``"mlp"`` save all that is named in their
            half of the layer, the latter ``low_rank`` too, and ``"attention+mlp"`` in both, which leaves no
            product with a base weight to compute again. Or a dict. A function is returned as it is.
        offloads: whether there is host memory apart from the device's; None asks the default device.

    Raises:
        ValueError: unknown policy, name or place.
    """
    if policy is False:
        return None
    if callable(policy):
        return policy
    if policy is True:
        return Checkpoint()
    places = _places(policy)
    saved, offloaded, spare = (
        [name for name, where in places.items() if where == place] for place in ("save", "offload", SPARE)
    )
    host_limit = None
    if offloads is None and (offloaded or spare):
        offloads = _offloads_to_host()
        host_limit = _spare_host_bytes() if offloads else None
    if not offloads:
        saved, offloaded, spare = saved + offloaded, [], []
    return _checkpoint(saved, offloaded, sorted(spare, key=_WORTH.index), host_limit)


def _checkpoint(
    saved: Sequence[str],
    offloaded: Sequence[str],
    spare: Sequence[str] = (),
    host_limit: int | None = None,
) -> Checkpoint:
    """A layer's checkpoint, from the names of what is kept, and where."""
    kept = [name for name in saved if name != LAYER_INPUT]
    if not kept and not offloaded and not spare:
        return Checkpoint()
    on_device = _keep([*kept, *(name for name in offloaded if name != LAYER_INPUT)], [])
    return Checkpoint(
        kept=frozenset((*kept, *offloaded)),
        policy=_keep(kept, offloaded),
        in_place=frozenset() if offloaded else IN_PLACE.intersection(kept),
        on_host=frozenset(offloaded),
        policy_on_device=on_device,
        spare=tuple(spare),
        host_limit=host_limit,
        with_on_host=lambda names: _checkpoint(saved, [*offloaded, *names]),
        at_end=_checkpoint(NAMES, []) if LAYER_INPUT in offloaded else None,
    )


def tower_remats(policy: GradientCheckpointing, *, offloads: bool | None = None) -> TowerRemats:
    """How the layers of every tower are rematerialised.

    Args:
        policy: what `remat_policy` takes, for all towers; or a dict of parts (``vision``, ``language``) to
            such policies, where a part that is left out has True.
        offloads: see `remat_policy`.

    Raises:
        ValueError: see `remat_policy`; or the policy holds ``"auto"``, which only a training step can choose.
    """
    parts = policy_by_part(policy)
    if has_auto(policy):
        raise ValueError(
            f"gradient_checkpointing={policy!r} is chosen by make_train_step, which sees the batch; for a "
            "step of your own call vlmlora.choose_policy and pass make_loss_fn the policy that it returns"
        )
    return TowerRemats(**{part: remat_policy(each, offloads=offloads) for part, each in parts.items()})


def policy_by_part(policy: GradientCheckpointing) -> dict[str, GradientCheckpointing]:
    """The policy of each part, checked; ``"auto"`` is one.

    Raises:
        ValueError: see `remat_policy`.
    """
    parts = dict.fromkeys(PARTS, policy)
    if isinstance(policy, Mapping) and policy and set(policy) <= set(PARTS):
        parts = {part: policy.get(part, True) for part in PARTS}
    for each in parts.values():
        if not (isinstance(each, bool) or callable(each) or each == AUTO):
            _places(each)
    return parts


def has_auto(policy: GradientCheckpointing) -> bool:
    """Whether a part of the policy is still to be chosen."""
    return any(isinstance(each, str) and each == AUTO for each in policy_by_part(policy).values())


def keeps_on_host(policy: GradientCheckpointing) -> bool:
    """Whether a part of the policy keeps values in host memory, as far as it says; ``"auto"`` may."""

    def may(each: GradientCheckpointing) -> bool:
        if isinstance(each, bool):
            return False
        return callable(each) or each == AUTO or bool({"offload", SPARE} & set(_places(each).values()))

    return any(map(may, policy_by_part(policy).values()))


def saves_values(policy: GradientCheckpointing) -> bool:
    """Whether a part of the policy saves more than layer inputs in the device's memory; ``"auto"`` may."""

    def may(each: GradientCheckpointing) -> bool:
        if isinstance(each, bool):
            return not each
        if callable(each) or each == AUTO:
            return True
        return any(place == "save" for name, place in _places(each).items() if name != LAYER_INPUT)

    return any(map(may, policy_by_part(policy).values()))


def is_own(policy: GradientCheckpointing) -> bool:
    """Whether a part of the policy is a function of the user's own."""
    return any(map(callable, policy_by_part(policy).values()))


def name_of_policy(policy: GradientCheckpointing) -> str:
    """A policy as short as it can be written: for all parts at once, and by name."""
    parts = {part: _shortest(each) for part, each in policy_by_part(policy).items()}
    first, *others = parts.values()
    return repr(first if all(each == first for each in others) else parts)


def _shortest(policy: GradientCheckpointing) -> Any:
    if not isinstance(policy, Mapping):
        return policy
    places = {name: place for name, place in policy.items() if place != "recompute"}
    if places.get(LAYER_INPUT) == "save":
        del places[LAYER_INPUT]
    names = {name for name, known in NAMED_POLICIES.items() if known == places}
    return next(iter(names), places or True)


def _places(policy: Any) -> Mapping[str, str]:
    if isinstance(policy, str) and policy in NAMED_POLICIES:
        return NAMED_POLICIES[policy]
    if not isinstance(policy, Mapping):
        raise ValueError(
            f"use_gradient_checkpointing={policy!r} is unknown; needed one of "
            f"{', '.join(map(repr, (*POLICIES, AUTO)))}, a dict of names to "
            f"{', '.join(map(repr, PLACES))}, or a dict of the parts {', '.join(map(repr, PARTS))} to any of "
            "these"
        )
    for name, place in policy.items():
        if name not in NAMES or place not in PLACES:
            raise ValueError(
                f"use_gradient_checkpointing has {name!r}: {place!r}; the names are {', '.join(NAMES)}, "
                f"and each is one of {', '.join(map(repr, PLACES))}; or the names are the parts "
                f"{', '.join(PARTS)}, and each has a policy of its own"
            )
    return policy


def _keep(saved: Sequence[str], offloaded: Sequence[str]) -> Callable[..., Any]:
    """A `jax.checkpoint` policy for named values."""
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(saved),
        names_which_can_be_offloaded=list(offloaded),
        offload_src="device",
        offload_dst="pinned_host",
    )

    naming = jax.make_jaxpr(functools.partial(checkpoint_name, name=ATTENTION_OUTPUT))(0.0).eqns[0]

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        # The fused kernel's backward pass needs its softmax statistics too: both go where the output goes.
        if primitive.name.startswith(FUSED_ATTENTION):
            return by_name(naming.primitive, **naming.params)
        return by_name(primitive, *args, **params)

    return policy


def has_pinned_host() -> bool:
    """Whether the default device has host memory apart from its own."""
    device = jax.devices()[0]
    return device.platform != "cpu" and any(m.kind == "pinned_host" for m in device.addressable_memories())


@functools.cache
def _offloads_to_host() -> bool:
    """`has_pinned_host`, with a warning where there is none."""
    offloads = has_pinned_host()
    if not offloads:
        logger.warning(
            "use_gradient_checkpointing: %s has no host memory apart from its own; "
            "what would be offloaded stays",
            jax.devices()[0].platform,
        )
    return offloads


def _spare_host_bytes() -> int:
    """Host memory that is taken for what could be computed again: half of it, and three quarters of what JAX
    takes at most."""
    limit = int(float(os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64)) * 10**9)
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, limit * 3 // 4)
