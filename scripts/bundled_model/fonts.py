"""The fonts of the bundled model's training pictures: where they come from and which are held out."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TABLE = Path(__file__).with_name("fonts.txt")
Split = Literal["train", "held-out"]


@dataclass(frozen=True)
class FontEntry:
    """A line of `fonts.txt`: a font's split, the package that ships it, and its file name."""

    split: str
    package: str
    file: str


def read_table(path: Path = TABLE) -> list[FontEntry]:
    """Every font of the table."""
    lines = (line.split("#")[0].strip().split(maxsplit=2) for line in path.read_text().splitlines())
    return [FontEntry(*fields) for fields in lines if fields]


def collect_fonts(target: Path) -> int:
    """Writes the fonts of the table to `target/train` and `target/held-out`, cut down to printable ASCII.

    Args:
        target: The folder, made if it does not exist.

    Returns:
        The number of files.

    Raises:
        FileNotFoundError: If fonts are not installed; the message has the command that installs them.
    """
    # Only here: the machine that trains needs the collected files, not what collects them.
    from fontTools import subset

    entries = read_table()
    sources = {entry: source for entry in entries if (source := _installed(entry)) is not None}
    missing = sorted({entry.package for entry in entries if entry not in sources})
    if missing:
        raise FileNotFoundError(
            f"{len(entries) - len(sources)} of {len(entries)} fonts are not installed; "
            f"install them with: apt-get install --no-install-recommends {' '.join(missing)}"
        )
    options = subset.Options(layout_features=["kern"], notdef_outline=True)
    for entry, source in sources.items():
        folder = target / entry.split
        folder.mkdir(parents=True, exist_ok=True)
        font = subset.load_font(str(source), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=range(32, 127))
        subsetter.subset(font)
        subset.save_font(font, str(folder / entry.file), options)
    return len(sources)


def _installed(entry: FontEntry) -> Path | None:
    if entry.package == "matplotlib":
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / entry.file
        return path if path.exists() else None
    listed = subprocess.run(["dpkg", "-L", entry.package], capture_output=True, text=True, check=False)
    paths = (Path(line) for line in listed.stdout.splitlines())
    return next((path for path in paths if path.name == entry.file and path.is_file()), None)


def font_paths(folder: Path, split: Split) -> tuple[Path, ...]:
    """The collected fonts of one split, sorted by name.

    Raises:
        FileNotFoundError: If there are none.
    """
    paths = tuple(sorted(p for p in (folder / split).glob("*") if p.suffix in (".ttf", ".otf")))
    if not paths:
        raise FileNotFoundError(
            f"{folder / split} holds 0 fonts and needs at least 1; run: train_bundled_model.py fonts {folder}"
        )
    return paths
