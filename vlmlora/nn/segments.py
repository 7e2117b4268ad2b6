"""Rows that hold several samples or images, of which each sees only itself."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "offsets"], meta_fields=["has_gaps"])
@dataclass(frozen=True)
class Segments:
    """What a row holds, one segment after another from its start, and padding after the last.

    `ids` say which token belongs to which segment; `offsets` say the same by where segments begin, with a
    static maximum of segments a row, as fused kernels ask for it. A batch brings both from where it is
    collated (`segment_offsets`), where too many segments are an error.

    Attributes:
        ids: the segment that a token belongs to, from 1; 0 marks padding.
        offsets: where each segment begins and, last, where the last one ends; those that there are not begin
            and end there. None: not known, and attention takes a dense mask.
        has_gaps: whether there may be padding within a segment's bounds.
    """

    ids: Int[Array, "rows tokens"]
    offsets: Int[Array, "rows bounds"] | None = None
    has_gaps: bool = False

    def runs(self) -> tuple[Int[Array, "rows max_runs"], Int[Array, "rows max_runs"]]:
        """First token and length of every segment and, last, of the padding after them.

        Together they hold each token of a row once.
        """
        tokens = self.ids.shape[1]
        bounds = jnp.pad(self.offsets, ((0, 0), (0, 1)), constant_values=tokens)
        return bounds[:, :-1], jnp.diff(bounds, axis=1)


def segment_offsets(
    lengths: Sequence[Sequence[int]], max_segments: int, what: str = "segments"
) -> Int32[np.ndarray, "rows bounds"]:
    """Where the segments of every row begin and end, as `Segments.offsets` has it.

    Args:
        lengths: of each row's segments.
        max_segments: segments that every row has room for.
        what: their name in errors.

    Raises:
        ValueError: a row has more.
    """
    offsets = np.zeros((len(lengths), max_segments + 1), np.int32)
    for row, mine in enumerate(lengths):
        if len(mine) > max_segments:
            raise ValueError(f"row {row} holds {len(mine)} {what}, its budget {max_segments}")
        ends = np.cumsum(mine, dtype=np.int32)
        offsets[row, 1 : len(mine) + 1] = ends
        offsets[row, len(mine) + 1 :] = ends[-1] if len(mine) else 0
    return offsets
