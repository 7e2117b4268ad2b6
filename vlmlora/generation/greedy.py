"""Greedy decoding as one compiled program: a prefill, then a loop of single tokens."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PyTree

from vlmlora.nn.batch import model_inputs


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "eos_token_ids", "pad_token_id"))
def greedy_decode(
    graphdef: nnx.GraphDef,
    state: PyTree,
    batch: Mapping[str, jax.Array],
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
) -> Int[Array, "batch max_new_tokens"]:
    """The most likely continuation of every row, token by token.

    Args:
        graphdef: structure of the model.
        state: all of its parameters.
        batch: the model's inputs, prompts padded on the right; ``attention_mask`` [batch, tokens] is 1 for a
            token and 0 for padding.
        max_new_tokens: tokens at most.
        eos_token_ids: tokens that end a row.
        pad_token_id: fills a row after its end.

    Returns:
        The new tokens, an end token included; the loop stops once every row has ended.
    """
    model = nnx.merge(graphdef, state)
    valid = batch["attention_mask"] > 0
    inputs = model_inputs(batch)
    rows, length = batch["input_ids"].shape
    last = jnp.max(jnp.where(valid, jnp.arange(length), 0), axis=1)
    position_ids = batch["position_ids"]
    other_axes = tuple(axis for axis in range(position_ids.ndim) if axis != position_ids.ndim - 2)
    next_position = jnp.max(jnp.where(valid, position_ids, -1), axis=other_axes) + 1
    ends = jnp.array(eos_token_ids, jnp.int32)

    cache = model.init_cache(rows, length + max_new_tokens).mark(valid)
    hidden, cache = model(**inputs, cache=cache)
    first = _argmax(model, hidden[jnp.arange(rows), last])
    tokens = jnp.full((rows, max_new_tokens), pad_token_id, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        number, _, _, done, _ = carry
        return (number < max_new_tokens) & ~jnp.all(done)

    def decode(carry):
        number, current, tokens, done, cache = carry
        position = jnp.broadcast_to((next_position + number - 1)[:, None], (*position_ids.shape[:-1], 1))
        hidden, cache = model(current[:, None], position, cache=cache.mark(jnp.ones((rows, 1), bool)))
        new = jnp.where(done, pad_token_id, _argmax(model, hidden[:, 0]))
        done = done | jnp.isin(new, ends)
        return number + 1, new, tokens.at[:, number].set(new), done, cache

    carry = (jnp.int32(1), first, tokens, jnp.isin(first, ends), cache)
    return jax.lax.while_loop(unfinished, decode, carry)[2]


def _argmax(model: nnx.Module, hidden: jax.Array) -> jax.Array:
    return jnp.argmax(model.logits(hidden).astype(jnp.float32), axis=-1).astype(jnp.int32)
