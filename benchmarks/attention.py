"""Time attention over packed rows against attention over whole rows, on a GPU; half a minute.

python -m benchmarks.attention

FLOPs are those of what is asked for: for packed rows, of each segment with itself.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import save
from vlmlora.nn.attention import attention
from vlmlora.nn.segments import Segments, segment_offsets

TEXT = {"heads": 28, "kv_heads": 4, "head_dim": 128, "is_causal": True}
VISION = {"heads": 16, "kv_heads": 16, "head_dim": 80, "is_causal": False}
TEXT_LENGTHS = (2700, 1800, 1200, 800, 550, 400, 300, 250)
"""Samples of a row of 8192 tokens, which ends in padding."""
VISION_LENGTHS = (
    *(2304, 1920, 1600, 1408, 1280, 1152, 1024, 960),
    *(896, 832, 768, 640, 576, 448, 320, 256),
)
"""Patches of the images of a row of 16384."""

CASES = {
    "text_dense": (TEXT, 1, [[8192]], None),
    "text_rows_of_1024": (TEXT, 8, [[1024]] * 8, None),
    "text_packed": (TEXT, 1, [TEXT_LENGTHS], 8),
    "text_packed_room_for_32": (TEXT, 1, [TEXT_LENGTHS], 32),
    "vision_dense": (VISION, 1, [[16384]], None),
    "vision_rows_of_1024": (VISION, 16, [[1024]] * 16, None),
    "vision_packed": (VISION, 1, [VISION_LENGTHS], 16),
    "vision_packed_with_gaps": (VISION, 1, [VISION_LENGTHS], 16),
    "vision_windows_of_64": (VISION, 256, [[64]] * 256, None),
}
"""Name → heads, rows, lengths of each row's segments, and for packed rows the segments there is room for."""


def measure(name: str, steps: int) -> dict:
    """Milliseconds, TFLOP/s and temporary memory, forward, and forward and backward."""
    shape, rows, lengths, room = CASES[name]
    tokens = 8192 if name.startswith("text_packed") else max(sum(row) for row in lengths)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(k, (rows, tokens, shape[heads], shape["head_dim"]), jnp.bfloat16)
        for k, heads in zip(keys, ("heads", "kv_heads", "kv_heads"), strict=True)
    )
    segments = None
    if room is not None:
        ids = np.zeros((rows, tokens), np.int32)
        for row, mine in enumerate(lengths):
            ids[row, : sum(mine)] = np.repeat(np.arange(len(mine)) + 1, mine)
        offsets = jnp.array(segment_offsets(lengths, room))
        segments = Segments(jnp.array(ids), offsets, has_gaps=name.endswith("with_gaps"))

    def forward(query, key, value):
        return attention(query, key, value, is_causal=shape["is_causal"], segments=segments)

    def both(query, key, value):
        return jax.grad(lambda *a: jnp.sum(forward(*a).astype(jnp.float32)), argnums=(0, 1, 2))(
            query, key, value
        )

    pairs = sum(n * (n + 1) / 2 if shape["is_causal"] else n * n for row in lengths for n in row)
    flops = 4 * pairs * shape["heads"] * shape["head_dim"]
    result = {"rows": rows, "tokens": tokens, "segments": len(lengths[0]), "room": room}
    for kind, function, work in (("forward", forward, flops), ("forward_backward", both, 3.5 * flops)):
        compiled = jax.jit(function).lower(query, key, value).compile()
        seconds = _seconds(compiled, (query, key, value), steps)
        result[kind] = {
            "milliseconds": round(seconds * 1e3, 4),
            "tflops": round(work / seconds / 1e12, 1),
            "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
    return result


def _seconds(function, arguments: tuple, steps: int) -> float:
    """Of a call, the least of three series."""
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(steps):
            out = function(*arguments)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / steps)
    return min(found)


def main() -> None:
    """Measure every case, compare the packed with the dense, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"))
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("it needs a GPU; attention runs on cuDNN there only")
    cases = {}
    for name in CASES:
        cases[name] = measure(name, arguments.steps)
        print(name, cases[name], flush=True)
    ratios = {
        f"{name} / {whole}": {
            kind: round(cases[name][kind]["tflops"] / cases[whole][kind]["tflops"], 3)
            for kind in ("forward", "forward_backward")
        }
        for name in CASES
        if "packed" in name
        for whole in CASES
        if whole.startswith(name.split("_")[0]) and ("dense" in whole or "rows" in whole)
    }
    print(ratios)
    save(arguments.out, {"cases": cases, "packed_against_dense": ratios})


if __name__ == "__main__":
    main()
