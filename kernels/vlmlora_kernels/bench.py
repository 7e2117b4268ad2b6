"""Time the kernels beside cuBLAS and bitsandbytes: ``python -m vlmlora_kernels.bench``.

Prints a table and writes it, one JSON row a line, with device, versions and command. ``--quick`` takes the
language linears of the 7B model alone; ``--sweep`` times other tiles of the fused products of few tokens,
``--sweep-many`` those of many, and each prints the table that `vlmlora_kernels.hopper.tuning` should hold.

Times are those of the GPU's own clock around each kernel (CUPTI), the median of several runs. Before each
product a kernel reads more than the L2 cache holds, so that weights come from memory as in a model. The
products of a weight and a number of tokens make one program, ordered by barriers; programs compile in
parallel, and only then is anything timed. Products go to cuBLAS by its own choice of algorithm, as in
torch, unless ``--autotune`` lets XLA time them first.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from vlmlora_kernels import CODE_BOOKS, DYNAMIC_CODE, NestedAbsmax, dequantize_4bit, matmul_4bit, matmul_int8
from vlmlora_kernels.dispatch import explain
from vlmlora_kernels.hopper import matvec, tuning
from vlmlora_kernels.hopper.launch import Kernel
from vlmlora_kernels.hopper.schedule import SCHEDULES
from vlmlora_kernels.lowering import many_tokens, many_tokens_overlapped

LANGUAGE = {
    "Qwen2.5-VL-7B": [(18944, 3584), (3584, 18944), (3584, 3584), (512, 3584)],
    "Llama-3.2-11B-Vision": [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)],
    "72B": [(29568, 8192), (8192, 29568), (8192, 8192), (1024, 8192)],
}
"""Shapes [out, in] of the linears of a layer, each once."""

VISION = {
    "Qwen2.5-VL-7B": [(3840, 1280), (1280, 1280), (3420, 1280), (1280, 3420), (5120, 5120), (3584, 5120)],
    "Llama-3.2-11B-Vision": [(1280, 1280), (5120, 1280), (1280, 5120), (4096, 7680)],
    "72B": [(8192, 5120)],
}
"""The same of vision towers and projectors; the tower of the 72B model is that of the 7B."""

TOKENS = (1, 4, 16, 64, 512, 2048, 8192)
SWEPT = [
    (512, 3584),
    (1024, 8192),
    (3584, 3584),
    (3584, 18944),
    (4096, 14336),
    (5120, 5120),
    (8192, 5120),
    (8192, 8192),
    (8192, 29568),
    (14336, 4096),
    (18944, 3584),
    (29568, 8192),
]
MANY_SWEPT_SHAPES = [
    (512, 3584),
    (1024, 8192),
    (3584, 3584),
    (4096, 4096),
    (5120, 5120),
    (4096, 14336),
    (3584, 18944),
    (18944, 3584),
    (8192, 8192),
]
MANY_SWEPT = [128, 256, 512, 1024, 2048, 4096, 8192]
BACKWARD_FROM = 512  # tokens; fewer are generation, which has no backward pass
_EVICTED_BYTES = 2**28  # five times the L2 cache of an H100 or H200
_CEILING_BYTES = 2**31
_RUNS = 5

Shape = tuple[int, int]
Row = dict[str, Any]
ManyTimes = dict[tuning.ManyTokens, dict[tuple[Shape, bool], tuple[float, float]]]
"""Of the tiles of many tokens, for each weight and way: microseconds, and those of the best other form."""


def read_all(size: int, blocks: int = 528) -> Kernel:
    """A kernel that reads `size` bytes, int32 [size / 4], and writes a word a thread."""
    warps, loads = 8, 4
    threads = 32 * warps
    stride = 16 * threads * blocks
    steps = size // (stride * loads)

    def body(t: ModuleType, inputs: list, out: Any, scratch: list) -> None:
        index = t.block() * threads + t.thread()
        source = inputs[0].shifted(index << 4)

        def step(number: Any, carry: list) -> list:
            words = [
                word
                for load in range(loads)
                for word in t.load_words(source, number * (stride * loads) + load * stride, 4, once=True)
            ]
            return [functools.reduce(lambda a, b: a ^ b, words, t.Word(carry[0])).value]

        total = t.loop(t.Word(steps), [t.Word(0).value], step)
        t.store_words(out, index << 2, [t.Word(total[0])])

    return Kernel(
        body,
        shape=(threads * blocks,),
        dtype=jnp.int32,
        grid=blocks,
        warps=warps,
        scratch=(1,),
        name="evict_cache",
    )


def in_turn(operations: list[Callable]) -> Callable:
    """A function of a large buffer and of operands that runs each operation on them after an eviction."""
    kernel = read_all(_EVICTED_BYTES)
    evict = jax.jit(lambda buffer: kernel(buffer))  # lowered once

    def run(buffer: jax.Array, operands: Any) -> list:
        results = []
        for operation in operations:
            read = evict(buffer)
            buffer, operands, read = jax.lax.optimization_barrier((buffer, operands, read))
            result = operation(*operands)
            buffer, operands, result = jax.lax.optimization_barrier((buffer, operands, result))
            results.append((read, result))
        return results

    return run


def times_us(compiled: Any, buffer: jax.Array, operands: Any, count: int, runs: int = _RUNS) -> list[float]:
    """Microseconds of each of the `count` operations of a compiled `in_turn`."""
    _, measured = profiler.measure(compiled, aggregate=False, iterations=runs)(buffer, operands)
    samples: list[list[float]] = [[] for _ in range(count)]
    for kernels in measured if runs > 1 else [measured]:
        sums: list[float] = []
        constants = 0.0  # XLA makes them ahead of everything; they are of the first operation, ours
        for name, milliseconds in kernels:
            if "evict_cache" in name:
                sums.append(constants)
                constants = 0.0
            elif sums:
                sums[-1] += milliseconds * 1e3
            else:
                constants += milliseconds * 1e3
        if len(sums) != count:
            raise RuntimeError(f"{count} operations were to run, and the profiler saw {len(sums)}")
        for sample, total in zip(samples, sums, strict=True):
            sample.append(total)
    return [statistics.median(sample) for sample in samples]


def time_us(function: Callable, calls: list[tuple], options: dict | None = None) -> float:
    """Microseconds of GPU time that one call of `function` takes, over the argument tuples of `calls`."""
    each = jax.jit(function)
    leaves, structure = jax.tree.flatten(calls)
    together = jax.jit(lambda *flat: [each(*call) for call in jax.tree.unflatten(structure, flat)])
    compiled = together.lower(*leaves).compile(compiler_options=options)
    _, measured = profiler.measure(compiled, aggregate=True, iterations=_RUNS)(*leaves)
    return statistics.median(measured) * 1e3 / len(calls)


@functools.cache
def _bytes(size: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(0).bytes(size), np.uint8)


@functools.cache
def _numbers(size: int) -> np.ndarray:
    return np.resize(np.random.default_rng(0).standard_normal(2**20, np.float32).astype(jnp.bfloat16), size)


def _some(make: Callable, *shape: int) -> np.ndarray:
    """Random elements, a view of an array that arrays of similar size share."""
    size = math.prod(shape)
    return make(1 << (size - 1).bit_length())[:size].reshape(shape)


def random_operands(shape: Shape, tokens: int | None) -> dict[str, Any]:
    """What the operations on a weight of `shape` take: all kinds of the weight, `x` and `dy`."""
    size = math.prod(shape)
    blocks = -(-size // 64)
    operands = {
        "codes": _some(_bytes, size // 2),
        "scales": NestedAbsmax(
            _some(_bytes, blocks),
            np.linspace(0.001, 0.01, -(-blocks // 256), dtype=np.float32),
            np.asarray(DYNAMIC_CODE),
            np.float32(0.03),
        ),
        "values": _some(_bytes, *shape).view(np.int8),
        "scale": np.linspace(0.5, 1, shape[0], dtype=np.float32),
        "dense": _some(_numbers, *shape),
    }
    if tokens is not None:
        operands["x"] = _some(_numbers, tokens, shape[1])
        operands["dy"] = _some(_numbers, tokens, shape[0])
    return operands


def random_weights(shape: Shape, count: int = 4) -> list[tuple]:
    """Doubly quantised 4-bit weights that differ: codes and scales."""
    operands = random_operands(shape, None)
    return [
        (jnp.asarray(np.roll(operands["codes"], 64 * i)), jax.tree.map(jnp.asarray, operands["scales"]))
        for i in range(count)
    ]


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that is timed.

    Attributes:
        what: ``"decode"``, ``"x @ W.T"`` or ``"dy @ W"``.
        who: whose it is: ``"nf4"``, ``"int8"``, or ``"bf16"`` for the dense product.
        operands: names in `random_operands`.
        run: the function of these operands.
    """

    what: str
    who: str
    operands: tuple[str, ...]
    run: Callable


def operations(shape: Shape, tokens: int | None) -> list[Operation]:
    """What is timed for a weight and a number of tokens, or with None without any."""

    def decode(codes: jax.Array, scales: NestedAbsmax, how: str | None = None) -> jax.Array:
        return dequantize_4bit(codes, scales, shape=shape, dtype=jnp.bfloat16, implementation=how)

    def backward(product: Callable) -> Callable:
        def run(dy: jax.Array, *weight: Any) -> jax.Array:
            x = jnp.zeros((dy.shape[0], shape[1]), dy.dtype)
            return jax.vjp(lambda x: product(x, *weight), x)[1](dy)[0]

        return run

    if tokens is None:
        weight = ("codes", "scales")
        return [
            Operation("decode", "nf4", weight, decode),
            Operation("decode", "xla", weight, lambda *w: decode(*w, "xla")),
        ]
    products = {
        "nf4": (("codes", "scales"), lambda x, *w: matmul_4bit(x, *w, shape=shape)),
        "int8": (("values", "scale"), matmul_int8),
        "bf16": (("dense",), lambda x, w: x @ w.T),
    }
    found = [Operation("x @ W.T", who, ("x", *names), run) for who, (names, run) in products.items()]
    if tokens >= BACKWARD_FROM:
        found += [
            Operation("dy @ W", who, ("dy", *names), backward(run)) for who, (names, run) in products.items()
        ]
    return found


def floor_us(operation: Operation, shape: Shape, tokens: int | None, limits: dict[str, float]) -> float:
    """The least time that memory and arithmetic allow."""
    size = math.prod(shape)
    weight = {"int8": size + 4 * shape[0], "bf16": 2 * size}.get(operation.who, size / 2 + size / 64)
    activations = 2 * size if tokens is None else 2 * tokens * sum(shape)
    flops = 0 if tokens is None else 2 * tokens * size
    return max((weight + activations) / limits["memory TB/s"] / 1e6, flops / limits["bf16 TFLOP/s"] / 1e6)


def compile_in_turn(functions: list[Callable], operands: Any, options: dict) -> Any:
    """Compile `in_turn` of functions that each take all `operands`, for the types of these."""
    buffer = jax.ShapeDtypeStruct((_EVICTED_BYTES // 4,), jnp.int32)
    types = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), operands)
    return jax.jit(in_turn(functions)).lower(buffer, types).compile(compiler_options=options)


def compile_all(jobs: Iterable[tuple[Any, Callable]]) -> dict[Any, Any]:
    """The results of the jobs by their keys, in parallel; a job that fails leaves its exception."""

    def attempt(job: Callable) -> Any:
        try:
            return job()
        except Exception as error:  # The other products are still worth their time on the GPU.
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = {key: pool.submit(attempt, job) for key, job in jobs}
        return {key: future.result() for key, future in pending.items()}


def ceilings(options: dict) -> dict[str, float]:
    """What the card reaches: bytes a second of a copy or of reading alone, and a large bfloat16 product."""
    x = jnp.ones((_CEILING_BYTES // 2,), jnp.bfloat16)
    copy = 2 * x.nbytes / time_us(lambda x: x + jnp.bfloat16(1), [(x,)]) / 1e6
    words = jnp.ones((_CEILING_BYTES // 4,), jnp.int32)
    read = words.nbytes / time_us(read_all(_CEILING_BYTES), [(words,)]) / 1e6
    a = jnp.asarray(_some(_numbers, 8192, 8192))
    product = 2 * 8192**3 / time_us(lambda a, b: a @ b, [(a, a)], options) / 1e6
    limits = {"copy TB/s": copy, "read TB/s": read, "memory TB/s": max(copy, read), "bf16 TFLOP/s": product}
    return {name: round(value, 2) for name, value in limits.items()}


def measure(
    shapes: list[Shape], tokens: tuple[int, ...], limits: dict[str, float], options: dict
) -> list[Row]:
    """Rows of the table: decoding, and products forward and backward."""

    def job(shape: Shape, count: int | None) -> Callable:
        operands = random_operands(shape, count)
        names = list(operands)

        def on_all(operation: Operation) -> Callable:
            return lambda *arrays: operation.run(*[arrays[names.index(name)] for name in operation.operands])

        functions = [on_all(operation) for operation in operations(shape, count)]
        return lambda: compile_in_turn(functions, list(operands.values()), options)

    keys = [(shape, count) for shape in shapes for count in (None, *tokens)]
    start = time.time()
    programs = compile_all((key, job(*key)) for key in keys)
    print(f"{len(programs)} programs compiled in {time.time() - start:.0f} s", flush=True)
    buffer = jnp.zeros((_EVICTED_BYTES // 4,), jnp.int32)
    rows: list[Row] = []
    on_device: dict[str, Any] = {}
    for (shape, count), program in programs.items():
        wanted = operations(shape, count)
        name = {"shape": list(shape), "tokens": count}
        if isinstance(program, Exception):
            print("failed:", name, program, flush=True)
            rows.append(name | {"error": str(program).splitlines()[0]})
            continue
        if count is None:  # the first program of a weight
            on_device = {}
        for key, operand in random_operands(shape, count).items():
            if key in ("x", "dy") or key not in on_device:
                on_device[key] = jax.tree.map(jnp.asarray, operand)
        runs = 3 if (count or 0) > BACKWARD_FROM else _RUNS
        try:
            found = times_us(program, buffer, list(on_device.values()), len(wanted), runs)
        except RuntimeError as error:
            print("failed:", name, error, flush=True)
            rows.append(name | {"error": str(error).splitlines()[0]})
            continue
        for operation, us in zip(wanted, found, strict=True):
            floor = floor_us(operation, shape, count, limits)
            row = name | {"what": operation.what, "who": operation.who, "us": round(us, 2)}
            rows.append(row | {"floor_us": round(floor, 2), "of_roofline": round(floor / us, 3)})
    return rows


def peers(shapes: list[Shape], tokens: tuple[int, ...]) -> list[Row]:
    """The same of torch's cuBLAS and of bitsandbytes, where they are installed."""
    missing = [name for name in ("torch", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed, and left out: {', '.join(missing)}", flush=True)
    if "torch" in missing:
        return []
    import torch

    nf4 = None
    if "bitsandbytes" not in missing:
        import bitsandbytes as nf4

    def calls(shape: Shape) -> list[tuple[Row, Callable]]:
        dense = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
        found = []
        if nf4:
            packed, state = nf4.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
            decode = functools.partial(nf4.functional.dequantize_4bit, packed, state)
            found.append(({"tokens": None, "what": "decode", "who": "bitsandbytes"}, decode))
        for count in tokens:
            x = torch.randn(count, shape[1], device="cuda", dtype=torch.bfloat16)
            dy = torch.randn(count, shape[0], device="cuda", dtype=torch.bfloat16)
            products = [("x @ W.T", "torch_bf16", lambda x=x: x @ dense.T)]
            if nf4:
                run = lambda x=x: nf4.matmul_4bit(x, packed.t(), state)  # noqa: E731
                products.append(("x @ W.T", "bitsandbytes", run))
            if count >= BACKWARD_FROM:
                products.append(("dy @ W", "torch_bf16", lambda dy=dy: dy @ dense))
                if nf4:
                    products.append(("dy @ W", "bitsandbytes", lambda dy=dy: dy @ decode()))
            found += [({"tokens": count, "what": what, "who": who}, run) for what, who, run in products]
        return [({"shape": list(shape)} | name, run) for name, run in found]

    # Its sums over rows are one kernel, which nothing else that is timed runs.
    evicted = torch.zeros(_EVICTED_BYTES // 4096, 1024, device="cuda")
    samples: list[tuple[Row, list[float]]] = []
    with torch.no_grad():
        for shape in shapes:
            found = calls(shape)
            for _, run in found:
                run()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(3):
                    for _, run in found:
                        torch.sum(evicted, 1)
                        run()
                torch.cuda.synchronize()
            kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            sums: list[float] = []
            for kernel in sorted(kernels, key=lambda event: event.time_range.start):
                if "at::native::reduce_kernel" in kernel.name:
                    sums.append(0.0)
                elif sums:
                    sums[-1] += kernel.time_range.elapsed_us()
            if len(sums) != 3 * len(found):
                raise RuntimeError(f"{3 * len(found)} operations were to run; the profiler saw {len(sums)}")
            samples += [(name, sums[i :: len(found)]) for i, (name, _) in enumerate(found)]
    return [name | {"us": round(statistics.median(sample), 2)} for name, sample in samples]


def candidates(tokens: int, rows: int | None) -> list[tuning.FewTokens]:
    """Rows of the table of tiles to try for as many tokens and rows of a weight: those of the table, and
    others."""
    row = functools.partial(tuning.FewTokens, tokens, rows, lookahead=1)
    if tokens <= 4:
        tried = [row(row_tiles=1, warps=warps, unit=4) for warps in (16, 20, 24)]
        tried += [row(row_tiles=1, warps=warps, unit=2) for warps in (16, 18, 24, 32)]
        tried += [row(row_tiles=2, warps=16, unit=unit) for unit in (2, 4)]
        tried += [row(row_tiles=1, warps=24, unit=4, early_x=True)]
    elif tokens <= 16:
        ahead = functools.partial(row, lookahead=2, early_x=True)
        tried = [ahead(row_tiles=2, warps=warps, unit=2) for warps in (12, 16)]
        tried += [ahead(row_tiles=1, warps=16, unit=4)]
        tried += [ahead(row_tiles=1, warps=12, unit=2)] if rows == tuning.ROWS[0] else []
        tried += [ahead(row_tiles=3, warps=12, unit=2), row(row_tiles=2, warps=12, unit=4)]
        tried += [row(row_tiles=2, warps=12, unit=unit, stages=3) for unit in (2, 4)]
        tried += [row(row_tiles=1, warps=20, unit=4, stages=stages) for stages in (2, 3)]
    else:
        tried = [row(row_tiles=1, warps=16, unit=2, stages=stages) for stages in (2, 3, 4)]
        tried += [row(row_tiles=2, warps=12, unit=2, stages=stages) for stages in (2, 3)]
        tried += [row(row_tiles=2, warps=8, unit=2, stages=4), row(row_tiles=2, warps=8, unit=4, stages=2)]
        tried += [row(row_tiles=1, warps=16, unit=4, stages=stages) for stages in (2, 3)]
        tried += [row(row_tiles=1, warps=20, unit=2, stages=2), row(row_tiles=3, warps=8, unit=2, stages=2)]
        clusters = (2, 4) if rows == tuning.ROWS[0] else (2,)
        tried += [row(row_tiles=1, warps=20, unit=2, stages=2, cluster=cluster) for cluster in clusters]
        tried += [row(row_tiles=2, warps=12, unit=2, stages=2, cluster=2)]
    if rows == tuning.ROWS[0]:  # fewer blocks than multiprocessors, if taller
        tried = [one for one in tried if one.row_tiles == 1]
    now = [tuning.few_tokens_row(tokens, rows, kind) for kind in tuning.FEW_TOKENS]
    return list(dict.fromkeys([*(dataclasses.replace(row, rows=rows) for row in now), *tried]))


def sweep(shapes: list[Shape], options: dict) -> tuple[list[Row], str]:
    """Times of the fused products with other tiles, and the table of the best, as Python."""
    counts = list(dict.fromkeys(row.tokens for row in tuning.FEW_TOKENS["nf4"]))
    books = {"nf4": matvec.FourBit(CODE_BOOKS["nf4"], nested=True), "int8": matvec.EightBit()}

    def rows_of(shape: Shape) -> int | None:
        return next((rows for rows in tuning.ROWS if shape[0] <= rows), None)

    def arrays(kind: str, shape: Shape, count: int) -> list:
        operands = random_operands(shape, count)
        weight = ("codes", "scales") if kind == "nf4" else ("values", "scale")
        return [operands["x"], *(leaf for name in weight for leaf in jax.tree.leaves(operands[name]))]

    def distinct(shape: Shape, count: int) -> dict[matvec.Tuning, list[tuning.FewTokens]]:
        found: dict[matvec.Tuning, list[tuning.FewTokens]] = {}
        for row in candidates(count, rows_of(shape)):
            found.setdefault(tuning.cut(row, count, shape), []).append(row)
        return found

    def job(kind: str, shape: Shape, count: int, cut: matvec.Tuning) -> Callable:
        def compiled() -> Any:
            kernel = matvec.matmul(books[kind], tokens=count, shape=shape, tuning=cut)
            return compile_in_turn([kernel], arrays(kind, shape, count), options)

        return compiled

    keys = [
        (kind, shape, count, cut)
        for kind in books
        for shape in shapes
        for count in counts
        for cut in distinct(shape, count)
    ]
    programs = compile_all((key, job(*key)) for key in keys)
    buffer = jnp.zeros((_EVICTED_BYTES // 4,), jnp.int32)
    measured = []
    times: dict[tuple[str, int, int | None], dict[tuning.FewTokens, dict[Shape, float]]] = {}
    for (kind, shape, count, cut), program in programs.items():
        name = {"kind": kind, "shape": list(shape), "tokens": count, "tuning": dataclasses.asdict(cut)}
        if isinstance(program, Exception):
            print("failed:", name, program, flush=True)
            continue
        us = times_us(program, buffer, [jnp.asarray(a) for a in arrays(kind, shape, count)], 1)[0]
        measured.append(name | {"us": round(us, 2)})
        print(kind, shape, count, cut, round(us, 2), flush=True)
        for row in distinct(shape, count)[cut]:
            times.setdefault((kind, count, rows_of(shape)), {}).setdefault(row, {})[shape] = us
    lines = ["FEW_TOKENS = {"]
    for kind in books:
        lines.append(f'    "{kind}": (')
        for count in counts:
            classes = [rows for rows in (*tuning.ROWS, None) if (kind, count, rows) in times]
            chosen = [_fastest(times[kind, count, rows]) for rows in classes]
            lines += [f"        {_as_code(row)}," for row in _without_repetition(chosen)]
        lines.append("    ),")
    return measured, "\n".join([*lines, "}"])


def _without_repetition(rows: list[tuning.FewTokens]) -> list[tuning.FewTokens]:
    """Only the last of rows in turn that differ in nothing but how many rows of a weight take them."""
    following = [dataclasses.replace(after, rows=row.rows) for row, after in itertools.pairwise(rows)]
    return [row for row, after in zip(rows, [*following, None], strict=True) if row != after]


def _as_code(row: Any) -> str:
    """A row of a table without what is the same in most."""
    fields = {each.name: (getattr(row, each.name), each.default) for each in dataclasses.fields(row)}
    given = [f"{name}={value}" for name, (value, default) in fields.items() if value != default]
    return f"{type(row).__name__}({', '.join(given)})"


def _fastest(times: dict[tuning.FewTokens, dict[Shape, float]]) -> tuning.FewTokens:
    """The row that is slower than the fastest of each shape by the least, of those that all shapes took."""
    best: dict[Shape, float] = {}
    for found in times.values():
        for shape, us in found.items():
            best[shape] = min(us, best.get(shape, us))

    def slowness(row: tuning.FewTokens) -> float:
        return sum(us / best[shape] for shape, us in times[row].items())

    return min((row for row, found in times.items() if len(found) == len(best)), key=slowness)


def many_candidates(tokens: int) -> list[tuning.ManyTokens]:
    """The same for the kernel of many tokens."""
    row = functools.partial(tuning.ManyTokens, tokens)
    tried = [row(width=256, stages=4, paired=paired) for paired in (None, 0)] if tokens <= 1024 else []
    if tokens <= 512:
        tried += [row(width=128, stages=6)]
        tried += [row(width=256, stages=4, halved=True), row(width=128, stages=6, halved=True)]
    if tokens in (512, 1024):
        tried += [row(width=256, stages=4, schedule=name) for name in SCHEDULES if name != "fastest"]
    now = [
        dataclasses.replace(each, elements=0, paired=None)
        for each in tuning.MANY_TOKENS
        if each.tokens == tokens
    ]
    return list(dict.fromkeys([*tried, *now]))


def sweep_many(
    shapes: list[Shape],
    counts: list[int],
    options: dict,
    *,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> tuple[list[Row], str]:
    """Times of the fused product of many tokens with several tiles, both ways, beside cuBLAS alone and after
    decoding and the product that decodes meanwhile, each checked against decoding; and the table of the best,
    as far as they beat the other two. After each number of tokens it calls `keep` with what there is."""
    book = CODE_BOOKS["nf4"]

    def dense(w: jax.Array, transposed: bool) -> jax.Array:
        return w if transposed else w.T

    def tried(shape: Shape, count: int, transposed: bool) -> list[tuning.ManyTokens]:
        return [row for row in many_candidates(count) if row.takes(count, shape, transposed)]

    def job(shape: Shape, count: int, transposed: bool) -> Callable:
        def decoded(x: jax.Array, codes: jax.Array, scales: NestedAbsmax, w: jax.Array) -> jax.Array:
            w = dequantize_4bit(codes, scales, shape=shape, dtype=jnp.bfloat16, implementation="decode")
            return x @ dense(w, transposed)

        def fused(row: tuning.ManyTokens) -> Callable:
            product = many_tokens(book, shape, transposed=transposed, row=row)
            return lambda x, codes, scales, w: product(x, codes, *scales)

        functions = [lambda x, codes, scales, w: x @ dense(w, transposed), decoded]
        meanwhile = many_tokens_overlapped(book, shape, transposed=transposed)
        functions += [lambda x, codes, scales, w: meanwhile(x, codes, *scales)]
        functions += [fused(row) for row in tried(shape, count, transposed)]
        return lambda: compile_in_turn(functions, operands(shape, count, transposed), options)

    def operands(shape: Shape, count: int, transposed: bool) -> list:
        found = random_operands(shape, count)
        return [found[name] for name in ("dy" if transposed else "x", "codes", "scales", "dense")]

    buffer = jnp.zeros((_EVICTED_BYTES // 4,), jnp.int32)
    rows: list[Row] = []
    found: dict[int, ManyTimes] = {count: {} for count in counts}

    def time_forms(shape: Shape, count: int, transposed: bool, program: Any) -> None:
        name = {"shape": list(shape), "tokens": count, "what": "dy @ W" if transposed else "x @ W.T"}
        if isinstance(program, Exception):
            print("failed:", name, program, flush=True)
            return
        arrays = jax.tree.map(jnp.asarray, operands(shape, count, transposed))
        results = [result.astype(jnp.float32) for _, result in program(buffer, arrays)]
        cublas, decode, *others = times_us(program, buffer, arrays, len(results), 3)
        rows.append(name | {"who": "bf16", "us": round(cublas, 2)})
        rows.append(name | {"who": "decode", "us": round(decode, 2)})
        print(*name.values(), f"bf16 {cublas:.1f}, decode {decode:.1f} ({cublas / decode:.3f})", flush=True)
        forms = (None, *tried(shape, count, transposed))
        for row, us, result in zip(forms, others, results[2:], strict=True):
            error = float(jnp.max(jnp.abs(result - results[1])) / jnp.max(jnp.abs(results[1])))
            is_right = error < 2**-6
            which = (
                {"who": "overlapped"} if row is None else {"who": "fused", "tuning": dataclasses.asdict(row)}
            )
            rows.append(name | which | {"us": round(us, 2), "error": error})
            verdict = f"error {error:.1e}{'' if is_right else ' WRONG'}"
            print(f"    {us:.1f} ({cublas / us:.3f}), {verdict}", row or "overlapped", flush=True)
            if row is not None and is_right:
                times = found[count].setdefault(row, {})
                times[shape, transposed] = us, min(decode, others[0])

    for count in counts:
        start = time.time()
        keys = [(shape, count, transposed) for shape in shapes for transposed in (False, True)]
        programs = compile_all((key, job(*key)) for key in keys)
        print(f"{count} tokens: {len(programs)} programs compiled in {time.time() - start:.0f} s", flush=True)
        for key, program in programs.items():
            time_forms(*key, program)
        keep(rows)
    lines: list[str] = []
    halved_lines: list[str] = []  # which come first, since they are for some of the weights
    for times in found.values():
        plain = [row for row in times if not row.halved]
        halved = [
            pair for row in times if row.halved and (pair := _where_faster(row, times, shapes, beside=plain))
        ]
        limited = [pair for row in plain if (pair := _where_faster(row, times, shapes))]
        if halved:
            halved_lines.append(f"    {_as_code(_fewest(halved))},")
        if not limited:
            break
        lines.append(f"    {_as_code(_with_pairs(_fewest(limited), times))},")
    return rows, "\n".join(["MANY_TOKENS = (", *halved_lines, *lines, ")"])


def _fewest(limited: list[tuple[float, tuning.ManyTokens]]) -> tuning.ManyTokens:
    """The row that takes the least, of those that `_where_faster` found."""
    return min(limited, key=lambda pair: pair[0])[1]


def _where_faster(
    row: tuning.ManyTokens, times: ManyTimes, shapes: list[Shape], *, beside: Iterable[tuning.ManyTokens] = ()
) -> tuple[float, tuning.ManyTokens] | None:
    """Times of a row, by elements of the weight, as parts of those of the best other way, and of the rows
    `beside`: their sum where the row is faster both ways together, with 1 for others, and the row with the
    fewest elements for which it is; None if that is so of no weight, or results were wrong."""
    keys = [(shape, way) for shape in shapes for way in (False, True) if row.takes(row.tokens, shape, way)]
    if not keys or times[row].keys() != set(keys):
        return None
    parts: dict[int, list[float]] = {}
    for key, (us, other) in times[row].items():
        best = min([other, *(times[each][key][0] for each in beside if key in times[each])])
        parts.setdefault(math.prod(key[0]), []).append(us / best)
    sizes = sorted(parts, reverse=True)
    means = [statistics.mean(parts[size]) for size in sizes]
    faster = list(itertools.takewhile(lambda mean: mean < 1, means))
    if not faster:
        return None
    elements = _power_below(sizes[len(faster) - 1])
    return sum(faster) + len(means) - len(faster), dataclasses.replace(row, elements=elements)


def _with_pairs(row: tuning.ManyTokens, times: ManyTimes) -> tuning.ManyTokens:
    """The row with pairs of blocks from that length of the summed axis on from which they are faster."""
    alone, together = (
        times.get(dataclasses.replace(row, elements=0, paired=paired), {}) for paired in (None, 0)
    )
    gains: dict[int, float] = {}
    for key in alone.keys() & together.keys():
        shape, transposed = key
        summed = shape[0] if transposed else shape[1]
        gains[summed] = gains.get(summed, 0.0) + alone[key][0] - together[key][0]
    faster = list(itertools.takewhile(lambda summed: gains[summed] > 0, sorted(gains, reverse=True)))
    return dataclasses.replace(row, paired=_power_below(faster[-1]) if faster else None)


def _power_below(number: int) -> int:
    """The largest power of two that is no larger."""
    return 2 ** (number.bit_length() - 1)


def table(rows: list[Row]) -> str:
    """What was measured, a line for each weight, operation and number of tokens, in microseconds."""
    titles = ("nf4", "of roofline", "against bf16", "int8", "of roofline", "bf16", "torch", "bnb", "xla")
    lines = ["", f"{'':24}{'tokens':>7}" + "".join(f"{title:>13}" for title in titles)]
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "us" in row:
            cells.setdefault((tuple(row["shape"]), row["what"], row["tokens"]), {})[row["who"]] = row
    for (shape, what, count), found in cells.items():

        def us(who: str, found: dict[str, Row] = found) -> str:
            return f"{found[who]['us']:.1f}" if who in found else ""

        def roofline(who: str, found: dict[str, Row] = found) -> str:
            return f"{found[who]['of_roofline']:.0%}" if who in found else ""

        dense = [found[who]["us"] for who in ("bf16", "torch_bf16") if who in found]
        against = f"{min(dense) / found['nf4']['us']:.2f}" if dense and "nf4" in found else ""
        columns = (us("nf4"), roofline("nf4"), against, us("int8"), roofline("int8"))
        columns += (us("bf16"), us("torch_bf16"), us("bitsandbytes"), us("xla"))
        name = f"{shape[0]}x{shape[1]} {what}"
        lines.append(f"{name:24}{count or '':>7}" + "".join(f"{column:>13}" for column in columns))
    return "\n".join(lines)


def save(file: Path, result: dict[str, Any]) -> None:
    """Write the result, a row a line, whole or not at all."""
    head = {name: value for name, value in result.items() if name != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')
    temporary.rename(file)


def _arguments() -> list[str]:
    """What the command was given, but where it writes."""
    given = sys.argv[1:]
    at = given.index("--out") if "--out" in given else len(given)
    return given[:at] + given[at + 2 :]


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=LANGUAGE, action="append", help="all if absent")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help="the language linears of the 7B model alone")
    parser.add_argument(
        "--sweep", action="store_true", help="other tiles of the fused products of few tokens"
    )
    parser.add_argument("--sweep-many", action="store_true", help="the same of many tokens")
    parser.add_argument("--autotune", action="store_true", help="let XLA time cuBLAS' algorithms first")
    parser.add_argument("--out", type=Path, default=Path("kernels_bench.json"))
    given = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"needs a GPU; found {jax.default_backend()}")
    start = time.time()
    # Kernels of a CUDA graph may overlap, and each is to be timed alone.
    options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_command_buffer": ""}
    if not given.autotune:
        options["xla_gpu_autotune_level"] = 0
    models = ["Qwen2.5-VL-7B"] if given.quick else given.model or list(LANGUAGE)
    shapes = [shape for model in models for shape in LANGUAGE[model]]
    if not given.quick:
        shapes += [shape for model in models for shape in VISION[model]]
    shapes = list(dict.fromkeys(shapes))
    if given.sweep or given.sweep_many:
        swept = SWEPT if given.sweep else MANY_SWEPT_SHAPES
        shapes = [shape for shape in swept if shape in shapes] if given.quick else swept
    result = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "vlmlora_kernels.bench", *_arguments()]),
        "unit": "microseconds",
        "ceilings": ceilings(options),
        "rows": [],
    }
    print(result["device"], result["ceilings"], explain(1, shapes[0]), flush=True)
    tokens = tuple(given.tokens or TOKENS)
    if given.sweep or given.sweep_many:
        if given.sweep:
            result["rows"], chosen = sweep(shapes, options)
        else:

            def keep(rows: list[Row]) -> None:
                save(given.out, result | {"rows": rows})

            result["rows"], chosen = sweep_many(shapes, given.tokens or MANY_SWEPT, options, keep=keep)
        save(given.out, result)
        print(f"\n{chosen}")
    else:
        result["models"] = {model: LANGUAGE[model] + VISION[model] for model in models}
        result["rows"] = measure(shapes, tokens, result["ceilings"], options)
        save(given.out, result)
        try:
            # torch's profiler keeps CUPTI to itself once it has run, so the peers come last.
            result["rows"] += peers(shapes, tokens)
            save(given.out, result)
        finally:
            print(table(result["rows"]))
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
