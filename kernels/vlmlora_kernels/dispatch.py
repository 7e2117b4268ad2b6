"""The one place that chooses how a quantised weight is decoded or multiplied, and says why."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vlmlora_kernels.hopper.in_place import BLOCK, PRIMITIVES
from vlmlora_kernels.hopper.low_rank_gradients import MAX_RANK
from vlmlora_kernels.hopper.norm import MAX_FEATURES, MAX_ROOM, MULTIPLE
from vlmlora_kernels.hopper.tuning import FUSED_TOKENS, is_overlapped_fastest, most_fused_tokens

FUSED, OVERLAPPED, DECODE, XLA = "fused", "overlapped", "decode", "xla"
IMPLEMENTATIONS = (FUSED, OVERLAPPED, DECODE, XLA)
_BLOCKSIZE = 64


@dataclasses.dataclass(frozen=True)
class Choice:
    """How an operation runs.

    Attributes:
        implementation: ``"fused"`` (a kernel reads the codes and multiplies), ``"overlapped"`` (one writes W
            while it multiplies), ``"decode"`` (one writes W, and cuBLAS multiplies) or ``"xla"``.
        reason: why, in one sentence.
    """

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason}"


def explain(
    tokens: int | None,
    shape: tuple[int, ...],
    *,
    kind: str = "nf4",
    dtype: DTypeLike = jnp.bfloat16,
    blocksize: int = _BLOCKSIZE,
    backward: bool = False,
    varies: bool = False,
    implementation: str | None = None,
) -> Choice:
    """What a product of `tokens` rows, or with None a decoding, would run on the default device.

    Args:
        tokens: rows of `x`, all batch axes together; None for the decoding of a whole matrix.
        shape: of the weight, (out, in).
        kind: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        dtype: of `x`, or of the decoded matrix.
        blocksize: elements of a 4-bit weight that share a scale.
        backward: the product is ``dy @ W``, for the gradient, and not ``x @ W.T``.
        varies: an argument differs among the devices of a mesh: under `jax.shard_map` with `check_vma`.
        implementation: one to insist on; if ``"fused"`` cannot run a backward product, that is free again.

    Raises:
        ValueError: an unknown `implementation`, or one that cannot run this; the message says why.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)} "
            "(or None to choose)"
        )
    obstacles = {
        FUSED: _obstacle_to_fused(tokens, shape, kind, jnp.dtype(dtype), blocksize, backward),
        OVERLAPPED: _obstacle_to_overlapped(tokens, shape, kind, jnp.dtype(dtype), blocksize, varies),
        DECODE: _obstacle_to_decode(shape, kind, jnp.dtype(dtype), blocksize),
        XLA: None,
    }
    if backward and implementation == FUSED and obstacles[FUSED]:
        implementation = None
    if implementation is not None:
        if obstacles[implementation]:
            raise ValueError(
                f"implementation={implementation!r} cannot run this: {obstacles[implementation]}; "
                "leave it to None to fall back"
            )
        return Choice(implementation, "asked for")
    obstacle = _obstacle_on_device()
    if obstacle:
        return Choice(XLA, obstacle)
    if not obstacles[FUSED] and tokens <= most_fused_tokens(kind, shape):
        return Choice(FUSED, f"{tokens} tokens, where reading W is a good part of the work")
    if not obstacles[OVERLAPPED] and is_overlapped_fastest(tokens, shape):
        return Choice(OVERLAPPED, f"{tokens} tokens, which are long enough at work to decode W meanwhile")
    if not obstacles[DECODE]:
        why = f"{tokens} tokens and a weight of {shape}, where decoding W and then multiplying is faster"
        return Choice(DECODE, "a decoding" if tokens is None else obstacles[FUSED] or why)
    return Choice(XLA, f"no kernel takes it: {obstacles[DECODE]}")


def _obstacle_to_fused(tokens, shape, kind, dtype, blocksize, backward) -> str | None:
    if tokens is None:
        return "it is no product"
    if tokens == 0 or math.prod(shape) == 0:
        return "it is empty"
    if dtype != jnp.bfloat16:
        return f"the kernel takes bfloat16, and x is {dtype}"
    if kind != "int8" and blocksize != _BLOCKSIZE:
        return f"the kernel takes blocks of {_BLOCKSIZE}, and these have {blocksize}"
    if shape[1] % _BLOCKSIZE or shape[1] < 4 * _BLOCKSIZE:
        return (
            f"the kernel takes {4 * _BLOCKSIZE} inputs or more, in multiples of {_BLOCKSIZE}; "
            f"W has {shape[1]}"
        )
    if backward and tokens <= FUSED_TOKENS:
        return f"the kernel for a gradient takes more than {FUSED_TOKENS} tokens, and this has {tokens}"
    if tokens > FUSED_TOKENS:
        if kind == "int8":
            return f"the int8 kernel takes {FUSED_TOKENS} tokens at most, and this has {tokens}"
        if shape[0] % 8:
            return f"the kernel for many tokens takes a multiple of 8 outputs, and W has {shape[0]}"
    return _obstacle_of_size(shape, 2**32 if kind == "int8" else 2**33)


def _obstacle_to_overlapped(tokens, shape, kind, dtype, blocksize, varies) -> str | None:
    if not tokens:
        return "it is no product" if tokens is None else "it is empty"
    if dtype != jnp.bfloat16:
        return f"the kernel takes bfloat16, and x is {dtype}"
    if shape[0] % 8 or shape[1] % _BLOCKSIZE:
        return (
            f"the kernel takes outputs by 8 and inputs by {_BLOCKSIZE}, and W has {shape[0]} and {shape[1]}"
        )
    if varies:
        return (
            "Pallas lets no single warp read what differs among the devices of a mesh; "
            "jax.shard_map(..., check_vma=False) keeps that from it"
        )
    return _obstacle_to_decode(shape, kind, dtype, blocksize)


def _obstacle_to_decode(shape, kind, dtype, blocksize) -> str | None:
    if kind == "int8":
        return "XLA decodes int8 at the speed of memory"
    if math.prod(shape) == 0:
        return "it is empty"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel writes bfloat16 or float32, not {dtype}"
    if blocksize != _BLOCKSIZE:
        return f"the kernel takes blocks of {_BLOCKSIZE}, and these have {blocksize}"
    if math.prod(shape) % 8:
        return f"the kernel takes multiples of 8 elements, and W has {math.prod(shape)}"
    return _obstacle_of_size(shape, 2**32 // dtype.itemsize)


def obstacle_to_in_place(arrays: Sequence[Any], primitives: frozenset[str]) -> str | None:
    """Why no kernel computes an elementwise function in the place of its arguments here; None: one does.

    Args:
        arrays: the arguments' shapes and types.
        primitives: of which the function is made.
    """
    size = math.prod(arrays[0].shape)
    return (
        _obstacle_to_elementwise(arrays, primitives, "arrays")
        or (f"the kernel takes multiples of {BLOCK} elements, and these are {size}" if size % BLOCK else None)
        or _obstacle_on_device()
    )


def obstacle_to_low_rank_gradients(
    arrays: Sequence[Any], ranks: Sequence[int], primitives: frozenset[str]
) -> str | None:
    """Why no kernel computes an elementwise function's gradients beside their low-rank products here; None:
    one does.

    Args:
        arrays: shapes and types of the wide arrays that are read.
        ranks: of the factors.
        primitives: of which the function is made.
    """
    if len(arrays) > 3:
        return f"the kernel takes functions of 1 or 2 arguments, and this has {len(arrays) - 1}"
    if arrays[0].shape[-1] % 8:
        return f"the kernel takes rows by 8 elements, and these have {arrays[0].shape[-1]}"
    if max(ranks) > MAX_RANK:
        return f"the kernel takes ranks up to {MAX_RANK}, and there is one of {max(ranks)}"
    if (size := math.prod(arrays[0].shape)) >= 2**32:
        return f"the kernel takes fewer than {2**32} elements, and these are {size}"
    return _obstacle_to_elementwise(arrays, primitives, "matrices") or _obstacle_on_device()


def obstacle_to_norm(arrays: Sequence[Any], room: int) -> str | None:
    """Why no kernel normalises rows, or computes the gradient of that, here; None: one does.

    Args:
        arrays: shapes and types of the matrices that are read, the one to normalise first.
        room: columns to the right of the result.
    """
    tokens, features = arrays[0].shape
    is_alike = all((each.shape[0], each.dtype) == (tokens, arrays[0].dtype) for each in arrays)
    if not is_alike or arrays[0].dtype not in (jnp.bfloat16, jnp.float16):
        found = ", ".join(f"{each.dtype}{list(each.shape)}" for each in arrays)
        return f"the kernel takes 16-bit matrices of one type and one number of rows, and these are {found}"
    if not tokens:
        return "they are empty"
    if features % MULTIPLE or not 0 < features <= MAX_FEATURES:
        return f"the kernel takes features by {MULTIPLE} up to {MAX_FEATURES}, and these are {features}"
    if room > MAX_ROOM:
        return f"the kernel takes a room of {MAX_ROOM} columns at most, and this has {room}"
    widths = [features + room, *(each.shape[1] for each in arrays)]
    if odd := [width for width in widths if width % 8]:
        return f"the kernel takes rows by 8 elements, and there are some of {odd[0]}"
    if (size := tokens * max(widths)) >= 2**32:
        return f"the kernel takes fewer than {2**32} elements, and there are {size}"
    return _obstacle_on_device()


def _obstacle_to_elementwise(arrays: Sequence[Any], primitives: frozenset[str], what: str) -> str | None:
    first = arrays[0]
    is_alike = all((each.shape, each.dtype) == (first.shape, first.dtype) for each in arrays)
    if not is_alike or first.dtype not in (jnp.bfloat16, jnp.float16):
        found = ", ".join(f"{each.dtype}{list(each.shape)}" for each in arrays)
        return f"the kernel takes 16-bit {what} of one shape and type, and these are {found}"
    if unknown := primitives - PRIMITIVES:
        return f"the kernel knows no {', '.join(sorted(unknown))}"
    if not math.prod(first.shape):
        return "they are empty"
    if any(each.manual_axis_type.varying for each in arrays):
        return "Pallas does not write over arrays that differ among the devices of a mesh"
    return None


def _obstacle_of_size(shape, limit: int) -> str | None:
    # Offsets of a kernel are unsigned 32-bit numbers of bytes.
    size = math.prod(shape)
    return f"the kernel takes fewer than {limit} elements, and W has {size}" if size >= limit else None


def _obstacle_on_device() -> str | None:
    """Why no kernel of this package runs where this is traced; None on a Hopper GPU."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract = getattr(mesh, "abstract_device", None)
    if abstract is not None:
        kind = abstract.device_kind
        if not any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200")):
            return f"the kernels are for Hopper GPUs, and the mesh is of {kind}"
    else:
        device = jax.devices()[0]
        if device.platform != "gpu":
            return f"the kernels are for Hopper GPUs, and the default device is a {device.platform}"
        capability = getattr(device, "compute_capability", None)
        if capability != "9.0":
            return (
                "the kernels are for Hopper GPUs (compute capability 9.0), and "
                f"{device.device_kind} has {capability}"
            )
        is_partitioned = jax.device_count() > 1
        if mesh.empty and is_partitioned:
            return (
                f"a kernel is not partitioned over the {jax.device_count()} devices; call under jax.shard_map"
            )
    if any(
        size > 1 and kind != jax.sharding.AxisType.Manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    ):
        return f"a kernel is not partitioned over the axes {mesh.axis_names}; call under jax.shard_map"
    return None
