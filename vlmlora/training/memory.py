"""How much memory a training step needs, from shapes alone: no weights, no device.

Activations are what the backward pass reads of the forward pass. They are counted by tracing the loss under
`jax.vjp` with shapes in place of arrays and taking the residuals: the outputs that are no inputs. So they are
JAX's own answer for the model, the adapters and the kind of gradient checkpointing at hand.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from transformers import PreTrainedConfig

from vlmlora.models.load_plan import QUANTIZED_PARTS
from vlmlora.models.module_table import linear_modules, module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.attention import traced_as_fused
from vlmlora.nn.flops import Products, products_of
from vlmlora.nn.saved import stacks_as_outputs
from vlmlora.nn.stack import Remat
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.weights import INT8Weight, NF4Weight
from vlmlora.training.loss import CHUNK_SIZE, make_loss_fn
from vlmlora.training.optimizer import adamw
from vlmlora.training.remat import POLICIES, remat_policy

IMAGE_SIZE = (448, 448)
"""Height and width of the image that a plan counts with."""

CHUNKS = 16
"""Chunks of tokens in the shorter of the two rows that a plan compares."""

_HOST = jax.memory.Space.Host


@dataclass(frozen=True)
class Bytes:
    """Memory on the device, and pinned memory of the host.

    Attributes:
        device: bytes on the device.
        host: bytes on the host.
    """

    device: int
    host: int = 0


@dataclass(frozen=True)
class Activations:
    """What the forward pass leaves for the backward pass under one kind of gradient checkpointing.

    Attributes:
        fixed: whatever the batch: adapters cast to the type of the computation, for instance.
        per_1000_tokens: of text.
        per_image: of one image beyond the tokens that stand for it in the text.
        recomputed_per_1000_tokens: what the largest layer saves while it is computed again, and the gradient
            of the largest array of that; on the device, for one layer at a time. Zero without checkpointing,
            which saves it for all layers.
        passing_per_1000_tokens: of what is kept on the device, what no scan over layers keeps: the end of the
            decoder, whose backward pass comes before any layer is computed again.
    """

    fixed: Bytes
    per_1000_tokens: Bytes
    per_image: Bytes
    recomputed_per_1000_tokens: int
    passing_per_1000_tokens: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a training step needs.

    Attributes:
        frozen: the base model's parameters by how they are stored: ``bfloat16``, ``nf4``, ``int8``.
        adapters: trainable parameters, float32.
        gradients: theirs.
        optimizer: AdamW's state for them.
        activations: by kind of gradient checkpointing; None where the family does not say what its batches
            look like.
        logits: a chunk of tokens' scores and their gradient, float32.
    """

    frozen: dict[str, int]
    adapters: int
    gradients: int
    optimizer: int
    activations: dict[bool | str, Activations] | None
    logits: int

    def total(self, stored: str, policy: bool | str, *, rows: int, tokens: int, images: int = 0) -> Bytes:
        """What a step of ``rows * tokens`` tokens and `images` images needs at its peak, in all.

        The peak is where the last layer is computed again, or where the logits are: whichever needs more.

        Raises:
            ValueError: there are no activations to count with.
        """
        if self.activations is None:
            raise ValueError("the plan has no activations, so that there is no total either")
        found, thousands = self.activations[policy], rows * tokens / 1000
        layer = found.recomputed_per_1000_tokens - found.passing_per_1000_tokens
        workspace = max(self.logits, round(layer * thousands))
        held = self.frozen[stored] + self.adapters + self.gradients + self.optimizer + workspace
        saved = [
            getattr(found.fixed, where)
            + thousands * getattr(found.per_1000_tokens, where)
            + images * getattr(found.per_image, where)
            for where in ("device", "host")
        ]
        return Bytes(round(held + saved[0]), round(saved[1]))


def plan_memory(module: nnx.Module, config: PreTrainedConfig) -> MemoryPlan:
    """Plan the memory of a training step.

    Attention counts as fused kernels have it, which keep no matrix of tokens × tokens. Not included are a
    layer's decoded weight, the compiler's temporaries and what the memory allocator wastes.

    Args:
        module: the model with its adapters; all arrays may be shapes.
        config: its config.
    """
    _, adapters, _ = nnx.split(module, Trainable, ...)
    trainable = _nbytes(adapters)
    optimizer = jax.eval_shape(adamw(total_steps=10).init, adapters)
    vocabulary = config.get_text_config().vocab_size
    return MemoryPlan(
        frozen=_frozen_bytes(config),
        adapters=trainable,
        gradients=trainable,
        optimizer=_nbytes(optimizer),
        activations=_plan_activations(module, config),
        logits=2 * 4 * CHUNK_SIZE * vocabulary,
    )


def saved_arrays(
    loss_fn: Callable, adapters: PyTree, frozen: PyTree, batch: dict[str, jax.ShapeDtypeStruct]
) -> tuple[list[jax.core.ShapedArray], int, int]:
    """The arrays that a loss's forward pass leaves for its backward pass; nothing is computed.

    Args:
        loss_fn: from `vlmlora.training.loss.make_loss_fn`.
        adapters: arrays or shapes.
        frozen: arrays or shapes.
        batch: shapes.

    Returns:
        Shape, type and place of every array that is not an input itself; the bytes of them that a single
        layer leaves, where layers are scanned, with the gradient of the largest array: of the layer with the
        most; and the bytes of those that no scan leaves.
    """

    def forward(adapters, frozen, batch):
        return jax.vjp(lambda adapters: loss_fn(adapters, frozen, batch), adapters)

    with stacks_as_outputs():
        jaxpr = jax.make_jaxpr(forward)(adapters, frozen, batch).jaxpr
    saved, layers, passing = _saved_of(jaxpr, jaxpr.outvars)
    return saved, max(layers, default=0), passing


@dataclass(frozen=True)
class GradientCost:
    """What the gradient of a loss costs, read from its trace. Over all devices, where there are several.

    Attributes:
        saved: bytes that the forward pass leaves for the backward pass.
        layers: bytes of them that one step leaves on the device, with the gradient of the largest, for every
            scan.
        passing: bytes of them that no scan leaves: mostly of the end of the decoder, whose backward pass
            comes before any layer is computed again.
        products: all products, those that are computed again included; the loss's are in loops of its own.
    """

    saved: Bytes
    layers: tuple[int, ...]
    passing: int
    products: Products


def gradient_cost(
    loss_fn: Callable, adapters: PyTree, frozen: PyTree, batch: Mapping[str, Any], key: Any = None
) -> GradientCost:
    """Trace a loss and its gradient; nothing is computed.

    Counted are plain products, the fused attention kernel's forward pass, and kernels that state their cost.

    Args:
        loss_fn: from `vlmlora.training.loss.make_loss_fn`.
        adapters: arrays or shapes.
        frozen: arrays or shapes.
        batch: arrays or shapes.
        key: for adapter dropout.
    """

    def forward_and_backward(adapters, frozen, batch, key):
        loss, pull = jax.vjp(lambda adapters: loss_fn(adapters, frozen, batch, key=key), adapters)
        return pull, pull(jnp.ones_like(loss))

    trace = jax.make_jaxpr(forward_and_backward, return_shape=True)
    with stacks_as_outputs():
        closed, (pull, _) = trace(adapters, frozen, batch, key)
    saved, layers, passing = _saved_of(closed.jaxpr, closed.jaxpr.outvars[: len(jax.tree.leaves(pull))])
    host = sum(_bytes_of(array) for array in saved if array.memory_space == _HOST)
    on_device = sum(map(_bytes_of, saved)) - host
    return GradientCost(Bytes(on_device, host), tuple(layers), passing, products_of(closed.jaxpr))


def _saved_of(jaxpr: Any, outvars: Sequence[Any]) -> tuple[list[jax.core.ShapedArray], list[int], int]:
    """Those of `outvars` that are no inputs; the bytes that a step of every scan leaves of them on the
    device, with the gradient of the largest; and the bytes that no scan leaves."""
    inputs = set(jaxpr.invars)
    outputs = dict.fromkeys(v for v in outvars if isinstance(v, jax.extend.core.Var))
    layers, scanned = [], set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            body = equation.params["jaxpr"]
            inner = getattr(body, "jaxpr", body).outvars
            # What a step puts out has an axis more outside of the scan; what it carries has not.
            stacked = [
                outer
                for outer, of_step in zip(equation.outvars, inner, strict=True)
                if outer in outputs and outer.aval.ndim > of_step.aval.ndim
            ]
            scanned.update(stacked)
            # What waits on the host lies on the device again when a step takes it.
            sizes = [_bytes_of(v.aval) for v in stacked if v.aval.memory_space != _HOST]
            # The gradient of the largest is as large, and lies beside it.
            layers.append((sum(sizes) + max(sizes, default=0)) // equation.params["length"])
    saved = [v for v in outputs if v not in inputs]
    return [v.aval for v in saved], layers, sum(_bytes_of(v.aval) for v in saved if v not in scanned)


def _plan_activations(module: nnx.Module, config: PreTrainedConfig) -> dict[bool | str, Activations] | None:
    if family_of(config).batch_shapes is None:
        return None
    parts = nnx.split(module, Trainable, ...)
    # The plan is for a GPU, whatever this machine has.
    remats = {policy: remat_policy(policy, offloads=True) for policy in POLICIES}
    found = {policy: _activations_of(remat, *parts, config) for policy, remat in remats.items()}
    # Without checkpointing a layer saves what it needs for itself when it is computed again.
    largest = found[False].recomputed_per_1000_tokens
    return {
        policy: replace(each, recomputed_per_1000_tokens=0 if policy is False else largest)
        for policy, each in found.items()
    }


def _activations_of(
    remat: Remat | None, graphdef: nnx.GraphDef, adapters: PyTree, frozen: PyTree, config: PreTrainedConfig
) -> Activations:
    """Activations by what they are proportional to, from their growth with the size of a row."""
    loss_fn = make_loss_fn(graphdef, gradient_checkpointing=remat or False)
    batch_shapes = family_of(config).batch_shapes

    def saved(chunks: int, images: int) -> np.ndarray:
        """Bytes on the device, on the host, of a layer, and of what no scan leaves, for one row."""
        size = (images * IMAGE_SIZE[0], IMAGE_SIZE[1]) if images else None
        with traced_as_fused():
            arrays, layer, passing = saved_arrays(
                loss_fn, adapters, frozen, batch_shapes(config, 1, chunks * CHUNK_SIZE, size)
            )
        host = sum(_bytes_of(array) for array in arrays if array.memory_space == _HOST)
        return np.array([sum(map(_bytes_of, arrays)) - host, host, layer, passing])

    # Enough tokens for low-rank products to be part of those with weights, which save less then.
    text = [saved(chunks, 0) for chunks in (CHUNKS, 2 * CHUNKS)]
    per_chunk = (text[1] - text[0]) / CHUNKS
    fixed, image = text[0] - CHUNKS * per_chunk, saved(CHUNKS, 1) - text[0]
    fixed, per_1000, image = (
        np.round(each).astype(int).tolist() for each in (fixed, per_chunk * 1000 / CHUNK_SIZE, image)
    )
    return Activations(Bytes(*fixed[:2]), Bytes(*per_1000[:2]), Bytes(*image[:2]), *per_1000[2:])


def _frozen_bytes(config: PreTrainedConfig) -> dict[str, int]:
    """Bytes of the base model with its vision and language parts stored in each way, the rest in bfloat16."""
    base = family_of(config).model(config, dtype=jnp.bfloat16)
    whole = _nbytes(nnx.state(base))
    linears = linear_modules(base)
    parts = {spec.path: spec.part for spec in module_table(config)}
    weights = [linears[path].weight.get_value() for path, part in parts.items() if part in QUANTIZED_PARTS]
    rest = whole - sum(weight.nbytes for weight in weights)
    return {"bfloat16": whole} | {
        name: rest + sum(kind.abstract(*weight.shape, weight.stack).nbytes for weight in weights)
        for name, kind in (("nf4", NF4Weight), ("int8", INT8Weight))
    }


def _nbytes(tree: PyTree) -> int:
    return sum(_bytes_of(leaf) for leaf in jax.tree.leaves(tree))


def _bytes_of(array: jax.ShapeDtypeStruct | jax.core.ShapedArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
