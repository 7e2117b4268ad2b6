"""Where tokens and patches stand: multimodal rotary positions and the window order of the vision tower.

Host side and numpy only. Both are functions of the grids ``(t, h, w)`` that the processor reports, counted in
patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Int, Int32, Integer

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Values of `mm_token_type_ids`, as transformers numbers them."""


def mrope_position_ids(
    mm_token_type_ids: Integer[np.ndarray, "batch tokens"],
    *,
    attention_mask: np.ndarray | None = None,
    image_grid_thw: Integer[np.ndarray, "images 3"] | None = None,
    video_grid_thw: Integer[np.ndarray, "videos 3"] | None = None,
    second_per_grid_ts: Sequence[float] | np.ndarray | None = None,
    spatial_merge_size: int = 2,
    tokens_per_second: int | float = 2,
) -> tuple[Int32[np.ndarray, "3 batch tokens"], Int32[np.ndarray, " batch"]]:
    """Temporal, height and width position of every token.

    Text advances all three together. The tokens of an image or video take their place in its grid, counted
    from the position where it starts; text goes on after the grid's longer side. Equal to `get_rope_index`
    of transformers' Qwen2.5-VL.

    Args:
        mm_token_type_ids: 0 text, 1 image, 2 video; each image or video is one unbroken run of its tokens.
        attention_mask: ``[batch, tokens]``, 0 for padding, on either side; padding gets position 0. None: no
            padding.
        image_grid_thw: grid of every image in order of appearance, row after row, in patches.
        video_grid_thw: the same for videos.
        second_per_grid_ts: seconds between two temporal patches, for every video; 1 without.
        spatial_merge_size: patches that a token covers along each side.
        tokens_per_second: positions that a second of video takes.

    Returns:
        The positions, and for every row what to add to the count of its tokens so far to get the next
        position (`mrope_position_deltas`).

    Raises:
        ValueError: runs of image or video tokens and grids do not correspond.
    """
    types = np.asarray(mm_token_type_ids)
    mask = np.ones(types.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    positions = np.zeros((3, *types.shape), np.int32)
    deltas = np.zeros(types.shape[0], np.int32)
    grids = {
        IMAGE: [] if image_grid_thw is None else np.asarray(image_grid_thw).tolist(),
        VIDEO: [] if video_grid_thw is None else np.asarray(video_grid_thw).tolist(),
    }
    names = {IMAGE: "image", VIDEO: "video"}
    seconds = [1] * len(grids[VIDEO]) if second_per_grid_ts is None else list(second_per_grid_ts)
    if len(seconds) != len(grids[VIDEO]):
        raise ValueError(f"second_per_grid_ts has {len(seconds)} values for {len(grids[VIDEO])} videos")
    used = {IMAGE: 0, VIDEO: 0}

    for row, (row_types, row_mask) in enumerate(zip(types, mask, strict=True)):
        start, pieces = 0, []
        for kind, run in groupby(row_types[row_mask].tolist()):
            length = len(list(run))
            if kind == TEXT:
                pieces.append(np.broadcast_to(np.arange(start, start + length), (3, length)))
                start += length
                continue
            index = used[kind]
            if index == len(grids[kind]):
                raise ValueError(f"row {row} holds more {names[kind]}s than the {index} grids given")
            used[kind] += 1
            t, h, w = grids[kind][index]
            h, w = h // spatial_merge_size, w // spatial_merge_size
            if t * h * w != length:
                raise ValueError(
                    f"row {row}: {names[kind]} {index} has {length} tokens, its grid {grids[kind][index]} "
                    f"needs {t * h * w}"
                )
            interval = np.float32(tokens_per_second * seconds[index] if kind == VIDEO else 1)
            frame = (np.arange(t, dtype=np.float32) * interval).astype(np.int64)
            grid = np.meshgrid(frame, np.arange(h), np.arange(w), indexing="ij")
            pieces.append(start + np.stack(grid).reshape(3, -1))
            start += max(h, w)
        if pieces:
            placed = np.concatenate(pieces, axis=1)
            positions[:, row, row_mask] = placed
            deltas[row] = placed.max() + 1 - placed.shape[1]

    for kind, grid in grids.items():
        if used[kind] != len(grid):
            raise ValueError(f"{len(grid)} {names[kind]} grids given, but tokens for {used[kind]} only")
    return positions, deltas


@dataclass(frozen=True)
class VisionLayout:
    """Slots of the patches of one row of images, in window order.

    A window of attention has one aligned block of ``window_slots`` slots; one at the edge of its image leaves
    the end of its block empty. The ``merge**2`` patches that become one token stay together.

    Attributes:
        patch_slots: slot of every patch, patches in the order of transformers' image processor.
        token_slots: for every merged token in that order, its place among the row's merged tokens.
        patch_positions: row and column of the patch in each slot; 0 in an empty one.
        image_segment_ids: frame that the slot's patch belongs to, from 1 through the row; 0 if empty.
        window_slots: slots of a window, of which the row holds a whole multiple.
    """

    patch_slots: Int[np.ndarray, " patches"]
    token_slots: Int[np.ndarray, " tokens"]
    patch_positions: Int32[np.ndarray, "slots 2"]
    image_segment_ids: Int32[np.ndarray, " slots"]
    window_slots: int

    @property
    def num_slots(self) -> int:
        """Patch slots of the row."""
        return self.image_segment_ids.shape[0]


def token_grid(t: int, h: int, w: int, merge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame, row and column of every merged token of an image or video, in the image processor's order.

    Args:
        t, h, w: its grid, in patches.
        merge: patches of a merged token's side.

    Raises:
        ValueError: a side is no multiple of `merge`.
    """
    if h % merge or w % merge:
        raise ValueError(f"grid {(t, h, w)}: height and width must be multiples of merge={merge}")
    axes = map(np.arange, (t, h // merge, w // merge))
    frame, row, column = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
    return frame, row, column


def patch_coordinates(row: np.ndarray, column: np.ndarray, merge: int) -> Int[np.ndarray, "patches 2"]:
    """Row and column of the patches of merged tokens at `row` and `column`, those of one token together."""
    inner = np.stack(np.divmod(np.arange(merge * merge), merge), -1)[None]
    corner = np.stack([row, column], -1)[:, None] * merge
    return (corner + inner).reshape(-1, 2)


def vision_layout(
    grid_thw: Integer[np.ndarray, "images 3"] | Sequence[Sequence[int]],
    patch_size: int = 14,
    window_size: int = 112,
    merge: int = 2,
) -> VisionLayout:
    """Window order for the patches of the images and videos of one row, one after the other.

    Args:
        grid_thw: temporal, height and width size of each, in patches.
        patch_size: pixels of a patch's side.
        window_size: pixels of an attention window's side.
        merge: patches of a merged token's side.

    Raises:
        ValueError: a side of a grid is no multiple of `merge`, or a window is smaller than a merged token.

    The order and the windows are those of `get_window_index` in transformers' Qwen2.5-VL, which packs the
    windows without the empty slots.
    """
    side = window_size // merge // patch_size
    if side < 1:
        raise ValueError(
            f"window_size={window_size} is smaller than a merged token, {merge} patches of {patch_size}"
        )
    group = merge * merge
    block = side * side * group
    token_slots, coordinates, frames = [], [], []
    num_windows = num_frames = 0
    for t, h, w in np.asarray(grid_thw).reshape(-1, 3).tolist():
        frame, row, column = token_grid(t, h, w, merge)
        rows, columns = h // merge, w // merge
        windows_down, windows_across = -(-rows // side), -(-columns // side)
        window = (frame * windows_down + row // side) * windows_across + column // side
        window_width = np.minimum(side, columns - column // side * side)
        rank = row % side * window_width + column % side
        token_slots.append((num_windows + window) * side * side + rank)
        coordinates.append(patch_coordinates(row, column, merge))
        frames.append(np.repeat(num_frames + 1 + frame, group))
        num_windows += t * windows_down * windows_across
        num_frames += t

    slots = np.concatenate(token_slots) if token_slots else np.zeros(0, np.int64)
    patch_slots = (slots[:, None] * group + np.arange(group)).reshape(-1)
    patch_positions = np.zeros((num_windows * block, 2), np.int32)
    image_segment_ids = np.zeros(num_windows * block, np.int32)
    if token_slots:
        patch_positions[patch_slots] = np.concatenate(coordinates)
        image_segment_ids[patch_slots] = np.concatenate(frames)
    return VisionLayout(patch_slots, slots, patch_positions, image_segment_ids, block)
