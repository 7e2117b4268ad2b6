"""4-bit weights in the layout of bitsandbytes: NF4 and FP4, blockwise scales, doubly quantised scales.

A matrix [out, in] is flattened row by row and cut into blocks of `blocksize` elements (a block may straddle
rows, the last one may be short). Each block has one float32 scale, its largest magnitude ("absmax"); each
element is the index of the nearest of 16 values after division by the scale. Two indices share a byte, the
first in the high nibble. Doubly quantised scales are 8-bit codes of their own, in blocks of 256.

On a Hopper GPU decoding and products run as kernels (`vlmlora_kernels.hopper`), elsewhere as XLA compiles
the forms written here; `vlmlora_kernels.dispatch` chooses.

NF4: https://arxiv.org/abs/2305.14314; the 8-bit code: https://arxiv.org/abs/1511.04561. Codes and scales
are those of bitsandbytes 0.50 on a CPU.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from vlmlora_kernels.dispatch import DECODE, FUSED, OVERLAPPED, explain
from vlmlora_kernels.hopper import dequantize as hopper_dequantize
from vlmlora_kernels.hopper import matvec
from vlmlora_kernels.hopper.launch import varying
from vlmlora_kernels.hopper.tuning import FUSED_TOKENS
from vlmlora_kernels.lowering import few_tokens, many_tokens, many_tokens_overlapped, on_cuda, one_by_one

NESTED_BLOCKSIZE = 256

_NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# One sign, two exponent and one mantissa bit; the largest magnitude, 12, is scaled to 1.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _code_book(levels: Sequence[float] | np.ndarray) -> np.ndarray:
    book = np.asarray(levels, np.float32)
    book.flags.writeable = False
    return book


def _fp4_levels() -> np.ndarray:
    positive = np.asarray(_FP4_MAGNITUDES, np.float32) / np.float32(12)
    return np.concatenate([positive, np.float32(0) - positive])


def _dynamic_levels() -> list[float]:
    """Seven decades of evenly spaced values between 0.1 and 1, twice as many in each next decade."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        # As torch.linspace in float32: fused multiply-adds, counted from the nearer end.
        first, last = np.float32(0.1), np.float32(1.0)
        step = np.float64((last - first) / np.float32(count))
        index = np.arange(count + 1)
        edges = np.where(index <= count // 2, first + step * index, last - step * (count - index))
        edges = edges.astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = means * np.float32(10.0 ** (exponent - 6))
        levels += [*scaled, *(-scaled)]
    return sorted(float(level) for level in levels)


CODE_BOOKS: dict[str, np.ndarray] = {"nf4": _code_book(_NF4_LEVELS), "fp4": _code_book(_fp4_levels())}
"""The 16 values of each 4-bit type, by index."""

DYNAMIC_CODE: np.ndarray = _code_book(_dynamic_levels())
"""The 256 values of the signed 8-bit "dynamic" type that holds doubly quantised scales, ascending."""

_CODE_ORDER = {name: np.argsort(book, kind="stable").astype(np.uint8) for name, book in CODE_BOOKS.items()}
_BYTE_TABLES = {
    name: np.stack([book[np.arange(256) >> 4], book[np.arange(256) & 15]], axis=1)
    for name, book in CODE_BOOKS.items()
}
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


class NestedAbsmax(NamedTuple):
    """Doubly quantised scales: ``code[codes] * absmax[block // 256] + offset``.

    To decode, the arrays may be filled up to whole lines of memory, see `in_lines`.

    Attributes:
        codes: one index into `code` for each block of the weight.
        absmax: one scale for each 256 codes.
        code: the values behind the codes.
        offset: mean of the scales, subtracted before they were quantised.
    """

    codes: UInt8[Array, " blocks"]
    absmax: Float[Array, " nested_blocks"]
    code: Float[Array, "256"]
    offset: Float[Array, ""]


Absmax = Float[Array, " blocks"] | NestedAbsmax


class Placed(NamedTuple):
    """A matrix among zeros, beside another.

    Attributes:
        matrix: what is given; None for zeros alone. Rows to the right of another matrix, or columns below
            one, for which there is no place, are left out.
        size: columns to the right, or rows below, in all.
        start: columns of zeros before it; of a matrix below 0.
    """

    matrix: Float[Array, "_ _"] | None
    size: int
    start: int = 0

    def to_the_right(self, rows: int, dtype: DTypeLike) -> Float[Array, "rows size"]:
        """The whole matrix, beside one of so many rows."""
        if self.matrix is None:
            return jnp.zeros((rows, self.size), dtype)
        matrix = self.matrix[:rows].astype(dtype)
        return jnp.pad(matrix, ((0, 0), (self.start, self.size - self.start - matrix.shape[1])))

    def below(self, columns: int, dtype: DTypeLike) -> Float[Array, "size columns"]:
        """The whole matrix, below others of so many columns."""
        if self.matrix is None:
            return jnp.zeros((self.size, columns), dtype)
        matrix = self.matrix[:, :columns].astype(dtype)
        return jnp.pad(matrix, ((0, self.size - matrix.shape[0]), (0, columns - matrix.shape[1])))


LINE = 256
"""Bytes of a line: XLA hands a kernel on a GPU its part of a stack without a copy if it begins at one."""


def in_lines(
    absmax: Float[Array, "matrices blocks"] | NestedAbsmax,
) -> Float[Array, "matrices blocks_and_more"] | NestedAbsmax:
    """Scales of stacked matrices, with those of each filled up to whole lines.

    What fills them up is not read: the functions of this module take one matrix's part of them as it is.

    Args:
        absmax: scales with a leading axis over the matrices.
    """

    def fill(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape(leaf.shape[0], -1)
        return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % (LINE // rows.dtype.itemsize))))

    return jax.tree.map(fill, absmax)


def _cut(absmax, blocks):
    """The scales without what fills up lines."""
    if not isinstance(absmax, NestedAbsmax):
        return absmax[:blocks]
    nested_blocks = -(-blocks // NESTED_BLOCKSIZE)
    offset = absmax.offset if absmax.offset.ndim == 0 else absmax.offset[0]
    return NestedAbsmax(absmax.codes[:blocks], absmax.absmax[:nested_blocks], absmax.code, offset)


def quantize_4bit(
    weight: Float[Array, "out in"], *, quant_type: str = "nf4", blocksize: int = 64
) -> tuple[UInt8[Array, " bytes"], Float[Array, " blocks"]]:
    """Quantise a matrix to 4 bits an element, as ``bitsandbytes.functional.quantize_4bit`` on a CPU.

    Args:
        weight: float32, bfloat16 or float16, of any shape; the flattened order counts.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share a scale; even.

    Returns:
        Packed codes, uint8 [ceil(size / 2)], and float32 scales [ceil(size / blocksize)].

    Raises:
        ValueError: unknown `quant_type` or odd `blocksize`.
    """
    _check_format(quant_type, blocksize)
    size = weight.size
    blocks = -(-size // blocksize)
    flat = jnp.pad(weight.astype(jnp.float32).reshape(-1), (0, blocks * blocksize - size))
    elements = flat.reshape(blocks, blocksize)
    absmax = jnp.max(jnp.abs(elements), axis=1)
    divisor = jnp.where(absmax < _SMALLEST_NORMAL, 1.0, absmax)
    scaled = elements * (1.0 / divisor)[:, None]
    if size % blocksize:
        # bitsandbytes divides in a short last block, and gives it a scale above zero.
        scaled = scaled.at[-1].set(elements[-1] / divisor[-1])
        absmax = absmax.at[-1].set(jnp.where(absmax[-1] < _SMALLEST_NORMAL, 1e-38, absmax[-1]))
    scaled = jnp.clip(scaled, -1.0, 1.0)
    order = _CODE_ORDER[quant_type]
    levels = CODE_BOOKS[quant_type][order]
    bounds = (levels[:-1] + levels[1:]) / np.float32(2)
    rank = jnp.sum(scaled[..., None] > bounds, axis=-1, dtype=jnp.uint8)
    codes = rank if quant_type == "nf4" else jnp.asarray(order)[rank]
    codes = codes.reshape(-1, 2)
    return ((codes[:, 0] << 4) | codes[:, 1])[: -(-size // 2)], absmax


def dequantize_4bit(
    codes: UInt8[Array, " bytes"],
    absmax: Absmax,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    quant_type: str = "nf4",
    blocksize: int = 64,
    implementation: str | None = None,
    right: Float[Array, "out right"] | Placed | None = None,
    below: Float[Array, "below wide"] | Placed | None = None,
) -> Float[Array, "*shape"]:
    """Decode a matrix: a float32 product of value and scale, rounded once to `dtype`.

    Dense matrices may be put around it, in the same pass: so low-rank factors ride along in the product with
    a decoded weight, ``[x, x A] @ [W, B].T``.

    Args:
        codes: packed codes of `quantize_4bit`.
        absmax: one scale a block, plain or doubly quantised.
        shape: shape of the result.
        dtype: type of the result.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share a scale; even.
        implementation: ``"decode"`` or ``"xla"`` to insist on one; see `explain`.
        right: columns that follow those of the matrix; or some of them, among zeros.
        below: rows that follow those of the matrix, as wide as it and what is to its right; or some of them.

    Returns:
        What ``bitsandbytes.functional.dequantize_4bit`` returns, bit for bit, and what was put around it.

    Raises:
        ValueError: unknown `quant_type`, odd `blocksize`, codes or scales that do not fit `shape`, columns or
            rows that do not, or an `implementation` that cannot run this.
    """
    _check_format(quant_type, blocksize)
    _check_fit(codes, absmax, shape, blocksize)
    right, below = _check_around(shape, right, below)
    choice = explain(
        None, shape, kind=quant_type, dtype=dtype, blocksize=blocksize, implementation=implementation
    )
    around = [part.matrix if part.matrix is None else part.matrix.astype(dtype) for part in (right, below)]
    return _dequantize(
        codes,
        absmax,
        *around,
        places=tuple((part.size, part.start) for part in (right, below)),
        shape=tuple(shape),
        dtype=jnp.dtype(dtype),
        quant_type=quant_type,
        blocksize=blocksize,
        has_kernel=choice.implementation == DECODE,
        is_forced=implementation is not None,
    )


# A program of its own: the kernels of a model's layers are traced and lowered once for each shape.
@functools.partial(
    jax.jit,
    static_argnames=("places", "shape", "dtype", "quant_type", "blocksize", "has_kernel", "is_forced"),
)
def _dequantize(
    codes, absmax, right, below, *, places, shape, dtype, quant_type, blocksize, has_kernel, is_forced
) -> jax.Array:
    scales = _scale_arrays(absmax)
    present = [part for part in (right, below) if part is not None]

    def frame(matrix: jax.Array, arrays: Sequence[jax.Array]) -> jax.Array:
        given = iter(arrays)
        beside, under = (
            Placed(None if part is None else next(given), *place)
            for part, place in zip((right, below), places, strict=True)
        )
        # What is empty is left out: as a constant that a scan hoists out of `jax.shard_map` it crashes XLA
        # (jax 0.11).
        if beside.size:
            matrix = jnp.concatenate([matrix, beside.to_the_right(matrix.shape[0], dtype)], axis=1)
        return jnp.concatenate([matrix, under.below(matrix.shape[1], dtype)]) if under.size else matrix

    def in_xla(*arrays: jax.Array) -> jax.Array:
        codes, *rest = arrays
        absmax, rest = _absmax(rest[: len(scales)]), rest[len(scales) :]
        return frame(_dequantize_in_xla(codes, absmax, shape, dtype, quant_type, blocksize), rest)

    arrays = (codes, *scales, *present)
    if not has_kernel:
        return in_xla(*arrays)
    sizes = _frame(shape, right, below, places) if any(size for size, _ in places) else None
    if sizes is not None and not _copies(sizes, dtype):
        static = {"shape": shape, "dtype": dtype, "quant_type": quant_type, "blocksize": blocksize}
        static |= {"places": ((0, 0), (0, 0)), "has_kernel": True, "is_forced": is_forced}
        return frame(_dequantize(codes, absmax, None, None, **static), present)
    kernel = hopper_dequantize.dequantize(
        CODE_BOOKS[quant_type],
        size=math.prod(shape),
        dtype=dtype,
        nested=isinstance(absmax, NestedAbsmax),
        frame=sizes,
    )
    result = shape if sizes is None else (sizes.rows + sizes.below, sizes.pitch)
    decode = one_by_one(lambda *arrays: kernel(*arrays).reshape(result))
    return decode(*arrays) if is_forced else on_cuda(decode, in_xla, *arrays)


def _frame(shape, right, below, places) -> hopper_dequantize.Frame:
    (columns, start), (rows, _) = places
    return hopper_dequantize.Frame(
        *shape,
        right=columns,
        below=rows,
        right_start=start,
        right_given=0 if right is None else right.shape[1],
        below_given=0 if below is None else below.shape[0],
        below_pitch=0 if below is None else below.shape[1],
    )


def _copies(frame: hopper_dequantize.Frame, dtype: DTypeLike) -> bool:
    """Whether the kernel can copy what stands around the matrix: bfloat16, in whole words of 16 bytes."""
    parts = (frame.columns, frame.right, frame.right_start, frame.right_given, frame.below_pitch)
    parts += (frame.below * frame.pitch,)
    whole = all(size % hopper_dequantize.ELEMENTS == 0 for size in parts)
    return jnp.dtype(dtype) == jnp.bfloat16 and whole and 2 * (frame.rows + frame.below) * frame.pitch < 2**32


def _check_around(
    shape: Sequence[int], right: jax.Array | Placed | None, below: jax.Array | Placed | None
) -> tuple[Placed, Placed]:
    """What is put around a matrix, with its place; nothing where nothing is."""
    if len(shape) != 2 and not (right is None and below is None):
        raise ValueError(f"only a matrix can have others around it; the decoded one has shape {list(shape)}")
    placed: list[Placed] = []
    for name, part, axis in (("right", right, 0), ("below", below, 1)):
        if part is None:
            part = Placed(None, 0)
        elif not isinstance(part, Placed):
            needed = shape[axis] + sum(each.size for each in placed)
            if part.ndim != 2 or part.shape[axis] != needed:
                raise ValueError(
                    f"{name} has shape {list(part.shape)}; around a matrix of shape {list(shape)} it needs "
                    f"{needed} {('rows', 'columns')[axis]}"
                )
            part = Placed(part, part.shape[1 - axis])
        elif part.matrix is not None and part.start + part.matrix.shape[1 - axis] > part.size:
            raise ValueError(
                f"{name} has shape {list(part.matrix.shape)}, which is too large for its place of "
                f"{part.size} {('columns', 'rows')[axis]}, from {part.start} on"
            )
        placed.append(part if part.matrix is None or part.matrix.size else Placed(None, part.size))
    right, below = placed
    if right.matrix is not None and right.matrix.shape[0] < shape[0]:
        raise ValueError(
            f"right has shape {list(right.matrix.shape)}; beside a matrix of shape {list(shape)} it needs "
            f"{shape[0]} rows or more"
        )
    return right, below


def _scale_arrays(absmax: Absmax) -> tuple[jax.Array, ...]:
    if not isinstance(absmax, NestedAbsmax):
        return (absmax,)
    return tuple(absmax)


def _absmax(scales: Sequence[jax.Array]) -> Absmax:
    return NestedAbsmax(*scales) if len(scales) > 1 else scales[0]


def _dequantize_in_xla(codes, absmax, shape, dtype, quant_type, blocksize):
    size = math.prod(shape)
    blocks = -(-size // blocksize)
    absmax = _cut(absmax, blocks)
    if isinstance(absmax, NestedAbsmax):
        absmax = double_dequantize(absmax)
    # One table row a byte: faster than sixteen entries a nibble on a CPU, as fast on a GPU.
    padded = jnp.pad(codes, (0, blocks * blocksize // 2 - codes.size))
    values = jnp.asarray(_BYTE_TABLES[quant_type]).at[padded].get(mode="promise_in_bounds")
    values = values.reshape(blocks, blocksize) * absmax[:, None]
    return values.reshape(-1)[:size].reshape(shape).astype(dtype)


def double_quantize(
    absmax: Float[Array, " blocks"], *, offset: Float[Array, ""] | None = None
) -> NestedAbsmax:
    """Quantise scales to 8 bits, as ``quantize_4bit(..., compress_statistics=True)`` on a CPU.

    bitsandbytes on a CPU rounds each normalised scale to one of 65536 evenly spaced points before it looks up
    the nearest code. Given the same offset the result is the same bit for bit; the order in which torch sums
    the mean depends on the machine, so the default offset may differ by some units in the last place.

    Args:
        absmax: float32 scales.
        offset: what to subtract first; None for their mean.
    """
    offset = _mean(absmax) if offset is None else offset
    blocks = -(-absmax.size // NESTED_BLOCKSIZE)
    centred = jnp.pad(absmax - offset, (0, blocks * NESTED_BLOCKSIZE - absmax.size))
    centred = centred.reshape(blocks, NESTED_BLOCKSIZE)
    nested = jnp.max(jnp.abs(centred), axis=1)
    is_zero = nested < _SMALLEST_NORMAL
    scaled = jnp.clip(centred * (1.0 / jnp.where(is_zero, 1.0, nested))[:, None], -1.0, 1.0)
    point = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).astype(jnp.int32)
    codes = jnp.asarray(_dynamic_code_of_point()).at[point].get(mode="promise_in_bounds")
    codes = jnp.where(is_zero[:, None], jnp.uint8(0), codes)
    return NestedAbsmax(codes.reshape(-1)[: absmax.size], nested, jnp.asarray(DYNAMIC_CODE), offset)


def double_dequantize(nested: NestedAbsmax) -> Float[Array, " blocks"]:
    """Decode doubly quantised scales to float32 as bitsandbytes does: a product, then a sum, each rounded."""
    codes, absmax, code, offset = nested
    padded = jnp.pad(codes, (0, absmax.size * NESTED_BLOCKSIZE - codes.size))
    values = code.at[padded].get(mode="promise_in_bounds")
    product = values.reshape(-1, NESTED_BLOCKSIZE) * absmax[:, None]
    # Without the barrier a compiler may fuse the product and the sum into one rounding.
    product = jax.lax.optimization_barrier(product)
    return product.reshape(-1)[: codes.size] + offset


def matmul_4bit(
    x: Float[Array, "*batch in"],
    codes: UInt8[Array, " bytes"],
    absmax: Absmax,
    *,
    shape: tuple[int, int],
    quant_type: str = "nf4",
    blocksize: int = 64,
    implementation: str | None = None,
) -> Float[Array, "*batch out"]:
    """``x @ W.T`` for a 4-bit W of `shape` [out, in], in the type of `x`.

    Only `x` has a gradient; the cotangents of codes and scales are zero. The backward pass reads the codes
    again: no decoded weight is saved for it.

    Args:
        x: activations.
        codes: packed codes of `quantize_4bit`.
        absmax: one scale a block, plain or doubly quantised.
        shape: (out, in).
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share a scale; even.
        implementation: ``"fused"``, ``"overlapped"``, ``"decode"`` or ``"xla"`` to insist on one; see
            `explain`. The backward pass follows, and takes another kernel where ``"fused"`` cannot run it.

    Raises:
        ValueError: as `dequantize_4bit`.
    """
    return _matmul(x, codes, absmax, (shape, quant_type, blocksize, implementation))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, codes, absmax, layout):
    shape, quant_type, blocksize, implementation = layout
    tokens = math.prod(x.shape[:-1])
    arrays = (x, codes, *_scale_arrays(absmax))
    choice = explain(
        tokens,
        shape,
        kind=quant_type,
        dtype=x.dtype,
        blocksize=blocksize,
        varies=any(map(varying, arrays)),
        implementation=implementation,
    )

    def decoded(x: jax.Array, codes: jax.Array, *scales: jax.Array) -> jax.Array:
        return jnp.matmul(x, _decode(codes, _absmax(scales), layout, x.dtype).T)

    if choice.implementation not in (FUSED, OVERLAPPED):
        return decoded(*arrays)
    _check_fit(codes, absmax, shape, blocksize)
    if choice.implementation == OVERLAPPED:
        fused = many_tokens_overlapped(CODE_BOOKS[quant_type], shape, transposed=False)
    elif tokens <= FUSED_TOKENS:
        fused = few_tokens(matvec.FourBit(CODE_BOOKS[quant_type], isinstance(absmax, NestedAbsmax)), shape)
    else:
        fused = many_tokens(CODE_BOOKS[quant_type], shape, transposed=False)
    return fused(*arrays) if implementation else on_cuda(fused, decoded, *arrays)


def _matmul_fwd(x, codes, absmax, layout):
    return _matmul(x, codes, absmax, layout), (codes, absmax)


def _matmul_bwd(layout, residuals, dy):
    codes, absmax = residuals
    shape, quant_type, blocksize, implementation = layout
    arrays = (dy, codes, *_scale_arrays(absmax))
    choice = explain(
        math.prod(dy.shape[:-1]),
        shape,
        kind=quant_type,
        dtype=dy.dtype,
        blocksize=blocksize,
        backward=True,
        varies=any(map(varying, arrays)),
        implementation=implementation,
    )

    def decoded(dy: jax.Array, codes: jax.Array, *scales: jax.Array) -> jax.Array:
        return jnp.matmul(dy, _decode(codes, _absmax(scales), layout, dy.dtype))

    if choice.implementation not in (FUSED, OVERLAPPED):
        return decoded(*arrays), None, None
    product = many_tokens_overlapped if choice.implementation == OVERLAPPED else many_tokens
    fused = product(CODE_BOOKS[quant_type], shape, transposed=True)
    return fused(*arrays) if implementation else on_cuda(fused, decoded, *arrays), None, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _decode(codes, absmax, layout, dtype):
    shape, quant_type, blocksize, implementation = layout
    return dequantize_4bit(
        codes,
        absmax,
        shape=shape,
        dtype=dtype,
        quant_type=quant_type,
        blocksize=blocksize,
        implementation=None if implementation in (FUSED, OVERLAPPED) else implementation,
    )


def _check_fit(codes, absmax, shape, blocksize):
    size = math.prod(shape)
    blocks = -(-size // blocksize)
    scales = absmax.codes if isinstance(absmax, NestedAbsmax) else absmax
    in_a_line = LINE // scales.dtype.itemsize
    filled_up = -(-blocks // in_a_line) * in_a_line
    if codes.shape != (-(-size // 2),) or scales.shape not in ((blocks,), (filled_up,)):
        raise ValueError(
            f"a 4-bit matrix of shape {shape} needs codes [{-(-size // 2)}] and absmax [{blocks}] "
            f"(blocksize {blocksize}); found {list(codes.shape)} and {list(scales.shape)}"
        )


def _check_format(quant_type: str, blocksize: int) -> None:
    if quant_type not in CODE_BOOKS:
        raise ValueError(f"quant_type={quant_type!r} is not supported; supported: {', '.join(CODE_BOOKS)}")
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize={blocksize} is not supported; it must be even and positive")


def _mean(values: jax.Array) -> jax.Array:
    """Mean by a tree of short sums, so that the error does not grow with the length."""
    total = values
    while total.size > 1:
        total = jnp.sum(jnp.pad(total, (0, -total.size % 64)).reshape(-1, 64), axis=1)
    return total.reshape(()) / values.size


@functools.cache
def _dynamic_code_of_point() -> np.ndarray:
    """Code of each of the 65536 evenly spaced points in [-1, 1] (bitsandbytes' table, in float32)."""
    points = np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535) - np.float32(1)
    bounds = (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) * np.float32(0.5)
    return np.searchsorted(bounds, points, side="left").astype(np.uint8)
