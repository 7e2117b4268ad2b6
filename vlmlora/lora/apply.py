"""Put adapters on a model's linear modules, take them off, and find them."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from vlmlora.lora.config import LoraConfig
from vlmlora.lora.init import init_lora, module_salt
from vlmlora.lora.layer import Lora
from vlmlora.lora.selection import Selection
from vlmlora.models.module_table import LinearSpec, ModuleTable, linear_modules
from vlmlora.nn.linear import Linear
from vlmlora.nn.variables import Trainable


def add_adapters(module: nnx.Module, selection: Selection, config: LoraConfig, key: PRNGKeyArray) -> None:
    """Set the adapter of every selected module, in place.

    Args:
        module: the model.
        selection: from `vlmlora.lora.selection.select`.
        config: dropout and initialisation.
        key: each module's start is drawn from it and the module's name.

    Raises:
        ValueError: the model has adapters already, or is not the one that the selection was made for.
    """
    linears = linears_without_adapters(module, selection.table)
    for path, selected in selection.by_path.items():
        specs = [each.spec for each in selected]
        lora_A, lora_B = init_lora(
            key,
            [spec.name for spec in specs],
            in_features=specs[0].in_features,
            out_features=specs[0].out_features,
            r=selected[0].r,
            method=config.init_lora_weights,
        )
        scaling = [each.scaling for each in selected]
        linears[path].adapter = make_adapter(specs, lora_A, lora_B, scaling, dropout=config.lora_dropout)


def make_adapter(
    specs: list[LinearSpec],
    lora_A: Float[np.ndarray, "layers r in"],
    lora_B: Float[np.ndarray, "layers out r"],
    scaling: Sequence[float],
    *,
    dropout: int | float,
) -> Lora:
    """The adapter of one module of the tree.

    Args:
        specs: the layers to adapt, in the order of the arrays' leading axis.
        lora_A: of each layer.
        lora_B: of each layer.
        scaling: of each layer.
        dropout: probability that an element of the adapter's input is dropped.
    """
    arrays = [np.asarray(a, np.float32) for a in (lora_A, lora_B, scaling)]
    layers = None if specs[0].layer is None else tuple(spec.layer for spec in specs)
    if layers is None:
        arrays = [array[0] for array in arrays]
    return Lora(*map(jnp.asarray, arrays), layers=layers, dropout=dropout, salt=module_salt(specs[0].path))


def linears_without_adapters(module: nnx.Module, table: ModuleTable) -> dict[str, Linear]:
    """The linear modules of a model that is yet to be adapted, by their path.

    Raises:
        ValueError: the model has adapters, or its modules are not those of the table.
    """
    linears = linear_modules(module)
    if adapted := [path for path, linear in linears.items() if linear.adapter is not None]:
        raise ValueError(
            f"the model already has adapters, on {len(adapted)} modules such as {adapted[0]}; "
            "take them off with remove_adapters first"
        )
    for spec in table:
        linear = linears.get(spec.path)
        if linear is None:
            raise ValueError(f"the model has no linear module {spec.path}, which the module table names")
        if (linear.in_features, linear.out_features) != (spec.in_features, spec.out_features):
            raise ValueError(
                f"{spec.path} maps {linear.in_features} to {linear.out_features} features; "
                f"the module table says {spec.in_features} to {spec.out_features}"
            )
    return linears


def remove_adapters(module: nnx.Module) -> None:
    """Take every adapter off, in place; the base is left as it was."""
    for linear in linear_modules(module).values():
        linear.adapter = None


def adapted_modules(module: nnx.Module, table: ModuleTable) -> Iterator[tuple[LinearSpec, Lora, int | None]]:
    """Each adapted module of the table, its adapter, and its index on the adapter's layer axis.

    The index is None where the adapter has no layer axis.
    """
    linears = linear_modules(module)
    for spec in table:
        adapter = linears[spec.path].adapter
        if adapter is None:
            continue
        if adapter.layers is None:
            yield spec, adapter, None
        elif spec.layer in adapter.layers:
            yield spec, adapter, adapter.layers.index(spec.layer)


def trainable_parameters(module: nnx.Module) -> int:
    """Number of elements that receive a gradient."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, Trainable)))
