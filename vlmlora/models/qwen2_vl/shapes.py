"""Shapes of a training batch, for planning memory before there is one."""

import jax
from transformers import PreTrainedConfig

from vlmlora.models.qwen2_5_vl.shapes import shapes_of_whole


def batch_shapes(
    config: PreTrainedConfig, rows: int, tokens: int, image_size: tuple[int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """As for Qwen2.5-VL; an image's sides are rounded up to whole tokens."""
    vision = config.vision_config
    return shapes_of_whole(vision.patch_size * vision.spatial_merge_size, config, rows, tokens, image_size)
