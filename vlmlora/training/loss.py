"""Cross-entropy in chunks of tokens, and the loss as a function of adapters, frozen weights and batch."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from vlmlora.distributed import TENSOR, constrain_batch, gather_trainable
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.stack import SWITCH_KEEPS_NO_OPERANDS, TowerRemats
from vlmlora.training.remat import CheckpointedLoss, GradientCheckpointing

IGNORE_INDEX = -100
"""Label of a token that is not learnt (PyTorch's and Hugging Face's convention)."""

CHUNK_SIZE = 2048
"""Tokens whose logits exist at a time."""

LossFn = Callable[..., Float[Array, ""]]


def cross_entropy(
    hidden: Float[Array, "rows tokens hidden"],
    logits: Callable[[Float[Array, "rows chunk hidden"]], Float[Array, "rows chunk vocab"]],
    labels: Int[Array, "rows tokens"],
    *,
    chunk_size: int = CHUNK_SIZE,
    is_vocab_cut: bool = False,
) -> Float[Array, ""]:
    """Sum of the negative log-likelihoods of `labels`, computed where there are labels only.

    Each row's labelled tokens are brought to its front, and chunks of columns are taken as long as a row has
    labels left, so that the head's cost follows the number of labels. (With jax before 0.12 all chunks are
    taken: a conditional there would copy the head for each.) Rows stay apart, which keeps a batch
    that is sharded over its rows where it is. The log-sum-exp is taken in float32. The backward pass computes
    a chunk's logits again; the head gets a gradient only if `logits` depends on something that is
    differentiated.

    Args:
        hidden: final hidden states.
        logits: the head.
        labels: target of each token; `IGNORE_INDEX` adds nothing.
        chunk_size: tokens a chunk, over all rows; bounds the memory at ``chunk_size * vocab`` float32 values,
            several times.
        is_vocab_cut: whether devices hold a part of the vocabulary each; a look-up would gather the logits.
    """
    rows, tokens = labels.shape
    kept = labels != IGNORE_INDEX
    order = jnp.argsort(~kept, axis=1, stable=True)
    hidden = jax.vmap(_take)(hidden, order)
    labels = jnp.take_along_axis(labels, order, axis=1)
    columns = max(1, min(tokens, chunk_size // rows))
    padding = -tokens % columns
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE_INDEX)
    hidden = jnp.moveaxis(hidden.reshape(rows, -1, columns, hidden.shape[-1]), 1, 0)
    labels = jnp.moveaxis(labels.reshape(rows, -1, columns), 1, 0)
    has_labels = jnp.arange(labels.shape[0]) * columns < jnp.max(jnp.sum(kept, axis=1))

    @jax.checkpoint
    def chunk_sum(hidden: jax.Array, labels: jax.Array) -> jax.Array:
        scores = logits(hidden).astype(jnp.float32)
        kept = labels != IGNORE_INDEX
        index = jnp.where(kept, labels, 0)[..., None]
        if is_vocab_cut:
            target = jnp.sum(jnp.where(jnp.arange(scores.shape[-1]) == index, scores, 0.0), axis=-1)
        else:
            target = jnp.take_along_axis(scores, index, axis=-1)[..., 0]
        return jnp.sum(jnp.where(kept, jax.nn.logsumexp(scores, axis=-1) - target, 0.0))

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        is_needed, hidden, labels = chunk
        if not SWITCH_KEEPS_NO_OPERANDS:
            return total + chunk_sum(hidden, labels), None
        return total + jax.lax.cond(is_needed, chunk_sum, lambda *_: jnp.float32(0), hidden, labels), None

    return jax.lax.scan(add, jnp.float32(0), (has_labels, hidden, labels))[0]


def _take(
    hidden: Float[Array, "tokens hidden"], order: Int[Array, " tokens"]
) -> Float[Array, "tokens hidden"]:
    # That no token is taken twice lets the gradient be a plain scatter instead of an atomic sum.
    return hidden.at[order].get(unique_indices=True, mode="promise_in_bounds")


def next_token_labels(
    labels: Int[Array, "batch tokens"], segment_ids: Int[Array, "batch tokens"] | None = None
) -> Int[Array, "batch tokens"]:
    """For each position the label of the one after it, never across the samples of a packed row."""
    shifted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    if segment_ids is None:
        return shifted
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(following == segment_ids, shifted, IGNORE_INDEX)


def make_loss_fn(
    graphdef: nnx.GraphDef,
    *,
    gradient_checkpointing: GradientCheckpointing = "unsloth",
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """The mean next-token loss of a model as ``loss(adapters, frozen, batch, key=None)``.

    Args:
        graphdef: structure of the model, from ``nnx.split(module, Trainable, ...)``.
        gradient_checkpointing: see `vlmlora.training.remat.tower_remats`; or ``"auto"``, for which
            `vlmlora.training.step.make_train_step` chooses when it sees the first batch.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        A pure function. `batch` is a dict of the model's inputs and ``labels`` [batch, tokens], where
        ``labels[t]`` is the token at t or `IGNORE_INDEX`; the loss is the mean over labelled tokens, float32.
        `key` drives adapter dropout and may be left out. On a mesh the rows of the batch are cut.

    Raises:
        ValueError: an unknown policy; or when the loss is traced on a mesh among whose devices the batch's
            rows do not divide.
    """

    def compute(
        remats: TowerRemats,
        adapters: PyTree,
        frozen: PyTree,
        batch: Mapping[str, jax.Array],
        key: PRNGKeyArray | None,
    ) -> Float[Array, ""]:
        model = nnx.merge(graphdef, adapters, frozen)
        mesh = getattr(model, "mesh", None)
        if mesh is not None:
            batch = constrain_batch(batch, mesh)
            gather_trainable(model, mesh)
        hidden, _ = model(**model_inputs(batch), remat=remats, key=key)
        labels = next_token_labels(batch["labels"], batch.get("segment_ids"))
        is_vocab_cut = mesh is not None and mesh.shape[TENSOR] > 1
        total = cross_entropy(hidden, model.logits, labels, chunk_size=chunk_size, is_vocab_cut=is_vocab_cut)
        return total / jnp.maximum(jnp.sum(labels != IGNORE_INDEX), 1)

    return CheckpointedLoss(compute, gradient_checkpointing)
