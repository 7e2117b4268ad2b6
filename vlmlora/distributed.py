"""Many devices: the mesh, and where every array of a model, an optimizer and a batch lies on it.

A mesh has three axes. ``data`` repeats the model; ``fsdp`` cuts every weight, adapter and optimizer state,
and gathers one layer's weights when they are needed (https://arxiv.org/abs/2304.11277); ``tensor`` cuts the
products themselves by heads and by hidden features (https://arxiv.org/abs/1909.08053). The rows of a batch
are cut over ``data`` and ``fsdp``.

The rules, by a module's name in its parent and by shapes:

- A linear layer that `COLUMN_PARALLEL` names has its output features cut over ``tensor``, one that
  `ROW_PARALLEL` names its input features; a family adds names of its own (`Family.tensor_cuts`). `FUSED` ones
  hold several projections one after another: each device computes its share of rows and the results are
  gathered. Layers of one parent are cut together or, if a number of heads or features does not divide,
  computed alike on every device of the group.
- Every weight is stored cut over ``fsdp`` too (`vlmlora.quantization.sharded`).
- An embedding is cut by tokens over ``tensor`` and by features over ``fsdp``.
- Of an adapter, A is cut as its layer's input features are and B as its output features; both over ``fsdp``
  as well, for which they are gathered once a step. The optimizer's state is cut as its adapter.
- Everything else (norms, biases, convolutions, small tables) lies on every device.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from vlmlora.models.module_table import linear_modules
from vlmlora.models.registry import Family
from vlmlora.nn.linear import Embedding, Linear
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.sharded import (
    BATCH,
    DATA,
    FSDP,
    TENSOR,
    Layout,
    ShardedTable,
    batch_shards,
    layout_of,
    matrix_spec,
    shard_weight,
)

__all__ = [
    "BATCH",
    "DATA",
    "FSDP",
    "TENSOR",
    "make_mesh",
    "mesh_of",
    "place_batch",
    "place_trainable",
    "shard_model",
]

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "qkv", "gate_proj", "up_proj", "fc1", "lm_head")
ROW_PARALLEL = ("o_proj", "proj", "out_proj", "down_proj", "fc2")
FUSED = {"qkv": 3}
"""Linear layers that hold several projections, and how many."""


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor``.

    Args:
        data: devices along which the model is repeated.
        fsdp: devices along which weights are cut; -1 takes those that are left.
        tensor: devices along which products are cut; neighbours, which should be the best connected.
        devices: None: all of every process.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
    unknown = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) == 1 and known > 0 and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices; the "
            "sizes must multiply to their number, and one of them may be -1"
        )
    # jax's default is explicit axes; here the compiler places activations between the weights' own products.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def layouts(model: nnx.Module, family: Family, mesh: Mesh) -> dict[str, Layout]:
    """Path of every linear layer of a model → how its weight is cut."""
    linears = linear_modules(model)
    siblings: dict[str, list[str]] = {}
    for path in linears:
        siblings.setdefault(path.rpartition(".")[0], []).append(path)
    found = {}
    for parent, paths in siblings.items():
        cuts = {path: _declared_cut(path, family) for path in paths}
        unit = getattr(_module_at(model, parent), "head_dim", 1)
        tensor = mesh.shape[TENSOR]
        divides = all(
            _cut_features(path, linears[path], cut) % (tensor * unit) == 0 for path, cut in cuts.items()
        )
        for path, cut in cuts.items():
            cut = cut if divides and tensor > 1 else None
            linear = linears[path]
            spec = matrix_spec((linear.out_features, linear.in_features), cut, mesh)
            is_fused = cut == "rows" and path.rpartition(".")[2] in FUSED
            found[path] = Layout(mesh, cut, spec, gather_output=is_fused)
    return found


def shard_model(model: nnx.Module, family: Family, mesh: Mesh) -> None:
    """Put a model that is in memory on a mesh, in place; adapters and everything else included.

    `vlmlora.models.loading.load_model` with a mesh reads each device's part instead, and no whole model.

    Raises:
        ValueError: the model is on a mesh already.
    """
    if getattr(model, "mesh", None) is not None:
        raise ValueError("the model is on a mesh already; load it again to put it on another")
    shardings = parameter_shardings(model, family, mesh)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        where, value = shardings[".".join(map(str, path))], variable.get_value()
        if isinstance(where, Layout):
            variable.set_value(shard_weight(value, where))
        elif not isinstance(variable, Trainable):
            variable.set_value(jax.device_put(value, where))
    attach_mesh(model, mesh)
    place_trainable(model, mesh)


def parameter_shardings(model: nnx.Module, family: Family, mesh: Mesh) -> dict[str, Layout | NamedSharding]:
    """Path of every parameter → how it lies on the mesh: a `Layout` for a linear layer's weight.

    Args:
        model: with arrays, or of shapes only.
        family: its family.
        mesh: the devices.
    """
    everywhere = NamedSharding(mesh, P())
    paths = (".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model)))
    found: dict[str, Layout | NamedSharding] = dict.fromkeys(paths, everywhere)
    found |= {f"{path}.weight": layout for path, layout in layouts(model, family, mesh).items()}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Embedding):
            spec = ShardedTable.of(module.weight.get_value(), mesh).layout.spec
            found[".".join(map(str, (*path, "weight")))] = NamedSharding(mesh, spec)
    return found


def attach_mesh(model: nnx.Module, mesh: Mesh) -> None:
    """Tell the model, its embeddings and its losses where they are."""
    model.mesh = mesh
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Embedding):
            module.mesh = mesh


def place_trainable(model: nnx.Module, mesh: Mesh) -> None:
    """Put what learns where its layer's features are, and cut it over ``fsdp``; in place."""
    for variable, where in _trainable(model, mesh, over_fsdp=True):
        variable.set_value(jax.device_put(variable.get_value(), where))
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(replicate_unplaced(variable.get_value(), mesh))


def replicate_unplaced(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same tree with every array that lies on no mesh copied to each device of this one."""
    replicated = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, replicated),
        tree,
    )


def gather_trainable(model: nnx.Module, mesh: Mesh) -> None:
    """Under `jax.jit`: gather over ``fsdp`` what learns, once for all layers; in place."""
    for variable, where in _trainable(model, mesh, over_fsdp=False):
        variable.set_value(jax.lax.with_sharding_constraint(variable.get_value(), where))


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh on which the arrays of a tree lie; None for arrays on a single device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and set(sharding.mesh.axis_names) >= {*BATCH, TENSOR}:
            return sharding.mesh
    return None


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every array of a batch: its rows over ``data`` and ``fsdp``.

    Of several processes each has a share of the rows in its host arrays.

    Raises:
        ValueError: the rows of an array do not divide.
    """
    shards, found = batch_shards(mesh), {}
    for name, array in batch.items():
        axis = rows_axis(name, array)
        shares = 1 if isinstance(array, jax.Array) else jax.process_count()
        rows = array.shape[axis] * shares
        if rows % shards:
            is_image = "input_ids" in batch and rows != batch["input_ids"].shape[0] * shares
            argument = "Budget(max_images=…)" if is_image else "batch_size"
            raise ValueError(
                f"{name} {list(array.shape)} has {rows} rows on axis {axis}, which do not divide among "
                f"data={mesh.shape[DATA]} × fsdp={mesh.shape[FSDP]} = {shards} devices; make {argument} a "
                f"multiple of {shards}"
            )
        found[name] = NamedSharding(mesh, P(*[None] * axis, BATCH))
    return found


def rows_axis(name: str, array: Any) -> int:
    """The axis of a batch's array that counts rows: the first, but for positions [axes, rows, tokens]."""
    return array.ndim - 2 if name == "position_ids" else 0


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Put a batch of host arrays on the devices, each its rows; arrays on the mesh stay where they are.

    Of several processes each passes its share, as `vlmlora.data.loader.make_batches` makes it.

    Raises:
        ValueError: as `batch_shardings`.
    """
    where = batch_shardings(batch, mesh)
    return {
        name: array
        if isinstance(array, jax.Array)
        else jax.make_array_from_process_local_data(where[name], np.asarray(array))
        for name, array in batch.items()
    }


def constrain_batch(batch: Mapping[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Under `jax.jit`: the same batch with its rows cut, wherever they came from.

    Raises:
        ValueError: as `batch_shardings`.
    """
    return jax.lax.with_sharding_constraint(dict(batch), batch_shardings(batch, mesh))


def _declared_cut(path: str, family: Family) -> str | None:
    for suffix, cut in family.tensor_cuts:
        if path == suffix or path.endswith("." + suffix):
            return cut
    name = path.rpartition(".")[2]
    return "rows" if name in COLUMN_PARALLEL else "columns" if name in ROW_PARALLEL else None


def _cut_features(path: str, linear: Linear, cut: str | None) -> int:
    """The features that a cut divides, those of one projection where several are fused."""
    if cut is None:
        return 0
    if cut == "columns":
        return linear.in_features
    return linear.out_features // FUSED.get(path.rpartition(".")[2], 1)


def _module_at(model: nnx.Module, path: str) -> Any:
    for part in path.split(".") if path else ():
        model = getattr(model, part)
    return model


def _trainable(model: nnx.Module, mesh: Mesh, *, over_fsdp: bool):
    """Every variable of an adapter and its sharding; those of a base that learns are its weights' own."""
    for linear in linear_modules(model).values():
        if linear.adapter is None:
            continue
        weight = linear.weight.get_value()
        layout = layout_of(weight)
        for path, variable in nnx.to_flat_state(nnx.state(linear.adapter, Trainable)):
            spec = _adapter_spec(str(path[-1]), variable.get_value().shape, layout, mesh, over_fsdp=over_fsdp)
            yield variable, NamedSharding(mesh, spec)


def _adapter_spec(
    name: str, shape: tuple[int, ...], layout: Layout | None, mesh: Mesh, *, over_fsdp: bool
) -> P:
    """The sharding of one array of an adapter: [..., r, in] named A, [..., out, r] named B."""
    axis = {"lora_A": len(shape) - 1, "lora_B": len(shape) - 2}.get(name)
    if axis is None:
        return P()
    cut = None if layout is None or layout.gather_output else layout.cut
    tensor = (cut == "columns" and name == "lora_A") or (cut == "rows" and name == "lora_B")
    axes = [TENSOR] if tensor else []
    if over_fsdp and shape[axis] % (mesh.shape[FSDP] * (mesh.shape[TENSOR] if tensor else 1)) == 0:
        axes.append(FSDP)
    return P(*[None] * axis, tuple(axes) or None)
