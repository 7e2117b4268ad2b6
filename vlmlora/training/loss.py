"""Cross-entropy in chunks of tokens, and the loss as a function of adapters, frozen weights and batch."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from vlmlora.distributed import constrain_batch, gather_trainable
from vlmlora.lora.layer import Lora
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.stack import TowerRemats
from vlmlora.nn.tail import Tail
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.sharded import batch_shards
from vlmlora.training.remat import CheckpointedLoss, GradientCheckpointing

IGNORE_INDEX = -100
"""Label of a token that is not learnt (PyTorch's and Hugging Face's convention)."""

CHUNK_SIZE = 512
"""Tokens whose logits exist on a device at a time."""

BLOCK_SIZE = 2048
"""Tokens that go through a decoder's last feed-forward block at a time, where that waits for the labels."""

LossFn = Callable[..., Float[Array, ""]]
Head = Callable[[PyTree, PyTree, Float[Array, "rows chunk hidden"]], Float[Array, "rows chunk vocab"]]
"""``logits = head(trained, frozen, hidden)``, which closes over no array."""
ChunkLoss = Callable[..., Float[Array, ""]]
"""``loss(trained, frozen, hidden, labels)`` of a chunk of tokens, which closes over no array."""


def cross_entropy(
    head: Head,
    trained: PyTree,
    frozen: PyTree,
    hidden: Float[Array, "rows tokens hidden"],
    labels: Int[Array, "rows tokens"],
    *,
    chunk_size: int = CHUNK_SIZE,
) -> Float[Array, ""]:
    """Sum of the negative log-likelihoods of `labels`, computed where there are labels only.

    Each row's labelled tokens are brought to its front, see `sum_of_chunks`. The log-sum-exp is taken in
    float32. A chunk's gradient is computed beside its loss, from the same logits, so that the head multiplies
    twice a token and not three times (as in Liger's fused loss, https://arxiv.org/abs/2410.10989).

    Args:
        head: final hidden states to logits.
        trained: what of the head's parameters is differentiated; floating-point arrays.
        frozen: the other arrays that it reads. They get no gradient, and none is computed.
        hidden: final hidden states.
        labels: target of each token; `IGNORE_INDEX` adds nothing.
        chunk_size: tokens a chunk, over all rows. Memory is bounded by ``chunk_size * vocab`` logits and as
            many of their gradients, in the type of the logits.
    """

    return _cross_entropy_of_sorted(head, trained, frozen, *labelled_first(hidden, labels), chunk_size)


def _cross_entropy_of_sorted(head, trained, frozen, hidden, labels, chunk_size):
    def loss(trained: PyTree, frozen: PyTree, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        return _negative_log_likelihood(head(trained, frozen, hidden), labels)

    return sum_of_chunks(loss, trained, frozen, hidden, labels, chunk_size=chunk_size)


def labelled_first(
    hidden: Float[Array, "rows tokens hidden"], labels: Int[Array, "rows tokens"]
) -> tuple[Float[Array, "rows tokens hidden"], Int[Array, "rows tokens"]]:
    """Bring each row's labelled tokens to its front."""
    order = jnp.argsort(labels == IGNORE_INDEX, axis=1, stable=True)
    return jax.vmap(_take)(hidden, order), jnp.take_along_axis(labels, order, axis=1)


def sum_of_chunks(
    loss: ChunkLoss,
    trained: PyTree,
    frozen: PyTree,
    hidden: Float[Array, "rows tokens hidden"],
    labels: Int[Array, "rows tokens"],
    *,
    chunk_size: int,
) -> Float[Array, ""]:
    """The sum of a loss over chunks of tokens, as far as there are labels.

    A loop takes chunks of columns as long as a row has labels left, so that the cost follows the number of
    labels. Rows stay apart, which keeps a batch that is sharded over its rows where it is. A chunk's gradient
    is computed beside its loss, whose residuals exist for one chunk at a time.

    Args:
        loss: of a chunk [rows, columns]; of a token without a label zero.
        trained: what of the loss's parameters is differentiated; floating-point arrays.
        frozen: the other arrays that it reads. They get no gradient, and none is computed.
        hidden: what the loss is given of each token, those with labels in front, as from `labelled_first`.
        labels: target of each token, or `IGNORE_INDEX`.
        chunk_size: tokens a chunk, over all rows.
    """
    rows, tokens = labels.shape
    columns = max(1, min(tokens, chunk_size // rows))
    padding = -tokens % columns
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE_INDEX)
    hidden = jnp.moveaxis(hidden.reshape(rows, -1, columns, hidden.shape[-1]), 1, 0)
    labels = jnp.moveaxis(labels.reshape(rows, -1, columns), 1, 0)
    return _sum_of_chunks(loss, trained, frozen, hidden, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_chunks(loss, trained, frozen, hidden, labels):
    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        return total + loss(trained, frozen, hidden[number], labels[number])

    return jax.lax.fori_loop(0, _chunks_with_labels(labels), add, jnp.float32(0))


def _sum_of_chunks_fwd(loss, trained, frozen, hidden, labels):
    def add(number: jax.Array, carry: tuple) -> tuple:
        total, d_trained, d_hidden = carry
        of_chunk, (d_here, d_chunk) = jax.value_and_grad(loss, argnums=(0, 2))(
            trained, frozen, hidden[number], labels[number]
        )
        return total + of_chunk, jax.tree.map(jnp.add, d_trained, d_here), d_hidden.at[number].set(d_chunk)

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained), jnp.zeros_like(hidden))
    total, *gradients = jax.lax.fori_loop(0, _chunks_with_labels(labels), add, start)
    return total, gradients


def _sum_of_chunks_bwd(loss, gradients, cotangent):
    d_trained, d_hidden = jax.tree.map(lambda leaf: (cotangent * leaf).astype(leaf.dtype), gradients)
    return d_trained, None, d_hidden, None


_sum_of_chunks.defvjp(_sum_of_chunks_fwd, _sum_of_chunks_bwd)


def _chunks_with_labels(labels: Int[Array, "chunks rows columns"]) -> Int[Array, ""]:
    """How many chunks hold a label; those stand in front."""
    return jnp.sum((labels != IGNORE_INDEX).any(axis=(1, 2)), dtype=jnp.int32)


@jax.custom_vjp
def _negative_log_likelihood(
    scores: Float[Array, "rows columns vocab"], labels: Int[Array, "rows columns"]
) -> Float[Array, ""]:
    """The sum over labelled tokens."""
    return _negative_log_likelihood_fwd(scores, labels)[0]


def _negative_log_likelihood_fwd(scores, labels):
    wide = scores.astype(jnp.float32)
    kept = (labels != IGNORE_INDEX)[..., None]
    # Comparing instead of looking up leaves a vocabulary that is cut over devices where it is.
    is_target = jnp.arange(scores.shape[-1]) == labels[..., None]
    log_sum = jax.nn.logsumexp(wide, axis=-1, keepdims=True)
    target = jnp.sum(jnp.where(is_target, wide, 0.0), axis=-1, keepdims=True)
    loss = jnp.sum(jnp.where(kept, log_sum - target, 0.0))
    gradient = jnp.where(kept, jnp.exp(wide - log_sum) - is_target, 0.0)
    return loss, gradient.astype(scores.dtype)


def _negative_log_likelihood_bwd(gradient, cotangent):
    return (cotangent * gradient).astype(gradient.dtype), None


_negative_log_likelihood.defvjp(_negative_log_likelihood_fwd, _negative_log_likelihood_bwd)


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
        chunk_size: tokens whose logits exist on a device at a time.

    Returns:
        A pure function. `batch` is a dict of the model's inputs and ``labels`` [batch, tokens], where
        ``labels[t]`` is the token at t or `IGNORE_INDEX`; the loss is the mean over labelled tokens, float32.
        `key` drives adapter dropout and may be left out. On a mesh the rows of the batch are cut.

    Raises:
        ValueError: an unknown policy, or a `chunk_size` below 1; when the loss is traced, a batch without
            labels, or one on a mesh among whose devices its rows do not divide.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: it must be at least 1")

    def compute(
        remats: TowerRemats,
        adapters: PyTree,
        frozen: PyTree,
        batch: Mapping[str, jax.Array],
        key: PRNGKeyArray | None,
    ) -> Float[Array, ""]:
        if "labels" not in batch:
            raise ValueError(f"the batch has no labels, only {', '.join(batch)}; needed [batch, tokens]")
        model = nnx.merge(graphdef, adapters, frozen)
        mesh = getattr(model, "mesh", None)
        if mesh is not None:
            batch = constrain_batch(batch, mesh)
            gather_trainable(model, mesh)
        labels = next_token_labels(batch["labels"], batch.get("segment_ids"))
        block_size = max(BLOCK_SIZE, chunk_size)
        # Fewer tokens go through the last block at once anyway. On a mesh every chunk would gather its
        # weights anew. And what an adapter drops out should depend on neither.
        drops_out = key is not None and _drops_out(model)
        is_whole = labels.size <= block_size or mesh is not None or drops_out
        tail = None if is_whole else model.tail()
        hidden, _ = model(**model_inputs(batch), remat=remats, key=key, is_unfinished=tail is not None)
        if tail is None:
            of_all = chunk_size * batch_shards(mesh)
            total = cross_entropy(*split_head(model, hidden), hidden, labels, chunk_size=of_all)
        else:
            total = _loss_of_tail(tail, hidden, labels, block_size, chunk_size)
        return total / jnp.maximum(jnp.sum(labels != IGNORE_INDEX), 1)

    return CheckpointedLoss(compute, gradient_checkpointing)


def _drops_out(model: nnx.Module) -> bool:
    """Whether an adapter has dropout."""
    return any(module.dropout for _, module in nnx.iter_modules(model) if isinstance(module, Lora))


def _loss_of_tail(
    tail: Tail,
    x: Float[Array, "rows tokens hidden"],
    labels: Int[Array, "rows tokens"],
    block_size: int,
    chunk_size: int,
) -> Float[Array, ""]:
    """`cross_entropy` of what the tail makes of the residual stream, computed where there are labels only."""
    apply, trained, frozen = split_arrays(tail, lambda tail, x: tail.logits(tail(x)), x[:, :1])

    def loss(trained: PyTree, frozen: PyTree, x: jax.Array, labels: jax.Array) -> jax.Array:
        hidden = apply(lambda tail, x: tail(x), trained, frozen, x)
        head = functools.partial(apply, _logits)
        return _cross_entropy_of_sorted(head, trained, frozen, hidden, labels, chunk_size)

    return sum_of_chunks(loss, trained, frozen, *labelled_first(x, labels), chunk_size=block_size)


def split_head(model: nnx.Module, hidden: Float[Array, "*batch hidden"]) -> tuple[Head, PyTree, PyTree]:
    """A model's head as `cross_entropy` takes it: a function, its trained and its frozen arrays.

    Args:
        model: has a method `logits`.
        hidden: final hidden states, for their type.
    """
    apply, trained, frozen = split_arrays(model, _logits, hidden[..., :1, :])
    return functools.partial(apply, _logits), trained, frozen


def split_arrays(
    module: nnx.Module, function: Callable[..., Any], *arguments: Any
) -> tuple[Callable[..., Any], PyTree, PyTree]:
    """Those arrays of a module that a function of it reads: the trained and the frozen ones.

    Args:
        module: whose arrays they are.
        function: called as ``function(module, *arguments)``.
        arguments: of the shapes and types that matter to which arrays are read.

    Returns:
        ``apply``, the trained and the frozen arrays. ``apply(f, trained, frozen, *arguments)`` is
        ``f(module, *arguments)`` for this function, or for one that reads no other arrays.
    """
    graphdef, *states = nnx.split(module, Trainable, ...)
    leaves, structure = jax.tree.flatten(states)
    trainable = len(jax.tree.leaves(states[0]))

    def call(function: Callable[..., Any], leaves: Sequence[Any], *arguments: Any) -> Any:
        return function(nnx.merge(graphdef, *jax.tree.unflatten(structure, leaves)), *arguments)

    jaxpr = jax.make_jaxpr(functools.partial(call, function))(leaves, *arguments).jaxpr
    read = {id(atom) for equation in jaxpr.eqns for atom in equation.invars} | set(map(id, jaxpr.outvars))
    used = {i: leaf for i, leaf in enumerate(leaves) if id(jaxpr.invars[i]) in read}
    unread = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def apply(
        function: Callable[..., Any], trained: dict[int, Any], frozen: dict[int, Any], *arguments: Any
    ) -> Any:
        given = {**trained, **frozen}
        return call(function, [given.get(i, leaf) for i, leaf in enumerate(unread)], *arguments)

    trained = {i: leaf for i, leaf in used.items() if i < trainable}
    return apply, trained, {i: leaf for i, leaf in used.items() if i >= trainable}


def _logits(model: Any, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
    return model.logits(hidden)
