"""The processor of Qwen2-VL: that of Qwen2.5-VL without windows and without seconds in video positions."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from vlmlora.models.qwen2_5_vl.positions import (
    VisionLayout,
    mrope_position_ids,
    patch_coordinates,
    token_grid,
)
from vlmlora.models.qwen2_5_vl.processing import Qwen2_5_VLProcessor, VisionInput, grids
from vlmlora.models.qwen2_5_vl.processing import load_processor as load_processor_of


class Qwen2VLProcessor(Qwen2_5_VLProcessor):
    """Text, images and videos to arrays, equal to transformers' `Qwen2VLProcessor`."""

    processor_class = "Qwen2VLProcessor"

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """As for Qwen2.5-VL, without `second_per_grid_ts`."""
        out = super().__call__(*args, **kwargs)
        out.pop("second_per_grid_ts", None)
        return out

    def layout(self, item: VisionInput) -> VisionLayout:
        """The patches in the image processor's order, without an empty slot."""
        merge = self.image_processor.merge_size
        frame, row, column = token_grid(*item.grid_thw, merge)
        return VisionLayout(
            patch_slots=np.arange(len(frame) * merge**2),
            token_slots=np.arange(len(frame)),
            patch_positions=patch_coordinates(row, column, merge).astype(np.int32),
            image_segment_ids=np.repeat(frame + 1, merge**2).astype(np.int32),
            window_slots=self.patch_multiple,
        )

    @property
    def patch_multiple(self) -> int:
        """Patches of a merged token: a row of patches holds a whole multiple."""
        return self.image_processor.merge_size**2

    def num_patches(self, item: VisionInput) -> int:
        """Patch slots that an image or video takes."""
        return int(np.prod(item.grid_thw))

    def position_ids(
        self,
        mm_token_type_ids: Integer[np.ndarray, "batch tokens"],
        attention_mask: np.ndarray,
        images: Sequence[VisionInput],
        videos: Sequence[VisionInput],
    ) -> Int32[np.ndarray, "3 batch tokens"]:
        """Temporal, height and width position of every token; the frames of a video are one apart."""
        positions, _ = mrope_position_ids(
            mm_token_type_ids,
            attention_mask=attention_mask,
            image_grid_thw=grids(images),
            video_grid_thw=grids(videos),
            spatial_merge_size=self.image_processor.merge_size,
            tokens_per_second=1,
        )
        return positions


load_processor = functools.partial(load_processor_of, processor_class=Qwen2VLProcessor)
