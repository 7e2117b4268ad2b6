"""Qwen2-VL as Flax modules with Hugging Face's names: Qwen2.5-VL with a vision tower of its own.

Matches transformers' ``models/qwen2_vl/modeling_qwen2_vl.py``.
"""

from jax.typing import DTypeLike

from vlmlora.models.qwen2_5_vl.modules import (
    PatchEmbed,
    PatchMerger,
    Qwen2_5_VLForConditionalGeneration,
    VisionAttention,
    VisionBlock,
    VisionTower,
    rope_theta,
)
from vlmlora.nn.mlp import MLP
from vlmlora.nn.norm import LayerNorm


class Qwen2VLVisionTower(VisionTower):
    """Vision transformer with LayerNorm, an MLP of two layers, and full attention in every layer."""

    def __init__(self, config, *, dtype: DTypeLike):
        width = config.embed_dim
        shared = {"dtype": dtype, "stack": config.depth}
        blocks = VisionBlock(
            LayerNorm(width, eps=1e-6, **shared),
            LayerNorm(width, eps=1e-6, **shared),
            VisionAttention(width, config.num_heads, **shared),
            MLP(width, int(width * config.mlp_ratio), hidden_act=config.hidden_act, **shared),
            stack=config.depth,
        )
        ln_q = LayerNorm(width, eps=1e-6, dtype=dtype)
        super().__init__(
            PatchEmbed(config, width, dtype=dtype),
            blocks,
            PatchMerger(ln_q, width * config.spatial_merge_size**2, config.hidden_size, dtype=dtype),
            theta=rope_theta(config, default=10000.0),
        )


class Qwen2VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2-VL with its language-model head; arguments and errors are those of Qwen2.5-VL."""

    tower = Qwen2VLVisionTower
