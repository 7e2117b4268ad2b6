"""Adapters of shapes only, for planning before there is a model."""

import functools

import jax
import numpy as np
from flax import nnx

from vlmlora.lora.apply import LoraArrays, linears_without_adapters, make_adapter
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import SelectedModule, Selection


def add_abstract_adapters(module: nnx.Module, selection: Selection, config: LoraConfig) -> None:
    """Set the adapter of every selected module to one of shapes only, in place; nothing is computed.

    Args:
        module: the model, whose own arrays may be shapes as well.
        selection: from `vlmlora.lora.selection.select`.
        config: which kinds of array an adapter has.

    Raises:
        ValueError: the model has adapters already, or is not the one that the selection was made for.
    """
    linears = linears_without_adapters(module, selection.table)
    for path, selected in selection.by_path.items():
        specs = [each.spec for each in selected]
        arrays = [_zeros(each, config) for each in selected]
        make = functools.partial(make_adapter, specs, arrays, dropout=config.lora_dropout)
        linears[path].adapter = jax.eval_shape(make)


def _zeros(selected: SelectedModule, config: LoraConfig) -> LoraArrays:
    """An adapter's arrays on the host, which take no memory."""

    def zeros(*shape: int) -> np.ndarray:
        return np.broadcast_to(np.float32(0), shape)

    spec, r = selected.spec, selected.r
    return LoraArrays(
        zeros(r, spec.in_features),
        zeros(spec.out_features, r),
        selected.scaling,
        lora_bias=zeros(spec.out_features) if config.lora_bias else None,
        magnitude=zeros(spec.out_features) if config.use_dora else None,
    )
