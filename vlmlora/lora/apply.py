"""Put adapters on a model's linear modules, take them off, and find them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from vlmlora.lora.config import LoraConfig
from vlmlora.lora.decompose import changes_base, check_base, split_weight, stored_as
from vlmlora.lora.init import init_bias, init_lora, module_salt
from vlmlora.lora.layer import Lora, MixedRankLora, groups_of, row_norms
from vlmlora.lora.selection import SelectedModule, Selection
from vlmlora.lora.trained import remove_trained, trained_parts
from vlmlora.models.module_table import LinearSpec, ModuleTable, linear_modules
from vlmlora.nn.linear import Linear
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.stacks import set_layer
from vlmlora.quantization.weights import Weight


def add_adapters(module: nnx.Module, selection: Selection, config: LoraConfig, key: PRNGKeyArray) -> None:
    """Set the adapter of every selected module, in place.

    A start that takes the adapter out of the base weight (see `vlmlora.lora.decompose`) changes the base as
    well, layer by layer, and gives its old arrays away.

    Args:
        module: the model.
        selection: from `vlmlora.lora.selection.select`.
        config: dropout, DoRA, bias and initialisation.
        key: each module's start is drawn from it and the module's name.

    Raises:
        ValueError: the model has adapters already, is not the one that the selection was made for, or is
            quantised where the start needs the true weights.
    """
    linears = linears_without_adapters(module, selection.table)
    for each in selection.modules:
        check_base(linears[each.spec.path].weight.get_value(), each.spec, config)
    arrays = {
        each.spec.name: _start(linears[each.spec.path], each, config, key) for each in selection.modules
    }
    set_adapters(module, selection, arrays, dropout=config.lora_dropout)


def set_adapters(
    module: nnx.Module, selection: Selection, arrays: Mapping[str, "LoraArrays"], *, dropout: int | float
) -> None:
    """Set the adapter of every selected module from its arrays, in place.

    Args:
        module: the model, without adapters.
        selection: which modules.
        arrays: of each module, by its name.
        dropout: probability that an element of an adapter's input is dropped.
    """
    linears = linear_modules(module)
    for path, selected in selection.by_path.items():
        specs = [each.spec for each in selected]
        linears[path].adapter = make_adapter(specs, [arrays[spec.name] for spec in specs], dropout=dropout)


def layer_weight(linear: Linear, spec: LinearSpec) -> Weight:
    """The weight of one layer, taken from its stack where it has one."""
    weight = linear.weight.get_value()
    return weight if spec.layer is None else weight.layer(spec.layer)


def _start(linear: Linear, selected: SelectedModule, config: LoraConfig, key: PRNGKeyArray) -> "LoraArrays":
    """The adapter of one layer at the start; the layer's weight changes where the start takes from it."""
    spec, r, scaling = selected.spec, selected.r, selected.scaling
    initial_A = initial_B = None
    if changes_base(config.init_lora_weights):
        own_key = jax.random.fold_in(key, module_salt(spec.name))
        lora_A, lora_B = take_from_base(linear, spec, config, r=r, scaling=scaling, key=own_key)
        if config.init_lora_weights != "loftq":
            initial_A, initial_B = lora_A, lora_B
    else:
        lora_A, lora_B = init_lora(
            key,
            spec.name,
            in_features=spec.in_features,
            out_features=spec.out_features,
            r=r,
            method=config.init_lora_weights,
        )
    start = linear_start(linear, selected, config, lora_A, lora_B)
    lora_bias = _lora_bias(selected, config, key) if config.lora_bias else None
    return replace(start, lora_bias=lora_bias, initial_A=initial_A, initial_B=initial_B)


def linear_start(
    linear: Linear, selected: SelectedModule, config: LoraConfig, lora_A: np.ndarray, lora_B: np.ndarray
) -> "LoraArrays":
    """The arrays of one layer that starts from A and B; DoRA's magnitude is that of the weight with them."""
    magnitude = None
    if config.use_dora:
        weight = layer_weight(linear, selected.spec)
        magnitude = np.asarray(row_norms(_with_delta(weight, lora_A, lora_B, selected.scaling)))
    return LoraArrays(lora_A, lora_B, selected.scaling, magnitude=magnitude)


def take_from_base(
    linear: Linear,
    spec: LinearSpec,
    config: LoraConfig,
    *,
    r: int,
    scaling: float,
    key: PRNGKeyArray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Take A and B out of the weight of one layer, which keeps the rest; see `split_weight`."""
    weight = layer_weight(linear, spec)
    lora_A, lora_B, rest = split_weight(weight, config, r=r, scaling=scaling, key=key)
    _set_layer_weight(linear, spec.layer, rest)
    return lora_A, lora_B


def _set_layer_weight(linear: Linear, layer: int | None, weight: Weight) -> None:
    """Replace the weight of one layer. Its stack's arrays are given away, so no second stack ever exists."""
    if layer is not None:
        weight = set_layer(linear.weight.get_value(), layer, weight)
    linear.weight.set_value(weight)


def _lora_bias(selected: SelectedModule, config: LoraConfig, key: PRNGKeyArray) -> np.ndarray:
    if config.init_lora_weights is False:
        return init_bias(key, selected.spec.name, out_features=selected.spec.out_features, r=selected.r)
    return np.zeros(selected.spec.out_features, np.float32)


@dataclass(frozen=True, eq=False)
class LoraArrays:
    """What the adapter of one layer holds; arrays on the host.

    Attributes:
        lora_A: [r, in].
        lora_B: [out, r].
        scaling: factor on the adapter's output.
        lora_bias: [out]; None without.
        magnitude: DoRA's row lengths, [out]; None without.
        initial_A: [r, in], where the start was taken out of the base weight; None elsewhere.
        initial_B: [out, r], likewise.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    scaling: float
    lora_bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None
    initial_A: np.ndarray | None = None
    initial_B: np.ndarray | None = None


def make_adapter(
    specs: Sequence[LinearSpec], arrays: Sequence[LoraArrays], *, dropout: int | float
) -> Lora | MixedRankLora:
    """The adapter of one module of the tree: one group of layers for each rank.

    Args:
        specs: the layers to adapt, in ascending order.
        arrays: of each layer.
        dropout: probability that an element of the adapter's input is dropped.
    """
    by_rank: dict[int, list[tuple[LinearSpec, LoraArrays]]] = {}
    for spec, each in zip(specs, arrays, strict=True):
        by_rank.setdefault(each.lora_A.shape[0], []).append((spec, each))
    salt = module_salt(specs[0].path)
    groups = [_group(by_rank[r], dropout=dropout, salt=salt) for r in sorted(by_rank)]
    return groups[0] if len(groups) == 1 else MixedRankLora(groups)


def _group(layers: Sequence[tuple[LinearSpec, LoraArrays]], *, dropout: int | float, salt: int) -> Lora:
    """Layers of one rank on a leading axis, or one layer that does not repeat as it is."""
    numbers = None if layers[0][0].layer is None else tuple(spec.layer for spec, _ in layers)

    def stacked(name: str) -> jax.Array | None:
        values = [getattr(arrays, name) for _, arrays in layers]
        if values[0] is None:
            return None
        return jnp.asarray(values[0] if numbers is None else np.stack(values), jnp.float32)

    arrays = {f.name: stacked(f.name) for f in fields(LoraArrays)}
    return Lora(**arrays, layers=numbers, dropout=dropout, salt=salt)


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
    if trained := list(trained_parts(module)):
        raise ValueError(
            f"the model already trains {len(trained)} of its own parameters, such as {trained[0]}; "
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
    """Take every adapter off, in place; the base is left as it was, and what trained of it is put back.

    What PiSSA or OLoRA took out of a weight is added to it again, which rounds in the weight's type and
    quantises a quantised one anew. LoftQ's base keeps the values that it was quantised to.
    """
    remove_trained(module)
    for linear in linear_modules(module).values():
        for adapter in groups_of(linear.adapter):
            _put_back(linear, adapter)
        linear.adapter = None


def _put_back(linear: Linear, adapter: Lora) -> None:
    """Add what the adapter took out of the weight at its start."""
    if adapter.initial_A is None:
        return
    for index, layer in enumerate(adapter.layers or [None]):
        values = (v.get_value() for v in (adapter.initial_A, adapter.initial_B, adapter.scaling))
        lora_A, lora_B, scaling = (value if layer is None else value[index] for value in values)
        weight = linear.weight.get_value() if layer is None else linear.weight.get_value().layer(layer)
        whole = _with_delta(weight, lora_A, lora_B, scaling)
        _set_layer_weight(linear, layer, stored_as(weight, whole))


@jax.jit
def _with_delta(weight: Weight, lora_A: jax.Array, lora_B: jax.Array, scaling: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return weight.dequantize(jnp.float32) + scaling * lora_B @ lora_A


def adapted_modules(module: nnx.Module, table: ModuleTable) -> Iterator[tuple[LinearSpec, Lora, int | None]]:
    """Each adapted module of the table, its adapter, and its index on the adapter's layer axis.

    The index is None where the adapter has no layer axis. Layers of one stacked module that have different
    ranks have different adapters.
    """
    linears = linear_modules(module)
    for spec in table:
        for adapter in groups_of(linears[spec.path].adapter):
            if adapter.layers is None:
                yield spec, adapter, None
            elif spec.layer in adapter.layers:
                yield spec, adapter, adapter.layers.index(spec.layer)


def trainable_parameters(module: nnx.Module) -> int:
    """Number of elements that receive a gradient."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, Trainable)))
