"""Write a result with what is needed to repeat it."""

import datetime
import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vlmlora


def environment(device: str | None = None) -> dict[str, Any]:
    """Device, versions, command and date.

    Args:
        device: its name, for a process that leaves the device's memory to others; None asks JAX, which takes
            most of it.
    """
    if device is None:
        import jax

        devices = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    else:
        devices = {"device": device}
    return {
        **devices,
        "python": platform.python_version(),
        "versions": {
            "vlmlora": vlmlora.__version__,
            **{name: version(name) for name in ("jax", "flax", "optax", "transformers")},
        },
        "command": command(),
        "date": datetime.date.today().isoformat(),
    }


def command() -> str:
    """The command that runs; of absolute paths only the last part, for the rest is this machine's."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", "-m", _module(), *arguments])


def save(file: Path, result: dict[str, Any]) -> None:
    """Write `result` beside the environment, whole or not at all."""
    write(file, {**environment(), **result})


def write(file: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(format_record(record))
    temporary.rename(file)


def format_record(record: dict[str, Any]) -> str:
    """A record as JSON with one line for each entry, and for each row of an entry that is a list of them."""
    entries = []
    for name, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            text = f"[\n{rows}\n  ]"
        entries.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).stem
