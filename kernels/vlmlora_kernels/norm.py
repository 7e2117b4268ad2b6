"""RMSNorm, LayerNorm and their gradients.

Each is a program of its own: a layer's kernels are traced and lowered once, however often they are called.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmlora_kernels.dispatch import obstacle_to_norm
from vlmlora_kernels.hopper import norm as hopper
from vlmlora_kernels.lowering import on_cuda, one_by_one


def rms_norm(
    x: Float[Array, "tokens features"], weight: Float[Array, "features"], *, eps: float, room: int = 0
) -> Float[Array, "tokens width"]:
    """Root-mean-square normalisation (https://arxiv.org/abs/1910.07467), with room to its right.

    ``x / sqrt(mean(x ** 2) + eps)`` is computed in float32 and rounded, then multiplied by the weight in the
    type of `x`. The room is for what a product with further columns needs there, for example those of LoRA.

    Args:
        x: 16-bit.
        weight: one for each feature, cast to the type of `x`.
        eps: added to the mean square.
        room: columns of zeros to the right of the features.

    Returns:
        The normalised rows, ``features + room`` wide, in the type of `x`.

    Raises:
        ValueError: no kernel takes this here; `obstacle` says so beforehand.

    Example:
        >>> import jax.numpy as jnp
        >>> from vlmlora_kernels.norm import obstacle
        >>> obstacle(jnp.ones((2, 100), jnp.bfloat16))
        'the kernel takes features by 128 up to 8192, and these are 100'
    """
    if reason := obstacle(x, room=room):
        raise ValueError(f"rms_norm cannot run this: {reason}")
    return _norm(x, weight, None, eps=eps, room=room)


def rms_norm_gradient(
    x: Float[Array, "tokens features"],
    weight: Float[Array, "features"],
    dy: Float[Array, "tokens width"],
    residual: Float[Array, "tokens features"],
    *,
    eps: float,
) -> Float[Array, "tokens features"]:
    """The gradient of what `rms_norm` normalises, added to the one that arrives beside the norm.

    Everything is computed in float32, the rows' statistics once more, and the sum is rounded once.

    Args:
        x: what was normalised, 16-bit.
        weight: one for each feature, cast to the type of `x`.
        dy: gradient of the normalised rows. Columns to the right of the features are not read.
        residual: gradient of `x` by another way: in a residual block, that around the norm.
        eps: added to the mean square.

    Returns:
        The gradient of `x`, in its type.

    Raises:
        ValueError: no kernel takes this here; `obstacle` says so beforehand.

    Example:
        >>> import jax.numpy as jnp
        >>> from vlmlora_kernels.norm import obstacle
        >>> x, dy = jnp.ones((2, 256), jnp.bfloat16), jnp.ones((2, 260), jnp.bfloat16)
        >>> obstacle(x, dy, x)
        'the kernel takes rows by 8 elements, and there are some of 260'
    """
    if reason := obstacle(x, dy, residual):
        raise ValueError(f"rms_norm_gradient cannot run this: {reason}")
    return _norm_gradient(x, weight, dy, residual, is_centred=False, eps=eps)


def layer_norm(
    x: Float[Array, "tokens features"],
    weight: Float[Array, "features"],
    bias: Float[Array, "features"],
    *,
    eps: float,
    room: int = 0,
) -> Float[Array, "tokens width"]:
    """Normalisation to mean 0 and variance 1 (https://arxiv.org/abs/1607.06450), with room to its right.

    ``(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`` is computed in float32 and rounded once. The
    room is that of `rms_norm`.

    Args:
        x: 16-bit.
        weight, bias: one for each feature, cast to the type of `x`.
        eps: added to the variance.
        room: columns of zeros to the right of the features.

    Returns:
        The normalised rows, ``features + room`` wide, in the type of `x`.

    Raises:
        ValueError: no kernel takes this here; `obstacle` says so beforehand.

    Example:
        >>> import jax.numpy as jnp
        >>> from vlmlora_kernels.norm import obstacle
        >>> obstacle(jnp.ones((2, 128), jnp.bfloat16), room=264)
        'the kernel takes a room of 256 columns at most, and this has 264'
    """
    if reason := obstacle(x, room=room):
        raise ValueError(f"layer_norm cannot run this: {reason}")
    return _norm(x, weight, bias, eps=eps, room=room)


def layer_norm_gradient(
    x: Float[Array, "tokens features"],
    weight: Float[Array, "features"],
    dy: Float[Array, "tokens width"],
    residual: Float[Array, "tokens features"],
    *,
    eps: float,
) -> Float[Array, "tokens features"]:
    """The gradient of what `layer_norm` normalises, added to the one that arrives beside the norm.

    Args:
        x, weight, dy, residual, eps: see `rms_norm_gradient`.

    Returns:
        The gradient of `x`, in its type.

    Raises:
        ValueError: no kernel takes this here; `obstacle` says so beforehand.

    Example:
        >>> import jax.numpy as jnp
        >>> from vlmlora_kernels.norm import obstacle
        >>> x = jnp.ones((2, 256), jnp.float32)
        >>> obstacle(x, x, x)[:47]
        'the kernel takes 16-bit matrices of one type an'
    """
    if reason := obstacle(x, dy, residual):
        raise ValueError(f"layer_norm_gradient cannot run this: {reason}")
    return _norm_gradient(x, weight, dy, residual, is_centred=True, eps=eps)


def obstacle(
    x: Float[Array, "tokens features"], *gradients: Float[Array, "tokens _"], room: int = 0
) -> str | None:
    """Why no kernel runs where this is traced; None if one does.

    Args:
        x: what is normalised.
        gradients: for the norm's gradient, its `dy` and `residual`.
        room: as for the norm.
    """
    return obstacle_to_norm([jax.typeof(array) for array in (x, *gradients)], room)


@functools.partial(jax.jit, static_argnames=("eps", "room"))
def _norm(x, weight, bias, *, eps, room):
    def kernel(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        return hopper.norm(x, weight, bias, eps=eps, room=room)

    def in_xla(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = x.astype(jnp.float32)
        if bias is None:
            y = (y * _rstd(y, eps)).astype(x.dtype) * weight
        else:
            y = _centred(y)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=1, keepdims=True) + eps)
            y = y * weight.astype(jnp.float32) + bias.astype(jnp.float32)
        return jnp.pad(y.astype(x.dtype), ((0, 0), (0, room)))

    bias = None if bias is None else bias.astype(x.dtype)
    return on_cuda(one_by_one(kernel), in_xla, x, weight.astype(x.dtype), bias)


@functools.partial(jax.jit, static_argnames=("is_centred", "eps"))
def _norm_gradient(x, weight, dy, residual, *, is_centred, eps):
    def kernel(*arrays: jax.Array) -> jax.Array:
        return hopper.norm_gradient(*arrays, is_centred=is_centred, eps=eps)

    def in_xla(*arrays: jax.Array) -> jax.Array:
        x, weight, dy, residual = (array.astype(jnp.float32) for array in arrays)
        g = dy[:, : x.shape[1]] * weight
        x, g = (_centred(x), _centred(g)) if is_centred else (x, g)
        rstd = _rstd(x, eps)
        xhat = x * rstd
        dx = residual + rstd * (g - xhat * jnp.mean(g * xhat, axis=1, keepdims=True))
        return dx.astype(arrays[0].dtype)

    return on_cuda(one_by_one(kernel), in_xla, x, weight.astype(x.dtype), dy, residual)


def _centred(x: jax.Array) -> jax.Array:
    return x - jnp.mean(x, axis=1, keepdims=True)


def _rstd(x: jax.Array, eps: float) -> jax.Array:
    return jnp.reciprocal(jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps))
