"""Trains the bundled model from random weights on rendered pictures of printed text.

    python scripts/train_bundled_model.py fonts .fonts
    python scripts/train_bundled_model.py train --fonts .fonts --minutes 6
    python scripts/train_bundled_model.py train --fonts .fonts --minutes 2 --resume

The first command collects the fonts named in `bundled_model/fonts.txt` from Debian's packages; the second
needs nothing but them and an accelerator, and is done, evaluation included, some two minutes after the
minutes that it is given. The third goes on from what the second wrote, with the learning rate's schedule from
its start, and adds its run to the record.
"""

import argparse
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs the command that the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fonts = commands.add_parser("fonts", help="collect the fonts")
    fonts.add_argument("folder", type=Path)
    train = commands.add_parser("train", help="train, evaluate, write the directory and the results")
    train.add_argument("--fonts", type=Path, default=ROOT / ".fonts", help="what 'fonts' collected")
    train.add_argument("--out", type=Path, default=ROOT / "vlmlora/assets/tiny-qwen2_5-vl-ocr")
    train.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/bundled_model.json")
    train.add_argument("--minutes", type=float, default=6.0, help="of training, rendering ahead excluded")
    train.add_argument("--batch-size", type=int, default=512)
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--warmup-steps", type=int, default=200)
    train.add_argument("--held-out", type=int, default=2000, help="pictures of each evaluation")
    train.add_argument(
        "--check-minutes", type=float, default=1.0, help="between looks at the held-out strings"
    )
    train.add_argument("--workers", type=int, default=os.cpu_count())
    train.add_argument("--capacity", type=int, default=200_000, help="rendered pictures kept in memory")
    train.add_argument("--chunk", type=int, default=1000, help="pictures that a worker renders at a time")
    train.add_argument("--scratch", type=Path, default=_scratch(), help="folder for the rendered pictures")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--resume", action="store_true", help="go on from the weights in --out")
    arguments = parser.parse_args()
    # Imported here, because the rendering processes import this file too and need neither.
    if arguments.command == "fonts":
        from bundled_model.fonts import collect_fonts

        print(f"{collect_fonts(arguments.folder)} fonts in {arguments.folder}")
    else:
        from bundled_model.training import run

        run(arguments)


def _scratch() -> Path:
    shared_memory = Path("/dev/shm")
    return shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())


if __name__ == "__main__":
    main()
