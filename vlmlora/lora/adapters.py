"""Several adapters on one base model: one is in the model's tree, the others are kept beside it.

A loss sees the active adapter alone, so that the others cost memory and no time.
"""

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from flax import nnx

from vlmlora.lora.apply import LoraArrays, adapted_modules, make_adapter
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.decompose import changes_base
from vlmlora.lora.trained import Trained, remove_trained, set_trained, trained_parts
from vlmlora.models.module_table import LinearSpec, ModuleTable, linear_modules

logger = logging.getLogger(__name__)

DEFAULT = "default"
"""Name of an adapter that is not given one."""

COMBINATIONS = ("svd", "linear", "cat")
"""What `weighted_adapter` knows of PEFT's ways to combine."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that is in no model's tree.

    Attributes:
        linears: the adapter of each linear module, by its path.
        trained: what trained of the base model, by the parameter's path.
    """

    linears: Mapping[str, nnx.Module]
    trained: Mapping[str, Trained]


def detach(module: nnx.Module) -> Adapter:
    """Take the adapter out of a model, in place; the base is left as it was."""
    linears = {}
    for path, linear in linear_modules(module).items():
        if linear.adapter is not None:
            linears[path], linear.adapter = linear.adapter, None
    return Adapter(linears, remove_trained(module))


def attach(module: nnx.Module, adapter: Adapter) -> None:
    """Put an adapter into a model that has none, in place."""
    linears = linear_modules(module)
    for path, each in adapter.linears.items():
        linears[path].adapter = each
    for path, trained in adapter.trained.items():
        set_trained(module, path, trained)


class AdapterSet:
    """The adapters of a model by name.

    Attributes:
        configs: their arguments, by name.
        active: the name of the one in the model's tree; None without one.
    """

    def __init__(self, module: nnx.Module):
        self._module = module
        self._parked: dict[str, Adapter] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.active: str | None = None

    def add(
        self,
        name: str,
        build: Callable[[], LoraConfig],
        config: LoraConfig | None = None,
        *,
        activate: bool = True,
    ) -> None:
        """Add an adapter.

        Args:
            name: its name.
            build: attaches it to the model, which has no adapter meanwhile, and returns its config. If it
                fails, all is as before.
            config: its config, as far as it is known already.
            activate: make it the active one; without, it is so only if there is no other.

        Raises:
            ValueError: there is one of that name, or one has changed the base weights, or this one would.
        """
        if name in self.configs:
            raise ValueError(
                f"the model already has an adapter {name!r}; give the new one another adapter_name, "
                "or take it off with delete_adapter"
            )
        if not name or set(name) & set("./\\"):
            raise ValueError(f"adapter_name={name!r}: it must be the name of a folder, without dots")
        self._check_base(f"another adapter, {name!r},")
        if config is not None and self.configs and changes_base(config.init_lora_weights):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weights, on which the "
                f"model's other adapters ({', '.join(self.configs)}) rest; delete them first"
            )
        before = self.active
        with self.suspended(restore=False):
            self.configs[name] = build()
        self.active = name
        if before is not None and not activate:
            self.activate(before)

    def forget(self) -> None:
        """There are no adapters any more: the active one has been taken off or merged."""
        self._parked.clear()
        self.configs.clear()
        self.active = None

    @contextmanager
    def suspended(self, *, restore: bool = True) -> Iterator[None]:
        """While the body runs the model is the base model.

        Args:
            restore: attach the active adapter again; False: only if the body fails.

        Raises:
            ValueError: the active adapter has changed the base weights.
        """
        parked = None if self.active is None else detach(self._module)
        done = False
        try:
            yield
            done = True
        finally:
            if parked is not None:
                if done and not restore:
                    self._parked[self.active] = parked
                else:
                    detach(self._module)
                    attach(self._module, parked)
            elif not done:
                detach(self._module)

    def activate(self, name: str) -> None:
        """Put the adapter `name` into the tree in place of the active one.

        Raises:
            ValueError: there is none of that name.
        """
        self.check(name)
        if name == self.active:
            return
        if self.active is not None:
            self._parked[self.active] = detach(self._module)
        attach(self._module, self._parked.pop(name))
        self.active = name

    @contextmanager
    def activated(self, name: str) -> Iterator[None]:
        """While the body runs `name` is the active adapter."""
        before = self.active
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)

    def delete(self, name: str) -> None:
        """Forget an adapter. If it was the active one, the first of the others takes its place, as in PEFT.

        Raises:
            ValueError: there is none of that name, or it has changed the base weights.
        """
        self.check(name)
        self._check_base("its deletion")
        if name == self.active:
            detach(self._module)
            self.active = None
        else:
            del self._parked[name]
        del self.configs[name]
        if self.active is None and self.configs:
            first = next(iter(self.configs))
            logger.warning("the active adapter %r is deleted; %r is active now", name, first)
            attach(self._module, self._parked.pop(first))
            self.active = first

    def park(self, name: str, adapter: Adapter, config: LoraConfig) -> None:
        """Add an adapter that is in no tree; it is not made active.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.configs:
            raise ValueError(f"the model already has an adapter {name!r}")
        self._parked[name] = adapter
        self.configs[name] = config

    def check(self, name: str) -> None:
        """Fail where there is no adapter `name`.

        Raises:
            ValueError: the message lists those that are.
        """
        if name not in self.configs:
            near = difflib.get_close_matches(str(name), self.configs, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {list(self.configs)}"
            raise ValueError(f"there is no adapter {name!r}{hint}")

    def check_can_disable(self) -> None:
        """Fail where the base weights are not the base model's.

        Raises:
            ValueError: an adapter has changed them.
        """
        self._check_base("the base model alone")

    def _check_base(self, what: str) -> None:
        for name, config in self.configs.items():
            if changes_base(config.init_lora_weights):
                raise ValueError(
                    f"{what} needs the base weights, which the adapter {name!r} has changed "
                    f"(init_lora_weights={config.init_lora_weights!r}); save it, load the base model again, "
                    "and load what was saved"
                )


def weighted_adapter(
    module: nnx.Module,
    table: ModuleTable,
    adapters: AdapterSet,
    names: Sequence[str],
    weights: Sequence[int | float],
    *,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> tuple[Adapter, LoraConfig]:
    """A new adapter that is a weighted sum of others, as PEFT's ``LoraModel.add_weighted_adapter`` makes it.

    ``"svd"`` decomposes the weighted sum of the changes to each weight; ``"cat"`` lays the matrices side by
    side, which is exact, of the sum of the ranks; ``"linear"`` adds A to A and B to B, each times the root of
    the weight, which is rough.

    Args:
        module: the model.
        table: its module table.
        adapters: its adapters.
        names: those to combine.
        weights: of each; may be negative.
        combination_type: one of `COMBINATIONS`. One adapter alone is always combined linearly.
        svd_rank: rank for ``"svd"``; None: the largest.

    Returns:
        The adapter, and its config.

    Raises:
        ValueError: an adapter does not exist, the numbers of names and weights differ, ranks differ where
            they must not, or an adapter is more than a product of two matrices.
        NotImplementedError: another combination of PEFT.
    """
    if not names or len(names) != len(weights):
        raise ValueError(f"{len(names)} adapters and {len(weights)} weights; each adapter needs one")
    for name in names:
        adapters.check(name)
    configs = [adapters.configs[name] for name in names]
    combination_type = "linear" if len(names) == 1 else combination_type
    _check_combination(names, configs, combination_type)
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    if combination_type == "linear" and len(set(ranks)) != 1:
        found = ", ".join(f"{name}: {r}" for name, r in zip(names, ranks, strict=True))
        raise ValueError(f'combination_type="linear" needs adapters of one rank; found {found}')
    r = sum(ranks) if combination_type == "cat" else (combination_type == "svd" and svd_rank) or max(ranks)
    config = replace(
        configs[0],
        r=r,
        lora_alpha=r,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        loftq_config=None,
        eva_config=None,
    )
    parts: dict[str, list[tuple[float, LoraArrays]]] = {}
    specs: dict[str, LinearSpec] = {}
    for name, weight in zip(names, weights, strict=True):
        with adapters.activated(name):
            if trained := list(trained_parts(module)):
                raise ValueError(
                    f"the adapter {name!r} trains {len(trained)} parameters of the base model as well "
                    f"({trained[0]}, ...), which cannot be weighted"
                )
            for spec, arrays in _arrays(module, table):
                specs[spec.name] = spec
                parts.setdefault(spec.name, []).append((float(weight), arrays))
    combine = {"svd": _svd, "linear": _linear, "cat": _cat}[combination_type]
    by_path: dict[str, list[tuple[LinearSpec, LoraArrays]]] = {}
    for name, spec in specs.items():
        lora_A, lora_B = combine(name, parts[name], r)
        pad = r - len(lora_A)
        arrays = LoraArrays(
            np.pad(lora_A, [(0, pad), (0, 0)]), np.pad(lora_B, [(0, 0), (0, pad)]), config.scaling_of(name)
        )
        by_path.setdefault(spec.path, []).append((spec, arrays))
    linears = {}
    for path, layers in by_path.items():
        layers.sort(key=lambda layer: layer[0].layer or 0)
        linears[path] = make_adapter(*zip(*layers, strict=True), dropout=config.lora_dropout)
    config = replace(
        config,
        target_modules=tuple(specs),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        finetune_last_n_layers=None,
    )
    return Adapter(linears, {}), config


def _check_combination(names: Sequence[str], configs: Sequence[LoraConfig], combination_type: str) -> None:
    if combination_type not in COMBINATIONS:
        raise NotImplementedError(
            f"combination_type={combination_type!r}: it must be one of {', '.join(COMBINATIONS)}"
        )
    for name, config in zip(names, configs, strict=True):
        found = [flag for flag in ("use_dora", "lora_bias") if getattr(config, flag)]
        if config.bias != "none":
            found.append(f"bias={config.bias!r}")
        if changes_base(config.init_lora_weights):
            found.append(f"init_lora_weights={config.init_lora_weights!r}")
        if found:
            raise ValueError(
                f"the adapter {name!r} has {', '.join(found)}, and so is more than a product of two matrices "
                "added to a weight; it cannot be weighted"
            )


def _arrays(module: nnx.Module, table: ModuleTable) -> Iterator[tuple[LinearSpec, LoraArrays]]:
    """The matrices of every adapted module, on the host."""
    host: dict[int, list[np.ndarray]] = {}
    for spec, adapter, index in adapted_modules(module, table):
        if id(adapter) not in host:
            variables = (adapter.lora_A, adapter.lora_B, adapter.scaling)
            host[id(adapter)] = [np.asarray(v.get_value(), np.float32) for v in variables]
        lora_A, lora_B, scaling = (a if index is None else a[index] for a in host[id(adapter)])
        yield spec, LoraArrays(lora_A, lora_B, float(scaling))


Weighted = Sequence[tuple[float, LoraArrays]]
Matrices = tuple[np.ndarray, np.ndarray]


def _linear(name: str, parts: Weighted, r: int) -> Matrices:
    if len({len(each.lora_A) for _, each in parts}) > 1:
        raise ValueError(f'combination_type="linear": the adapters of {name} have different ranks')
    factors = [weight * each.scaling for weight, each in parts]
    lora_A = sum(
        np.copysign(np.sqrt(abs(f)), f) * each.lora_A for f, (_, each) in zip(factors, parts, strict=True)
    )
    lora_B = sum(np.sqrt(abs(f)) * each.lora_B for f, (_, each) in zip(factors, parts, strict=True))
    return np.asarray(lora_A, np.float32), np.asarray(lora_B, np.float32)


def _cat(name: str, parts: Weighted, r: int) -> Matrices:
    lora_A = np.concatenate([np.float32(weight * each.scaling) * each.lora_A for weight, each in parts])
    return lora_A, np.concatenate([each.lora_B for _, each in parts], axis=1)


def _svd(name: str, parts: Weighted, r: int) -> Matrices:
    # The sum is a product of thin matrices; their QR leaves a small one to decompose.
    lora_A, lora_B = _cat(name, parts, r)
    left, left_core = np.linalg.qr(lora_B)
    right, right_core = np.linalg.qr(lora_A.T)
    U, values, Vh = np.linalg.svd(left_core @ right_core.T)
    rank = len(values)
    return (Vh[:rank] @ right.T)[:r], (left @ U[:, :rank] * values)[:, :r]
