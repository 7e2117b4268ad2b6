"""The processor of Mllama, from its parts: tokenizer, PIL image processor and chat template; no torch.

transformers' own processor class asks for torchvision. What it adds to its parts is done here: which tokens
see which image.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Integer
from PIL import Image
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from vlmlora.models.mllama.vision import num_patches

IMAGE_TOKEN = "<|image|>"
TO_THE_END = 2**30
"""End of a span that generated tokens stand in too."""


@dataclass(frozen=True, eq=False)
class TiledImage:
    """An image on a canvas of whole tiles.

    Attributes:
        tiles: pixels of the tiles, row by row.
        aspect_ratio_id: the canvas, by its place among the supported ones, from 1.
    """

    tiles: Float32[np.ndarray, "tiles channels height width"]
    aspect_ratio_id: int


class MllamaProcessor:
    """Text and images to arrays, equal to transformers' `MllamaProcessor` with its PIL image processor.

    Attributes:
        tokenizer: the tokenizer.
        image_processor: transformers' PIL image processor; its `max_image_tiles` bounds an image's tiles.
        chat_template: the Jinja template that turns messages into text.
        placeholders: the token that stands for an image.
        patch_multiple: patch slots of an image, which has always the same.
        why_not_packed: why a row holds one sample.
    """

    why_not_packed = "tokens see images through cross-attention, which would not keep samples apart"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: MllamaImageProcessorPil,
        config: PreTrainedConfig,
        *,
        chat_template: str | None = None,
    ):
        vision = config.vision_config
        for name, ours, theirs in (
            ("size", dict(image_processor.size)["height"], vision.image_size),
            ("max_image_tiles", image_processor.max_image_tiles, vision.max_num_tiles),
        ):
            if ours != theirs:
                raise ValueError(f"the image processor has {name}={ours}, the model's vision config {theirs}")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template or tokenizer.chat_template
        if not isinstance(self.chat_template, str):
            raise ValueError("neither the processor nor the tokenizer has a chat template")
        self.placeholders = {"image": getattr(tokenizer, "image_token", IMAGE_TOKEN)}
        self.patch_multiple = vision.max_num_tiles * num_patches(vision)
        self._image_token_id = tokenizer.convert_tokens_to_ids(self.placeholders["image"])
        if self._image_token_id != config.image_token_index:
            raise ValueError(
                f"image_token_index={config.image_token_index} in the config, but the tokenizer has "
                f"{self.placeholders['image']} as {self._image_token_id}"
            )

    def process_image(self, image: Image.Image) -> TiledImage:
        """Choose a canvas, resize the image to fit it, pad, normalise and cut it into tiles."""
        features = self.image_processor(image)
        (count,) = features["num_tiles"][0]
        return TiledImage(features["pixel_values"][0, 0, :count], int(features["aspect_ratio_ids"][0, 0]))

    def process_video(
        self, frames: Sequence[Image.Image] | np.ndarray, fps: int | float | None = None
    ) -> TiledImage:
        """Refuse a video.

        Raises:
            ValueError: always; the model has no videos.
        """
        raise ValueError("this model takes images, not videos; give single frames as images")

    def token_counts(
        self,
        input_ids: Integer[np.ndarray, " tokens"],
        images: Sequence[TiledImage] = (),
        videos: Sequence[TiledImage] = (),
    ) -> Int[np.ndarray, " tokens"]:
        """How often each token is to be repeated: once, since an image takes one token.

        Raises:
            ValueError: the number of placeholders is not the number of images.
        """
        found = int((np.asarray(input_ids) == self._image_token_id).sum())
        if found != len(images):
            raise ValueError(
                f"{found} {self.placeholders['image']} placeholders for {len(images)} images; each needs one"
            )
        return np.ones(len(input_ids), np.int64)

    def mm_token_type_ids(self, input_ids: Integer[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """0 for text, 1 for an image's token."""
        return (np.asarray(input_ids) == self._image_token_id).astype(np.int32)

    def num_patches(self, item: TiledImage) -> int:
        """Patch slots that an image takes: those of all tiles, since unfilled ones are computed as well."""
        return self.patch_multiple

    def num_segments(self, item: TiledImage) -> int:
        """One: the tiles of an image see each other."""
        return 1

    def __call__(self, text: str, images: Sequence[Image.Image] = ()) -> dict[str, np.ndarray]:
        """One text and its images as transformers' processor returns them, without the batch axis.

        Returns:
            `input_ids` and `attention_mask` ``[tokens]``; with images, `pixel_values` ``[images, tiles,
            channels, height, width]``, `aspect_ratio_ids` ``[images]``, `aspect_ratio_mask` ``[images,
            tiles]`` and `cross_attention_mask` ``[tokens, images, tiles]``.

        Raises:
            ValueError: placeholders and images do not correspond.
        """
        items = [self.process_image(image) for image in images]
        input_ids = np.array(self.tokenizer(self._with_first_token(text))["input_ids"], np.int32)
        self.token_counts(input_ids, items)
        out = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
        if items:
            pixels, ids, num_tiles = self._stack(items, len(items))
            filled = np.arange(pixels.shape[1]) < num_tiles[:, None]
            start, end = image_spans(input_ids, self._image_token_id).T
            place = np.arange(len(input_ids))[:, None]
            sees = (place >= start) & (place < end)
            out |= {
                "pixel_values": pixels,
                "aspect_ratio_ids": ids,
                "aspect_ratio_mask": filled.astype(np.int64),
                "cross_attention_mask": (sees[..., None] & filled).astype(np.int64),
            }
        return out

    def collate(
        self,
        input_ids: Integer[np.ndarray, "batch tokens"],
        attention_mask: Integer[np.ndarray, "batch tokens"],
        images: Sequence[Sequence[TiledImage]],
        videos: Sequence[Sequence[TiledImage]],
        *,
        image_rows: int,
        patches: int,
        image_segments: int | None = None,
        first_image_row: int = 0,
        lengths: None = None,
    ) -> dict[str, np.ndarray]:
        """What the model reads beside the tokens, in static shapes.

        Args:
            input_ids: tokens, padded on the right.
            attention_mask: 0 for padding.
            images: for every row of tokens its images, in the order of their placeholders.
            videos: for every row none.
            image_rows: images that there is room for; 0 leaves out all that concerns them.
            patches: slots of each, always `patch_multiple`.
            image_segments: of each image always one.
            first_image_row: number of the first of the images in the batch that `image_index` is for.
            lengths: None, since rows hold one sample each.

        Returns:
            `position_ids` ``[batch, tokens]``, and `pixel_values` ``[image_rows, tiles, channels, height,
            width]``, `aspect_ratio_ids` and `num_tiles` ``[image_rows]``, `image_index` ``[batch,
            row_images]`` and `image_spans` ``[batch, row_images, 2]`` as the model's call describes them.
            Of `row_images`, the most images of a row, there are powers of two alone.

        Raises:
            ValueError: the images exceed their budget, or `patches` is another number.
        """
        rows, tokens = input_ids.shape
        position_ids = np.tile(np.arange(tokens, dtype=np.int32), (rows, 1))
        items = [image for row in images for image in row]
        if len(items) > image_rows:
            raise ValueError(f"the batch holds {len(items)} images, its budget {image_rows}")
        if image_rows == 0:
            return {"position_ids": position_ids}
        if patches != self.patch_multiple:
            raise ValueError(f"patches={patches}, but an image takes {self.patch_multiple}")
        most = max(map(len, images), default=0)
        row_images = 1 << max(0, most - 1).bit_length()
        index = np.full((rows, row_images), -1, np.int32)
        spans = np.zeros((rows, row_images, 2), np.int32)
        first = 0
        for row, mine in enumerate(images):
            index[row, : len(mine)] = first_image_row + np.arange(first, first + len(mine))
            ids = input_ids[row, : int(attention_mask[row].sum())]
            spans[row, : len(mine)] = image_spans(ids, self._image_token_id)
            first += len(mine)
        pixels, ratios, num_tiles = self._stack(items, image_rows)
        return {
            "position_ids": position_ids,
            "pixel_values": pixels,
            "aspect_ratio_ids": ratios.astype(np.int32),
            "num_tiles": num_tiles,
            "image_index": index,
            "image_spans": spans,
        }

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files that transformers' processors of this and the earlier major version load."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        image = json.loads(self.image_processor.to_json_string())
        name = "MllamaProcessor"
        for file, value in (
            ("processor_config.json", {"processor_class": name, "image_processor": image}),
            # Read by transformers 4.
            ("preprocessor_config.json", {"processor_class": name, **image}),
        ):
            text = json.dumps(value, indent=2, sort_keys=True) + "\n"
            (directory / file).write_text(text, encoding="utf-8")

    def _stack(self, items: Sequence[TiledImage], rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels of all tiles, canvas and number of tiles of each image; zeros where there is none."""
        side, tiles = dict(self.image_processor.size)["height"], self.image_processor.max_image_tiles
        pixels = np.zeros((rows, tiles, 3, side, side), np.float32)
        ids, num_tiles = np.zeros(rows, np.int64), np.zeros(rows, np.int32)
        for row, item in enumerate(items):
            pixels[row, : len(item.tiles)] = item.tiles
            ids[row], num_tiles[row] = item.aspect_ratio_id, len(item.tiles)
        return pixels, ids, num_tiles

    def _with_first_token(self, text: str) -> str:
        """The text with the token that begins every one, after the images that it may begin with."""
        first, image = self.tokenizer.bos_token, self.placeholders["image"]
        if first is None or first in text:
            return text
        rest = text
        while rest.startswith(image):
            rest = rest[len(image) :]
        return text[: len(text) - len(rest)] + first + rest


def image_spans(
    input_ids: Integer[np.ndarray, " tokens"], image_token_id: int
) -> Int[np.ndarray, "images 2"]:
    """The positions, from the first to before the second, of the tokens that see each image.

    An image is seen from its token on until the next image's. Images whose tokens stand together are seen as
    long as the last of them, and the last to the end (transformers' `get_cross_attention_token_mask`).
    """
    starts = np.flatnonzero(np.asarray(input_ids) == image_token_id)
    ends = np.append(starts[1:], TO_THE_END)[: len(starts)]
    for i in range(len(starts) - 2, -1, -1):
        if starts[i + 1] == starts[i] + 1:
            ends[i] = ends[i + 1]
    return np.stack([starts, ends], -1).astype(np.int32)


def load_processor(directory: str | Path, config: PreTrainedConfig) -> MllamaProcessor:
    """The processor of a Hugging Face directory, written by transformers 4 or 5.

    Args:
        directory: holds the tokenizer's files and `processor_config.json` or `preprocessor_config.json`.
        config: the model's config.

    Raises:
        FileNotFoundError: the directory lacks one of them.
        ValueError: the files contradict `config`, or there is no chat template.
    """
    directory = Path(directory)
    nested = _read_json(directory / "processor_config.json") or {}
    image = nested.get("image_processor") or _read_json(directory / "preprocessor_config.json")
    if image is None:
        raise FileNotFoundError(
            f"{directory} has neither preprocessor_config.json nor image_processor in processor_config.json"
        )
    return MllamaProcessor(
        AutoTokenizer.from_pretrained(directory),
        MllamaImageProcessorPil.from_dict(image),
        config,
        chat_template=_chat_template(directory),
    )


def _chat_template(directory: Path) -> str | None:
    if (raw := directory / "chat_template.jinja").is_file():
        return raw.read_text(encoding="utf-8")
    return (_read_json(directory / "chat_template.json") or {}).get("chat_template")


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
