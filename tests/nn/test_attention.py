"""Attention over packed rows: by a dense mask, and as cuDNN is asked for it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jaxprs import equations
from tests.nn.fake_cudnn import FakeCudnn, install
from vlmlora.nn import attention as attention_module
from vlmlora.nn import cudnn_attention
from vlmlora.nn.attention import attention, attention_by_flag, hide_keys
from vlmlora.nn.segments import Segments, segment_offsets

LENGTHS = [[3, 1, 6], [5, 7], [12], []]
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 12, 4, 2, 16


def make_segments(max_segments=4, *, has_gaps=False):
    ids = np.zeros((len(LENGTHS), TOKENS), np.int32)
    for row, lengths in enumerate(LENGTHS):
        ids[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    if has_gaps:
        ids[0, 5:8] = ids[1, 4] = 0
    return Segments(jnp.array(ids), jnp.array(segment_offsets(LENGTHS, max_segments)), has_gaps)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (len(LENGTHS), TOKENS, heads, HEAD_DIM))
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS), strict=True)
    ]


def alone(query, key, value, segments, *, is_causal):
    """Every segment by itself, without its padding."""
    out = np.zeros(query.shape, np.float32)
    for row, ids in enumerate(np.asarray(segments.ids)):
        for segment in set(ids[ids > 0].tolist()):
            where = np.flatnonzero(ids == segment)
            mine = (a[row : row + 1, where] for a in (query, key, value))
            out[row, where] = jax.nn.dot_product_attention(*mine, is_causal=is_causal)[0]
    return out


@pytest.fixture
def with_cudnn(monkeypatch):
    """As if this machine had a GPU, whose kernels are XLA's."""
    yield install(monkeypatch)
    cudnn_attention._reason_in_jax.cache_clear()


@pytest.mark.parametrize("has_gaps", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_segment_is_computed_as_if_alone(arrays, is_causal, has_gaps):
    segments = make_segments(has_gaps=has_gaps)
    filled = np.asarray(segments.ids) > 0
    out = attention(*arrays, is_causal=is_causal, segments=segments)
    expected = alone(*arrays, segments, is_causal=is_causal)
    np.testing.assert_allclose(np.asarray(out)[filled], expected[filled], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_gaps", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("max_segments", [3, 5])
def test_cudnn_is_asked_for_the_same(arrays, with_cudnn, max_segments, is_causal, has_gaps):
    segments = make_segments(max_segments, has_gaps=has_gaps)
    filled = np.asarray(segments.ids) > 0
    out = np.asarray(attention(*arrays, is_causal=is_causal, segments=segments))
    assert "xla" not in with_cudnn
    assert np.isfinite(out).all()
    expected = alone(*arrays, segments, is_causal=is_causal)
    np.testing.assert_allclose(out[filled], expected[filled], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_gaps", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_single_segment_needs_no_private_function(arrays, with_cudnn, is_causal, has_gaps):
    lengths = [[10], [12], [1], []]
    ids = np.array([[1] * sum(row) + [0] * (TOKENS - sum(row)) for row in lengths])
    if has_gaps:
        ids[0, 3:6] = 0
    segments = Segments(jnp.array(ids), jnp.array(segment_offsets(lengths, 1)), has_gaps)
    out = np.asarray(attention(*arrays, is_causal=is_causal, segments=segments))
    assert with_cudnn == ["cudnn"]
    assert np.isfinite(out).all()
    expected = alone(*arrays, segments, is_causal=is_causal)
    np.testing.assert_allclose(out[ids > 0], expected[ids > 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("why", ["no offsets", "Ampere", "another jax", "large heads"])
def test_where_cudnn_cannot_a_mask_keeps_segments_apart(arrays, with_cudnn, monkeypatch, caplog, why):
    segments, expected_word = make_segments(), why
    if why == "no offsets":
        segments, expected_word = Segments(segments.ids), "segment offsets"
    elif why == "Ampere":
        monkeypatch.setattr(FakeCudnn, "check_compute_capability", staticmethod(lambda _: False))
        expected_word = "Hopper"
    elif why == "another jax":

        def dot_product_attention(query, key, value, mask_type, scale, qkv_layout):
            raise AssertionError

        fake = types.SimpleNamespace(
            dot_product_attention=dot_product_attention,
            MaskType=FakeCudnn.MaskType,
            check_compute_capability=FakeCudnn.check_compute_capability,
        )
        monkeypatch.setattr(cudnn_attention, "_fused_attention", lambda: fake)
        expected_word = "kv_offsets"
    else:
        segments = make_segments(has_gaps=True)
        monkeypatch.setattr(attention_module, "_MAX_HEAD_DIM", HEAD_DIM)
        expected_word = "no room"
    for cached in (attention_module._warn_of_mask, cudnn_attention._reason_in_jax):
        cached.cache_clear()
    filled = np.asarray(segments.ids) > 0
    for _ in range(2):
        out = np.asarray(attention(*arrays, is_causal=True, segments=segments))
    assert with_cudnn == ["xla", "xla"]
    expected = alone(*arrays, segments, is_causal=True)
    np.testing.assert_allclose(out[filled], expected[filled], rtol=1e-5, atol=1e-6)
    (record,) = caplog.records
    assert expected_word in record.getMessage()


def test_the_private_function_is_there():
    assert cudnn_attention._reason_in_jax() is None


def test_hidden_keys_are_seen_by_others_only(arrays):
    blind = jnp.array([True, False, True, True])[:, None] & (jnp.arange(TOKENS) % 3 > 0)
    hidden = jnp.broadcast_to(jnp.arange(TOKENS) % 2 > 0, blind.shape)
    out = attention(*hide_keys(*arrays, blind, hidden), scale=HEAD_DIM**-0.5)
    expected = attention(*arrays, mask=~(blind[:, :, None] & hidden[:, None]))
    np.testing.assert_allclose(out[..., :HEAD_DIM], expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(out[..., HEAD_DIM:]).any()


def test_too_many_segments_are_an_error():
    with pytest.raises(ValueError, match="row 0 holds 3 segments, its budget 2"):
        segment_offsets(LENGTHS, 2)


@pytest.mark.parametrize("saved", [None, (), ("qkv", "attention_output")])
def test_one_of_two_attentions_by_a_flag(saved):
    """Against a plain conditional, under no policy and some; each named value is kept once."""
    arrays = [jax.random.normal(key, (2, 16, 2, 8)) for key in jax.random.split(jax.random.key(0), 3)]
    lengths = jnp.array([5, 8, 3, 8], jnp.int32)

    def whole(query, key, value, lengths):
        return attention(query, key, value)

    def blocks(query, key, value, lengths):
        parts = [each.reshape(4, 8, *each.shape[2:]) for each in (query, key, value)]
        return attention(*parts, kv_lengths=lengths).reshape(query.shape)

    def ours(*arguments):
        return attention_by_flag(arguments[0], whole, blocks, *arguments[1:])

    def plain(flag, *arguments):
        return jax.lax.cond(flag, whole, blocks, *arguments)

    def loss(choose, arrays, flag):
        def body(*arrays):
            return jnp.sin(choose(flag, *(2 * each for each in arrays), lengths))

        if saved is not None:
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(*saved))
        return jnp.sum(body(*arrays) ** 2)

    compute = [jax.jit(jax.value_and_grad(functools.partial(loss, choose))) for choose in (ours, plain)]
    for flag in jnp.array([False, True]):
        found, expected = (each(arrays, flag) for each in compute)
        # The same operations in float32, which XLA may fuse in another way.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, ours)))(arrays, flag)
    conditionals = sum(equation.primitive.name == "cond" for equation in equations(jaxpr))
    assert conditionals == (2 if saved is None or "attention_output" in saved else 3), "run again or not"
