"""A model of a known shape with random weights, made on the devices within seconds and without a file."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PRNGKeyArray
from transformers import PreTrainedConfig

from benchmarks.shapes import make_config
from vlmlora.distributed import attach_mesh, parameter_shardings
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.models.load_plan import QUANTIZED_PARTS
from vlmlora.models.module_table import linear_modules, module_table
from vlmlora.models.registry import family_of
from vlmlora.quantization.sharded import Layout, ShardedWeight, abstract_sharded
from vlmlora.quantization.weights import DenseWeight, INT8Weight, NF4Weight
from vlmlora_kernels.nf4 import CODE_BOOKS, DYNAMIC_CODE, NestedAbsmax

STD = 0.02
"""Of every weight, once it is decoded."""
_NF4_RMS = float(np.sqrt(np.mean(np.square(CODE_BOOKS["nf4"]))))
_INT8_RMS = float(np.sqrt(np.mean(np.square(np.arange(-128, 128)))))


def random_model(
    name: str | PreTrainedConfig, quant: str = "nf4", seed: int = 0, mesh: Mesh | None = None
) -> FastVisionModel:
    """A model in bfloat16 whose weights are drawn on the device, or on a mesh's devices, as they will lie.

    Quantised weights are random codes and scales, so that nothing is ever larger than the model itself, and
    on a mesh no device holds more than its part.

    Args:
        name: a key of `benchmarks.shapes.CONFIGS`, or a config.
        quant: how the linear layers of both towers are stored: ``"nf4"`` (doubly quantised scales),
            ``"int8"`` or ``"none"``.
        seed: of the weights.
        mesh: from `vlmlora.distributed.make_mesh`; None for one device.

    Raises:
        ValueError: unknown `quant`.
    """
    config = make_config(name) if isinstance(name, str) else name
    family = family_of(config)
    module = family.model(config, dtype=jnp.bfloat16)
    _quantize_abstract(module, config, quant)
    shardings = {} if mesh is None else parameter_shardings(module, family, mesh)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        path = ".".join(map(str, path))
        value, where = variable.get_value(), shardings.get(path)
        if isinstance(where, Layout):
            value = abstract_sharded(value, where)
        elif where is not None:
            value = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        variable.set_value(_draw(value, variable.get_metadata("init"), key))
    if mesh is not None:
        attach_mesh(module, mesh)
    jax.block_until_ready(nnx.state(module))
    label = name if isinstance(name, str) else config.model_type
    return FastVisionModel(module, config, name_or_path=label)


def _quantize_abstract(module: nnx.Module, config: PreTrainedConfig, quant: str) -> None:
    """Replace the shapes of dense weights by those of quantised ones, where loading would quantise."""
    kinds = {"nf4": NF4Weight, "int8": INT8Weight, "none": None}
    if quant not in kinds:
        raise ValueError(f"quant={quant!r} is unknown; needed one of {', '.join(map(repr, kinds))}")
    if quant == "none":
        return
    linears = linear_modules(module)
    for path in {spec.path for spec in module_table(config) if spec.part in QUANTIZED_PARTS}:
        weight = linears[path].weight.get_value()
        linears[path].weight.set_value(kinds[quant].abstract(*weight.shape, weight.stack))


def _draw(value: Any, init: str, key: PRNGKeyArray) -> Any:
    """Arrays in place of the shapes of a weight or of a plain array."""
    if isinstance(value, ShardedWeight):
        return dataclasses.replace(value, parts=_draw(value.parts, init, key))
    if isinstance(value, DenseWeight):
        return DenseWeight(_array(value.value, init, key))
    if isinstance(value, INT8Weight):
        return INT8Weight(_array(value.codes, "bits", key), _array(value.scale, 127 * STD / _INT8_RMS, key))
    if isinstance(value, NF4Weight):
        return dataclasses.replace(
            value, codes=_array(value.codes, "bits", key), absmax=_draw_scales(value.absmax, key)
        )
    return _array(value, init, key)


def _draw_scales(absmax: Any, key: PRNGKeyArray) -> Any:
    """Scales that give decoded weights the deviation `STD`: their own spread is a fifth of their mean."""
    mean = STD / _NF4_RMS / np.sqrt(1 + 0.2**2)
    if not isinstance(absmax, NestedAbsmax):
        return _array(absmax, mean * np.sqrt(1 + 0.2**2), key)
    step = 0.2 * mean / float(np.std(DYNAMIC_CODE))
    return NestedAbsmax(
        codes=_array(absmax.codes, "bits", jax.random.fold_in(key, 1)),
        absmax=_array(absmax.absmax, step, key),
        code=_array(absmax.code, "dynamic", key),
        offset=_array(absmax.offset, mean - step * float(np.mean(DYNAMIC_CODE)), key),
    )


def _array(shape: jax.ShapeDtypeStruct, fill: str | float, key: PRNGKeyArray) -> Array:
    return _filler(shape.shape, jnp.dtype(shape.dtype).name, fill, shape.sharding)(key)


@functools.cache
def _filler(shape: tuple[int, ...], dtype: str, fill: str | float, where: NamedSharding | None) -> Any:
    """A program that makes one array where it will lie, kept for the others of its shape."""

    def make(key: PRNGKeyArray) -> Array:
        if fill == "normal":
            # Drawn in the array's own type: a stack's float32 would be twice as large.
            return jnp.asarray(STD, dtype) * jax.random.normal(key, shape, dtype)
        if fill == "bits":
            unsigned = jax.random.bits(key, shape, jnp.uint8)
            return jax.lax.bitcast_convert_type(unsigned, dtype)
        if fill == "dynamic":
            return jnp.broadcast_to(jnp.asarray(DYNAMIC_CODE, dtype), shape)
        return jnp.full(shape, {"zeros": 0, "ones": 1}.get(fill, fill), dtype)

    return jax.jit(make, out_shardings=where)
