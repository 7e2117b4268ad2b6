"""From messages to samples, and from samples to batches of static shape.

What a model family adds (its image processor, placeholders, positions) comes through `FamilyProcessor`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlmlora.data.labels import IGNORE_INDEX, make_labels, response_spans, tokens_in_spans
from vlmlora.data.messages import Conversation, read_messages
from vlmlora.data.packing import RowSize, row_capacity
from vlmlora.models.registry import family_of
from vlmlora.nn.segments import segment_offsets


@runtime_checkable
class FamilyProcessor(Protocol):
    """What a model family's processor does; an image or video is opaque to everyone else.

    Attributes:
        tokenizer: a tokenizer that knows the offsets of its tokens.
        image_processor: settings and code of the image processing.
        chat_template: Jinja template of the messages.
        placeholders: tokens that stand for an image and a video.
        patch_multiple: a row of patches holds a whole multiple of this.
        why_not_packed: why a row cannot hold several samples; None if it can.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    chat_template: str
    placeholders: Mapping[str, str]
    patch_multiple: int
    why_not_packed: str | None

    def process_image(self, image: Image.Image) -> Any:
        """An image as the family holds it."""

    def process_video(self, frames: Sequence[Image.Image] | np.ndarray, fps: int | float | None) -> Any:
        """A video as the family holds it."""

    def token_counts(self, input_ids: np.ndarray, images: Sequence[Any], videos: Sequence[Any]) -> np.ndarray:
        """How often each token is repeated to make room for the image that it stands for."""

    def mm_token_type_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """0 for text, another number for tokens of an image or video."""

    def num_patches(self, item: Any) -> int:
        """Patch slots that an image or video takes."""

    def num_segments(self, item: Any) -> int:
        """Parts of an image or video whose patches do not see each other's: the frames of a video."""

    def collate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        images: Sequence[Sequence[Any]],
        videos: Sequence[Sequence[Any]],
        *,
        image_rows: int,
        patches: int,
        image_segments: int | None = None,
        first_image_row: int = 0,
        lengths: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, np.ndarray]:
        """What the model reads beside the tokens.

        A row of patches has room for so many `image_segments`; None: for the batch's own. The rows of patches
        start at number `first_image_row` of a batch that several processes have part in. `lengths` are those
        of the samples in every row, if it may hold several; each row of tokens has then a row of patches of
        its own.
        """

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that transformers loads."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation, ready to be put into a batch.

    Attributes:
        input_ids: tokens, with image placeholders expanded.
        labels: the same where the loss is to read them, else -100; not shifted.
        images: images as the family holds them, in the order of their placeholders.
        videos: videos likewise.
    """

    input_ids: Int32[np.ndarray, " tokens"]
    labels: Int32[np.ndarray, " tokens"]
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Budget:
    """Sizes of a batch; None takes the batch's own, rounded up.

    Attributes:
        max_length: tokens of a row.
        max_images: rows of patches, one for each image or video of the batch; of a packed batch one for each
            row of tokens. 0: a batch without images.
        max_patches: patch slots of each of these rows.
        max_image_segments: images and frames of videos in each of these rows.
        max_segments: samples of a row of tokens, where it may hold several.
    """

    max_length: int | None = None
    max_images: int | None = None
    max_patches: int | None = None
    max_image_segments: int | None = None
    max_segments: int | None = None

    def open_sizes(self, *, packing: bool) -> list[str]:
        """What the batch decides for itself."""
        unused = () if packing else ("max_segments",)
        return [name for name, size in vars(self).items() if size is None and name not in unused]


class SampleSize(NamedTuple):
    """What a sample takes of a batch.

    Attributes:
        tokens: its length.
        items: images and videos.
        patches: patch slots of all of them.
        segments: images and frames of videos.
        largest_patches: patch slots of the largest.
        largest_segments: frames of the longest video; 1 of an image.
    """

    tokens: int
    items: int
    patches: int
    segments: int
    largest_patches: int
    largest_segments: int

    def in_row(self) -> RowSize:
        """What it takes of a packed row."""
        return RowSize(self.tokens, 1, self.patches, self.segments)


def budget_of(
    sizes: Iterable[SampleSize],
    *,
    batch_size: int,
    pad_to_multiple_of: int = 64,
    images_multiple_of: int = 1,
) -> Budget:
    """The least budget with which any `batch_size` samples of these sizes fit one batch shape.

    Args:
        sizes: of each sample, as `VisionLanguageProcessor.size` gives it.
        batch_size: rows of a batch.
        pad_to_multiple_of: `max_length` is a multiple of it.
        images_multiple_of: `max_images` is a multiple of it.

    Raises:
        ValueError: there are no samples.
    """
    sizes = list(sizes)
    if not sizes:
        raise ValueError("a budget needs at least one sample")
    tokens, items, _, _, patches, segments = zip(*sizes, strict=True)
    max_images = _multiple(sum(nlargest(batch_size, items)), images_multiple_of)
    return Budget(_multiple(max(tokens), pad_to_multiple_of), max_images, max(patches), max(segments))


def packing_budget_of(
    sizes: Iterable[SampleSize],
    *,
    batch_size: int,
    max_length: int,
    patch_multiple: int,
    pad_to_multiple_of: int = 64,
) -> Budget:
    """A budget for packed rows of `max_length` tokens, with room for patches that suits the samples.

    Args:
        sizes: of each sample.
        batch_size: rows of a batch.
        max_length: tokens of a row.
        patch_multiple: the family's; a row of patches is a multiple of it.
        pad_to_multiple_of: `max_length` is rounded up to a multiple of it.

    Raises:
        ValueError: there are no samples, or one has more tokens.
    """
    max_length = _multiple(max_length, pad_to_multiple_of)
    row = row_capacity([size.in_row() for size in sizes], tokens=max_length, patch_multiple=patch_multiple)
    return Budget(max_length, batch_size if row.patches else 0, row.patches, row.image_segments, row.samples)


class VisionLanguageProcessor:
    """Tokenizer, image processor and chat template of a model, and what makes batches with them.

    Attributes:
        family: the model family's part.
        max_seq_length: tokens of a sample at most, where a call does not say otherwise.
    """

    def __init__(self, family: FamilyProcessor, *, max_seq_length: int = 2048):
        if max_seq_length < 1:
            raise ValueError(f"max_seq_length={max_seq_length}: it must be at least 1")
        self.family = family
        self.max_seq_length = max_seq_length
        added = family.tokenizer.added_tokens_decoder.values()
        self._special_tokens = [token.content for token in added if token.special]

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, max_seq_length: int = 2048
    ) -> "VisionLanguageProcessor":
        """The processor of a Hugging Face directory.

        Raises:
            FileNotFoundError: `config.json`, or one of the processor's files, is missing.
            ValueError: the model's type is not supported, or its files contradict each other.
        """
        directory = Path(directory)
        family = family_of(json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"])
        config = family.config_class.from_pretrained(directory)
        return cls(family.processor(directory, config), max_seq_length=max_seq_length)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.family.tokenizer

    @property
    def image_processor(self) -> Any:
        """The image processor of the family; its `size` bounds the pixels of an image."""
        return self.family.image_processor

    def apply_chat_template(
        self,
        messages: Mapping[str, Any] | Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The conversation as text, or as tokens with image placeholders expanded.

        Args:
            messages: one conversation, see `read_messages`.
            add_generation_prompt: end with the head of the assistant's turn.
            tokenize: return token ids.

        Raises:
            ValueError: as `encode`.
        """
        if tokenize:
            sample = self.encode(messages, labels=False, add_generation_prompt=add_generation_prompt)
            return sample.input_ids.tolist()
        return self._render(self._read(messages, None).messages, add_generation_prompt)

    def encode(
        self,
        messages: Mapping[str, Any] | Sequence[Any],
        *,
        labels: bool = True,
        train_on: str = "responses",
        max_seq_length: int | None = None,
        truncation: bool = False,
        add_generation_prompt: bool = False,
        row: int | None = None,
    ) -> Sample:
        """Messages and images to one sample.

        Args:
            messages: one conversation or dataset row, see `read_messages`.
            labels: make labels; without, all are -100, as in a prompt.
            train_on: ``"responses"`` labels the assistant's turns, each with its end-of-turn token; ``"all"``
                labels all text. Image tokens never carry a label.
            max_seq_length: tokens at most; None: the processor's.
            truncation: cut text at the end instead of refusing a sample that is too long.
            add_generation_prompt: end with the head of the assistant's turn.
            row: index in the dataset, for errors.

        Raises:
            ValueError: naming the row and message: the messages are not valid, an image cannot be used, the
                sample is too long or would lose image tokens, or no token carries a label.
        """
        conversation = self._read(messages, row)
        where = conversation.where
        text = self._render(conversation.messages, add_generation_prompt)
        images = tuple(
            _located(picture.where, self.family.process_image, picture.image)
            for picture in conversation.images
        )
        videos = tuple(
            _located(video.where, self.family.process_video, video.frames, video.fps)
            for video in conversation.videos
        )
        bos = self.tokenizer.bos_token
        encoding = self.tokenizer(
            text,
            # As in transformers: a template that writes the first token itself does not get a second.
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
        )
        input_ids = np.array(encoding["input_ids"], np.int32)
        counts = _located(where, self.family.token_counts, input_ids, images, videos)
        if not labels:
            trained = np.zeros(len(input_ids), bool)
        elif train_on == "all":
            trained = np.ones(len(input_ids), bool)
        elif train_on == "responses":
            spans = _located(where, response_spans, conversation.messages, self._render, self._special_tokens)
            trained = tokens_in_spans(encoding["offset_mapping"], spans)
        else:
            raise ValueError(f"train_on={train_on!r} is not one of 'responses', 'all'")
        input_ids, trained = np.repeat(input_ids, counts), np.repeat(trained, counts)
        is_image = self.family.mm_token_type_ids(input_ids) > 0
        limit = self.max_seq_length if max_seq_length is None else max_seq_length
        if len(input_ids) > limit:
            found = (
                f"{where}: {len(input_ids)} tokens ({is_image.sum()} of images) exceed max_seq_length={limit}"
            )
            if not truncation:
                raise ValueError(
                    f"{found}. Raise max_seq_length, shrink the images (processor.image_processor.size), or "
                    "cut text with truncation=True"
                )
            if is_image[limit:].any():
                raise ValueError(f"{found}: cutting it would lose image tokens")
            input_ids, trained, is_image = input_ids[:limit], trained[:limit], is_image[:limit]
        trained &= ~is_image
        # The first token has no predecessor to be predicted from.
        if labels and not trained[1:].any():
            raise ValueError(
                f"{where}: no token carries a label; its {len(input_ids)} tokens hold no assistant's turn"
            )
        return Sample(input_ids, make_labels(input_ids, trained), images, videos)

    def budget(
        self,
        samples: Iterable[Sample],
        *,
        batch_size: int,
        pad_to_multiple_of: int = 64,
        packing: bool = False,
        max_length: int | None = None,
    ) -> Budget:
        """The least budget with which any `batch_size` of the samples fit one batch shape.

        Args:
            samples: all that there are.
            batch_size: rows of a batch.
            pad_to_multiple_of: `max_length` is a multiple of it.
            packing: rows hold several samples; the room for their patches is chosen so that little of it is
                left, see `vlmlora.data.packing.row_capacity`.
            max_length: tokens of a packed row; None: the processor's `max_seq_length`.

        Raises:
            ValueError: there are no samples, or with `packing` one does not fit a row.
            NotImplementedError: the family does not pack.
        """
        sizes = map(self.size, samples)
        if not packing:
            return budget_of(sizes, batch_size=batch_size, pad_to_multiple_of=pad_to_multiple_of)
        self.check_packing()
        length = self.max_seq_length if max_length is None else max_length
        return packing_budget_of(
            sizes,
            batch_size=batch_size,
            max_length=length,
            patch_multiple=self.family.patch_multiple,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def size(self, sample: Sample) -> SampleSize:
        """What a sample takes of a batch."""
        items = (*sample.images, *sample.videos)
        patches, segments = (
            [count(item) for item in items] for count in (self.family.num_patches, self.family.num_segments)
        )
        largest = max(patches, default=0), max(segments, default=0)
        return SampleSize(len(sample), len(items), sum(patches), sum(segments), *largest)

    def check_packing(self) -> None:
        """Whether rows may hold several samples.

        Raises:
            NotImplementedError: the family's tokens would not stay apart; the message says why.
        """
        if self.family.why_not_packed is not None:
            raise NotImplementedError(
                f"rows that hold several samples are not supported: {self.family.why_not_packed}; "
                "put one sample into a row (packing=False)"
            )

    def collate(
        self,
        samples: Sequence[Sample],
        budget: Budget | None = None,
        *,
        batch_size: int | None = None,
        pad_to_multiple_of: int = 64,
        first_image_row: int = 0,
    ) -> dict[str, np.ndarray]:
        """Samples to a batch, one a row, padded on the right; images and videos one a row of patches.

        Args:
            samples: at most `batch_size`; none at all only where that and `budget.max_length` are given.
            budget: sizes of the batch. Those left open are the batch's own: tokens rounded up to
                `pad_to_multiple_of`, images and patches to within a quarter, so that few shapes occur.
            batch_size: rows; those without a sample are padding and carry no label. None: one for each
                sample.
            pad_to_multiple_of: see `budget`.
            first_image_row: where this batch is one process's share of a larger one, the number of its first
                row of patches there.

        Returns:
            `input_ids`, `attention_mask` (1, and 0 for padding) and `labels` ``[batch, tokens]`` int32, and
            what the family adds for its model.

        Raises:
            ValueError: there are no samples, or they exceed the budget.
        """
        budget = budget or Budget()
        rows = len(samples) if batch_size is None else batch_size
        if len(samples) > rows:
            raise ValueError(f"{len(samples)} samples for a batch of {rows} rows; needed {rows} at most")
        if not (samples or (rows and budget.max_length)):
            raise ValueError("no sample to collate; a batch without any needs batch_size and max_length")
        longest = max(map(len, samples), default=0)
        tokens = budget.max_length or _multiple(longest, pad_to_multiple_of)
        if longest > tokens:
            raise ValueError(f"a sample of {longest} tokens exceeds the batch's max_length={tokens}")
        items = [item for sample in samples for item in (*sample.images, *sample.videos)]
        image_rows, patches = budget.max_images, budget.max_patches
        if image_rows is None:
            image_rows = _bucket(len(items))
        if patches is None:
            patches = self._patches(max(map(self.family.num_patches, items), default=0))
        batch = self._place([[sample] for sample in samples], rows, tokens)
        family = self.family.collate(
            batch["input_ids"],
            batch["attention_mask"],
            [sample.images for sample in samples],
            [sample.videos for sample in samples],
            image_rows=image_rows,
            patches=patches,
            image_segments=budget.max_image_segments,
            first_image_row=first_image_row,
        )
        return {**batch, **family}

    def collate_packed(
        self,
        rows: Sequence[Sequence[Sample]],
        budget: Budget | None = None,
        *,
        batch_size: int | None = None,
        pad_to_multiple_of: int = 64,
        first_image_row: int = 0,
    ) -> dict[str, np.ndarray]:
        """Rows of several samples each to a batch; a row's images and videos share a row of patches.

        Samples stay apart: positions begin anew with each, attention sees only its own, and no token is
        predicted from another sample's. `vlmlora.data.packing.pack` says which samples share a row.

        Args:
            rows: samples of each row, at most `batch_size` rows.
            budget: sizes of the batch; those left open are the batch's own, rounded up.
            batch_size, pad_to_multiple_of, first_image_row: as for `collate`.

        Returns:
            What `collate` does, `segment_ids` ``[batch, tokens]``, from 1 and 0 for padding, and
            `segment_offsets` ``[batch, max_segments + 1]``, see `vlmlora.nn.segments.Segments`.

        Raises:
            ValueError: there are no samples, or a row exceeds the budget; the message names the row.
            NotImplementedError: the family does not pack.
        """
        self.check_packing()
        budget = budget or Budget()
        count = len(rows) if batch_size is None else batch_size
        if len(rows) > count or not (any(rows) or (count and budget.max_length)):
            raise ValueError(f"{len(rows)} rows of samples for a batch of {count} rows; needed 1 to {count}")
        rows = [*rows, *[[]] * (count - len(rows))]
        lengths = [[len(sample) for sample in row] for row in rows]
        longest = max(map(sum, lengths))
        tokens = budget.max_length or _multiple(longest, pad_to_multiple_of)
        for row, mine in enumerate(lengths):
            if sum(mine) > tokens:
                raise ValueError(
                    f"row {row} of the batch: its {len(mine)} samples of {sum(mine)} tokens exceed "
                    f"max_length={tokens}"
                )
        images, videos = (
            [[item for sample in row for item in getattr(sample, kind)] for row in rows]
            for kind in ("images", "videos")
        )
        slots = [sum(map(self.family.num_patches, (*a, *b))) for a, b in zip(images, videos, strict=True)]
        image_rows, patches = budget.max_images, budget.max_patches
        if image_rows is None:
            image_rows = count if any(slots) or patches else 0
        if image_rows not in (0, count):
            raise ValueError(
                f"max_images={image_rows} rows of patches for {count} rows of tokens; a packed row of tokens "
                "has one of its own, or with max_images=0 none"
            )
        batch = self._place(rows, count, tokens)
        segment_ids = np.zeros_like(batch["input_ids"])
        for row, mine in enumerate(lengths):
            segment_ids[row, : sum(mine)] = np.repeat(np.arange(len(mine)) + 1, mine)
        family = self.family.collate(
            batch["input_ids"],
            batch["attention_mask"],
            images,
            videos,
            image_rows=image_rows,
            patches=self._patches(max(slots)) if patches is None else patches,
            image_segments=budget.max_image_segments,
            first_image_row=first_image_row,
            lengths=lengths,
        )
        most = budget.max_segments
        if most is None:
            most = _bucket(max(map(len, lengths)))
        offsets = segment_offsets(lengths, most, "samples")
        return {**batch, "segment_ids": segment_ids, "segment_offsets": offsets, **family}

    def _place(self, rows: Sequence[Sequence[Sample]], count: int, tokens: int) -> dict[str, np.ndarray]:
        """Tokens, labels and mask of `count` rows of samples, one after another."""
        pad = self.tokenizer.pad_token_id
        input_ids = np.full((count, tokens), 0 if pad is None else pad, np.int32)
        labels = np.full((count, tokens), IGNORE_INDEX, np.int32)
        attention_mask = np.zeros((count, tokens), np.int32)
        for row, samples in enumerate(rows):
            start = 0
            for sample in samples:
                where = slice(start, start + len(sample))
                input_ids[row, where] = sample.input_ids
                labels[row, where] = sample.labels
                attention_mask[row, where] = 1
                start += len(sample)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _patches(self, slots: int) -> int:
        """Patch slots of a row that has to hold so many, at least one of the family's units."""
        unit = self.family.patch_multiple
        return _bucket(-(-max(slots, 1) // unit)) * unit

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        """Text of one row of tokens."""
        return self.tokenizer.decode(np.asarray(token_ids).tolist(), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> list[str]:
        """Text of every row of tokens."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in token_ids]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer, image processor settings and chat template, as transformers loads them."""
        self.family.save_pretrained(directory)

    def _read(self, messages: Any, row: int | None) -> Conversation:
        return read_messages(messages, row=row, placeholders=self.family.placeholders.values())

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.family.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )


def _located(where: str, function: Any, *args: Any) -> Any:
    """Call `function`; its ValueError names `where`."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _bucket(n: int) -> int:
    """`n` rounded up to one of four sizes an octave."""
    return _multiple(n, 2 ** max(0, n.bit_length() - 3))
