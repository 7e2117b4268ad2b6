"""LoRA and QLoRA fine-tuning of vision-language models in JAX."""

import logging
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Checkpoints": "vlmlora.training.state",
    "FastVisionModel": "vlmlora.fast_vision_model",
    "LoraConfig": "vlmlora.lora.config",
    "module_table": "vlmlora.models.module_table",
    "adamw": "vlmlora.training.optimizer",
    "fit": "vlmlora.training.loop",
    "inspect_model": "vlmlora.inspection",
    "merge_checkpoint": "vlmlora.merging",
    "choose_policy": "vlmlora.training.step",
    "init_train_state": "vlmlora.training.step",
    "make_loss_fn": "vlmlora.training.loss",
    "make_train_step": "vlmlora.training.step",
}

__all__ = ["__version__", *_EXPORTS]

# transformers says at its import that there is no PyTorch, which nothing here needs.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package alone costs nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
