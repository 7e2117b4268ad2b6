import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.jaxprs import output_shapes
from vlmlora.nn.variables import Frozen, Trainable
from vlmlora.training.loss import IGNORE_INDEX, cross_entropy, next_token_labels, split_head

ROWS, TOKENS, HIDDEN, VOCAB = 3, 37, 8, 53


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, TOKENS, HIDDEN)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(VOCAB, HIDDEN)), jnp.float32)
    labels = rng.integers(0, VOCAB, (ROWS, TOKENS))
    labels[0, ::3] = IGNORE_INDEX
    labels[1, 5:] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    return hidden, head, jnp.asarray(labels)


def of_frozen(head):
    """What `cross_entropy` takes of a head that does not learn."""
    return (lambda _, head, h: h @ head.T), (), head


def reference(hidden, head, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(labels == IGNORE_INDEX, 0, losses))


@pytest.mark.parametrize("chunk_size", [1, 24, 111, 1000])
def test_chunks_change_neither_the_loss_nor_its_gradient(problem, chunk_size):
    hidden, head, labels = problem

    def chunked(hidden, head):
        multiply = lambda head, _, h: h @ head.T  # noqa: E731
        return cross_entropy(multiply, head, (), hidden, labels, chunk_size=chunk_size)

    # float32 sums over 29 tokens in another order.
    np.testing.assert_allclose(chunked(hidden, head), reference(hidden, head, labels), rtol=1e-5)
    ours = jax.grad(chunked, argnums=(0, 1))(hidden, head)
    theirs = jax.grad(reference, argnums=(0, 1))(hidden, head, labels)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_exists(problem):
    hidden, head, labels = problem
    loss = jax.grad(lambda h: cross_entropy(*of_frozen(head), h, labels, chunk_size=24))
    shapes = {shape for shape in output_shapes(jax.make_jaxpr(loss)(hidden)) if shape[-1:] == (VOCAB,)}
    assert max(math.prod(shape[:-1]) for shape in shapes - {(HIDDEN, VOCAB)}) == ROWS * 8


@pytest.mark.parametrize("transform", [lambda loss: loss, jax.grad])
def test_the_head_runs_only_where_there_are_labels(problem, transform):
    hidden, head, labels = problem
    seen = []

    def logits(_, head, chunk):
        jax.debug.callback(lambda: seen.append(chunk.shape))
        return chunk @ head.T

    # Row 0 has 24 labels, the most: of 13 chunks of three columns, the first eight are needed.
    transform(lambda h: cross_entropy(logits, (), head, h, labels, chunk_size=9))(hidden).block_until_ready()
    jax.effects_barrier()
    assert seen == [(ROWS, 3, HIDDEN)] * 8


def test_a_frozen_head_gets_no_gradient(problem):
    hidden, head, labels = problem

    def gradient(trained, frozen):
        def loss(hidden):
            return cross_entropy(
                lambda t, f, h: h @ (t or f)[0].T, trained, frozen, hidden, labels, chunk_size=5
            )

        return output_shapes(jax.make_jaxpr(jax.grad(loss))(hidden))

    assert (VOCAB, HIDDEN) in gradient([head], [])
    assert (VOCAB, HIDDEN) not in gradient([], [head])


class Model(nnx.Module):
    """A head beside other parameters, one of which learns."""

    def __init__(self, head, *, learns):
        self.body = Trainable(jnp.ones((5, 5)))
        self.norm = Frozen(jnp.ones(7))
        self.lm_head = (Trainable if learns else Frozen)(head)

    def logits(self, hidden):
        return hidden @ self.lm_head.get_value().T


@pytest.mark.parametrize("learns", [True, False])
def test_of_a_model_only_the_head_is_read(problem, learns):
    hidden, head, labels = problem
    logits, trained, frozen = split_head(Model(head, learns=learns), hidden)
    assert [leaf.shape for leaf in jax.tree.leaves((trained, frozen))] == [head.shape]
    assert bool(trained) == learns
    total = cross_entropy(logits, trained, frozen, hidden, labels)
    np.testing.assert_allclose(total, reference(hidden, head, labels), rtol=1e-5)


def test_large_logits_in_bfloat16_do_not_lose_the_log_sum_exp():
    hidden = jnp.full((1, 4, 8), 12.0, jnp.bfloat16)
    head = jnp.asarray(np.linspace(-1, 1, 16)[:, None] * np.ones((1, 8)), jnp.bfloat16)
    labels = jnp.array([[0, 5, 10, 15]])
    logits = (hidden[0] @ head.T).astype(jnp.float32)
    expected = jnp.sum(jax.nn.logsumexp(logits, -1) - logits[jnp.arange(4), labels[0]])
    result = cross_entropy(*of_frozen(head), hidden, labels)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_a_label_belongs_to_the_position_before_it_and_never_to_another_sample():
    labels = jnp.array([[IGNORE_INDEX, 4, 5, 6, 7, 8]])
    assert next_token_labels(labels).tolist() == [[4, 5, 6, 7, 8, IGNORE_INDEX]]
    packed = next_token_labels(labels, jnp.array([[1, 1, 1, 2, 2, 0]]))
    assert packed.tolist() == [[4, 5, IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX]]
