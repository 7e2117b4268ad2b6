"""Starts that split a base weight into an adapter and what is left of it: PiSSA, OLoRA and LoftQ.

The adapter starts as a part of the weight, and the base keeps the rest, so that ``base + scaling · B A`` is
the weight again (LoftQ: nearly, see there). Each layer is taken from its stack, split and put back by itself,
and a quantised weight is decoded for one layer at a time.

==========  =====================================  ======================================================
start       on a quantised base                    what the saved adapter is right on
==========  =====================================  ======================================================
``pissa``   refused, as in PEFT                    the untouched base, by `converted_for_untouched_base`
``olora``   the rest is quantised again, as in     the untouched base, likewise; on a quantised base the
            PEFT                                   quantisation error of the rest is not in it
``loftq``   refused: the true weight is gone       see `loftq`
==========  =====================================  ======================================================
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlmlora.lora.config import LoraConfig
from vlmlora.models.module_table import LinearSpec
from vlmlora.quantization.weights import DenseWeight, INT8Weight, MixedWeight, NF4Weight, Weight

Parts = tuple[Float[Array, "r in"], Float[Array, "out r"], Float[Array, "out in"]]
"""A, B, and what the base keeps; all in float32."""


def changes_base(init_lora_weights: bool | str) -> bool:
    """Whether a start takes the adapter out of the base weight."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(("pissa", "olora", "loftq"))


def check_base(weight: Weight, spec: LinearSpec, config: LoraConfig) -> None:
    """Refuse a start that a weight's way of storing does not allow; reads no values.

    Args:
        weight: of the module, with its layer axis where it has one.
        spec: which module, and which layer.
        config: names the start.

    Raises:
        ValueError: PiSSA or LoftQ on a quantised weight, or any such start on one that is cut over devices.
    """
    init = config.init_lora_weights
    if not changes_base(init):
        return
    if isinstance(weight, MixedWeight):
        weight = weight.pools[0 if spec.layer is None else int(weight.kind[spec.layer])]
    if isinstance(weight, DenseWeight):
        return
    if not isinstance(weight, NF4Weight | INT8Weight):
        raise ValueError(
            f"init_lora_weights={init!r} changes the base weight, but that of {spec.name} is stored as "
            f"{type(weight).__name__}; make the adapter first and cut the model over devices after it, with "
            "vlmlora.distributed.shard_model"
        )
    if init == "olora":
        return
    reason = (
        "LoftQ quantises the true weight itself, which is gone"
        if init == "loftq"
        else "PiSSA's rest must come from the true weight, and PEFT refuses it too"
    )
    raise ValueError(
        f"init_lora_weights={init!r} needs 16- or 32-bit weights, but {spec.name} is quantised: {reason}. "
        "Load the model with load_in_16bit=True, or use init_lora_weights='olora'"
    )


def split_weight(
    weight: Weight, config: LoraConfig, *, r: int, scaling: float, key: PRNGKeyArray | None = None
) -> tuple[np.ndarray, np.ndarray, Weight]:
    """Split the weight of one layer.

    Args:
        weight: of one layer; quantised for OLoRA only.
        config: names the start.
        r: rank.
        scaling: factor on the adapter's output.
        key: of the random projection of ``pissa_niter_N``; other starts draw nothing.

    Returns:
        A [r, in], B [out, r], and the base's new weight, stored as `weight` was.
    """
    dense = weight.dequantize(jnp.float32)
    init = str(config.init_lora_weights)
    if init == "loftq":
        lora_A, lora_B, rest = loftq(dense, r, **loftq_arguments(config.loftq_config or {}))
    elif init == "olora":
        lora_A, lora_B, rest = olora(dense, r, scaling)
    elif init == "pissa":
        lora_A, lora_B, rest = pissa(dense, r, scaling)
    else:
        lora_A, lora_B, rest = pissa(dense, r, scaling, niter=int(init.rpartition("_")[2]), key=key)
    return np.asarray(lora_A), np.asarray(lora_B), stored_as(weight, rest)


def loftq_arguments(loftq_config: Mapping[str, Any]) -> dict[str, int]:
    """Bits and iterations, with PEFT's defaults."""
    return {"bits": loftq_config.get("loftq_bits", 4), "iterations": loftq_config.get("loftq_iter", 1)}


@functools.partial(jax.jit, static_argnames=("r", "niter"))
def pissa(
    weight: Float[Array, "out in"],
    r: int,
    scaling: float | Float[Array, ""],
    *,
    niter: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Parts:
    """The principal `r` singular triplets in the adapter (https://arxiv.org/abs/2404.02948).

    Args:
        weight: float32.
        r: rank, at most the smaller side of `weight`.
        scaling: factor on the adapter's output.
        niter: subspace iterations of a randomised decomposition; None for the whole one.
        key: draws its random projection.
    """
    with jax.default_matmul_precision("highest"):
        if niter is None:
            left, values, right = jnp.linalg.svd(weight, full_matrices=False)
        else:
            left, values, right = svd_lowrank(weight, r, niter=niter, key=key)
        root = jnp.sqrt(values[:r] / scaling)
        lora_A, lora_B = root[:, None] * right[:r], left[:, :r] * root
        return lora_A, lora_B, weight - scaling * lora_B @ lora_A


@functools.partial(jax.jit, static_argnames=("r",))
def olora(weight: Float[Array, "out in"], r: int, scaling: float | Float[Array, ""]) -> Parts:
    """The first `r` columns of Q and rows of R in the adapter (https://arxiv.org/abs/2406.01775)."""
    with jax.default_matmul_precision("highest"):
        Q, R = jnp.linalg.qr(weight)
        lora_A, lora_B = R[:r], Q[:, :r]
        return lora_A, lora_B, weight - scaling * lora_B @ lora_A


def loftq(weight: Float[Array, "out in"], r: int, *, bits: int = 4, iterations: int = 1) -> Parts:
    """A quantised base, and the best `r` singular triplets of its error (https://arxiv.org/abs/2310.08659).

    As in PEFT the base holds the values of the quantised weight, decoded (NF4 without doubly quantised
    scales, or INT8), and B A does not take the scaling into account: they make up for the error where
    `lora_alpha` is `r`.

    After one iteration the base is what bitsandbytes makes of the checkpoint (``load_in_4bit`` with
    ``bnb_4bit_quant_type="nf4"`` and ``bnb_4bit_use_double_quant=False``, or ``load_in_8bit``). The saved
    adapter is right there, and not on the unquantised checkpoint. After more iterations the base is no
    quantisation of the checkpoint. The saved adapter then says so in its config, and is right on the
    unquantised checkpoint: who loads it, PEFT or this library, repeats the iterations there first.

    Args:
        weight: float32.
        r: rank, at most the smaller side of `weight`.
        bits: 4 for NF4, 8 for INT8.
        iterations: how often weight and error take turns.
    """
    target = weight
    for _ in range(iterations):
        quantized = (
            NF4Weight.quantize(target, double_quant=False) if bits == 4 else INT8Weight.quantize(target)
        )
        base = quantized.dequantize(jnp.float32)
        lora_A, lora_B, target = _error_triplets(weight, base, r)
    return lora_A, lora_B, base


@functools.partial(jax.jit, static_argnames=("r",))
def _error_triplets(weight: jax.Array, base: jax.Array, r: int) -> Parts:
    """A and B that approximate ``weight - base``, and ``weight - B A``."""
    with jax.default_matmul_precision("highest"):
        left, values, right = jnp.linalg.svd(weight - base, full_matrices=False)
        root = jnp.sqrt(values[:r])
        lora_A, lora_B = root[:, None] * right[:r], left[:, :r] * root
        return lora_A, lora_B, weight - lora_B @ lora_A


def svd_lowrank(
    matrix: Float[Array, "rows columns"], q: int, *, niter: int, key: PRNGKeyArray
) -> tuple[Float[Array, "rows q"], Float[Array, " q"], Float[Array, "q columns"]]:
    """Randomised singular value decomposition, as ``torch.svd_lowrank`` (https://arxiv.org/abs/0909.4061)."""
    basis = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], q)))[0]
    for _ in range(niter):
        basis = jnp.linalg.qr(matrix @ jnp.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


def stored_as(weight: Weight, value: Float[Array, "out in"]) -> Weight:
    """`value` in the way in which `weight`, of one layer, is stored."""
    if isinstance(weight, NF4Weight):
        quantized = NF4Weight.quantize(
            value,
            double_quant=weight.double_quant,
            quant_type=weight.quant_type,
            blocksize=weight.blocksize,
        )
        return dataclasses.replace(quantized, dtype=weight.dtype)
    if isinstance(weight, INT8Weight):
        return INT8Weight.quantize(value)
    return DenseWeight(value.astype(weight.value.dtype))


def converted_for_untouched_base(
    lora_A: np.ndarray, lora_B: np.ndarray, initial_A: np.ndarray, initial_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An adapter of twice the rank that does on the untouched base what this one does on what was left of it.

    With ``W = rest + scaling · B₀ A₀`` the trained weight is
    ``rest + scaling · B A = W + scaling · [B, -B₀] [A; A₀]``, where the scaling stays the same:
    `config_for_untouched_base` has the arguments that go with it. As PEFT's ``subtract_mutated_init``.

    Args:
        lora_A: trained, [r, in].
        lora_B: trained, [out, r].
        initial_A: at the start, `Lora.initial_A`.
        initial_B: at the start, `Lora.initial_B`.

    Returns:
        [2 r, in] and [out, 2 r].
    """
    return np.concatenate([lora_A, initial_A]), np.concatenate([lora_B, -initial_B], axis=1)


def init_lora_weights_to_repeat(config: LoraConfig) -> str | None:
    """The start that must be repeated on the base before the saved adapter is right: LoftQ's iterations."""
    repeats = (
        config.init_lora_weights == "loftq" and loftq_arguments(config.loftq_config or {})["iterations"] > 1
    )
    return "loftq" if repeats else None


def config_for_untouched_base(config: LoraConfig) -> LoraConfig:
    """The arguments of adapters of twice the rank and the same scaling."""
    factor = 2**0.5 if config.use_rslora else 2
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
