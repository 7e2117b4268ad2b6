"""Configs of small Mllama models, and the same batches for transformers and for this library."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import MllamaConfig
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

VOCABULARY, IMAGE_TOKEN, EOS = 90, 90, 89
TEXT_TOKENS = 88
TO_THE_END = 2**30


def tiny_config(text: dict | None = None, vision: dict | None = None, **kwargs: Any) -> MllamaConfig:
    """A config of a few thousand parameters; `text` and `vision` override its fields."""
    vision_config = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "intermediate_layers_indices": [0, 1],
        **(vision or {}),
    }
    width = vision_config["hidden_size"] * (1 + len(vision_config["intermediate_layers_indices"]))
    text_config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        **(text or {}),
    }
    return MllamaConfig(
        vision_config={"vision_output_dim": width, **vision_config},
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        **kwargs,
    )


@dataclass(frozen=True)
class Tiles:
    """An image somewhere in a row, by its canvas in tiles."""

    height: int
    width: int


@dataclass(frozen=True)
class Case:
    """Rows of text tokens with images among them: ints are runs of text."""

    rows: Sequence[Sequence[int | Tiles]]


def batches(case: Case, config: MllamaConfig, seed: int = 0) -> tuple[dict, dict, np.ndarray]:
    """The same right-padded batch as transformers' inputs and as this library's, and where tokens are.

    transformers' batch gives every row as many images as the row with the most has, blank where there is
    none. Tokens that see no image read those, so this library's batch holds them too.
    """
    rng = np.random.default_rng(seed)
    vision = config.vision_config
    tiles, side = vision.max_num_tiles, vision.image_size
    ratios = get_all_supported_aspect_ratios(tiles)
    rows = [
        [
            token
            for piece in row
            for token in (
                rng.integers(0, TEXT_TOKENS, piece).tolist() if isinstance(piece, int) else [IMAGE_TOKEN]
            )
        ]
        for row in case.rows
    ]
    images = [[piece for piece in row if isinstance(piece, Tiles)] for row in case.rows]
    length, most = max(map(len, rows)), max(map(len, images))
    mask = np.array([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows])
    input_ids = np.array([ids + [EOS] * (length - len(ids)) for ids in rows])
    labels = np.where((mask == 1) & (input_ids != IMAGE_TOKEN), input_ids, -100)
    theirs = {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }
    ours = {
        "input_ids": input_ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "labels": labels.astype(np.int32),
        "position_ids": np.tile(np.arange(length, dtype=np.int32), (len(rows), 1)),
    }
    if not most:
        return theirs, ours, mask == 1

    pixels = np.zeros((len(rows), most, tiles, 3, side, side), np.float32)
    ids = np.zeros((len(rows), most), np.int64)
    tile_mask = np.zeros((len(rows), most, tiles), np.int64)
    tile_mask[:, :, 0] = 1
    for row, visuals in enumerate(images):
        for number, image in enumerate(visuals):
            count = image.height * image.width
            pixels[row, number, :count] = rng.normal(size=(count, 3, side, side))
            ids[row, number] = ratios.index((image.height, image.width)) + 1
            tile_mask[row, number, :count] = 1
    sparse = [get_cross_attention_token_mask(ids, IMAGE_TOKEN) for ids in rows]
    counts = [[image.height * image.width for image in visuals] for visuals in images]
    theirs |= {
        "pixel_values": torch.tensor(pixels),
        "aspect_ratio_ids": torch.tensor(ids),
        "aspect_ratio_mask": torch.tensor(tile_mask),
        "cross_attention_mask": torch.tensor(
            convert_sparse_cross_attention_mask_to_dense(sparse, counts, tiles, length)
        ),
    }
    spans = np.zeros((len(rows), most, 2), np.int32)
    for row, pairs in enumerate(sparse):
        for number, (start, end) in enumerate(pairs):
            spans[row, number] = start, TO_THE_END if end in (-1, len(rows[row])) else end
    ours |= {
        "pixel_values": pixels.reshape(-1, *pixels.shape[2:]),
        "aspect_ratio_ids": ids.reshape(-1).astype(np.int32),
        "num_tiles": tile_mask.sum(-1).reshape(-1).astype(np.int32),
        "image_index": np.arange(len(rows) * most, dtype=np.int32).reshape(len(rows), most),
        "image_spans": spans,
    }
    return theirs, ours, mask == 1
