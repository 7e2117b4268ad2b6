"""The model families. Each is a folder beside this file that registers itself when imported."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
from flax import nnx
from transformers import PreTrainedConfig

import vlmlora.models


@dataclass(frozen=True)
class Family:
    """What the rest of the library needs to know of a model family.

    Attributes:
        model_type: as in ``config.json``.
        config_class: the transformers class that reads ``config.json``.
        model: ``model(config, dtype)`` builds the abstract module (shapes, no arrays).
        parts: prefix of a module's path → ``vision``, ``language``, ``projector`` or ``head``.
        roles: name of a component on a path in the vision or language part → ``attention`` or ``mlp``;
            ``other`` without one.
        key_renames: ``(pattern, replacement)`` applied to checkpoint keys of earlier transformers versions.
        ignored_keys: patterns of checkpoint keys that hold no parameter.
        processor: ``processor(directory, config)`` loads the family's processor, a
            `vlmlora.data.processing.FamilyProcessor`.
        wrappers: names of modules that hold a whole tower and that versions of transformers put into a
            module's name in different places, or leave out.
        batch_shapes: ``batch_shapes(config, rows, tokens, image_size)`` gives the shapes of a training batch
            in which every row holds one image of `image_size` (height, width), or none where that is None.
            Memory is planned with it.
        tensor_cuts: end of a linear module's path → ``rows`` or ``columns``: how several devices share it,
            where its name alone does not say (`vlmlora.distributed`).
    """

    model_type: str
    config_class: type[PreTrainedConfig]
    model: Callable[..., nnx.Module]
    parts: tuple[tuple[str, str], ...]
    roles: tuple[tuple[str, str], ...]
    key_renames: tuple[tuple[str, str], ...]
    ignored_keys: tuple[str, ...]
    processor: Callable[..., Any]
    wrappers: tuple[str, ...] = ("model", "language_model", "vision_model")
    batch_shapes: Callable[..., dict[str, jax.ShapeDtypeStruct]] | None = None
    tensor_cuts: tuple[tuple[str, str], ...] = ()


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known under its `model_type`.

    Raises:
        ValueError: another family has that `model_type`.
    """
    if family.model_type in _FAMILIES:
        raise ValueError(f"model_type={family.model_type!r} is registered twice")
    _FAMILIES[family.model_type] = family


@cache
def _import_families() -> None:
    for module in pkgutil.iter_modules(vlmlora.models.__path__):
        if module.ispkg:
            importlib.import_module(f"vlmlora.models.{module.name}")


def supported_model_types() -> list[str]:
    """The `model_type` of every family, sorted."""
    _import_families()
    return sorted(_FAMILIES)


@cache
def wrapper_modules() -> tuple[str, ...]:
    """The `wrappers` of all families."""
    _import_families()
    return tuple(dict.fromkeys(name for family in _FAMILIES.values() for name in family.wrappers))


def family_of(config: PreTrainedConfig | str) -> Family:
    """The family of a config, or of a `model_type`.

    Raises:
        ValueError: no family has that `model_type`; the message lists those that are supported.
    """
    _import_families()
    model_type = config if isinstance(config, str) else config.model_type
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; supported: {', '.join(supported_model_types())}"
        )
    return _FAMILIES[model_type]
