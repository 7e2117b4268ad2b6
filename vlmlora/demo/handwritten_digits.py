"""Strings of real handwritten digits, composed from scikit-learn's copy of the UCI optical digits.

The 1797 pictures of 8×8 pixels (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998)
are split once into training and test pictures; a string only ever holds digits of one split.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlmlora.demo.text_image import CELL, TextImage

__all__ = ["HandwrittenDigits", "compose_digits", "handwritten_samples", "load_handwritten_digits"]

HEIGHT = 32
"""Height of every picture in pixels."""
MAX_DIGITS = 4
"""Longest string in digits."""
_TEST_DIGITS = 360
_SPLIT_SEED = 20


@dataclass(frozen=True)
class HandwrittenDigits:
    """Pictures of single digits.

    Attributes:
        images: Ink in [0, 1], float32 of shape (digits, 8, 8).
        labels: The digit that each shows, 0 to 9.
        source: Index of each picture in scikit-learn's data set.
    """

    images: Float[np.ndarray, "digits 8 8"]
    labels: Int[np.ndarray, "digits"]
    source: Int[np.ndarray, "digits"]


@lru_cache(maxsize=2)
def load_handwritten_digits(split: str) -> HandwrittenDigits:
    """The digits of one split: 1437 for training, 360 for the test, no picture in both.

    Raises:
        ValueError: If `split` is neither.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r} and has to be 'train' or 'test'")
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    chosen = order[:_TEST_DIGITS] if split == "test" else order[_TEST_DIGITS:]
    images = (digits.images[chosen] / 16).astype(np.float32)
    return HandwrittenDigits(images, digits.target[chosen].astype(np.int64), chosen)


def compose_digits(
    digits: HandwrittenDigits, chosen: Int[np.ndarray, "length"], rng: np.random.Generator
) -> TextImage:
    """Writes digits side by side, dark ink on light paper.

    Args:
        digits: Where the pictures come from.
        chosen: Indices into `digits`, 1 to `MAX_DIGITS` of them, in reading order.
        rng: Source of sizes, spacing, places and shades.

    Returns:
        A picture `HEIGHT` pixels high and a multiple of `CELL` wide, and the digits as a string.

    Raises:
        ValueError: If there are no digits or more than `MAX_DIGITS`.
    """
    if not 1 <= len(chosen) <= MAX_DIGITS:
        raise ValueError(f"compose_digits got {len(chosen)} digits and needs 1 to {MAX_DIGITS}")
    boxes = []
    for index in chosen:
        size = int(rng.integers(23, 29))
        glyph = Image.fromarray(digits.images[index]).resize((size, size), Image.Resampling.BICUBIC)
        ink = np.clip(np.asarray(glyph), 0, 1)
        columns = np.flatnonzero(ink.max(axis=0) > 0.15)
        boxes.append(ink[:, columns[0] : columns[-1] + 1])
    gaps = rng.integers(2, 6, len(boxes) - 1)
    ink_width = sum(box.shape[1] for box in boxes) + int(gaps.sum())
    width = max(HEIGHT, -(-(ink_width + 4) // CELL) * CELL)
    coverage = np.zeros((HEIGHT, width), np.float32)
    x = int(rng.integers(1, width - ink_width))
    for box, gap in zip(boxes, [*gaps, 0], strict=True):
        y = int(rng.integers(1, HEIGHT - box.shape[0]))
        coverage[y : y + box.shape[0], x : x + box.shape[1]] = box
        x += box.shape[1] + int(gap)
    ink, paper = rng.uniform(0, 70), rng.uniform(215, 255)
    shade = np.rint(paper + (ink - paper) * coverage).astype(np.uint8)
    return TextImage(np.repeat(shade[..., None], 3, axis=-1), "".join(str(digits.labels[i]) for i in chosen))


def handwritten_samples(split: str, count: int, *, seed: int) -> list[TextImage]:
    """Draws strings of one to four handwritten digits, lengths in equal parts.

    Args:
        split: Which digits to use.
        count: How many strings.
        seed: Fixes digits, sizes, spacing and shades.
    """
    digits = load_handwritten_digits(split)
    rng = np.random.default_rng([seed, len(digits.labels)])
    chosen = (rng.integers(0, len(digits.labels), 1 + i % MAX_DIGITS) for i in range(count))
    return [compose_digits(digits, indices, rng) for indices in chosen]
