"""Positions and window order against the live functions of transformers' Qwen2.5-VL."""

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from vlmlora.models.qwen2_5_vl.positions import mrope_position_ids, vision_layout

FRACTIONS_OF_SECONDS = Version(transformers.__version__) >= Version("5.23")


class RopeIndex:
    """The two methods of `Qwen2_5_VLModel` that need its config alone."""

    get_rope_index = hf.Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids = hf.Qwen2_5_VLModel.get_vision_position_ids

    def __init__(self, tokens_per_second):
        self.config = Qwen2_5_VLConfig(vision_config={"tokens_per_second": tokens_per_second})


def random_row(rng, *, tokens):
    """Types of one row, and its grids: text around images and videos, never two of them adjacent."""
    row, grids = [0] * int(rng.integers(1, 5)), {1: [], 2: []}
    while True:
        kind = int(rng.integers(1, 3))
        t = 1 if kind == 1 else int(rng.integers(1, 4))
        h, w = (2 * int(side) for side in rng.integers(1, 5, size=2))
        more = [kind] * (t * h * w // 4) + [0] * int(rng.integers(1, 4))
        if len(row) + len(more) > tokens:
            return row, grids[1], grids[2]
        row += more
        grids[kind].append([t, h, w])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_mrope_position_ids_equal_get_rope_index(seed, padding):
    rng = np.random.default_rng(seed)
    tokens, tokens_per_second = 90, [2, 4, 25][seed % 3]
    types = np.zeros((3, tokens), np.int32)
    mask = np.zeros((3, tokens), np.int64)
    images, videos = [], []
    for i in range(3):
        row, row_images, row_videos = ([0] * 7, [], []) if i == 1 else random_row(rng, tokens=tokens)
        where = slice(tokens - len(row), None) if padding == "left" else slice(0, len(row))
        types[i, where] = row
        mask[i, where] = 1
        images += row_images
        videos += row_videos
    if padding == "none":
        mask[:] = 1
    # transformers 5.17 drops the fraction of a second.
    choices = [0.08333, 0.5, 1.0, 0.7, 2 / 24] if FRACTIONS_OF_SECONDS else [1.0, 2.0]
    seconds = rng.choice(choices, size=len(videos)).astype(np.float32)
    expected, expected_deltas = RopeIndex(tokens_per_second).get_rope_index(
        torch.zeros(3, tokens, dtype=torch.long),
        mm_token_type_ids=torch.tensor(types),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        second_per_grid_ts=torch.tensor(seconds) if videos else None,
        attention_mask=torch.tensor(mask) if padding != "none" else None,
    )
    actual, deltas = mrope_position_ids(
        types,
        attention_mask=mask if padding != "none" else None,
        image_grid_thw=np.array(images) if images else None,
        video_grid_thw=np.array(videos) if videos else None,
        second_per_grid_ts=seconds if videos else None,
        spatial_merge_size=2,
        tokens_per_second=tokens_per_second,
    )
    np.testing.assert_array_equal(actual, expected.numpy())
    np.testing.assert_array_equal(deltas, expected_deltas[:, 0].numpy())


def test_mrope_position_ids_names_a_run_that_does_not_fit_its_grid():
    types = np.array([[0, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"row 0: image 0 has 3 tokens.*needs 4"):
        mrope_position_ids(types, image_grid_thw=np.array([[1, 4, 4]]))
    with pytest.raises(ValueError, match="more images than the 0 grids"):
        mrope_position_ids(types)
    with pytest.raises(ValueError, match="2 image grids given, but tokens for 1"):
        mrope_position_ids(types[:, :-2], image_grid_thw=np.array([[1, 2, 4], [1, 2, 4]]))


@pytest.mark.parametrize(
    ("patch_size", "window_size", "merge"), [(14, 112, 2), (4, 16, 2), (4, 24, 1), (8, 96, 3)]
)
@pytest.mark.parametrize("seed", range(6))
def test_vision_layout_is_the_window_order_of_transformers(seed, patch_size, window_size, merge):
    rng = np.random.default_rng(seed)
    grids = [
        [int(rng.integers(1, 4)), *(merge * int(s) for s in rng.integers(1, 12, size=2))]
        for _ in range(rng.integers(1, 4))
    ]
    thw = torch.tensor(grids)
    window_index, cu_windows = get_vision_window_index(thw, merge, window_size, patch_size)
    cu_frames = get_vision_cu_seqlens(thw)
    positions = get_vision_position_ids(thw, merge)
    unit = merge * merge

    layout = vision_layout(np.array(grids), patch_size, window_size, merge)

    filled = np.flatnonzero(layout.image_segment_ids)
    # The filled slots, read in order, are the patches in transformers' window order.
    order = (window_index[:, None] * unit + torch.arange(unit)).flatten().numpy()
    patch_in_slot = np.full(layout.num_slots, -1)
    patch_in_slot[layout.patch_slots] = np.arange(len(positions))
    np.testing.assert_array_equal(patch_in_slot[filled], order)
    np.testing.assert_array_equal(layout.patch_positions[filled], positions.numpy()[order])
    assert not layout.patch_positions[layout.image_segment_ids == 0].any()
    # Every window is one aligned block, filled from its start.
    assert layout.window_slots == (window_size // patch_size // merge) ** 2 * unit
    occupied = (layout.image_segment_ids > 0).reshape(-1, layout.window_slots)
    np.testing.assert_array_equal(occupied.sum(1), np.diff(cu_windows.numpy()))
    assert (np.diff(occupied.astype(int), axis=1) <= 0).all()
    # Segments are transformers' full-attention sequences.
    lengths = np.bincount(layout.image_segment_ids)[1:]
    np.testing.assert_array_equal(lengths, np.diff(cu_frames.numpy()))
    np.testing.assert_array_equal(
        layout.image_segment_ids[layout.patch_slots], np.repeat(np.arange(len(lengths)) + 1, lengths)
    )
    # A merged token reads the slots of its own patches.
    np.testing.assert_array_equal(layout.token_slots, layout.patch_slots[::unit] // unit)


def test_vision_layout_refuses_a_grid_that_does_not_merge():
    with pytest.raises(ValueError, match="multiples of merge=2"):
        vision_layout([[1, 3, 4]])
    with pytest.raises(ValueError, match="window_size=16 is smaller"):
        vision_layout([[1, 4, 4]], window_size=16)
