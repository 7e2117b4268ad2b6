"""Which modules get an adapter, decided on the module table; results equal PEFT's and Unsloth's."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.table import Table

from vlmlora.lora.config import LoraConfig, pattern_matches
from vlmlora.models.module_table import LinearSpec, ModuleTable

FLAGS = {
    "vision": "finetune_vision_layers",
    "language": "finetune_language_layers",
    "projector": "finetune_projector",
    "attention": "finetune_attention_modules",
    "mlp": "finetune_mlp_modules",
}
"""Part or role → the argument that chooses it."""

NOT_ADAPTED = {
    "embed_tokens": (
        "an embedding gets no low-rank adapter here; train rows of it with trainable_token_indices, or all "
        "of it with modules_to_save=['embed_tokens']"
    ),
    "lm_head": (
        "this model's head has no weight but the embedding's (tie_word_embeddings); train a copy of it with "
        "modules_to_save=['lm_head']"
    ),
}
"""Names that PEFT would adapt and that may be missing from a module table → what to do instead."""

PARTS = ("vision", "projector", "language", "head")
"""Parts of a model, in the order in which data passes through them."""


@dataclass(frozen=True)
class SelectedModule:
    """A module that gets an adapter of rank `r`, whose output is multiplied by `scaling`.

    `vectors` counts its trainable vectors of the output's size: DoRA's magnitude, and the adapter's bias.
    """

    spec: LinearSpec
    r: int
    lora_alpha: int | float
    scaling: float
    vectors: int = 0

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        spec = self.spec
        return self.r * (spec.in_features + spec.out_features) + self.vectors * spec.out_features


@dataclass(frozen=True)
class Selection:
    """The modules of `table` that get an adapter, in the table's order."""

    table: ModuleTable
    modules: tuple[SelectedModule, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """Hugging Face names of the selected modules."""
        return frozenset(module.spec.name for module in self.modules)

    @cached_property
    def by_path(self) -> dict[str, tuple[SelectedModule, ...]]:
        """Selected modules by their path in the Flax tree: the chosen layers of each stacked module."""
        groups: dict[str, list[SelectedModule]] = {}
        for module in self.modules:
            groups.setdefault(module.spec.path, []).append(module)
        return {
            path: tuple(sorted(group, key=lambda module: module.spec.layer or 0))
            for path, group in groups.items()
        }

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(module.parameters for module in self.modules)

    def summary(self) -> Table:
        """The selection as a printable table: part × role × modules × parameters."""
        groups: dict[tuple[str, str], list[LinearSpec]] = {}
        for spec in self.table:
            groups.setdefault((spec.part, spec.role), []).append(spec)
        order = (*PARTS, "attention", "mlp", "other")
        table = Table(title="LoRA adapters")
        for heading, justify in (
            *(("part", "left"), ("role", "left"), ("targets", "left")),
            *(("modules", "right"), ("parameters", "right")),
        ):
            table.add_column(heading, justify=justify, overflow="fold")
        for part, role in sorted(groups, key=lambda group: tuple(map(order.index, group))):
            chosen = [m for m in self.modules if (m.spec.part, m.spec.role) == (part, role)]
            targets = dict.fromkeys(_target_name(module.spec) for module in chosen)
            table.add_row(
                part,
                role,
                ", ".join(targets) or "–",
                f"{len(chosen):,} of {len(groups[part, role]):,}",
                f"{sum(module.parameters for module in chosen):,}",
                style=None if chosen else "dim",
            )
        table.add_section()
        total = f"{len(self.modules):,} of {len(self.table):,}"
        table.add_row("total", "", "", total, f"{self.parameters:,}", style="bold")
        return table


def select(table: ModuleTable, config: LoraConfig) -> Selection:
    """Choose the modules that get an adapter.

    Convolutions, embeddings and norms are not in the table and never adapted.

    - ``target_modules=None``: attention and feed-forward projections of the vision tower and the language
      model, as the four flags say; the projector if `finetune_projector`; never the head.
    - ``"all-linear"``: the same with all four flags on.
    - a list: PEFT's suffix match, in any part, while the four flags are on; within the flags otherwise.
    - any other string: a regular expression matched in full; the flags are ignored.

    `exclude_modules`, `modules_to_save`, `layers_to_transform` and `finetune_last_n_layers` narrow each.

    Args:
        table: every linear module of the model.
        config: the arguments.

    Raises:
        ValueError: the arguments contradict each other or the model, an entry of a list or a pattern matches
            nothing, or nothing is selected.
    """
    targets = config.target_modules
    if targets is None:
        _check_flags(table, config)
        chosen = [spec for spec in table if _in_flags(spec, config)]
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        chosen = [
            spec
            for spec in table
            if spec.role in ("attention", "mlp") or (config.finetune_projector and spec.part == "projector")
        ]
    elif isinstance(targets, str):
        chosen = [spec for spec in table if re.fullmatch(targets, spec.name)]
    else:
        chosen = _select_list(table, targets, config)
    chosen = _exclude(table, chosen, config)
    chosen = [spec for spec in chosen if not saves_module(config.modules_to_save or (), spec.name)]
    chosen = _restrict_layers(table, chosen, config)
    if not chosen:
        raise ValueError(
            f"no module is selected by {_arguments_of_selection(config)}{_regex_hint(table, targets)}"
        )
    _check_patterns(table, config)
    selection = Selection(
        table,
        tuple(
            SelectedModule(
                spec,
                config.rank_of(spec.name),
                config.alpha_of(spec.name),
                config.scaling_of(spec.name),
                vectors=config.use_dora + config.lora_bias,
            )
            for spec in chosen
        ),
    )
    _check_ranks(selection, config)
    return selection


def _check_ranks(selection: Selection, config: LoraConfig) -> None:
    """Starts that take singular vectors of a weight have no more of them than its smaller side."""
    if not str(config.init_lora_weights).startswith(("pissa", "olora", "loftq")):
        return
    for module in selection.modules:
        if module.r > (most := min(module.spec.in_features, module.spec.out_features)):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} gives {module.spec.name} "
                f"[{module.spec.out_features}, {module.spec.in_features}] a rank of at most {most}, not "
                f"{module.r}; lower r, or give the module a rank of its own with rank_pattern"
            )


def matches_name(entry: str, name: str) -> bool:
    """PEFT's rule for an entry of a list: the whole name, or what follows a dot."""
    return name == entry or name.endswith(f".{entry}")


def saves_module(entries: Iterable[str], name: str) -> bool:
    """PEFT's rule for what `modules_to_save` keeps from being adapted: an entry is a part of the name."""
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in entries)


def in_layers(
    name: str, layers: Sequence[int] | None, layers_pattern: str | Sequence[str] | None = None
) -> bool:
    """PEFT's rule for `layers_to_transform`: the first ``.name.<number>.`` of a module's name decides."""
    if layers is None:
        return True
    number = layer_number(name, layers_pattern)
    return number is not None and number in layers


def layer_number(name: str, layers_pattern: str | Sequence[str] | None = None) -> int | None:
    """The first number between dots of a module's name, after `layers_pattern` where that is given."""
    if not layers_pattern:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        if found := re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<number>\d+)\.", name):
            return int(found["number"])
    return None


def _in_flags(spec: LinearSpec, config: LoraConfig) -> bool:
    if spec.part == "projector":
        return config.finetune_projector
    flags = [FLAGS.get(spec.part), FLAGS.get(spec.role)]
    return all(flag is not None and getattr(config, flag) for flag in flags)


def _check_flags(table: ModuleTable, config: LoraConfig) -> None:
    towers = {part: getattr(config, FLAGS[part]) for part in ("vision", "language", "projector")}
    if not any(towers.values()):
        raise ValueError(
            "finetune_vision_layers=False and finetune_language_layers=False leave nothing to train; "
            "turn one of them on"
        )
    if (towers["vision"] or towers["language"]) and not (
        config.finetune_attention_modules or config.finetune_mlp_modules
    ):
        raise ValueError(
            "finetune_attention_modules=False and finetune_mlp_modules=False leave nothing to train; "
            "turn one of them on"
        )
    parts = {spec.part for spec in table}
    if towers["vision"] and not towers["language"] and "vision" not in parts:
        raise ValueError(
            "finetune_language_layers=False leaves only the vision tower, and the model has none; turn it on"
        )
    if towers["projector"] and "projector" not in parts:
        raise ValueError("finetune_projector=True, but the model has no projector; turn it off")


def _select_list(table: ModuleTable, targets: Sequence[str], config: LoraConfig) -> list[LinearSpec]:
    all_on = all(getattr(config, flag) for part, flag in FLAGS.items() if part != "projector")
    if not all_on:
        _check_flags(table, config)
    _check_entries(table, targets, "target_modules")
    matched = [spec for spec in table if any(matches_name(entry, spec.name) for entry in targets)]
    if config.finetune_projector and not any(spec.part == "projector" for spec in matched):
        raise ValueError(
            f"finetune_projector=True, but target_modules={list(targets)} names no module of the projector; "
            f"add one of {', '.join(spec.name for spec in table if spec.part == 'projector')}"
        )
    return [spec for spec in matched if all_on or _in_flags(spec, config)]


def _exclude(table: ModuleTable, chosen: list[LinearSpec], config: LoraConfig) -> list[LinearSpec]:
    exclude = config.exclude_modules
    if exclude is None:
        return chosen
    if isinstance(exclude, str):
        if not any(re.fullmatch(exclude, spec.name) for spec in table):
            raise ValueError(f"exclude_modules={exclude!r} matches no module{_regex_hint(table, exclude)}")
        return [spec for spec in chosen if not re.fullmatch(exclude, spec.name)]
    _check_entries(table, exclude, "exclude_modules")
    return [spec for spec in chosen if not any(matches_name(entry, spec.name) for entry in exclude)]


def _restrict_layers(table: ModuleTable, chosen: list[LinearSpec], config: LoraConfig) -> list[LinearSpec]:
    if config.finetune_last_n_layers is not None:
        numbers = sorted({layer_number(spec.name) for spec in table if spec.part == "language"} - {None})
        if config.finetune_last_n_layers > len(numbers):
            raise ValueError(
                f"finetune_last_n_layers={config.finetune_last_n_layers}, but the language model has "
                f"{len(numbers)} layers"
            )
        last = numbers[-config.finetune_last_n_layers :]
        return [spec for spec in chosen if spec.part != "language" or layer_number(spec.name) in last]
    layers = config.layers_to_transform
    if layers is None:
        return chosen
    found = {layer_number(spec.name, config.layers_pattern) for spec in chosen} - {None}
    if missing := sorted(set(layers) - found):
        where = f" in {config.layers_pattern!r}" if config.layers_pattern else ""
        have = f"{min(found)} to {max(found)}" if found else "none"
        raise ValueError(
            f"layers_to_transform={list(layers)}: no targeted module{where} has layer number "
            f"{', '.join(map(str, missing))}; layers found: {have}"
        )
    exact = () if isinstance(config.target_modules, str) else config.target_modules or ()
    return [
        spec for spec in chosen if spec.name in exact or in_layers(spec.name, layers, config.layers_pattern)
    ]


def _check_entries(table: ModuleTable, entries: Iterable[str], argument: str) -> None:
    for entry in entries:
        if not any(matches_name(entry, spec.name) for spec in table):
            near = difflib.get_close_matches(entry, _known_names(table), n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"names are {', '.join(_leaves(table))}"
            hint = NOT_ADAPTED.get(entry.rpartition(".")[2], hint)
            raise ValueError(f"{argument}: {entry!r} matches no linear module of the model; {hint}")


def _check_patterns(table: ModuleTable, config: LoraConfig) -> None:
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, argument):
            if not any(pattern_matches(pattern, spec.name) for spec in table):
                near = difflib.get_close_matches(pattern, _known_names(table), n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise ValueError(f"{argument}: {pattern!r} matches no linear module of the model{hint}")


def _known_names(table: ModuleTable) -> list[str]:
    """Every name and dotted suffix of one, for near matches."""
    names: dict[str, None] = {}
    for spec in table:
        parts = spec.name.split(".")
        names.update(dict.fromkeys(".".join(parts[i:]) for i in range(len(parts))))
    return list(names)


def _leaves(table: ModuleTable) -> list[str]:
    return list(dict.fromkeys(_target_name(spec) for spec in table))


def _target_name(spec: LinearSpec) -> str:
    """Last part of a module's name, with what stands before it where that is only a number."""
    parts = spec.name.split(".")
    return parts[-1] if not parts[-1].isdigit() else ".".join(parts[-2:])


def _arguments_of_selection(config: LoraConfig) -> str:
    narrowing = [
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "finetune_last_n_layers",
    ]
    flags = [flag for flag in FLAGS.values() if not getattr(config, flag) and flag != "finetune_projector"]
    shown = ["target_modules", *flags, *(name for name in narrowing if getattr(config, name) is not None)]
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in shown)


def _regex_hint(table: ModuleTable, pattern: object) -> str:
    if not isinstance(pattern, str):
        return ""
    if any(matches_name(pattern, spec.name) for spec in table):
        return f"; a string is a regular expression matched in full, pass [{pattern!r}] for a module's name"
    near = difflib.get_close_matches(pattern, [spec.name for spec in table], n=3, cutoff=0.4)
    return f"; it is matched in full with names such as {', '.join(near or [table[0].name])}"
