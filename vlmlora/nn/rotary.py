"""Rotary position embeddings (https://arxiv.org/abs/2104.09864) on one or several axes of position."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Rotary = tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """``theta ** (-2i / dim)`` for i in [0, dim / 2), float32."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def scaled_inverse_frequencies(dim: int, rope_parameters: Mapping[str, Any]) -> np.ndarray:
    """Inverse frequencies as a config's `rope_parameters` scale them.

    Matches transformers' ``modeling_rope_utils.py``.

    Args:
        dim: size of a head.
        rope_parameters: `rope_theta`, and `rope_type`: ``"default"``, ``"linear"`` (all frequencies divided
            by `factor`) or ``"llama3"`` (long wavelengths divided by it, short ones kept, those between
            `original_max_position_embeddings` / `high_freq_factor` and / `low_freq_factor` interpolated).

    Returns:
        float32 [dim / 2].

    Raises:
        ValueError: another `rope_type`.
    """
    rope_type = rope_parameters.get("rope_type", "default")
    inv_freq = inverse_frequencies(dim, float(rope_parameters["rope_theta"]))
    if rope_type == "default":
        return inv_freq
    if rope_type == "linear":
        return inv_freq / np.float32(rope_parameters["factor"])
    if rope_type != "llama3":
        raise ValueError(f"rope_type={rope_type!r} is not supported; supported: default, linear, llama3")
    low, high = rope_parameters["low_freq_factor"], rope_parameters["high_freq_factor"]
    turns = rope_parameters["original_max_position_embeddings"] * inv_freq / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * inv_freq / rope_parameters["factor"] + kept * inv_freq).astype(np.float32)


def rotary(positions: Int[Array, "*batch"], inv_freq: np.ndarray) -> Rotary:
    """Cosine and sine for positions on one axis, each float32 [*batch, head_dim / 2]."""
    return axial_rotary(positions[..., None], inv_freq)


def multimodal_rotary(
    position_ids: Int[Array, "3 batch tokens"], inv_freq: np.ndarray, mrope_section: tuple[int, ...]
) -> Rotary:
    """Cosine and sine for positions with a temporal, a height and a width axis (Qwen2-VL's M-RoPE).

    Args:
        position_ids: temporal, height and width position of every token.
        inv_freq: [head_dim / 2] inverse frequencies.
        mrope_section: how many consecutive frequencies each axis drives; they sum to head_dim / 2.

    Returns:
        cos and sin, each float32 [batch, tokens, head_dim / 2].
    """
    axis = np.repeat(np.arange(len(mrope_section)) % 3, mrope_section)
    angles = jnp.moveaxis(position_ids[axis], 0, -1).astype(jnp.float32) * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def axial_rotary(positions: Int[Array, "*batch axes"], inv_freq: np.ndarray) -> Rotary:
    """Cosine and sine for patches on a grid; each axis drives an equal share of the frequencies.

    Args:
        positions: coordinates of every patch, e.g. (row, column).
        inv_freq: [head_dim / 2 / axes] inverse frequencies, the same for each axis.

    Returns:
        cos and sin, each float32 [*batch, head_dim / 2].
    """
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    angles = angles.reshape(*positions.shape[:-1], -1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    x: Float[Array, "*batch heads head_dim"], rotary: Rotary
) -> Float[Array, "*batch heads head_dim"]:
    """Rotate each pair (i, i + head_dim / 2) of the last axis by its angle, in float32."""
    cos, sin = (a[..., None, None, :] for a in rotary)
    halves = x.reshape(*x.shape[:-1], 2, -1).astype(jnp.float32)
    # The halves change places without a concatenation, whose conditions would keep XLA from wide loads.
    rotated = halves * cos + jnp.flip(halves, axis=-2) * (sin * np.array([[-1.0], [1.0]], np.float32))
    return rotated.reshape(x.shape).astype(x.dtype)
