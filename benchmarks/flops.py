"""Floating-point operations of a LoRA training step that computes nothing twice."""

from typing import NamedTuple

from transformers import PreTrainedConfig

from vlmlora.models.module_table import module_table

ATTENTION_PASSES = 1 + 2.5
"""Attention's two products, and the five of its backward pass, which computes the scores again."""


class Flops(NamedTuple):
    """Operations of one step.

    Attributes:
        frozen: products with frozen weights, forward and for their inputs' gradients.
        adapters: products with A and B, forward and for the gradients of inputs and weights.
        attention: both towers' attention, of a causal one the half that is needed.
    """

    frozen: float
    adapters: float
    attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def training_flops(config: PreTrainedConfig, rows: int, tokens: int, r: int) -> Flops:
    """A step on `benchmarks.shapes.image_text_batch`, with adapters of rank `r` in both towers.

    A multiplication and an addition count as two. The head is counted where there are labels.
    """
    text = rows * tokens
    patches, merged = (_mllama_patches if config.model_type == "mllama" else _qwen_patches)(config)
    seen = {"vision": rows * patches, "language": text, "projector": rows * merged, "head": text / 4}
    frozen = adapters = 0.0
    for linear in module_table(config):
        inputs = seen[linear.part]
        if "cross_attn.k_proj" in linear.name or "cross_attn.v_proj" in linear.name:
            inputs = rows * merged
        frozen += 4 * inputs * linear.in_features * linear.out_features
        if linear.part in ("vision", "language"):
            adapters += 6 * inputs * r * (linear.in_features + linear.out_features)
    return Flops(frozen, adapters, ATTENTION_PASSES * rows * _attention(config, tokens, patches))


def _qwen_patches(config: PreTrainedConfig) -> tuple[int, int]:
    """Patches of an image of 448×448 pixels, and tokens that they make."""
    patches = (448 // config.vision_config.patch_size) ** 2
    return patches, patches // config.vision_config.spatial_merge_size**2


def _mllama_patches(config: PreTrainedConfig) -> tuple[int, int]:
    """Patches of four whole tiles with one class token each; every one is seen by cross-attention."""
    vision = config.vision_config
    patches = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
    return patches, patches


def _attention(config: PreTrainedConfig, tokens: int, patches: int) -> float:
    """Operations of the forward pass for one row."""
    text, vision = config.text_config, config.vision_config
    causal = 2 * tokens**2 * text.hidden_size
    if config.model_type == "mllama":
        crossing = len(text.cross_attention_layers)
        layers = vision.num_hidden_layers + vision.num_global_layers
        cross = 4 * tokens * patches * text.hidden_size
        full = 4 * patches**2 * vision.hidden_size
        return (text.num_hidden_layers - crossing) * causal + crossing * cross + layers * full
    window = (vision.window_size // vision.patch_size) ** 2
    whole = len(vision.fullatt_block_indexes)
    keys = whole * patches + (vision.depth - whole) * min(window, patches)
    return text.num_hidden_layers * causal + 4 * patches * keys * vision.hidden_size
