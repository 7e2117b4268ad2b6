"""Scaled dot-product attention on the fastest implementation that the device and the mask allow."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

QKV = "qkv"
"""Name of queries, keys and values, for checkpoint policies."""
ATTENTION_OUTPUT = "attention_output"
"""Name of what attention computes."""
FUSED_ATTENTION = "dot_product_attention_fwd"
"""How the names of the primitives begin that compute attention in one kernel."""

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
    segment_ids: Int[Array, "batch q_tokens"] | None = None,
    kv_lengths: Int[Array, " batch"] | None = None,
    mask: Bool[Array, "batch #q_tokens kv_tokens"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch q_tokens heads head_dim"]:
    """Attention with grouped key-value heads.

    Args:
        query, key, value: projections with their rotary positions applied.
        is_causal: a token sees itself and what stands before it in the row.
        segment_ids: a token sees only tokens of its own segment; 0 marks padding.
        kv_lengths: a row's keys from this length on are padding.
        mask: True where a query may see a key.
        scale: factor of the scores; None: the head size's inverse square root.

    Returns:
        The weighted values, in the type of `query`. Rows of padding hold finite numbers without meaning.
    """
    query, key, value = (checkpoint_name(array, QKV) for array in (query, key, value))
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = same if mask is None else mask & same
    implementation = _implementation(query, key, mask)
    attend = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=is_causal,
        mask=None if mask is None else mask[:, None],
        key_value_seq_lengths=kv_lengths,
        scale=scale,
        implementation=implementation,
    )
    output = (jax.checkpoint(attend) if _AS_FUSED.get() else attend)(query, key, value)
    # A policy knows the fused kernel by its primitive; a name would have its output saved twice.
    return output if implementation == "cudnn" else checkpoint_name(output, ATTENTION_OUTPUT)


def _implementation(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> str:
    """cuDNN's fused kernels where they apply: 16-bit, no dense mask, even lengths, head size up to 128."""
    fused = (
        jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and mask is None
        and query.shape[1] % 2 == key.shape[1] % 2 == 0
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
    )
    return "cudnn" if fused else "xla"
