"""From a model to a full Hugging Face checkpoint, one tensor at a time."""

import copy
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from transformers import PreTrainedConfig

from vlmlora.models.checkpoint import DTYPES, INDEX_FILE, SINGLE_FILE
from vlmlora.models.load_plan import unstacked_parameters
from vlmlora.models.module_table import linear_modules
from vlmlora.quantization.weights import DenseWeight, Weight

MAX_SHARD_SIZE = 5_000_000_000

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor to be written; `fetch` makes its bytes when its turn comes.

    Attributes:
        name: its key in the file.
        shape: its shape.
        dtype: its type.
        fetch: gives an array of that shape and type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def save_checkpoint(
    module: nnx.Module,
    config: PreTrainedConfig,
    directory: str | PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write ``config.json`` and safetensors with the names of transformers 4.52–4.57, which 5.x reads too.

    Stacks are taken apart, quantised weights are decoded, and tensors are fetched from the device one by one.
    A directory that exists keeps its other files, a tokenizer for instance; on failure it is as before.

    Args:
        module: the model, without adapters.
        config: its config.
        directory: made if it does not exist.
        dtype: type to write. None: each array's own; for a quantised one that of the largest other array.
        max_shard_size: bytes of tensors in one file, or a text such as ``"5GB"``; beyond it there are several
            and an index.

    Raises:
        ValueError: the model has adapters, or `max_shard_size` is no size.
        NotADirectoryError: a file stands at `directory`.
        OSError: writing failed.
    """
    if adapted := [path for path, linear in linear_modules(module).items() if linear.adapter is not None]:
        raise ValueError(
            f"the model has adapters on {len(adapted)} modules ({adapted[0]}, ...), which a full checkpoint "
            "cannot hold; save the adapter, or merge it first"
        )
    config = plain_config(config, architecture=type(module).__name__)
    write_checkpoint(directory, _tensors(module, dtype), config, max_shard_size=max_shard_size)


def write_checkpoint(
    directory: str | PathLike[str],
    tensors: Sequence[Tensor],
    config: PreTrainedConfig,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint whole or not at all, a tensor at a time.

    Args:
        directory: made if it does not exist; its other files stay.
        tensors: what to write, in this order.
        config: from `plain_config`; its type becomes that of the largest tensor.
        max_shard_size: bytes of tensors in one file, or a text such as ``"5GB"``.
        finish: is called with the folder that holds the checkpoint before it is moved to `directory`: writes
            what else belongs there, or fails, and then there is nothing.

    Raises:
        ValueError: `max_shard_size` is no size.
        NotADirectoryError: a file stands at `directory`.
        OSError: writing failed.
    """
    directory = Path(directory).expanduser().resolve()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; a checkpoint is a directory")
    shards = _shards(tensors, shard_bytes(max_shard_size))
    # On the same file system as its destination, so that moving is renaming.
    parent = directory if directory.exists() else directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    staged = parent / f".{directory.name}-{uuid4().hex}"
    staged.mkdir()
    try:
        for file, members in shards.items():
            _write_safetensors(staged / file, members)
        if list(shards) != [SINGLE_FILE]:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                "weight_map": {tensor.name: file for file, members in shards.items() for tensor in members},
            }
            (staged / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        config.dtype = max(tensors, key=lambda tensor: tensor.nbytes).dtype.name
        config.save_pretrained(staged)
        if finish is not None:
            finish(staged)
        _move_into_place(staged, directory)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def plain_config(config: PreTrainedConfig, *, architecture: str) -> PreTrainedConfig:
    """A copy of a config for a checkpoint that is not quantised, whichever the original's was.

    Args:
        config: of the model.
        architecture: transformers' name of the model's class.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [architecture]
    return config


def shard_bytes(size: int | str) -> int:
    """A size in bytes, from a number or a text such as ``"5GB"`` or ``"500MiB"``.

    Raises:
        ValueError: it is neither, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", str(size), re.IGNORECASE)
    if found:
        base = 1024 if found[3] else 1000
        size = int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"max_shard_size={size!r}: needed bytes, or a text such as '5GB' or '500MB'")
    return size


def _tensors(module: nnx.Module, dtype: DTypeLike | None) -> list[Tensor]:
    own = main_dtype(module)
    tensors = []
    for _, name, layer, value in unstacked_parameters(module):
        array = _plain_array(value)
        if array is None:
            shape, result = value.shape, own if dtype is None else dtype
        else:
            shape = array.shape if layer is None else array.shape[1:]
            result = array.dtype if dtype is None else dtype
        fetch = functools.partial(_fetch, value, layer, np.dtype(result))
        tensors.append(Tensor(name, tuple(shape), np.dtype(result), fetch))
    return tensors


def main_dtype(module: nnx.Module) -> np.dtype:
    """The type of the largest array that is not quantised, in which the others are computed with."""
    plain = (_plain_array(value) for *_, value in unstacked_parameters(module))
    return np.dtype(max((array for array in plain if array is not None), key=lambda array: array.size).dtype)


def _plain_array(value: jax.Array | Weight) -> jax.Array | None:
    """The array of a parameter that is not quantised."""
    if isinstance(value, DenseWeight):
        return value.value
    return None if isinstance(value, Weight) else value


def _fetch(value: jax.Array | Weight, layer: int | None, dtype: np.dtype) -> np.ndarray:
    if isinstance(value, Weight):
        return np.asarray((value if layer is None else value.layer(layer)).dequantize(dtype))
    return np.asarray((value if layer is None else value[layer]).astype(dtype))


def _shards(tensors: Sequence[Tensor], max_shard_size: int) -> dict[str, list[Tensor]]:
    """File name → its tensors, in order, none but a single tensor larger than the limit."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _write_safetensors(path: Path, tensors: list[Tensor]) -> None:
    # Wide types first keeps every tensor aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    # transformers refuses a file that does not say which framework its tensors come from.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.fetch()).reshape(-1).view(np.uint8))


def _move_into_place(staged: Path, directory: Path) -> None:
    if not directory.exists():
        staged.rename(directory)
        return
    written = [path.name for path in staged.iterdir()]
    stale = [
        path.name
        for path in directory.iterdir()
        if (path.name in (SINGLE_FILE, INDEX_FILE) or _SHARD.fullmatch(path.name))
        and path.name not in written
    ]
    backup = staged / "previous"
    backup.mkdir()
    moved: list[str] = []
    try:
        for name in (*written, *stale):
            if (directory / name).exists():
                os.replace(directory / name, backup / name)
            moved.append(name)
            if name in written:
                os.replace(staged / name, directory / name)
    except BaseException:
        for name in moved:
            (directory / name).unlink(missing_ok=True)
            if (backup / name).exists():
                os.replace(backup / name, directory / name)
        raise
