"""Small random Qwen2.5-VL models in transformers, and the same batches for it and for this library."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids

from tests.families import description
from vlmlora.models.qwen2_5_vl.positions import IMAGE, VIDEO, mrope_position_ids, vision_layout

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, EOS = 240, 241, 242, 243, 244
TEXT_TOKENS = 240


def tiny_config(text: dict | None = None, vision: dict | None = None, **kwargs: Any) -> Qwen2_5_VLConfig:
    """A config of a few thousand parameters; `text` and `vision` override its fields."""
    text_config = {
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        **(text or {}),
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_heads": 2,
        "patch_size": 8,
        "window_size": 64,
        "out_hidden_size": text_config["hidden_size"],
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        **(vision or {}),
    }
    return Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **kwargs,
    )


def random_torch_model(config: Qwen2_5_VLConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """transformers' model in float32, every parameter random: norms and biases too."""
    return description.random_torch_model(Qwen2_5_VLForConditionalGeneration, config, seed)


@dataclass(frozen=True)
class Visual:
    """An image (t = 1) or a video somewhere in a row, by its grid in patches."""

    t: int
    h: int
    w: int

    @property
    def is_video(self) -> bool:
        """Whether it goes in as a video."""
        return self.t > 1


@dataclass(frozen=True)
class Case:
    """Rows of text tokens with images and videos among them: ints are runs of text."""

    rows: Sequence[Sequence[int | Visual]]


def batches(case: Case, config: PreTrainedConfig, seed: int = 0) -> tuple[dict, dict, np.ndarray]:
    """The same right-padded batch as transformers' inputs and as this library's, and where tokens are.

    For Qwen2-VL too, which knows neither windows nor seconds: its patches stay in the processor's order.
    """
    has_windows = hasattr(config.vision_config, "window_size")
    rng = np.random.default_rng(seed)
    merge = config.vision_config.spatial_merge_size
    rows, visuals = [], []
    for row in case.rows:
        ids: list[int] = []
        for piece in row:
            if isinstance(piece, int):
                ids += rng.integers(0, TEXT_TOKENS, piece).tolist()
                continue
            token = VIDEO_TOKEN if piece.is_video else IMAGE_TOKEN
            tokens = piece.t * piece.h * piece.w // merge**2
            visuals.append((len(rows), len(ids) + 1, tokens, piece))
            ids += [VISION_START, *[token] * tokens, VISION_END]
        rows.append(ids)
    length = max(map(len, rows))
    mask = np.array([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows])
    input_ids = np.array([ids + [EOS] * (length - len(ids)) for ids in rows])
    types = np.where(input_ids == IMAGE_TOKEN, IMAGE, np.where(input_ids == VIDEO_TOKEN, VIDEO, 0))
    labels = np.where(mask == 1, input_ids, -100)
    labels[types != 0] = -100

    patch = config.vision_config.in_channels * config.vision_config.temporal_patch_size
    patch *= config.vision_config.patch_size**2
    pixels = [rng.normal(size=(v.t * v.h * v.w, patch)).astype(np.float32) for *_, v in visuals]
    grids = {kind: [] for kind in (False, True)}
    values = {kind: [] for kind in (False, True)}
    for (*_, visual), array in zip(visuals, pixels, strict=True):
        grids[visual.is_video].append([visual.t, visual.h, visual.w])
        values[visual.is_video].append(array)
    seconds = [1.0 + i for i in range(len(grids[True]))]
    position_ids, _ = mrope_position_ids(
        types,
        attention_mask=mask,
        image_grid_thw=np.array(grids[False]) if grids[False] else None,
        video_grid_thw=np.array(grids[True]) if grids[True] else None,
        second_per_grid_ts=(seconds or None) if has_windows else None,
        spatial_merge_size=merge,
        tokens_per_second=config.vision_config.tokens_per_second if has_windows else 1,
    )

    theirs = {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        "mm_token_type_ids": torch.tensor(types),
    }
    if grids[False]:
        theirs |= {
            "pixel_values": torch.tensor(np.concatenate(values[False])),
            "image_grid_thw": torch.tensor(grids[False]),
        }
    if grids[True]:
        theirs |= {
            "pixel_values_videos": torch.tensor(np.concatenate(values[True])),
            "video_grid_thw": torch.tensor(grids[True]),
        }
        if has_windows:
            theirs["second_per_grid_ts"] = torch.tensor(seconds)

    ours = {
        "input_ids": input_ids.astype(np.int32),
        "position_ids": position_ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "labels": labels.astype(np.int32),
    }
    if visuals:
        grid_slots = _window_order if has_windows else _plain_order
        layouts = [grid_slots(config.vision_config, v) for *_, v in visuals]
        slots = max(len(segments) for *_, segments in layouts)
        ours["pixel_values"] = np.zeros((len(visuals), slots, patch), np.float32)
        ours["patch_positions"] = np.zeros((len(visuals), slots, 2), np.int32)
        ours["image_segment_ids"] = np.zeros((len(visuals), slots), np.int32)
        ours["image_token_index"] = np.full(input_ids.shape, -1, np.int32)
        for number, ((row, start, tokens, _), layout) in enumerate(zip(visuals, layouts, strict=True)):
            slots_of_patches, slots_of_tokens, positions, segments = layout
            ours["pixel_values"][number, slots_of_patches] = pixels[number]
            ours["patch_positions"][number, : len(positions)] = positions
            ours["image_segment_ids"][number, : len(segments)] = segments
            ours["image_token_index"][row, start : start + tokens] = (
                number * slots // merge**2 + slots_of_tokens
            )
    return theirs, ours, mask == 1


def _window_order(vision: PreTrainedConfig, visual: Visual) -> tuple[np.ndarray, ...]:
    merge = vision.spatial_merge_size
    grid = [[visual.t, visual.h, visual.w]]
    layout = vision_layout(grid, vision.patch_size, vision.window_size, merge)
    return layout.patch_slots, layout.token_slots, layout.patch_positions, layout.image_segment_ids


def _plain_order(vision: PreTrainedConfig, visual: Visual) -> tuple[np.ndarray, ...]:
    merge, grid = vision.spatial_merge_size, torch.tensor([[visual.t, visual.h, visual.w]])
    positions = get_vision_position_ids(grid, merge).numpy()
    frame = np.repeat(np.arange(visual.t) + 1, visual.h * visual.w)
    return np.arange(len(frame)), np.arange(len(frame) // merge**2), positions, frame
