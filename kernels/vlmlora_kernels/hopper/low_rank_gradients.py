"""The gradients of an elementwise function between low-rank products, in one pass over its arguments.

Between the wide projections of a feed-forward block and its last one stands a function of wide arrays. Its
backward pass reads them and the gradient of its result and writes their gradients; and each of these arrays
meets a low-rank factor, which by itself is a product of a few columns that reads the whole array once more:

    value = f(x_1, ..., x_n)        d_i = the gradient of x_i
    d_i @ B_i                       summed over features
    d_i.T @ L_i, value.T @ P        summed over tokens

A block of threads owns a strip of features and a range of tokens. One warpgroup copies tiles of 64 tokens by
64 features into shared memory; two others compute, write the result over the tile, from where it leaves for
the device's memory, and multiply it there by ``wgmma``. The sums over tokens stay in registers until the
range ends, those over features until the strip does. What different blocks find is added later, by XLA.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vlmlora_kernels.hopper.in_place import evaluate
from vlmlora_kernels.hopper.launch import MULTIPROCESSORS
from vlmlora_kernels.hopper.ring import Ring

TILE = 64  # tokens and features of a tile
MAX_RANK = 32  # of low-rank products: more sums than these find no place in registers
_GROUPS = 2  # warpgroups that compute
_SHARED_MEMORY = 220 * 1024  # bytes of tiles that a block of threads may hold
_SWIZZLE = (plgpu.SwizzleTransform(128),)
# The same bytes in the words of ``wgmma``. A copy in these would have to end at a multiple of 64 features.
_TILED_SWIZZLE = (plgpu.TilingTransform((8, TILE)), *_SWIZZLE)


@dataclasses.dataclass(frozen=True)
class Partition:
    """How the work is cut.

    Attributes:
        tokens: number of tiles along the tokens.
        features: number of tiles along the features.
        pieces: tiles along the features whose sums a warpgroup keeps.
        ranges: of tokens, whose sums are written apart.
    """

    tokens: int
    features: int
    pieces: int
    ranges: int

    @classmethod
    def of(cls, tokens: int, features: int, rank: int) -> "Partition":
        """For so many tokens and features, and sums of so many columns."""
        tiles = pl.cdiv(tokens, TILE)
        one = cls(tiles, pl.cdiv(features, TILE), 4 if rank <= 16 else 2, 1)

        def tiles_in_turn(ranges: int) -> int:
            """Rows of tiles of the block that has most of them, in sixteenths."""
            # To write and add a range's sums takes about a fifth of the time of a row of tiles.
            return pl.cdiv(one.strips * ranges, MULTIPROCESSORS) * pl.cdiv(tiles, ranges) * 16 + 3 * ranges

        return dataclasses.replace(one, ranges=min(range(1, min(tiles, 32) + 1), key=tiles_in_turn))

    @property
    def strips(self) -> int:
        """Parts of the features, each of a block of threads."""
        return pl.cdiv(self.features, self.pieces * _GROUPS)

    @property
    def tiles_of_range(self) -> int:
        """Tiles along the tokens of every range but perhaps the last."""
        return pl.cdiv(self.tokens, self.ranges)

    @property
    def width(self) -> int:
        """Features of all strips, of which the last ones may not exist."""
        return self.strips * self.pieces * _GROUPS * TILE


def low_rank_gradients(
    function: Callable[..., Sequence[jax.Array]],
    cotangent: Float[Array, "tokens width"],
    xs: Sequence[Float[Array, "tokens width"]],
    projected: Float[Array, "tokens _"],
    low_ranks: Sequence[Float[Array, "tokens _"]],
    bs: Sequence[Float[Array, "features _"]],
    *,
    is_in_place: bool = False,
    interpret: Any = None,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array, list[jax.Array]]:
    """`vlmlora_kernels.low_rank.low_rank_gradients` on a Hopper GPU.

    Args:
        function, cotangent, xs, projected, low_ranks, bs: as there; the function is made of what
            `hopper.in_place` knows, the width is a multiple of 8, and ranks are at most `MAX_RANK`.
        is_in_place: as there.
        interpret: how Pallas interprets the kernel where there is no such GPU.

    Returns:
        The attributes of `LowRankGradients` in their order.
    """
    (tokens, width), features, dtype, count = cotangent.shape, bs[0].shape[0], cotangent.dtype, len(xs)
    rank = max(8 * pl.cdiv(each.shape[1], 8) for each in (projected, *low_ranks))
    cut = Partition.of(tokens, features, rank)
    tiles_of_slot = _GROUPS * (1 + count) * TILE + (1 + count) * rank + _GROUPS * count * rank
    slots = min(4, _SHARED_MEMORY // (tiles_of_slot * TILE * dtype.itemsize))
    ring = Ring(slots, 1, _GROUPS)
    jobs = cut.strips * cut.ranges
    blocks = min(MULTIPROCESSORS, jobs)
    pieces = cut.pieces

    def body(*refs: Any) -> None:
        cotangent, *refs = refs
        xs, refs = refs[:count], refs[count:]
        (ranks, bs), refs = refs[:2], refs[2:]
        # In place the gradients' memory is that of the arguments.
        gradients, refs = (xs, refs) if is_in_place else (refs[:count], refs[count:])
        products, sums, tiles, rank_tiles, b_tiles, full, free = refs
        arriving, tiles = tiles if interpret is None else (tiles, tiles)
        group = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        own_jobs = lax.div(jobs - block + blocks - 1, blocks)

        def place(job: Any) -> tuple:
            """Strip, range, first tile along the tokens and their number."""
            number = block + job * blocks
            strip, part = lax.rem(number, cut.strips), lax.div(number, cut.strips)
            first = part * cut.tiles_of_range
            return strip, part, first, lax.min(cut.tokens - first, cut.tiles_of_range)

        def columns(strip: Any, piece: int, group: Any) -> Any:
            return pl.ds(((strip * pieces + piece) * _GROUPS + group) * TILE, TILE)

        @pl.when(group == _GROUPS)
        def load() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def one_job(job: Any, step: Any) -> Any:
                strip, _, first, length = place(job)

                def one_row(row: Any, step: Any) -> Any:
                    rows = pl.ds((first + row) * TILE, TILE)
                    for piece in range(pieces):
                        at = step + piece
                        slot = ring.of(at)
                        ring.wait(free, at)
                        barrier = full.at[slot]
                        plgpu.copy_gmem_to_smem(ranks.at[:, :, rows], rank_tiles.at[slot], barrier)
                        for reader in range(_GROUPS):
                            own = columns(strip, piece, reader)
                            plgpu.copy_gmem_to_smem(bs.at[:, :, own], b_tiles.at[slot, reader], barrier)
                            for index, array in enumerate((cotangent, *xs)):
                                plgpu.copy_gmem_to_smem(
                                    array.at[rows, own], arriving.at[slot, reader, index], barrier
                                )
                    return step + pieces

                return lax.fori_loop(0, length, one_row, step)

            steps = lax.fori_loop(0, own_jobs, one_job, jnp.int32(0))
            # Pallas' interpreter wants to see every barrier through.
            ring.drain(free, steps)

        @pl.when(group < _GROUPS)
        def compute() -> None:
            plgpu.set_max_registers(232, action="increase")

            def one_tile(step: Any, rows: Any, own: Any, of_features: Any, of_tokens: Any) -> None:
                slot = ring.of(step)
                plgpu.barrier_wait(full.at[slot])
                here = [tiles.at[slot, group, index] for index in range(1 + count)]
                loaded = [plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA) for tile in here]
                results = evaluate(function, *(values.astype(jnp.float32) for values in loaded))
                for tile, result in zip(here, results, strict=True):
                    tile[...] = result.astype(dtype)
                plgpu.commit_smem()
                for index, gradient in enumerate(gradients):
                    plgpu.copy_smem_to_gmem(arriving.at[slot, group, 1 + index], gradient.at[rows, own])
                for index, acc in enumerate(of_features):
                    plgpu.wgmma(acc, here[1 + index], b_tiles.at[slot, group, index].T)
                for index, acc in enumerate(of_tokens):
                    plgpu.wgmma(acc, here[index].T, rank_tiles.at[slot, index].T)
                plgpu.wgmma_wait(0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ring.release(free, step)

            def one_job(job: Any, step: Any) -> Any:
                strip, part, first, length = place(job)

                def with_sums(*sums_of_tokens: Any) -> Any:
                    def one_row(row: Any, step: Any) -> Any:
                        token = (first + row) * TILE

                        def with_products(*of_features: Any) -> None:
                            for piece in range(pieces):
                                one_tile(
                                    step + piece,
                                    pl.ds(token, TILE),
                                    columns(strip, piece, group),
                                    of_features,
                                    sums_of_tokens[piece * (1 + count) : (piece + 1) * (1 + count)],
                                )
                            for index, acc in enumerate(of_features):
                                products[strip * _GROUPS + group, index, pl.ds(token, TILE), :] = acc[...]

                        pl.run_scoped(with_products, *[plgpu.ACC((TILE, rank), jnp.float32)] * count)
                        return step + pieces

                    step_after = lax.fori_loop(0, length, one_row, step)
                    for piece in range(pieces):
                        own = columns(strip, piece, group)
                        for index in range(1 + count):
                            acc = sums_of_tokens[piece * (1 + count) + index]
                            sums[part, index, own, :] = acc[...]
                    return step_after

                accumulators = [plgpu.ACC((TILE, rank), jnp.float32)] * (pieces * (1 + count))
                return pl.run_scoped(with_sums, *accumulators)

            lax.fori_loop(0, own_jobs, one_job, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def shared(transforms: Sequence[Any] = _TILED_SWIZZLE) -> Any:
        return plgpu.SMEM((slots, _GROUPS, 1 + count, TILE, TILE), dtype, transforms=transforms)

    kernel = plgpu.kernel(
        body,
        out_type=[
            *([] if is_in_place else [jax.ShapeDtypeStruct((tokens, width), dtype)] * count),
            jax.ShapeDtypeStruct((cut.strips * _GROUPS, count, cut.tokens * TILE, rank), jnp.float32),
            jax.ShapeDtypeStruct((cut.ranges, 1 + count, cut.width, rank), jnp.float32),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=_GROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            # Pallas' interpreter keeps two views of the same memory apart, and has no need of two.
            plgpu.RefUnion(shared(_SWIZZLE), shared()) if interpret is None else shared(),
            plgpu.SMEM((slots, 1 + count, rank, TILE), dtype, transforms=_TILED_SWIZZLE),
            plgpu.SMEM((slots, _GROUPS, count, rank, TILE), dtype, transforms=_TILED_SWIZZLE),
            plgpu.Barrier(num_barriers=slots, num_arrivals=1 + _GROUPS * (2 + count)),
            ring.free(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="low_rank_gradients",
        interpret=interpret,
    )

    def transposed(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x.T, ((0, rank - x.shape[1]), (0, length - x.shape[0])))

    ranks = jnp.stack([transposed(each, cut.tokens * TILE) for each in (projected, *low_ranks)])
    right = jnp.stack([transposed(each, cut.width) for each in bs])
    if is_in_place:
        refs = [jax.new_ref(x) for x in xs]
        products, sums = kernel(cotangent, *refs, ranks, right)
        gradients = [ref[...] for ref in refs]
    else:
        *gradients, products, sums = kernel(cotangent, *xs, ranks, right)
    products = [each[:tokens, : b.shape[1]] for each, b in zip(products.sum(0), bs, strict=True)]
    value_sum, *gradient_sums = (
        each[:features, : low_rank.shape[1]]
        for each, low_rank in zip(sums.sum(0), (projected, *low_ranks), strict=True)
    )
    return gradients, products, value_sum, gradient_sums
