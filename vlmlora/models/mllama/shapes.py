"""Shapes of batches, from a config alone."""

import jax
import jax.numpy as jnp
from transformers import PreTrainedConfig


def batch_shapes(
    config: PreTrainedConfig, rows: int, tokens: int, image_size: tuple[int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the processor's ``collate`` gives for rows of `tokens` tokens without padding.

    Args:
        config: the model's.
        rows: rows of the batch.
        tokens: tokens of a row.
        image_size: height and width in pixels of each row's image; it takes the same tiles whatever its size.
            None for text alone.
    """

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    shapes = {name: integers(rows, tokens) for name in ("input_ids", "labels", "position_ids")}
    if image_size is None:
        return shapes
    vision = config.vision_config
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    return shapes | {
        "pixel_values": jax.ShapeDtypeStruct((rows, vision.max_num_tiles, *tile), jnp.float32),
        "aspect_ratio_ids": integers(rows),
        "num_tiles": integers(rows),
        "image_index": integers(rows, 1),
        "image_spans": integers(rows, 1, 2),
    }
