"""From a Hugging Face checkpoint to a filled model, one tensor at a time."""

import functools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from transformers import PreTrainedConfig

from vlmlora.models.checkpoint import read_checkpoint
from vlmlora.models.load_plan import LoadMode, Parameter, Piece, plan_loading
from vlmlora.models.registry import family_of
from vlmlora.nn.variables import Frozen, Trainable
from vlmlora.quantization.bitsandbytes import read as read_quantized
from vlmlora.quantization.sharded import (
    Layout,
    ShardedWeight,
    abstract_sharded,
    quantize_sharded,
    shard_weight,
)
from vlmlora.quantization.stacks import allocate, set_layer, stack_weights
from vlmlora.quantization.weights import DenseWeight, INT8Weight, NF4Weight, Weight

CONFIG_FILE = "config.json"

Placement = Layout | NamedSharding
"""How a parameter lies on a mesh: a linear layer's weight, or an array."""

# What may be on its way to the device at a time: enough to keep the copies going.
_IN_FLIGHT_BYTES = 2**27
# How far ahead of the copies the system is asked to read from disk.
_READ_AHEAD_BYTES = 2**29


class ImpliedTrue(int):
    """A True that is a default and that nobody asked for."""

    def __repr__(self) -> str:
        return "True"


IMPLIED_TRUE = ImpliedTrue(True)


DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Types of parameters that are not quantised."""


def check_dtype(dtype: DTypeLike) -> np.dtype:
    """The same type as NumPy's, if a parameter can have it.

    Raises:
        ValueError: it is none of `DTYPES`.
    """
    with suppress(TypeError):
        if (found := jnp.dtype(dtype)).name in DTYPES:
            return found
    raise ValueError(f"dtype={dtype!r}: it must be one of {', '.join(DTYPES)}, by name or of jax.numpy")


def resolve_load_mode(
    *,
    load_in_4bit: bool | ImpliedTrue = IMPLIED_TRUE,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
) -> LoadMode:
    """How to quantise a 16-bit checkpoint while loading, from Unsloth's arguments.

    Loading in 4 bit is the default and gives way to any other mode that is asked for. A caller passes its own
    default on as `IMPLIED_TRUE`; a plain True was asked for.

    Args:
        load_in_4bit: quantise to NF4.
        load_in_8bit: quantise to INT8.
        load_in_16bit: do not quantise.
        full_finetuning: train every parameter, which leaves nothing quantised; goes with `load_in_16bit`.

    Returns:
        ``"nf4"``, ``"int8"``, or None to leave the weights as they are.

    Raises:
        ValueError: two modes are asked for at once.
    """
    quantizing = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    plain = {"load_in_16bit": load_in_16bit, "full_finetuning": full_finetuning}
    asked = [name for name, value in quantizing.items() if value and not isinstance(value, ImpliedTrue)]
    asked_plain = [name for name, value in plain.items() if value]
    if len(asked) + bool(asked_plain) > 1:
        names = [*asked, *asked_plain]
        raise ValueError(
            f"{' and '.join(f'{name}=True' for name in names)} were both asked for, but a model is loaded in "
            f"one mode: pass {' or '.join(f'{name}=False' for name in names)}"
        )
    if load_in_8bit:
        return "int8"
    return "nf4" if load_in_4bit and not asked_plain else None


def read_config(directory: str | PathLike[str]) -> PreTrainedConfig:
    """Read ``config.json``, flat or nested, by transformers' own class for the family.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, its `model_type` is not supported (the message lists those that are), or
            its weights are quantised by something other than bitsandbytes.
    """
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {directory} is no model directory")
    try:
        fields = json.loads(file.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{file} has no model_type, so that the model's family is unknown")
    family = family_of(fields["model_type"])
    method = (fields.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ValueError(
            f"{file}: the weights are quantised by {method!r}; supported: bitsandbytes (NF4, FP4, INT8) and "
            "16 or 32 bit"
        )
    config, _ = family.config_class.from_dict(fields, return_unused_kwargs=True)
    return config


def load_model(
    directory: str | PathLike[str],
    config: PreTrainedConfig,
    *,
    dtype: DTypeLike,
    quantize: LoadMode = None,
    trainable: bool = False,
    progress: bool = True,
    shardings: Mapping[str, Placement] | None = None,
) -> nnx.Module:
    """Build the model of `config` and fill it from a checkpoint.

    Every tensor is checked against the model, by the files' headers alone, before any is read. Then one at a
    time goes from the memory-mapped file to the device, is cast or quantised there, and is written into its
    layer of a stack. The host holds no copy.

    Args:
        directory: with ``model.safetensors``, or shards and their index.
        config: from `read_config`.
        dtype: type of what is not quantised.
        quantize: quantise the linear layers of the vision and language parts, if the checkpoint holds
            nothing quantised: ``"nf4"`` (doubly quantised, as bitsandbytes) or ``"int8"``. What is stored
            quantised is loaded as it is stored.
        trainable: make every parameter a `Trainable`, for full fine-tuning.
        progress: show a bar with bytes and rate, in a terminal or notebook.
        shardings: path of every parameter → how it lies on a mesh; see
            `vlmlora.distributed.parameter_shardings`. Each device's part is then read from the file and
            quantised there; no device and no process ever holds a whole parameter that is cut.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        ValueError: the checkpoint is corrupt or does not fit the model, all tensors concerned named; or
            `trainable` with quantised weights.
    """
    family = family_of(config)
    stored = read_checkpoint(Path(directory))
    model = family.model(config, dtype=dtype)
    parameters = plan_loading(model, config, stored, quantize=quantize, source=str(directory))
    if trainable and (quantized := [p.path for p in parameters if p.is_quantized]):
        raise ValueError(
            f"full fine-tuning needs unquantised weights, but {len(quantized)} are quantised in {directory}: "
            f"{', '.join(quantized)}; load a 16-bit checkpoint, or train an adapter instead"
        )
    values = _fill(parameters, progress=progress, shardings=shardings or {})
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(values[".".join(map(str, path))])
    if trainable:
        _make_trainable(model)
    return model


def _fill(
    parameters: Iterable[Parameter], *, progress: bool, shardings: Mapping[str, Placement]
) -> dict[str, Any]:
    """The arrays of every parameter, by path."""
    values = {p.path: _allocate(p, shardings.get(p.path)) for p in parameters if p.stack is not None}
    # In the order of the files, which is the order in which a disk reads fastest.
    pieces = sorted(
        ((p.path, piece) for p in parameters for piece in p.pieces), key=lambda entry: entry[1].position
    )
    total = sum(piece.nbytes for _, piece in pieces)
    in_flight: deque[tuple[Any, int]] = deque()
    with _progress_bar(progress, total) as advance:
        ahead = _read_ahead([piece for _, piece in pieces])
        for path, piece in pieces:
            next(ahead)
            value = _read(piece) if path not in shardings else _read_parts(piece, shardings[path])
            in_flight.append((value, piece.nbytes))
            if piece.layer is None:
                values[path] = value
            elif isinstance(value, Weight):
                values[path] = set_layer(values[path], piece.layer, value)
            else:
                values[path] = _set_array(values[path], piece.layer, value)
            while len(in_flight) > 1 and sum(nbytes for _, nbytes in in_flight) > _IN_FLIGHT_BYTES:
                _finish(*in_flight.popleft(), advance)
        while in_flight:
            _finish(*in_flight.popleft(), advance)
    return jax.block_until_ready(values)


def _finish(value: Any, nbytes: int, advance: Callable[[int], None]) -> None:
    jax.block_until_ready(value)
    advance(nbytes)


def _read_ahead(pieces: list[Piece]) -> Iterator[None]:
    """Ask for the pages of the pieces after the current one; one step a piece."""
    ahead = requested = done = 0
    for piece in pieces:
        done += piece.nbytes
        # With several processes each reads a part, and which pages hold it is not known here.
        while jax.process_count() == 1 and ahead < len(pieces) and requested < done + _READ_AHEAD_BYTES:
            for tensor in pieces[ahead].tensors.values():
                tensor.prefetch()
            requested += pieces[ahead].nbytes
            ahead += 1
        yield


def _read(piece: Piece) -> jax.Array | Weight:
    """One layer's array or weight on the device; in memory of its own where it goes into no stack."""
    arrays = {key: tensor.read() for key, tensor in piece.tensors.items()}
    if piece.is_stored_quantized:
        weight = jax.device_put(read_quantized(piece.module_name, arrays))
        return _copy(weight) if piece.layer is None else weight
    array = jax.device_put(arrays[piece.name])
    if array.dtype != piece.dtype:
        array = _cast(array, piece.dtype)
    if isinstance(piece.target, NF4Weight):
        return NF4Weight.quantize(array)
    if isinstance(piece.target, INT8Weight):
        return INT8Weight.quantize(array)
    if piece.layer is None:
        array = _copy(array)
    return DenseWeight(array) if isinstance(piece.target, DenseWeight) else array


def _read_parts(piece: Piece, where: Placement) -> jax.Array | Weight:
    """The same on a mesh, of which each device's part alone is read."""
    arrays = {key: tensor.read() for key, tensor in piece.tensors.items()}
    if piece.is_stored_quantized:
        return shard_weight(read_quantized(piece.module_name, arrays), where)
    array = arrays[piece.name]
    if isinstance(piece.target, NF4Weight | INT8Weight):
        return quantize_sharded(array, piece.target, where, dtype=piece.dtype)
    sharding = NamedSharding(where.mesh, where.spec)
    parts = jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))
    if parts.dtype != piece.dtype:
        parts = jax.jit(_cast, static_argnums=1, out_shardings=sharding)(parts, piece.dtype)
    return (
        ShardedWeight(DenseWeight(parts), array.shape, where)
        if isinstance(piece.target, DenseWeight)
        else parts
    )


@functools.partial(jax.jit, static_argnums=1)
def _cast(array, dtype):
    return array.astype(dtype)


# On a CPU `device_put` may share the mapped file's memory, and would change when the file does.
@jax.jit
def _copy(weight):
    return jax.tree.map(functools.partial(jnp.array, copy=True), weight)


@functools.partial(jax.jit, donate_argnums=0)
def _set_array(stack, layer, array):
    return jax.lax.dynamic_update_index_in_dim(stack, array, layer, axis=0)


def _allocate(parameter: Parameter, where: Placement | None) -> jax.Array | Weight:
    targets = [piece.target for piece in parameter.pieces]
    if isinstance(targets[0], Weight):
        stack = stack_weights(targets)
        return allocate(stack if where is None else abstract_sharded(stack, where))
    return jnp.zeros((parameter.stack, *targets[0].shape), targets[0].dtype, device=where)


def _progress_bar(shown: bool, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A context that gives a function to say that so many bytes are done."""
    console = Console(stderr=True)
    if shown and (console.is_terminal or console.is_jupyter):
        return _bytes_bar(console, total)
    return nullcontext(lambda nbytes: None)


@contextmanager
def _bytes_bar(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Loading weights", total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


def _make_trainable(model: nnx.Module) -> None:
    for _, module in nnx.iter_modules(model):
        for name, variable in list(vars(module).items()):
            if isinstance(variable, Frozen):
                setattr(module, name, Trainable(variable.get_value(), init=variable.get_metadata("init")))
