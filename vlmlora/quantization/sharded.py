"""A weight cut over the devices of a mesh.

The mesh has the axes ``data``, ``fsdp`` and ``tensor`` (`vlmlora.distributed.make_mesh`). Every device stores
its part of each array. To multiply, the devices of an ``fsdp`` group gather one layer's arrays, quantised as
they are, decode them and multiply; those of a ``tensor`` group each compute with their rows or columns of the
matrix. All of it is written out under `jax.shard_map`, so that kernels run on plain local arrays and the
collectives are those named here, and no others.

Dense and INT8 matrices are cut as the arrays that they are. A 4-bit matrix is a flat array of codes with one
scale a block. Cut over ``tensor``, each part becomes a 4-bit matrix of its own (`FourBitParts`): the codes of
its rows or columns with the scales that belong to them, so that every element decodes to the same bits as
before. A block that the cut divides has its scale on both sides, and the part has finer blocks; its scales
are plain float32 unless the cut falls on the doubly quantised scales' own blocks. Where that would take more
than 6 bits an element (in = 3420 among 2 devices, for example), the matrix is stored in equal runs of blocks
over both axes instead; the devices then gather and decode it whole, and multiply with their rows or columns.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from vlmlora.quantization.weights import DenseWeight, INT8Weight, MixedWeight, NF4Weight, Shape, Weight
from vlmlora_kernels.nf4 import (
    NESTED_BLOCKSIZE,
    NestedAbsmax,
    double_quantize,
    quantize_4bit,
)

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
"""The axes of a mesh."""
BATCH = (DATA, FSDP)
"""The axes over which the rows of a batch are cut."""

_SMALLEST_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a weight lies on a mesh and takes part in a product.

    Attributes:
        mesh: the devices.
        cut: ``"rows"``: over ``tensor``, each device has output features of its own (column-parallel in
            Megatron's words, https://arxiv.org/abs/1909.08053); ``"columns"``: input features, and the
            results are summed (row-parallel); None: every device of a ``tensor`` group computes the same.
        spec: how a dense or INT8 matrix [out, in] is stored.
        gather_output: whether the output features that ``"rows"`` spreads are gathered again.
    """

    mesh: Mesh
    cut: str | None
    spec: P
    gather_output: bool = False

    @property
    def tensor(self) -> int:
        """Devices among which the product is cut."""
        return self.mesh.shape[TENSOR]


def matrix_spec(shape: Shape, cut: str | None, mesh: Mesh) -> P:
    """How a matrix [out, in] is stored: cut over ``tensor`` as `cut` says, and over ``fsdp`` if it divides.

    What ``fsdp`` cannot cut in equal parts is stored on each of its devices.
    """
    candidates = {
        "rows": (P((TENSOR, FSDP), None), P(TENSOR, FSDP), P(TENSOR, None)),
        "columns": (P(FSDP, TENSOR), P(None, (TENSOR, FSDP)), P(None, TENSOR)),
        None: (P(FSDP, None), P(None, FSDP), P(None, None)),
    }[cut]
    return next((spec for spec in candidates if _divides(shape, spec, mesh)), P(None, None))


def row_spec(x_shape: tuple[int, ...], mesh: Mesh, last: str | None = None) -> P:
    """The sharding of activations [rows, ..., features]: rows over ``data`` and ``fsdp`` if they divide."""
    if len(x_shape) < 2:
        return P(*[None] * (len(x_shape) - 1), last)
    rows = BATCH if x_shape[0] % batch_shards(mesh) == 0 else None
    return P(rows, *[None] * (len(x_shape) - 2), last)


def batch_shards(mesh: Mesh | None) -> int:
    """In how many parts the rows of a batch are cut; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[DATA] * mesh.shape[FSDP]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedWeight:
    """A weight that multiplies on a mesh; what `Linear` and the models see is a `Weight` like any other.

    Attributes:
        parts: the arrays. Those of a dense or INT8 weight have their own shapes; a 4-bit weight's have an
            axis over its parts in front of the bytes or blocks, which are padded so that ``fsdp`` divides
            them. A layer axis comes before everything else. `NF4Weight.shape` is that of one part.
        shape: (out, in) of one layer.
        layout: how it is cut.
    """

    parts: Any
    shape: Shape = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})

    # As the other weights: a numpy array on the left leaves `@` to the weight.
    __array_ufunc__ = None

    @property
    def stack(self) -> int | None:
        """Number of layers on the leading axis; None for a weight of one layer."""
        first = _first_leaf(self.parts)
        return first.shape[0] if len(first.shape) == 3 else None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, each counted once however many devices hold it."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.parts))

    @property
    def value(self) -> Any:
        """The array of a dense weight.

        Raises:
            AttributeError: the weight is quantised.
        """
        return self.parts.value

    def layer(self, index: int | Int[Array, ""]) -> "ShardedWeight":
        """The weight of one layer of a stack.

        Raises:
            ValueError: the weight has no layer axis.
            IndexError: no such layer.
        """
        if self.stack is None:
            raise ValueError(
                f"layer(index) needs a weight with a layer axis; this one is a single {self.shape}"
            )
        if not isinstance(index, jax.Array) and not 0 <= index < self.stack:
            raise IndexError(f"layer {index} of a weight with {self.stack} layers")
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
        return dataclasses.replace(self, parts=jax.tree.map(take, self.parts))

    def __rmatmul__(self, x: Float[ArrayLike, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ W.T`` in the type of `x`. A dense weight has a gradient too; the others are decoded again."""
        x = jnp.asarray(x)
        if self.stack is not None:
            raise ValueError(
                f"x @ weight needs the weight of one layer, but this one stacks {self.stack}; "
                "slice it with .layer(i) or under jax.lax.scan"
            )
        if x.ndim == 0 or x.shape[-1] != self.shape[1]:
            raise ValueError(
                f"x @ weight: x has shape {x.shape}, the weight has shape {self.shape} [out, in]"
            )
        return _matmul(x, self.parts, self.shape, self.layout)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*stack out in"]:
        """The matrix, or matrices, cut over ``tensor`` as the product is and whole otherwise."""
        if self.stack is not None:
            return jax.lax.map(
                lambda parts: dataclasses.replace(self, parts=parts).dequantize(dtype), self.parts
            )
        return _dequantize(self.parts, self.shape, self.layout, np.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class ShardedTable:
    """An embedding table [tokens, features], cut by tokens over ``tensor`` and by features over ``fsdp``.

    Attributes:
        value: the table.
        layout: how it is cut.
    """

    value: Any
    layout: Layout

    @classmethod
    def of(cls, value: Any, mesh: Mesh) -> "ShardedTable":
        """A table of any size; what an axis does not divide lies on each of its devices."""
        tokens, features = value.shape
        by_tokens = mesh.shape[TENSOR] > 1 and tokens % mesh.shape[TENSOR] == 0
        spec = P(TENSOR if by_tokens else None, FSDP if features % mesh.shape[FSDP] == 0 else None)
        return cls(value, Layout(mesh, "rows" if by_tokens else None, spec))

    def as_weight(self) -> ShardedWeight:
        """The same as a weight [out, in], which a head multiplies with."""
        return ShardedWeight(DenseWeight(self.value), tuple(self.value.shape), self.layout)

    def rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """The features of each id.

        The devices of an ``fsdp`` group gather their ids, which are small, look up the features that they
        hold and exchange them; the table stays where it is.
        """
        mesh, spec = self.layout.mesh, self.layout.spec
        rows = row_spec(ids.shape, mesh)
        exchanges = rows[0] == BATCH and spec[1] == FSDP and mesh.shape[FSDP] > 1

        def look_up(table, ids):
            if exchanges:
                ids = jax.lax.all_gather(ids, FSDP, axis=0, tiled=True)
            if spec[0] == TENSOR:
                ids = ids - jax.lax.axis_index(TENSOR) * table.shape[0]
                is_here = (ids >= 0) & (ids < table.shape[0])
                found = jnp.where(is_here[..., None], table[jnp.where(is_here, ids, 0)], 0)
                found = jax.lax.psum(found, TENSOR)
            else:
                found = table[ids]
            if exchanges:
                return jax.lax.all_to_all(found, FSDP, split_axis=0, concat_axis=found.ndim - 1, tiled=True)
            if spec[1] == FSDP and mesh.shape[FSDP] > 1:
                return jax.lax.all_gather(found, FSDP, axis=found.ndim - 1, tiled=True)
            return found

        out = P(*rows, None)
        return _on_mesh(look_up, self.layout, (spec, rows), out)(self.value, ids)


def specs(parts: Weight, shape: Shape, layout: Layout, *, stacked: bool = False) -> Weight:
    """The `PartitionSpec` of every array of `ShardedWeight.parts`, in a weight of the same type."""
    lead = (None,) if stacked else ()
    if isinstance(parts, DenseWeight):
        return DenseWeight(P(*lead, *layout.spec))
    if isinstance(parts, INT8Weight):
        return INT8Weight(P(*lead, *layout.spec), P(*lead, layout.spec[0]))
    flat = P(*lead, None, (TENSOR, FSDP)) if parts.shape == shape else P(*lead, TENSOR, FSDP)
    absmax = flat
    if isinstance(parts.absmax, NestedAbsmax):
        absmax = NestedAbsmax(flat, flat, P(*lead, None), P(*lead))
    return dataclasses.replace(parts, codes=flat, absmax=absmax)


@dataclasses.dataclass(frozen=True)
class FourBitParts:
    """The parts of a 4-bit matrix.

    Attributes:
        count: their number: 1, or one for each device of a ``tensor`` group.
        shape: (out, in) of one.
        blocksize: elements that share a scale in a part.
        keeps_nested: whether doubly quantised scales stay so.
        whole: shape of the matrix.
        whole_blocksize: elements that share a scale in the matrix.
        cut: as in `Layout`; None with one part.
        pad_to: every flat array's length is padded to a multiple of it, in blocks.
    """

    count: int
    shape: Shape
    blocksize: int
    keeps_nested: bool
    whole: Shape
    whole_blocksize: int
    cut: str | None
    pad_to: int

    @classmethod
    def of(cls, shape: Shape, blocksize: int, layout: Layout) -> "FourBitParts":
        """The parts of a matrix of `shape` [out, in] with one scale for `blocksize` elements."""
        rows, columns = shape
        tensor, fsdp = layout.tensor, layout.mesh.shape[FSDP]
        if layout.cut is not None and tensor > 1:
            part = (rows // tensor, columns) if layout.cut == "rows" else (rows, columns // tensor)
            run = math.prod(part) if layout.cut == "rows" else part[1]
            fine = math.gcd(blocksize, run)
            if fine >= _SMALLEST_BLOCK:
                nested = layout.cut == "rows" and run % (blocksize * NESTED_BLOCKSIZE) == 0
                return cls(tensor, part, fine, nested, shape, blocksize, layout.cut, fsdp)
        return cls(1, shape, blocksize, True, shape, blocksize, None, tensor * fsdp)

    @property
    def blocks(self) -> int:
        """Blocks of one part."""
        return -(-math.prod(self.shape) // self.blocksize)

    @property
    def nested_blocks(self) -> int:
        """Blocks of the doubly quantised scales of one part."""
        return -(-self.blocks // NESTED_BLOCKSIZE)

    def padded(self, blocks: int) -> int:
        """A number of blocks rounded up so that the devices have equal shares."""
        return -(-blocks // self.pad_to) * self.pad_to

    def cut_codes(self, codes: Any, number: int) -> Any:
        """The packed codes of one part, unpadded; `codes` [bytes] is the whole matrix's."""
        if self.cut is None:
            return codes
        if self.cut == "rows":
            size = math.prod(self.shape) // 2
            return codes[number * size : (number + 1) * size]
        width = self.shape[1] // 2
        return codes.reshape(self.whole[0], -1)[:, number * width : (number + 1) * width].reshape(-1)

    def cut_scales(self, scales: Any, number: int) -> Any:
        """The scales of one part, unpadded; `scales` [blocks] is the whole matrix's, or codes of scales."""
        if self.cut is None:
            return scales
        numpy = np if isinstance(scales, np.ndarray) else jnp
        fine = numpy.repeat(scales, self.whole_blocksize // self.blocksize)
        fine = fine[: math.prod(self.whole) // self.blocksize]
        if self.cut == "rows":
            return fine[number * self.blocks : (number + 1) * self.blocks]
        width = self.shape[1] // self.blocksize
        return fine.reshape(self.whole[0], -1)[:, number * width : (number + 1) * width].reshape(-1)

    def cut_elements(self, matrix: np.ndarray, number: int, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of one part, in its own order; zeros after the last.

        Of a matrix that is a view of a mapped file no other elements are read, but for those of a row that
        the run divides.
        """
        rows, columns = self.shape
        stop, length = min(stop, rows * columns), stop - start
        if self.cut == "columns":
            first, last = start // columns, -(-stop // columns)
            block = matrix[first:last, number * columns : (number + 1) * columns].reshape(-1)
            run = block[start - first * columns : max(stop - first * columns, 0)]
        else:
            offset = number * rows * columns if self.cut == "rows" else 0
            run = matrix.reshape(-1)[offset + start : offset + max(stop, start)]
        return np.pad(run, (0, length - run.size))

    def restore_order(self, scales: jax.Array) -> jax.Array:
        """The whole matrix's scales from those of all parts [count, blocks], if the blocks are its own."""
        if self.cut != "columns":
            return scales.reshape(-1)
        by_row = scales.reshape(self.count, self.whole[0], -1)
        return jnp.moveaxis(by_row, 0, 1).reshape(-1)

    def cut_nested(self, absmax: Any, number: int) -> Any:
        """The scales of one part's scales, unpadded; only where `keeps_nested`."""
        if self.cut is None:
            return absmax
        return absmax[number * self.nested_blocks : (number + 1) * self.nested_blocks]


def abstract_sharded(weight: Weight, layout: Layout) -> Weight:
    """Shapes, types and shardings of `shard_weight`'s result, from a weight of arrays or of shapes.

    A layer axis is kept. A `MixedWeight` stays one, with sharded pools.
    """
    if isinstance(weight, MixedWeight):
        pools = tuple(abstract_sharded(pool, layout) for pool in weight.pools)
        everywhere = NamedSharding(layout.mesh, P())
        return MixedWeight(pools, *jax.device_put((weight.kind, weight.index), everywhere))
    stack, lead = weight.stack, () if weight.stack is None else (weight.stack,)
    parts = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weight)
    if isinstance(weight, NF4Weight):
        cut = FourBitParts.of(weight.shape, weight.blocksize, layout)
        blocks = cut.padded(cut.blocks)

        def shape(length: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*lead, cut.count, length), dtype)

        absmax = shape(blocks, jnp.float32)
        if weight.double_quant and cut.keeps_nested:
            absmax = parts.absmax._replace(
                codes=shape(blocks, jnp.uint8), absmax=shape(cut.padded(cut.nested_blocks), jnp.float32)
            )
        parts = dataclasses.replace(
            parts,
            codes=shape(blocks * cut.blocksize // 2, jnp.uint8),
            absmax=absmax,
            shape=cut.shape,
            blocksize=cut.blocksize,
        )
    where = specs(parts, tuple(weight.shape), layout, stacked=stack is not None)
    parts = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(layout.mesh, spec)),
        parts,
        where,
    )
    return ShardedWeight(parts, tuple(weight.shape), layout)


def shard_weight(weight: Weight, layout: Layout) -> Weight:
    """Cut a weight and put each part on its devices.

    Args:
        weight: of one layer or a stack, on the host (NumPy arrays, a mapped file's among them) or on a
            device. Of an array on the host, only what this process's devices hold is touched.
        layout: how to cut it.
    """
    abstract = abstract_sharded(weight, layout)
    if isinstance(weight, MixedWeight):
        pools = tuple(shard_weight(pool, layout) for pool in weight.pools)
        return dataclasses.replace(abstract, pools=pools)
    if weight.stack is not None:

        def stack_leaves(*layers: ShardedWeight) -> ShardedWeight:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

        layers = [shard_weight(weight.layer(i), layout) for i in range(weight.stack)]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(stack_leaves, out_shardings=shardings)(*layers)
    host = jax.tree.map(np.asarray, weight)
    if not isinstance(weight, NF4Weight):
        return dataclasses.replace(abstract, parts=jax.tree.map(_from_host, host, abstract.parts))
    return dataclasses.replace(abstract, parts=_four_bit_from_host(host, abstract.parts, layout))


def is_dense(value: Any) -> bool:
    """Whether a value is a dense weight, on one device or on a mesh."""
    return isinstance(value.parts if isinstance(value, ShardedWeight) else value, DenseWeight)


def layout_of(weight: Weight) -> Layout | None:
    """The layout of a sharded weight, or of a mixed one's pools; None for a weight of one device."""
    if isinstance(weight, MixedWeight):
        return layout_of(weight.pools[0])
    return weight.layout if isinstance(weight, ShardedWeight) else None


def is_whole(weight: Weight) -> bool:
    """Whether a sharded weight multiplies as a whole: each device has all features, and rows of its own."""
    return isinstance(weight, ShardedWeight) and weight.layout.cut is None


def with_whole_weights(
    function: Callable[..., tuple[Any, Any]], weights: Sequence[Weight], of_rows: Any, shared: Any
) -> tuple[Any, Any]:
    """``function(weights, of_rows, shared)``: on a mesh, on every device with its rows.

    Args:
        function: gives arrays of the same rows, and arrays to be summed over the rows of all devices.
        weights: of one layer; all on one device, or all on one mesh and `is_whole`. The function gets them
            as weights of one device, gathered over ``fsdp``.
        of_rows: arrays [rows, ...].
        shared: arrays that every device has.
    """
    if not isinstance(weights[0], ShardedWeight):
        return function(weights, of_rows, shared)
    layout = weights[0].layout
    rows = row_spec(jax.tree.leaves(of_rows)[0].shape, layout.mesh)[0]

    def on_device(parts: Sequence[Weight], of_rows: Any, shared: Any) -> tuple[Any, Any]:
        whole = [_local(part, each.shape, each.layout) for part, each in zip(parts, weights, strict=True)]
        mine, sums = function(whole, of_rows, shared)
        return mine, jax.lax.psum(sums, BATCH) if rows == BATCH else sums

    in_specs = ([specs(each.parts, each.shape, each.layout) for each in weights], P(rows), P())
    on_mesh = _on_mesh(on_device, layout, in_specs, (P(rows), P()))
    return on_mesh([each.parts for each in weights], of_rows, shared)


def reshard_dense(weight: DenseWeight, layout: Layout) -> ShardedWeight:
    """A dense weight of one layer that is on the devices already, cut as a layout says."""
    value = jax.device_put(weight.value, NamedSharding(layout.mesh, layout.spec))
    return ShardedWeight(DenseWeight(value), tuple(weight.shape), layout)


def quantize_sharded(
    matrix: np.ndarray, target: Weight, layout: Layout, *, dtype: DTypeLike
) -> ShardedWeight:
    """Quantise a matrix [out, in] part by part; codes and scales are the whole matrix's, bit for bit.

    Each device gets the elements whose codes it will store, and finds their scales. The scales, one for 64
    elements, are gathered to be quantised themselves. A 4-bit matrix whose blocks the cut divides is
    quantised by each process as a whole.

    Args:
        matrix: on the host; of a view of a mapped file each process reads its devices' parts.
        target: shapes of the unsharded result.
        layout: how to cut it.
        dtype: what the matrix is cast to first.
    """
    if isinstance(target, INT8Weight):
        where = NamedSharding(layout.mesh, layout.spec)
        array = jax.make_array_from_callback(matrix.shape, where, lambda index: np.array(matrix[index]))
        parts = _int8_quantizer(layout, jnp.dtype(dtype))(array)
        return ShardedWeight(parts, tuple(target.shape), layout)
    cut = FourBitParts.of(target.shape, target.blocksize, layout)
    if cut.blocksize != target.blocksize or math.prod(target.shape) % target.blocksize:
        return shard_weight(NF4Weight.quantize(jnp.asarray(matrix).astype(dtype)), layout)
    where = P(None, (TENSOR, FSDP), None) if cut.cut is None else P(TENSOR, FSDP, None)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        (first, last, _), (start, stop, _), _ = (s.indices(n) for s, n in zip(index, shape, strict=True))
        runs = [cut.cut_elements(matrix, n, *(start * size, stop * size)) for n in range(first, last)]
        return np.stack(runs).reshape(last - first, stop - start, size)

    size = cut.blocksize
    shape = (cut.count, cut.padded(cut.blocks), size)
    blocks = jax.make_array_from_callback(shape, NamedSharding(layout.mesh, where), read)
    codes, absmax = _quantizer(cut, layout, where, np.dtype(dtype).name)(blocks)
    # On the host, where a product and a sum round twice whatever surrounds them.
    absmax = jax.tree.map(np.asarray, jax.jit(double_quantize)(absmax) if target.double_quant else absmax)
    sharded = abstract_sharded(target, layout)
    parts = dataclasses.replace(
        sharded.parts, codes=codes, absmax=_scales_from_host(absmax, sharded.parts.absmax, cut)
    )
    return dataclasses.replace(sharded, parts=parts)


@functools.cache
def _int8_quantizer(layout: Layout, dtype: np.dtype) -> Any:
    where = specs(INT8Weight(None, None), (0, 0), layout)
    shardings = jax.tree.map(functools.partial(NamedSharding, layout.mesh), where)
    return jax.jit(lambda matrix: INT8Weight.quantize(matrix.astype(dtype)), out_shardings=shardings)


@functools.cache
def _quantizer(cut: FourBitParts, layout: Layout, where: P, dtype: str) -> Any:
    """A program: elements by part and block → the parts' codes, and the whole matrix's scales everywhere."""

    def quantize(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, absmax = quantize_4bit(blocks[0].astype(dtype))
        axes = (TENSOR, FSDP) if cut.cut is None else FSDP
        absmax = jax.lax.all_gather(absmax, axes, tiled=True)[None, : cut.blocks]
        if cut.cut is not None:
            absmax = jax.lax.all_gather(absmax, TENSOR, tiled=True)
        return codes[None], cut.restore_order(absmax)

    return jax.jit(_on_mesh(quantize, layout, (where,), (P(*where[:2]), P())))


def _four_bit_from_host(host: NF4Weight, target: NF4Weight, layout: Layout) -> NF4Weight:
    cut = FourBitParts.of(host.shape, host.blocksize, layout)
    codes = _flat_from_host(cut.cut_codes, host.codes, target.codes)
    return dataclasses.replace(target, codes=codes, absmax=_scales_from_host(host.absmax, target.absmax, cut))


def _scales_from_host(absmax: Any, target: Any, cut: FourBitParts) -> Any:
    """The parts' scales from the whole matrix's."""
    if not isinstance(absmax, NestedAbsmax):
        return _flat_from_host(cut.cut_scales, absmax, target)
    if not cut.keeps_nested:
        return _flat_from_host(cut.cut_scales, _plain_scales(absmax), target)
    return NestedAbsmax(
        codes=_flat_from_host(cut.cut_scales, absmax.codes, target.codes),
        absmax=_flat_from_host(cut.cut_nested, absmax.absmax, target.absmax),
        code=_from_host(absmax.code, target.code),
        offset=_from_host(absmax.offset, target.offset),
    )


def _flat_from_host(cut_one: Callable[..., np.ndarray], array: np.ndarray, leaf: Any) -> jax.Array:
    """Padded runs [parts, length] of a flat array, of which `cut_one` gives a part."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        (first, last, _), (start, stop, _) = (s.indices(n) for s, n in zip(index, leaf.shape, strict=True))
        return np.stack([_padded_run(cut_one(array, n), start, stop) for n in range(first, last)])

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)


def _plain_scales(nested: NestedAbsmax) -> np.ndarray:
    """As `vlmlora_kernels.nf4.double_dequantize`, on the host: a product, then a sum, each rounded."""
    scale = np.repeat(nested.absmax, NESTED_BLOCKSIZE)[: nested.codes.size]
    return nested.code[nested.codes] * scale + nested.offset


def _padded_run(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    found = array[start:stop]
    return np.pad(found, (0, stop - start - found.size))


def _from_host(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    # Copied, because on a CPU a device may share the memory of the host's array.
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.array(array[index]))


def _local(parts: Weight, shape: Shape, layout: Layout) -> Weight:
    """Under `shard_map`: this device's rows or columns of the matrix, gathered over ``fsdp``."""
    where = specs(parts, shape, layout)
    if not isinstance(parts, NF4Weight):
        return _gather(parts, where, layout.mesh, (FSDP,))
    parts = _gather(parts, where, layout.mesh, (TENSOR, FSDP) if parts.shape == shape else (FSDP,))
    blocks = -(-math.prod(parts.shape) // parts.blocksize)
    absmax = parts.absmax
    if isinstance(absmax, NestedAbsmax):
        nested_blocks = -(-blocks // NESTED_BLOCKSIZE)
        absmax = absmax._replace(codes=absmax.codes[0, :blocks], absmax=absmax.absmax[0, :nested_blocks])
    else:
        absmax = absmax[0, :blocks]
    return dataclasses.replace(parts, codes=parts.codes[0, : -(-math.prod(parts.shape) // 2)], absmax=absmax)


def _multiplicand(parts: Weight, shape: Shape, layout: Layout, dtype: DTypeLike) -> Weight:
    """Under `shard_map`: the local weight, decoded where it is stored whole and multiplies in part."""
    weight = _local(parts, shape, layout)
    wanted = _cut_shape(shape, layout)
    if weight.shape == wanted:
        return weight
    axis = 0 if layout.cut == "rows" else 1
    start = jax.lax.axis_index(TENSOR) * wanted[axis]
    whole = weight.dequantize(dtype)
    return DenseWeight(jax.lax.dynamic_slice_in_dim(whole, start, wanted[axis], axis))


def _gather(parts: Weight, where: Weight, mesh: Mesh, axes: tuple[str, ...]) -> Weight:
    """Under `shard_map`: the arrays, with what `axes` cut put together; one device alone gathers nothing."""

    def gather(array: jax.Array, spec: P) -> jax.Array:
        for dimension, entry in enumerate(spec):
            gathered = tuple(axis for axis in _axes(entry) if axis in axes and mesh.shape[axis] > 1)
            if gathered:
                array = jax.lax.all_gather(array, gathered, axis=dimension, tiled=True)
        return array

    return jax.tree.map(gather, parts, where)


def _cut_shape(shape: Shape, layout: Layout) -> Shape:
    rows, columns = shape
    match layout.cut:
        case "rows":
            return rows // layout.tensor, columns
        case "columns":
            return rows, columns // layout.tensor
    return shape


def _activation_specs(x: jax.Array, layout: Layout) -> tuple[P, P]:
    """Of the product's input and output."""
    features_in = TENSOR if layout.cut == "columns" else None
    features_out = TENSOR if layout.cut == "rows" and not layout.gather_output else None
    return row_spec(x.shape, layout.mesh, features_in), row_spec(x.shape, layout.mesh, features_out)


# The derivative is written out: what each pass gathers and sums is said here and nowhere else.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, parts, shape, layout):
    spec_x, spec_y = _activation_specs(x, layout)

    def product(x, parts):
        y = x @ _multiplicand(parts, shape, layout, x.dtype)
        if layout.cut == "columns":
            y = jax.lax.psum(y, TENSOR)
        if layout.gather_output:
            y = jax.lax.all_gather(y, TENSOR, axis=y.ndim - 1, tiled=True)
        return y

    return _on_mesh(product, layout, (spec_x, specs(parts, shape, layout)), spec_y)(x, parts)


def _matmul_fwd(x, parts, shape, layout):
    values = jax.tree.map(lambda leaf: leaf.value, parts, is_leaf=_is_primal)
    learns = any(leaf.perturbed for leaf in jax.tree.leaves(parts, is_leaf=_is_primal))
    return _matmul(x.value, values, shape, layout), (values, x.value if learns else None)


def _matmul_bwd(shape, layout, residuals, dy):
    parts, x = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        dy = jnp.zeros(dy.aval.shape, dy.aval.dtype)
    spec_x, spec_y = _activation_specs(dy, layout)

    def transpose(dy, parts):
        weight = _multiplicand(parts, shape, layout, dy.dtype)
        dy = _local_output(dy, layout)
        # `@` is linear in x, so that any x of the right shape will do.
        zeros = jnp.zeros((*dy.shape[:-1], weight.shape[1]), dy.dtype)
        (dx,) = jax.vjp(lambda x: x @ weight, zeros)[1](dy)
        return jax.lax.psum(dx, TENSOR) if layout.cut == "rows" else dx

    dx = _on_mesh(transpose, layout, (spec_y, specs(parts, shape, layout)), spec_x)(dy, parts)
    return dx, None if x is None else _weight_gradient(x, dy, parts, shape, layout)


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


def _weight_gradient(x, dy, parts, shape, layout):
    """Of a dense weight: summed over the batch, each device keeping what it stores."""
    spec_x, spec_y = _activation_specs(x, layout)
    is_cut = spec_x[0] == BATCH

    def gradient(x, dy):
        dy = _local_output(dy, layout)
        dw = jax.lax.dot_general(dy, x, ((tuple(range(x.ndim - 1)),) * 2, ((), ())))
        return DenseWeight(_scatter(dw.astype(parts.value.dtype), layout, summed=is_cut))

    return _on_mesh(gradient, layout, (spec_x, spec_y), specs(parts, shape, layout))(x, dy)


def _scatter(dw, layout, *, summed):
    """The inverse of `_gather` for a gradient."""
    dimensions = [i for i, entry in enumerate(layout.spec) if FSDP in _axes(entry)]
    if not summed:
        for i in dimensions:
            size = dw.shape[i] // layout.mesh.shape[FSDP]
            dw = jax.lax.dynamic_slice_in_dim(dw, jax.lax.axis_index(FSDP) * size, size, i)
        return dw
    dw = jax.lax.psum(dw, DATA)
    for i in dimensions:
        dw = jax.lax.psum_scatter(dw, FSDP, scatter_dimension=i, tiled=True)
    return dw if dimensions else jax.lax.psum(dw, FSDP)


def _local_output(dy, layout):
    """This device's output features where all of them are at hand."""
    if not layout.gather_output:
        return dy
    size = dy.shape[-1] // layout.tensor
    return jax.lax.dynamic_slice_in_dim(dy, jax.lax.axis_index(TENSOR) * size, size, dy.ndim - 1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dequantize(parts, shape, layout, dtype):
    rows = TENSOR if layout.cut == "rows" else None
    columns = TENSOR if layout.cut == "columns" else None

    def decode(parts):
        return _multiplicand(parts, shape, layout, dtype).dequantize(dtype)

    return _on_mesh(decode, layout, (specs(parts, shape, layout),), P(rows, columns))(parts)


def _on_mesh(function, layout, in_specs, out_specs):
    return jax.shard_map(function, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _first_leaf(parts):
    return parts.value if isinstance(parts, DenseWeight) else parts.codes


def _divides(shape: Shape, spec: P, mesh: Mesh) -> bool:
    return all(size % _devices(entry, mesh) == 0 for size, entry in zip(shape, spec, strict=True))


def _devices(entry: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(entry))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")
