"""cuDNN's attention over packed rows, which jax has, but not in its public functions.

`jax._src.cudnn.fused_attention_stablehlo` may change with any release of jax, so what is needed of it is
looked up here and nowhere else, and `reason_against` says why it cannot be used where it cannot.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlmlora.nn.segments import Segments

_ARGUMENTS = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type", "qkv_layout"}
_MASKS = {"PADDING", "PADDING_CAUSAL"}
_HOPPER = "9.0"


def reason_against(query: jax.Array, key: jax.Array) -> str | None:
    """Why cuDNN cannot attend over packed rows of these shapes here; None if it can."""
    if (reason := _reason_in_jax()) is not None:
        return reason
    if not _fused_attention().check_compute_capability(_HOPPER):
        return "cuDNN takes packed rows from compute capability 9.0 (Hopper) on"
    # Offsets count values, not tokens, in 32 bits.
    if max(math.prod(query.shape), math.prod(key.shape)) >= 2**31:
        return f"queries {query.shape} have 2**31 values or more, beyond cuDNN's offsets"
    return None


def packed_attention(
    query: Float[Array, "rows tokens heads head_dim"],
    key: Float[Array, "rows tokens kv_heads head_dim"],
    value: Float[Array, "rows tokens kv_heads head_dim"],
    segments: Segments,
    *,
    is_causal: bool,
    scale: float,
) -> Float[Array, "rows tokens heads head_dim"]:
    """Attention of each segment to itself; the padding after a row's segments is one more of them.

    Args:
        query, key, value: of 16 bit, on a device for which `reason_against` has none.
        segments: with offsets; padding within a segment counts as part of it.
        is_causal: a token sees itself and what stands before it in its segment.
        scale: factor of the scores.
    """
    fused = _fused_attention()
    starts, lengths = segments.runs()
    # What jax asks for: -1 where there is no segment, and at the end of the offsets.
    exists = lengths > 0
    lengths = jnp.where(exists, lengths, -1).astype(jnp.int32)
    starts = jnp.pad(jnp.where(exists, starts, -1), ((0, 0), (0, 1)), constant_values=-1).astype(jnp.int32)
    lengths, starts = cut_as(query, lengths), cut_as(query, starts)
    return fused.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        mask_type=fused.MaskType.PADDING_CAUSAL if is_causal else fused.MaskType.PADDING,
        qkv_layout="BTNH",
    )


def cut_as(query: jax.Array, counts: Int[Array, "rows *counts"]) -> Int[Array, "rows *counts"]:
    """`counts`, whose rows a compiler for several devices has to cut as it cuts those of `query`.

    jax's rule for partitioning leaves that open, and a kernel would read other rows' counts without a word.
    So they are compared with something of the query, which is never less than they.
    """
    bound = 2**30 + (query[:, 0, 0, 0] == 0).astype(jnp.int32)
    return jnp.minimum(counts, bound.reshape(-1, *[1] * (counts.ndim - 1)))


def _fused_attention():
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


@functools.cache
def _reason_in_jax() -> str | None:
    """What this version of jax lacks."""
    try:
        fused = _fused_attention()
        lacks = _ARGUMENTS - inspect.signature(fused.dot_product_attention).parameters.keys()
        lacks |= _MASKS - {mask.name for mask in fused.MaskType}
        if not callable(fused.check_compute_capability):
            lacks.add("check_compute_capability")
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has changed its private function: {error}"
    if lacks:
        return (
            f"jax {jax.__version__} has changed its private function, which lacks {', '.join(sorted(lacks))}"
        )
    return None
