"""Teach the bundled model, loaded as NF4, to read handwritten digits; show it and leave a PEFT adapter."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from uuid import uuid4

from rich.console import Console

import vlmlora
from vlmlora.data.loader import make_batches
from vlmlora.data.processing import VisionLanguageProcessor
from vlmlora.demo.handwritten_digits import handwritten_samples
from vlmlora.demo.report import accuracy_table, plot_loss, plot_samples, write_report
from vlmlora.demo.text_image import TextImage, reading_messages
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.lora.apply import trainable_parameters
from vlmlora.training.loop import fit
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.optimizer import adamw
from vlmlora.training.step import init_train_state, make_train_step

__all__ = ["BUNDLED_MODEL", "DemoSettings", "bundled_model", "exact_match", "read_pictures", "run"]

BUNDLED_MODEL = "tiny-qwen2_5-vl-ocr"
"""Name of the model's folder in the package."""
_VERSIONS = ("jax", "flax", "optax", "transformers", "numpy")


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demonstration; the defaults take some two minutes on two CPU cores.

    Attributes:
        steps: optimizer steps.
        batch_size: strings of a step.
        train_strings: handwritten strings to learn from, seen again and again.
        test_strings: handwritten strings of other digits, to measure with.
        learning_rate: its peak; it decays as a cosine.
        r: rank of the adapters; `lora_alpha` is twice it.
        seed: of the strings, their order and the adapters.
    """

    steps: int = 160
    batch_size: int = 32
    train_strings: int = 2048
    test_strings: int = 256
    learning_rate: float = 2e-3
    r: int = 16
    seed: int = 3407


def bundled_model() -> Path:
    """Directory of the bundled model, as Hugging Face's libraries load it.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    path = Path(vlmlora.__file__).parent / "assets" / BUNDLED_MODEL
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{path} has no model.safetensors: the installation is incomplete; install vlmlora again"
        )
    return path


def read_pictures(
    model: FastVisionModel,
    processor: VisionLanguageProcessor,
    samples: Sequence[TextImage],
    *,
    batch_size: int = 64,
) -> list[str]:
    """Ask the model for the text of every picture.

    Args:
        model: any model that was trained with `reading_messages`.
        processor: its processor.
        samples: the pictures; their texts are not looked at.
        batch_size: pictures at a time.

    Returns:
        The answers, without white space around them.
    """
    prompts = [
        processor.encode(reading_messages(sample, answer=False), labels=False, add_generation_prompt=True)
        for sample in samples
    ]
    budget = processor.budget(prompts, batch_size=batch_size, pad_to_multiple_of=8)
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        batch = processor.collate(chunk, budget, batch_size=batch_size)
        # A string of four digits and its end take five tokens; one more shows an answer that is too long.
        tokens = model.generate(batch, max_new_tokens=6)
        answers += processor.batch_decode(tokens[: len(chunk)])
    return [answer.strip() for answer in answers]


def exact_match(samples: Sequence[TextImage], answers: Sequence[str]) -> float:
    """Share of the answers that are the picture's text, every character of it.

    Raises:
        ValueError: there is not one answer for each picture, or there are none.
    """
    if not samples or len(samples) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(samples)} pictures; each picture needs one")
    return sum(sample.text == answer for sample, answer in zip(samples, answers, strict=True)) / len(samples)


def run(
    out_dir: str | PathLike[str],
    *,
    settings: DemoSettings | None = None,
    model_directory: str | PathLike[str] | None = None,
    console: Console | None = None,
) -> dict:
    """Run the demonstration and write what it shows.

    Args:
        out_dir: gets `report.json`, `loss.png`, `samples.png` and `adapter/`, all of them or none; what it
            holds under these names is replaced.
        settings: size of the run.
        model_directory: another model than the bundled one.
        console: where the progress goes.

    Returns:
        The report, as in `report.json`.

    Raises:
        FileNotFoundError: the installation lacks the bundled model.
        NotADirectoryError: `out_dir` is a file.
    """
    settings = settings or DemoSettings()
    console = console or Console()
    out_dir = Path(out_dir).expanduser().resolve()
    if out_dir.exists() and not out_dir.is_dir():
        raise NotADirectoryError(f"{out_dir} is a file; the demonstration writes a folder")
    start = time.perf_counter()
    train = handwritten_samples("train", settings.train_strings, seed=settings.seed)
    test = handwritten_samples("test", settings.test_strings, seed=settings.seed)

    directory = bundled_model() if model_directory is None else Path(model_directory)
    model, processor = FastVisionModel.from_pretrained(directory, load_in_4bit=True, progress=False)
    model = FastVisionModel.get_peft_model(
        model,
        r=settings.r,
        lora_alpha=2 * settings.r,
        use_gradient_checkpointing=False,
        random_state=settings.seed,
        verbose=False,
    )
    console.print(f"[bold]{directory.name}[/] as NF4, {trainable_parameters(model.module):,} LoRA parameters")
    # A new adapter adds nothing: its B is zero, so that this is what the base model reads.
    with console.status(f"reading {len(test)} strings of handwritten digits"):
        before = read_pictures(model, processor, test)
    console.print(f"before training: {exact_match(test, before):.1%} of {len(test)} strings read right")

    samples = [processor.encode(reading_messages(sample, answer=True)) for sample in train]
    budget = processor.budget(samples, batch_size=settings.batch_size, pad_to_multiple_of=8)
    batches = make_batches(
        samples,
        processor,
        batch_size=settings.batch_size,
        budget=budget,
        num_epochs=None,
        seed=settings.seed,
    )
    graphdef, adapters, frozen = model.split()
    optimizer = adamw(
        settings.learning_rate,
        total_steps=settings.steps,
        warmup_steps=min(10, settings.steps - 1),
        schedule="cosine",
    )
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=False), optimizer)
    state, history = fit(
        step,
        init_train_state(adapters, optimizer),
        frozen,
        (batches[number] for number in range(settings.steps)),
        total_steps=settings.steps,
        console=console,
    )
    model.update(state.adapters)
    with console.status(f"reading {len(test)} strings again"):
        after = read_pictures(model, processor, test)
    console.print(accuracy_table(test, before, after))

    report = {
        "base_accuracy": exact_match(test, before),
        "adapted_accuracy": exact_match(test, after),
        "steps": settings.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "trainable_parameters": trainable_parameters(model.module),
        "versions": {"vlmlora": vlmlora.__version__} | {name: version(name) for name in _VERSIONS},
    }
    staged = out_dir.parent / f".{out_dir.name}-{uuid4().hex}"
    try:
        staged.mkdir(parents=True)
        write_report(staged / "report.json", report)
        plot_loss(staged / "loss.png", history.losses)
        plot_samples(staged / "samples.png", test, before, after)
        model.save_pretrained(staged / "adapter")
        _publish(staged, out_dir)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    console.print(f"report.json, loss.png, samples.png and adapter/ are in [bold]{out_dir}[/]")
    return report


def _publish(staged: Path, out_dir: Path) -> None:
    """Move complete files to where they belong, over what is there."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for source in sorted(staged.iterdir()):
        target = out_dir / source.name
        if target.is_dir():
            shutil.rmtree(target)
        source.replace(target)
