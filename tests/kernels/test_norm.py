"""Norms and their gradients in one pass: the kernels in the interpreter, and when they are taken."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tests.kernels.test_hopper import H100
from vlmlora.nn.norm import LayerNorm, RMSNorm
from vlmlora_kernels import layer_norm, layer_norm_gradient, rms_norm, rms_norm_gradient
from vlmlora_kernels.hopper import norm as hopper
from vlmlora_kernels.hopper.norm import MAX_FEATURES, MAX_ROOM, MULTIPLE, ROWS
from vlmlora_kernels.norm import obstacle

EPS = 1e-2  # so large that it matters
KINDS = ["rms_norm", "layer_norm"]


def problem(tokens, features, room, dtype=jnp.bfloat16, seed=0):
    """x, weight, dy and residual; what is to the right of dy's features is NaN."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(tokens, features), (features,), (tokens, features), (tokens, features)]
    pairs = zip(keys, shapes, strict=True)
    x, weight, dy, residual = (jax.random.normal(key, shape).astype(dtype) for key, shape in pairs)
    dy = jnp.pad(dy, ((0, 0), (0, room)), constant_values=jnp.nan)
    return x * jnp.linspace(0.01, 3, tokens, dtype=dtype)[:, None], weight, dy, residual


def bias_of(weight):
    """The layer norm's bias in these tests."""
    return weight[::-1]


def both(kind, x, weight, dy, residual, **more):
    is_centred, room = kind == "layer_norm", dy.shape[1] - x.shape[1]
    y = hopper.norm(x, weight, bias_of(weight) if is_centred else None, eps=EPS, room=room, **more)
    return y, hopper.norm_gradient(x, weight, dy, residual, is_centred=is_centred, eps=EPS, **more)


def public(kind, x, weight, dy, residual):
    room = dy.shape[1] - x.shape[1]
    if kind == "rms_norm":
        y = rms_norm(x, weight, eps=EPS, room=room)
        return y, rms_norm_gradient(x, weight, dy, residual, eps=EPS)
    y = layer_norm(x, weight, bias_of(weight), eps=EPS, room=room)
    return y, layer_norm_gradient(x, weight, dy, residual, eps=EPS)


def check(kind, found, arguments):
    """Compare with the formulas in float64."""
    (y, dx), half = found, float(jnp.finfo(found[0].dtype).eps) / 2
    assert y.dtype == dx.dtype == arguments[0].dtype
    assert y.shape == arguments[2].shape
    features = len(arguments[1])
    np.testing.assert_array_equal(y[:, features:].astype(jnp.float32), 0)
    bias = np.asarray(bias_of(arguments[1]), np.float64) if kind == "layer_norm" else 0
    x, weight, dy, residual = (np.asarray(array, np.float64) for array in arguments)
    g = dy[:, :features] * weight
    if kind == "layer_norm":
        x, g = (array - np.mean(array, axis=1, keepdims=True) for array in (x, g))
    rstd = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS)
    xhat = x * rstd
    # RMSNorm's result is rounded before it is multiplied by the weight and after that, LayerNorm's once, and
    # there float32's own rounding counts where x and its mean, or the product and the bias, cancel.
    y = np.asarray(y[:, :features], np.float64)
    roundings, atol = (2.01, 1e-6) if kind == "rms_norm" else (1.01, 4e-6)
    np.testing.assert_allclose(y, xhat * weight + bias, rtol=roundings * half, atol=atol)
    expected = residual + rstd * (g - xhat * np.mean(g * xhat, axis=1, keepdims=True))
    # Rounded once; a sum in float32 of terms that may cancel.
    atol = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, rtol=1.01 * half, atol=atol)


@pytest.mark.parametrize(
    ("kind", "tokens", "features", "room", "dtype"),
    [
        ("rms_norm", 1, MULTIPLE, 0, jnp.bfloat16),
        ("rms_norm", 3 * ROWS + 1, 10 * MULTIPLE, 64, jnp.bfloat16),
        ("rms_norm", 2 * ROWS, 4 * MULTIPLE, 136, jnp.float16),
        ("rms_norm", ROWS - 1, 3 * MULTIPLE, MAX_ROOM, jnp.bfloat16),
        ("rms_norm", ROWS + 2, 2 * MULTIPLE, 8, jnp.float16),
        ("layer_norm", 1, MULTIPLE, 0, jnp.bfloat16),
        ("layer_norm", ROWS + 1, 10 * MULTIPLE, 64, jnp.bfloat16),
        ("layer_norm", ROWS - 1, 3 * MULTIPLE, MAX_ROOM, jnp.float16),
    ],
)
def test_the_kernels_compute_in_float32(kind, tokens, features, room, dtype):
    arguments = problem(tokens, features, room, dtype)
    check(kind, both(kind, *arguments, interpret=plgpu.InterpretGPUParams()), arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "features", "room"),
    [(1000, 3584, 64), (77, MAX_FEATURES, MAX_ROOM), (2, 384, 8), (1, 1280, 0)],
)
def test_they_lower_for_an_h100(kind, tokens, features, room):
    shapes = jax.eval_shape(lambda: problem(tokens, features, room))
    step = jax.jit(functools.partial(public, kind))
    with jax.sharding.use_abstract_mesh(H100):
        text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert f"{kind}_mosaic_gpu" in text
    assert f"{kind}_gradient_mosaic_gpu" in text


@pytest.mark.parametrize(("kind", "check_vma"), [(KINDS[0], False), (KINDS[0], True), (KINDS[1], True)])
def test_they_lower_for_each_device_of_a_mesh(kind, check_vma):
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=H100.abstract_device)
    rows = PartitionSpec("data")
    specs = {"in_specs": (rows, PartitionSpec(), rows, rows), "out_specs": (rows, rows)}
    sharded = jax.shard_map(functools.partial(public, kind), mesh=mesh, check_vma=check_vma, **specs)
    shapes = jax.eval_shape(lambda: problem(64, 512, 64))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(sharded).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert f"{kind}_gradient_mosaic_gpu" in text


@pytest.mark.parametrize("kind", KINDS)
def test_on_another_platform_xla_computes_it(kind):
    arguments = problem(24, 512, 8)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(functools.partial(public, kind)).trace(*arguments)
    found = traced.lower(lowering_platforms=("cpu",)).compile()(*arguments)
    check(kind, found, arguments)
    norm = (RMSNorm if kind == "rms_norm" else LayerNorm)(512, eps=EPS, dtype=jnp.bfloat16)
    norm.weight.set_value(arguments[1])
    if kind == "layer_norm":
        norm.bias.set_value(bias_of(arguments[1]))
    found, expected = (np.asarray(y, np.float32) for y in (found[0][:, :512], jax.jit(norm)(arguments[0])))
    # Whether XLA rounds between a product and the bias is its own affair: a unit in bfloat16's last place.
    np.testing.assert_allclose(found, expected, rtol=2**-7 if kind == "layer_norm" else 0)


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
        functools.partial(layer_norm, x, weight, weight),
        functools.partial(layer_norm_gradient, x, weight, dy, residual),
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
