"""The module table: every linear module of a model, from its config alone.

Selection, adapter initialisation, PEFT export, sharding rules and memory plans read this table.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from transformers import PreTrainedConfig

from vlmlora.models.registry import Family, family_of
from vlmlora.nn.linear import Linear


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
        path: path in the Flax tree, which is the name without the layer's number.
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
        name, part = stacked_name(model, path), _part(family, path)
        for layer in [None] if linear.stack is None else range(linear.stack):
            rows.append(
                LinearSpec(
                    name=name.format(layer=layer),
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
    return tuple(sorted(rows, key=lambda row: (row.part, row.layer or 0, order[row.path])))


def linear_modules(model: nnx.Module) -> dict[str, Linear]:
    """The linear modules of a model by their path in the tree."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }


def stacked_name(model: nnx.Module, path: str) -> str:
    """A path in the tree as a Hugging Face name, with ``{layer}`` where a stacked layer's number stands."""
    module, parts = model, path.split(".")
    for i, part in enumerate(parts):
        module = getattr(module, part, None)
        if not isinstance(module, nnx.Module):
            break
        if getattr(module, "stack", None) is not None:
            return ".".join([*parts[: i + 1], "{layer}", *parts[i + 1 :]])
    return path


def _part(family: Family, path: str) -> str:
    for prefix, part in family.parts:
        if path == prefix or path.startswith(prefix + "."):
            return part
    raise ValueError(f"{family.model_type}: no part is declared for module {path}")


def _role(family: Family, path: str) -> str:
    components = path.split(".")
    return next((role for component, role in family.roles if component in components), "other")
