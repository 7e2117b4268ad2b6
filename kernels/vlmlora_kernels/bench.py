"""Time the kernels beside cuBLAS and bitsandbytes: ``python -m vlmlora_kernels.bench``.

Prints a table and writes it with device, versions and command. Times are those of the GPU's own clock
around each kernel (CUPTI), the median of five runs, each over several weights in turn, so that none stays in
the cache. With ``--sweep`` it times other tiles of the fused product instead, for
`vlmlora_kernels.hopper.tuning`.
"""

import argparse
import datetime
import importlib.util
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from vlmlora_kernels import CODE_BOOKS, DYNAMIC_CODE, NestedAbsmax, dequantize_4bit, matmul_4bit, matmul_int8
from vlmlora_kernels.dispatch import explain
from vlmlora_kernels.hopper import matvec
from vlmlora_kernels.hopper.tuning import FUSED_TOKENS

SHAPES = {
    "Qwen2.5-VL-7B": [(18944, 3584), (3584, 18944), (3584, 3584), (512, 3584)],
    "Llama-3.2-11B-Vision": [(14336, 4096), (4096, 14336), (4096, 4096)],
    "72B": [(29568, 8192), (8192, 29568), (8192, 8192)],
}
TOKENS = (1, 4, 16, 64, 512, 2048, 8192)
_CACHE = 128 * 2**20  # bytes that rotate, twice the L2 of an H200


def time_us(function: Callable, calls: list[tuple]) -> float:
    """Microseconds of GPU time that one call of `function` takes, over the argument tuples of `calls`."""
    each = jax.jit(function)
    leaves, structure = jax.tree.flatten(calls)
    together = jax.jit(lambda *flat: [each(*call) for call in jax.tree.unflatten(structure, flat)])
    _, runs = profiler.measure(together.lower(*leaves).compile(), aggregate=False, iterations=5)(*leaves)
    return statistics.median(sum(ms for _, ms in run) for run in runs) * 1e3 / len(calls)


def random_weights(shape: tuple[int, int]) -> list[tuple]:
    """Enough doubly quantised 4-bit weights to overflow the cache: codes and scales."""
    size = shape[0] * shape[1]
    blocks = size // 64
    count = max(2, min(16, -(-_CACHE // (size // 2))))
    weights = []
    for seed in range(count):
        one, two, three = jax.random.split(jax.random.key(seed), 3)
        scales = NestedAbsmax(
            jax.random.bits(two, (blocks,), jnp.uint8),
            jax.random.uniform(three, (-(-blocks // 256),), minval=0.001, maxval=0.01),
            jnp.asarray(DYNAMIC_CODE),
            jnp.float32(0.03),
        )
        weights.append((jax.random.bits(one, (size // 2,), jnp.uint8), scales))
    return weights


def ceilings() -> dict[str, float]:
    """What the card reaches: bytes read and written by a copy, and a large bfloat16 product."""
    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.bfloat16)
    copy = time_us(lambda x: x + jnp.bfloat16(1), [(x,)])
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = time_us(lambda a, b: a @ b, [(a, a)])
    return {"copy TB/s": 2 * x.nbytes / copy / 1e6, "bf16 TFLOP/s": 2 * 8192**3 / product / 1e6}


def measure(
    shape: tuple[int, int], tokens: tuple[int, ...], limits: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows of the table for one weight: decoding, then products forward and backward."""
    size = shape[0] * shape[1]
    weights = random_weights(shape)
    dense = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(min(4, len(weights)))]
    floor = (size * 2.5 + size / 64) / limits["copy TB/s"] / 1e6
    rows = []

    def row(what: str, count: int | None, floor: float, **times: float) -> None:
        best = {"shape": list(shape), "what": what, "tokens": count, "floor": round(floor, 2)}
        rows.append(best | {name: round(us, 2) for name, us in times.items()})
        print(" ".join(str(value) for value in rows[-1].values()), flush=True)

    def decode(codes: jax.Array, absmax: NestedAbsmax, implementation: str | None) -> jax.Array:
        return dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.bfloat16, implementation=implementation)

    row(
        "decode",
        None,
        floor,
        ours=time_us(lambda *w: decode(*w, None), weights[:4]),
        xla=time_us(lambda *w: decode(*w, "xla"), weights[:4]),
    )
    for count, is_backward in itertools.product(tokens, (False, True)):
        if is_backward and count < 512:
            continue
        inputs = shape[0] if is_backward else shape[1]
        calls = len(weights) if count <= 64 else 2
        xs = [jax.random.normal(jax.random.key(i), (count, inputs), jnp.bfloat16) for i in range(calls)]

        def product(x: jax.Array, *weight: Any, is_backward: bool = is_backward) -> jax.Array:
            if is_backward:
                return x @ decode(*weight, None)
            return matmul_4bit(x, *weight, shape=shape)

        # As many products as weights: XLA would join two that share a weight.
        baseline = time_us(
            lambda x, w, is_backward=is_backward: x @ (w if is_backward else w.T),
            list(zip(xs[: len(dense)], dense, strict=False)),
        )
        ours = time_us(product, [(x, *w) for x, w in zip(xs, weights, strict=False)])
        read = (size / 2 + size / 64) / limits["copy TB/s"] / 1e6
        compute = 2 * count * size / limits["bf16 TFLOP/s"] / 1e6
        row("dy @ W" if is_backward else "x @ W.T", count, max(read, compute), ours=ours, bf16=baseline)
    for count in (1, 16):
        if count in tokens:
            values = [jax.random.randint(jax.random.key(i), shape, -127, 128, jnp.int8) for i in range(4)]
            scale = jnp.ones(shape[0])
            x = [jax.random.normal(jax.random.key(i), (count, shape[1]), jnp.bfloat16) for i in range(4)]
            us = time_us(
                lambda x, v, scale=scale: matmul_int8(x, v, scale), list(zip(x, values, strict=True))
            )
            row("int8 x @ W.T", count, size / limits["copy TB/s"] / 1e6, ours=us)
    return rows


def peers(shape: tuple[int, int], tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """The same of torch's cuBLAS and of bitsandbytes, if both are installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("bitsandbytes") is None:
        return []
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit as decode
    from bitsandbytes.functional import quantize_4bit as encode

    def time_torch(calls: list[Callable]) -> float:
        for call in calls:
            call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(3):
                for call in calls:
                    call()
            torch.cuda.synchronize()
        total = sum(event.self_device_time_total for event in profile.key_averages())
        return round(total / len(calls) / 3, 2)

    dense = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(4)]
    packed = [encode(w, quant_type="nf4", compress_statistics=True) for w in dense]
    name = {"shape": list(shape)}
    rows = [
        name | {"what": "decode", "tokens": None, "bnb": time_torch([lambda q=q: decode(*q) for q in packed])}
    ]
    with torch.no_grad():
        for count in tokens:
            x = torch.randn(count, shape[1], device="cuda", dtype=torch.bfloat16)
            bnb = time_torch([lambda q=q, x=x: bitsandbytes.matmul_4bit(x, q[0].t(), q[1]) for q in packed])
            bf16 = time_torch([lambda w=w, x=x: x @ w.T for w in dense])
            rows.append(name | {"what": "x @ W.T", "tokens": count, "bnb": bnb, "torch_bf16": bf16})
    for row in rows:
        print(" ".join(str(value) for value in row.values()), flush=True)
    return rows


def sweep(shape: tuple[int, int], tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Times of the fused product with other tiles."""
    weights = random_weights(shape)
    rows = []
    for count in (count for count in tokens if count <= FUSED_TOKENS):
        xs = [
            jax.random.normal(jax.random.key(i), (count, shape[1]), jnp.bfloat16) for i in range(len(weights))
        ]
        for cut in itertools.product((1, 2, 5, 9), (1, 2, 4, 8), (1, 2), (1, 2, 3)):
            tuning = matvec.Tuning(*cut)
            if tuning.warps > 20 or shape[1] // 64 // tuning.splits < matvec.UNIT:
                continue
            decoder = matvec.FourBit(CODE_BOOKS["nf4"], nested=True)
            try:
                kernel = matvec.matmul(decoder, tokens=count, shape=shape, tuning=tuning)
                calls = [(x, codes, *absmax) for x, (codes, absmax) in zip(xs, weights, strict=True)]
                us = round(time_us(lambda *args, kernel=kernel: kernel(*args), calls), 2)
            except ValueError as error:  # more shared memory than there is
                us = str(error)
            rows.append({"shape": list(shape), "tokens": count, "tuning": list(cut), "us": us})
            print(rows[-1], flush=True)
    return rows


def _arguments() -> list[str]:
    """What the command was given, but where it writes."""
    given = sys.argv[1:]
    at = given.index("--out") if "--out" in given else len(given)
    return given[:at] + given[at + 2 :]


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, action="append", help="all if absent")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path("kernels_bench.json"))
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"needs a GPU; found {jax.default_backend()}")
    tokens = tuple(options.tokens)
    result = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "vlmlora_kernels.bench", *_arguments()]),
        "unit": "microseconds",
        "rows": [],
    }
    limits = ceilings()
    print(limits, flush=True)
    result["ceilings"] = {name: round(value, 2) for name, value in limits.items()}
    chosen = [(model, shape) for model in options.model or SHAPES for shape in SHAPES[model]]
    # torch's profiler keeps CUPTI to itself once it has run, so the peers come last.
    works = [sweep] if options.sweep else [lambda s, t: measure(s, t, limits), peers]
    for work, (model, shape) in itertools.product(works, chosen):
        print(model, shape, explain(1, shape), flush=True)
        result["rows"] += [{"model": model} | row for row in work(shape, tokens)]
        temporary = options.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.rename(options.out)


if __name__ == "__main__":
    main()
