"""Gradients between low-rank products in one pass: the kernel in the interpreter, and when it is taken."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_hopper import H100
from tests.kernels.test_in_place import gated_gradient
from vlmlora_kernels import low_rank_gradients
from vlmlora_kernels.hopper import low_rank_gradients as hopper
from vlmlora_kernels.hopper.low_rank_gradients import MAX_RANK, TILE, Partition
from vlmlora_kernels.low_rank import obstacle

GATED = gated_gradient(jax.nn.silu)


def squares(cotangent, x):
    return x * x, 2 * x * cotangent


def problem(tokens, features, room, ranks, dtype=jnp.bfloat16, seed=0):
    """Cotangent, arguments, projected, low ranks and bs, for as many arguments as there are ranks but one."""
    keys = iter(jax.random.split(jax.random.key(seed), 4 * len(ranks)))

    def matrix(rows, columns):
        return jax.random.normal(next(keys), (rows, columns)).astype(dtype)

    wide = [matrix(tokens, features + room) for _ in ranks]
    projected, *low_ranks = (matrix(tokens, rank) for rank in ranks)
    return wide[0], wide[1:], projected, low_ranks, [matrix(features, rank) for rank in ranks[1:]]


def check(found, arguments, function):
    """Compare with the function in float32, and with products in float64 of what is rounded once."""
    cotangent, xs, projected, low_ranks, bs = arguments
    features = bs[0].shape[0]
    results = function(*(x[:, :features].astype(jnp.float32) for x in (cotangent, *xs)))
    value, *expected = (np.asarray(y.astype(cotangent.dtype), np.float64) for y in results)
    gradients = [np.asarray(gradient[:, :features], np.float64) for gradient in found[0]]
    for gradient, one in zip(gradients, expected, strict=True):
        # The exp is another: now and then the neighbour in bfloat16.
        np.testing.assert_allclose(gradient, one, rtol=2**-7, atol=1e-5)
    projected, low_ranks, bs = jax.tree.map(lambda x: np.asarray(x, np.float64), (projected, low_ranks, bs))
    products = [d @ b for d, b in zip(gradients, bs, strict=True)]
    sums = [d.T @ low_rank for d, low_rank in zip(gradients, low_ranks, strict=True)]
    for sum_, one in zip([*found[1], *found[3]], [*products, *sums], strict=True):
        assert sum_.dtype == jnp.float32
        # Sums in float32 of up to 20,000 products that are exact in it.
        np.testing.assert_allclose(sum_, one, rtol=0, atol=2e-5 * np.abs(one).max())
    one = value.T @ projected
    # A neighbour of the value in bfloat16 moves a sum by 2**-8 of one of its largest terms.
    np.testing.assert_allclose(found[2], one, rtol=0, atol=3e-3 * np.abs(one).max())


@pytest.mark.parametrize(
    ("tokens", "features", "room", "ranks", "function"),
    [
        (TILE, TILE, 0, [8, 8, 8], GATED),
        (2 * TILE, 9 * TILE, 24, [16, 5, 11], GATED),
        (TILE, 5 * TILE, 8, [MAX_RANK, 3, 17], GATED),
        (3 * TILE, 2 * TILE, 64, [4, 9], squares),
    ],
)
def test_the_kernel_finds_gradients_and_sums(tokens, features, room, ranks, function):
    arguments = problem(tokens, features, room, ranks)
    for is_in_place in (False, True):
        found = hopper.low_rank_gradients(
            function, *arguments, is_in_place=is_in_place, interpret=plgpu.InterpretGPUParams()
        )
        check(found, arguments, function)


def test_sums_of_several_ranges_of_tokens_are_added(monkeypatch):
    monkeypatch.setattr(Partition, "of", classmethod(lambda cls, *_: cls(5, 3, 4, 2)))
    arguments = problem(5 * TILE, 3 * TILE, 16, [8, 8, 8])
    found = hopper.low_rank_gradients(GATED, *arguments, interpret=plgpu.InterpretGPUParams())
    check(found, arguments, GATED)


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 70000), features=st.integers(1, 60000), rank=st.sampled_from([8, 16, 24, 32]))
def test_a_partition_covers_everything_and_shares_it_evenly(tokens, features, rank):
    cut = Partition.of(tokens, features, rank)
    assert cut.tokens * TILE >= tokens > (cut.tokens - 1) * TILE
    assert cut.width >= features
    assert 0 < cut.tokens - (cut.ranges - 1) * cut.tiles_of_range <= cut.tiles_of_range
    # A warpgroup's sums are 32-bit registers of its 128 threads, which have 232 each.
    assert cut.pieces * 3 * TILE * rank // 128 + 2 * TILE * rank // 128 <= 128


@pytest.mark.parametrize("is_in_place", [False, True])
def test_it_lowers_for_an_h100_and_writes_over_arguments_if_asked(is_in_place):
    shapes = jax.eval_shape(lambda: problem(1000, 3420, 36, [16, 16, 16]))
    with jax.sharding.use_abstract_mesh(H100):
        step = jax.jit(lambda *a: low_rank_gradients(GATED, *a, is_in_place=is_in_place))
        text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "low_rank_gradients" in text
    assert text.count("output_operand_alias<") == (2 if is_in_place else 0)


def test_on_another_platform_xla_computes_it():
    arguments = problem(24, 40, 8, [3, 4, 5])
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(lambda *a: low_rank_gradients(GATED, *a)).trace(*arguments)
    check(traced.lower(lowering_platforms=("cpu",)).compile()(*arguments), arguments, GATED)


def test_it_says_why_it_cannot_run():
    def why(function=GATED, **change):
        given = {"tokens": 24, "features": 40, "room": 8, "ranks": [3, 4, 5]} | change
        return obstacle(function, *problem(**given))

    reasons = []
    assert "default device is a cpu" in why()
    with pytest.raises(ValueError, match="cannot run this: the kernels are for Hopper GPUs"):
        low_rank_gradients(GATED, *problem(24, 40, 8, [3, 4, 5]))
    with jax.sharding.use_abstract_mesh(H100):
        assert why() is None
        assert "rows by 8 elements, and these have 45" in why(room=5)
        assert "ranks up to 32, and there is one of 33" in why(ranks=[3, 33, 5])
        assert "16-bit matrices of one shape and type" in why(dtype=jnp.float32)
        of_three = why(lambda *arrays: arrays, ranks=[3] * 4)
        assert "functions of 1 or 2 arguments, and this has 3" in of_three
        assert "they are empty" in why(tokens=0)
        large = jax.eval_shape(lambda: problem(2**18, 2**14, 0, [1, 1, 1]))
        jax.eval_shape(lambda *a: reasons.append(obstacle(GATED, *a)), *large)
        assert "fewer than 4294967296 elements, and these are 4294967296" in reasons[0]
        assert "knows no" in why(gated_gradient(lambda x: jax.nn.gelu(x, approximate=False)))
