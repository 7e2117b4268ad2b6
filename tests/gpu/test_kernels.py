"""The kernels on a Hopper GPU, with fresh random inputs, against XLA and float64."""

import functools
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import test_norm as norm
from tests.kernels.test_low_rank_gradients import GATED, check, problem
from vlmlora_kernels import (
    CODE_BOOKS,
    DYNAMIC_CODE,
    NestedAbsmax,
    dequantize_4bit,
    dequantize_int8,
    elementwise_in_place,
    explain,
    low_rank_gradients,
    matmul_4bit,
    matmul_int8,
)
from vlmlora_kernels.bench import candidates, compile_all, many_candidates
from vlmlora_kernels.hopper import overlapped
from vlmlora_kernels.hopper.matvec import EightBit, FourBit, matmul
from vlmlora_kernels.hopper.tuning import FEW_TOKENS, FUSED_TOKENS, ROWS, cut
from vlmlora_kernels.lowering import many_tokens

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _hopper():
    choice = explain(1, (512, 512))
    if choice.implementation != "fused":
        pytest.skip(str(choice))
    # What a kernel does not write is NaN.
    jax.block_until_ready(jnp.full((2**28,), jnp.nan)).delete()


@pytest.fixture
def key():
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return jax.random.key(seed)


def four_bit(key, shape, nested=True):
    one, two, three = jax.random.split(key, 3)
    blocks = -(-shape[0] * shape[1] // 64)
    codes = jax.random.bits(one, (shape[0] * shape[1] // 2,), jnp.uint8)
    if not nested:
        return codes, jax.random.uniform(two, (blocks,), minval=0.01)
    return codes, NestedAbsmax(
        jax.random.bits(two, (blocks,), jnp.uint8),
        jax.random.uniform(three, (-(-blocks // 256),), minval=0.001, maxval=0.01),
        jnp.asarray(DYNAMIC_CODE),
        jnp.float32(0.03),
    )


def relative_error(value, reference):
    value = np.asarray(value, np.float64)
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(3584, 3584), (1000, 3420), (77, 40)])
def test_decoding_equals_xla_bit_for_bit(key, shape, dtype, quant_type):
    weight = four_bit(key, shape, nested=shape[1] != 40)

    @jax.jit
    def differing(codes, absmax):
        ours, xla = (
            dequantize_4bit(
                codes, absmax, shape=shape, dtype=dtype, quant_type=quant_type, implementation=how
            )
            for how in ("decode", "xla")
        )
        # Zeros of either sign are equal.
        return jnp.sum(ours != xla)

    assert differing(*weight) == 0


@pytest.mark.parametrize("tokens", [1, 13, 32, 64, 300])
@pytest.mark.parametrize("shape", [(3584, 3584), (515, 1088), (40, 3420)])
def test_products_forward_and_backward(key, shape, tokens):
    one, two, three = jax.random.split(key, 3)
    codes, absmax = four_bit(one, shape)
    x = jax.random.normal(two, (tokens, shape[1]), jnp.bfloat16)
    dy = jax.random.normal(three, (tokens, shape[0]), jnp.bfloat16)

    @jax.jit
    def both(x, dy):
        y, pullback = jax.vjp(lambda x: matmul_4bit(x, codes, absmax, shape=shape), x)
        return y, pullback(dy)[0]

    y, dx = both(x, dy)
    weight = dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.float32, implementation="xla")
    weight = np.asarray(weight, np.float64)
    # The weight's 16 values and the result are rounded to bfloat16.
    assert relative_error(y, np.asarray(x, np.float64) @ weight.T) < 4e-3
    assert relative_error(dx, np.asarray(dy, np.float64) @ weight) < 4e-3
    np.testing.assert_array_equal(y, both(x, dy)[0])


@pytest.mark.parametrize("tokens", [1, 16, 64, 200])
def test_int8(key, tokens):
    one, two = jax.random.split(key)
    values = jax.random.randint(one, (515, 1088), -127, 128, jnp.int8)
    scale = jnp.linspace(0.1, 1, 515)
    x = jax.random.normal(two, (tokens, 1088), jnp.bfloat16)
    weight = np.asarray(dequantize_int8(values, scale, dtype=jnp.float32), np.float64)
    y = jax.jit(matmul_int8)(x, values, scale)
    assert relative_error(y, np.asarray(x, np.float64) @ weight.T) < 4e-3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("shape", "fewer"), [((1000, 3584), 0), ((77, 1344), 3)])
def test_every_tile_of_the_sweep(key, shape, fewer, kind):
    one, two = jax.random.split(key)
    if kind == "nf4":
        codes, absmax = four_bit(one, shape)
        arrays, decoder = (codes, *absmax), FourBit(CODE_BOOKS["nf4"], nested=True)
        weight = dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.float32, implementation="xla")
    else:
        arrays = jax.random.randint(one, shape, -127, 128, jnp.int8), jnp.linspace(0.1, 1, shape[0])
        decoder, weight = EightBit(), dequantize_int8(*arrays, dtype=jnp.float32)
    weight = np.asarray(weight, np.float64)
    x = jax.random.normal(two, (FUSED_TOKENS, shape[1]), jnp.bfloat16)

    def job(tokens, tuning):
        kernel = matmul(decoder, tokens=tokens, shape=shape, tuning=tuning)
        return lambda: jax.jit(lambda *arrays: kernel(*arrays)).lower(x[:tokens], *arrays).compile()

    jobs = {}
    for limit in {row.tokens for row in FEW_TOKENS[kind]}:
        for row in dict.fromkeys([*candidates(limit, ROWS[0]), *candidates(limit, None)]):
            tuning = cut(row, limit - fewer, shape)
            jobs[limit - fewer, tuning] = job(limit - fewer, tuning)
    for (tokens, tuning), program in compile_all(jobs.items()).items():
        if isinstance(program, Exception):
            raise program
        y = program(x[:tokens], *arrays)
        error = relative_error(y, np.asarray(x[:tokens], np.float64) @ weight.T)
        assert error < 4e-3, (tokens, tuning)
        np.testing.assert_array_equal(y, program(x[:tokens], *arrays), err_msg=str((tokens, tuning)))


def makers(program, type_):
    """Of a compiled program, the operations that make an array of a type, outside of fusions."""
    found, is_fused = [], False
    for line in program.splitlines():
        if line and not line[0].isspace():
            is_fused = re.match(r"%?\S*fus", line) is not None
        match = re.match(r"\s+(?:ROOT )?%?\S+ = (.*?) ([\w-]+)\(", line)
        if match and not is_fused and re.search(re.escape(type_), match.group(1)):
            found.append(match.group(2))
    return set(found)


@pytest.mark.parametrize(("tokens", "how"), [(4, None), (300, None), (300, "overlapped")])
def test_a_scan_with_remat_copies_no_codes(tokens, how):
    shape, layers = (512, 512), 3
    size = math.prod(shape)
    weights = [four_bit(k, shape) for k in jax.random.split(jax.random.key(0), layers)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)

    def loss(x, stack):
        body = jax.checkpoint(
            lambda x, w: (x + jnp.tanh(matmul_4bit(x, *w, shape=shape, implementation=how)), None),
            prevent_cse=False,
        )
        return jax.lax.scan(body, x, stack)[0].astype(jnp.float32).sum()

    x = jnp.ones((tokens, shape[1]), jnp.bfloat16)
    program = jax.jit(jax.value_and_grad(loss)).lower(x, stack).compile().as_text()
    assert "mosaic_gpu" in program
    passed_on = {"parameter", "tuple", "get-tuple-element", "while"}
    assert makers(program, f"u8[{layers},{size // 2}]") <= passed_on
    assert not makers(program, f"u8[1,{size // 2}]"), "not even of one layer's"
    assert not makers(program, f"bf16[{layers},{shape[0]},{shape[1]}]"), "no decoded stack is saved"


def test_scan_checkpoint_and_vmap(key):
    shape, layers = (512, 512), 3
    one, two = jax.random.split(key)
    weights = [four_bit(k, shape) for k in jax.random.split(one, layers)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = jax.random.normal(two, (4, 512), jnp.bfloat16)

    def product(x, weight):
        return matmul_4bit(x, *weight, shape=shape) * jnp.bfloat16(0.1)

    scanned = jax.jit(lambda x: jax.lax.scan(jax.checkpoint(lambda x, w: (product(x, w), None)), x, stack)[0])
    expected = x
    for weight in weights:
        expected = product(expected, weight)
    np.testing.assert_array_equal(scanned(x), expected)
    assert jnp.isfinite(jax.jit(jax.grad(lambda x: scanned(x).sum().astype(jnp.float32)))(x)).all()
    batched = jax.jit(jax.vmap(product, (None, 0)))(x, stack)
    for i, weight in enumerate(weights):
        np.testing.assert_array_equal(batched[i], product(x, weight))
    xs = jnp.stack([x, -x])
    np.testing.assert_array_equal(jax.vmap(product, (0, None))(xs, weights[0])[1], -product(x, weights[0]))


@pytest.mark.parametrize(("tokens", "how"), [(300, "fused"), (2048, "overlapped")])
def test_each_of_the_products_of_a_scan_counts_anew(key, tokens, how):
    """XLA may give several products of one shape the same zeros to count from."""
    shape, layers = (512, 512), 3
    one, two = jax.random.split(key)
    weights = [four_bit(each, shape) for each in jax.random.split(one, 2 * layers)]
    stacks = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights[i::2]) for i in range(2)]
    x = jax.random.normal(two, (tokens, shape[1]), jnp.bfloat16)

    def layer(x, pair, how):
        a, b = (matmul_4bit(x, *weight, shape=shape, implementation=how) for weight in pair)
        return jnp.tanh(a) + jnp.tanh(b)

    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, pair: (layer(x, pair, how), None), x, stacks)[0])
    expected = x
    for i in range(layers):
        expected = layer(expected, weights[2 * i : 2 * i + 2], "xla")
    for _ in range(5):
        # Each product rounds to bfloat16, and its sums are in another order.
        assert relative_error(scanned(x), np.asarray(expected, np.float64)) < 2e-2


@pytest.mark.parametrize("how", ["fused", "overlapped"])
@pytest.mark.parametrize("tokens", [65, 128, 200, 512, 1000, 2048])
@pytest.mark.parametrize("shape", [(3584, 3584), (1000, 1088), (520, 18944), (18944, 512)])
def test_products_of_many_tokens(key, shape, tokens, how):
    one, two, three = jax.random.split(key, 3)
    codes, absmax = four_bit(one, shape)
    x = jax.random.normal(two, (tokens, shape[1]), jnp.bfloat16)
    dy = jax.random.normal(three, (tokens, shape[0]), jnp.bfloat16)

    @jax.jit
    def both(x, dy):
        product = functools.partial(matmul_4bit, shape=shape, implementation=how)
        y, pullback = jax.vjp(lambda x: product(x, codes, absmax), x)
        return y, pullback(dy)[0]

    y, dx = both(x, dy)
    weight = dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.float32, implementation="xla")
    weight = np.asarray(weight, np.float64)
    # W and the result are rounded to bfloat16.
    assert relative_error(y, np.asarray(x, np.float64) @ weight.T) < 4e-3
    assert relative_error(dx, np.asarray(dy, np.float64) @ weight) < 4e-3
    for _ in range(20):
        again = both(x, dy)
        np.testing.assert_array_equal(y, again[0])
        np.testing.assert_array_equal(dx, again[1])


@pytest.mark.parametrize("shape", [(3584, 3584), (1000, 1088), (8192, 8192)])
def test_a_product_waits_for_what_it_decodes(key, shape):
    """Weights in turn, so that what another one left behind in the same place is wrong."""
    tokens = 2048
    weights = [four_bit(each, shape) for each in jax.random.split(key)]
    for transposed in (False, True):
        x = jax.random.normal(key, (tokens, shape[0 if transposed else 1]), jnp.bfloat16)
        kernel = overlapped.matmul(
            CODE_BOOKS["nf4"], tokens=tokens, shape=shape, transposed=transposed, nested=True
        )
        product = jax.jit(lambda x, codes, absmax, kernel=kernel: kernel(x, codes, *absmax))
        expected = []
        for codes, absmax in weights:
            weight = dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.bfloat16, implementation="xla")
            expected.append(x @ (weight if transposed else weight.T))
        for number in range(60):
            y = product(x, *weights[number % 2]).astype(jnp.float32)
            right = expected[number % 2].astype(jnp.float32)
            # Both round to bfloat16 what they sum up in float32, in another order.
            assert float(jnp.max(jnp.abs(y - right))) < 2**-6 * float(jnp.max(jnp.abs(right))), number


@pytest.mark.parametrize("tokens", [128, 512, 1024])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_tile_of_the_sweep_of_many_tokens(key, tokens, transposed):
    shape = (1000, 3584)
    one, two = jax.random.split(key)
    codes, absmax = four_bit(one, shape)
    weight = dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.float32, implementation="xla")
    weight = np.asarray(weight if transposed else weight.T, np.float64)
    x = jax.random.normal(two, (tokens, len(weight)), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ weight
    for row in many_candidates(tokens):
        product = jax.jit(many_tokens(CODE_BOOKS["nf4"], shape, transposed=transposed, row=row))
        y = product(x, codes, *absmax)
        assert relative_error(y, expected) < 4e-3, row
        np.testing.assert_array_equal(y, product(x, codes, *absmax), err_msg=str(row))


@pytest.mark.parametrize("activation", [jax.nn.silu, functools.partial(jax.nn.gelu, approximate=True)])
@pytest.mark.parametrize("shape", [(4096, 18960), (8, 256)])
def test_elementwise_over_its_arguments(key, shape, activation):
    """The gradient of a gated activation, of the same arguments twice: one call may not write over them."""

    def function(cotangent, gate, up):
        value, pull_back = jax.vjp(lambda gate, up: activation(gate) * up, gate, up)
        return value, *pull_back(cotangent)

    @jax.jit
    def twice(*arrays):
        return elementwise_in_place(function, *arrays), elementwise_in_place(function, *reversed(arrays))

    arrays = [3 * jax.random.normal(each, shape, jnp.bfloat16) for each in jax.random.split(key, 3)]
    cpu = jax.devices("cpu")[0]

    def exact(*arrays):
        """In float64: XLA's own tanh is off by five units in float32's last place."""
        with jax.enable_x64(True), jax.default_device(cpu):
            return jax.jit(function)(*(np.asarray(array, np.float64) for array in arrays))

    for found, given in zip(twice(*arrays), (arrays, arrays[::-1]), strict=True):
        for value, reference in zip(found, exact(*given), strict=True):
            # Half a unit in bfloat16's last place. Where 1 + tanh(x) nearly cancels, tanh's own error of a
            # unit or two in float32's last place counts, times the arguments.
            value, reference = np.asarray(value, np.float64), np.asarray(reference)
            atol = 2e-6 * np.abs(reference).max()
            np.testing.assert_allclose(value, reference, rtol=2**-8 + 1e-5, atol=atol)


@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "room", "ranks"),
    [
        (4096, 18944, 64, [16, 16, 16]),
        (1000, 3420, 36, [16, 8, 16]),
        (77, 120, 8, [32, 5, 17]),
        (2, 8, 0, [1] * 3),
    ],
)
def test_gradients_between_low_rank_products(tokens, features, room, ranks, is_in_place):
    arguments = problem(tokens, features, room, ranks, seed=int.from_bytes(os.urandom(4), "little") // 2)
    step = jax.jit(functools.partial(low_rank_gradients, GATED, is_in_place=is_in_place))
    check(step(*arguments), arguments, GATED)
    # In place or not, what was given is as it was.
    check(step(*arguments), arguments, GATED)


@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize(
    ("tokens", "features", "room", "dtype"),
    [
        (16384, 3584, 64, jnp.bfloat16),
        (8192, 1280, 64, jnp.bfloat16),
        (8192, 4096, 64, jnp.bfloat16),
        (65536, 1280, 0, jnp.bfloat16),
        (8192, 8192, 64, jnp.bfloat16),
        (1001, 7424, 8, jnp.float16),
        (77, 2304, 256, jnp.float16),
        (6, 384, 40, jnp.bfloat16),
        (1, 128, 8, jnp.bfloat16),
    ],
)
def test_norms_and_their_gradients(kind, tokens, features, room, dtype):
    seed = int.from_bytes(os.urandom(4), "little") // 2
    print("seed", seed)
    arguments = norm.problem(tokens, features, room, dtype, seed=seed)
    step = jax.jit(functools.partial(norm.public, kind))
    found = step(*arguments)
    norm.check(kind, found, arguments)
    for _ in range(20):
        for array, again in zip(found, step(*arguments), strict=True):
            np.testing.assert_array_equal(array.view(jnp.uint16), again.view(jnp.uint16))
