"""Time a QLoRA training step of a checkpoint, and its peak memory, loading included; and generation.

python -m benchmarks.random_checkpoint DIRECTORY [--model llama-3.2-11b-vision]
python -m benchmarks.train_step --checkpoint DIRECTORY --work 4x1024 8x2048 --policy unsloth
python -m benchmarks.train_step --checkpoint DIRECTORY --work --generate 64 --prompt 1x512 8x512
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.record import save
from benchmarks.shapes import image_text_batch
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.generation.greedy import greedy_decode
from vlmlora.models.loading import load_model, read_config
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.step import init_train_state, make_train_step

GIB = 1 << 30


def measure(model: FastVisionModel, rows: int, tokens: int, policy: str | bool, steps: int) -> dict:
    """Median step time after two warm-up steps, the first step's time, and the process's peak memory."""
    graphdef, adapters, frozen = model.split()
    optimizer = optax.adamw(2e-4, weight_decay=0.01)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=policy), optimizer)
    state = init_train_state(adapters, optimizer)
    batch = jax.device_put(image_text_batch(model.config, rows, tokens))
    times, losses = [], []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    median = statistics.median(times[2:])
    return {
        "rows": rows,
        "tokens": tokens,
        "policy": policy,
        "first_step_seconds": round(times[0], 2),
        "step_seconds": round(median, 4),
        "tokens_per_second": round(rows * tokens / median),
        "peak_gib": _peak_gib(),
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
    }


def measure_generation(model: FastVisionModel, rows: int, tokens: int, new_tokens: int) -> dict:
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


def _peak_gib() -> float | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else round(stats["peak_bytes_in_use"] / GIB, 2)


def main() -> None:
    """Read the arguments, load, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", nargs="*", default=["4x1024"], help="rows x tokens, smallest first")
    parser.add_argument("--generate", type=int, default=0, help="tokens to generate, 2 or more; 0 for none")
    parser.add_argument("--prompt", nargs="+", default=["1x512"], help="rows x tokens of the prompts")
    parser.add_argument("--policy", default="unsloth", help="unsloth, True or False")
    parser.add_argument("--quant", default="nf4", choices=["nf4", "int8", "none"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    arguments = parser.parse_args()
    if arguments.generate == 1:
        parser.error("--generate needs 2 tokens or more, the first of which belongs to the prefill")
    policy = {"True": True, "False": False}.get(arguments.policy, arguments.policy)

    start = time.perf_counter()
    config = read_config(arguments.checkpoint)
    quantize = None if arguments.quant == "none" else arguments.quant
    module = load_model(arguments.checkpoint, config, dtype=jnp.bfloat16, quantize=quantize)
    model = FastVisionModel(module, config, name_or_path=str(arguments.checkpoint.name))
    jax.block_until_ready(model.split())
    result = {
        "load_seconds": round(time.perf_counter() - start, 1),
        "loaded_gib": _peak_gib(),
        "quantization": arguments.quant,
        "r": arguments.r,
    }
    if arguments.generate:
        result["generation"] = []
        for prompt in arguments.prompt:
            rows, tokens = map(int, prompt.split("x"))
            result["generation"].append(measure_generation(model, rows, tokens, arguments.generate))
            print(result["generation"][-1], flush=True)
    if arguments.work:
        FastVisionModel.get_peft_model(model, r=arguments.r, lora_alpha=arguments.r)
    result["work"] = []
    for work in arguments.work:
        rows, tokens = map(int, work.split("x"))
        result["work"].append(measure(model, rows, tokens, policy, arguments.steps))
        print(result["work"][-1], flush=True)
    save(arguments.out, result)
    print({k: v for k, v in result.items() if k not in ("work", "generation")})


if __name__ == "__main__":
    main()
