"""The module table: every linear module of a model, from its config alone.

Selection, adapter initialisation, PEFT export, sharding rules and memory plans read this table.
"""

import re
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from transformers import PreTrainedConfig

from vlmlora.models.registry import Family, family_of
from vlmlora.nn.linear import Linear
from vlmlora.nn.stack import LayerList


@dataclass(frozen=True)
class LinearSpec:
    """One linear module.

    Attributes:
        name: Hugging Face name (transformers 4.52–4.57), e.g. ``model.language_model.layers.3.mlp.up_proj``.
        part: ``vision``, ``language``, ``projector`` or ``head``.
        role: ``attention``, ``mlp`` or ``other``.
        layer: index on the stack's leading axis; None for a module that does not repeat.
        in_features: size of its input.
        out_features: size of its output.
        bias: whether it has one.
        path: path in the Flax tree: the name without the layer's number, except that a stack which shares its
            list of layers with stacks of other kinds has a name of its own in the list's place.
    """

    name: str
    part: str
    role: str
    layer: int | None
    in_features: int
    out_features: int
    bias: bool
    path: str


ModuleTable = tuple[LinearSpec, ...]


def module_table(config: PreTrainedConfig) -> ModuleTable:
    """Every linear module of the model that `config` describes, layer by layer; no weights, no device.

    Raises:
        ValueError: no family supports the config's `model_type`.
    """
    family = family_of(config)
    model = family.model(config, dtype=jnp.float32)
    rows = []
    for path, linear in linear_modules(model).items():
        part = _part(family, path)
        for layer, name in layer_names(model, path):
            rows.append(
                LinearSpec(
                    name=name,
                    part=part,
                    role=_role(family, path) if part in ("vision", "language") else "other",
                    layer=layer,
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    bias=linear.bias is not None,
                    path=path,
                )
            )
    order = {path: i for i, path in enumerate(dict.fromkeys(row.path for row in rows))}
    return tuple(sorted(rows, key=lambda row: (row.part, _layer_number(row), order[row.path])))


def linear_modules(model: nnx.Module) -> dict[str, Linear]:
    """The linear modules of a model by their path in the tree."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }


def stacked_name(model: nnx.Module, path: str) -> str:
    """A path in the tree as a Hugging Face name, with ``{layer}`` where a stacked layer's number stands."""
    found = _layer_list(model, path)
    if found is None:
        return path
    place, layers = found
    parts = path.split(".")
    return ".".join([*parts[:place], layers.name, "{layer}", *parts[place + 1 :]])


def layer_names(model: nnx.Module, path: str) -> list[tuple[int | None, str]]:
    """The Hugging Face names of what lies at a path in the tree, each with its index on the layer axis.

    A module or parameter that does not repeat has one name, and None for its index.
    """
    found = _layer_list(model, path)
    if found is None:
        return [(None, path)]
    template = stacked_name(model, path)
    return [(index, template.format(layer=number)) for index, number in enumerate(found[1].numbers)]


def _layer_list(model: nnx.Module, path: str) -> tuple[int, LayerList] | None:
    """Which part of a path names a stack, and the layers that it holds; None without one."""
    module = model
    for place, part in enumerate(path.split(".")):
        module = getattr(module, part, None)
        if not isinstance(module, nnx.Module):
            return None
        if getattr(module, "stack", None) is not None:
            return place, getattr(module, "layer_list", None) or LayerList(part, tuple(range(module.stack)))
    return None


def _layer_number(row: LinearSpec) -> int:
    return 0 if row.layer is None else int(re.search(r"\.(\d+)\.", row.name)[1])


def _part(family: Family, path: str) -> str:
    for prefix, part in family.parts:
        if path == prefix or path.startswith(prefix + "."):
            return part
    raise ValueError(f"{family.model_type}: no part is declared for module {path}")


def _role(family: Family, path: str) -> str:
    components = path.split(".")
    return next((role for component, role in family.roles if component in components), "other")
