"""The processor of Mllama."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig


def load_processor(directory: str | Path, config: PreTrainedConfig) -> Any:
    """Load the processor of a directory.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(f"the processor of {config.model_type} cannot be loaded yet ({directory})")
