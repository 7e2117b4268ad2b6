"""A picture of a line of text, and the conversation that asks for it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

__all__ = ["CELL", "PROMPT", "TextImage", "reading_messages"]

CELL = 16
"""Image sides are multiples of this many pixels: one merged vision token of the bundled model."""
PROMPT = "Read the text."
"""The question that the bundled model is asked."""


@dataclass(frozen=True)
class TextImage:
    """A picture of a line of text.

    Attributes:
        image: RGB pixels, `uint8` of shape (height, width, 3); both sides are multiples of `CELL`.
        text: The string that it shows.
    """

    image: UInt8[np.ndarray, "height width 3"]
    text: str


def reading_messages(sample: TextImage, *, prompt: str = PROMPT, answer: bool) -> list[dict[str, Any]]:
    """The conversation about one picture, in the usual message form.

    Args:
        sample: The picture and its text.
        prompt: The user's question.
        answer: Whether the assistant's turn with the text follows the question, as in training.

    Returns:
        One user message with an image and a text part, then the assistant's if `answer`.
    """
    question = [{"type": "image", "image": Image.fromarray(sample.image)}, {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": sample.text}]})
    return messages
