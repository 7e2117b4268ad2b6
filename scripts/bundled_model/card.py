"""The bundled model's card."""

from pathlib import Path
from typing import Any

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [qwen2_5_vl, ocr]
---

# {name}

A real Qwen2.5-VL of {parameters:,} parameters that reads short printed text in small pictures: 8-pixel
patches, 32-pixel attention windows, a byte-level tokenizer, Qwen's chat template without a default system
message. It was trained from random weights by vlmlora's own full fine-tuning, to be adapted in demos and
tests; it knows nothing but reading.

Ask it "{prompt}" about an RGB picture 32 to 64 pixels high and up to 192 wide.

| held out from training | exact match |
|---|---|
{accuracies}

Trained on {device} in {minutes:.1f} minutes: {steps:,} steps of {batch_size} pictures, drawn from
{rendered:,} that were rendered in {fonts} fonts of Debian and matplotlib, none of them handwriting:

{commands}
"""

_ROWS = (
    ("strings", "strings, in fonts of the training"),
    ("strings_and_fonts", "strings, in fonts never seen"),
    ("strings_nf4", "strings, in fonts of the training, weights in NF4"),
)


def write_card(directory: Path, results: dict[str, Any], *, prompt: str) -> None:
    """Writes `README.md` from the recorded results."""
    accuracy = results["held_out_accuracy"]
    rows = "\n".join(f"| {title} | {accuracy[key]:.1%} |" for key, title in _ROWS)
    runs = results["training"]
    totals = {key: sum(run[key] for run in runs) for key in ("minutes", "steps", "rendered")}
    text = _CARD.format(
        name=directory.name,
        accuracies=rows,
        prompt=prompt,
        batch_size=runs[-1]["batch_size"],
        commands="\n".join(f"    {run['command']}" for run in runs),
        **{key: results[key] for key in ("device", "parameters", "fonts")},
        **totals,
    )
    (directory / "README.md").write_text(text)
