"""Kernels of a program are found in it, and compiled while it is."""

import threading

import jax
import jax.numpy as jnp
import pytest

from vlmlora.nn.cudnn_attention import _fused_attention
from vlmlora_kernels import compilation
from vlmlora_kernels.compilation import PallasKernel, kernels_compiled_beside, kernels_of
from vlmlora_kernels.hopper import dequantize
from vlmlora_kernels.nf4 import CODE_BOOKS

SIZES = (512, 1024)


@pytest.fixture(scope="module")
def lowered():
    """Of a program that decodes two matrices, one of them twice."""

    def decode(size, codes, scales):
        return dequantize.dequantize(CODE_BOOKS["nf4"], size=size, dtype=jnp.bfloat16, nested=False)(
            codes, scales
        )

    def program(*matrices):
        small, large = (jax.jit(decode, static_argnums=0) for _ in SIZES)
        (a, b), (c, d) = matrices
        return small(SIZES[0], a, b), large(SIZES[1], c, d), small(SIZES[0], a + 1, b)

    matrices = [(jnp.zeros(size // 2, jnp.uint8), jnp.ones(size // 64)) for size in SIZES]
    return jax.jit(program).trace(*matrices).lower(lowering_platforms=("cuda",))


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that were compiled by themselves, as if there were a GPU, and an event for the last."""
    names, all_seen = [], threading.Event()

    def lower(kernel):
        names.append(kernel.attributes["kernel_hash"])
        if len(names) == len(SIZES):
            all_seen.set()
        raise RuntimeError("no GPU")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(PallasKernel, "lower", lower)
    return names, all_seen


def test_distinct_kernels_are_found(lowered):
    kernels = kernels_of(lowered)
    assert lowered.as_text().count("nf4_dequantize") > len(kernels) == len(SIZES)
    # Each alone is to XLA the very same kernel: it knows them by their hash.
    assert [kernels_of(kernel.lower()) for kernel in kernels] == [[kernel] for kernel in kernels]


def test_so_is_attention(monkeypatch):
    fused = _fused_attention()
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)

    def loss(query, key, value):
        for is_causal in (False, True, False):
            query = jax.nn.dot_product_attention(
                query, key, value, is_causal=is_causal, implementation="cudnn"
            )
        return query.astype(jnp.float32).sum()

    query = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
    lowered = jax.jit(jax.grad(loss)).trace(query, key, key).lower(lowering_platforms=("cuda",))
    calls = kernels_of(lowered)
    # Forward and backward, causal and not.
    assert lowered.as_text().count("__cudnn$") > len(calls) == 4
    assert [kernels_of(call.lower()) for call in calls] == [[call] for call in calls]


def test_they_are_compiled_beside_the_program(lowered, compiled, monkeypatch):
    names, all_seen = compiled
    monkeypatch.setattr(compilation, "_HEAD_START", 0.0)
    with kernels_compiled_beside(lowered):  # what goes wrong with one stays with it
        assert all_seen.wait(60)
    assert set(names) == {kernel.attributes["kernel_hash"] for kernel in kernels_of(lowered)}


def test_none_is_for_a_program_that_is_read_from_the_cache(lowered, compiled):
    names, _ = compiled
    before = set(threading.enumerate())
    with kernels_compiled_beside(lowered):
        workers = set(threading.enumerate()) - before
    for worker in workers:
        worker.join(60)
    assert workers
    assert not names


def test_none_are_on_a_cpu():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert kernels_of(lowered) == []
    with kernels_compiled_beside(lowered):
        assert lowered.compile()(1.0) == 2.0
