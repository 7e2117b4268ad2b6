"""RMSNorm, LayerNorm and their gradients, each in one pass over the device's memory.

What a row is multiplied by is known when the whole row has been read. So a block of threads, which is one
warpgroup, holds a row in its registers from the sums over it to the result:

    y = x * rstd * weight                                 rstd = 1 / sqrt(mean(x * x) + eps)
    dx = residual + rstd * (g - xhat * mean(g * xhat))    g = dy * weight, xhat = x * rstd

LayerNorm has x - mean(x) for x and, in the gradient, g - mean(g) for g, and adds a bias. A block takes `ROWS`
rows one after another; while it waits for one, other blocks of its multiprocessor compute.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vlmlora_kernels.hopper.launch import varying_like

ROWS = 4  # of a block of threads
MULTIPLE = 128  # features come in multiples of this: one for each thread
MAX_FEATURES = 8192  # more find no place in registers
MAX_ROOM = 256  # columns of zeros, which one copy writes; they come by 8
_ROWS_OF_ZEROS = 16  # in shared memory: of 8 columns, an element for each thread


def norm(
    x: Float[Array, "tokens features"],
    weight: Float[Array, "features"],
    bias: Float[Array, "features"] | None,
    *,
    eps: float,
    room: int = 0,
    interpret: Any = None,
) -> Float[Array, "tokens width"]:
    """`rms_norm` or, with a bias, `layer_norm` of `vlmlora_kernels.norm`, on a Hopper GPU or interpreted.

    Args:
        x, weight, bias, eps, room: as there, what `obstacle` lets pass.
        interpret: how Pallas interprets the kernel where there is no such GPU.
    """

    def of_weight(weight: Any) -> Callable[[jax.Array], jax.Array]:
        weight = weight[...]
        return lambda x: (x * _rstd(x, eps)).astype(weight.dtype) * weight

    def of_both(weight: Any, bias: Any) -> Callable[[jax.Array], jax.Array]:
        weight, bias = weight[...], bias[...]

        def of_row(x: jax.Array) -> jax.Array:
            x = _centred(x)
            return x * _rstd(x, eps) * weight.astype(jnp.float32) + bias.astype(jnp.float32)

        return of_row

    if bias is None:
        return _row_by_row(of_weight, [x], [weight], room, "rms_norm", interpret)
    return _row_by_row(of_both, [x], [weight, bias], room, "layer_norm", interpret)


def norm_gradient(
    x: Float[Array, "tokens features"],
    weight: Float[Array, "features"],
    dy: Float[Array, "tokens width"],
    residual: Float[Array, "tokens features"],
    *,
    is_centred: bool,
    eps: float,
    interpret: Any = None,
) -> Float[Array, "tokens features"]:
    """`rms_norm_gradient` or, of rows that are centred first, `layer_norm_gradient`; see `norm`."""

    def of_weight(weight: Any) -> Callable[..., jax.Array]:
        def of_row(x: jax.Array, dy: jax.Array, residual: jax.Array) -> jax.Array:
            # The weight is read again for each row: registers hold enough without it.
            g = dy * weight[...].astype(jnp.float32)
            x, g = (_centred(x), _centred(g)) if is_centred else (x, g)
            rstd = _rstd(x, eps)
            mean = jnp.sum(g * x) * (rstd * rstd * (1 / len(x)))
            return residual + rstd * (g - x * mean)

        return of_row

    name = "layer_norm_gradient" if is_centred else "rms_norm_gradient"
    return _row_by_row(of_weight, [x, dy, residual], [weight], 0, name, interpret)


def _centred(x: jax.Array) -> jax.Array:
    return x - jnp.sum(x) * (1 / len(x))


def _rstd(x: jax.Array, eps: float) -> jax.Array:
    return lax.rsqrt(jnp.sum(x * x) * (1 / len(x)) + eps)


def _row_by_row(
    of_parameters: Callable[..., Callable[..., jax.Array]],
    arrays: Sequence[jax.Array],
    parameters: Sequence[jax.Array],
    room: int,
    name: str,
    interpret: Any,
) -> jax.Array:
    """``of_parameters(*parameters)(*rows)`` of references and of rows in float32, as wide, and room."""
    (tokens, features), dtype, count = arrays[0].shape, arrays[0].dtype, len(arrays)
    own = pl.ds(0, features)

    def body(*refs: Any) -> None:
        inputs, refs = refs[:count], refs[count:]
        given, (out, *scratch) = refs[: len(parameters)], refs[len(parameters) :]
        first = lax.axis_index("block") * ROWS
        for zeros in scratch:
            layout = plgpu.Layout.WG_STRIDED(zeros.shape, vec_size=1)
            zeros[...] = plgpu.layout_cast(jnp.zeros(zeros.shape, dtype), layout)
            plgpu.commit_smem()
            # That writes nothing beyond the last row.
            plgpu.copy_smem_to_gmem(zeros.at[:ROWS], out.at[pl.ds(first, ROWS), pl.ds(features, room)])
        of_row = of_parameters(*given)

        def one(row: Any, _: None) -> None:
            found = of_row(*(array[row, own].astype(jnp.float32) for array in inputs))
            out[row, own] = found.astype(dtype)

        lax.fori_loop(first, jnp.minimum(first + ROWS, tokens), one, None)
        if room:
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, features + room), dtype),
        grid=(pl.cdiv(tokens, ROWS),),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((_ROWS_OF_ZEROS, room), dtype)] if room else [],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # Threads read nothing that they have written.
        ),
        kernel_name=name,
        interpret=interpret,
    )
    return varying_like(kernel(*arrays, *parameters), [*arrays, *parameters])
