"""The training run of the bundled model: full fine-tuning from random weights, checks, saving, results."""

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from bundled_model.batches import BatchTables, assemble, host_fields, make_tables
from bundled_model.card import write_card
from bundled_model.conversations import PROMPTS
from bundled_model.directory import write_directory
from bundled_model.evaluation import exact_match
from bundled_model.fonts import font_paths
from bundled_model.pool import SamplePool, draw_records
from bundled_model.weights import write_initial_weights
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.models.saving import save_checkpoint
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.step import TrainState, init_train_state, make_train_step

TRAIN_STREAM, HELD_OUT_STREAM, HELD_OUT_FONTS_STREAM = 1, 2, 3
RUN_STRIDE = 10
"""Between the streams of pictures of one run and the next."""
LOG_EVERY = 100


@dataclass(frozen=True)
class HeldOut:
    """Rendered strings that are never trained on, in fonts of the training and in others."""

    strings: np.ndarray
    strings_and_fonts: np.ndarray


def run(arguments: argparse.Namespace) -> None:
    """Trains the model, saves it, evaluates what was saved, and records the results."""
    fonts = font_paths(arguments.fonts, "train")
    earlier = json.loads(arguments.results.read_text())["training"] if arguments.resume else []
    with tempfile.TemporaryDirectory() as folder:
        initial = Path(folder)
        write_directory(initial)
        parameters = write_initial_weights(initial, seed=arguments.seed)
        if arguments.resume:
            shutil.copy(arguments.out / "model.safetensors", initial)
        say(f"{parameters:,} parameters; {len(fonts)} fonts; device {jax.devices()[0].device_kind}")
        tokenizer_file = initial / "tokenizer.json"
        with SamplePool(
            fonts,
            tokenizer_file,
            arguments.scratch,
            capacity=arguments.capacity,
            chunk=arguments.chunk,
            workers=arguments.workers,
            seed=TRAIN_STREAM + RUN_STRIDE * len(earlier),
        ) as pool:
            model, processor = FastVisionModel.from_pretrained(
                initial, dtype=jnp.float32, full_finetuning=True, use_gradient_checkpointing=False
            )
            tables = make_tables(model.config, processor)
            held_out = draw_held_out(arguments, Tokenizer.from_file(str(tokenizer_file)))
            write_directory(arguments.out)
            steps, seconds = fit(model, tables, pool, held_out, arguments)
            rendered = pool.rendered
    accuracy = evaluate(arguments.out, held_out)
    results = {
        "model": arguments.out.name,
        "parameters": parameters,
        "held_out_accuracy": accuracy,
        "held_out_pictures": arguments.held_out,
        "fonts": len(fonts),
        "held_out_fonts": len(font_paths(arguments.fonts, "held-out")),
        "training": [
            *earlier,
            {
                "steps": steps,
                "batch_size": arguments.batch_size,
                "learning_rate": arguments.learning_rate,
                "minutes": round(seconds / 60, 2),
                "rendered": rendered,
                "seed": arguments.seed,
                "command": " ".join(["python", *sys.argv]),
            },
        ],
        "device": jax.devices()[0].device_kind,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "flax", "optax", "transformers", "numpy", "pillow")},
    }
    write_card(arguments.out, results, prompt=PROMPTS[0])
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")
    say(json.dumps(results, indent=2))


def draw_held_out(arguments: argparse.Namespace, tokenizer: Tokenizer) -> HeldOut:
    """Renders the two evaluation sets."""
    count = arguments.held_out
    seen, unseen = (font_paths(arguments.fonts, split) for split in ("train", "held-out"))
    return HeldOut(
        draw_records(HELD_OUT_STREAM, 0, count, seen, tokenizer, held_out=True),
        draw_records(HELD_OUT_FONTS_STREAM, 0, count, unseen, tokenizer, held_out=True),
    )


def fit(
    model: FastVisionModel,
    tables: BatchTables,
    pool: SamplePool,
    held_out: HeldOut,
    arguments: argparse.Namespace,
) -> tuple[int, float]:
    """Trains until the minutes are over, saving and checking on the way.

    The learning rate follows the clock: up over `warmup_steps`, then down to zero as a cosine of the time
    used, so that a slower machine sees fewer steps of the same schedule.

    Returns:
        Steps taken and seconds used.
    """
    graphdef, parameters, frozen = model.split()
    optimizer = optax.inject_hyperparams(_optimizer)(learning_rate=0.0)
    state = init_train_state(parameters, optimizer)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=False), optimizer)
    assembled = jax.jit(assemble)
    rng = np.random.default_rng(arguments.seed)
    pool.refresh(wait_for=max(1, min(pool.num_chunks // 4, 2 * arguments.workers)))
    say(f"{pool.rendered:,} pictures rendered; compiling")

    def batch() -> dict[str, jax.Array]:
        return assembled(tables, host_fields(pool.sample(rng, arguments.batch_size)))

    state, metrics = step(state, frozen, batch())
    say(f"first step: loss {float(metrics['loss']):.3f}")
    start, last_check, last_log, number = time.perf_counter(), 0.0, 0.0, 1
    budget = 60 * arguments.minutes
    while (elapsed := time.perf_counter() - start) < budget:
        rate = learning_rate(elapsed / budget, number, arguments.learning_rate, arguments.warmup_steps)
        state, metrics = step(with_learning_rate(state, rate), frozen, batch())
        number += 1
        if number % LOG_EVERY == 0:
            loss = float(metrics["loss"])
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {number} is {loss}; lower --learning-rate")
            pool.refresh()
            now = time.perf_counter() - start
            speed = LOG_EVERY * arguments.batch_size / (now - last_log)
            say(
                f"{now:5.0f} s  step {number:6d}  loss {loss:.4f}  norm {float(metrics['grad_norm']):.2f}  "
                f"rate {rate:.1e}  {speed:,.0f} pictures/s  {pool.rendered:,} rendered"
            )
            last_log = now
        if elapsed - last_check > 60 * arguments.check_minutes:
            check(model, state, tables, held_out, arguments)
            last_check = last_log = time.perf_counter() - start
    check(model, state, tables, held_out, arguments)
    return number, time.perf_counter() - start


def _optimizer(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b1=0.9, b2=0.98, weight_decay=0.01)
    )


def learning_rate(progress: float, step: int, peak: float, warmup_steps: int) -> float:
    """The rate at a step when `progress` of the time, from 0 to 1, is used up."""
    warmup = min(1.0, step / max(1, warmup_steps))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def with_learning_rate(state: TrainState, rate: float) -> TrainState:
    """The state with another learning rate in its optimizer's hyperparameters."""
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": jnp.float32(rate)}
    return replace(state, opt_state=state.opt_state._replace(hyperparams=hyperparams))


def check(
    model: FastVisionModel,
    state: TrainState,
    tables: BatchTables,
    held_out: HeldOut,
    arguments: argparse.Namespace,
) -> None:
    """Saves the model in bfloat16 and prints how well it reads some of the held-out strings."""
    model.update(state.adapters)
    save_checkpoint(model.module, model.config, arguments.out, dtype=jnp.bfloat16)
    write_directory(arguments.out)
    tokenizer = Tokenizer.from_file(str(arguments.out / "tokenizer.json"))
    accuracy, wrong = exact_match(*nnx.split(model.module), tables, held_out.strings[:500], tokenizer)
    say(f"held-out strings: {accuracy:.1%} exact; wrong (truth, reading): {wrong[:6]}")


def evaluate(directory: Path, held_out: HeldOut) -> dict[str, float]:
    """Exact match of the saved model, computed in float32, with its weights as they are and in NF4."""
    accuracy: dict[str, float] = {}
    for suffix, mode in (("", {"load_in_16bit": True}), ("_nf4", {"load_in_4bit": True})):
        model, processor = FastVisionModel.from_pretrained(directory, dtype=jnp.float32, **mode)
        tables = make_tables(model.config, processor)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        for name, records in vars(held_out).items():
            accuracy[name + suffix], wrong = exact_match(*nnx.split(model.module), tables, records, tokenizer)
            say(f"{name + suffix}: {accuracy[name + suffix]:.2%}; wrong: {wrong[:12]}")
    return accuracy


def say(message: Any) -> None:
    """Prints at once, also into a pipe."""
    print(message, flush=True)
