"""The demonstration: the bundled model learns to read handwritten digits through LoRA."""

from typing import Any

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """Import `run` when it is first used: the pictures alone need no JAX."""
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlmlora.demo.handwriting import run

    return run
