"""How much of a batch is padding with packed rows and without, on a mix of documents; and what that costs.

python -m benchmarks.packing

The mix is seeded and synthetic: sizes of images, and lengths of prompts and answers, as tasks on documents
have them (`MIX`); no pixel is needed to count. On a GPU it also times training steps of the Qwen2.5-VL-7B
shape with random NF4 weights on batches of both kinds; `--no-step` leaves that out.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tokenizers import Tokenizer, models
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from benchmarks.record import save
from benchmarks.shapes import make_config
from vlmlora.compilation_cache import enable_compilation_cache
from vlmlora.data.labels import IGNORE_INDEX
from vlmlora.data.loader import make_batches
from vlmlora.data.packing import RowSize, pack
from vlmlora.data.processing import Sample, VisionLanguageProcessor
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.models.qwen2_5_vl.processing import Qwen2_5_VLProcessor, VisionInput
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.step import init_train_state, make_train_step

MODEL = "qwen2_5_vl-7b"


@dataclass(frozen=True)
class Task:
    """A kind of sample.

    Attributes:
        share: of the mix.
        sizes: bounds of the image's height and width in pixels; None: text alone.
        answer: median tokens of an answer.
        spread: deviation of their logarithm.
        prompt: bounds of the prompt's tokens.
    """

    share: float
    sizes: tuple[tuple[int, int], tuple[int, int]] | None
    answer: int
    spread: float
    prompt: tuple[int, int] = (20, 60)


MIX = {
    "receipt to JSON": Task(0.25, ((900, 1800), (400, 800)), 160, 0.5),
    "page at 100 dpi to text": Task(0.20, ((1100, 1170), (820, 850)), 450, 0.6),
    "page at 150 dpi to text": Task(0.10, ((1654, 1754), (1169, 1240)), 700, 0.6),
    "line of handwriting": Task(0.15, ((60, 160), (400, 1600)), 18, 0.4),
    "question about a chart": Task(0.15, ((500, 800), (700, 1280)), 12, 0.9),
    "description of a photo": Task(0.10, ((480, 768), (480, 1024)), 90, 0.6),
    "text alone": Task(0.05, None, 250, 0.8, prompt=(20, 400)),
}
LONGEST_ANSWER = 3000


class Mix:
    """Samples of the mix by index, made when they are asked for; all pixels are zero."""

    def __init__(self, count: int, config: PreTrainedConfig, seed: int):
        self.config = config
        rng = np.random.default_rng(seed)
        tasks = rng.choice(len(MIX), count, p=[task.share for task in MIX.values()])
        self.samples = [self._draw(list(MIX.values())[task], rng) for task in tasks]

    def _draw(self, task: Task, rng: np.random.Generator) -> tuple[tuple[int, int] | None, int, int]:
        vision = self.config.vision_config
        grid = None
        if task.sizes is not None:
            height, width = (int(rng.integers(low, high + 1)) for low, high in task.sizes)
            unit = vision.patch_size * vision.spatial_merge_size
            resized = smart_resize(
                height, width, factor=unit, min_pixels=56 * 56, max_pixels=28 * 28 * 1280 * 4
            )
            grid = tuple(side // vision.patch_size for side in resized)
        answer = int(np.clip(rng.lognormal(np.log(task.answer), task.spread), 1, LONGEST_ANSWER))
        return grid, int(rng.integers(*task.prompt)), answer + 2

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        (grid, prompt, answer), config = self.samples[index], self.config
        vision, images, pad = config.vision_config, (), []
        if grid is not None:
            values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            pixels = np.broadcast_to(np.float32(0), (grid[0] * grid[1], values))
            images = (VisionInput(pixels, (1, *grid)),)
            tokens = grid[0] * grid[1] // vision.spatial_merge_size**2
            pad = [
                config.vision_start_token_id,
                *[config.image_token_id] * tokens,
                config.vision_end_token_id,
            ]
        rng = np.random.default_rng(index)
        text = rng.integers(0, 256, prompt + answer).tolist()
        input_ids = np.array([*text[:10], *pad, *text[10:]], np.int32)
        labels = np.where(np.arange(len(input_ids)) < len(input_ids) - answer, IGNORE_INDEX, input_ids)
        return Sample(input_ids, labels.astype(np.int32), images)


def make_processor(config: PreTrainedConfig) -> VisionLanguageProcessor:
    """A processor that makes batches; it knows no words."""
    ids = {"<|image_pad|>": config.image_token_id, "<|video_pad|>": config.video_token_id, "<|pad|>": 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="<|pad|>")), pad_token="<|pad|>"
    )
    vision = config.vision_config
    pictures = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    return VisionLanguageProcessor(Qwen2_5_VLProcessor(tokenizer, pictures, config, chat_template="none"))


def waste(slots: float, filled: float) -> dict[str, Any]:
    """Slots, and what share of them is padding."""
    return {"slots": round(slots), "waste": round(1 - filled / slots, 4)}


def count(mix: Mix, processor: VisionLanguageProcessor, rows: int, tokens: int, seed: int) -> dict[str, Any]:
    """What an epoch of batches of about the same size holds, packed and padded in two ways."""
    samples = [mix[index] for index in range(len(mix))]
    sizes = [processor.size(sample) for sample in samples]
    text = sum(size.tokens for size in sizes)
    patches = sum(len(image.pixel_values) for sample in samples for image in sample.images)

    start = time.perf_counter()
    budget = processor.budget(samples, batch_size=rows, packing=True, max_length=tokens)
    capacity = RowSize(budget.max_length, budget.max_segments, budget.max_patches, budget.max_image_segments)
    packed = pack([size.in_row() for size in sizes], capacity, seed=seed)
    seconds = time.perf_counter() - start
    batches = math.ceil(len(packed) / rows)
    result: dict[str, Any] = {
        "samples": len(samples),
        "tokens": text,
        "patches": patches,
        "packed": {
            "budget": dataclasses.asdict(budget),
            "packing_seconds": round(seconds, 2),
            "batches": batches,
            "token": waste(batches * rows * budget.max_length, text),
            "patch": waste(batches * rows * budget.max_patches, patches),
        },
    }
    longest = max(size.tokens for size in sizes)
    padded_rows = max(1, round(rows * budget.max_length / longest))
    budget = processor.budget(samples, batch_size=padded_rows)
    batches = math.ceil(len(samples) / padded_rows)
    result["padded_to_one_shape"] = {
        "budget": dataclasses.asdict(budget),
        "rows": padded_rows,
        "batches": batches,
        "token": waste(batches * padded_rows * budget.max_length, text),
        "patch": waste(batches * budget.max_images * budget.max_patches, patches),
    }
    # Another shape, and another program, for nearly every batch.
    order = np.random.default_rng(seed).permutation(len(samples))
    each = [order[first : first + padded_rows] for first in range(0, len(order), padded_rows)]
    slots = sum(len(batch) * max(sizes[i].tokens for i in batch) for batch in each)
    result["padded_to_each_batchs_longest"] = {"token": waste(slots, text)}
    return result


def measure_step(model: FastVisionModel, batches: Any, policy: Any, steps: int) -> dict[str, Any]:
    """Median time of a step over different batches of one shape, and samples a second."""
    graphdef, adapters, frozen = model.split()
    optimizer = optax.adamw(2e-4, weight_decay=0.01)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=policy), optimizer)
    state, times, done, tokens = init_train_state(adapters, optimizer), [], 0, 0
    for number in range(steps + 2):
        host = batches[number]
        batch = jax.block_until_ready(jax.device_put(host))
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        float(metrics["loss"])
        times.append(time.perf_counter() - start)
        if number >= 2:
            done += int(host.get("segment_ids", host["attention_mask"]).max(axis=1).sum())
            tokens += int(host["attention_mask"].sum())
    seconds = sum(times[2:])
    return {
        "first_step_seconds": round(times[0], 2),
        "step_seconds": round(statistics.median(times[2:]), 4),
        "samples_per_second": round(done / seconds, 3),
        "filled_tokens_per_second": round(tokens / seconds),
    }


def main() -> None:
    """Read the arguments, count, measure where there is a GPU, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=8192, help="of a packed row")
    parser.add_argument("--rows", type=int, default=2, help="of a packed batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", default="unsloth", help="of checkpointing")
    parser.add_argument("--steps", type=int, default=4, help="that are timed")
    parser.add_argument("--no-step", action="store_true", help="count alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/packing.json"))
    arguments = parser.parse_args()
    config = make_config(MODEL)
    processor, mix = make_processor(config), Mix(arguments.samples, config, arguments.seed)

    result = count(mix, processor, arguments.rows, arguments.tokens, arguments.seed)
    print(json.dumps(result), flush=True)
    if jax.default_backend() == "gpu" and not arguments.no_step:
        from benchmarks.random_model import random_model

        enable_compilation_cache()
        model = random_model(MODEL, quant="nf4")
        FastVisionModel.get_peft_model(model, r=16, verbose=False)
        result["policy"] = arguments.policy
        seeded = {"seed": arguments.seed}
        packed = make_batches(
            mix, processor, batch_size=arguments.rows, packing=True, max_seq_length=arguments.tokens, **seeded
        )
        padded = make_batches(mix, processor, batch_size=result["padded_to_one_shape"]["rows"], **seeded)
        for name, batches in (("packed", packed), ("padded_to_one_shape", padded)):
            result[name]["step"] = measure_step(model, batches, arguments.policy, arguments.steps)
            print(name, json.dumps(result[name]["step"]), flush=True)
    else:
        print("no training steps are timed without a GPU, or with --no-step")
    save(arguments.out, result)


if __name__ == "__main__":
    main()
