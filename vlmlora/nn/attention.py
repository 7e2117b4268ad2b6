"""Scaled dot-product attention on the fastest implementation that the device and the mask allow."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PyTree

from vlmlora.nn.cudnn_attention import cut_as, packed_attention, reason_against
from vlmlora.nn.saved import name_for_policies
from vlmlora.nn.segments import Segments
from vlmlora.nn.switch import switch_saving

logger = logging.getLogger(__name__)

QKV = "qkv"
"""Name of queries, keys and values, for checkpoint policies."""
ATTENTION_OUTPUT = "attention_output"
"""Name of what attention computes."""
FUSED_ATTENTION = "dot_product_attention_fwd"
"""How the names of the primitives begin that compute attention in one kernel."""

# A score that no other can make up for, and that float16 holds.
_HIDDEN_SCORE = 2.0**15
# Fused kernels ask for head sizes that are a multiple of this, up to a maximum.
_HEAD_MULTIPLE = 8
_MAX_HEAD_DIM = 128

_AS_FUSED: ContextVar[bool] = ContextVar("as_fused", default=False)


@contextmanager
def traced_as_fused() -> Iterator[None]:
    """While the body traces, attention leaves its inputs alone for the backward pass, as a fused kernel does.

    For counting what a GPU would save on a machine that has none.
    """
    token = _AS_FUSED.set(True)
    try:
        yield
    finally:
        _AS_FUSED.reset(token)


def attention(
    query: Float[Array, "batch q_tokens heads head_dim"],
    key: Float[Array, "batch kv_tokens kv_heads head_dim"],
    value: Float[Array, "batch kv_tokens kv_heads head_dim"],
    *,
    is_causal: bool = False,
    segments: Segments | None = None,
    kv_lengths: Int[Array, " batch"] | None = None,
    mask: Bool[Array, "batch #q_tokens kv_tokens"] | None = None,
    scale: float | None = None,
    is_named: bool = True,
) -> Float[Array, "batch q_tokens heads head_dim"]:
    """Attention with grouped key-value heads.

    On a GPU it runs on cuDNN's fused kernels where these apply: 16-bit values, even lengths, a head size that
    8 divides and up to 128, no `mask`, and `segments` with offsets. Elsewhere XLA computes the same.

    Args:
        query, key, value: projections with their rotary positions applied.
        is_causal: a token sees itself and what stands before it in the row.
        segments: a token sees only tokens of its own segment.
        kv_lengths: a row's keys from this length on are padding.
        mask: True where a query may see a key.
        scale: factor of the scores; None: the head size's inverse square root.
        is_named: policies of `jax.checkpoint` know queries, keys and values as they come here by the name
            `QKV`. Where they are made from projections by more than rotary positions, whose gradient asks for
            these, name these instead.

    Returns:
        The weighted values, in the type of `query`. Rows of padding hold finite numbers without meaning.
    """
    if is_named:
        query, key, value = (name_for_policies(array, QKV) for array in (query, key, value))
    is_fused = mask is None and _fuses(query, key)
    if segments is not None and is_fused and kv_lengths is None and _fuses_segments(query, key, segments):
        attend = functools.partial(_attend_fused, segments=segments, is_causal=is_causal, scale=scale)
    else:
        if segments is not None:
            same = segments.ids[:, :, None] == segments.ids[:, None, :]
            mask, is_fused = same if mask is None else mask & same, False
        attend = functools.partial(
            _attend, is_causal=is_causal, kv_lengths=kv_lengths, mask=mask, scale=scale
        )
    output = (jax.checkpoint(attend) if _AS_FUSED.get() else attend)(query, key, value)
    # A policy knows the fused kernel by its primitive; a name would have its output saved twice.
    return output if is_fused else checkpoint_name(output, ATTENTION_OUTPUT)


def attention_by_flag(
    flag: Bool[Array, ""],
    where_set: Callable[..., jax.Array],
    where_not: Callable[..., jax.Array],
    query: Float[Array, "batch q_tokens heads head_dim"],
    key: Float[Array, "batch kv_tokens kv_heads head_dim"],
    value: Float[Array, "batch kv_tokens kv_heads head_dim"],
    *others: PyTree,
) -> Float[Array, "batch q_tokens heads head_dim"]:
    """``where_set(query, key, value, *others)`` where the flag is set, else ``where_not`` of the same.

    For the backward pass a policy of `jax.checkpoint` keeps queries, keys and values as they come here, and
    what either attention gives in one place; a conditional by itself keeps all of it for each.

    Args:
        flag: which one.
        where_set, where_not: call `attention` with some view of queries, keys and values.
        query, key, value: projections with their rotary positions applied.
        others: arrays that no gradient flows to.
    """
    operands = tuple(name_for_policies(array, QKV) for array in (query, key, value))

    def branch(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def call(others: PyTree, operands: tuple[jax.Array, ...]) -> jax.Array:
            return attend(*operands, *others)

        return jax.checkpoint(call, prevent_cse=False, policy=_keeps_what_attention_gives)

    return switch_saving(
        [branch(where_not), branch(where_set)],
        flag.astype(jnp.int32),
        others,
        operands,
        named_primitives={FUSED_ATTENTION: ATTENTION_OUTPUT},
    )


def _keeps_what_attention_gives(primitive: Any, *_: Any, **params: Any) -> bool:
    is_named = primitive.name == "name" and params["name"] == ATTENTION_OUTPUT
    return is_named or primitive.name.startswith(FUSED_ATTENTION)


def hide_keys(
    query: Float[Array, "batch q_tokens heads head_dim"],
    key: Float[Array, "batch kv_tokens kv_heads head_dim"],
    value: Float[Array, "batch kv_tokens kv_heads head_dim"],
    blind: Bool[Array, "batch #q_tokens"],
    hidden: Bool[Array, "batch kv_tokens"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of which no blind query sees a hidden key; it costs no mask.

    One more feature of queries and keys gives their scores a number that no other can make up for. A blind
    query that has hidden keys alone sees them all. Attention to the result takes the `scale` of the head size
    before, and the output's first `head_dim` features are the answer.
    """
    room = -(query.shape[-1] + 1) % _HEAD_MULTIPLE

    def extend(x: jax.Array, flags: jax.Array, amount: float) -> jax.Array:
        feature = jnp.broadcast_to(amount * flags[..., None, None].astype(x.dtype), (*x.shape[:3], 1))
        return jnp.pad(jnp.concatenate([x, feature], -1), ((0, 0),) * 3 + ((0, room),))

    return extend(query, blind, -_HIDDEN_SCORE), extend(key, hidden, 1.0), extend(value, hidden, 0.0)


def _attend(query, key, value, *, is_causal, kv_lengths, mask, scale) -> jax.Array:
    """Attention by jax's public function."""
    fuses = mask is None and _fuses(query, key)
    if fuses and kv_lengths is not None:
        kv_lengths = cut_as(query, kv_lengths)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=is_causal,
        mask=None if mask is None else mask[:, None],
        key_value_seq_lengths=kv_lengths,
        scale=scale,
        implementation="cudnn" if fuses else "xla",
    )


def _attend_fused(
    query, key, value, *, segments: Segments, is_causal: bool, scale: float | None
) -> jax.Array:
    """Attention to one's own segment, on cuDNN."""
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if segments.has_gaps:
        is_padding = segments.ids == 0
        query, key, value = hide_keys(query, key, value, jnp.ones_like(is_padding[:, :1]), is_padding)
    if segments.offsets.shape[1] > 2:
        out = packed_attention(query, key, value, segments, is_causal=is_causal, scale=scale)
    else:
        # Of a single segment causal attention never sees the padding, which stands after it.
        lengths = None if is_causal else jnp.maximum(segments.offsets[:, 1], 1)
        out = _attend(query, key, value, is_causal=is_causal, kv_lengths=lengths, mask=None, scale=scale)
    return out[..., :head_dim]


def _fuses(query: jax.Array, key: jax.Array) -> bool:
    """Whether cuDNN's kernels take what has no dense mask: 16-bit, even lengths, head size up to 128."""
    return (
        jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[1] % 2 == key.shape[1] % 2 == 0
        and query.shape[-1] % _HEAD_MULTIPLE == 0
        and query.shape[-1] <= _MAX_HEAD_DIM
    )


def _fuses_segments(query: jax.Array, key: jax.Array, segments: Segments) -> bool:
    """Whether cuDNN's kernels can keep segments apart; says once why not."""
    if segments.offsets is None:
        reason = "the batch has segment ids without segment offsets"
    elif segments.has_gaps and query.shape[-1] + _HEAD_MULTIPLE > _MAX_HEAD_DIM:
        reason = f"heads of {query.shape[-1]} features have no room for one that hides padding"
    elif segments.offsets.shape[1] > 2:
        reason = reason_against(query, key)
    else:
        reason = None
    if reason is not None:
        _warn_of_mask(reason)
    return reason is None


@functools.cache
def _warn_of_mask(reason: str) -> None:
    logger.warning("attention keeps the segments of a row apart by a dense mask, which is slow: %s", reason)
