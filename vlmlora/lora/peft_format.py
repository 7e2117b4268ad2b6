"""PEFT's adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

Names are written as transformers 4.52–4.57 has them. Other versions wrap the same modules differently: the
decoder of Qwen2.5-VL was ``model.layers`` before ``model.language_model.layers``. A name without its wrappers
is the same in every version, which is how files of all of them are read, and how the exported
`target_modules` selects the trained modules in all of them.
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vlmlora.lora.apply import (
    LoraArrays,
    adapted_modules,
    linears_without_adapters,
    make_adapter,
    take_from_base,
)
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.decompose import (
    changes_base,
    check_base,
    config_for_untouched_base,
    converted_for_untouched_base,
    init_lora_weights_to_repeat,
)
from vlmlora.lora.selection import in_layers, matches_name, saves_module
from vlmlora.lora.trained import (
    EMBEDDING,
    HEAD,
    BaseModel,
    TrainedPart,
    attach_trained,
    part_shape,
    plan_trained,
    trained_parts,
    trained_tensors,
)
from vlmlora.models.module_table import LinearSpec, ModuleTable
from vlmlora.models.registry import wrapper_modules
from vlmlora.nn.linear import Linear
from vlmlora.nn.trained import TrainedRows

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"
"""The version whose files these are."""

_SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
"""Name of an array here → how its key ends."""

_REPEATABLE_INITS = (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora", "loftq")
_MATRICES = ("lora_A", "lora_B")
_CHANGES_NOTHING = frozenset(
    (
        *("auto_mapping", "peft_type", "inference_mode", "peft_version", "runtime_config"),
        *("megatron_config", "megatron_core", "qalora_group_size", "eva_config"),
        *("corda_config", "lora_ga_config"),
    )
)
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class AdapterArrays:
    """One module's arrays as the file has them, in float32.

    Attributes:
        name: the module's name in the file, without ``base_model.model.``.
        lora_A: [r, in].
        lora_B: [out, r].
        lora_bias: [out]; None without.
        magnitude: DoRA's row lengths, [out]; None without.
    """

    name: str
    lora_A: np.ndarray
    lora_B: np.ndarray
    lora_bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class TrainedArray:
    """One parameter of the base model that was trained, as the file has it, in float32.

    Attributes:
        key: its key in the file.
        array: the whole parameter, or the rows of the trained tokens.
    """

    key: str
    array: np.ndarray


def save_adapter(
    directory: str | PathLike[str], module: nnx.Module, table: ModuleTable, config: LoraConfig
) -> None:
    """Write a model's adapters for PEFT to load.

    Adapters that started as a part of the base weight (PiSSA, OLoRA) are written with twice the rank, so that
    they are right on the untouched base; after several LoftQ iterations the config tells who loads the
    adapter to repeat them (see `vlmlora.lora.decompose`).

    The directory's other files stay. On failure nothing in it has changed, and a new one is not left behind.

    Args:
        directory: made if it does not exist.
        module: the model.
        table: its module table.
        config: the arguments that the adapters were made with.

    Raises:
        ValueError: the model has no adapters, or their rank or scaling is not what `config` says.
        NotADirectoryError: a file stands at `directory`.
        OSError: writing failed.
    """
    tensors = _adapter_tensors(module, table, config)
    names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    tensors |= _trained_tensors(module, names)
    base = BaseModel.of(module)
    if any(adapter.initial_A is not None for _, adapter, _ in adapted_modules(module, table)):
        config = config_for_untouched_base(config)
    config = replace(config, ensure_weight_tying=config.ensure_weight_tying and base.has_tied_head)
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; an adapter is a directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = directory.parent / f".{directory.name}-{uuid4().hex}"
    staged.mkdir()
    try:
        # PEFT and transformers look for this entry to tell whose tensors these are.
        save_file(tensors, staged / WEIGHTS_FILE, metadata={"format": "pt"})
        fields = peft_config_fields(
            config,
            target_modules=target_regex(table, names),
            modules_to_save=_exported_modules_to_save(base, config),
        )
        (staged / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        if not (directory / CARD_FILE).exists():
            (staged / CARD_FILE).write_text(_model_card(config))
        _move_into_place(staged, directory)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def read_adapter(
    directory: str | PathLike[str],
) -> tuple[LoraConfig, dict[str, AdapterArrays], dict[str, TrainedArray]]:
    """Read an adapter directory, whichever version of PEFT or transformers wrote it.

    Returns:
        The config, the arrays of each adapted module, and the trained parameters of the base model, both by
        their names without wrappers (see `name_without_wrappers`).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be; keys that belong to nothing are listed.
        NotImplementedError: the adapter uses something that is not supported.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    matrices: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    trained: dict[str, TrainedArray] = {}
    unmatched = []
    for key, value in _read_tensors(directory).items():
        array = next((array for array, suffix in _SUFFIXES.items() if key.endswith(f".{suffix}")), None)
        ndim = None if array is None else 2 if array in _MATRICES else 1
        if not key.startswith(PREFIX) or ndim not in (None, value.ndim):
            unmatched.append(key)
        elif array is None:
            # PEFT saves the untouched original of a trained module's bias as well.
            if ".original_module." not in key:
                name = name_without_wrappers(_parameter_name(key.removeprefix(PREFIX)))
                trained[name] = TrainedArray(key, value.astype(np.float32))
        else:
            name = key.removeprefix(PREFIX).removesuffix(f".{_SUFFIXES[array]}")
            matrices[name][array] = value.astype(np.float32)
    if unmatched:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} has {_listed(unmatched, 'key')} that no LoRA matrix has"
        )
    needed = {*_MATRICES, *(["lora_bias"] if config.lora_bias else [])}
    needed |= {"magnitude"} if config.use_dora else set()
    if half := [
        f"{PREFIX}{name}.{_SUFFIXES[missing]}"
        for name, pair in matrices.items()
        for missing in needed - pair.keys()
    ]:
        raise ValueError(f"{directory / WEIGHTS_FILE} lacks {_listed(half, 'key')}")
    if extra := [
        f"{PREFIX}{name}.{_SUFFIXES[array]}"
        for name, pair in matrices.items()
        for array in pair.keys() - needed
    ]:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} has {_listed(extra, 'key')} that its config (use_dora="
            f"{config.use_dora}, lora_bias={config.lora_bias}) does not ask for"
        )
    if not matrices:
        raise ValueError(f"{directory / WEIGHTS_FILE} holds no tensors of LoRA")
    adapters: dict[str, AdapterArrays] = {}
    for name, pair in matrices.items():
        short = name_without_wrappers(name)
        if short in adapters:
            raise ValueError(
                f"{directory / WEIGHTS_FILE} has {adapters[short].name} and {name}, which are one module"
            )
        adapters[short] = AdapterArrays(name, **pair)
    return config, adapters, trained


def read_adapter_config(directory: str | PathLike[str]) -> LoraConfig:
    """The config of an adapter directory alone.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what it should be.
        NotImplementedError: the adapter uses something that is not supported.
    """
    return _read_config(Path(directory) / CONFIG_FILE)


def base_of_adapter(adapter: Path) -> tuple[str, str | None]:
    """The directory or repository of the model that an adapter belongs to, and its revision.

    Raises:
        ValueError: the adapter does not name it.
    """
    fields = json.loads((adapter / CONFIG_FILE).read_text())
    base = fields.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{adapter / CONFIG_FILE} has no base_model_name_or_path; "
            "write the base model's directory or repository there"
        )
    return base, fields.get("revision")


def load_adapter_into(module: nnx.Module, table: ModuleTable, directory: str | PathLike[str]) -> LoraConfig:
    """Set a model's adapters from a PEFT directory, in place.

    Args:
        module: the model, without adapters.
        table: its module table.
        directory: what PEFT, or `save_adapter`, wrote.

    Returns:
        The adapter's config. Names in its patterns are those of the table.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a key matches no module, a module that the config targets has no tensors, or a shape does
            not fit the model or the config; the keys are listed. The model is then unchanged.
        NotImplementedError: the adapter uses something that is not supported.
    """
    config, adapters, arrays_of_base = read_adapter(directory)
    file = Path(directory) / WEIGHTS_FILE
    specs = _specs_by_short_name(table)
    if unmatched := [each.name for short, each in adapters.items() if short not in specs]:
        raise ValueError(f"{file} adapts {_listed(unmatched, 'module')} that the base model does not have")
    if missing := _missing_modules(table, config, adapters):
        raise ValueError(f"{file} lacks tensors of {_listed(missing, 'module')} that {CONFIG_FILE} targets")
    wrong = []
    for short, each in adapters.items():
        spec, r = specs[short], config.rank_of(each.name)
        expected = {"lora_A": (r, spec.in_features), "lora_B": (spec.out_features, r)}
        expected |= dict.fromkeys(("lora_bias", "magnitude"), (spec.out_features,))
        found = {array: getattr(each, array) for array in expected if getattr(each, array) is not None}
        wrong += [
            f"{PREFIX}{each.name}.{_SUFFIXES[array]} is {list(have.shape)}, not {list(expected[array])}"
            for array, have in found.items()
            if have.shape != expected[array]
        ]
    if wrong:
        raise ValueError(f"{file} does not fit the base model or its own config: {_listed(wrong, 'tensor')}")

    linears = linears_without_adapters(module, table)
    base = BaseModel.of(module)
    config = _with_names_of(base, config)
    parts = plan_trained(base, config, {specs[short].name for short in adapters})
    trained = _match_trained(module, parts, arrays_of_base, file)
    groups: dict[str, list[LinearSpec]] = defaultdict(list)
    for short, spec in specs.items():
        if short in adapters:
            groups[spec.path].append(spec)
    for path, group in groups.items():
        for spec in group:
            check_base(linears[path].weight.get_value(), spec, config)
    for path, group in groups.items():
        group.sort(key=lambda spec: spec.layer or 0)
        arrays = [_lora_arrays(_arrays(adapters, spec), linears[path], spec, config) for spec in group]
        linears[path].adapter = make_adapter(group, arrays, dropout=config.lora_dropout)
    attach_trained(module, parts)
    for path, part in trained_parts(module).items():
        part.trained.set_value(jnp.asarray(trained[path]))
    names = {specs[short].name: each.name for short, each in adapters.items()}
    return replace(
        config,
        rank_pattern={
            name: config.rank_of(of_file)
            for name, of_file in names.items()
            if config.rank_of(of_file) != config.r
        },
        alpha_pattern={
            name: config.alpha_of(of_file)
            for name, of_file in names.items()
            if config.alpha_of(of_file) != config.lora_alpha
        },
    )


def peft_config_fields(
    config: LoraConfig, *, target_modules: str, modules_to_save: Sequence[str] | None = None
) -> dict[str, Any]:
    """The contents of ``adapter_config.json``: the fields that every version of PEFT knows.

    Args:
        config: the adapter's arguments.
        target_modules: regular expression of the trained modules; what narrowed them down is part of it.
        modules_to_save: names of the modules that train in full.
    """
    # Starts that have done their part are not named, so that older versions need not know them.
    init = config.init_lora_weights if config.init_lora_weights in (True, False, "gaussian") else True
    repeats = init_lora_weights_to_repeat(config)
    # Fields that older versions do not know appear only where they matter.
    newer = {"lora_bias": True} if config.lora_bias else {}
    for name in ("trainable_token_indices", "ensure_weight_tying"):
        newer |= {name: getattr(config, name)} if getattr(config, name) else {}
    newer |= {"loftq_config": config.loftq_config} if repeats else {}
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "target_modules": target_modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": list(modules_to_save) if modules_to_save else None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": repeats or init,
        "fan_in_fan_out": False,
        "peft_version": PEFT_VERSION,
        **newer,
    }


def name_without_wrappers(name: str) -> str:
    """A module's name without what wraps a tower, the same in every version of transformers.

    ``model.language_model.layers.3.mlp.up_proj`` becomes ``layers.3.mlp.up_proj``.
    """
    wrappers = wrapper_modules()
    return ".".join(part for part in name.split(".") if part not in wrappers)


def target_regex(table: ModuleTable, names: Iterable[str]) -> str:
    """A regular expression that, matched in full, selects the modules `names` of a model and no others.

    Wrappers may stand, or not, wherever a version of transformers has them.

    Args:
        table: every linear module of the model.
        names: those to select.
    """
    names = set(names)
    _specs_by_short_name(table)
    layers_of: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    alternatives: list[str] = []
    for spec in table:
        numbered = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", spec.name)
        if numbered and spec.layer is not None:
            layers_of[numbered[1], numbered[3]][numbered[2]] = spec.name in names
        elif spec.name in names:
            alternatives.append(_name_regex(spec.name))
    leaves: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (tower, leaf), selected in layers_of.items():
        chosen = [number for number, is_selected in selected.items() if is_selected]
        if chosen:
            numbers = r"\d+" if len(chosen) == len(selected) else _any_of(chosen)
            leaves[tower, numbers].append(re.escape(leaf))
    alternatives += [
        rf"{_name_regex(tower)}\.{numbers}\.{_any_of(endings)}"
        for (tower, numbers), endings in leaves.items()
    ]
    return "|".join(alternatives)


def _name_regex(name: str) -> str:
    """Match a name with wrappers at its start, and wherever else it has some, optional."""
    names = wrapper_modules()
    wrappers = rf"(?:{_any_of(names)}\.)*"
    pattern, skipped = [], True
    for part in name.split("."):
        if part in names:
            skipped = True
        else:
            pattern.append((wrappers if skipped else "") + re.escape(part))
            skipped = False
    return r"\.".join(pattern)


def _any_of(alternatives: Iterable[str]) -> str:
    alternatives = list(alternatives)
    return alternatives[0] if len(alternatives) == 1 else f"(?:{'|'.join(alternatives)})"


def _specs_by_short_name(table: ModuleTable) -> dict[str, LinearSpec]:
    specs: dict[str, LinearSpec] = {}
    for spec in table:
        other = specs.setdefault(name_without_wrappers(spec.name), spec)
        if other is not spec:
            raise ValueError(f"{other.name} and {spec.name} differ only in the modules that wrap them")
    return specs


def _arrays(adapters: Mapping[str, AdapterArrays], spec: LinearSpec) -> AdapterArrays:
    return adapters[name_without_wrappers(spec.name)]


def _lora_arrays(each: AdapterArrays, linear: Linear, spec: LinearSpec, config: LoraConfig) -> LoraArrays:
    """One layer's arrays; where the start took them out of the base weight, it is repeated on the base."""
    scaling, initial = config.scaling_of(each.name), (None, None)
    if changes_base(config.init_lora_weights):
        initial = take_from_base(linear, spec, config, r=each.lora_A.shape[0], scaling=scaling)
    if config.init_lora_weights == "loftq":
        initial = (None, None)
    return LoraArrays(each.lora_A, each.lora_B, scaling, each.lora_bias, each.magnitude, *initial)


def _adapter_tensors(module: nnx.Module, table: ModuleTable, config: LoraConfig) -> dict[str, np.ndarray]:
    tensors = {}
    host: dict[int, dict[str, np.ndarray]] = {}
    for spec, adapter, index in adapted_modules(module, table):
        if id(adapter) not in host:
            host[id(adapter)] = {
                name: np.asarray(variable.get_value(), np.float32)
                for name in (*_SUFFIXES, "scaling", "initial_A", "initial_B")
                if (variable := getattr(adapter, name)) is not None
            }
        arrays = {name: a if index is None else a[index] for name, a in host[id(adapter)].items()}
        r, scaling = arrays["lora_A"].shape[0], arrays["scaling"]
        expected = config.rank_of(spec.name), np.float32(config.scaling_of(spec.name))
        if not (r == expected[0] and np.isclose(scaling, expected[1], rtol=1e-6)):
            raise ValueError(
                f"the adapter of {spec.name} has rank {r} and scaling {scaling}, "
                f"its config rank {expected[0]} and scaling {expected[1]}"
            )
        if "initial_A" in arrays:
            four = (arrays[name] for name in (*_MATRICES, "initial_A", "initial_B"))
            arrays |= dict(zip(_MATRICES, converted_for_untouched_base(*four), strict=True))
        for name, suffix in _SUFFIXES.items():
            if name in arrays:
                tensors[f"{PREFIX}{spec.name}.{suffix}"] = np.ascontiguousarray(arrays[name])
    if not tensors:
        raise ValueError("the model has no adapters to save; make some with get_peft_model")
    return tensors


def _trained_tensors(module: nnx.Module, adapted: Collection[str]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, trained, array in trained_tensors(module, trained_parts(module)):
        of = name.rpartition(".")[0]
        if isinstance(trained, TrainedRows):
            key = of + _TOKENS
        elif of in adapted:
            key = f"{of}.base_layer.bias"
        else:
            key = name
        tensors[PREFIX + key] = np.array(array, order="C")
    return tensors


def _parameter_name(name: str) -> str:
    """The parameter of the base model that an entry of the file holds."""
    if name.endswith(_TOKENS):
        return name
    # Of a linear layer saved as a whole `bias="all"` has PEFT write the bias again, without an adapter name.
    return re.sub(r"\.modules_to_save(\.[^.]+(?=\.)|(?=\.bias$))|\.base_layer(?=\.bias$)", "", name)


def _match_trained(
    module: nnx.Module, parts: Sequence[TrainedPart], found: Mapping[str, TrainedArray], file: Path
) -> dict[str, np.ndarray]:
    """The array of each part by its path, from the file's; keys that are missing or left over are listed."""
    expected = {
        name_without_wrappers(_name_in_file(part, name)): name for part in parts for name in part.names
    }
    if any(part.is_tied and part.rows is None for part in parts):
        expected[f"{HEAD}.weight"] = f"{HEAD}.weight"
    if extra := [each.key for short, each in found.items() if short not in expected]:
        raise ValueError(
            f"{file} has {_listed(extra, 'key')} that the base model lacks or {CONFIG_FILE} does not name"
        )
    if missing := [PREFIX + name for short, name in expected.items() if short not in found]:
        raise ValueError(f"{file} lacks {_listed(missing, 'key')} that {CONFIG_FILE} says are trained")
    arrays, wrong = {}, []
    for part in parts:
        each = [found[name_without_wrappers(_name_in_file(part, name))] for name in part.names]
        want = part_shape(module, part)
        wrong += [
            f"{one.key} is {list(one.array.shape)}, not {list(want)}"
            for one in each
            if one.array.shape != want
        ]
        if not wrong:
            stacked = [one.array for one in each]
            arrays[part.path] = stacked[0] if part.layers is None else np.stack(stacked)
    if wrong:
        raise ValueError(f"{file} does not fit the base model: {_listed(wrong, 'tensor')}")
    return arrays


def _name_in_file(part: TrainedPart, name: str) -> str:
    return name if part.rows is None else name.removesuffix(".weight") + _TOKENS


def _with_names_of(base: BaseModel, config: LoraConfig) -> LoraConfig:
    """The config with entries of `modules_to_save` and token modules in the names of this library.

    Full names of other versions of transformers match once what wraps a tower is left out.
    """

    def renamed(entry: str) -> list[str]:
        if any(name.endswith(entry) for name in base.modules):
            return [entry]
        short = name_without_wrappers(entry)
        return [name for name in base.modules if name_without_wrappers(name) == short] or [entry]

    changes: dict[str, Any] = {}
    if config.modules_to_save:
        names = [name for entry in config.modules_to_save for name in renamed(entry)]
        changes["modules_to_save"] = tuple(dict.fromkeys(names))
    if isinstance(config.trainable_token_indices, Mapping):
        changes["trainable_token_indices"] = {
            name: rows for entry, rows in config.trainable_token_indices.items() for name in renamed(entry)
        }
    return replace(config, **changes)


def _exported_modules_to_save(base: BaseModel, config: LoraConfig) -> list[str]:
    """The entries, without wrappers where they match the same modules, so that every version knows them."""
    entries = list(config.modules_to_save or ())
    if config.ensure_weight_tying and base.has_tied_head and {EMBEDDING, HEAD} & set(entries):
        entries = list(dict.fromkeys([*entries, EMBEDDING]))

    def matched(entry: str) -> list[str]:
        return [name for name in base.modules if name.endswith(entry)]

    shortened = [name_without_wrappers(entry) for entry in entries]
    return [
        short if short and matched(short) == matched(entry) else entry
        for entry, short in zip(entries, shortened, strict=True)
    ]


def _move_into_place(staged: Path, directory: Path) -> None:
    if not directory.exists():
        staged.rename(directory)
        return
    names = [name for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE) if (staged / name).exists()]
    backup = staged / "previous"
    backup.mkdir()
    done: list[str] = []
    try:
        for name in names:
            if (directory / name).exists():
                shutil.copy2(directory / name, backup / name)
        for name in names:
            os.replace(staged / name, directory / name)
            done.append(name)
    except BaseException:
        for name in done:
            if (backup / name).exists():
                os.replace(backup / name, directory / name)
            else:
                (directory / name).unlink()
        raise


def _read_config(file: Path) -> LoraConfig:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file} does not exist: {file.parent} is no PEFT adapter directory"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else None
        raise ValueError(f"{file} describes an adapter of peft_type={kind!r}; only 'LORA' is supported")
    if absent := [name for name in ("r", "lora_alpha", "target_modules") if found.get(name) is None]:
        raise ValueError(f"{file} lacks {', '.join(absent)}")
    init = found.get("init_lora_weights", True)
    if init not in _REPEATABLE_INITS:
        raise NotImplementedError(
            f"{file}: init_lora_weights={init!r} changed the base weights in a way that cannot be repeated; "
            "convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if init in ("eva", "orthogonal"):
        found["init_lora_weights"] = True  # They have done their part, which PEFT's files do not depend on.
    if init != "loftq":
        found["loftq_config"] = None
    arguments = {}
    for name, value in found.items():
        if name in _CHANGES_NOTHING or value is None or value == [] or value == "":
            continue
        if name in LoraConfig.__dataclass_fields__:
            arguments[name] = value
        elif value:
            raise NotImplementedError(f"{file}: {name}={value!r} is not supported")
    try:
        return LoraConfig(**arguments)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{file}: {error}") from error


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    file = directory / WEIGHTS_FILE
    if not file.exists():
        pickled = directory / "adapter_model.bin"
        hint = (
            f"; {pickled.name} is a pickle, which is never read: save it again with PEFT"
            if pickled.exists()
            else ""
        )
        raise FileNotFoundError(f"{file} does not exist{hint}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _missing_modules(
    table: ModuleTable, config: LoraConfig, adapters: Mapping[str, AdapterArrays]
) -> list[str]:
    """Modules that the config targets and the file does not hold, by the name that the file would use."""
    towers: dict[str, str] = {}
    for spec in table:
        if arrays := adapters.get(name_without_wrappers(spec.name)):
            towers[_tower(spec.name)] = _tower(arrays.name)
    missing = []
    for spec in table:
        if name_without_wrappers(spec.name) not in adapters:
            tower = _tower(spec.name)
            name = towers.get(tower, tower) + spec.name.removeprefix(tower)
            if _peft_targets(config, name):
                missing.append(name)
    return missing


def _tower(name: str) -> str:
    """What stands before the first number of a name."""
    return re.match(r".*?(?=\.\d+\.|$)", name)[0]


def _peft_targets(config: LoraConfig, name: str) -> bool:
    targets, exclude = config.target_modules, config.exclude_modules
    if isinstance(exclude, str):
        if re.fullmatch(exclude, name):
            return False
    elif any(matches_name(entry, name) for entry in exclude or ()):
        return False
    if saves_module(config.modules_to_save or (), name):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in (targets or ()):
        return True
    return any(matches_name(entry, name) for entry in targets or ()) and in_layers(
        name, config.layers_to_transform, config.layers_pattern
    )


def _model_card(config: LoraConfig) -> str:
    base = config.base_model_name_or_path
    on_hub = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    metadata = [f"base_model: {base}"] if on_hub else []
    metadata += ["library_name: peft", "pipeline_tag: image-text-to-text", "tags:", "- lora", "- vlmlora"]
    lines = [
        *("---", *metadata, "---", ""),
        *(f"# LoRA adapter of {base or 'a vision-language model'}", ""),
        f"Rank {config.r}, alpha {config.lora_alpha}. Trained with vlmlora, stored in PEFT's format:",
        *("", "```python", "from peft import PeftModel", ""),
        'model = PeftModel.from_pretrained(base_model, "path/to/this/directory")',
        *("```", ""),
    ]
    return "\n".join(lines)


def _listed(items: Iterable[str], noun: str, limit: int = 20) -> str:
    items = list(items)
    shown = ", ".join(items[:limit]) + (f", and {len(items) - limit} more" if len(items) > limit else "")
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''} ({shown})"
