"""Step time and memory from 1k to 64k tokens a row, and for LoRA ranks from 8 to 256.

    python -m benchmarks.scaling --budget 150
    python -m benchmarks.plot benchmarks/results/scaling.json docs/scaling.png

One row with one image for each length, with rank 16; 4 rows of 2048 tokens for each rank. Memory is the most
that JAX's allocator had in use while the steps ran. Each row is printed and saved as soon as it is there.
Without a GPU, ``--layers``, ``--vision-layers`` and ``--shrink`` make a small model of the same build.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import optax

from benchmarks.flops import training_flops
from benchmarks.memory import sampled_memory
from benchmarks.random_model import random_model
from benchmarks.record import save
from benchmarks.shapes import image_text_batch, make_config
from benchmarks.train_step import add_model_arguments
from vlmlora.compilation_cache import enable_compilation_cache
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.training.auto import StepTooLargeError
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.step import init_train_state, make_train_step

LONG_STEP_SECONDS = 3.0
"""A step that takes longer is timed once."""


def measure(model: FastVisionModel, rows: int, tokens: int, policy: Any, steps: int) -> dict[str, Any]:
    """Median step time after the first, and the memory of the steps, of a model with adapters."""
    graphdef, adapters, frozen = model.split()
    optimizer = optax.adamw(2e-4, weight_decay=0.01)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=policy), optimizer)
    state = init_train_state(adapters, optimizer)
    batch = jax.device_put(image_text_batch(model.config, rows, tokens))
    times: list[float] = []
    with sampled_memory(jax.devices()[:1]) as peaks:
        while len(times) < 1 + steps and (len(times) < 2 or times[-1] < LONG_STEP_SECONDS):
            start = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            loss = float(metrics["loss"])
            times.append(time.perf_counter() - start)
    median = statistics.median(times[1:])
    flops = training_flops(model.config, rows, tokens, model.lora_config.r).total
    return {
        "first_step_seconds": round(times[0], 2),
        "step_seconds": round(median, 4),
        "tokens_per_second": round(rows * tokens / median),
        "tflops": round(flops / 1e12, 2),
        "tflops_per_second": round(flops / median / 1e12, 1),
        "peak_gib": peaks[0] if peaks else None,
        "loss": round(loss, 4),
    }


def run(arguments: argparse.Namespace) -> None:
    """Every work and rank that the budget allows, each saved as soon as it is there."""
    enable_compilation_cache()
    begin = time.perf_counter()
    config = make_config(
        arguments.model,
        layers=arguments.layers,
        vision_layers=arguments.vision_layers,
        shrink=arguments.shrink,
    )
    rows, tokens = map(int, arguments.rank_work.split("x"))
    works = [("rank", rows, tokens, r) for r in arguments.ranks]
    # The longest last, which a budget may leave out.
    works += [("tokens", 1, length, arguments.r) for length in sorted(arguments.tokens)]
    settings = {"model": arguments.model, "quantization": arguments.quant, "policy": arguments.policy}
    found: list[dict[str, Any]] = []
    for varied, rows, tokens, r in works:
        row: dict[str, Any] = {"varied": varied, "rows": rows, "tokens": tokens, "r": r}
        if (spent := time.perf_counter() - begin) > arguments.budget:
            row["skipped"] = f"{spent:.0f} s of {arguments.budget:.0f} are spent"
        else:
            try:
                model = random_model(config, arguments.quant)
                FastVisionModel.get_peft_model(model, r=r, lora_alpha=r, verbose=False)
                row |= measure(model, rows, tokens, arguments.policy, arguments.steps)
            except (StepTooLargeError, jax.errors.JaxRuntimeError) as error:
                row["error"] = str(error).split("\n")[0]
            finally:
                model = None
        found.append(row)
        print(json.dumps(row), flush=True)
        save(arguments.out, {**settings, "rows": found})


def main() -> None:
    """Read the arguments, measure, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_arguments(parser)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--ranks", nargs="*", type=int, default=[8, 64, 256])
    parser.add_argument("--rank-work", default="4x2048", help="rows x tokens")
    parser.add_argument("--policy", default="unsloth", help="of checkpointing")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, at most")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which none starts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    run(parser.parse_args())


if __name__ == "__main__":
    main()
