"""What goes where: every parameter of a model matched with a checkpoint's tensors before any is read."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedConfig

from vlmlora.models.checkpoint import StoredTensor
from vlmlora.models.module_table import layer_names, module_table
from vlmlora.models.registry import Family, family_of
from vlmlora.quantization import bitsandbytes
from vlmlora.quantization.weights import DenseWeight, INT8Weight, NF4Weight, Weight

LoadMode = Literal["nf4", "int8"] | None
"""How to quantise what is stored in 16 bit; None: not at all."""

QUANTIZED_PARTS = ("vision", "language")
"""What quantising on load touches: not the projector, the head or the embeddings."""

_TIED_HEAD = "lm_head.weight"
_QUANTIZED_WEIGHTS = {"nf4": NF4Weight, "int8": INT8Weight}


@dataclass(frozen=True, eq=False)
class Piece:
    """What fills one layer of a parameter, or all of one that does not repeat.

    Attributes:
        name: Hugging Face name, with the layer's number.
        layer: index on the stack's leading axis; None where there is none.
        tensors: the stored tensors by name: one, or several of a weight that is stored quantised.
        dtype: type to cast to before anything else.
        target: shapes of what comes out: an array, or a weight of one layer.
        is_stored_quantized: whether the checkpoint holds it quantised.
    """

    name: str
    layer: int | None
    tensors: Mapping[str, StoredTensor]
    dtype: np.dtype
    target: jax.ShapeDtypeStruct | Weight
    is_stored_quantized: bool

    @property
    def module_name(self) -> str:
        """The name of the linear layer that the weight belongs to."""
        return self.name.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def position(self) -> tuple[str, int]:
        """Where its first tensor lies: file and offset."""
        return min((str(tensor.file.path), tensor.start) for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of the model and the pieces that fill it, in the order of the layers.

    Attributes:
        path: its path in the Flax tree.
        stack: number of layers; None for one that does not repeat.
        pieces: one for each layer.
    """

    path: str
    stack: int | None
    pieces: tuple[Piece, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether a layer of it is quantised, in the checkpoint or on load."""
        return any(isinstance(piece.target, NF4Weight | INT8Weight) for piece in self.pieces)


@dataclass(frozen=True, eq=False)
class _Slot:
    """One layer of a parameter as the model wants it, or all of one that does not repeat."""

    path: str
    name: str
    layer: int | None
    abstract: jax.ShapeDtypeStruct
    is_linear: bool

    @property
    def module_name(self) -> str:
        return self.name.removesuffix(".weight")


def plan_loading(
    model: nnx.Module,
    config: PreTrainedConfig,
    stored: Mapping[str, StoredTensor],
    *,
    quantize: LoadMode,
    source: str,
) -> tuple[Parameter, ...]:
    """Match a checkpoint's tensors with an abstract model.

    Args:
        model: of shapes only.
        config: its config.
        stored: the checkpoint's tensors by key, in the names of any version of transformers.
        quantize: how to quantise linear layers if the checkpoint holds nothing quantised.
        source: names the checkpoint in errors.

    Raises:
        ValueError: tensors are missing, left over, or of another shape or type. All are named. Or the
            checkpoint is stored as NF4 and `quantize` asks for INT8.
    """
    family = family_of(config)
    tensors = _renamed(stored, family, source)
    slots = list(_slots(model))
    in_4bit = [slot for slot in slots if bitsandbytes.quant_state_key(tensors, slot.module_name)]
    if quantize == "int8" and in_4bit:
        raise ValueError(
            f"{source} is stored in 4 bit and cannot be loaded in 8 bit; "
            "pass load_in_4bit=True, or load the model's 16-bit checkpoint"
        )
    quantizable: set[str] = set()
    if quantize and not any(bitsandbytes.is_quantized(tensors, slot.module_name) for slot in slots):
        quantizable = {f"{row.path}.weight" for row in module_table(config) if row.part in QUANTIZED_PARTS}

    missing, unfit, used = [], [], set()
    pieces: dict[str, list[Piece]] = {}
    for slot in slots:
        keys = bitsandbytes.tensor_keys(tensors, slot.module_name) if slot.is_linear else ()
        used.update(keys or (slot.name,))
        if slot.name not in tensors:
            missing.append(slot.name)
            continue
        try:
            piece = _piece(slot, tensors, keys, quantize if slot.path in quantizable else None)
        except (KeyError, ValueError) as error:
            unfit.append(error.args[0])
        else:
            pieces.setdefault(slot.path, []).append(piece)
    extra = [
        tensors[name].key for name in tensors if name not in used and not _is_ignored(name, config, family)
    ]
    _raise_if_unfit(source, len(slots), missing, extra, unfit)
    return tuple(
        Parameter(path, None if found[0].layer is None else len(found), tuple(found))
        for path, found in pieces.items()
    )


def unstacked_parameters(
    model: nnx.Module,
) -> Iterator[tuple[str, str, int | None, jax.Array | jax.ShapeDtypeStruct | Weight]]:
    """Every parameter, layer by layer, as (path in the tree, Hugging Face name, layer, value).

    The value is that of all layers. The layer is None for a parameter that does not repeat.
    """
    for parts, variable in nnx.to_flat_state(nnx.state(model)):
        path, value = ".".join(map(str, parts)), variable.get_value()
        for layer, name in layer_names(model, path):
            yield path, name, layer, value


def _slots(model: nnx.Module) -> Iterator[_Slot]:
    for path, name, layer, value in unstacked_parameters(model):
        is_linear = isinstance(value, DenseWeight)
        array = value.value if is_linear else value
        shape = array.shape if layer is None else array.shape[1:]
        yield _Slot(path, name, layer, jax.ShapeDtypeStruct(shape, array.dtype), is_linear)


def _renamed(stored: Mapping[str, StoredTensor], family: Family, source: str) -> dict[str, StoredTensor]:
    """The tensors by the names of transformers 4.52–4.57."""
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name = key
        for pattern, replacement in family.key_renames:
            name = re.sub(pattern, replacement, name)
        if name in tensors:
            raise ValueError(f"{source} has both {tensors[name].key} and {key}, which are one tensor: {name}")
        tensors[name] = tensor
    return tensors


def _piece(
    slot: _Slot, tensors: Mapping[str, StoredTensor], quantized_keys: tuple[str, ...], quantize: LoadMode
) -> Piece:
    if quantized_keys:
        target = _stored_target(slot, tensors)
    else:
        _check_dense(slot, tensors[slot.name])
        target = _target(slot, quantize)
    used = {key: tensors[key] for key in quantized_keys or (slot.name,)}
    dtype = np.dtype(slot.abstract.dtype)
    return Piece(slot.name, slot.layer, used, dtype, target, is_stored_quantized=bool(quantized_keys))


def _stored_target(slot: _Slot, tensors: Mapping[str, StoredTensor]) -> Weight:
    state_key = bitsandbytes.quant_state_key(tensors, slot.module_name)
    state = None if state_key is None else tensors[state_key].read()
    weight = bitsandbytes.abstract(slot.module_name, tensors, state)
    if tuple(weight.shape) != tuple(slot.abstract.shape):
        raise ValueError(f"{slot.name} {list(weight.shape)}, needed {list(slot.abstract.shape)}")
    return weight


def _check_dense(slot: _Slot, tensor: StoredTensor) -> None:
    if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
        raise ValueError(
            f"{slot.name} is {tensor.dtype.name}{list(tensor.shape)}, needed 16- or 32-bit floats"
        )
    if tensor.shape != tuple(slot.abstract.shape):
        raise ValueError(f"{slot.name} {list(tensor.shape)}, needed {list(slot.abstract.shape)}")


def _target(slot: _Slot, quantize: LoadMode) -> jax.ShapeDtypeStruct | Weight:
    if not slot.is_linear:
        return slot.abstract
    if quantize is None:
        return DenseWeight(slot.abstract)
    return _quantized_target(quantize, tuple(slot.abstract.shape), np.dtype(slot.abstract.dtype))


@functools.cache
def _quantized_target(quantize: str, shape: tuple[int, ...], dtype: np.dtype) -> Weight:
    return jax.eval_shape(_QUANTIZED_WEIGHTS[quantize].quantize, jax.ShapeDtypeStruct(shape, dtype))


def _is_ignored(name: str, config: PreTrainedConfig, family: Family) -> bool:
    if name == _TIED_HEAD and getattr(config, "tie_word_embeddings", False):
        return True
    return any(re.search(pattern, name) for pattern in family.ignored_keys)


def _raise_if_unfit(source: str, total: int, missing: list[str], extra: list[str], unfit: list[str]) -> None:
    problems = []
    if missing:
        problems.append(f"is missing {len(missing)} of {total} tensors: {', '.join(missing)}")
    if extra:
        problems.append(f"has {len(extra)} that the model has no place for: {', '.join(extra)}")
    if unfit:
        problems.append(f"has {len(unfit)} that do not fit: {'; '.join(unfit)}")
    if problems:
        raise ValueError(
            f"checkpoint {source} {'; and '.join(problems)}. config.json and weights must belong together."
        )
