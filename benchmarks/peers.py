"""Time transformers + PEFT + bitsandbytes on a checkpoint: a QLoRA training step, and greedy generation.

python -m benchmarks.random_checkpoint DIRECTORY
python -m benchmarks.peers --checkpoint DIRECTORY --work 4x1024 --generate 64

The recipe is the one of `benchmarks.train_step`: NF4 with doubly quantised scales, rank 16 on every attention
and MLP projection of the vision and language parts, AdamW, gradient checkpointing, labels on the last quarter
of the tokens. A training step's peak memory leaves loading out. It needs an NVIDIA GPU, torch, peft and
bitsandbytes; what is missing is named, and nothing is run.
"""

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.record import command, write

GIB = 1 << 30
NEEDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|fc1|fc2)"


def qwen_batch(config: Any, rows: int, tokens: int) -> dict[str, Any]:
    """Rows with one 448×448 image each: 1024 patches, 256 tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    start, count = 9, 256
    input_ids = torch.randint(0, 256, (rows, tokens), generator=generator)
    input_ids[:, start - 1] = config.vision_start_token_id
    input_ids[:, start : start + count] = config.image_token_id
    input_ids[:, start + count] = config.vision_end_token_id
    return {
        "input_ids": input_ids,
        "pixel_values": torch.randn(rows * 4 * count, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 32, 32]] * rows),
        "mm_token_type_ids": (input_ids == config.image_token_id).int(),
    }


def mllama_batch(config: Any, rows: int, tokens: int) -> dict[str, Any]:
    """Rows with one image of four tiles each, which every token but the first may see."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = config.vision_config.image_size
    input_ids = torch.randint(0, 256, (rows, tokens), generator=generator)
    input_ids[:, 1] = config.image_token_index
    seen = torch.ones(rows, tokens, 1, 4, dtype=torch.long)
    seen[:, 0] = 0
    return {
        "input_ids": input_ids,
        "pixel_values": torch.randn(rows, 1, 4, 3, size, size, generator=generator),
        "aspect_ratio_ids": torch.full((rows, 1), 6),
        "aspect_ratio_mask": torch.ones(rows, 1, 4, dtype=torch.long),
        "cross_attention_mask": seen,
    }


BATCHES = {"qwen2_5_vl": qwen_batch, "qwen2_vl": qwen_batch, "mllama": mllama_batch}


def load(checkpoint: Path) -> Any:
    """The model in NF4, with bfloat16 computation."""
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "merger", "multi_modal_projector"],
    )
    return AutoModelForImageTextToText.from_pretrained(
        checkpoint,
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="sdpa",
        quantization_config=quantization,
    )


def add_lora(model: Any, r: int) -> Any:
    """The model with PEFT's adapters, prepared for training in 4 bit as PEFT recommends."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS))


def measure_training(model: Any, batch: dict[str, Any], steps: int) -> dict[str, Any]:
    """Median step time after three warm-up steps, and the peak memory of the steps."""
    import bitsandbytes as bnb
    import torch

    labels = batch["input_ids"].clone()
    labels[:, : 3 * labels.shape[1] // 4] = -100
    batch = {**batch, "labels": labels, "attention_mask": torch.ones_like(labels)}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(trained, lr=2e-4)
    model.train()
    torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(3 + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    median = statistics.median(times[3:])
    return {
        "trainable_parameters": sum(p.numel() for p in trained),
        "step_seconds": round(median, 4),
        "tokens_per_second": round(labels.numel() / median),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
    }


def measure_generation(model: Any, batch: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Seconds of a prefill and of each further token, greedily, without an end token."""
    import torch

    batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    model.eval()
    model.config.use_cache = True

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(**batch, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(2)
    torch.cuda.reset_peak_memory_stats()
    first = statistics.median(seconds(1) for _ in range(3))
    whole = statistics.median(seconds(new_tokens) for _ in range(3))
    return {
        "new_tokens": new_tokens,
        "prefill_seconds": round(first, 4),
        "seconds_per_token": round((whole - first) / (new_tokens - 1), 5),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
    }


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement, or that it ran out of memory."""
    import torch

    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(".")[0]}
    finally:
        torch.cuda.empty_cache()


def environment() -> dict[str, Any]:
    """Device, versions, command and date."""
    import torch

    return {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in NEEDED},
        "command": command(),
        "date": date.today().isoformat(),
    }


def main() -> None:
    """Read the arguments, load, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", nargs="*", default=["4x1024"], help="rows x tokens")
    parser.add_argument("--generate", type=int, default=0, help="tokens to generate; 0 for none")
    parser.add_argument("--prompt", default="1x512", help="rows x tokens of the generation's prompt")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    arguments = parser.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"skipped: {', '.join(missing)} not installed")
        return
    import torch

    if not torch.cuda.is_available():
        print("skipped: bitsandbytes is measured on an NVIDIA GPU, and there is none")
        return

    start = time.perf_counter()
    model = load(arguments.checkpoint)
    result: dict[str, Any] = {**environment(), "peer": "transformers + PEFT + bitsandbytes"}
    result["load_seconds"] = round(time.perf_counter() - start, 1)
    result["loaded_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)

    def batch(work: str) -> dict[str, Any]:
        rows, tokens = map(int, work.split("x"))
        inputs = BATCHES[model.config.model_type](model.config, rows, tokens)
        return {name: array.to("cuda") for name, array in inputs.items()}

    if arguments.generate:
        measured = attempt(lambda: measure_generation(model, batch(arguments.prompt), arguments.generate))
        result["generation"] = {"prompt": arguments.prompt, **measured}
        print(result["generation"], flush=True)
    if arguments.work:
        model = add_lora(model, arguments.r)
    result["work"] = []
    for work in arguments.work:
        measured = attempt(lambda work=work: measure_training(model, batch(work), arguments.steps))
        result["work"].append({"work": work, **measured})
        print(result["work"][-1], flush=True)
    write(arguments.out, result)


if __name__ == "__main__":
    main()
