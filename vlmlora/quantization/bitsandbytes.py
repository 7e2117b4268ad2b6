"""Reader and writer of the tensors in which bitsandbytes stores a quantised linear layer X.

4-bit (``load_in_4bit``): ``X.weight`` holds packed codes; ``X.weight.absmax``, ``X.weight.quant_map`` and
``X.weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``; JSON as bytes) the rest, with
``X.weight.nested_absmax`` and ``X.weight.nested_quant_map`` where the scales are quantised as well.

8-bit (``load_in_8bit``): ``X.weight`` is int8, ``X.SCB`` holds the largest magnitude of each row, and
``X.weight_format`` (optional) is 0, for rows.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from vlmlora.quantization.weights import INT8Weight, NF4Weight
from vlmlora_kernels.nf4 import CODE_BOOKS, NESTED_BLOCKSIZE, NestedAbsmax

_STATE_KEY = ".weight.quant_state.bitsandbytes__"
_DTYPES = ("bfloat16", "float16", "float32")


@runtime_checkable
class HasShape(Protocol):
    """An array, or a header of one such as `jax.ShapeDtypeStruct`."""

    shape: tuple[int, ...]
    dtype: Any


def is_quantized(keys: Collection[str], name: str) -> bool:
    """Whether the tensors named `keys` hold linear layer `name` in a quantised form."""
    return f"{name}.SCB" in keys or quant_state_key(keys, name) is not None


def tensor_keys(keys: Collection[str], name: str) -> tuple[str, ...]:
    """Those of `keys` that hold the quantised weight of linear layer `name`; empty if it is not quantised."""
    if not is_quantized(keys, name):
        return ()
    suffixes = (".weight", ".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map")
    suffixes += (".weight.nested_absmax", ".weight.nested_quant_map")
    names = [f"{name}{suffix}" for suffix in suffixes]
    state_key = quant_state_key(keys, name)
    return tuple(key for key in [*names, *([state_key] if state_key else [])] if key in keys)


def quant_state_key(keys: Collection[str], name: str) -> str | None:
    """The key of the JSON whose bytes `abstract` needs; None for a layer that is not 4-bit."""
    for quant_type in CODE_BOOKS:
        if (key := f"{name}{_STATE_KEY}{quant_type}") in keys:
            return key
    return None


def abstract(
    name: str, headers: Mapping[str, HasShape], quant_state: np.ndarray | None = None
) -> NF4Weight | INT8Weight:
    """Describe the quantised weight of a linear layer without its data.

    Args:
        name: the layer's name, without ``.weight``.
        headers: shape and type of every tensor of the file, by key.
        quant_state: the bytes of the tensor that `quant_state_key` names; None for an 8-bit layer.

    Returns:
        A weight with `jax.ShapeDtypeStruct` leaves.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has a shape, type or content that does not fit.
    """
    if f"{name}.SCB" in headers:
        return _abstract_int8(name, headers)
    state_key = quant_state_key(headers, name)
    if state_key is None:
        raise KeyError(f"{name} is not quantised: there is neither {name}.SCB nor {name}{_STATE_KEY}nf4")
    if quant_state is None:
        raise ValueError(f"{name}: pass the bytes of {state_key} as quant_state")
    return _abstract_4bit(name, headers, state_key, _parse_state(state_key, quant_state))


def read(name: str, tensors: Mapping[str, np.ndarray | jax.Array]) -> NF4Weight | INT8Weight:
    """Build the quantised weight of a linear layer from its tensors.

    Args:
        name: the layer's name, without ``.weight``.
        tensors: arrays by key; only those of this layer are looked at.

    Returns:
        A weight whose arrays are those of `tensors`, reshaped.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has a shape, type or content that does not fit.
    """
    state_key = quant_state_key(tensors, name)
    quant_state = None if state_key is None else np.asarray(tensors[state_key])
    layout = abstract(name, tensors, quant_state)
    if isinstance(layout, INT8Weight):
        _check_row_format(name, tensors)
        return INT8Weight(tensors[f"{name}.weight"], tensors[f"{name}.SCB"].reshape(-1))
    weight = f"{name}.weight"
    _check_code_book(f"{weight}.quant_map", tensors[f"{weight}.quant_map"], layout.quant_type)
    codes = tensors[weight].reshape(-1)
    if codes.dtype != np.uint8:
        codes = np.asarray(codes).view(np.uint8)
    absmax = tensors[f"{weight}.absmax"]
    if layout.double_quant:
        absmax = NestedAbsmax(
            codes=absmax,
            absmax=tensors[f"{weight}.nested_absmax"],
            code=tensors[f"{weight}.nested_quant_map"],
            offset=np.asarray(_parse_state(state_key, quant_state)["nested_offset"], np.float32),
        )
    return NF4Weight(codes, absmax, layout.shape, layout.quant_type, layout.blocksize, layout.dtype)


def write(name: str, weight: NF4Weight | INT8Weight) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes and transformers load as linear layer `name`.

    Raises:
        ValueError: `weight` still has its layer axis.
    """
    if weight.stack is not None:
        raise ValueError(f"{name}: a stack of {weight.stack} layers is not one tensor; write weight.layer(i)")
    if isinstance(weight, INT8Weight):
        return {
            f"{name}.weight": np.asarray(weight.codes),
            f"{name}.SCB": np.asarray(weight.scale),
            f"{name}.weight_format": np.asarray(0, np.uint8),
        }
    state = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": weight.dtype,
        "shape": list(weight.shape),
    }
    key = f"{name}.weight"
    tensors = {
        key: np.asarray(weight.codes).reshape(-1, 1),
        f"{key}.quant_map": CODE_BOOKS[weight.quant_type],
    }
    if isinstance(weight.absmax, NestedAbsmax):
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": float(weight.absmax.offset),
        }
        tensors |= {
            f"{key}.absmax": np.asarray(weight.absmax.codes),
            f"{key}.nested_absmax": np.asarray(weight.absmax.absmax),
            f"{key}.nested_quant_map": np.asarray(weight.absmax.code),
        }
    else:
        tensors[f"{key}.absmax"] = np.asarray(weight.absmax)
    blob = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors | {f"{name}{_STATE_KEY}{weight.quant_type}": blob}


def _parse_state(key: str, quant_state: np.ndarray) -> dict[str, Any]:
    """Read and check the JSON of a 4-bit tensor."""
    try:
        state = json.loads(bytes(np.asarray(quant_state, np.uint8)))
    except ValueError as error:
        raise ValueError(f"{key} does not hold JSON: {error}") from error
    needed = {"quant_type", "blocksize", "dtype", "shape"}
    if "nested_blocksize" in state or "nested_offset" in state:
        needed |= {"nested_blocksize", "nested_offset"}
    if missing := sorted(needed - set(state)):
        raise ValueError(f"{key} lacks {', '.join(missing)}; it holds {state}")
    expected = key.rpartition("__")[2]
    blocksize, shape = state["blocksize"], state["shape"]
    checks = {
        "quant_type": (state["quant_type"] == expected, expected),
        "dtype": (state["dtype"] in _DTYPES, " or ".join(_DTYPES)),
        "blocksize": (isinstance(blocksize, int) and blocksize > 0 and blocksize % 2 == 0, "an even number"),
        "shape": (
            isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape),
            "[out, in]",
        ),
        "nested_blocksize": (
            state.get("nested_blocksize", NESTED_BLOCKSIZE) == NESTED_BLOCKSIZE,
            NESTED_BLOCKSIZE,
        ),
    }
    for field, (holds, wanted) in checks.items():
        if not holds:
            raise ValueError(f"{key}: {field} is {state[field]!r}; supported: {wanted}")
    return state


def _abstract_4bit(
    name: str, headers: Mapping[str, HasShape], state_key: str, state: dict[str, Any]
) -> NF4Weight:
    weight = NF4Weight.abstract(
        *state["shape"],
        double_quant="nested_offset" in state,
        quant_type=state["quant_type"],
        blocksize=state["blocksize"],
        dtype=state["dtype"],
    )
    key = f"{name}.weight"
    packed = _get(headers, key)
    packed_bytes = int(np.prod(packed.shape)) * np.dtype(packed.dtype).itemsize
    if packed_bytes != weight.codes.shape[0]:
        raise ValueError(
            f"{key} holds {packed_bytes} bytes; shape {state['shape']} in {state_key} needs "
            f"{weight.codes.shape[0]}"
        )
    _check(headers, f"{key}.quant_map", jax.ShapeDtypeStruct((16,), np.float32))
    if isinstance(weight.absmax, NestedAbsmax):
        _check(headers, f"{key}.absmax", weight.absmax.codes)
        _check(headers, f"{key}.nested_absmax", weight.absmax.absmax)
        _check(headers, f"{key}.nested_quant_map", weight.absmax.code)
    else:
        _check(headers, f"{key}.absmax", weight.absmax)
    return weight


def _abstract_int8(name: str, headers: Mapping[str, HasShape]) -> INT8Weight:
    codes = _get(headers, f"{name}.weight")
    if len(codes.shape) != 2 or np.dtype(codes.dtype) != np.int8:
        raise ValueError(
            f"{name}.weight is {_text(codes)}; a layer with {name}.SCB needs int8 of shape [out, in]"
        )
    weight = INT8Weight.abstract(*codes.shape)
    scale = _get(headers, f"{name}.SCB")
    if int(np.prod(scale.shape)) != codes.shape[0] or np.dtype(scale.dtype) != np.float32:
        raise ValueError(f"{name}.SCB is {_text(scale)}; {name}.weight needs {_text(weight.scale)}")
    return weight


def _check_row_format(name: str, tensors: Mapping[str, Any]) -> None:
    key = f"{name}.weight_format"
    if key in tensors and int(np.asarray(tensors[key])) != 0:
        raise ValueError(
            f"{key} is {int(np.asarray(tensors[key]))}; only 0 (rows) is supported: "
            "save the model again with bitsandbytes 0.45 or later"
        )


def _check_code_book(key: str, code_book: Any, quant_type: str) -> None:
    # bitsandbytes decodes by quant_type and ignores the stored values; a file that disagrees is not its own.
    if not np.allclose(np.asarray(code_book), CODE_BOOKS[quant_type], rtol=0, atol=1e-6):
        raise ValueError(
            f"{key} is {np.asarray(code_book).tolist()}, not the values of {quant_type}: "
            f"{CODE_BOOKS[quant_type].tolist()}"
        )


def _check(headers: Mapping[str, HasShape], key: str, wanted: HasShape) -> None:
    found = _get(headers, key)
    if tuple(found.shape) != tuple(wanted.shape) or np.dtype(found.dtype) != np.dtype(wanted.dtype):
        raise ValueError(f"{key} is {_text(found)}; the quantisation state needs {_text(wanted)}")


def _get(tensors: Mapping[str, Any], key: str) -> Any:
    if key not in tensors:
        raise KeyError(f"checkpoint is missing {key}")
    return tensors[key]


def _text(array: HasShape) -> str:
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"
