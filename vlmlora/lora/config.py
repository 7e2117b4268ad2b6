"""What an adapter is: PEFT's LoraConfig fields, and the flags that choose parts of a model."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

INIT_METHODS = (
    *(True, False, "gaussian"),
    *("orthogonal", "pissa", "pissa_niter_[number]", "olora", "loftq", "eva"),
)


@dataclass(frozen=True)
class EvaConfig:
    """Arguments of the EVA start (https://arxiv.org/abs/2410.07170), with PEFT's names and defaults.

    Attributes:
        rho: a module's rank may grow to `rho` times its own where its inputs need it, at the cost of others;
            1 leaves ranks as they are.
        tau: cosine similarity with the step before from which a singular vector has converged.
        use_label_mask: look only at tokens with a label.
        label_mask_value: the label of the others.
        whiten: divide singular vectors by the square roots of their singular values.
        adjust_scaling_factors: change `lora_alpha` with the rank, so that the scaling stays.

    Raises:
        ValueError: `rho` is less than 1, or `tau` not between 0 and 1.
    """

    rho: int | float = 2.0
    tau: int | float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self):
        if not 1 <= self.rho < float("inf"):
            raise ValueError(f"eva_config: rho={self.rho!r}: it must be a number of at least 1")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"eva_config: tau={self.tau!r}: it must be between 0 and 1")


@dataclass(frozen=True)
class LoraConfig:
    """Arguments of LoRA, with PEFT's names and Unsloth's defaults.

    Every argument of the signature is checked when the config is made, so nothing is built from one that is
    wrong or not supported.

    Attributes:
        r: rank.
        target_modules: None (what the flags choose), ``"all-linear"`` (every flag on), a list of module names
            (each the whole name or a dotted suffix), or a regular expression matched in full.
        lora_alpha: the adapter's output is scaled by ``lora_alpha / r``, or ``lora_alpha / sqrt(r)``.
        lora_dropout: probability that an element of the adapter's input is dropped in training.
        bias: which biases of the base model train: ``"none"``, ``"all"``, or ``"lora_only"``, those of the
            adapted modules.
        finetune_vision_layers: adapt the vision tower.
        finetune_language_layers: adapt the language model.
        finetune_attention_modules: adapt attention projections.
        finetune_mlp_modules: adapt feed-forward projections.
        finetune_last_n_layers: of the language model's layers, adapt the last n only. Other parts are left
            to their own flags.
        layers_to_transform: adapt only layers with these numbers. A module that a list names in full is
            adapted all the same, as in PEFT.
        layers_pattern: name of the module list that `layers_to_transform` counts in; None for any.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (https://arxiv.org/abs/2312.03732).
        modules_to_save: modules trained in full and saved with the adapter; each entry is the end of a
            module's name. They are not adapted.
        init_lora_weights: True (A Kaiming-uniform, B zero), False (both as a linear layer starts),
            ``"gaussian"`` (A normal, B zero) or ``"orthogonal"`` (both random, B A zero; even ranks);
            ``"pissa"``, ``"pissa_niter_N"``, ``"olora"`` or ``"loftq"``, which take the adapter out of the
            base weight (see `vlmlora.lora.decompose`); or ``"eva"``, which looks at data (see
            `vlmlora.lora.eva.initialize_lora_eva_weights`; until it has run, A and B are as with True).
        loftq_config: with ``"loftq"``: ``loftq_bits`` (4 or 8; 4) and ``loftq_iter`` (1).
        task_type: ``"CAUSAL_LM"``.
        target_parameters: bare parameters to adapt, as mixture-of-experts layers have; refused, because the
            supported model families have none.
        ensure_weight_tying: where the head is tied to the input embedding and `modules_to_save` names one of
            them, train one copy for both. Without, each has its own.
        finetune_projector: adapt the projector between the vision tower and the language model.
        use_dora: train the lengths of the weight's rows apart from their directions
            (https://arxiv.org/abs/2402.09353).
        rank_pattern: name or regular expression at a name's end → rank; it may differ from layer to layer.
        alpha_pattern: the same for `lora_alpha`.
        exclude_modules: modules never adapted, as a list or a regular expression like `target_modules`.
        lora_bias: give B a bias, zero at the start; with `init_lora_weights` True or False and without DoRA,
            as in PEFT.
        eva_config: with ``"eva"``: an `EvaConfig`, or its fields as a mapping.
        trainable_token_indices: rows of the input embedding that train, with those of a head that is
            tied to it; or a module's name → its rows.
        base_model_name_or_path: the base model, written to the adapter's files.
        revision: its revision, likewise.

    Raises:
        ValueError: a value is out of range or two arguments exclude each other.
        NotImplementedError: an argument has a value that is not supported.
    """

    r: int = 16
    target_modules: str | Sequence[str] | None = None
    lora_alpha: int | float = 16
    lora_dropout: int | float = 0.0
    bias: str = "none"
    finetune_vision_layers: bool = True
    finetune_language_layers: bool = True
    finetune_attention_modules: bool = True
    finetune_mlp_modules: bool = True
    finetune_last_n_layers: int | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    use_rslora: bool = False
    modules_to_save: str | Sequence[str] | None = None
    init_lora_weights: bool | str = True
    loftq_config: Mapping[str, Any] | None = None
    task_type: str | None = "CAUSAL_LM"
    target_parameters: Sequence[str] | None = None
    ensure_weight_tying: bool = False
    finetune_projector: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict)
    exclude_modules: str | Sequence[str] | None = None
    lora_bias: bool = False
    eva_config: "EvaConfig | Mapping[str, Any] | None" = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "LoraConfig":
        """A config from keyword arguments.

        Raises:
            TypeError: an argument is unknown; the message names the nearest.
            ValueError: see the class.
            NotImplementedError: see the class.
        """
        reject_unknown_arguments(arguments, [f.name for f in fields(cls)], caller="LoraConfig")
        return cls(**arguments)

    def __post_init__(self):
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, _names(name, value))
        if self.trainable_token_indices is not None:
            object.__setattr__(self, "trainable_token_indices", _token_indices(self.trainable_token_indices))
        if self.layers_to_transform is not None:
            object.__setattr__(self, "layers_to_transform", _layer_numbers(self.layers_to_transform))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        if self.task_type is not None:
            object.__setattr__(self, "task_type", str(getattr(self.task_type, "value", self.task_type)))
        object.__setattr__(self, "loftq_config", _loftq_config(self.loftq_config))
        object.__setattr__(self, "eva_config", _eva_config(self.eva_config, self.init_lora_weights))
        self._check_numbers()
        self._check_selection()
        self._check_supported()
        self._check_initialisation()

    def _check_numbers(self):
        for name, r in {"r": self.r, **_pattern_items("rank_pattern", self.rank_pattern)}.items():
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ValueError(f"{name}={r!r}: a rank must be an integer of at least 1")
        for name, alpha in {
            "lora_alpha": self.lora_alpha,
            **_pattern_items("alpha_pattern", self.alpha_pattern),
        }.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                raise ValueError(f"{name}={alpha!r}: it must be a positive number")
        if isinstance(self.lora_dropout, bool) or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r}: a probability of at least 0 and less than 1"
            )
        n = self.finetune_last_n_layers
        if n is not None and (isinstance(n, bool) or n < 1):
            raise ValueError(f"finetune_last_n_layers={n!r}: it must be an integer of at least 1, or None")

    def _check_selection(self):
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            are_patterns = name in ("layers_pattern", "modules_to_save")
            patterns = [value] if isinstance(value, str) else value if are_patterns else None
            for pattern in patterns or []:
                _check_regex(name, pattern)
            if value is not None and name != "layers_pattern" and not value:
                raise ValueError(f"{name}={value!r} names no module; pass None for the default")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                _check_regex(name, pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, the numbers it counts"
            )
        if self.finetune_last_n_layers is not None and self.layers_to_transform is not None:
            raise ValueError(
                f"finetune_last_n_layers={self.finetune_last_n_layers} and "
                f"layers_to_transform={self.layers_to_transform} both choose layers; pass one of them"
            )

    def _check_supported(self):
        _check_choice("bias", self.bias, ("none", "all", "lora_only"))
        _check_choice("task_type", self.task_type, ("CAUSAL_LM", None))
        if self.target_parameters:
            raise NotImplementedError(
                f"target_parameters={self.target_parameters!r}: it adapts the bare parameters of "
                "mixture-of-experts layers, of which the supported model families have none; name linear "
                "modules with target_modules"
            )

    def _check_initialisation(self):
        init = self.init_lora_weights
        if not (isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init)):
            _check_choice("init_lora_weights", init, INIT_METHODS)
        for name, owner in {"loftq_config": "loftq", "eva_config": "eva"}.items():
            if getattr(self, name) and init != owner:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with init_lora_weights={init!r}; pass "
                    f"init_lora_weights={owner!r} or leave {name} out"
                )
        odd = {"r": self.r, **_pattern_items("rank_pattern", self.rank_pattern)}
        odd = {name: r for name, r in odd.items() if r % 2}
        if init == "orthogonal" and odd:
            name, r = next(iter(odd.items()))
            raise ValueError(f"init_lora_weights='orthogonal' needs even ranks, but {name}={r}")
        if self.lora_bias and init not in (True, False):
            raise ValueError(
                f"lora_bias=True works with init_lora_weights=True or False, as in PEFT, not with {init!r}"
            )
        if self.lora_bias and self.use_dora:
            raise ValueError(
                "lora_bias=True and use_dora=True exclude each other, as in PEFT; pass one of them"
            )

    def rank_of(self, name: str) -> int:
        """Rank of the module `name`: the first matching `rank_pattern`, else `r`."""
        return _first_match(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> int | float:
        """`lora_alpha` of the module `name`: the first matching `alpha_pattern`, else `lora_alpha`."""
        return _first_match(self.alpha_pattern, name, self.lora_alpha)

    def scaling_of(self, name: str) -> float:
        """Factor on the adapter's output for the module `name`."""
        r = self.rank_of(name)
        return self.alpha_of(name) / (r**0.5 if self.use_rslora else r)


def reject_unknown_arguments(arguments: Iterable[str], known: Iterable[str], *, caller: str) -> None:
    """Fail on a keyword argument that `caller` does not have.

    Raises:
        TypeError: the message names the nearest argument that exists.
    """
    known = list(known)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}"
            raise TypeError(f"{caller} has no argument {name!r}{hint}")


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` is meant for the module `name`, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, name)), default)


def _pattern_items(argument: str, patterns: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{argument}[{pattern!r}]": value for pattern, value in patterns.items()}


def _names(argument: str, value: Iterable[str]) -> tuple[str, ...]:
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{argument}={names!r}: {name!r} is not a module name")
    return names


def _layer_numbers(value: int | Sequence[int]) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise ValueError(f"layers_to_transform={value!r}: layer numbers are integers of at least 0")
    return numbers


def _loftq_config(value: Any) -> dict[str, int] | None:
    """The config as a dict with every key, or None for an empty one."""
    if not value:
        return None
    found = dict(value) if isinstance(value, Mapping) else vars(value)
    reject_unknown_arguments(found, ("loftq_bits", "loftq_iter"), caller="loftq_config")
    config = {"loftq_bits": 4, "loftq_iter": 1, **found}
    bits, iterations = config["loftq_bits"], config["loftq_iter"]
    if bits not in (4, 8):
        raise ValueError(f"loftq_config: loftq_bits={bits!r}: it must be 4 (NF4) or 8 (INT8)")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"loftq_config: loftq_iter={iterations!r}: it must be an integer of at least 1")
    return config


def _eva_config(value: Any, init: bool | str) -> EvaConfig | None:
    if not value or isinstance(value, EvaConfig):
        return value or (EvaConfig() if init == "eva" else None)
    found = dict(value) if isinstance(value, Mapping) else vars(value)
    reject_unknown_arguments(found, [f.name for f in fields(EvaConfig)], caller="eva_config")
    return EvaConfig(**found)


def _token_indices(
    value: Sequence[int] | Mapping[str, Sequence[int]],
) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("trainable_token_indices={} names no module; pass None for the default")
        return {name: _token_indices(rows) for name, rows in value.items()}
    rows = tuple(value)
    if not rows or any(isinstance(row, bool) or not isinstance(row, Integral) or row < 0 for row in rows):
        raise ValueError(f"trainable_token_indices={value!r}: token indices are integers of at least 0")
    if len(set(rows)) != len(rows):
        raise ValueError(f"trainable_token_indices={value!r} names a token twice")
    return tuple(map(int, rows))


def _check_regex(argument: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error


def _check_choice(argument: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{argument}={value!r}: it must be one of {', '.join(map(repr, choices))}")
