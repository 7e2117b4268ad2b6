"""Chat messages in the usual form, checked, with their images and videos read.

Both forms of the field are taken: images inside the messages (`{"type": "image", "image": ...}`), and bare
`{"type": "image"}` parts whose images stand in the sample's own `images` list.
"""

import base64
import binascii
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ROLES = ("system", "user", "assistant", "tool")
_IMAGE_KEYS = ("image", "url", "path", "base64", "bytes")
_VIDEO_KEYS = ("video", "url", "path")


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video.

    Attributes:
        frames: images, or ``[frames, height, width, 3]`` bytes.
        fps: frames per second of these frames; None where the sample does not say.
        where: the message that it stands in.
    """

    frames: list[Image.Image] | np.ndarray
    fps: int | float | None
    where: str


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and the message that it stands in."""

    image: Image.Image
    where: str


@dataclass(frozen=True, eq=False)
class Conversation:
    """Messages as a chat template takes them, and the images and videos in the order of their placeholders.

    Attributes:
        messages: image and video parts hold their type alone.
        images: the images.
        videos: the videos.
        where: the sample, as errors name it.
    """

    messages: list[dict[str, Any]]
    images: list[Picture]
    videos: list[Video]
    where: str


def read_messages(
    sample: Mapping[str, Any] | Sequence[Any],
    *,
    row: int | None = None,
    placeholders: Iterable[str] = (),
) -> Conversation:
    """Check the messages of one sample and read its images.

    Args:
        sample: messages, each ``{"role": ..., "content": str or parts}``, or a dataset's row
            ``{"messages": [...], "images": [...], "videos": [...]}``. A part is ``{"type": "text", "text":
            str}``, an image (see `load_image`) under the key `image`, `url`, `path`, `base64` or `bytes`, or
            a video ``{"type": "video", "video": frames, "fps": number}``, its frames images or one array.
            Keys with value None count as absent. An image or video part without a source takes the next of
            the row's lists.
        row: index in the dataset, for errors.
        placeholders: tokens that the chat template writes for images and videos, which no text may hold.

    Raises:
        ValueError: naming the row, the message and what is wrong with it: unknown role or type, missing
            text, an image that is absent, unreadable or too large, a placeholder in text, an image without a
            placeholder.
    """
    where = "sample" if row is None else f"row {row}"
    fields = sample if isinstance(sample, Mapping) else {"messages": sample}
    messages = fields.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        has_none = isinstance(sample, Mapping) and messages is None
        found = f"keys {sorted(fields)}" if has_none else reprlib.repr(messages)
        raise ValueError(f"{where}: needed a non-empty list under 'messages', found {found}")
    reader = _Reader(tuple(placeholders), list(fields.get("images") or ()), list(fields.get("videos") or ()))
    read = [reader.message(message, f"{where}, message {i}") for i, message in enumerate(messages)]
    for name, left in (("image", reader.spare_images), ("video", reader.spare_videos)):
        if left:
            raise ValueError(
                f"{where}: {len(left)} of its {name}s have no placeholder; "
                f'add a {{"type": "{name}"}} part to a message for each'
            )
    return Conversation(read, reader.images, reader.videos, where)


class _Reader:
    """Reads message after message, and hands out the sample's own images in order."""

    def __init__(self, placeholders: tuple[str, ...], spare_images: list[Any], spare_videos: list[Any]):
        self.placeholders = placeholders
        self.spare_images = spare_images
        self.spare_videos = spare_videos
        self.images: list[Picture] = []
        self.videos: list[Video] = []

    def message(self, message: Any, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: needed a dict with role and content, found {type(message).__name__}")
        fields = {key: value for key, value in message.items() if value is not None}
        if fields.get("role") not in ROLES:
            raise ValueError(f"{where}: role {fields.get('role')!r} is not one of {', '.join(ROLES)}")
        content = fields.get("content")
        if isinstance(content, str):
            return {**fields, "content": self.text(content, where)}
        if isinstance(content, Sequence):
            return {**fields, "content": [self.part(part, where) for part in content]}
        raise ValueError(f"{where}: content must be a string or a list of parts, found {content!r:.60}")

    def part(self, part: Any, where: str) -> dict[str, Any]:
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}: a part of the content must be a dict with a type, found {part!r:.60}")
        fields = {key: value for key, value in part.items() if value is not None}
        kind = fields.get("type")
        if kind == "text":
            if not isinstance(fields.get("text"), str):
                raise ValueError(f"{where}: a text part needs a string under 'text'")
            return {"type": "text", "text": self.text(fields["text"], where)}
        if kind == "image_url":
            url = fields.get("image_url")
            fields = {"type": "image", "url": url.get("url") if isinstance(url, Mapping) else url}
            kind = "image"
        if kind == "image":
            source = _source(fields, _IMAGE_KEYS, self.spare_images, where)
            self.images.append(Picture(_load(source, where), where))
            return {"type": "image"}
        if kind == "video":
            source = _source(fields, _VIDEO_KEYS, self.spare_videos, where)
            self.videos.append(_video(source, fields.get("fps"), where))
            return {"type": "video"}
        raise ValueError(f"{where}: type {kind!r} is not one of text, image, image_url, video")

    def text(self, text: str, where: str) -> str:
        for placeholder in self.placeholders:
            if placeholder in text:
                raise ValueError(
                    f"{where}: the text holds the placeholder {placeholder}, which no image belongs to; "
                    'put the image into the content as {"type": "image", "image": ...}'
                )
        return text


def _source(fields: Mapping[str, Any], keys: Sequence[str], spare: list[Any], where: str) -> Any:
    given = [key for key in keys if key in fields]
    if len(given) > 1:
        raise ValueError(f"{where}: one {fields['type']} is given twice, under {' and '.join(given)}")
    if given:
        return fields[given[0]]
    if not spare:
        raise ValueError(
            f"{where}: {fields['type']} placeholder without {fields['type']}; give it under one of "
            f"{', '.join(keys)}, or in the sample's list of {fields['type']}s"
        )
    return spare.pop(0)


def _video(source: Any, fps: Any, where: str) -> Video:
    if fps is not None and not (isinstance(fps, int | float) and fps > 0):
        raise ValueError(f"{where}: fps={fps!r} must be a positive number")
    if isinstance(source, np.ndarray):
        if source.ndim != 4 or source.shape[-1] != 3 or source.dtype != np.uint8:
            raise ValueError(
                f"{where}: a video must be uint8 [frames, height, width, 3], "
                f"found {source.dtype} {list(source.shape)}"
            )
        return Video(source, fps, where)
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return Video([_load(frame, where) for frame in source], fps, where)
    raise ValueError(
        f"{where}: video files are not decoded; give the frames, as a list of images or an array "
        f"[frames, height, width, 3], found {type(source).__name__}"
    )


def _load(source: Any, where: str) -> Image.Image:
    try:
        return load_image(source)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def load_image(source: Any) -> Image.Image:
    """Read an image completely.

    What is read from a file, bytes or base64 is turned upright by its EXIF orientation and converted to RGB,
    as `transformers.image_utils.load_image` does. A PIL image stays as it is, as in transformers'
    processors; the image processor converts its mode.

    Args:
        source: a PIL image, a path, the bytes of a file, base64 with or without a ``data:image/...;base64,``
            head, or the ``{"bytes": ..., "path": ...}`` of an undecoded `datasets` column.

    Raises:
        ValueError: the source is of another kind or a web address, or the image is absent, unreadable,
            truncated, empty, or above `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return _decode(source, "image")
    if isinstance(source, bytes):
        return _upright(_decode(BytesIO(source), f"image of {len(source)} bytes"))
    if isinstance(source, Path):
        source = str(source)
    if not isinstance(source, str):
        raise ValueError(
            f"an image must be a PIL image, path, bytes, base64 or data URL, found {type(source).__name__}"
        )
    if source.startswith(("http://", "https://")):
        raise ValueError(f"images are not fetched from the web; download {source:.120} and give its path")
    if source.startswith("data:"):
        head, _, data = source.partition(",")
        if not (head.startswith("data:image/") and head.endswith(";base64")):
            raise ValueError(f"needed a data URL that begins with data:image/...;base64, found {head:.60}")
        return _upright(_decode(BytesIO(_base64(data, "data URL")), "data URL"))
    if os.path.isfile(source):
        return _upright(_decode(source, source))
    missing = f"no such file: {source:.120}"
    return _upright(_decode(BytesIO(_base64(source, missing)), f"image ({missing}; read as base64)"))


def _base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} (nor is it base64: {error})") from error


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")


def _decode(source: Image.Image | str | BytesIO, name: str) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        width, height = image.size
        if width * height == 0:
            raise ValueError(f"it has no pixels, {width}x{height}")
        if limit is not None and width * height > limit:
            raise ValueError(
                f"{width}x{height} pixels may be a decompression bomb; "
                f"raise PIL.Image.MAX_IMAGE_PIXELS ({limit}) if it is meant"
            )
        image.load()
    # Pillow's plugins raise errors of many types on bad data.
    except Exception as error:
        raise ValueError(f"cannot read {name}: {error}") from error
    return image
