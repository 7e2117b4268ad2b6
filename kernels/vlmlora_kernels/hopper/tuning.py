"""Which tile each number of tokens gets. Regenerate with ``python -m vlmlora_kernels.bench --sweep`` and
``--sweep-many``.
"""

import dataclasses
import math

from vlmlora_kernels.hopper import wgmma
from vlmlora_kernels.hopper.launch import MULTIPROCESSORS
from vlmlora_kernels.hopper.matvec import COLUMNS, Tuning

CLUSTERED = {1: MULTIPROCESSORS, 2: MULTIPROCESSORS, 4: 116}
"""Multiprocessors that clusters of so many blocks occupy together. The 132 of a card are in groups that need
not hold whole clusters of 4: on an H100, 29 of those ran at a time, and 32 in two waves."""
SHARED_WORDS = 227 * 1024 // 4  # that a block may have
MOST_SPLITS = 15  # each may need a named barrier, and the block has one of the 16
_TABLE_WORDS = 34 * 256  # of the byte table and the code of nested scales


@dataclasses.dataclass(frozen=True)
class FewTokens:
    """A row of the table of fused products; see `hopper.matvec.Tuning`.

    Attributes:
        tokens: the most that take this row.
        rows: the most rows of a weight that takes it, or None for any number.
        row_tiles: times 16 rows in a group.
        warps: the most of a block.
        lookahead: loads of `x` under way.
        unit: blocks of 64 columns a load.
        stages: units of `x` in shared memory.
        cluster: the most blocks that share the columns of a band.
        early_x: start loads of `x` a unit ahead.
    """

    tokens: int
    rows: int | None
    row_tiles: int
    warps: int
    lookahead: int
    unit: int
    stages: int = 0
    cluster: int = 1
    early_x: bool = False


ROWS = tuple(16 * MULTIPROCESSORS * tiles for tiles in (1, 2, 3, 5, 8, 12))
"""Rows of a weight up to which tiles are measured: so many tiles of 16 rows for each multiprocessor."""

FEW_TOKENS = {
    "nf4": (
        FewTokens(tokens=4, rows=6336, row_tiles=1, warps=16, lookahead=1, unit=2),
        FewTokens(tokens=4, rows=10560, row_tiles=1, warps=16, lookahead=1, unit=4),
        FewTokens(tokens=4, rows=16896, row_tiles=2, warps=16, lookahead=1, unit=2),
        FewTokens(tokens=4, rows=25344, row_tiles=1, warps=18, lookahead=1, unit=2),
        FewTokens(tokens=4, rows=None, row_tiles=2, warps=16, lookahead=1, unit=4),
        FewTokens(tokens=16, rows=2112, row_tiles=1, warps=12, lookahead=2, unit=2, early_x=True),
        FewTokens(tokens=16, rows=4224, row_tiles=2, warps=12, lookahead=2, unit=2, early_x=True),
        FewTokens(tokens=16, rows=6336, row_tiles=3, warps=12, lookahead=2, unit=2, early_x=True),
        FewTokens(tokens=16, rows=10560, row_tiles=2, warps=12, lookahead=1, unit=2, stages=3),
        FewTokens(tokens=16, rows=16896, row_tiles=1, warps=20, lookahead=1, unit=4, stages=3),
        FewTokens(tokens=16, rows=25344, row_tiles=2, warps=12, lookahead=1, unit=2, stages=3),
        FewTokens(tokens=16, rows=None, row_tiles=1, warps=20, lookahead=1, unit=4, stages=3),
        FewTokens(tokens=32, rows=2112, row_tiles=1, warps=20, lookahead=1, unit=2, stages=2, cluster=2),
        FewTokens(tokens=32, rows=4224, row_tiles=1, warps=16, lookahead=1, unit=2, stages=2),
        FewTokens(tokens=32, rows=6336, row_tiles=3, warps=8, lookahead=1, unit=2, stages=2),
        FewTokens(tokens=32, rows=16896, row_tiles=2, warps=8, lookahead=1, unit=4, stages=2),
        FewTokens(tokens=32, rows=None, row_tiles=1, warps=16, lookahead=1, unit=4, stages=3),
        FewTokens(tokens=64, rows=2112, row_tiles=1, warps=20, lookahead=1, unit=2, stages=2, cluster=2),
        FewTokens(tokens=64, rows=6336, row_tiles=1, warps=16, lookahead=1, unit=2, stages=3),
        FewTokens(tokens=64, rows=10560, row_tiles=2, warps=12, lookahead=1, unit=2, stages=3),
        FewTokens(tokens=64, rows=25344, row_tiles=1, warps=16, lookahead=1, unit=4, stages=2),
        FewTokens(tokens=64, rows=None, row_tiles=1, warps=16, lookahead=1, unit=2, stages=4),
    ),
    "int8": (
        FewTokens(tokens=4, rows=2112, row_tiles=1, warps=16, lookahead=1, unit=2),
        FewTokens(tokens=4, rows=4224, row_tiles=2, warps=16, lookahead=1, unit=2),
        FewTokens(tokens=4, rows=6336, row_tiles=1, warps=24, lookahead=1, unit=2),
        FewTokens(tokens=4, rows=10560, row_tiles=1, warps=16, lookahead=1, unit=4),
        FewTokens(tokens=4, rows=16896, row_tiles=1, warps=32, lookahead=1, unit=2),
        FewTokens(tokens=4, rows=25344, row_tiles=1, warps=18, lookahead=1, unit=2),
        FewTokens(tokens=4, rows=None, row_tiles=1, warps=16, lookahead=1, unit=4),
        FewTokens(tokens=16, rows=2112, row_tiles=1, warps=12, lookahead=2, unit=2, early_x=True),
        FewTokens(tokens=16, rows=4224, row_tiles=2, warps=12, lookahead=1, unit=2, stages=3),
        FewTokens(tokens=16, rows=16896, row_tiles=2, warps=16, lookahead=2, unit=2, early_x=True),
        FewTokens(tokens=16, rows=None, row_tiles=1, warps=20, lookahead=1, unit=4, stages=3),
        FewTokens(tokens=32, rows=2112, row_tiles=1, warps=16, lookahead=1, unit=2, stages=3),
        FewTokens(tokens=32, rows=4224, row_tiles=1, warps=20, lookahead=1, unit=2, stages=2),
        FewTokens(tokens=32, rows=6336, row_tiles=1, warps=16, lookahead=1, unit=2, stages=2),
        FewTokens(tokens=32, rows=10560, row_tiles=1, warps=20, lookahead=1, unit=2, stages=2),
        FewTokens(tokens=32, rows=16896, row_tiles=2, warps=12, lookahead=1, unit=2, stages=2),
        FewTokens(tokens=32, rows=None, row_tiles=1, warps=16, lookahead=1, unit=4, stages=2),
        FewTokens(tokens=64, rows=2112, row_tiles=1, warps=20, lookahead=1, unit=2, stages=2, cluster=2),
        FewTokens(tokens=64, rows=4224, row_tiles=2, warps=12, lookahead=1, unit=2, stages=2),
        FewTokens(tokens=64, rows=6336, row_tiles=1, warps=16, lookahead=1, unit=2, stages=2),
        FewTokens(tokens=64, rows=10560, row_tiles=1, warps=16, lookahead=1, unit=2, stages=3),
        FewTokens(tokens=64, rows=None, row_tiles=2, warps=12, lookahead=1, unit=2, stages=2),
    ),
}
"""By the decoder's name, for ascending numbers of tokens and for each of rows; the first that takes both is
the one."""

FUSED_TOKENS = FEW_TOKENS["nf4"][-1].tokens
"""The most tokens that the kernels of `hopper.matvec` take."""


@dataclasses.dataclass(frozen=True)
class ManyTokens:
    """A row of the table of 4-bit products on ``wgmma``; see `hopper.wgmma.Tuning`.

    Attributes:
        tokens: the most that take this row.
        elements: the fewest of a weight that takes it; a smaller one has too few tiles for the card.
        width: tokens of a block of threads.
        stages: steps in shared memory.
        paired: how long the summed axis is at least where two blocks load the tokens together; None: never.
        schedule: how blocks share the tiles; one of `hopper.schedule.SCHEDULES`.
        halved: two blocks share each tile; only where that makes about one block for each multiprocessor.
    """

    tokens: int
    width: int
    stages: int
    paired: int | None = None
    schedule: str = "fastest"
    halved: bool = False
    elements: int = 0

    def takes(self, tokens: int, shape: tuple[int, int], transposed: bool) -> bool:
        """Whether this row's tile suits so many tokens and `shape` [out, in], whatever its elements."""
        summed, kept = shape if transposed else shape[::-1]
        tiles = -(-kept // wgmma.ROWS) * -(-tokens // self.width)
        fits = 3 * tiles > MULTIPROCESSORS and 2 * tiles <= MULTIPROCESSORS
        return tokens <= self.tokens and (not self.halved or (fits and summed in HALVED_SUMMED))

    def tuning(self, summed: int) -> wgmma.Tuning:
        """How the kernel takes it, with so many elements along the summed axis."""
        is_paired = self.paired is not None and summed >= self.paired
        return wgmma.Tuning(self.width, self.stages, 2 if is_paired else 1, self.schedule, self.halved)


HALVED_SUMMED = range(2**10, 2**13 + 1)
"""How long the summed axis is where two blocks share a tile; blocks that are at the same steps
(`hopper.schedule.Schedule.in_step`) win more on a longer one."""

MANY_TOKENS = (
    ManyTokens(tokens=256, width=128, stages=6, halved=True, elements=2**24),
    ManyTokens(tokens=512, width=256, stages=4, halved=True, elements=2**24),
    ManyTokens(tokens=128, width=128, stages=6, elements=2**24),
    ManyTokens(tokens=512, width=256, stages=4, paired=2**14, elements=2**24),
    ManyTokens(tokens=1024, width=256, stages=4, elements=2**25),
)
"""For ascending numbers of tokens beyond `FUSED_TOKENS`, as far as the product is faster than decoding before
it or meanwhile; the first that takes a product is the one."""


def most_fused_tokens(kind: str, shape: tuple[int, int]) -> int:
    """Up to how many tokens a fused product is the fastest, forward and backward."""
    # Rows with halves take only some of the weights; the others say how far the product is the fastest.
    rows = [] if kind == "int8" else [row for row in MANY_TOKENS if not row.halved]
    return max((row.tokens for row in rows if math.prod(shape) >= row.elements), default=FUSED_TOKENS)


OVERLAPPED_TOKENS = 1024
"""As many take as long with W decoded first as meanwhile; with twice as many, meanwhile is faster."""
OVERLAPPED_ELEMENTS = 2**23
"""Of a weight with more; a smaller one gives too few tiles to decode W behind."""
DECODED_FROM = 8192
"""Tokens from which on W is decoded first if it has fewer than `OVERLAPPED_ALWAYS` elements: cuBLAS is faster
then by about as much as decoding takes."""
OVERLAPPED_ALWAYS = 2**25


def is_overlapped_fastest(tokens: int, shape: tuple[int, int]) -> bool:
    """Whether to decode a weight of `shape` [out, in] while it is multiplied by so many tokens."""
    elements = math.prod(shape)
    if tokens >= DECODED_FROM and elements < OVERLAPPED_ALWAYS:
        return False
    return tokens > OVERLAPPED_TOKENS and elements > OVERLAPPED_ELEMENTS


def many_tokens_row(tokens: int, shape: tuple[int, int], transposed: bool) -> ManyTokens:
    """The row for as many tokens and a weight of `shape` [out, in]; the last one beyond the end of the table.

    Args:
        tokens: rows of `x`.
        shape: (out, in).
        transposed: of ``dy @ W``, and not of ``x @ W.T``.
    """
    return next((row for row in MANY_TOKENS if row.takes(tokens, shape, transposed)), MANY_TOKENS[-1])


def few_tokens_row(tokens: int, rows: int | None, kind: str) -> FewTokens:
    """The row for as many tokens and rows of a weight; None for more of these than any limit."""
    return next(
        row
        for row in FEW_TOKENS[kind]
        if tokens <= row.tokens and (row.rows is None or (rows is not None and rows <= row.rows))
    )


def matvec_tuning(tokens: int, shape: tuple[int, int], kind: str) -> Tuning:
    """The tile of the fused product of this many tokens and a weight of `shape` [out, in]."""
    return cut(few_tokens_row(tokens, shape[0], kind), tokens, shape)


def cut(row: FewTokens, tokens: int, shape: tuple[int, int]) -> Tuning:
    """Fit a row of the table to a weight of `shape` [out, in]: one wave of blocks where that is possible.

    Of the sizes of cluster it takes the one with the fewest cycles by a rough count. For each 64 columns the
    load and store unit takes 35 for 16 rows, and 8 or 16 for 8 tokens of `x` from shared memory or the cache;
    43 pass while these come from the L2 cache.
    """
    out_features, pieces = shape[0], shape[1] // COLUMNS
    row_tiles = row.row_tiles
    tiles = -(-out_features // (16 * row_tiles))
    token_tiles = -(-tokens // 8)
    fits = []
    for cluster in CLUSTERED:
        slots = CLUSTERED[cluster]
        groups = min(row.warps, -(-tiles * cluster // slots))
        waves = -(-(-(-tiles // groups) * cluster) // slots)
        unit = min(row.unit, pieces // cluster // 2 * 2)
        if cluster > row.cluster or unit < 2:
            break
        own = groups * (35 * row_tiles + (8 if row.stages else 16) * token_tiles)
        cycles = max(own + (16 * token_tiles if row.stages else 0), 43 * token_tiles)
        estimate = waves * cycles * pieces / cluster + (1500 if cluster > 1 else 0)
        splits = min(row.warps // groups, pieces // (unit * cluster), MOST_SPLITS)
        tuning = Tuning(groups, splits, row_tiles, row.lookahead, unit, row.stages, cluster, row.early_x)
        while tuning.splits > 1 and tuning.shared_words(tokens) > SHARED_WORDS - _TABLE_WORDS:
            tuning = dataclasses.replace(tuning, splits=tuning.splits - 1)
        fits.append((estimate, tuning))
    return min(fits, key=lambda fit: fit[0])[1]
