"""The EVA start: A from the singular vectors of a module's inputs (https://arxiv.org/abs/2410.07170).

As PEFT's ``initialize_lora_eva_weights``: batches run through the model until the leading singular vectors of
every module's inputs stand still, and ranks then go where they explain most of the variance. The model's own
program runs, with stacked layers under one scan: in place of an adapter each chosen module has a tap that
hands its input to the host, which keeps a truncated decomposition a module and no inputs.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback
from jaxtyping import Float, PRNGKeyArray

from vlmlora.lora.apply import adapted_modules, linear_start, set_adapters
from vlmlora.lora.config import EvaConfig, LoraConfig
from vlmlora.lora.selection import SelectedModule, Selection
from vlmlora.models.module_table import LinearSpec, ModuleTable, linear_modules
from vlmlora.nn.batch import model_inputs
from vlmlora.nn.variables import Frozen

Batch = Mapping[str, Any]


@runtime_checkable
class AdaptedModel(Protocol):
    """What `initialize_lora_eva_weights` needs of a model; `vlmlora.FastVisionModel` is one."""

    module: nnx.Module
    lora_config: LoraConfig | None

    @property
    def module_table(self) -> ModuleTable:
        """Every linear module of the model."""


def initialize_lora_eva_weights(model: AdaptedModel, batches: Iterable[Batch]) -> None:
    """Start the adapters of a model made with ``init_lora_weights="eva"`` from data, in place.

    Call it after `get_peft_model` and before training; B stays zero, so the model computes what it did. With
    ``rho > 1`` ranks move between modules: a module may lose its adapter, and `model.lora_config` names the
    new ranks. The total of ranks stays.

    Args:
        model: with adapters, its base as it will be trained.
        batches: of ``processor.collate`` or of the loader; gone through as often as convergence needs, so
            a list or another iterable that starts anew each time; a few do. Tokens count where
            ``attention_mask`` (or ``segment_ids``) says so and, unless ``use_label_mask=False``, where there
            is a label; patches count where ``image_segment_ids`` says so.

    Raises:
        ValueError: the model's adapters were not made for EVA, it is cut over devices, there are no batches,
            a rank exceeds the module's input size, or no batch has as many tokens as a module may have ranks.
    """
    config = model.lora_config
    if config is None or config.init_lora_weights != "eva" or config.eva_config is None:
        found = None if config is None else config.init_lora_weights
        raise ValueError(
            f"the model's init_lora_weights is {found!r}; call get_peft_model with "
            "init_lora_weights='eva' first"
        )
    if getattr(model.module, "mesh", None) is not None:
        raise ValueError(
            "EVA looks at a model on one device, and this one is cut over several; call it before "
            "vlmlora.distributed.shard_model"
        )
    table = model.module_table
    specs = [spec for spec, *_ in adapted_modules(model.module, table)]
    components = singular_vectors(model.module, specs, config, batches)
    chosen = [_with_rank(spec, len(components[spec.name]), config) for spec in specs]
    chosen = [each for each in chosen if each.r]
    linears = linear_modules(model.module)
    arrays = {
        each.spec.name: linear_start(
            linears[each.spec.path],
            each,
            config,
            components[each.spec.name],
            np.zeros((each.spec.out_features, each.r), np.float32),
        )
        for each in chosen
    }
    for linear in linears.values():
        linear.adapter = None
    set_adapters(model.module, Selection(table, tuple(chosen)), arrays, dropout=config.lora_dropout)
    model.lora_config = _with_patterns(config, chosen, removed=len(chosen) < len(specs))


def singular_vectors(
    module: nnx.Module, specs: Iterable[LinearSpec], config: LoraConfig, batches: Iterable[Batch]
) -> dict[str, Float[np.ndarray, "r in"]]:
    """The leading singular vectors of the inputs of linear modules, as many as each gets ranks.

    Args:
        module: the model; it stays as it is, and its adapters do not run.
        specs: the modules.
        config: ranks and `eva_config`.
        batches: see `initialize_lora_eva_weights`.

    Raises:
        ValueError: see `initialize_lora_eva_weights`.
    """
    specs, eva = list(specs), config.eva_config or EvaConfig()
    most = {spec.name: round(config.rank_of(spec.name) * eva.rho) for spec in specs}
    for spec in specs:
        if most[spec.name] > spec.in_features:
            raise ValueError(
                f"{spec.name} has {spec.in_features} inputs, but EVA may give it {most[spec.name]} ranks "
                f"(r={config.rank_of(spec.name)} times rho={eva.rho}); lower r or rho"
            )
    taps = _Taps(module, specs, eva)
    taps.run(_first(batches), taps.see_digest)
    leaders = _leaders(specs, taps.digests)
    for name, leader in leaders.items():
        most[leader] = max(most[leader], most[name])
    most = {name: most[leaders[name]] for name in most}
    taps.decompositions = {
        name: IncrementalPCA(most[name]) for name, leader in leaders.items() if name == leader
    }

    budget = sum(config.rank_of(spec.name) for spec in specs)
    ranks = dict(most)
    while True:
        steps = taps.steps
        for batch in batches:
            taps.active = {
                name
                for name, pca in taps.decompositions.items()
                if not pca.has_converged(ranks[name], eva.tau)
            }
            if not taps.active:
                return {
                    name: taps.decompositions[leader].vectors(ranks[name], whiten=eva.whiten)
                    for name, leader in leaders.items()
                }
            taps.run(batch, taps.see_input)
            if all(pca.components is not None for pca in taps.decompositions.values()):
                ranks = _distribute(taps.decompositions, leaders, budget, most)
        if taps.steps == steps:
            name = min(taps.active, key=lambda name: taps.most_rows[name] - most[name])
            raise ValueError(
                f"no batch has as many inputs for {name} (at most {taps.most_rows[name]} that count) as EVA "
                f"may give it ranks ({most[name]}); pass larger batches, use_label_mask=False, or a lower r"
            )


class IncrementalPCA:
    """Principal components of rows that come in batches, as in PEFT (after scikit-learn's class).

    Attributes:
        n_components: how many are kept.
        components: [n_components, features], float32; None before the first batch.
        ratio: the share of the variance that each explains.
    """

    def __init__(self, n_components: int):
        self.n_components = n_components
        self.components: np.ndarray | None = None
        self.singular_values = self.ratio = np.zeros(0)
        self._similarity = np.full(n_components, -np.inf)
        self._seen = 0
        self._mean = self._variance = np.zeros(0)

    def update(self, rows: Float[np.ndarray, "rows features"]) -> None:
        """Take in at least `n_components` rows."""
        count, total = len(rows), self._seen + len(rows)
        mean = rows.mean(axis=0, dtype=np.float64)
        # Sums of squares, scaled by the number of rows.
        scatter = np.square(rows - mean).sum(axis=0)
        if self.components is None:
            stacked, self._mean, self._variance = rows - mean, mean, scatter / total
        else:
            shift = self._mean - mean
            correction = np.sqrt(self._seen / total * count) * shift
            kept = self.singular_values[:, None] * self.components
            stacked = np.concatenate([kept, rows - mean, correction[None]])
            scatter = self._variance * self._seen + scatter + self._seen * count / total * np.square(shift)
            self._mean = (self._mean * self._seen + mean * count) / total
            self._variance = scatter / total
        values, components = _leading_triplets(stacked.astype(np.float32), self.n_components)
        self._seen, before = total, self.components
        self.singular_values, self.components = values, components
        self.ratio = np.square(values) / max(float(self._variance.sum() * total), np.finfo(np.float32).tiny)
        if before is not None:
            self._similarity = (before * components).sum(axis=1)

    def has_converged(self, rank: int, tau: float) -> bool:
        """Whether each of the first `rank` components points where it did one batch before."""
        return bool((self._similarity[:rank] >= tau).all())

    def vectors(self, rank: int, *, whiten: bool) -> Float[np.ndarray, "rank features"]:
        """The first `rank` components, divided by the roots of their singular values if `whiten`."""
        components = self.components[:rank]
        return components / np.sqrt(self.singular_values[:rank, None]) if whiten else components


def _leading_triplets(matrix: Float[np.ndarray, "rows columns"], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right vectors by subspace iteration with twice the vectors, as PEFT has it."""
    q = min(2 * k, *matrix.shape)
    basis = np.linalg.qr(
        matrix @ np.random.default_rng(42).standard_normal((matrix.shape[1], q), np.float32)
    )[0]
    for _ in range(4):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    _, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    # A vector's sign is a matter of choice: its largest element is positive.
    largest = np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1)
    return values[:k], (right * np.sign(largest))[:k]


class _Tap(nnx.Module):
    """In an adapter's place: hands the layer's number and input to `sink`, and adds nothing."""

    def __init__(self, sink: Callable[[jax.Array, jax.Array], None], stack: int | None):
        self.layer = Frozen(jnp.int32(0) if stack is None else jnp.arange(stack, dtype=jnp.int32))
        self.sink = sink

    def __call__(
        self, x: jax.Array, y: jax.Array, *, base: Any, key: PRNGKeyArray | None = None
    ) -> jax.Array:
        # Each input comes with its layer's number, so the order of the calls is free.
        io_callback(self.sink, None, self.layer.get_value(), x, ordered=False)
        return y

    def factors(self, dtype: Any, key: PRNGKeyArray | None) -> None:
        """None: it adds no product."""

    def expand(self, stack: int) -> "_Tap":
        return self

    def prepared(self, dtype: Any) -> "_Tap":
        return self


class _Taps:
    """Runs batches through a model whose chosen modules have taps, and receives what the taps hand over."""

    def __init__(self, module: nnx.Module, specs: Iterable[LinearSpec], eva: EvaConfig):
        self.specs = {(spec.path, spec.layer or 0): spec for spec in specs}
        self.eva = eva
        self.digests: dict[str, bytes] = {}
        self.decompositions: dict[str, IncrementalPCA] = {}
        self.active: set[str] = set()
        self.most_rows: Counter[str] = Counter()
        self.steps = 0
        self._masks: dict[str, np.ndarray | None] = {}
        self._see: Callable[[str, np.ndarray], None] = self.see_digest
        # A copy that shares the model's arrays.
        tapped = nnx.merge(*nnx.split(module))
        tapped_paths = {path for path, _ in self.specs}
        for path, linear in linear_modules(tapped).items():
            linear.adapter = _Tap(self._sink_of(path), linear.stack) if path in tapped_paths else None
        has_head = any(spec.part == "head" for spec in self.specs.values())
        graphdef, self._state = nnx.split(tapped)

        @jax.jit
        def forward(state: Any, batch: Batch) -> jax.Array:
            model = nnx.merge(graphdef, state)
            hidden, _ = model(**model_inputs(batch))
            return jnp.sum(model.logits(hidden) if has_head else hidden)

        self._forward = forward

    def run(self, batch: Batch, see: Callable[[str, np.ndarray], None]) -> None:
        """Run the model; `see` gets the name of every chosen module and its inputs that count."""
        self._see, self._masks = see, _masks(batch, self.eva)
        self._forward(self._state, dict(batch)).block_until_ready()
        jax.effects_barrier()

    def see_digest(self, name: str, rows: np.ndarray) -> None:
        """Remember a number for the inputs, the same for the same inputs."""
        self.digests[name] = hashlib.sha256(np.ascontiguousarray(rows)).digest()

    def see_input(self, name: str, rows: np.ndarray) -> None:
        """Take inputs into the decomposition, where that has not converged and there are enough of them."""
        if name not in self.active:
            return
        self.most_rows[name] = max(self.most_rows[name], len(rows))
        if len(rows) >= self.decompositions[name].n_components:
            self.decompositions[name].update(rows)
            self.steps += 1

    def _sink_of(self, path: str) -> Callable[[jax.Array, jax.Array], None]:
        def sink(layer: jax.Array, x: jax.Array) -> None:
            spec = self.specs.get((path, int(layer)))
            if spec is not None:
                inputs = np.asarray(x)
                counted = _counted(inputs.shape[:-1], self._masks[_kind(spec)])
                self._see(spec.name, inputs[counted].astype(np.float32))

        return sink


def _masks(batch: Batch, eva: EvaConfig) -> dict[str, np.ndarray | None]:
    """Which tokens and which patches of a batch count; None for all."""
    tokens = np.ones(np.shape(batch["input_ids"]), bool)
    if "attention_mask" in batch:
        tokens &= np.asarray(batch["attention_mask"]) > 0
    if "segment_ids" in batch:
        tokens &= np.asarray(batch["segment_ids"]) > 0
    if eva.use_label_mask and "labels" in batch:
        tokens &= np.asarray(batch["labels"]) != eva.label_mask_value
    patches = batch.get("image_segment_ids")
    return {"tokens": tokens, "patches": None if patches is None else np.asarray(patches) > 0}


def _kind(spec: LinearSpec) -> str:
    return "patches" if spec.part in ("vision", "projector") else "tokens"


def _counted(shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """The mask for inputs of leading `shape`, of which one may stand for several patches."""
    rows = int(np.prod(shape))
    if mask is None or mask.size % max(rows, 1):
        return np.ones(shape, bool)
    return mask.reshape(*shape, -1).any(axis=-1)


def _leaders(specs: Iterable[LinearSpec], digests: Mapping[str, bytes]) -> dict[str, str]:
    """Each module's name → that of the first module with the same inputs, whose decomposition it shares."""
    first: dict[bytes, str] = {}
    return {spec.name: first.setdefault(digests[spec.name], spec.name) for spec in specs}


def _distribute(
    decompositions: Mapping[str, IncrementalPCA],
    leaders: Mapping[str, str],
    budget: int,
    most: Mapping[str, int],
) -> dict[str, int]:
    """Ranks for the `budget` components that explain most, each of its own module's variance."""
    names = sorted(leaders, key=lambda name: name != leaders[name])
    ratios = [decompositions[leaders[name]].ratio[: most[name]] for name in names]
    owners = np.repeat(np.arange(len(names)), [len(ratio) for ratio in ratios])
    best = owners[np.argsort(-np.concatenate(ratios), kind="stable")[:budget]]
    counts = dict(zip(names, np.bincount(best, minlength=len(names)).tolist(), strict=True))
    for name, leader in leaders.items():
        # The one whose inputs are decomposed has the highest rank of those that share them.
        if counts[leader] < counts[name]:
            counts[leader], counts[name] = counts[name], counts[leader]
    return counts


def _with_rank(spec: LinearSpec, r: int, config: LoraConfig) -> SelectedModule:
    before, alpha = config.rank_of(spec.name), config.alpha_of(spec.name)
    if r != before and config.eva_config.adjust_scaling_factors:
        alpha *= r / before
    scaling = alpha / (r**0.5 if config.use_rslora else r) if r else 0.0
    return SelectedModule(spec, r, alpha, scaling, vectors=int(config.use_dora))


def _with_patterns(config: LoraConfig, chosen: list[SelectedModule], *, removed: bool) -> LoraConfig:
    """The config with the ranks that modules got, and without those that got none."""
    narrowed = {}
    if removed:
        narrowed = dict.fromkeys(
            ("exclude_modules", "layers_to_transform", "layers_pattern", "finetune_last_n_layers")
        )
        narrowed["target_modules"] = tuple(each.spec.name for each in chosen)
    return replace(
        config,
        rank_pattern={each.spec.name: each.r for each in chosen if each.r != config.r},
        alpha_pattern={
            each.spec.name: each.lora_alpha for each in chosen if each.lora_alpha != config.lora_alpha
        },
        **narrowed,
    )


def _first(batches: Iterable[Batch]) -> Batch:
    if iter(batches) is batches:
        raise ValueError("batches is an iterator, which ends after one pass; pass a list of batches")
    for batch in batches:
        return batch
    raise ValueError("there are no batches to look at; pass at least one")
