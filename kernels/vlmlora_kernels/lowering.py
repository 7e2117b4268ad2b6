"""Kernels among other JAX operations: the choice of platform at lowering, and batching."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from vlmlora_kernels.hopper import matvec, overlapped, wgmma
from vlmlora_kernels.hopper.tuning import FUSED_TOKENS, ManyTokens, many_tokens_row, matvec_tuning


def on_cuda(kernel: Callable, elsewhere: Callable, *arrays: PyTree) -> Any:
    """`kernel` where the program is lowered for a CUDA GPU, `elsewhere` on any other platform."""
    return jax.lax.platform_dependent(*arrays, cuda=kernel, default=elsewhere)


def one_by_one(kernel: Callable) -> Callable:
    """`kernel`, which under `jax.vmap` runs once for each element, one after the other."""
    return jax.custom_batching.sequential_vmap(kernel)


def few_tokens(decoder: matvec.FourBit | matvec.EightBit, shape: tuple[int, int]) -> Callable:
    """The fused product of a weight of `shape`; called with x [*batch, in], the codes and the scales.

    Under `jax.vmap` over `x` alone the batch joins the tokens, as many at a time as the kernel takes; over
    weights the kernel runs once for each.
    """

    @jax.custom_batching.custom_vmap
    def product(x: jax.Array, *weight: jax.Array) -> jax.Array:
        flat = x.reshape(-1, shape[1])
        chunks = [flat[i : i + FUSED_TOKENS] for i in range(0, len(flat), FUSED_TOKENS)]
        outputs = []
        for chunk in chunks:
            tuning = matvec_tuning(len(chunk), shape, decoder.name)
            kernel = matvec.matmul(decoder, tokens=len(chunk), shape=shape, tuning=tuning)
            outputs.append(kernel(chunk, *weight))
        y = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)
        return y.reshape(*x.shape[:-1], shape[0])

    return _joining_batch(product, 4 * FUSED_TOKENS)


def many_tokens(
    book: np.ndarray, shape: tuple[int, int], *, transposed: bool, row: ManyTokens | None = None
) -> Callable:
    """The fused product of many tokens; called as that of few.

    Args:
        book: the 16 values.
        shape: (out, in).
        transposed: multiply by W, for a gradient, and not by its transpose.
        row: of the table of tiles; None for the one that this weight and the number of tokens get.
    """

    @jax.custom_batching.custom_vmap
    def product(x: jax.Array, codes: jax.Array, *scales: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        tuning = (row or many_tokens_row(len(flat), shape, transposed)).tuning(flat.shape[1])
        kernel = wgmma.matmul(
            book,
            tokens=len(flat),
            shape=shape,
            transposed=transposed,
            nested=len(scales) > 1,
            tuning=tuning,
        )
        y = kernel(flat, codes, *scales)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return _joining_batch(product, None)


def many_tokens_overlapped(book: np.ndarray, shape: tuple[int, int], *, transposed: bool) -> Callable:
    """The product of many tokens that decodes W meanwhile; called as that of few.

    Args:
        book: the 16 values.
        shape: (out, in).
        transposed: multiply by W, for a gradient, and not by its transpose.
    """

    @jax.custom_batching.custom_vmap
    def product(x: jax.Array, codes: jax.Array, *scales: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        kernel = overlapped.matmul(
            book, tokens=len(flat), shape=shape, transposed=transposed, nested=len(scales) > 1
        )
        y = kernel(flat, codes, *scales)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return _joining_batch(product, None)


def _joining_batch(product: Any, most: int | None) -> Callable:
    """`product` with a rule for `jax.vmap`: over `x` alone the batch joins its tokens, up to `most`; else it
    runs once for each."""

    @product.def_vmap
    def batched(axis_size: int, in_batched: list, x: jax.Array, *weight: jax.Array):
        is_weight_batched = any(jax.tree.leaves(in_batched[1:]))
        if not is_weight_batched and (most is None or math.prod(x.shape[:-1]) <= most):
            return product(x, *weight), True
        mapped, fixed = [], []
        flags = [bool(flag) for flag in in_batched]
        for flag, array in zip(flags, (x, *weight), strict=True):
            (mapped if flag else fixed).append(array)

        def one(sliced: list) -> jax.Array:
            sliced, rest = iter(sliced), iter(fixed)
            return product(*[next(sliced) if flag else next(rest) for flag in flags])

        return jax.lax.map(one, mapped), True

    return product
