"""Time a QLoRA training step and its peak memory; generation too.

Of a model of a known shape with random weights, made in memory within seconds:

    python -m benchmarks.train_step --model qwen2_5_vl-7b --work 8x2048 --policy auto --quant nf4

or of a checkpoint, loading included:

    python -m benchmarks.random_checkpoint DIRECTORY [--model llama-3.2-11b-vision]
    python -m benchmarks.train_step --checkpoint DIRECTORY --work 4x1024 8x2048 --policy unsloth auto
    python -m benchmarks.train_step --checkpoint DIRECTORY --work --generate 64 --prompt 1x512 8x512

Every measurement is printed as one JSON line as soon as it is there. The allocator's peak is that of the
whole process and cannot be reset, so works run from the smallest to the largest, policies in the order given,
and where a figure may be an earlier one's it is marked `peak_is_bound`; with `--isolate` each runs in a
process of its own. `--profile` says where the time of a step goes. Without a GPU, `--layers`,
`--vision-layers` and `--shrink` make a small model of the same build.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.flops import training_flops
from benchmarks.random_model import random_model
from benchmarks.record import environment, save
from benchmarks.shapes import CONFIGS, image_text_batch, make_config
from benchmarks.trace import read_program, summarize, trace_steps
from vlmlora.compilation_cache import enable_compilation_cache
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.generation.greedy import greedy_decode
from vlmlora.models.loading import load_model, read_config
from vlmlora.training.auto import StepTooLargeError
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.remat import has_auto, name_of_policy
from vlmlora.training.step import init_train_state, make_train_step

GIB = 1 << 30
WARM_UP_STEPS = 2
PROFILED_STEPS = 2


def measure(
    model: FastVisionModel, rows: int, tokens: int, policy: Any, steps: int, *, profile: bool = False
) -> dict[str, Any]:
    """Median step time after two warm-up steps, these steps' times, and the process's peak memory.

    Args:
        model: with adapters.
        rows: of the batch.
        tokens: of a row.
        policy: of gradient checkpointing.
        steps: that are timed.
        profile: also trace two more steps and print where their time goes.
    """
    initial = jax.device_get(model.split()[1])
    try:
        return _measure(model, rows, tokens, policy, steps, profile)
    finally:
        model.update(jax.device_put(initial))


def _measure(
    model: FastVisionModel, rows: int, tokens: int, policy: Any, steps: int, profile: bool
) -> dict[str, Any]:
    """The same, after which the model is without its adapters: no second copy of them takes memory."""
    graphdef, adapters, frozen = model.split()
    optimizer = optax.adamw(2e-4, weight_decay=0.01)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=policy), optimizer)
    state = init_train_state(adapters, optimizer, donate=True)
    del adapters
    batch = jax.device_put(image_text_batch(model.config, rows, tokens))
    before, times, losses = _peak_gib(), [], []
    for _ in range(WARM_UP_STEPS + steps):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        losses.append(round(float(metrics["loss"]), 4))
        times.append(time.perf_counter() - start)
    median = statistics.median(times[WARM_UP_STEPS:])
    peak = _peak_gib()
    flops = training_flops(model.config, rows, tokens, model.lora_config.r)
    result = {
        "rows": rows,
        "tokens": tokens,
        "policy": policy,
        "first_step_seconds": round(times[0], 2),
        "second_step_seconds": round(times[1], 2),  # which compiles nothing
        "step_seconds": round(median, 4),
        "tokens_per_second": round(rows * tokens / median),
        "tflops_per_second": round(flops.total / median / 1e12, 1),
        "peak_gib": peak,
        "peak_is_bound": peak is not None and peak == before,
        "losses": losses[:6],
    }
    if has_auto(policy):
        result["chosen"] = name_of_policy(step.policy(state, frozen, batch))
    if profile:
        print(json.dumps(result), flush=True)
        result["profile"] = profile_step(step, state, frozen, batch, flops.total)
    return result


def profile_step(
    step: Any, state: Any, frozen: Any, batch: Mapping[str, Any], flops: float
) -> dict[str, Any]:
    """Trace two steps, print a summary against the time that the step's operations need, and give it.

    The step must have run before, so that its program comes from the compilation cache.
    """
    try:
        program = read_program(step.lower(state, frozen, batch).compile().as_text() or "")
    except jax.errors.JaxRuntimeError as error:
        print(f"kernels are told apart by their names alone: {error}")
        program = {}

    def run() -> Any:
        nonlocal state
        for _ in range(PROFILED_STEPS):
            state, metrics = step(state, frozen, batch)
        return metrics

    try:
        summary = summarize(trace_steps(run), PROFILED_STEPS, program)
    except ValueError as error:
        print(f"no profile: {error}", flush=True)
        return {"error": str(error)}
    ceiling = bf16_ceiling()
    floor = 1000 * flops / ceiling
    print(summary.table())
    print(
        f"floor: {flops / 1e12:.3g} TFLOP at {ceiling / 1e12:.3g} TFLOP/s, measured: {floor:.1f} ms, "
        f"{floor / summary.step:.1%} of the step",
        flush=True,
    )
    return {"floor_ms": round(floor, 2), "ceiling_tflops": round(ceiling / 1e12, 1), **summary.as_dict()}


def bf16_ceiling() -> float:
    """Operations a second of a large bfloat16 product on this device."""
    size, products = (8192, 32) if jax.default_backend() == "gpu" else (512, 4)
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

    @jax.jit
    def multiply(a: jax.Array) -> jax.Array:
        # Scaled so that the values stay finite.
        scale = jnp.bfloat16(size**-0.5)
        return jax.lax.fori_loop(0, products, lambda _, x: (scale * x) @ a, a)

    jax.block_until_ready(multiply(a))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(multiply(a))
        times.append(time.perf_counter() - start)
    return products * 2 * size**3 / min(times)


def measure_generation(model: FastVisionModel, rows: int, tokens: int, new_tokens: int) -> dict[str, Any]:
    """Seconds of a prefill with its first token and of each further token, greedily, without an end token."""
    graphdef, state = nnx.split(model.module)
    batch = jax.device_put(image_text_batch(model.config, rows, tokens))

    def seconds(count: int) -> float:
        start = time.perf_counter()
        found = greedy_decode(graphdef, state, batch, max_new_tokens=count, eos_token_ids=(), pad_token_id=0)
        jax.block_until_ready(found)
        return time.perf_counter() - start

    compiling = seconds(1) + seconds(new_tokens)
    first = statistics.median(seconds(1) for _ in range(5))
    whole = statistics.median(seconds(new_tokens) for _ in range(3))
    return {
        "rows": rows,
        "prompt_tokens": tokens,
        "new_tokens": new_tokens,
        "first_calls_seconds": round(compiling, 2),
        "prefill_seconds": round(first, 4),
        "seconds_per_token": round((whole - first) / (new_tokens - 1), 5),
        "peak_gib": _peak_gib(),
    }


def get_model(arguments: argparse.Namespace) -> FastVisionModel:
    """The checkpoint, or random weights of a known shape."""
    if arguments.checkpoint is None:
        config = make_config(
            arguments.model,
            layers=arguments.layers,
            vision_layers=arguments.vision_layers,
            shrink=arguments.shrink,
        )
        return random_model(config, arguments.quant)
    config = read_config(arguments.checkpoint)
    quantize = None if arguments.quant == "none" else arguments.quant
    module = load_model(arguments.checkpoint, config, dtype=jnp.bfloat16, quantize=quantize)
    jax.block_until_ready(nnx.state(module))
    return FastVisionModel(module, config, name_or_path=arguments.checkpoint.name)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, in this process."""
    enable_compilation_cache()
    start = time.perf_counter()
    model = get_model(arguments)
    result: dict[str, Any] = {
        "model": arguments.model if arguments.checkpoint is None else arguments.checkpoint.name,
        "load_seconds" if arguments.checkpoint else "make_seconds": round(time.perf_counter() - start, 1),
        "loaded_gib": _peak_gib(),
        "quantization": arguments.quant,
        "r": arguments.r,
    }
    print(json.dumps(result), flush=True)
    for prompt in arguments.prompt if arguments.generate else ():
        measured = measure_generation(model, *_size(prompt), arguments.generate)
        result.setdefault("generation", []).append(measured)
        print(json.dumps(measured), flush=True)
    if arguments.work:
        FastVisionModel.get_peft_model(model, r=arguments.r, lora_alpha=arguments.r, verbose=False)
    result["work"] = []
    for work in sorted(arguments.work, key=_area):
        for policy in arguments.policy:
            measured = _attempt(
                functools.partial(
                    measure, model, *_size(work), policy, arguments.steps, profile=arguments.profile
                ),
                work,
                policy,
            )
            result["work"].append(measured)
            print(json.dumps({k: v for k, v in measured.items() if k != "profile"}), flush=True)
    return result


def run_isolated(arguments: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """The same with a process for each work and policy, which share compiled programs on disk."""
    result: dict[str, Any] = {"work": []}
    with tempfile.TemporaryDirectory() as directory:
        for work in arguments.work:
            for policy in arguments.policy:
                out = Path(directory) / "result.json"
                name = json.dumps(policy) if isinstance(policy, dict) else str(policy)
                alone = ["--work", work, "--policy", name, "--out", str(out)]
                # The last of several values for an option holds; `--isolate` must not.
                inherited = [argument for argument in argv if argument != "--isolate"]
                command = [sys.executable, "-m", "benchmarks.train_step", *inherited, *alone]
                status = subprocess.run(command, check=False).returncode
                if status:
                    failed = {"work": work, "policy": policy, "error": f"exit status {status}"}
                    result["work"].append(failed)
                    print(json.dumps(failed), flush=True)
                    continue
                found = json.loads(out.read_text())
                result["work"] += [{**w, "loaded_gib": found["loaded_gib"]} for w in found.pop("work")]
                result = {**found, **result}
    return {name: value for name, value in result.items() if name not in environment()}


def _attempt(measure: Any, work: str, policy: Any) -> dict[str, Any]:
    """The measurement, or that the device has too little memory for it."""
    try:
        return measure()
    except (StepTooLargeError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, StepTooLargeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rows, tokens = _size(work)
        return {"rows": rows, "tokens": tokens, "policy": policy, "out_of_memory": str(error).split("\n")[0]}


def _size(work: str) -> tuple[int, int]:
    rows, tokens = map(int, work.split("x"))
    return rows, tokens


def _area(work: str) -> tuple[int, int]:
    """What orders works by memory: tokens, and of as many the rows, each with an image."""
    rows, tokens = _size(work)
    return rows * tokens, rows


def _policy(text: str) -> Any:
    """A name, True or False, or a JSON object for a policy by names or by tower."""
    if text.startswith("{"):
        return json.loads(text)
    return {"True": True, "False": False}.get(text, text)


def _peak_gib() -> float | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else round(stats["peak_bytes_in_use"] / GIB, 2)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that choose a model of a known shape."""
    parser.add_argument("--model", choices=CONFIGS, default="qwen2_5_vl-7b", help="with random weights")
    parser.add_argument("--quant", default="nf4", choices=["nf4", "int8", "none"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--layers", type=int, help="of the language model; all if left out")
    parser.add_argument("--vision-layers", type=int, help="of the vision tower; all if left out")
    parser.add_argument("--shrink", type=int, default=1, help="divides every width")


def main() -> None:
    """Read the arguments, make or load the model, measure, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, help="instead of random weights")
    add_model_arguments(parser)
    parser.add_argument("--work", nargs="*", default=["4x1024"], help="rows x tokens")
    parser.add_argument("--policy", nargs="+", type=_policy, default=["unsloth"], help="of checkpointing")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="also trace two steps of each")
    parser.add_argument("--isolate", action="store_true", help="a process for each work and policy")
    parser.add_argument("--generate", type=int, default=0, help="tokens to generate, 2 or more; 0 for none")
    parser.add_argument("--prompt", nargs="+", default=["1x512"], help="rows x tokens of the prompts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    arguments = parser.parse_args()
    if arguments.generate == 1:
        parser.error("--generate needs 2 tokens or more, the first of which belongs to the prefill")
    result = run_isolated(arguments, sys.argv[1:]) if arguments.isolate else run(arguments)
    save(arguments.out, result)


if __name__ == "__main__":
    main()
