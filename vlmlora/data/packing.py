"""Which samples share a row, so that little of it is padding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BUFFER_SIZE = 4096
"""Samples that are packed at a time."""


class RowSize(NamedTuple):
    """What a sample takes of a packed row, or what there is of it.

    Attributes:
        tokens: of text, those that stand for images included.
        samples: one, or the most that share a row.
        patches: patch slots of all its images and videos.
        image_segments: what these consist of for attention: images, or a video's frames.
    """

    tokens: int
    samples: int
    patches: int
    image_segments: int


def pack(
    sizes: Sequence[RowSize],
    capacity: RowSize,
    *,
    shuffle: bool = True,
    seed: int = 3407,
    buffer_size: int = BUFFER_SIZE,
) -> list[list[int]]:
    """Samples to rows, none of which exceeds the capacity in anything.

    Best fit, the largest first (https://en.wikipedia.org/wiki/Bin_packing_problem): of the rows that have
    room for a sample, the one that is left with the least. Samples are taken from the dataset `buffer_size`
    at a time; rows with room stay open for those that follow.

    Args:
        sizes: of every sample.
        capacity: of a row.
        shuffle: fill the buffer at random; without, in the dataset's order.
        seed: of the order.
        buffer_size: samples that are packed at a time.

    Returns:
        The samples of each row, in the order in which they were taken. The same for the same arguments.

    Raises:
        ValueError: a sample exceeds the capacity by itself; the message names it by its place in `sizes`.
    """
    if not sizes:
        return []
    limits = np.array(capacity, np.int64)
    needed = np.array(sizes, np.int64)
    _check(needed, limits)
    order = np.random.default_rng(seed).permutation(len(sizes)) if shuffle else np.arange(len(sizes))
    # A resource that rows have none of is used by no sample.
    shares = needed / np.maximum(limits, 1)
    least = needed.min(axis=0)
    rows: list[list[int]] = []
    open_rows, free = np.zeros(0, np.int64), np.zeros((0, len(limits)), np.int64)
    for first in range(0, len(order), buffer_size):
        taken = order[first : first + buffer_size]
        # Room for all of them: a row each, at worst.
        new = np.arange(len(rows), len(rows) + len(taken))
        is_open = (free >= least).all(axis=1)
        open_rows = np.concatenate([open_rows[is_open], new])
        free = np.concatenate([free[is_open], np.tile(limits, (len(taken), 1))])
        begun = len(open_rows) - len(taken)
        for sample in taken[np.argsort(-shares[taken].max(axis=1), kind="stable")]:
            left = free[:begun] - needed[sample]
            fits = np.flatnonzero((left >= 0).all(axis=1))
            if len(fits):
                place = fits[np.argmin((left[fits] / np.maximum(limits, 1)).sum(axis=1))]
            else:
                place, begun = begun, begun + 1
                rows.append([])
            free[place] -= needed[sample]
            rows[open_rows[place]].append(int(sample))
        open_rows, free = open_rows[:begun], free[:begun]
    place_of = np.empty(len(order), np.int64)
    place_of[order] = np.arange(len(order))
    return [sorted(row, key=place_of.__getitem__) for row in rows]


def _check(needed: np.ndarray, limits: np.ndarray) -> None:
    for sample, resource in np.argwhere(needed > limits)[:1]:
        name = RowSize._fields[resource].replace("_", " ")
        raise ValueError(
            f"row {sample}: it takes {needed[sample, resource]} {name}, of which a packed row holds "
            f"{limits[resource]}; raise the budget"
        )


# Of a token's work, what that of a patch is: the towers' parameters that they pass through, about.
_PATCH_WORK = 1 / 8
# Rows hold this many times the samples, and the frames, of an average row.
_UNEVENNESS = 3
# Room for patches, in that of a row with the average number of patches to a token.
_PATCH_ROOM = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)


def row_capacity(
    sizes: Sequence[RowSize], *, tokens: int, patch_multiple: int = 1, seed: int = 3407
) -> RowSize:
    """A row of this many tokens, with room for patches and segments that suits the samples.

    Of several sizes for the patches it is the one with which the samples, packed, take the least work.

    Args:
        sizes: of the samples.
        tokens: of a row.
        patch_multiple: the number of patches is a multiple of it.
        seed: of the samples that are tried, where there are many.

    Raises:
        ValueError: there are no samples, or one has more tokens.
    """
    if not sizes:
        raise ValueError("a budget needs at least one sample")
    needed = np.array(sizes, np.int64)
    _check(needed[:, :1], np.array([tokens]))
    means, most = needed.mean(axis=0), needed.max(axis=0)
    samples_of_row = max(1.0, tokens / means[0])
    samples = int(np.ceil(_UNEVENNESS * samples_of_row))
    image_segments = max(int(most[3]), int(np.ceil(_UNEVENNESS * samples_of_row * means[3])))
    tried = np.random.default_rng(seed).permutation(len(sizes))[:BUFFER_SIZE]
    best, least_work = None, np.inf
    for room in _PATCH_ROOM:
        patches = max(most[2], room * samples_of_row * means[2])
        patches = int(np.ceil(patches / patch_multiple)) * patch_multiple
        capacity = RowSize(tokens, samples, patches, image_segments)
        rows = pack([sizes[i] for i in tried], capacity, shuffle=False)
        work = len(rows) * (tokens + _PATCH_WORK * patches)
        if work < least_work:
            best, least_work = capacity, work
    return best
