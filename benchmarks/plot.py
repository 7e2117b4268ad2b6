"""Draw what was measured: the peers side by side (`benchmarks.peers`), or growth (`benchmarks.scaling`).

    python -m benchmarks.plot benchmarks/results/peers_qwen2_5_vl-7b.json docs/peers_qwen2_5_vl-7b.png
    python -m benchmarks.plot benchmarks/results/scaling.json docs/scaling.png

The limit is the time of the step's operations, computed once each (`benchmarks.flops`), at the rate of a
large bfloat16 product, which `benchmarks.train_step --profile` measures; an H100 reached 675 TFLOP/s.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flops import training_flops
from benchmarks.shapes import make_config

Row = dict[str, Any]
SERIES = {
    ("vlmlora", "unsloth"): ('vlmlora, "unsloth"', "#1f5fa8"),
    ("vlmlora", "auto"): ('vlmlora, "auto"', "#7fb0e6"),
    ("Unsloth", None): ("Unsloth", "#d9822b"),
    ("transformers + PEFT + bitsandbytes", None): ("transformers + PEFT + bitsandbytes", "#9a9a9a"),
}
"""Peer and policy → what the legend says, and a colour; in the order in which bars stand."""

STORED = {"nf4": "NF4", "int8": "INT8", "none": "bfloat16"}
LABELS = {"tokens": ("tokens", "tokens a row"), "rank": ("r", "LoRA rank")}
"""What `benchmarks.scaling` varied → its name in a row, and what the axis says."""


def draw_peers(result: dict[str, Any], quantization: str, ceiling: float, file: Path) -> None:
    """Bars of tokens a second and of peak memory for each work, and the limit as a line above them.

    Args:
        result: from `benchmarks.peers`.
        quantization: of the rows that are drawn.
        ceiling: operations a second that the device can do.
        file: the picture.

    Raises:
        ValueError: there are no such rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["quantization"] == quantization and "tokens" in row]
    works = sorted({(row["rows"], row["tokens"]) for row in rows}, key=lambda work: (work[0] * work[1], work))
    series = [who for who in SERIES if any(_who(row) == who for row in rows)]
    if not series:
        raise ValueError(f"no rows with quantization={quantization!r} to draw; measure them first")
    width = 0.8 / len(series)
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, who in enumerate(series):
        label, colour = SERIES[who]
        for axes, name in ((speed, "tokens_per_second"), (memory, "peak_gib")):
            for place, work in enumerate(works):
                row = _find(rows, who, work)
                left = place - 0.4 + width * (number + 0.5)
                if row is not None and row.get(name) is not None:
                    bars = axes.bar(left, row[name], 0.92 * width, color=colour, label=label)
                    text = f"{row[name]:,}" if axes is speed else f"{row[name]:.1f}"
                    axes.bar_label(bars, [text], fontsize=7, padding=2)
                elif row is not None and "out_of_memory" in row:
                    axes.text(left, 0, " out of memory", rotation=90, ha="center", va="bottom", fontsize=7)
    config = make_config(result["model"])
    for place, (count, tokens) in enumerate(works):
        flops = training_flops(config, count, tokens, rows[0]["r"]).total
        limit = count * tokens * ceiling / flops
        speed.hlines(limit, place - 0.42, place + 0.42, color="black", linewidth=1.2, label="limit")
        speed.annotate(
            f"{limit:,.0f}", (place, limit), (0, 3), textcoords="offset points", ha="center", fontsize=7
        )
    for axes, title in ((speed, "tokens per second"), (memory, "peak memory, GiB")):
        axes.set_title(title)
        axes.set_xticks(range(len(works)), [f"{count} × {tokens}" for count, tokens in works])
        axes.set_xlabel("rows × tokens")
        axes.set_xlim(-0.5, len(works) - 0.5)
        axes.set_ylim(top=1.08 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
    shown = dict(zip(*reversed(speed.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), frameon=False)
    figure.suptitle(f"LoRA training step, {result['model']} in {STORED[quantization]}, {result['device']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_scaling(result: dict[str, Any], ceiling: float, file: Path) -> None:
    """Step time and memory against tokens a row and against the rank, and the limit of the time.

    Args:
        result: from `benchmarks.scaling`.
        ceiling: operations a second that the device can do.
        file: the picture.

    Raises:
        ValueError: nothing was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [row for row in result["rows"] if "step_seconds" in row]
    columns = [varied for varied in LABELS if any(row["varied"] == varied for row in measured)]
    if not columns:
        raise ValueError("no rows to draw; measure them first")
    size = {"figsize": (5 * len(columns), 5.6), "squeeze": False, "sharex": "col", "layout": "constrained"}
    figure, axes = plt.subplots(2, len(columns), **size)
    for (times, memory), varied in zip(axes.T, columns, strict=True):
        name, label = LABELS[varied]
        rows = sorted((row for row in measured if row["varied"] == varied), key=lambda row: row[name])
        x = [row[name] for row in rows]
        seconds = [row["step_seconds"] for row in rows]
        times.plot(x, seconds, "o-", color="#1f5fa8", label="measured")
        times.plot(x, [1e12 * row["tflops"] / ceiling for row in rows], "k--", linewidth=1, label="limit")
        memory.plot(x, [row["peak_gib"] for row in rows], "o-", color="#1f5fa8")
        for axis, unit, values in ((times, "s", seconds), (memory, "GiB", [r["peak_gib"] for r in rows])):
            for place, value in zip(x, values, strict=True):
                if value is not None:
                    axis.annotate(
                        f"{value:.3g} {unit}",
                        (place, value),
                        (-2, 6),
                        textcoords="offset points",
                        ha="right",
                        fontsize=8,
                    )
            axis.set_xscale("log", base=2)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.2, y=0.18)
        if varied == "tokens":
            times.set_yscale("log")
        else:
            times.set_ylim(bottom=0)
        memory.set_ylim(bottom=0)
        memory.set_xticks(x, [f"{value // 1024}k" if value >= 1024 else str(value) for value in x])
        memory.minorticks_off()
        work = "one row" if varied == "tokens" else f"{rows[0]['rows']} × {rows[0]['tokens']} tokens"
        memory.set_xlabel(f"{label}, {work}")
        times.set_ylabel("step, s")
        memory.set_ylabel("peak memory, GiB")
        times.legend(frameon=False)
    figure.suptitle(f"{result['model']} in {STORED[result['quantization']]}, {result['device']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _who(row: Row) -> tuple[str, Any]:
    return row["peer"], row.get("policy")


def _find(rows: Sequence[Row], who: tuple[str, Any], work: tuple[int, int]) -> Row | None:
    return next((r for r in rows if _who(r) == who and (r["rows"], r["tokens"]) == work), None)


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="from benchmarks.peers or benchmarks.scaling")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--quant", choices=["nf4", "none"], default="nf4", help="of the peers' rows to draw")
    parser.add_argument(
        "--ceiling", type=float, default=675, help="TFLOP/s that the device was measured to do"
    )
    arguments = parser.parse_args()
    result, ceiling = json.loads(arguments.result.read_text()), 1e12 * arguments.ceiling
    if "varied" in result["rows"][0]:
        draw_scaling(result, ceiling, arguments.picture)
    else:
        draw_peers(result, arguments.quant, ceiling, arguments.picture)


if __name__ == "__main__":
    main()
