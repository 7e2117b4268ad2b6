"""What the demonstration shows: a table, two pictures and a JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from vlmlora.demo.text_image import TextImage

__all__ = ["accuracy_table", "plot_loss", "plot_samples", "write_report"]

_RIGHT, _WRONG = "#1a7f37", "#c62828"


def accuracy_table(samples: Sequence[TextImage], before: Sequence[str], after: Sequence[str]) -> Table:
    """Share of strings read right before and after, for every length and in all."""
    table = Table(title="Handwritten strings never seen, read without a mistake")
    table.add_column("digits")
    for title in ("strings", "before", "after"):
        table.add_column(title, justify="right")
    texts = np.array([sample.text for sample in samples])
    right = np.stack([texts == np.array(before), texts == np.array(after)])
    lengths = np.array([len(text) for text in texts])
    for length in sorted(set(lengths.tolist())):
        chosen = lengths == length
        shares = right[:, chosen].mean(axis=1)
        table.add_row(str(length), str(chosen.sum()), *(f"{share:.1%}" for share in shares))
    table.add_section()
    table.add_row("all", str(len(texts)), *(f"{share:.1%}" for share in right.mean(axis=1)), style="bold")
    return table


def plot_loss(path: Path, losses: Sequence[float]) -> None:
    """Write a PNG of the loss of every step, with its running mean."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    width = min(10, len(losses))
    mean = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="step")
    axes.plot(steps[width - 1 :], mean, color="#1f4e8c", linewidth=2, label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="cross-entropy per token", yscale="log", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def plot_samples(
    path: Path,
    samples: Sequence[TextImage],
    before: Sequence[str],
    after: Sequence[str],
    *,
    rows: int = 6,
    columns: int = 4,
) -> None:
    """Write a PNG of pictures, each with its text and what was read before and after; wrong ones in red."""
    figure = Figure(figsize=(2.6 * columns, 1.25 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    widest = max(sample.image.shape[1] for sample in samples)
    for axes, sample, first, second in zip(grid, samples, before, after, strict=False):
        height, width, _ = sample.image.shape
        axes.imshow(sample.image)
        axes.set(xlim=(width / 2 - widest / 2, width / 2 + widest / 2), ylim=(height, 0))
        for x, label, text in ((0.02, "before", first), (0.52, "after", second)):
            colour = _RIGHT if text == sample.text else _WRONG
            axes.text(
                x,
                -0.06,
                f"{label}: {text or '–'}",
                color=colour,
                fontsize=9,
                transform=axes.transAxes,
                va="top",
                parse_math=False,
            )
        axes.set_title(sample.text, fontsize=10, pad=2)
    figure.savefig(path, format="png", dpi=120)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the report as indented JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
