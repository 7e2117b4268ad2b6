"""RMSNorm and its gradient in one pass: the kernels in the interpreter, and when they are taken."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tests.kernels.test_hopper import H100
from vlmlora.nn.norm import RMSNorm
from vlmlora_kernels import rms_norm, rms_norm_gradient
from vlmlora_kernels.hopper import rms_norm as hopper
from vlmlora_kernels.hopper.rms_norm import MAX_FEATURES, MAX_ROOM, MULTIPLE, ROWS
from vlmlora_kernels.norm import obstacle

EPS = 1e-2  # so large that it matters


def problem(tokens, features, room, dtype=jnp.bfloat16, seed=0):
    """x, weight, dy and residual; what is to the right of dy's features is NaN."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(tokens, features), (features,), (tokens, features), (tokens, features)]
    pairs = zip(keys, shapes, strict=True)
    x, weight, dy, residual = (jax.random.normal(key, shape).astype(dtype) for key, shape in pairs)
    dy = jnp.pad(dy, ((0, 0), (0, room)), constant_values=jnp.nan)
    return x * jnp.linspace(0.01, 3, tokens, dtype=dtype)[:, None], weight, dy, residual


def both(x, weight, dy, residual, **more):
    room = dy.shape[1] - x.shape[1]
    y = hopper.rms_norm(x, weight, eps=EPS, room=room, **more)
    return y, hopper.rms_norm_gradient(x, weight, dy, residual, eps=EPS, **more)


def public(x, weight, dy, residual):
    room = dy.shape[1] - x.shape[1]
    y = rms_norm(x, weight, eps=EPS, room=room)
    return y, rms_norm_gradient(x, weight, dy, residual, eps=EPS)


def check(found, arguments):
    """Compare with the formulas in float64."""
    (y, dx), half = found, float(jnp.finfo(found[0].dtype).eps) / 2
    assert y.dtype == dx.dtype == arguments[0].dtype
    assert y.shape == arguments[2].shape
    features = len(arguments[1])
    np.testing.assert_array_equal(y[:, features:].astype(jnp.float32), 0)
    x, weight, dy, residual = (np.asarray(array, np.float64) for array in arguments)
    rstd = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS)
    # The result is rounded before it is multiplied by the weight and after that.
    y = np.asarray(y[:, :features], np.float64)
    np.testing.assert_allclose(y, x * rstd * weight, rtol=2.01 * half, atol=1e-6)
    g, xhat = dy[:, :features] * weight, x * rstd
    expected = residual + rstd * (g - xhat * np.mean(g * xhat, axis=1, keepdims=True))
    # Rounded once; a sum in float32 of terms that may cancel.
    atol = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, rtol=1.01 * half, atol=atol)


@pytest.mark.parametrize(
    ("tokens", "features", "room", "dtype"),
    [
        (1, MULTIPLE, 0, jnp.bfloat16),
        (3 * ROWS + 1, 10 * MULTIPLE, 64, jnp.bfloat16),
        (2 * ROWS, 4 * MULTIPLE, 136, jnp.float16),
        (ROWS - 1, 3 * MULTIPLE, MAX_ROOM, jnp.bfloat16),
        (ROWS + 2, 2 * MULTIPLE, 8, jnp.float16),
    ],
)
def test_the_kernels_compute_in_float32(tokens, features, room, dtype):
    arguments = problem(tokens, features, room, dtype)
    check(both(*arguments, interpret=plgpu.InterpretGPUParams()), arguments)


@pytest.mark.parametrize(
    ("tokens", "features", "room"),
    [(1000, 3584, 64), (77, MAX_FEATURES, MAX_ROOM), (2, 384, 8), (1, 1280, 0)],
)
def test_they_lower_for_an_h100(tokens, features, room):
    shapes = jax.eval_shape(lambda: problem(tokens, features, room))
    with jax.sharding.use_abstract_mesh(H100):
        text = jax.jit(public).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "rms_norm_mosaic_gpu" in text
    assert "rms_norm_gradient_mosaic_gpu" in text


@pytest.mark.parametrize("check_vma", [False, True])
def test_they_lower_for_each_device_of_a_mesh(check_vma):
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=H100.abstract_device)
    rows = PartitionSpec("data")
    specs = {"in_specs": (rows, PartitionSpec(), rows, rows), "out_specs": (rows, rows)}
    sharded = jax.shard_map(public, mesh=mesh, check_vma=check_vma, **specs)
    shapes = jax.eval_shape(lambda: problem(64, 512, 64))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(sharded).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "rms_norm_gradient_mosaic_gpu" in text


def test_on_another_platform_xla_computes_it():
    arguments = problem(24, 512, 8)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(public).trace(*arguments)
    found = traced.lower(lowering_platforms=("cpu",)).compile()(*arguments)
    check(found, arguments)
    norm = RMSNorm(512, eps=EPS, dtype=jnp.bfloat16)
    norm.weight.set_value(arguments[1])
    np.testing.assert_array_equal(found[0][:, :512], jax.jit(norm)(arguments[0]))


def test_it_says_why_it_cannot_run():
    def why(tokens=4, features=512, room=64, dtype=jnp.bfloat16):
        x, _, dy, residual = jax.eval_shape(lambda: problem(tokens, features, room, dtype))
        reasons = []
        jax.eval_shape(lambda *arrays: reasons.append(obstacle(*arrays)), x, dy, residual)
        jax.eval_shape(lambda x: reasons.append(obstacle(x, room=room)), x)
        assert reasons[0] == reasons[1] or dtype == jnp.float32
        return reasons[0]

    x, weight, dy, residual = problem(4, 512, 64)
    assert "default device is a cpu" in why()
    for step in (
        functools.partial(rms_norm, x, weight),
        functools.partial(rms_norm_gradient, x, weight, dy, residual),
    ):
        with pytest.raises(ValueError, match="cannot run this: the kernels are for Hopper GPUs"):
            step(eps=EPS)
    with jax.sharding.use_abstract_mesh(H100):
        assert why() is None
        assert "features by 128 up to 8192, and these are 1216" in why(features=1216)
        assert "features by 128 up to 8192, and these are 8320" in why(features=8320)
        assert "rows by 8 elements, and there are some of 515" in why(room=3)
        assert "a room of 256 columns at most, and this has 264" in obstacle(x, room=264)
        assert "16-bit matrices of one type" in why(dtype=jnp.float32)
        assert "16-bit matrices of one type" in obstacle(x, dy.astype(jnp.float16), residual)
        assert "they are empty" in why(tokens=0)
        large = why(tokens=2**23, features=512, room=0)
        assert "fewer than 4294967296 elements, and there are 4294967296" in large
