"""Which tile each number of tokens gets. Regenerate with ``python -m vlmlora_kernels.bench --sweep``."""

import dataclasses

from vlmlora_kernels.hopper.matvec import COLUMNS, Tuning

MULTIPROCESSORS = 132  # of an H100 or H200; a grid for another number is right, and slower.
SHARED_WORDS = 227 * 1024 // 4  # that a block may have
MOST_SPLITS = 15  # each may need a named barrier, and the block has one of the 16
_TABLE_WORDS = 34 * 256  # of the byte table and the code of nested scales


@dataclasses.dataclass(frozen=True)
class FewTokens:
    """A row of the table of fused products; see `hopper.matvec.Tuning`.

    Attributes:
        tokens: the most that take this row.
        row_tiles: times 16 rows in a group.
        warps: the most of a block.
        lookahead: loads of `x` under way.
        unit: blocks of 64 columns a load.
        stages: units of `x` in shared memory.
        cluster: the most blocks that share the columns of a band.
    """

    tokens: int
    row_tiles: int
    warps: int
    lookahead: int
    unit: int
    stages: int
    cluster: int


FEW_TOKENS = {
    "nf4": (
        FewTokens(tokens=4, row_tiles=1, warps=18, lookahead=1, unit=4, stages=0, cluster=1),
        FewTokens(tokens=16, row_tiles=2, warps=12, lookahead=1, unit=4, stages=2, cluster=4),
        FewTokens(tokens=32, row_tiles=2, warps=12, lookahead=1, unit=2, stages=2, cluster=4),
        FewTokens(tokens=64, row_tiles=2, warps=12, lookahead=1, unit=2, stages=2, cluster=4),
    ),
    "int8": (
        FewTokens(tokens=4, row_tiles=1, warps=18, lookahead=1, unit=4, stages=0, cluster=1),
        FewTokens(tokens=16, row_tiles=2, warps=12, lookahead=2, unit=2, stages=0, cluster=1),
        FewTokens(tokens=32, row_tiles=2, warps=12, lookahead=1, unit=2, stages=2, cluster=4),
        FewTokens(tokens=64, row_tiles=2, warps=12, lookahead=1, unit=2, stages=2, cluster=4),
    ),
}
"""By the decoder's name, for ascending numbers of tokens."""

FUSED_TOKENS = FEW_TOKENS["nf4"][-1].tokens
"""The most tokens that the fused kernels take; beyond it, decoding and then multiplying is faster."""


def matvec_tuning(tokens: int, shape: tuple[int, int], kind: str) -> Tuning:
    """The tile of the fused product of this many tokens and a weight of `shape` [out, in]."""
    return cut(next(row for row in FEW_TOKENS[kind] if tokens <= row.tokens), tokens, shape)


def cut(row: FewTokens, tokens: int, shape: tuple[int, int]) -> Tuning:
    """Fit a row of the table to a weight of `shape` [out, in]: one wave of blocks where that is possible.

    Of the sizes of cluster it takes the one with the fewest cycles by a rough count. For each 64 columns the
    load and store unit takes 35 for 16 rows, and 8 or 16 for 8 tokens of `x` from shared memory or the cache;
    43 pass while these come from the L2 cache.
    """
    out_features, pieces = shape[0], shape[1] // COLUMNS
    tiles = -(-out_features // (16 * row.row_tiles))
    token_tiles = -(-tokens // 8)
    fits = []
    for cluster in (1, 2, 4):
        groups = min(row.warps, -(-tiles * cluster // MULTIPROCESSORS))
        waves = -(-(-(-tiles // groups) * cluster) // MULTIPROCESSORS)
        unit = min(row.unit, pieces // cluster // 2 * 2)
        if cluster > row.cluster or unit < 2:
            break
        own = groups * (35 * row.row_tiles + (8 if row.stages else 16) * token_tiles)
        cycles = max(own + (16 * token_tiles if row.stages else 0), 43 * token_tiles)
        estimate = waves * cycles * pieces / cluster + (1500 if cluster > 1 else 0)
        splits = min(row.warps // groups, pieces // (unit * cluster), MOST_SPLITS)
        tuning = Tuning(groups, splits, row.row_tiles, row.lookahead, unit, row.stages, cluster)
        while tuning.splits > 1 and tuning.shared_words(tokens) > SHARED_WORDS - _TABLE_WORDS:
            tuning = dataclasses.replace(tuning, splits=tuning.splits - 1)
        fits.append((estimate, tuning))
    return min(fits, key=lambda fit: fit[0])[1]
