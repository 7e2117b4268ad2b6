"""What only a GPU can show: cuDNN attention, host offload, and the same results as on a CPU."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import vlmlora
from tests.jaxprs import equations
from tests.models.qwen2_5_vl_cases import EOS, Case, Visual, batches, tiny_config
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.generation.greedy import greedy_decode
from vlmlora.lora.apply import add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.init import init_parameters
from vlmlora.models.module_table import linear_modules, module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.attention import FUSED_ATTENTION, _warn_of_mask, attention
from vlmlora.nn.linear import Linear
from vlmlora.nn.mlp import MLP_UP
from vlmlora.nn.saved import name_for_policies
from vlmlora.nn.segments import Segments, segment_offsets
from vlmlora.nn.stack import scan_layers
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.weights import INT8Weight, NF4Weight
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.remat import remat_policy
from vlmlora.training.step import _compiler_options

pytestmark = pytest.mark.gpu

CASE = Case([[3, Visual(1, 8, 8), 5], [9], [2, Visual(1, 4, 12), 1, Visual(1, 6, 10), 4]])


@pytest.fixture(scope="module")
def gpu():
    return jax.devices("gpu")[0]


@pytest.fixture(scope="module")
def cpu():
    return jax.devices("cpu")[0]


def adapted_model(config, *, quantize: bool, dtype=jnp.float32):
    """A random model whose adapters are not zero, its linear layers in NF4 if asked."""
    module = family_of(config).model(config, dtype=dtype)
    init_parameters(module, jax.random.key(0), std=0.1)
    if quantize:
        for path, linear in linear_modules(module).items():
            if path != "lm_head" and "merger" not in path:
                linear.weight.set_value(NF4Weight.quantize(linear.weight.get_value().value))
    lora = LoraConfig(r=4, init_lora_weights=False)
    add_adapters(module, select(module_table(config), lora), lora, jax.random.key(1))
    return nnx.split(module, Trainable, ...)


@pytest.mark.parametrize("lengths", [None, (64, 20, 1, 33)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("is_causal", [True, False])
def test_fused_attention(gpu, is_causal, head_dim, lengths):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(4, 64, 4, head_dim), (4, 64, 2, head_dim), (4, 64, 2, head_dim), (4, 64, 4, head_dim)]
    query, key, value, weight = (
        jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
    )
    kv_lengths = None if lengths is None else jnp.array(lengths, jnp.int32)

    def loss(query, key, value, *, reference):
        if reference:
            query, key, value = (a.astype(jnp.float32) for a in (query, key, value))
        out = attention(query, key, value, is_causal=is_causal, kv_lengths=kv_lengths)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32))

    text = jax.jit(lambda *a: attention(*a, is_causal=is_causal)).lower(query, key, value).as_text()
    assert "cudnn" in text
    with jax.default_matmul_precision("highest"):
        expected = jax.grad(lambda *a: loss(*a, reference=True), argnums=(0, 1, 2))(query, key, value)
    found = jax.grad(lambda *a: loss(*a, reference=False), argnums=(0, 1, 2))(query, key, value)
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # bfloat16 operands and probabilities: three significant digits at best.
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)


# Uneven segments, one of a single token, padding at the end; a full row; a row of one segment; an empty row.
PACKED = [[100, 1, 57, 33], [64, 64, 64, 64], [256], []]


# Heads of 128 features have no room for the one that hides padding within a segment.
@pytest.mark.parametrize(
    ("heads", "head_dim", "has_gaps"),
    [(4, 64, False), (4, 64, True), (4, 80, False), (4, 80, True), (14, 128, False)],
)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("max_segments", [1, 4, 7])
def test_fused_attention_keeps_segments_apart(gpu, max_segments, is_causal, heads, head_dim, has_gaps):
    rows, tokens = [lengths if len(lengths) <= max_segments else [200] for lengths in PACKED], 256
    ids = np.zeros((len(rows), tokens), np.int32)
    for row, lengths in enumerate(rows):
        ids[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    if has_gaps:
        ids[0, 20:33] = ids[1, 64:100] = 0
    segments = Segments(jnp.array(ids), jnp.array(segment_offsets(rows, max_segments)), has_gaps)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(len(rows), tokens, n, head_dim) for n in (heads, heads // 2, heads // 2, heads)]
    query, key, value, weight = (
        jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
    )
    # What stands in padding has no meaning, and nothing reads it.
    weight = weight * (segments.ids > 0)[..., None, None]

    def loss(query, key, value, *, dtype):
        arrays = (a.astype(dtype) for a in (query, key, value))
        out = attention(*arrays, is_causal=is_causal, segments=segments)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    def results(dtype):
        gradient = jax.jit(jax.grad(functools.partial(loss, dtype=dtype), argnums=(0, 1, 2), has_aux=True))
        assert ("cudnn" in gradient.lower(query, key, value).as_text()) == (dtype == jnp.bfloat16)
        gradients, out = gradient(query, key, value)
        return [np.asarray(a, np.float32) for a in (out, *gradients)]

    with jax.default_matmul_precision("highest"):
        expected = results(jnp.float32)
    found = results(jnp.bfloat16)
    assert all(np.isfinite(array).all() for array in found)
    filled = ids > 0
    for a, b in zip(found, expected, strict=True):
        # bfloat16 operands and probabilities: three significant digits at best.
        assert np.linalg.norm((a - b)[filled]) <= 2e-2 * np.linalg.norm(b[filled])
    for gradient in found[1:]:
        assert not gradient[~filled].any()


def test_packed_rows_train_on_fused_kernels(gpu, caplog):
    directory = Path(vlmlora.__file__).parent / "assets" / "tiny-qwen2_5-vl-ocr"
    model, processor = FastVisionModel.from_pretrained(directory, dtype=jnp.bfloat16, load_in_16bit=True)
    FastVisionModel.get_peft_model(model, r=4, init_lora_weights=False, verbose=False)
    rng = np.random.default_rng(0)

    def sample(answer, *sizes):
        images = [
            {"type": "image", "image": Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))}
            for size in sizes
        ]
        question = [*images, {"type": "text", "text": "What is written?"}]
        return processor.encode(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )

    # Images that fill their windows and that do not, two in a sample, none in another.
    samples = [
        sample("1204.50", (64, 96)),
        sample("x", (40, 56), (24, 120)),
        sample("none"),
        sample("7", (48, 40)),
    ]
    graphdef, adapters, frozen = model.split()
    run = jax.jit(jax.value_and_grad(make_loss_fn(graphdef, gradient_checkpointing="attention")))
    _warn_of_mask.cache_clear()
    results = []
    for batch in (processor.collate(samples), processor.collate_packed([samples[:3], samples[3:]])):
        assert "cudnn" in run.lower(adapters, frozen, batch).as_text()
        results.append(run(adapters, frozen, batch))
    assert "dense mask" not in caplog.text
    # Both in bfloat16, whose rounding the order of a sum decides.
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-2)
    for a, b in zip(*(jax.tree.leaves(gradients) for _, gradients in results), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 5e-2 * np.linalg.norm(a)


@pytest.mark.parametrize("kind", [NF4Weight, INT8Weight])
def test_quantised_codes_and_decoded_values_are_those_of_the_cpu(gpu, cpu, kind):
    weight = np.random.default_rng(0).normal(size=(100, 171)).astype(np.float32)
    on_cpu, on_gpu = (kind.quantize(jax.device_put(weight, device)) for device in (cpu, gpu))
    np.testing.assert_array_equal(on_cpu.codes, on_gpu.codes)
    moved = jax.device_put(on_cpu, gpu)
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(on_cpu.dequantize(dtype), moved.dequantize(dtype))


@pytest.mark.parametrize("quantize", [False, True])
def test_loss_and_gradients_are_those_of_the_cpu(gpu, cpu, quantize):
    config = tiny_config()
    graphdef, adapters, frozen = adapted_model(config, quantize=quantize)
    batch = batches(CASE, config)[1]
    results = []
    with jax.default_matmul_precision("highest"):
        for device in (cpu, gpu):
            loss_fn = make_loss_fn(graphdef, gradient_checkpointing=True)
            arguments = jax.device_put((adapters, frozen, batch), device)
            results.append(jax.jit(jax.value_and_grad(loss_fn))(*arguments))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(gradients) for _, gradients in results), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-3 * np.linalg.norm(a) + 1e-9


ATTENTION_ON_HOST = {"layer_input": "offload", "qkv": "offload", "attention_output": "offload"}


@pytest.mark.parametrize("policy", ["unsloth", {"language": ATTENTION_ON_HOST}], ids=["inputs", "attention"])
def test_what_goes_to_host_memory_changes_nothing(gpu, policy):
    config = tiny_config()
    graphdef, adapters, frozen = adapted_model(config, quantize=True)
    batch = jax.device_put(batches(CASE, config)[1], gpu)

    def gradients(policy):
        function = jax.grad(make_loss_fn(graphdef, gradient_checkpointing=policy))
        jaxpr = jax.make_jaxpr(function)(adapters, frozen, batch)
        assert ("<host>" in str(jaxpr)) == (policy is not True)
        # Else products of float32 are rounded as TF32, in each program by algorithms of its own.
        with jax.default_matmul_precision("highest"):
            return jax.jit(function)(adapters, frozen, batch)

    for a, b in zip(*(jax.tree.leaves(gradients(each)) for each in (policy, True)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-9


def test_attention_leaves_for_host_memory_and_comes_back(gpu):
    """In 16 bit, where it is a fused kernel, which then runs forward once."""
    config = tiny_config()
    graphdef, adapters, frozen = adapted_model(config, quantize=False, dtype=jnp.bfloat16)
    batch = jax.device_put(batches(CASE, config)[1], gpu)

    def run(policy):
        loss = make_loss_fn(graphdef, gradient_checkpointing={"language": policy})
        gradient = jax.grad(loss)
        jaxpr = jax.make_jaxpr(gradient)(adapters, frozen, batch)
        fused = [e for e in equations(jaxpr) if e.primitive.name.startswith(FUSED_ATTENTION)]
        jitted = jax.jit(gradient, compiler_options=_compiler_options(loss, None))
        return len(fused), jitted(adapters, frozen, batch)

    (once, found), (twice, expected) = run(ATTENTION_ON_HOST), run("unsloth")
    assert once < twice
    for a, b in zip(*(jax.tree.leaves(each) for each in (found, expected)), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # Both in bfloat16, whose rounding the order of a sum decides.
        assert np.linalg.norm(a - b) <= 5e-2 * np.linalg.norm(b) + 1e-9


def test_greedy_tokens_are_those_of_the_cpu(gpu, cpu):
    config = tiny_config()
    graphdef, adapters, frozen = adapted_model(config, quantize=True)
    graphdef, state = nnx.split(nnx.merge(graphdef, adapters, frozen))
    batch = batches(CASE, config)[1]
    tokens = []
    with jax.default_matmul_precision("highest"):
        for device in (cpu, gpu):
            tokens.append(
                greedy_decode(
                    graphdef,
                    *jax.device_put((state, batch), device),
                    max_new_tokens=8,
                    eos_token_ids=(EOS,),
                    pad_token_id=EOS,
                )
            )
    np.testing.assert_array_equal(*tokens)


def test_products_write_to_the_stacks_of_saved_values(gpu):
    """No copy fills the stack, and gradients are as near to the exact ones as those of a plain scan."""
    layers, rows, tokens, hidden, intermediate = 5, 2, 512, 256, 1536
    x = jax.random.normal(jax.random.key(1), (rows, tokens, hidden), jnp.bfloat16)

    def gradient_with(policy, dtype):
        module = WideLayers(layers, hidden, intermediate, dtype)
        init_parameters(module, jax.random.key(0), std=0.05)
        graphdef, weights = nnx.split(module)

        def loss(weights, x):
            x, _ = scan_layers(nnx.merge(graphdef, weights), x, WideLayers.call, remat=remat_policy(policy))
            return jnp.sum(jnp.sin(x.astype(jnp.float32)))

        options = _compiler_options(loss, None)
        jitted = jax.jit(jax.grad(loss, argnums=1), compiler_options=options)
        compiled = jitted.lower(weights, x.astype(dtype)).compile()
        return compiled.as_text(), np.asarray(compiled(weights, x.astype(dtype)), np.float64)

    text, found = gradient_with("mlp", jnp.bfloat16)
    result = f"= (bf16[{layers},{rows},{tokens},{intermediate}]"
    assert sum("dynamic-slice-fusion" in line for line in text.split("\n") if result in line) == 1
    _, plain = gradient_with(True, jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        _, exact = gradient_with(True, jnp.float32)
    error, plain_error = (np.linalg.norm(each - exact) / np.linalg.norm(exact) for each in (found, plain))
    print(f"relative errors: {error}, of a plain scan {plain_error}")
    assert error < 1.2 * plain_error


class WideLayers(nnx.Module):
    """Two products each and a residual stream."""

    def __init__(self, layers: int, hidden: int, intermediate: int, dtype: jax.typing.DTypeLike):
        self.stack = layers
        self.up = Linear(hidden, intermediate, bias=False, dtype=dtype, stack=layers)
        self.down = Linear(intermediate, hidden, bias=False, dtype=dtype, stack=layers)

    @staticmethod
    def call(layer, x, _, *, key):
        """One layer."""
        return x + layer.down(jnp.sin(name_for_policies(layer.up(x, key=key), MLP_UP)), key=key), None
