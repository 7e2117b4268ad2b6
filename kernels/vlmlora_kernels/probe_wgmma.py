"""Check and time the fused product for many tokens: ``python -m vlmlora_kernels.probe_wgmma``.

Each part runs in a process of its own with a time limit, so that a kernel that hangs ends only its part.
"""

import argparse
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

PARTS = {"check": 60, "time": 60, "cluster": 60}
SHAPES = ((18944, 3584), (3584, 18944))


def say(*values):
    print(*values, flush=True)


def weights(shape, count):
    from vlmlora_kernels.bench import random_weights

    return random_weights(shape)[:count]


def fused(shape, tokens, transposed, tuning):
    from vlmlora_kernels import CODE_BOOKS, double_dequantize
    from vlmlora_kernels.hopper import wgmma

    kernel = wgmma.matmul(CODE_BOOKS["nf4"], tokens=tokens, shape=shape, transposed=transposed, tuning=tuning)
    return lambda x, codes, absmax: kernel(x, codes, wgmma.scales_by_column(double_dequantize(absmax), shape))


def check(shape, tokens, transposed, tuning):
    from vlmlora_kernels import dequantize_4bit

    start = time.time()
    (codes, absmax) = weights(shape, 1)[0]
    x = jax.random.normal(jax.random.key(1), (tokens, shape[0] if transposed else shape[1]), jnp.bfloat16)

    @jax.jit
    def reference(x, codes, absmax):
        w = dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.bfloat16, implementation="xla")
        w = w if transposed else w.T
        return jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")

    expected = jax.block_until_ready(reference(x, codes, absmax))
    run = jax.jit(fused(shape, tokens, transposed, tuning)).lower(x, codes, absmax).compile()
    poison = [jnp.full(expected.shape, jnp.nan, jnp.bfloat16) for _ in range(4)]
    jax.block_until_ready(poison)
    del poison
    worst = 0.0
    for _ in range(3):
        result = run(x, codes, absmax).astype(jnp.float32)
        worst = max(worst, float(jnp.max(jnp.abs(result - expected)) / jnp.max(jnp.abs(expected))))
    ok = worst < 2**-7  # NaN is not
    say(
        "OK " if ok else "BAD",
        shape,
        tokens,
        "dy @ W" if transposed else "x @ W.T",
        tuning,
        f"worst error {worst:.2e} of the largest, {time.time() - start:.1f} s",
    )
    if not ok:
        bad = ~(jnp.abs(result - expected) <= 0.01 * jnp.max(jnp.abs(expected)))
        say(
            "   wrong:",
            int(bad.sum()),
            "of",
            bad.size,
            "rows",
            int(bad.any(1).sum()),
            "columns",
            int(bad.any(0).sum()),
            "first",
            [int(i) for i in jnp.argwhere(bad, size=1)[0]],
            "NaN",
            int(jnp.isnan(result).sum()),
        )


def time_one(shape, tokens, transposed, tunings, limit):
    from vlmlora_kernels import dequantize_4bit
    from vlmlora_kernels.bench import time_us

    packed = weights(shape, 2)
    inputs = shape[0] if transposed else shape[1]
    xs = [jax.random.normal(jax.random.key(i), (tokens, inputs), jnp.bfloat16) for i in range(2)]
    dense = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2)]
    name = f"{shape} {tokens} {'dy @ W ' if transposed else 'x @ W.T'}"
    base = time_us(lambda x, w: x @ (w if transposed else w.T), list(zip(xs, dense, strict=True)))

    def decoded(x, codes, absmax):
        w = dequantize_4bit(codes, absmax, shape=shape, dtype=jnp.bfloat16)
        return x @ (w if transposed else w.T)

    calls = [(x, *w) for x, w in zip(xs, packed, strict=True)]
    decode = time_us(decoded, calls)
    say(f"{name} bf16 {base:.1f}  decode {decode:.1f} = {base / decode:.3f}")
    for tuning in tunings:
        if time.time() > limit:
            return
        try:
            us = time_us(fused(shape, tokens, transposed, tuning), calls)
            say(f"{name} {tuning} {us:.1f} = {base / us:.3f}")
        except Exception as error:
            say(f"{name} {tuning} FAILED {type(error).__name__}: {str(error)[:300]}")


def time_scales(shape):
    from vlmlora_kernels import double_dequantize
    from vlmlora_kernels.bench import time_us
    from vlmlora_kernels.hopper import wgmma

    us = time_us(
        lambda absmax: wgmma.scales_by_column(double_dequantize(absmax), shape),
        [(absmax,) for _, absmax in weights(shape, 2)],
    )
    say(f"{shape} scales alone {us:.1f}")


def part(name, limit):
    from vlmlora_kernels.hopper.wgmma import Tuning

    say(jax.devices(), jax.__version__)
    if name == "check":
        cases = [
            ((1000, 1088), 65),
            ((3584, 3584), 200),
            ((512, 3584), 512),
            ((18944, 3584), 2048),
            ((3584, 18944), 512),
            ((1000, 1088), 200),
        ]
        jobs = [
            (s, n, tr, Tuning(tokens=w, exact=w != 192))
            for (s, n), w in zip(cases, (128, 192, 128, 256, 256, 256))
            for tr in (False, True)
        ]
    elif name == "cluster":
        jobs = [((1000, 1088), 200, tr, Tuning(cluster=2)) for tr in (False, True)]
        jobs += [((18944, 3584), 2048, tr, Tuning(cluster=2)) for tr in (False, True)]
    else:
        jobs = []
    for job in jobs:
        if time.time() > limit:
            return say("no time left")
        try:
            check(*job)
        except Exception as error:
            say("FAILED", *job, type(error).__name__, str(error)[:400])
    tunings = {
        "check": {},
        "time": {
            512: [Tuning(w, s, 1, exact) for exact in (True, False) for w, s in ((128, 6), (256, 4))],
            2048: [Tuning(256, 4), Tuning(256, 4, exact=False), Tuning(192, 5, exact=False)],
        },
        "cluster": {
            2048: [Tuning(256, 4, 2), Tuning(256, 4, 2, False)],
            512: [Tuning(128, 6, 2), Tuning(128, 6, 2, False), Tuning(256, 4, 2, False)],
        },
    }[name]
    if name == "time":
        time_scales(SHAPES[0])
    for tokens, tries in tunings.items():
        for shape in SHAPES:
            for transposed in (False, True):
                if time.time() > limit:
                    return say("no time left")
                time_one(shape, tokens, transposed, tries, limit)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=25, help="time limit of each part")
    options = parser.parse_args()
    if options.part:
        return part(options.part, time.time() + options.seconds)
    for name in PARTS:
        say("==", name)
        try:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "vlmlora_kernels.probe_wgmma",
                    "--part",
                    name,
                    "--seconds",
                    str(options.seconds),
                ],
                timeout=options.seconds + 25,
                check=False,
            )
        except subprocess.TimeoutExpired:
            say("   it hung, and was ended")


if __name__ == "__main__":
    main()
