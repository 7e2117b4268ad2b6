"""Shapes of a training batch, for planning memory before there is one."""

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
        tokens: tokens of a row, those of its image included.
        image_size: height and width in pixels of each row's image, rounded up to whole attention windows;
            None for text alone.
    """
    return shapes_of_whole(config.vision_config.window_size, config, rows, tokens, image_size)


def shapes_of_whole(
    unit: int, config: PreTrainedConfig, rows: int, tokens: int, image_size: tuple[int, int] | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """`batch_shapes` with the sides of an image rounded up to a multiple of `unit` pixels."""
    shapes = {
        "input_ids": jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
        "labels": jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
        "position_ids": jax.ShapeDtypeStruct((3, rows, tokens), jnp.int32),
    }
    if image_size is None:
        return shapes
    vision = config.vision_config
    height, width = (-(-side // unit) for side in image_size)
    patches = height * width * (unit // vision.patch_size) ** 2
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return shapes | {
        "pixel_values": jax.ShapeDtypeStruct((rows, patches, values), jnp.float32),
        "patch_positions": jax.ShapeDtypeStruct((rows, patches, 2), jnp.int32),
        "image_token_index": jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
    }
