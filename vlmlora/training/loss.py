"""Cross-entropy in chunks of tokens, and the loss as a function of adapters, frozen weights and batch."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from vlmlora.nn.batch import model_inputs
from vlmlora.training.remat import GradientCheckpointing, remat_policy

IGNORE_INDEX = -100
"""Label of a token that is not learnt (PyTorch's and Hugging Face's convention)."""

LossFn = Callable[..., Float[Array, ""]]


def cross_entropy(
    hidden: Float[Array, "tokens hidden"],
    logits: Callable[[Float[Array, "chunk hidden"]], Float[Array, "chunk vocab"]],
    labels: Int[Array, " tokens"],
    *,
    chunk_size: int = 2048,
) -> Float[Array, ""]:
    """Sum of the negative log-likelihoods of `labels`, with at most `chunk_size` rows of logits at a time.

    The log-sum-exp is taken in float32. The backward pass computes a chunk's logits again; the head gets a
    gradient only if `logits` depends on something that is differentiated.

    Args:
        hidden: final hidden states.
        logits: the head.
        labels: target of each row; `IGNORE_INDEX` adds nothing.
        chunk_size: rows a chunk; bounds the memory at ``chunk_size * vocab`` float32 values, several times.
    """
    chunk_size = min(chunk_size, labels.shape[0])
    padding = -labels.shape[0] % chunk_size
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk_size, hidden.shape[-1])
    labels = jnp.pad(labels, (0, padding), constant_values=IGNORE_INDEX).reshape(-1, chunk_size)

    @jax.checkpoint
    def chunk_sum(hidden: jax.Array, labels: jax.Array) -> jax.Array:
        scores = logits(hidden).astype(jnp.float32)
        kept = labels != IGNORE_INDEX
        target = jnp.take_along_axis(scores, jnp.where(kept, labels, 0)[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(kept, jax.nn.logsumexp(scores, axis=-1) - target, 0.0))

    def add(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + chunk_sum(*chunk), None

    return jax.lax.scan(add, jnp.float32(0), (hidden, labels))[0]


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
    chunk_size: int = 2048,
) -> LossFn:
    """The mean next-token loss of a model as ``loss(adapters, frozen, batch, key=None)``.

    Args:
        graphdef: structure of the model, from ``nnx.split(module, Trainable, ...)``.
        gradient_checkpointing: see `vlmlora.training.remat.remat_policy`.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        A pure function. `batch` is a dict of the model's inputs and ``labels`` [batch, tokens], where
        ``labels[t]`` is the token at t or `IGNORE_INDEX`; the loss is the mean over labelled tokens, float32.
        `key` drives adapter dropout and may be left out.
    """
    remat = remat_policy(gradient_checkpointing)

    def loss_fn(
        adapters: PyTree, frozen: PyTree, batch: Mapping[str, jax.Array], key: PRNGKeyArray | None = None
    ) -> Float[Array, ""]:
        model = nnx.merge(graphdef, adapters, frozen)
        hidden, _ = model(**model_inputs(batch), remat=remat, key=key)
        labels = next_token_labels(batch["labels"], batch.get("segment_ids"))
        total = cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), model.logits, labels.reshape(-1), chunk_size=chunk_size
        )
        return total / jnp.maximum(jnp.sum(labels != IGNORE_INDEX), 1)

    return loss_fn
