"""A stand-in for cuDNN on machines without a GPU: what is asked of it, computed by XLA with a mask."""

import enum

import jax
import jax.numpy as jnp

from vlmlora.nn import attention, cudnn_attention


class FakeCudnn:
    """jax's private function as its docstring describes it."""

    class MaskType(enum.Enum):
        PADDING = 1
        PADDING_CAUSAL = 3

    @staticmethod
    def check_compute_capability(capability):
        return True

    @staticmethod
    def dot_product_attention(
        query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, qkv_layout
    ):
        assert qkv_layout == "BTNH"
        assert q_seqlen.dtype == q_offsets.dtype == jnp.int32
        assert q_offsets.shape == kv_offsets.shape == (q_seqlen.shape[0], q_seqlen.shape[1] + 1)
        assert kv_seqlen.shape == q_seqlen.shape
        # jax tells one segment from several by the shape.
        assert q_seqlen.shape[1] > 1

        def membership(offsets, lengths, tokens):
            """Which segment a token belongs to; offsets and lengths of -1 are left out by themselves."""
            starts, place = offsets[:, :-1, None], jnp.arange(tokens)
            exists = (starts >= 0) & (lengths >= 0)[..., None]
            return exists & (place >= starts) & (place < starts + lengths[..., None])

        of_query = membership(q_offsets, q_seqlen, query.shape[1])
        of_key = membership(kv_offsets, kv_seqlen, key.shape[1])
        mask = jnp.einsum("bst,bsu->btu", of_query, of_key, preferred_element_type=jnp.int32) > 0
        is_causal = mask_type is FakeCudnn.MaskType.PADDING_CAUSAL
        out = jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None], is_causal=is_causal, scale=scale
        )
        # What no segment holds is not written.
        return jnp.where(of_query.any(1)[..., None, None], out, jnp.nan)


def install(monkeypatch) -> list[str]:
    """As if this machine had a GPU; returns a list to which each call's implementation is appended."""
    public, asked = jax.nn.dot_product_attention, []

    def as_xla(*args, implementation=None, **kwargs):
        if implementation is not None:
            asked.append(implementation)
        return public(*args, **kwargs)

    monkeypatch.setattr(attention, "_fuses", lambda query, key: True)
    monkeypatch.setattr(cudnn_attention, "_fused_attention", lambda: FakeCudnn)
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_xla)
    cudnn_attention._reason_in_jax.cache_clear()
    return asked
