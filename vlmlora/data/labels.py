"""Answer-only labels, derived from the chat template."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

IGNORE_INDEX = -100
"""Label of a token that the loss leaves out."""


def response_spans(
    messages: Sequence[dict[str, Any]],
    render: Callable[[Sequence[dict[str, Any]], bool], str],
    special_tokens: Sequence[str],
) -> list[tuple[int, int]]:
    """Character ranges of the assistant's turns in the rendered conversation.

    A turn starts where the generation prompt of the messages before it ends, so that training sees what
    generation will see, and reaches through its end-of-turn token; blank text that the template writes after
    that token is not part of it. A template without such a token ends a turn where the rendered prefix ends.

    Args:
        messages: the conversation.
        render: ``render(messages, add_generation_prompt)`` applies the chat template.
        special_tokens: the tokenizer's, one of which may end a turn.

    Raises:
        ValueError: the conversation up to a turn does not render to a prefix of the whole conversation.
    """
    text = render(messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ValueError("message 0 is the assistant's: a conversation must begin with a prompt")
        before, through = render(messages[:i], True), render(messages[: i + 1], False)
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"message {i}: the chat template renders the conversation up to the assistant's turn "
                "otherwise than within the whole, so that the turn cannot be found; use a template that only "
                "appends, or train_on='all'"
            )
        turn = through[len(before) :]
        ended = turn.rstrip()
        if ended.endswith(tuple(special_tokens)):
            turn = ended
        spans.append((len(before), len(before) + len(turn)))
    return spans


def tokens_in_spans(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> Bool[np.ndarray, " tokens"]:
    """Which tokens begin within a span.

    A token that begins before it, joining the prompt's last characters to the answer's first, is left out:
    generation is given those characters.

    Args:
        offsets: characters of every token, from the tokenizer.
        spans: character ranges.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    inside = np.zeros(len(starts), bool)
    for start, end in spans:
        inside |= (starts >= start) & (starts < end)
    return inside & (ends > starts)


def make_labels(
    input_ids: Int[np.ndarray, " tokens"], trained: Bool[np.ndarray, " tokens"]
) -> Int[np.ndarray, " tokens"]:
    """`input_ids` where the loss is to read them, `IGNORE_INDEX` elsewhere; not shifted."""
    return np.where(trained, input_ids, IGNORE_INDEX).astype(np.int32)
