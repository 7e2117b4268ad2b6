import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.jaxprs import output_shapes
from vlmlora.nn.stack import SWITCH_KEEPS_NO_OPERANDS
from vlmlora.training.loss import IGNORE_INDEX, cross_entropy, next_token_labels

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


def reference(hidden, head, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(labels == IGNORE_INDEX, 0, losses))


@pytest.mark.parametrize("chunk_size", [1, 24, 111, 1000])
def test_chunks_change_neither_the_loss_nor_its_gradient(problem, chunk_size):
    hidden, head, labels = problem

    def chunked(hidden, head):
        return cross_entropy(hidden, lambda h: h @ head.T, labels, chunk_size=chunk_size)

    # float32 sums over 29 tokens in another order.
    np.testing.assert_allclose(chunked(hidden, head), reference(hidden, head, labels), rtol=1e-5)
    ours = jax.grad(chunked, argnums=(0, 1))(hidden, head)
    theirs = jax.grad(reference, argnums=(0, 1))(hidden, head, labels)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_exists(problem):
    hidden, head, labels = problem
    loss = jax.grad(lambda h: cross_entropy(h, lambda x: x @ head.T, labels, chunk_size=24))
    rows = {shape[-3:-1] for shape in output_shapes(jax.make_jaxpr(loss)(hidden)) if shape[-1:] == (VOCAB,)}
    assert rows - {(HIDDEN,)} == {(ROWS, 8)}


@pytest.mark.skipif(not SWITCH_KEEPS_NO_OPERANDS, reason="jax before 0.12 would copy the head")
def test_the_head_runs_only_where_there_are_labels(problem):
    hidden, head, labels = problem
    seen = []

    def logits(chunk):
        jax.debug.callback(lambda: seen.append(chunk.shape))
        return chunk @ head.T

    # Row 0 has 24 labels, the most: of 13 chunks of three columns, the first eight are needed.
    cross_entropy(hidden, logits, labels, chunk_size=9).block_until_ready()
    jax.effects_barrier()
    assert seen == [(ROWS, 3, HIDDEN)] * 8


def test_a_frozen_head_gets_no_gradient(problem):
    hidden, head, labels = problem

    def loss(hidden, head):
        return cross_entropy(hidden, lambda x: x @ head.T, labels, chunk_size=5)

    frozen = output_shapes(jax.make_jaxpr(jax.grad(loss, argnums=0))(hidden, head))
    trained = output_shapes(jax.make_jaxpr(jax.grad(loss, argnums=1))(hidden, head))
    assert (VOCAB, HIDDEN) in trained
    assert (VOCAB, HIDDEN) not in frozen


def test_large_logits_in_bfloat16_do_not_lose_the_log_sum_exp():
    hidden = jnp.full((1, 4, 8), 12.0, jnp.bfloat16)
    head = jnp.asarray(np.linspace(-1, 1, 16)[:, None] * np.ones((1, 8)), jnp.bfloat16)
    labels = jnp.array([[0, 5, 10, 15]])
    logits = (hidden[0] @ head.T).astype(jnp.float32)
    expected = jnp.sum(jax.nn.logsumexp(logits, -1) - logits[jnp.arange(4), labels[0]])
    result = cross_entropy(hidden, lambda h: h @ head.T, labels)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_a_label_belongs_to_the_position_before_it_and_never_to_another_sample():
    labels = jnp.array([[IGNORE_INDEX, 4, 5, 6, 7, 8]])
    assert next_token_labels(labels).tolist() == [[4, 5, 6, 7, 8, IGNORE_INDEX]]
    packed = next_token_labels(labels, jnp.array([[1, 1, 1, 2, 2, 0]]))
    assert packed.tolist() == [[4, 5, IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX]]
