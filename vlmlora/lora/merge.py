"""Put adapters into the base weights: in memory, or into a checkpoint that is written tensor by tensor.

All sums are taken in float32 and rounded once, to the type that is kept or written.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from transformers import PreTrainedConfig

from vlmlora.lora.adapters import detach
from vlmlora.lora.apply import adapted_modules, trainable_parameters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.layer import Lora
from vlmlora.lora.peft_format import CONFIG_FILE
from vlmlora.lora.trained import HEAD, BaseModel, remove_trained, trained_parts, trained_tensors
from vlmlora.models.checkpoint import read_checkpoint
from vlmlora.models.load_plan import Piece, plan_loading, unstacked_parameters
from vlmlora.models.loading import check_dtype
from vlmlora.models.module_table import LinearSpec, ModuleTable, linear_modules
from vlmlora.models.registry import family_of
from vlmlora.models.saving import MAX_SHARD_SIZE, Tensor, main_dtype, plain_config, write_checkpoint
from vlmlora.nn.linear import Linear
from vlmlora.nn.trained import RowsWeight, TrainedRows
from vlmlora.quantization.bitsandbytes import read as read_quantized
from vlmlora.quantization.sharded import abstract_sharded, layout_of, reshard_dense
from vlmlora.quantization.stacks import allocate, set_layer
from vlmlora.quantization.weights import DenseWeight, Weight

Matrix = Float[Array, "..."]


@dataclass(frozen=True, eq=False)
class Change:
    """What training made of one tensor of the checkpoint.

    Attributes:
        apply: the base's tensor in float32 → the merged one.
        parameters: trained elements that are in it.
    """

    apply: Callable[[Matrix], Matrix]
    parameters: int


@dataclass
class _Tally:
    """Trained elements that have been written."""

    parameters: int = 0
    names: list[str] = field(default_factory=list)


def merge_adapters(module: nnx.Module, table: ModuleTable) -> None:
    """Put every adapter into the weight of its layer and take it off, in place.

    A stack of weights is changed layer by layer and its old arrays are given away. Quantised weights that are
    adapted come out dense, in the type that the model computes with, which takes four times the memory of
    NF4: quantising them again, as PEFT does, would round most of what was learnt away. Weights without an
    adapter stay as they are.

    Where training has made a tied head differ from the embedding, the model has a head of its own afterwards,
    which `unties_head` tells in advance.

    Args:
        module: the model.
        table: its module table.

    Raises:
        ValueError: the model has no adapters, or one that no weight and bias can hold.
    """
    changes = _changes(module, table, from_file=False)
    if not changes:
        raise ValueError("the model has no adapter to merge; make one with FastVisionModel.get_peft_model")
    dtype = main_dtype(_without_adapters(module))
    _unload_trained(module)
    by_path: dict[str, list[LinearSpec]] = {}
    for spec, *_ in adapted_modules(module, table):
        by_path.setdefault(spec.path, []).append(spec)
    linears = linear_modules(module)
    for path, specs in by_path.items():
        _merge_weights(linears[path], specs, changes, dtype)
        _merge_biases(linears[path], specs, changes)
        linears[path].adapter = None


def save_merged(
    module: nnx.Module,
    config: PreTrainedConfig,
    table: ModuleTable,
    directory: str | PathLike[str],
    *,
    lora_config: LoraConfig | None,
    dtype: DTypeLike,
    base: Path | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a model with its adapters merged as a checkpoint of transformers; the model stays as it is.

    One tensor at a time is read, merged in float32, cast and written, so that the host never holds more than
    that. Nothing is left behind on failure.

    Args:
        module: the model with adapters. With `base`, its own weights are not looked at and may be shapes.
        config: its config.
        table: its module table.
        directory: made if it does not exist; its other files stay.
        lora_config: the adapter's arguments; None for a model without one, which is decoded and written.
        dtype: type to write.
        base: a checkpoint of the same model whose tensors are used in place of the model's: the 16-bit
            weights behind a quantised base, for instance. What is quantised there is decoded.
        max_shard_size: bytes of tensors in one file, or a text such as ``"5GB"``.
        finish: see `vlmlora.models.saving.write_checkpoint`.

    Raises:
        ValueError: an adapter that no checkpoint can hold, another `dtype`, or `base` does not fit.
        FileExistsError: `directory` holds an adapter.
        FileNotFoundError: `base` has no weights.
        NotADirectoryError: a file stands at `directory`.
        OSError: writing failed.
        RuntimeError: something that was trained found no tensor to go into.
    """
    if base is not None and lora_config is not None and lora_config.init_lora_weights == "loftq":
        raise ValueError(
            "an adapter that started with init_lora_weights='loftq' makes up for the rounding of the base "
            "it was trained on, and is wrong on another; leave base out"
        )
    dtype = check_dtype(dtype)
    if (adapter := Path(directory).expanduser() / CONFIG_FILE).exists():
        raise FileExistsError(
            f"{adapter} exists: transformers would load that adapter and its base, not the merged weights "
            "beside it; name another directory"
        )
    changes, tally = _changes(module, table, from_file=base is not None), _Tally()
    sources = _of_model(module) if base is None else _of_checkpoint(base, config)
    merged_config = plain_config(config, architecture=type(module).__name__)
    if unties_head(module):
        sources[f"{HEAD}.weight"] = sources[f"{BaseModel.of(module).embedding}.weight"]
        untie(merged_config)
    tensors = [
        Tensor(name, shape, dtype, functools.partial(_merged, name, read, changes.get(name), dtype, tally))
        for name, (shape, read) in sources.items()
    ]

    def check_and_finish(staged: Path) -> None:
        if left := changes.keys() - set(tally.names):
            raise RuntimeError(
                f"trained tensors without a place in the checkpoint: {', '.join(sorted(left))}"
            )
        if tally.parameters != (trained := trainable_parameters(module)):
            raise RuntimeError(f"{tally.parameters:,} of {trained:,} trained parameters were merged")
        if finish is not None:
            finish(staged)

    write_checkpoint(
        directory, tensors, merged_config, max_shard_size=max_shard_size, finish=check_and_finish
    )


def dtype_of_16_bit(config: PreTrainedConfig) -> np.dtype:
    """float16 where the config names it, else bfloat16."""
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return np.dtype(jnp.float16 if name == "float16" else jnp.bfloat16)


def unties_head(module: nnx.Module) -> bool:
    """Whether the head was tied to the embedding, and training has changed one of them alone."""
    base = BaseModel.of(module)
    either = {f"{HEAD}.weight", f"{base.embedding}.weight"}
    trained = trained_parts(module)
    return base.has_tied_head and any(path in either and not each.is_tied for path, each in trained.items())


def untie(config: PreTrainedConfig) -> None:
    """Say in a config that the head has a weight of its own."""
    for each in (config, config.get_text_config()):
        each.tie_word_embeddings = False


def _changes(module: nnx.Module, table: ModuleTable, *, from_file: bool) -> dict[str, Change]:
    """What training made of the base, by the name of the tensor."""
    changes = _trained_changes(module)
    for spec, adapter, index in adapted_modules(module, table):
        arrays = (adapter.lora_A, adapter.lora_B, adapter.magnitude)
        merge = functools.partial(_merge_weight, adapter, index, from_file)
        changes[f"{spec.name}.weight"] = Change(merge, sum(_elements(array, index) for array in arrays))
        if adapter.lora_bias is None:
            continue
        if not spec.bias:
            raise ValueError(
                f"lora_bias=True has trained a bias of {spec.name}, which has none in the base model, so "
                "that no merged checkpoint can hold it; save the adapter instead"
            )
        name, merge = f"{spec.name}.bias", functools.partial(_merge_bias, adapter, index)
        merged = Change(merge, _elements(adapter.lora_bias, index))
        changes[name] = _after(changes[name], merged) if name in changes else merged
    return changes


def _trained_changes(module: nnx.Module) -> dict[str, Change]:
    """Biases, whole modules and rows of tokens."""
    changes = {}
    for name, each, array in trained_tensors(module, trained_parts(module)):
        if name == f"{HEAD}.weight" and each.is_tied:
            continue  # The embedding's own tensor once more.
        rows = each.rows if isinstance(each, TrainedRows) else None
        changes[name] = Change(functools.partial(_replace, jnp.asarray(array), rows), array.size)
    return changes


def _replace(trained: Matrix, rows: tuple[int, ...] | None, base: Matrix) -> Matrix:
    return trained if rows is None else base.at[np.array(rows)].set(trained)


def _after(first: Change, second: Change) -> Change:
    return Change(lambda base: second.apply(first.apply(base)), first.parameters + second.parameters)


def _elements(variable: nnx.Variable | None, index: int | None) -> int:
    """Elements of one layer."""
    if variable is None:
        return 0
    array = variable.get_value()
    return array.size if index is None else array.size // array.shape[0]


def _merge_weight(adapter: Lora, index: int | None, from_file: bool, weight: Matrix) -> Matrix:
    with jax.default_matmul_precision("highest"):
        if from_file and adapter.initial_A is not None:
            # The file holds the whole weight, of which the adapter took its start.
            start = (adapter.scaling, adapter.initial_B, adapter.initial_A)
            scaling, B, A = (v.get_value() if index is None else v.get_value()[index] for v in start)
            weight = weight - scaling * (B @ A)
        return adapter.merged(weight, index)


def _merge_bias(adapter: Lora, index: int | None, bias: Matrix) -> Matrix:
    return adapter.merged_bias(bias, index)


_Source = tuple[tuple[int, ...], Callable[[DTypeLike], Matrix | np.ndarray]]
"""Shape of a tensor of the base, and a function that reads it as a type."""


def _of_model(module: nnx.Module) -> dict[str, _Source]:
    """The base's tensors, as the model holds them."""
    sources = {}
    for _, name, layer, value in unstacked_parameters(_without_adapters(module)):
        whole = (
            value.shape if isinstance(value, Weight) else value.shape if layer is None else value.shape[1:]
        )
        sources[name] = tuple(whole), functools.partial(_read_value, value, layer)
    return sources


def _without_adapters(module: nnx.Module) -> nnx.Module:
    """A copy that shares the arrays."""
    base = nnx.merge(*nnx.split(module))
    detach(base)
    return base


def _read_value(value: jax.Array | Weight, layer: int | None, dtype: DTypeLike) -> Matrix:
    if isinstance(value, Weight):
        return (value if layer is None else value.layer(layer)).dequantize(dtype)
    return (value if layer is None else value[layer]).astype(dtype)


def _of_checkpoint(directory: Path, config: PreTrainedConfig) -> dict[str, _Source]:
    """The base's tensors, as a checkpoint's files hold them."""
    model = family_of(config).model(config, dtype=jnp.float32)
    stored = read_checkpoint(directory)
    parameters = plan_loading(model, config, stored, quantize=None, source=str(directory))
    return {
        piece.name: (tuple(piece.target.shape), functools.partial(_read_piece, piece))
        for parameter in parameters
        for piece in parameter.pieces
    }


def _read_piece(piece: Piece, dtype: DTypeLike) -> Matrix | np.ndarray:
    arrays = {key: tensor.read() for key, tensor in piece.tensors.items()}
    if piece.is_stored_quantized:
        return jax.device_put(read_quantized(piece.module_name, arrays)).dequantize(dtype)
    return arrays[piece.name].astype(dtype, copy=False)


def _merged(
    name: str,
    read: Callable[[DTypeLike], Matrix | np.ndarray],
    change: Change | None,
    dtype: np.dtype,
    tally: _Tally,
) -> np.ndarray:
    """The tensor to write."""
    if change is None:
        return np.asarray(read(dtype))
    tally.parameters += change.parameters
    tally.names.append(name)
    return np.asarray(change.apply(jnp.asarray(read(jnp.float32))).astype(dtype))


def _unload_trained(module: nnx.Module) -> None:
    """Put what trained beside the adapters in the base's place, in the base's type."""
    head = None
    if unties_head(module):
        embedding = BaseModel.of(module).embedding
        trained = trained_parts(module)
        own = trained.get(f"{HEAD}.weight") or trained[f"{embedding}.weight"].frozen
        value = own.get_value()
        head = value if isinstance(value, Weight) else DenseWeight(value)
    for each in remove_trained(module).values():
        if each.frozen is None:
            continue
        value = each.get_value()
        is_rows_of_head = isinstance(value, RowsWeight)
        each.frozen.set_value(
            DenseWeight(value.dequantize(value.base.value.dtype)) if is_rows_of_head else value
        )
    if head is not None:
        out_features, in_features = head.shape
        linear = Linear(in_features, out_features, bias=False, dtype=head.value.dtype)
        linear.weight.set_value(head)
        setattr(module, HEAD, linear)


def _merge_weights(
    linear: Linear, specs: list[LinearSpec], changes: Mapping[str, Change], dtype: np.dtype
) -> None:
    weight = linear.weight.get_value()
    keeps_type = isinstance(weight, DenseWeight)
    dtype = weight.value.dtype if keeps_type else dtype
    layout = layout_of(weight)

    def merged(name: str, layer: Weight) -> Weight:
        change = changes.get(f"{name}.weight")
        dense = layer.dequantize(jnp.float32)
        result = DenseWeight((dense if change is None else change.apply(dense)).astype(dtype))
        return result if layout is None else reshard_dense(result, layout)

    if linear.stack is None:
        linear.weight.set_value(merged(specs[0].name, weight))
        return
    names = {spec.layer: spec.name for spec in specs}
    stack = weight
    if not keeps_type:
        abstract = DenseWeight.abstract(*weight.shape, dtype, linear.stack)
        stack = allocate(abstract if layout is None else abstract_sharded(abstract, layout))
    for layer in names if keeps_type else range(linear.stack):
        stack = set_layer(stack, layer, merged(names.get(layer, ""), weight.layer(layer)))
        weight = stack if keeps_type else weight
    linear.weight.set_value(stack)


def _merge_biases(linear: Linear, specs: list[LinearSpec], changes: Mapping[str, Change]) -> None:
    for spec in specs:
        change = changes.get(f"{spec.name}.bias")
        if change is None:
            continue
        value = linear.bias.get_value()
        own = value if spec.layer is None else value[spec.layer]
        merged = change.apply(own.astype(jnp.float32)).astype(value.dtype)
        linear.bias.set_value(merged if spec.layer is None else value.at[spec.layer].set(merged))
