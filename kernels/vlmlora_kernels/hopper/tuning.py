"""Which tile each number of tokens gets. Regenerate with ``python -m vlmlora_kernels.bench --sweep``."""

from vlmlora_kernels.hopper.matvec import COLUMNS, UNIT, Tuning

MULTIPROCESSORS = 132  # of an H100 or H200; a grid for another number is right, and slower.

# Up to how many tokens: times 16 rows in a group, warps of a block at most, loads of x in flight, and
# whether the band of a block is as high as one wave of blocks needs (else one group).
_TILES = (
    (4, 1, 18, 1, True),
    (16, 2, 10, 2, True),
    (32, 2, 10, 1, True),
    (64, 2, 8, 1, False),
)

FUSED_TOKENS = _TILES[-1][0]
"""The most tokens that the fused kernels take; beyond it, decoding and then multiplying is faster."""

MOST_SPLITS = 8


def matvec_tuning(tokens: int, shape: tuple[int, int]) -> Tuning:
    """The tile of the fused product of this many tokens and a weight of `shape` [out, in]."""
    _, row_tiles, warps, lookahead, is_one_wave = next(tile for tile in _TILES if tokens <= tile[0])
    out_features, in_features = shape
    groups = -(-out_features // (16 * row_tiles * MULTIPROCESSORS)) if is_one_wave else 1
    groups = min(groups, warps)
    splits = 1
    most = min(MOST_SPLITS, warps // groups, in_features // (COLUMNS * UNIT))
    while 2 * splits <= most:
        splits *= 2
    return Tuning(groups, splits, row_tiles, lookahead)
