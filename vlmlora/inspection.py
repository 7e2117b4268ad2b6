"""What would be trained, and what memory it takes: from ``config.json`` alone."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from vlmlora.lora.abstract import add_abstract_adapters
from vlmlora.lora.apply import trainable_parameters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import PARTS, SelectedModule, Selection, layer_number, select
from vlmlora.lora.trained import BaseModel, Trained, attach_trained, plan_trained, trained_parts
from vlmlora.models.hub import resolve
from vlmlora.models.loading import read_config
from vlmlora.models.module_table import LinearSpec, module_table
from vlmlora.models.registry import family_of
from vlmlora.training.memory import IMAGE_SIZE, MemoryPlan, plan_memory

_STORED = {"nf4": "NF4", "int8": "INT8", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Batch:
    """The batch that a plan's totals are for: `rows` rows of `tokens` tokens with an image in each."""

    rows: int = 2
    tokens: int = 2048


@dataclass(frozen=True, eq=False)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        model_type: the model's family.
        selection: the modules that get an adapter, among all.
        trainable_parameters: number of elements that receive a gradient.
        total_parameters: of the base model, and what is added to it.
        trained_beside: parameters of the base model that train themselves (biases, whole modules, rows of
            tokens), by their path in the tree.
        memory: what a training step needs.
        batch: what the totals are for.
    """

    model_type: str
    selection: Selection
    trainable_parameters: int
    total_parameters: int
    trained_beside: Mapping[str, int]
    memory: MemoryPlan
    batch: Batch

    @cached_property
    def _selected(self) -> dict[str, SelectedModule]:
        return {module.spec.name: module for module in self.selection.modules}

    def to_json(self) -> dict[str, Any]:
        """The findings as plain data, with an entry for each linear module under its Hugging Face name."""
        return {
            "model_type": self.model_type,
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "modules": [self._module_fields(spec) for spec in self.selection.table],
            "memory": self._memory_fields(),
        }

    def report(self) -> Group:
        """The findings for `rich` to print: modules, parts, parameters and memory."""
        share = 100 * self.trainable_parameters / self.total_parameters
        counts = Text.assemble(
            ("trainable parameters ", "dim"),
            (f"{self.trainable_parameters:,}", "bold green"),
            *((" of ", "dim"), f"{self.total_parameters:,}", f" ({share:.4f} %)"),
        )
        if self.trained_beside:
            first, more = list(self.trained_beside)[:3], len(self.trained_beside) - 3
            names = ", ".join(first) + (f", and {more} more" if more > 0 else "")
            counts.append(
                f"\n{sum(self.trained_beside.values()):,} of them beside the adapters: {names}", "dim"
            )
        tables = self.selection.summary(), counts, self._held_table(), self._activation_table()
        return Group(self._tree(), *(part for table in tables for part in (Text(), table)))

    def _module_fields(self, spec: LinearSpec) -> dict[str, Any]:
        chosen = self._selected.get(spec.name)
        return {
            "name": spec.name,
            "part": spec.part,
            "role": spec.role,
            "layer": _layer(spec),
            "in_features": spec.in_features,
            "out_features": spec.out_features,
            "selected": chosen is not None,
            "r": None if chosen is None else chosen.r,
            "lora_alpha": None if chosen is None else chosen.lora_alpha,
        }

    def _memory_fields(self) -> dict[str, Any]:
        fields = asdict(self.memory) | {
            "image_size": list(IMAGE_SIZE),
            "batch": {"rows": self.batch.rows, "tokens": self.batch.tokens, "images": self.batch.rows},
            "total": None,
        }
        if self.memory.activations is not None:
            fields["activations"] = {
                _policy_name(policy): asdict(found) for policy, found in self.memory.activations.items()
            }
            fields["total"] = {
                stored: {
                    _policy_name(policy): asdict(self.memory.total(stored, policy, **self._work))
                    for policy in self.memory.activations
                }
                for stored in self.memory.frozen
            }
        return fields

    @property
    def _work(self) -> dict[str, int]:
        return asdict(self.batch) | {"images": self.batch.rows}

    def _tree(self) -> Tree:
        """Linear modules by their names; layers that repeat are shown once."""
        groups: dict[str, list[LinearSpec]] = {}
        for spec in sorted(self.selection.table, key=lambda spec: PARTS.index(spec.part)):
            groups.setdefault(_name_of_all_layers(spec), []).append(spec)
        width = max(len(name.rpartition(".")[2]) for name in groups)
        root = Tree(Text(self.model_type, "bold"), guide_style="dim")
        nodes = {"": (root, set())}
        for name, specs in groups.items():
            *path, leaf = name.split(".")
            above = ""
            for part in path:
                here = f"{above}.{part}"
                if here not in nodes:
                    numbers = _layers_below(here, groups) if part.endswith("[*]") else nodes[above][1]
                    label = part.replace("[*]", f"[{_ranges(numbers)}]")
                    nodes[here] = nodes[above][0].add(Text(label)), numbers
                above = here
            node, numbers = nodes[above]
            node.add(self._leaf(leaf.ljust(width), specs, numbers))
        return root

    def _leaf(self, name: str, specs: list[LinearSpec], siblings: set[int]) -> Text:
        shape = f"{specs[0].in_features:>6} → {specs[0].out_features:<6}"
        chosen = [self._selected[spec.name] for spec in specs if spec.name in self._selected]
        if not chosen:
            return Text(f"{name} {shape}", "dim")
        label = f"r = {', '.join(map(str, sorted({module.r for module in chosen})))}"
        layers = {_layer(module.spec) for module in chosen} - {None}
        if layers != siblings:
            label += f" in {_ranges(layers)}"
        return Text.assemble((name, "bold green"), f" {shape} ", (label, "green"))

    def _held_table(self) -> Table:
        plan = self.memory
        table = Table(title="Memory of a training step")
        for heading, justify in (("what", "left"), ("stored as", "left"), ("size", "right")):
            table.add_column(heading, justify=justify)
        for stored, name in _STORED.items():
            table.add_row("base model, frozen", name, _size(plan.frozen[stored]))
        table.add_section()
        table.add_row("trainable parameters", "float32", _size(plan.adapters))
        table.add_row("gradients", "float32", _size(plan.gradients))
        table.add_row("AdamW", "float32", _size(plan.optimizer))
        table.add_row("logits of a chunk", "float32", _size(plan.logits))
        return table

    def _activation_table(self) -> Table | Text:
        plan, batch = self.memory, self.batch
        if plan.activations is None:
            return Text(f"{self.model_type} does not say what its batches look like: no activations", "dim")
        image = "×".join(map(str, IMAGE_SIZE))
        totals = {
            policy: [plan.total(stored, policy, **self._work).device for stored in _STORED]
            for policy in plan.activations
        }
        unit, size = ("GiB", 2**30) if max(map(max, totals.values())) >= 2**30 else ("MiB", 2**20)
        table = Table(
            title=f"Activations and the peak in all, in {unit}",
            caption="By use_gradient_checkpointing: activations of 1,000 tokens, on the device and in "
            f"pinned host memory, and of a {image} image. Then the peak with each base, for {batch.rows} "
            f"rows of {batch.tokens:,} tokens with an image each, without the compiler's temporaries. "
            "Attention is fused.",
            caption_justify="left",
        )
        table.add_column("checkpointing", no_wrap=True)
        for heading in ("1k tokens", "on host", "image", *_STORED.values()):
            table.add_column(heading, justify="right", no_wrap=True)
        for policy, found in plan.activations.items():
            per_token = found.per_1000_tokens
            columns = (per_token.device, per_token.host, found.per_image.device, *totals[policy])
            table.add_row(repr(policy), *(f"{nbytes / size:.2f}" if nbytes else "–" for nbytes in columns))
        return table


def inspect_model(
    model_name: str | PathLike[str],
    *,
    batch_size: int = 2,
    max_seq_length: int = 2048,
    token: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    **arguments: Any,
) -> Inspection:
    """Say what `FastVisionModel.get_peft_model` would train, and the memory of a step; loads no weights.

    Args:
        model_name: a directory with ``config.json``, or a repository, of which only that is downloaded.
        batch_size: rows of the batch that the totals are for.
        max_seq_length: tokens of each.
        token: for private repositories.
        revision: branch, tag or commit of the repository.
        local_files_only: use what is in the cache already.
        arguments: those of `vlmlora.lora.config.LoraConfig`.

    Returns:
        The selection, the counts and the memory plan. ``rich.print(inspect_model(...).report())`` shows it.

    Raises:
        TypeError: unknown argument; the message names the nearest.
        ValueError: the arguments contradict each other or the model, or the model is not supported.
        NotImplementedError: an argument that is not supported.
        FileNotFoundError: no such directory or repository, or no network and nothing in the cache.
    """
    for name, value in (("batch_size", batch_size), ("max_seq_length", max_seq_length)):
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1")
    lora = LoraConfig.from_arguments(arguments)
    directory = resolve(
        model_name, token=token, revision=revision, local_files_only=local_files_only, files=("config.json",)
    )
    config = read_config(directory)
    module = family_of(config).model(config, dtype=jnp.bfloat16)
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))
    selection = select(module_table(config), lora)
    parts = plan_trained(BaseModel.of(module), lora, selection.names)
    add_abstract_adapters(module, selection, lora)
    attach_trained(module, parts)
    trainable, beside = trainable_parameters(module), trained_parts(module)
    # A bias trains in its place; everything else is added to the base, which is kept.
    added = trainable - sum(_count(part) for part in beside.values() if not part.is_copy)
    return Inspection(
        model_type=config.model_type,
        selection=selection,
        trainable_parameters=trainable,
        total_parameters=total + added,
        trained_beside={path: _count(part) for path, part in beside.items()},
        memory=plan_memory(module, config),
        batch=Batch(batch_size, max_seq_length),
    )


def _count(part: Trained) -> int:
    return math.prod(part.trained.get_value().shape)


def _layer(spec: LinearSpec) -> int | None:
    """The number in the Hugging Face name of a module that repeats."""
    return None if spec.layer is None else layer_number(spec.name)


def _name_of_all_layers(spec: LinearSpec) -> str:
    return spec.name if spec.layer is None else re.sub(r"\.\d+\.", "[*].", spec.name, count=1)


def _layers_below(path: str, groups: Mapping[str, list[LinearSpec]]) -> set[int]:
    """The layers of all modules under a path of the tree."""
    below = (specs for name, specs in groups.items() if f".{name}".startswith(f"{path}."))
    return {_layer(spec) for specs in below for spec in specs}


def _ranges(numbers: Iterable[int]) -> str:
    """``0–2, 5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _policy_name(policy: bool | str) -> str:
    return policy if isinstance(policy, str) else str(policy).lower()


def _size(nbytes: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= factor:
            return (
                f"{nbytes / factor:.2f} {unit}" if nbytes < 10 * factor else f"{nbytes / factor:.1f} {unit}"
            )
    return f"{nbytes / 2**10:.1f} KiB"
