"""Time a training step of Unsloth, or of transformers + PEFT + bitsandbytes, on a checkpoint; generation too.

    python -m benchmarks.torch_step unsloth --checkpoint DIRECTORY --work 4x1024 8x2048

`benchmarks.peers` runs it beside vlmlora's own. The recipe is the one of `benchmarks.train_step`: NF4 with
doubly quantised scales (or bfloat16), rank 16 on every attention and MLP projection of the vision and
language parts, AdamW, the peer's own gradient checkpointing, and the very batches, so that the losses can be
compared. Each measurement is printed as one JSON line.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

GIB = 1 << 30
WARM_UP_STEPS = 2
NEEDED = {
    "hf": ("torch", "transformers", "peft", "bitsandbytes", "accelerate"),
    "unsloth": ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "unsloth"),
}
NAMES = {"hf": "transformers + PEFT + bitsandbytes", "unsloth": "Unsloth"}
TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|fc1|fc2)"


def peer_batch(config: Any, rows: int, tokens: int) -> dict[str, Any]:
    """`benchmarks.shapes.image_text_batch`, its patches in transformers' order, as torch tensors."""
    import numpy as np
    import torch

    from benchmarks.shapes import image_text_batch
    from vlmlora.models.qwen2_5_vl.positions import vision_layout

    batch = image_text_batch(config, rows, tokens)
    input_ids = batch["input_ids"].astype(np.int64)
    found = {"input_ids": input_ids, "labels": batch["labels"].astype(np.int64)}
    found["attention_mask"] = np.ones_like(input_ids)
    vision, pixels = config.vision_config, batch["pixel_values"]
    if config.model_type == "mllama":
        seen = np.ones((*input_ids.shape, 1, vision.max_num_tiles), np.int64)
        seen[:, 0] = 0  # The image stands after the first token.
        found |= {
            "pixel_values": pixels[:, None],
            "aspect_ratio_ids": batch["aspect_ratio_ids"][:, None].astype(np.int64),
            "aspect_ratio_mask": np.ones((rows, 1, vision.max_num_tiles), np.int64),
            "cross_attention_mask": seen,
        }
    else:
        side = 448 // vision.patch_size
        grid = [[1, side, side]]
        layout = vision_layout(grid, vision.patch_size, vision.window_size, vision.spatial_merge_size)
        found |= {
            "pixel_values": pixels[:, layout.patch_slots].reshape(-1, pixels.shape[-1]),
            "image_grid_thw": np.array(grid * rows),
            "mm_token_type_ids": (input_ids == config.image_token_id).astype(np.int32),
        }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}


def load_hf(checkpoint: Path, quant: str, tokens: int) -> Any:
    """The model."""
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    quantization = None
    if quant == "nf4":
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
        device_map={"": _device()},
        attn_implementation="sdpa",
        quantization_config=quantization,
    )


def adapt_hf(model: Any, quant: str, r: int) -> Any:
    """The model with adapters, prepared as PEFT recommends."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    checkpointing = {"use_reentrant": False}
    if quant == "nf4":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=checkpointing
        )
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS))


def load_unsloth(checkpoint: Path, quant: str, tokens: int) -> Any:
    """The model."""
    from unsloth import FastVisionModel

    modes = {"load_in_4bit": True} if quant == "nf4" else {"load_in_4bit": False, "load_in_16bit": True}
    model, _ = FastVisionModel.from_pretrained(
        str(checkpoint), max_seq_length=tokens, use_gradient_checkpointing="unsloth", **modes
    )
    return model


def adapt_unsloth(model: Any, quant: str, r: int) -> Any:
    """The model with adapters, as Unsloth's notebooks have it."""
    from unsloth import FastVisionModel

    model = FastVisionModel.get_peft_model(
        model,
        r=r,
        lora_alpha=r,
        finetune_vision_layers=True,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        use_gradient_checkpointing="unsloth",
    )
    FastVisionModel.for_training(model)
    return model


LOAD = {"hf": load_hf, "unsloth": load_unsloth}
ADAPT = {"hf": adapt_hf, "unsloth": adapt_unsloth}


def measure_training(model: Any, batch: dict[str, Any], steps: int, loaded: int) -> dict[str, Any]:
    """Median step time after the warm-up steps, and the peak memory of loading and of these steps.

    The adapters start as `model` has them, and are put back there.
    """
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    start_values = [p.detach().to("cpu", copy=True) for p in trained]
    try:
        return _measure_training(model, trained, batch, steps, loaded)
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, start_values, strict=True):
                parameter.grad = None
                parameter.copy_(value)


def _measure_training(
    model: Any, trained: list[Any], batch: dict[str, Any], steps: int, loaded: int
) -> dict[str, Any]:
    import torch

    optimizer = _optimizer(trained)
    model.train()
    if on_gpu := torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(WARM_UP_STEPS + steps):
        start = time.perf_counter()
        with torch.autocast(_device(), dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(loss.detach()), 4))
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[WARM_UP_STEPS:])
    peak = max(loaded, torch.cuda.max_memory_allocated()) / GIB if on_gpu else None
    return {
        "trainable_parameters": sum(p.numel() for p in trained),
        "step_seconds": round(median, 4),
        "tokens_per_second": round(batch["labels"].numel() / median),
        "peak_gib": peak and round(peak, 2),
        "losses": losses[:6],
    }


def measure_generation(model: Any, batch: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Seconds of a prefill and of each further token, greedily, without an end token."""
    import torch

    batch = {name: tensor for name, tensor in batch.items() if name != "labels"}
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


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _optimizer(parameters: list[Any]) -> Any:
    """The 8-bit AdamW of both peers' guides, which needs a GPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=2e-4, weight_decay=0.01)


def main() -> None:
    """Read the arguments, load, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("peer", choices=NAMES)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", nargs="*", default=["4x1024"], help="rows x tokens")
    parser.add_argument("--quant", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--generate", type=int, default=0, help="tokens to generate, 2 or more; 0 for none")
    parser.add_argument("--prompt", nargs="+", default=["1x512"], help="rows x tokens of the prompts")
    arguments = parser.parse_args()
    sizes = {work: tuple(map(int, work.split("x"))) for work in (*arguments.work, *arguments.prompt)}
    longest = max(tokens for _, tokens in sizes.values()) + arguments.generate

    start = time.perf_counter()
    # Unsloth must be imported before transformers, and so before anything of this project.
    model = LOAD[arguments.peer](arguments.checkpoint, arguments.quant, longest)
    import torch

    loaded = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    header = {
        "peer": NAMES[arguments.peer],
        "load_seconds": round(time.perf_counter() - start, 1),
        "loaded_gib": round(loaded / GIB, 2),
        "device": torch.cuda.get_device_name() if loaded else platform.processor(),
        "versions": {name: version(name) for name in NEEDED[arguments.peer]},
    }
    print(json.dumps(header), flush=True)
    from vlmlora.models.loading import read_config

    config = read_config(arguments.checkpoint)

    def batch(work: str) -> dict[str, Any]:
        return {name: array.to(_device()) for name, array in peer_batch(config, *sizes[work]).items()}

    if arguments.generate and arguments.peer == "unsloth":
        from unsloth import FastVisionModel

        FastVisionModel.for_inference(model)
    for prompt in arguments.prompt if arguments.generate else ():
        rows, tokens = sizes[prompt]
        measured = attempt(lambda prompt=prompt: measure_generation(model, batch(prompt), arguments.generate))
        print(json.dumps({"rows": rows, "prompt_tokens": tokens, **measured}), flush=True)
    if arguments.work:
        model = ADAPT[arguments.peer](model, arguments.quant, arguments.r)
    for work in arguments.work:
        rows, tokens = sizes[work]
        measured = attempt(lambda work=work: measure_training(model, batch(work), arguments.steps, loaded))
        print(json.dumps({"rows": rows, "tokens": tokens, **measured}), flush=True)


if __name__ == "__main__":
    main()
