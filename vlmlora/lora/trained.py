"""Parts of the base model that train beside the adapters: biases, whole modules, and rows of tokens.

``bias``, ``modules_to_save``, ``trainable_token_indices`` and ``ensure_weight_tying`` as PEFT 0.21 has them
(``peft/utils/other.py``, ``set_additional_trainable_modules``).
"""

import difflib
import functools
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmlora.lora.config import LoraConfig
from vlmlora.models.load_plan import unstacked_parameters
from vlmlora.models.module_table import layer_names, stacked_name
from vlmlora.nn.linear import Embedding, Linear
from vlmlora.nn.trained import TRAINED, TrainedParameter, TrainedRows
from vlmlora.nn.variables import Frozen
from vlmlora.quantization.sharded import is_dense
from vlmlora.quantization.weights import Weight

logger = logging.getLogger(__name__)

HEAD = "lm_head"
"""Name of the language model's head."""

EMBEDDING = "embed_tokens"
"""Last part of the name of the input embedding."""

Trained = TrainedParameter | TrainedRows


@dataclass(frozen=True)
class TrainedPart:
    """A parameter that trains, and how much of it.

    Attributes:
        path: its path in the Flax tree.
        names: Hugging Face names, one for each layer that trains.
        layers: numbers of these layers; None for a parameter that does not repeat.
        rows: the rows that train; None for all.
        is_tied: an embedding that the tied head follows.
        is_copy: whether PEFT trains a copy; see `vlmlora.nn.trained.TrainedParameter`.
    """

    path: str
    names: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    is_tied: bool = False
    is_copy: bool = True


@dataclass(frozen=True)
class BaseModel:
    """Names of what a model without adapters consists of.

    Attributes:
        parameters: Hugging Face name → (path in the tree, layer or None).
        modules: names of the modules that hold them; those of a stack with the layer's number.
        lists: names of the lists of layers, which are no modules to train.
        quantized: names of weights that are quantised.
        embedding: name of the input embedding; None without one.
        has_tied_head: whether the head is the embedding again.
        rows: how many rows the embedding and the head have, by module.
    """

    parameters: Mapping[str, tuple[str, int | None]]
    modules: tuple[str, ...]
    lists: frozenset[str]
    quantized: frozenset[str]
    embedding: str | None
    has_tied_head: bool
    rows: Mapping[str, int]

    @classmethod
    def of(cls, module: nnx.Module) -> "BaseModel":
        """The names of `module`, whatever adapter is attached to it."""
        module = _without_adapters(module)
        parameters, lists, quantized = {}, set(), set()
        for path, name, layer, value in unstacked_parameters(module):
            parameters[name] = path, layer
            if layer is not None:
                lists.add(stacked_name(module, path).partition(".{layer}")[0])
            if isinstance(value, Weight) and not is_dense(value):
                quantized.add(name)
        modules: dict[str, None] = {}
        for name in parameters:
            parts = name.split(".")[:-1]
            modules.update(dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts))))
        embeddings = {
            ".".join(map(str, path)): found
            for path, found in nnx.iter_modules(module)
            if isinstance(found, Embedding) and path and path[-1] == EMBEDDING
        }
        embedding = next(iter(embeddings), None)
        tied = embedding is not None and getattr(module, HEAD, None) is None
        if tied:
            modules[HEAD] = None
        return cls(
            parameters,
            tuple(modules),
            frozenset(lists),
            frozenset(quantized),
            embedding,
            tied,
            {
                **{name: found.weight.get_value().shape[0] for name, found in embeddings.items()},
                **({} if tied or embedding is None else {HEAD: getattr(module, HEAD).out_features}),
            },
        )


def plan_trained(base: BaseModel, config: LoraConfig, adapted: Collection[str]) -> tuple[TrainedPart, ...]:
    """What trains beside the adapters; nothing is built.

    Args:
        base: the model's names.
        config: the arguments.
        adapted: Hugging Face names of the modules that get an adapter.

    Raises:
        ValueError: an entry matches nothing, is inside of another, is quantised or is adapted as well, or
            token indices are out of range or contradict `modules_to_save`.
        NotImplementedError: rows of a tied head alone.
    """
    saved = saved_modules(base, config.modules_to_save or (), adapted)
    tokens = _token_modules(base, config, saved)
    copied = {name for name in base.parameters if any(name.startswith(f"{module}.") for module in saved)}
    _check_not_quantized(base, copied)
    biases = {
        name
        for name in base.parameters
        if name.endswith(".bias")
        and (config.bias == "all" or (config.bias == "lora_only" and name.removesuffix(".bias") in adapted))
    }
    parts = [*_by_path(base, copied, is_copy=True), *_by_path(base, biases - copied, is_copy=False)]
    parts += [TrainedPart(base.parameters[f"{module}.weight"][0], (f"{module}.weight",), rows=rows)
              for module, rows in tokens.items() if not (module == HEAD and base.has_tied_head)]  # fmt: skip
    if not base.has_tied_head:
        if config.ensure_weight_tying:
            logger.warning("ensure_weight_tying=True: the model's head is not tied to its embedding")
        return tuple(parts)
    embedding = f"{base.embedding}.weight"
    if tokens:
        return tuple(replace(part, is_tied=True) if part.rows is not None else part for part in parts)
    entries = {entry.rpartition(".")[2] for entry in config.modules_to_save or ()}
    if config.ensure_weight_tying and entries & {EMBEDDING, HEAD}:
        others = [part for part in parts if part.names != (embedding,)]
        tied = TrainedPart(base.parameters[embedding][0], (embedding,), is_tied=True)
        return (*others, tied)
    if HEAD in saved:
        parts.append(TrainedPart(f"{HEAD}.weight", (f"{HEAD}.weight",)))
    return tuple(parts)


def saved_modules(base: BaseModel, entries: Sequence[str], adapted: Collection[str] = ()) -> tuple[str, ...]:
    """The modules that `modules_to_save` names, by PEFT's rule: names that end with an entry.

    Raises:
        ValueError: an entry matches nothing or a list of layers, or two modules contain one another or an
            adapted module.
    """
    found: dict[str, str] = {}
    for entry in entries:
        matching = [name for name in base.modules if name.endswith(entry)]
        if not matching:
            raise ValueError(f"modules_to_save: {entry!r} matches no module of the model{_near(base, entry)}")
        found.update(dict.fromkeys(matching, entry))
    for name, entry in found.items():
        if name in base.lists:
            raise ValueError(
                f"modules_to_save: {entry!r} matches {name}, a list of layers, which PEFT cannot train; "
                f"name a layer of it, such as {name}.0"
            )
        if outer := next((other for other in found if name.startswith(f"{other}.")), None):
            raise ValueError(
                f"modules_to_save: {name} ({entry!r}) is inside of {outer} ({found[outer]!r}); leave one out"
            )
        if inside := next((a for a in adapted if a == name or a.startswith(f"{name}.")), None):
            raise ValueError(
                f"modules_to_save: {entry!r} matches {name}, but {inside} is adapted too: only whole names "
                f"keep modules from being adapted; write {name!r}, or exclude the module"
            )
    return tuple(found)


def attach_trained(module: nnx.Module, parts: Sequence[TrainedPart]) -> None:
    """Make parameters train, in place, starting from their values, which may be shapes."""
    for part in parts:
        set_trained(module, part.path, _make(module, part))


def trained_parts(module: nnx.Module) -> dict[str, Trained]:
    """What trains of the base, by the parameter's path in the tree."""
    return {
        ".".join(map(str, path)): found
        for path, found in nnx.iter_modules(module)
        if isinstance(found, TRAINED)
    }


def set_trained(module: nnx.Module, path: str, trained: Trained) -> None:
    """Put a trained parameter in its original's place."""
    if path == f"{HEAD}.weight" and getattr(module, HEAD) is None:
        out_features, in_features = trained.trained.get_value().shape
        head = Linear(in_features, out_features, bias=False, dtype=trained.dtype)
        setattr(module, HEAD, head)
    parent, leaf = _parent(module, path)
    setattr(parent, leaf, trained)


def remove_trained(module: nnx.Module) -> dict[str, Trained]:
    """Put every original back, in place; returns what trained, by path."""
    removed = trained_parts(module)
    for path, trained in removed.items():
        if trained.frozen is None:
            setattr(module, HEAD, None)
        else:
            parent, leaf = _parent(module, path)
            setattr(parent, leaf, trained.frozen)
    return removed


def trained_tensors(
    module: nnx.Module, trained: Mapping[str, Trained]
) -> Iterator[tuple[str, Trained, np.ndarray]]:
    """Each trained parameter, layer by layer, as (Hugging Face name, what it belongs to, float32 array).

    A tied head is listed with its embedding's array. Of a `TrainedRows` the array holds the rows alone.
    """
    for path, each in trained.items():
        array = np.asarray(each.trained.get_value(), np.float32)
        names = dict(layer_names(module, path))
        layers = each.layers if isinstance(each, TrainedParameter) else None
        if layers is None:
            yield path, each, array
            if each.is_tied and isinstance(each, TrainedParameter):
                yield f"{HEAD}.weight", each, array
        else:
            for i, layer in enumerate(layers):
                yield names[layer], each, array[i]


def part_shape(module: nnx.Module, part: TrainedPart) -> tuple[int, ...]:
    """Shape of what trains of one layer, or of the rows that train."""
    value = _original(module, part).get_value()
    shape = value.shape if part.layers is None or is_dense(value) else value.shape[1:]
    return tuple(shape) if part.rows is None else (len(part.rows), shape[1])


def _without_adapters(module: nnx.Module) -> nnx.Module:
    """A copy that shares the arrays and has no adapter and no trained part."""
    module = nnx.merge(*nnx.split(module))
    remove_trained(module)
    for _, linear in nnx.iter_modules(module):
        if isinstance(linear, Linear):
            linear.adapter = None
    return module


def _original(module: nnx.Module, part: TrainedPart) -> Frozen:
    """The frozen parameter that a part starts from: for a tied head the embedding."""
    if part.path == f"{HEAD}.weight" and getattr(module, HEAD) is None:
        embeddings = (m for p, m in nnx.iter_modules(module) if p and p[-1] == EMBEDDING)
        found = next(embeddings).weight
    else:
        parent, leaf = _parent(module, part.path)
        found = getattr(parent, leaf)
    return found.frozen if isinstance(found, TRAINED) else found


def _make(module: nnx.Module, part: TrainedPart) -> Trained:
    frozen = _original(module, part)
    is_new_head = part.path == f"{HEAD}.weight" and getattr(module, HEAD) is None
    make = functools.partial(_start, part, is_new_head)
    if isinstance(jax.tree.leaves(frozen.get_value())[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(make, frozen)
    return make(frozen)


def _start(part: TrainedPart, is_new_head: bool, frozen: Frozen) -> Trained:
    value = frozen.get_value()
    array = value.value if is_dense(value) else value
    if is_new_head:
        return TrainedParameter(None, _float32(array), dtype=array.dtype, is_weight=True)
    if part.rows is not None:
        return TrainedRows(frozen, _float32(array[np.array(part.rows)]), rows=part.rows, is_tied=part.is_tied)
    is_partial = part.layers is not None and len(part.layers) < array.shape[0]
    return TrainedParameter(
        frozen,
        _float32(array[np.array(part.layers)] if is_partial else array),
        dtype=array.dtype,
        is_weight=is_dense(value),
        layers=part.layers,
        is_partial=is_partial,
        is_tied=part.is_tied,
        is_copy=part.is_copy,
    )


def _float32(array: jax.Array) -> jax.Array:
    """A copy: what trains shares no memory with the original."""
    return jnp.array(array, jnp.float32, copy=True)


def _parent(module: nnx.Module, path: str) -> tuple[nnx.Module, str]:
    *parents, leaf = path.split(".")
    for name in parents:
        module = getattr(module, name)
    return module, leaf


def _by_path(base: BaseModel, names: Collection[str], *, is_copy: bool) -> Iterator[TrainedPart]:
    groups: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
    for name, (path, layer) in base.parameters.items():
        if name in names:
            groups[path].append((name, layer))
    for path, found in groups.items():
        layers = None if found[0][1] is None else tuple(layer for _, layer in found)
        yield TrainedPart(path, tuple(name for name, _ in found), layers, is_copy=is_copy)


def _check_not_quantized(base: BaseModel, names: Collection[str]) -> None:
    if quantized := sorted(names & base.quantized):
        raise ValueError(
            f"modules_to_save trains {len(quantized)} weights that are quantised ({quantized[0]}, ...), "
            "which cannot be trained; load the model with load_in_16bit=True, or adapt them as target_modules"
        )


def _token_modules(base: BaseModel, config: LoraConfig, saved: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Module → rows that train."""
    indices = config.trainable_token_indices
    if indices is None:
        return {}
    if base.embedding is None:
        raise ValueError("trainable_token_indices: the model has no input embedding")
    if not isinstance(indices, Mapping):
        indices = {base.embedding: indices}
    modules: dict[str, tuple[int, ...]] = {}
    for entry, rows in indices.items():
        matching = [name for name in base.modules if name.endswith(entry)]
        if not matching:
            raise ValueError(
                f"trainable_token_indices: {entry!r} matches no module of the model{_near(base, entry)}"
            )
        if others := [name for name in matching if name not in (base.embedding, HEAD)]:
            raise ValueError(
                f"trainable_token_indices: {entry!r} matches {others[0]}, but only rows of the input "
                f"embedding ({base.embedding}) and of the head ({HEAD}) are tokens"
            )
        for name in matching:
            if modules.setdefault(name, rows) != rows:
                raise ValueError(f"trainable_token_indices gives {name} two lists of rows")
        for name in matching:
            have = base.rows.get(name, base.rows[base.embedding])
            if outside := [row for row in rows if row >= have]:
                raise ValueError(
                    f"trainable_token_indices: {outside[0]} is no row of {name}, which has {have}"
                )
    _check_tokens(base, config, modules, saved)
    return modules


def _check_tokens(
    base: BaseModel, config: LoraConfig, modules: Mapping[str, tuple[int, ...]], saved: Collection[str]
) -> None:
    both = set(modules) | ({base.embedding, HEAD} if base.has_tied_head else set())
    for name in both:
        if module := next((m for m in saved if name == m or name.startswith(f"{m}.")), None):
            raise ValueError(
                f"trainable_token_indices trains rows of {name}, which modules_to_save trains whole "
                f"({module}); leave one out"
            )
        if f"{name}.weight" in base.quantized:
            raise ValueError(
                f"trainable_token_indices: {name} is quantised, and its rows cannot be trained; "
                "load the model with load_in_16bit=True"
            )
    if not base.has_tied_head or HEAD not in modules:
        return
    if modules.get(base.embedding) == modules[HEAD]:
        return
    if config.ensure_weight_tying and base.embedding in modules:
        raise ValueError(
            f"ensure_weight_tying=True, but trainable_token_indices gives {EMBEDDING} and {HEAD} different "
            f"rows ({list(modules[base.embedding])} and {list(modules[HEAD])}); give them the same"
        )
    raise NotImplementedError(
        f"trainable_token_indices gives {HEAD} rows of its own, but it is tied to {EMBEDDING} and has no "
        "weight of its own; pass a list, which trains the rows of both"
    )


def _near(base: BaseModel, entry: str) -> str:
    known: dict[str, None] = {}
    for name in base.modules:
        parts = name.split(".")
        known.update(dict.fromkeys(".".join(parts[i:]) for i in range(len(parts))))
    near = difflib.get_close_matches(entry, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""
