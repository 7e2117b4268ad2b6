"""The processor of Qwen2.5-VL, from its parts: tokenizer, PIL image processor and chat template; no torch.

transformers' own processor class asks for torchvision. What it adds to its parts is done here: the expansion
of image and video placeholders, and videos given as frames.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer
from PIL import Image
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmlora.models.qwen2_5_vl.positions import IMAGE, VIDEO, VisionLayout, mrope_position_ids, vision_layout
from vlmlora.nn.segments import segment_offsets

DEFAULT_VIDEO_FPS = 24.0
"""Frames per second that transformers assumes of frames given without it (`VideoMetadata.sampled_fps`)."""

# Class defaults of transformers' Qwen2VLVideoProcessor, which cannot be imported without torchvision.
_VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
_VIDEO_MAX_TOKENS = 128_000
_FRAME_SETTINGS = (
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


@dataclass(frozen=True, eq=False)
class VisionInput:
    """An image or video, cut into patches.

    Attributes:
        pixel_values: flattened patches of ``channels * temporal * patch * patch`` values, those of a merged
            token contiguous, row by row (the order of transformers' image processor).
        grid_thw: temporal, height and width size in patches.
        second_per_grid_t: seconds between two temporal patches of a video; None for an image.
    """

    pixel_values: Float32[np.ndarray, "patches features"]
    grid_thw: tuple[int, int, int]
    second_per_grid_t: float | None = None


class Qwen2_5_VLProcessor:
    """Text, images and videos to arrays, equal to transformers' `Qwen2_5_VLProcessor`.

    Token ids, grids and the pixels of images are exactly those of transformers with its PIL image processor.
    Its torchvision image processor, and its video processor, resample differently: a pixel of 0 to 255
    differs by at most 2, and by less than 0.01 on average.

    Attributes:
        tokenizer: the tokenizer.
        image_processor: transformers' PIL image processor; its `size` bounds the pixels of an image.
        video_size: bounds of the pixels of a video frame, ``shortest_edge`` and ``longest_edge`` as there.
        chat_template: the Jinja template that turns messages into text.
        placeholders: the tokens that stand for an image and a video.
        processor_class: name of transformers' class, for the files that it reads.
        why_not_packed: None, since a row may hold several samples.
    """

    processor_class = "Qwen2_5_VLProcessor"
    why_not_packed = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        config: PreTrainedConfig,
        *,
        chat_template: str | None = None,
        video_config: dict[str, Any] | None = None,
    ):
        vision = config.vision_config
        for name, ours, theirs in (
            ("patch_size", image_processor.patch_size, vision.patch_size),
            ("temporal_patch_size", image_processor.temporal_patch_size, vision.temporal_patch_size),
            ("merge_size", image_processor.merge_size, vision.spatial_merge_size),
        ):
            if ours != theirs:
                raise ValueError(f"the image processor has {name}={ours}, the model's vision config {theirs}")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template or tokenizer.chat_template
        if not isinstance(self.chat_template, str):
            raise ValueError("neither the processor nor the tokenizer has a chat template")
        self._video_config = dict(video_config or {})
        self.video_size = _edges(self._video_config, _VIDEO_SIZE)
        self._frame_processor = Qwen2VLImageProcessorPil(
            size=dict(self.video_size),
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            **{key: self._video_config[key] for key in _FRAME_SETTINGS if key in self._video_config},
        )
        self._vision = vision
        self.placeholders = {
            "image": getattr(tokenizer, "image_token", "<|image_pad|>"),
            "video": getattr(tokenizer, "video_token", "<|video_pad|>"),
        }
        self._token_ids = {}
        for name, kind, expected in (
            ("image", IMAGE, config.image_token_id),
            ("video", VIDEO, config.video_token_id),
        ):
            token_id = tokenizer.convert_tokens_to_ids(self.placeholders[name])
            if token_id != expected:
                raise ValueError(
                    f"{name}_token_id={expected} in the config, but the tokenizer has "
                    f"{self.placeholders[name]} as {token_id}"
                )
            self._token_ids[kind] = token_id

    def process_image(self, image: Image.Image) -> VisionInput:
        """Resize, normalise and cut an image into patches.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        features = self.image_processor(image)
        return VisionInput(features["pixel_values"], tuple(features["image_grid_thw"][0].tolist()))

    def process_video(
        self,
        frames: Sequence[Image.Image] | Integer[np.ndarray, "frames height width 3"],
        fps: int | float | None = None,
    ) -> VisionInput:
        """Resize, normalise and cut the frames of a video into patches; none is left out.

        The last frame is repeated to fill a temporal patch.

        Args:
            frames: RGB frames of one size.
            fps: frames per second of what is given; `DEFAULT_VIDEO_FPS` without, as in transformers.

        Raises:
            ValueError: there are no frames, they differ in size, `fps` is not positive, or one side is more
                than 200 times the other.
        """
        if fps is not None and not fps > 0:
            raise ValueError(f"fps={fps}: needed a positive number")
        images = [frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames]
        sizes = {image.size for image in images}
        if len(sizes) != 1:
            raise ValueError(f"a video needs frames of one size, found {sorted(sizes) or 'no frames'}")
        processor = self._frame_processor
        temporal, patch = processor.temporal_patch_size, processor.patch_size
        size = dict(self.video_size)
        if self._video_config.get("cap_pixels_per_frame"):
            tokens = self._video_config.get("max_video_tokens", _VIDEO_MAX_TOKENS)
            pixels = int(tokens * (patch * processor.merge_size) ** 2 * 0.9)
            share = min(size["longest_edge"], pixels * temporal // len(images))
            size["longest_edge"] = max(share, int(size["shortest_edge"] * 1.05))
        images += [images[-1]] * (-len(images) % temporal)
        features = processor(images, size=size)
        # The image processor repeats a still image through the temporal patch: take each frame once.
        stills = features["pixel_values"].reshape(len(images), -1, 3, temporal, patch, patch)[:, :, :, 0]
        clips = stills.reshape(-1, temporal, *stills.shape[1:])
        patches = clips.transpose(0, 2, 3, 1, 4, 5).reshape(len(clips) * stills.shape[1], -1)
        _, h, w = features["image_grid_thw"][0].tolist()
        return VisionInput(patches, (len(clips), h, w), temporal / (fps or DEFAULT_VIDEO_FPS))

    def num_tokens(self, item: VisionInput) -> int:
        """Tokens that an image or video takes in the text."""
        return int(np.prod(item.grid_thw)) // self.image_processor.merge_size**2

    def token_counts(
        self,
        input_ids: Integer[np.ndarray, " tokens"],
        images: Sequence[VisionInput] = (),
        videos: Sequence[VisionInput] = (),
    ) -> Int[np.ndarray, " tokens"]:
        """How often each token is to be repeated: a placeholder as often as its image has tokens, text once.

        Raises:
            ValueError: the number of placeholders is not the number of images or videos.
        """
        counts = np.ones(len(input_ids), np.int64)
        for name, kind, items in (("image", IMAGE, images), ("video", VIDEO, videos)):
            found = np.flatnonzero(np.asarray(input_ids) == self._token_ids[kind])
            if len(found) != len(items):
                raise ValueError(
                    f"{len(found)} {self.placeholders[name]} placeholders for {len(items)} {name}s; "
                    "each needs one"
                )
            counts[found] = [self.num_tokens(item) for item in items]
        return counts

    def mm_token_type_ids(self, input_ids: Integer[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """0 for text, 1 for a token of an image, 2 for one of a video."""
        input_ids = np.asarray(input_ids)
        return sum(
            kind * (input_ids == token_id).astype(np.int32) for kind, token_id in self._token_ids.items()
        )

    def __call__(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        videos: Sequence[Sequence[Image.Image] | np.ndarray] = (),
        fps: Sequence[int | float | None] | None = None,
    ) -> dict[str, np.ndarray]:
        """One text and its images and videos as transformers' processor returns them, without the batch axis.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids` ``[tokens]``; with images, `pixel_values`
            and `image_grid_thw`; with videos, `pixel_values_videos`, `video_grid_thw` and
            `second_per_grid_ts`.

        Raises:
            ValueError: placeholders and images or videos do not correspond, or one of these cannot be used.
        """
        images = [self.process_image(image) for image in images]
        videos = [
            self.process_video(frames, rate)
            for frames, rate in zip(videos, fps or [None] * len(videos), strict=True)
        ]
        input_ids = np.array(self.tokenizer(text)["input_ids"], np.int32)
        input_ids = np.repeat(input_ids, self.token_counts(input_ids, images, videos))
        out = {
            "input_ids": input_ids,
            "attention_mask": np.ones_like(input_ids),
            "mm_token_type_ids": self.mm_token_type_ids(input_ids),
        }
        if images:
            out["pixel_values"] = np.concatenate([image.pixel_values for image in images])
            out["image_grid_thw"] = grids(images)
        if videos:
            out["pixel_values_videos"] = np.concatenate([video.pixel_values for video in videos])
            out["video_grid_thw"] = grids(videos)
            out["second_per_grid_ts"] = np.array([video.second_per_grid_t for video in videos], np.float32)
        return out

    def layout(self, item: VisionInput) -> VisionLayout:
        """Window order of the patches of an image or video."""
        vision, merge = self._vision, self.image_processor.merge_size
        return vision_layout([item.grid_thw], vision.patch_size, vision.window_size, merge)

    def position_ids(
        self,
        mm_token_type_ids: Integer[np.ndarray, "batch tokens"],
        attention_mask: np.ndarray,
        images: Sequence[VisionInput],
        videos: Sequence[VisionInput],
    ) -> Int32[np.ndarray, "3 batch tokens"]:
        """Temporal, height and width position of every token."""
        positions, _ = mrope_position_ids(
            mm_token_type_ids,
            attention_mask=attention_mask,
            image_grid_thw=grids(images),
            video_grid_thw=grids(videos),
            second_per_grid_ts=np.array([video.second_per_grid_t for video in videos], np.float32),
            spatial_merge_size=self.image_processor.merge_size,
            tokens_per_second=self._vision.tokens_per_second,
        )
        return positions

    @property
    def patch_multiple(self) -> int:
        """Slots of an attention window: a row of patches holds a whole multiple."""
        side = self._vision.window_size // self._vision.patch_size // self.image_processor.merge_size
        return (side * self.image_processor.merge_size) ** 2

    def num_patches(self, item: VisionInput) -> int:
        """Patch slots that an image or video takes, those that windows at its edge leave empty included."""
        t, h, w = item.grid_thw
        side = int(self.patch_multiple**0.5)
        return t * -(-h // side) * -(-w // side) * self.patch_multiple

    def num_segments(self, item: VisionInput) -> int:
        """Frames, the two that share a temporal patch as one; an image has one."""
        return item.grid_thw[0]

    def collate(
        self,
        input_ids: Integer[np.ndarray, "batch tokens"],
        attention_mask: Integer[np.ndarray, "batch tokens"],
        images: Sequence[Sequence[VisionInput]],
        videos: Sequence[Sequence[VisionInput]],
        *,
        image_rows: int,
        patches: int,
        image_segments: int | None = None,
        first_image_row: int = 0,
        lengths: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, np.ndarray]:
        """What the model reads beside the tokens, in static shapes.

        Args:
            input_ids: tokens, padded.
            attention_mask: 0 for padding.
            images: for every row of tokens its images, in the order of their placeholders.
            videos: the same for videos.
            image_rows: rows of `pixel_values`, one an image or video, or with `lengths` one a row of tokens;
                0 leaves out all that concerns them.
            patches: slots of each, a multiple of `patch_multiple`.
            image_segments: images and frames that each has room for; None: the batch's most, rounded up to a
                power of two.
            first_image_row: number of the first of the rows in the batch that `image_token_index` is for.
            lengths: of the samples in every row, where it may hold several.

        Returns:
            `position_ids` ``[3, batch, tokens]``, and `pixel_values` ``[image_rows, patches, features]``,
            `patch_positions` ``[image_rows, patches, 2]``, `image_segment_ids` ``[image_rows, patches]``,
            `image_segment_offsets` ``[image_rows, image_segments + 1]``, `image_token_index` ``[batch,
            tokens]`` as the model's call describes them.

        Raises:
            ValueError: an image or their number exceeds its budget.
        """
        types = np.where(attention_mask > 0, self.mm_token_type_ids(input_ids), 0)
        all_images, all_videos = ([item for row in rows for item in row] for rows in (images, videos))
        if lengths is None:
            positions = self.position_ids(types, attention_mask > 0, all_images, all_videos)
        else:
            positions = self._positions_of_samples(types, lengths, all_images, all_videos)
        count = len(all_images) + len(all_videos)
        if count > image_rows and (lengths is None or image_rows == 0):
            raise ValueError(f"the batch holds {count} images and videos, its budget {image_rows}")
        if image_rows == 0:
            return {"position_ids": positions}
        if patches % self.patch_multiple:
            raise ValueError(f"patches={patches} is no multiple of {self.patch_multiple}, which go together")
        processor = self.image_processor
        features = 3 * processor.temporal_patch_size * processor.patch_size**2
        pixel_values = np.zeros((image_rows, patches, features), np.float32)
        patch_positions = np.zeros((image_rows, patches, 2), np.int32)
        image_segment_ids = np.zeros((image_rows, patches), np.int32)
        image_token_index = np.full(input_ids.shape, -1, np.int32)
        merged = processor.merge_size**2
        # Slots of the frames that each row of patches holds so far.
        frames: list[list[int]] = [[] for _ in range(image_rows)]
        next_row = 0
        for kind, rows in ((IMAGE, images), (VIDEO, videos)):
            index = []
            for token_row, items in enumerate(rows):
                for item in items:
                    row = next_row if lengths is None else token_row
                    layout, start = self.layout(item), sum(frames[row])
                    end = start + layout.num_slots
                    if end > patches:
                        raise ValueError(
                            f"an image or video of {item.grid_thw} patches takes {layout.num_slots} slots, "
                            f"its budget {patches}"
                            + (f", of which others of row {row} take {start}" if start else "")
                        )
                    pixel_values[row, start + layout.patch_slots] = item.pixel_values
                    patch_positions[row, start:end] = layout.patch_positions
                    ids = layout.image_segment_ids
                    image_segment_ids[row, start:end] = np.where(ids > 0, ids + len(frames[row]), 0)
                    first_token = ((first_image_row + row) * patches + start) // merged
                    index.append(first_token + layout.token_slots)
                    count = self.num_segments(item)
                    frames[row] += [layout.num_slots // count] * count
                    next_row += 1
            if index:
                image_token_index[types == kind] = np.concatenate(index)
        if image_segments is None:
            image_segments = 1 << (max(1, *map(len, frames)) - 1).bit_length()
        return {
            "position_ids": positions,
            "pixel_values": pixel_values,
            "patch_positions": patch_positions,
            "image_segment_ids": image_segment_ids,
            "image_segment_offsets": segment_offsets(frames, image_segments, "images and frames of videos"),
            "image_token_index": image_token_index,
        }

    def _positions_of_samples(
        self,
        types: Integer[np.ndarray, "batch tokens"],
        lengths: Sequence[Sequence[int]],
        images: Sequence[VisionInput],
        videos: Sequence[VisionInput],
    ) -> Int32[np.ndarray, "3 batch tokens"]:
        """Positions that begin anew with every sample of a row; 0 for padding."""
        positions = np.zeros((3, *types.shape), np.int32)
        spans = [
            (row, slice(end - length, end))
            for row, mine in enumerate(lengths)
            for length, end in zip(mine, np.cumsum(mine).tolist(), strict=True)
        ]
        if not spans:
            return positions
        longest = max(span.stop - span.start for _, span in spans)
        alone = np.zeros((len(spans), longest), types.dtype)
        is_token = np.zeros(alone.shape, bool)
        for sample, (row, span) in enumerate(spans):
            alone[sample, : span.stop - span.start] = types[row, span]
            is_token[sample, : span.stop - span.start] = True
        found = self.position_ids(alone, is_token, images, videos)
        for sample, (row, span) in enumerate(spans):
            positions[:, row, span] = found[:, sample, : span.stop - span.start]
        return positions

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files that transformers' processors of this and earlier major versions load."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        image = json.loads(self.image_processor.to_json_string())
        video = {
            **image,
            **self._video_config,
            "size": self.video_size,
            "image_processor_type": None,
            "video_processor_type": "Qwen2VLVideoProcessor",
        }
        video = {key: value for key, value in video.items() if value is not None}
        name = self.processor_class
        _write_json(
            directory / "processor_config.json",
            {"processor_class": name, "image_processor": image, "video_processor": video},
        )
        # Read by transformers 4.
        _write_json(directory / "preprocessor_config.json", {"processor_class": name, **image})
        _write_json(directory / "video_preprocessor_config.json", {"processor_class": name, **video})


def load_processor(
    directory: str | Path,
    config: PreTrainedConfig,
    processor_class: type[Qwen2_5_VLProcessor] = Qwen2_5_VLProcessor,
) -> Qwen2_5_VLProcessor:
    """The processor of a Hugging Face directory, written by transformers 4 or 5.

    Args:
        directory: holds the tokenizer's files and `processor_config.json` or `preprocessor_config.json`.
        config: the model's config.
        processor_class: what to make.

    Raises:
        FileNotFoundError: the directory lacks one of them.
        ValueError: the files contradict `config`, or there is no chat template.
    """
    directory = Path(directory)
    legacy = _read_json(directory / "preprocessor_config.json")
    nested = _read_json(directory / "processor_config.json") or {}
    image = nested.get("image_processor") or legacy
    if image is None:
        raise FileNotFoundError(
            f"{directory} has neither preprocessor_config.json nor image_processor in processor_config.json"
        )
    video = nested.get("video_processor") or _read_json(directory / "video_preprocessor_config.json") or image
    # A size of its own, because transformers 5.17 writes min_pixels and max_pixels into the class's dict.
    size = _edges(image, Qwen2VLImageProcessorPil.size)
    image = {key: value for key, value in image.items() if key not in ("min_pixels", "max_pixels")}
    return processor_class(
        AutoTokenizer.from_pretrained(directory),
        Qwen2VLImageProcessorPil.from_dict({**image, "size": size}),
        config,
        chat_template=_chat_template(directory),
        video_config=video,
    )


def _edges(config: dict[str, Any], default: dict[str, int]) -> dict[str, int]:
    """Bounds of the number of pixels, from either generation of names."""
    size = dict(config.get("size") or default)
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = config.get(old)
        size[new] = value if value is not None else size.get(new, size.get(old))
    return {key: size[key] for key in ("shortest_edge", "longest_edge")}


def grids(items: Sequence[VisionInput]) -> np.ndarray:
    """The grids of images or videos, int64 [items, 3]."""
    return np.array([item.grid_thw for item in items], np.int64).reshape(-1, 3)


def _chat_template(directory: Path) -> str | None:
    if (raw := directory / "chat_template.jinja").is_file():
        return raw.read_text(encoding="utf-8")
    return (_read_json(directory / "chat_template.json") or {}).get("chat_template")


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
