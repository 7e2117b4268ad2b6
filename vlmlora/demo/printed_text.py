"""Images of printed text: what the bundled model learned to read.

Every sample follows from `(seed, index)` alone, so any worker can draw any sample. A string belongs to one of
two splits by a checksum of its characters (`is_held_out`), so no string rendered for training is ever asked
in the held-out evaluation.
"""

import io
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vlmlora.demo.text_image import CELL, TextImage
from vlmlora.demo.words import WORDS

__all__ = ["is_held_out", "matplotlib_fonts", "printed_sample", "random_text", "render_text"]

MIN_WIDTH, MAX_WIDTH = 32, 192
"""Narrowest and widest image in pixels."""
MAX_LENGTH = 14
"""Longest string in characters."""

# Codes mix letters and digits, so the look-alikes O/0, I/1, S/5, Z/2 and B/8 stay out of them.
_CODE_ALPHABET = "ACDEFGHJKLMNPQRTUVWXY34679"
# Letters whose capital has another shape: a word needs one, or 'cows' and 'COWS' could not be told apart.
_CASE_TELLS = set("abdefghmnqrt")
_ONSETS = [
    *"bcdfghjklmnprstvwxyz",
    "qu",
    "bl",
    "br",
    "ch",
    "cl",
    "cr",
    "dr",
    "fl",
    "fr",
    "gl",
    "gr",
    "pl",
    "pr",
]
_ONSETS += ["sh", "sl", "sp", "st", "th", "tr"]
_VOWELS = [*"aeiouaeio", "ai", "ea", "ee", "io", "oa", "oo", "ou"]
# Short strings come more often: they are learnt first, and the longer ones through them.
_DIGIT_LENGTHS = (0.2, 0.16, 0.15, 0.15, 0.1, 0.08, 0.08, 0.08)
_CODAS = ["", "", "", "b", "ck", "d", "f", "g", "l", "m", "n", "ng", "p", "r", "s", "st", "t", "x", "z"]


def is_held_out(text: str) -> bool:
    """Tells whether a string belongs to the held-out split (one in ten).

    Strings of one or two characters never do: there are too few of them to spare any.
    """
    return len(text) > 2 and zlib.crc32(text.encode()) % 10 == 0


def matplotlib_fonts() -> tuple[Path, ...]:
    """Paths of the text fonts in matplotlib's wheel: printed text on a machine without other fonts."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(sorted(p for p in folder.glob("DejaVuS*.ttf") if "Display" not in p.name))


def random_text(rng: np.random.Generator) -> str:
    """Draws a string of 1 to `MAX_LENGTH` printable ASCII characters.

    Digit strings of 1 to 8 characters are a third of the draws; the rest are words, invented words, pairs of
    words, dates, times, prices, percentages, telephone numbers, decimals and codes. Characters that many
    fonts draw alike never meet in one string where context could not tell them apart.
    """
    kind = rng.random()
    if kind < 0.34:
        return _digits(rng, int(rng.choice(8, p=_DIGIT_LENGTHS)) + 1)
    if kind < 0.50:
        return _number(rng)
    if kind < 0.66:
        return _cased(rng, WORDS[rng.integers(len(WORDS))])
    if kind < 0.80:
        return _cased(rng, _invented_word(rng))
    if kind < 0.87:
        return _word_pair(rng)
    if kind < 0.97:
        return _code(rng)
    word = WORDS[rng.integers(len(WORDS))][:10]
    return f"{_cased(rng, word)} {_digits(rng, int(rng.integers(1, 4)))}"


def _digits(rng: np.random.Generator, length: int) -> str:
    return "".join(map(str, rng.integers(0, 10, length)))


def _number(rng: np.random.Generator) -> str:
    match rng.integers(9):
        case 0:
            return f"{rng.integers(1900, 2100)}-{rng.integers(1, 13):02}-{rng.integers(1, 29):02}"
        case 1:
            return f"{rng.integers(1, 29):02}/{rng.integers(1, 13):02}/{rng.integers(100):02}"
        case 2:
            return f"{rng.integers(24):02}:{rng.integers(60):02}"
        case 3:
            return f"${rng.integers(1000)}.{rng.integers(100):02}"
        case 4:
            return f"{rng.integers(101)}%"
        case 5:
            return f"{rng.integers(100, 1000)}-{rng.integers(10000):04}"
        case 6:
            return f"{rng.integers(100)}.{_digits(rng, int(rng.integers(1, 5)))}"
        case 7:
            return f"{rng.integers(1, 1000)},{rng.integers(1000):03}"
        case _:
            return f"#{_digits(rng, int(rng.integers(1, 6)))}"


def _invented_word(rng: np.random.Generator) -> str:
    word = ""
    for _ in range(rng.integers(1, 4)):
        word += _ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(len(_VOWELS))]
        word += _CODAS[rng.integers(len(_CODAS))]
    return word[:10]


def _cased(rng: np.random.Generator, word: str) -> str:
    if not _CASE_TELLS.intersection(word):
        word = (word + "ean")[-10:]
    case = rng.integers(3)
    return (word, word.capitalize(), word.upper())[case]


def _word_pair(rng: np.random.Generator) -> str:
    first, second = (WORDS[i] for i in rng.integers(len(WORDS), size=2))
    pair = f"{first[:6]} {second[:7]}"
    return _cased(rng, pair)


def _code(rng: np.random.Generator) -> str:
    letters = "".join(_CODE_ALPHABET[i] for i in rng.integers(len(_CODE_ALPHABET), size=rng.integers(2, 9)))
    if len(letters) > 4 and rng.random() < 0.4:
        cut = int(rng.integers(2, len(letters) - 1))
        return f"{letters[:cut]}-{letters[cut:]}"
    return letters


@lru_cache(maxsize=16384)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine is in every build of Pillow, so pixels do not depend on the machine.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def render_text(text: str, font: Path, rng: np.random.Generator) -> UInt8[np.ndarray, "height width 3"]:
    """Draws one line of text with random size, place, rotation, colours, background and wear.

    Args:
        text: Printable ASCII, at most `MAX_LENGTH` characters.
        font: A TrueType or OpenType file.
        rng: Source of every random choice.

    Returns:
        RGB pixels (height, width, 3). The height is 32, or sometimes 48 or 64; the width is a multiple of
        `CELL` from `MIN_WIDTH` to `MAX_WIDTH`, and up to `MAX_WIDTH // 2` for the taller ones.
    """
    height, mask = _place(text, font, rng)
    ink, paper = _colours(rng)
    background = _background(rng, paper, height, mask.shape[1])
    coverage = mask[..., None]
    image = background * (1 - coverage) + np.asarray(ink, np.float32) * coverage
    return _wear(rng, image)


def _place(text: str, font: Path, rng: np.random.Generator) -> tuple[int, Float[np.ndarray, "height width"]]:
    """Coverage of the ink in [0, 1] on a canvas that holds the whole text."""
    height = 32 if rng.random() < 0.85 else int(rng.choice([48, 64]))
    widest = MAX_WIDTH if height == 32 else MAX_WIDTH // 2
    size = int(rng.integers(13, 27 if height == 32 else 34))
    stroke = int(rng.random() < 0.06 and size > 18)
    angle = float(rng.normal(0, 1.5)) if rng.random() < 0.4 else 0.0
    while True:
        left, top, right, bottom = _font(font, size).getbbox(text, stroke_width=stroke)
        ink_width, ink_height = right - left, bottom - top
        slope = abs(np.sin(np.radians(angle)))
        need_width = ink_width + slope * ink_height + 4
        need_height = ink_height + slope * ink_width + 2
        if (need_width <= widest and need_height <= height) or size <= 9:
            break
        size -= 1
        stroke = 0
        angle *= 0.8
    slack = CELL * rng.geometric(0.55) - CELL + rng.integers(0, CELL)
    width = int(np.clip(-(-(need_width + slack) // CELL) * CELL, MIN_WIDTH, widest))
    x = (width - ink_width) / 2 + rng.uniform(-0.5, 0.5) * max(0.0, width - need_width)
    y = (height - ink_height) / 2 + rng.uniform(-0.5, 0.5) * max(0.0, height - need_height)
    canvas = Image.new("L", (width, height), 0)
    position = (round(x) - left, round(y) - top)
    ImageDraw.Draw(canvas).text(position, text, fill=255, font=_font(font, size), stroke_width=stroke)
    if angle:
        centre = (round(x) + ink_width / 2, round(y) + ink_height / 2)
        canvas = canvas.rotate(angle, Image.Resampling.BICUBIC, center=centre)
    return height, np.asarray(canvas, np.float32) / 255


def _colours(rng: np.random.Generator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ink and paper whose luminances differ by at least 80 of 255."""
    if rng.random() < 0.3:
        ink, paper = rng.integers(0, 60), rng.integers(200, 256)
        pair = ((float(ink),) * 3, (float(paper),) * 3)
        return pair if rng.random() < 0.7 else pair[::-1]
    while True:
        ink, paper = rng.uniform(0, 255, (2, 3))
        if abs((ink - paper) @ (0.299, 0.587, 0.114)) >= 80:
            return tuple(ink), tuple(paper)


def _background(
    rng: np.random.Generator, paper: tuple[float, ...], height: int, width: int
) -> Float[np.ndarray, "height width 3"]:
    image = np.broadcast_to(np.asarray(paper, np.float32), (height, width, 3))
    kind = rng.random()
    if kind < 0.5:
        return image
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    if kind < 0.75:
        phase = rng.uniform(0, 2 * np.pi)
        ramp = np.cos(phase) * (columns / width - 0.5) + np.sin(phase) * (rows / height - 0.5)
        return image + ramp[..., None] * rng.uniform(-50, 50, 3).astype(np.float32)
    if kind < 0.88:
        spacing, slant = rng.uniform(4, 14), rng.uniform(-1, 1)
        stripes = np.sin((rows + slant * columns) * (2 * np.pi / spacing)) * rng.uniform(3, 14)
        return image + stripes[..., None].astype(np.float32)
    coarse = rng.normal(0, rng.uniform(6, 20), (height // 8, width // 8)).astype(np.float32)
    blotches = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return image + np.asarray(blotches)[..., None]


def _wear(
    rng: np.random.Generator, image: Float[np.ndarray, "height width 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Blur, low resolution, sensor noise and JPEG artefacts, each now and then."""
    if rng.random() < 0.3:
        image = image + rng.normal(0, rng.uniform(2, 14), image.shape).astype(np.float32)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    kind = rng.random()
    if kind < 0.6:
        return pixels
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    if kind < 0.75:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    elif kind < 0.9:
        scale = rng.uniform(0.55, 0.95)
        small = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        picture = small.resize((width, height), Image.Resampling.BICUBIC)
    else:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(35, 91)))
        picture = Image.open(buffer)
    return np.array(picture)


def printed_sample(seed: int, index: int, fonts: Sequence[Path], *, held_out: bool = False) -> TextImage:
    """Sample `index` of the stream `seed`.

    Args:
        seed: Names the stream.
        index: Place in the stream, from 0; samples may be drawn in any order.
        fonts: Font files to choose from.
        held_out: Draw a string of the held-out split instead of one of the training split.

    Returns:
        The rendered string.

    Raises:
        ValueError: If `fonts` is empty.
    """
    if not fonts:
        raise ValueError("printed_sample got 0 fonts and needs at least 1; matplotlib_fonts() has some")
    rng = np.random.default_rng([seed, index])
    text = random_text(rng)
    while is_held_out(text) != held_out:
        text = random_text(rng)
    return TextImage(render_text(text, fonts[rng.integers(len(fonts))], rng), text)
