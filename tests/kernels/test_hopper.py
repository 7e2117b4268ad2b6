"""The Hopper kernels: what their threads compute, thread by thread on the CPU, and what JAX makes of them.

The emulator runs the code that the GPU runs. Lowering and choosing need no GPU either: an abstract device
is enough.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from tests.kernels import emulator
from vlmlora_kernels import (
    CODE_BOOKS,
    DYNAMIC_CODE,
    NestedAbsmax,
    dequantize_4bit,
    double_dequantize,
    explain,
    matmul_4bit,
    matmul_int8,
)
from vlmlora_kernels.hopper import tuning as tuning_table
from vlmlora_kernels.hopper.dequantize import Tuning as DecodeTuning
from vlmlora_kernels.hopper.dequantize import dequantize
from vlmlora_kernels.hopper.matvec import EightBit, FourBit, Tuning, matmul
from vlmlora_kernels.hopper.tuning import FUSED_TOKENS, MANY_TOKENS, many_tokens_row, matvec_tuning
from vlmlora_kernels.lowering import many_tokens

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))


def four_bit(size, nested, seed):
    """Random codes and scales, and the scales in float32."""
    rng = np.random.default_rng(seed)
    blocks = -(-size // 64)
    codes = rng.integers(0, 256, size // 2, np.uint8)
    if not nested:
        absmax = rng.uniform(0.01, 1, blocks).astype(np.float32)
        return codes, (absmax,), absmax
    scales = (
        rng.integers(0, 256, blocks, np.uint8),
        rng.uniform(0.01, 0.1, -(-blocks // 256)).astype(np.float32),
        DYNAMIC_CODE,
        np.float32(0.2),
    )
    return codes, scales, np.asarray(double_dequantize(NestedAbsmax(*map(jnp.asarray, scales))))


def decoded(codes, absmax, size, quant_type):
    """In float32, element by element: another way than the library's byte table."""
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
    return CODE_BOOKS[quant_type][nibbles] * np.repeat(absmax, 64)[:size]


@settings(max_examples=8, deadline=None)
@given(
    words=st.integers(1, 700),
    nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    warps=st.sampled_from([4, 8, 20]),
)
def test_decoding_is_exact_for_any_size(words, nested, quant_type, dtype, warps):
    size = 8 * words
    codes, scales, absmax = four_bit(size, nested, seed=words)
    kernel = dequantize(
        CODE_BOOKS[quant_type],
        size=size,
        dtype=jnp.dtype(dtype),
        nested=nested,
        tuning=DecodeTuning(warps=warps, rounds=2),
    )
    expected = decoded(codes, absmax, size, quant_type).astype(jnp.dtype(dtype))
    bits = {"bfloat16": np.uint16, "float32": np.uint32}[dtype]
    np.testing.assert_array_equal(emulator.run(kernel, codes, *scales).view(bits), expected.view(bits))


TUNINGS = [
    None,
    Tuning(3, 1, 1, 3),
    Tuning(1, 2, 3, 2),
    Tuning(5, 1, 2, 1, unit=2),
    Tuning(3, 1, 2, 2, unit=2, early_x=True),
    Tuning(2, 2, 1, 1, unit=4, early_x=True),
    Tuning(2, 2, 2, 1, unit=2, stages=2),
    Tuning(3, 1, 1, 2, unit=4, stages=3),
    Tuning(1, 2, 2, 1, unit=2, cluster=2),
    Tuning(2, 1, 1, 1, unit=2, stages=3, cluster=4),
]


@pytest.mark.parametrize("tuning", TUNINGS)
@settings(max_examples=3, deadline=None)
@given(
    tokens=st.integers(1, FUSED_TOKENS),
    out=st.integers(1, 90),
    pieces=st.integers(8, 19),
    kind=st.sampled_from(["nf4", "nested", "int8"]),
)
def test_products_of_any_shape(tokens, out, pieces, kind, tuning):
    shape = (out, 64 * pieces)
    tuning = tuning or matvec_tuning(tokens, shape, "int8" if kind == "int8" else "nf4")
    assert shape[1] >= tuning.columns
    rng = np.random.default_rng(out)
    x = rng.standard_normal((tokens, shape[1])).astype(jnp.bfloat16)
    if kind == "int8":
        decoder = EightBit()
        codes = rng.integers(-127, 128, shape, np.int8)
        scales = (rng.uniform(0.1, 1, out).astype(np.float32),)
        weight = codes * scales[0][:, None] / 127
    else:
        decoder = FourBit(CODE_BOOKS["nf4"], kind == "nested")
        codes, scales, absmax = four_bit(out * shape[1], kind == "nested", seed=out)
        weight = decoded(codes, absmax, out * shape[1], "nf4").reshape(shape)
    product = emulator.run(matmul(decoder, tokens=tokens, shape=shape, tuning=tuning), x, codes, *scales)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    # The 16 values and the result are rounded, by 2**-9 at most each, relative to the terms of a sum.
    terms = np.linalg.norm(np.sqrt(x.astype(np.float64) ** 2 @ weight.astype(np.float64).T ** 2))
    assert np.linalg.norm(product.astype(np.float64) - expected) < 2**-7 * terms


def arguments(shape, tokens=3, layers=None):
    """Abstract x, codes and doubly quantised scales."""
    size = shape[0] * shape[1]
    stack = () if layers is None else (layers,)
    array = lambda *s, dtype: jax.ShapeDtypeStruct((*stack, *s), dtype)  # noqa: E731
    scales = NestedAbsmax(
        array(size // 64, dtype=jnp.uint8),
        array(-(-size // 64 // 256), dtype=jnp.float32),
        array(256, dtype=jnp.float32),
        array(dtype=jnp.float32),
    )
    return jax.ShapeDtypeStruct((tokens, shape[1]), jnp.bfloat16), array(size // 2, dtype=jnp.uint8), scales


def lowered_for(platform, function, *args):
    with jax.sharding.use_abstract_mesh(H100):
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_is_chosen_when_lowering():
    shape = (96, 512)

    def loss(x, codes, scales):
        return matmul_4bit(x, codes, scales, shape=shape).astype(jnp.float32).sum()

    function = jax.value_and_grad(loss)
    for_gpu = lowered_for("cuda", function, *arguments(shape))
    assert "nf4_matmul_few_tokens" in for_gpu, "the forward pass reads the codes"
    assert "nf4_dequantize" in for_gpu, "the backward pass decodes"
    assert "mosaic_gpu" not in lowered_for("cpu", function, *arguments(shape))
    x = jax.ShapeDtypeStruct((2, 512), jnp.bfloat16)
    values, scale = jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    assert "int8_matmul_few_tokens" in lowered_for("cuda", matmul_int8, x, values, scale)


@pytest.mark.parametrize(
    ("kind", "tokens", "how"),
    [
        ("nf4", 3, None),
        ("nf4", 80, "fused"),  # of a weight as small as this, decoding would be chosen
        ("nf4", 80, "overlapped"),
        ("int8", 3, None),
        ("int8", 80, None),
    ],
)
def test_a_scan_with_remat_reads_the_stack_in_place(kind, tokens, how):
    shape, layers = (96, 512), 3
    x, codes, scales = arguments(shape, tokens, layers)
    stack, name = "tensor<3x24576xui8>", "nf4_dequantize"
    if kind == "int8":
        codes = jax.ShapeDtypeStruct((layers, *shape), jnp.int8)
        scales = jax.ShapeDtypeStruct((layers, shape[0]), jnp.float32)
        stack, name = "tensor<3x96x512xi8>", "stablehlo.convert"

    product = functools.partial(matmul_4bit, shape=shape, implementation=how)
    product = product if kind == "nf4" else matmul_int8

    def layer(x, weight):
        y = product(x, *weight)
        return x + jnp.pad(jnp.tanh(y), ((0, 0), (0, shape[1] - shape[0]))), None

    def loss(x, codes, scales):
        body = jax.checkpoint(layer, prevent_cse=False)
        return jax.lax.scan(body, x, (codes, scales))[0].astype(jnp.float32).sum()

    text = lowered_for("cuda", jax.value_and_grad(loss), x, codes, scales)
    if how is not None:
        kernel = {"fused": "nf4_matmul", "overlapped": "nf4_overlapped"}[how]
        name = f"{kernel}_transposed"
        assert f"{kernel}_mosaic_gpu" in text
        assert "nf4_dequantize" not in text
    assert name in text, "the backward pass reads the codes again"
    assert ("few_tokens" in text) == (tokens == 3)
    users = {
        match.group(1)
        for line in text.splitlines()
        if stack in line and (match := re.search(r"stablehlo\.(\w+)", line))
    }
    # Slices of it become part of the kernel's call, which tests/gpu looks for in the compiled program.
    assert users <= {"while", "dynamic_slice", "return"}, "a copy of the stack"
    assert "while" in users
    assert "tensor<3x96x512xbf16>" not in text, "no decoded stack is saved"


@pytest.mark.parametrize(
    ("tokens", "columns", "how", "name"),
    [
        (2, 512, None, "few_tokens"),
        (300, 512, "fused", "nf4_matmul"),
        (200, 2**14, "fused", "nf4_matmul"),  # by pairs of blocks
        (2048, 512, "overlapped", "nf4_overlapped"),
    ],
)
def test_under_vmap_and_shard_map(tokens, columns, how, name):
    shape = (96, columns)
    x, codes, scales = arguments(shape, tokens=tokens, layers=2)
    xs = jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
    product = functools.partial(matmul_4bit, shape=shape, implementation=how)
    assert name in lowered_for("cuda", jax.vmap(product), xs, codes, scales)
    alone = arguments(shape, tokens=tokens)
    assert name in lowered_for("cuda", jax.vmap(product, (0, None, None)), xs, *alone[1:])
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=H100.abstract_device)
    replicated = PartitionSpec()
    sharded = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), replicated, replicated),
        out_specs=PartitionSpec("data"),
        check_vma=how != "overlapped",
    )
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(sharded).trace(*alone).lower(lowering_platforms=("cuda",)).as_text()
        assert name in text
        outside = explain(tokens, shape)
    assert outside.implementation == "xla"
    assert "shard_map" in outside.reason


@pytest.mark.parametrize("how", [None, "overlapped"])
def test_what_differs_among_devices_is_decoded_first(how):
    """No warp of a kernel may be given that, as JAX says when it looks."""
    shape = (4096, 4096)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=H100.abstract_device)
    rows, replicated = PartitionSpec("data"), PartitionSpec()
    product = jax.shard_map(
        functools.partial(matmul_4bit, shape=shape, implementation=how),
        mesh=mesh,
        in_specs=(rows, replicated, replicated),
        out_specs=rows,
    )
    traced = jax.jit(jax.grad(lambda x, *weight: product(x, *weight).astype(jnp.float32).sum()))
    with jax.sharding.use_abstract_mesh(mesh):
        if how is not None:
            with pytest.raises(ValueError, match="check_vma=False"):
                traced.trace(*arguments(shape, tokens=4096))
            return
        text = traced.trace(*arguments(shape, tokens=4096)).lower(lowering_platforms=("cuda",)).as_text()
    assert "nf4_dequantize" in text
    assert "overlapped" not in text


def test_pairs_of_blocks_are_for_long_sums():
    row = many_tokens_row(512, (8192, 8192), False)
    clusters = [row.tuning(summed).cluster for summed in (row.paired - 1, row.paired)]
    assert clusters == [1, 2]
    assert many_tokens_row(1024, (8192, 8192), False).tuning(2**20).cluster == 1


@pytest.mark.parametrize(
    ("tokens", "shape", "transposed", "width"),
    [
        (512, (4096, 4096), False, 256),
        (512, (4096, 4096), True, 256),
        (200, (4096, 4096), True, 128),
        (512, (3584, 5120), False, 256),
        (512, (3584, 5120), True, None),  # 80 tiles
        (512, (4096, 14336), False, None),  # long
        (512, (64, 4096), True, None),  # one step
        (1024, (2048, 8192), False, None),
        (128, (4096, 4096), False, None),  # 32 tiles
    ],
)
def test_two_blocks_share_a_tile_where_all_together_fill_the_card(tokens, shape, transposed, width):
    tuning = many_tokens_row(tokens, shape, transposed).tuning(shape[0 if transposed else 1])
    assert tuning.halved == (width is not None)
    assert width in (None, tuning.tokens)


def test_a_row_for_some_weights_does_not_have_others_multiplied_without_decoding(monkeypatch):
    halved = tuning_table.ManyTokens(512, width=256, stages=4, halved=True, elements=2**20)
    assert not halved.takes(512, (512, 3584), False)
    monkeypatch.setattr(tuning_table, "MANY_TOKENS", (halved, *MANY_TOKENS))
    assert tuning_table.most_fused_tokens("nf4", (512, 3584)) == FUSED_TOKENS


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("row", MANY_TOKENS, ids=str)
def test_every_row_of_the_table_of_many_tokens_is_lowered_for_an_h100(row, transposed):
    shape = (2**14, 2**14) if row.paired else (4096, 4096)
    assert row.takes(row.tokens, shape, transposed)
    size, width = shape[0] * shape[1], shape[0 if transposed else 1]
    arguments = [
        jax.ShapeDtypeStruct((row.tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((size // 2,), jnp.uint8),
        jax.ShapeDtypeStruct((size // 64,), jnp.uint8),
        jax.ShapeDtypeStruct((size // 2**14,), jnp.float32),
        jax.ShapeDtypeStruct((256,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    ]
    product = many_tokens(CODE_BOOKS["nf4"], shape, transposed=transposed, row=row)
    with jax.sharding.use_abstract_mesh(H100):
        text = jax.jit(product).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "nf4_matmul" in text
    assert ("nf4_matmul_transposed" in text) == transposed


CASES = [
    (1, (512, 1024), {}, "fused"),
    (FUSED_TOKENS + 1, (512, 1024), {}, "decode"),
    (FUSED_TOKENS + 1, (4096, 4096), {}, "fused"),
    (FUSED_TOKENS + 1, (4096, 4096), {"backward": True}, "fused"),
    (FUSED_TOKENS, (4096, 4096), {"backward": True}, "decode"),
    (FUSED_TOKENS + 1, (8196, 4096), {}, "decode"),
    (1024, (4096, 4096), {}, "decode"),
    (1024, (8192, 8192), {}, "fused"),
    (1025, (4096, 4096), {}, "overlapped"),
    (4096, (4096, 4096), {"backward": True}, "overlapped"),
    (8192, (4096, 4096), {}, "decode"),
    (2**20, (8192, 8192), {"backward": True}, "overlapped"),
    (2**20, (1024, 8192), {}, "decode"),
    (2**20, (8196, 4096), {}, "decode"),
    (2**20, (4096, 4096), {"dtype": "float32"}, "decode"),
    (2**20, (4096, 4096), {"kind": "int8"}, "xla"),
    (None, (512, 1024), {}, "decode"),
    (4, (10, 3420), {}, "decode"),
    (4, (5, 37), {}, "xla"),
    (4, (512, 1024), {"dtype": "float32"}, "decode"),
    (None, (512, 1024), {"dtype": "float16"}, "xla"),
    (4, (512, 1024), {"blocksize": 128}, "xla"),
    (4, (512, 1024), {"kind": "int8"}, "fused"),
    (512, (512, 1024), {"kind": "int8"}, "xla"),
    (1, (2**17, 2**17), {}, "xla"),
]


@pytest.mark.parametrize(("tokens", "shape", "more", "expected"), CASES)
def test_every_choice_has_a_reason(tokens, shape, more, expected):
    with jax.sharding.use_abstract_mesh(H100):
        choice = explain(tokens, shape, **more)
        assert choice.implementation == expected, str(choice)
        if expected == "xla":
            with pytest.raises(ValueError, match="cannot run this"):
                explain(tokens, shape, implementation="fused", **more)
    assert explain(tokens, shape, **more).implementation == "xla", "no GPU here"


def test_what_is_asked_for_is_checked():
    with pytest.raises(ValueError, match="is not one of fused, overlapped, decode, xla"):
        explain(1, (8, 256), implementation="triton")
    x, codes, scales = arguments((5, 64))
    with pytest.raises(ValueError, match="256 inputs or more"):
        jax.eval_shape(
            functools.partial(matmul_4bit, shape=(5, 64), implementation="fused"), x, codes, scales
        )
    with pytest.raises(ValueError, match="needs codes"):
        jax.eval_shape(functools.partial(dequantize_4bit, shape=(6, 64), dtype="bfloat16"), codes, scales)
