"""Gradient checkpointing chosen by memory: the least work that fits a device.

For each tower there are some sets of values that are worth saving. Their memory and the work that they spare
are read from traces of the loss, which compile nothing. The cheapest choice that should fit is compiled, and
the compiler's own account decides; the next cheapest follows as long as it does not fit.
"""

import gc
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

import vlmlora
from vlmlora.compilation_cache import cache_directory
from vlmlora.distributed import mesh_of
from vlmlora.nn.attention import ATTENTION_OUTPUT, QKV
from vlmlora.nn.low_rank import LOW_RANK, MLP_LOW_RANK
from vlmlora.nn.mlp import MLP_GATE, MLP_UP
from vlmlora.nn.stack import ATTENTION_RESIDUAL, LAYER_INPUT
from vlmlora.quantization.sharded import batch_shards
from vlmlora.training.memory import GradientCost, gradient_cost
from vlmlora.training.remat import (
    AUTO,
    SPARE,
    CheckpointedLoss,
    GradientCheckpointing,
    has_auto,
    has_pinned_host,
    name_of_policy,
    policy_by_part,
)

logger = logging.getLogger(__name__)

ATTENTION_SETS = tuple(
    dict.fromkeys((ATTENTION_OUTPUT, QKV, ATTENTION_RESIDUAL)[:count], "save") for count in range(4)
)
"""What may be saved of a layer's attention. A byte of its output spares the most work, in long rows by far;
one of each projection spares as much as one of any other."""
MLP_SETS = tuple(
    dict.fromkeys((MLP_LOW_RANK, MLP_UP, MLP_GATE, LOW_RANK)[:count], "save") for count in (0, 1, 2, 4)
)
"""What may be saved of a layer's feed-forward block; with all of it, the other low-rank products too."""
INPUTS_AND_SPARE = {LAYER_INPUT: "offload"} | dict.fromkeys(ATTENTION_SETS[-1], SPARE)
"""What may go to the host: layer inputs, and what of attention leaves beside a layer's work."""
ALL = ATTENTION_SETS[-1] | MLP_SETS[-1]
"""What leaves no product with a base weight to compute again."""

OFFLOAD_FLOPS_PER_BYTE = 16_000
"""Floating-point operations in the time in which a byte goes to pinned host memory and comes back: on an
H100 the layer inputs of 16,384 tokens, 3.3 GB, took 87 ms in a step that runs at some 600 TFLOP/s."""

MORE_MEMORY = (
    "XLA_PYTHON_CLIENT_MEM_FRACTION=.95 in the environment lets JAX take 95 % of a GPU's memory, not 75 %"
)

MARGIN = 0.02
"""Share of a device's memory that a choice leaves to the allocator's gaps."""

# A choice stays good until this much more memory is there than when it was made.
_SAME = 0.05
_FORMAT = 6
# Of the available memory, that a policy may fill which is named but not compiled.
_SAFE_SHARE = 0.95


class StepTooLargeError(MemoryError):
    """A training step needs more memory than there is."""


@dataclass(frozen=True)
class Program:
    """A compiled training step.

    Attributes:
        policy: the policy that it was compiled with; None: the loss is a function that has none.
        step: the compiled function.
        needed: bytes that it takes on a device, its arguments included; None where the compiler does not say.
    """

    policy: GradientCheckpointing | None
    step: Any
    needed: int | None


@dataclass(frozen=True)
class Candidate:
    """A policy that might be taken.

    Attributes:
        policy: of each part.
        memory: bytes that the step should take on a device.
        work: floating-point operations of its products, transfers to the host counted as such.
    """

    policy: dict[str, GradientCheckpointing]
    memory: int
    work: int


def bytes_of_program(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a program takes on one device: arguments, results and temporaries; None: unknown."""
    try:
        found = compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        logger.info("the compiler does not say what memory the step takes: %s", error)
        return None
    if found is None or not found.argument_size_in_bytes:
        return None
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def available_bytes(arguments: PyTree, memory_budget: int | None) -> int | None:
    """Bytes that a program may take on a device, its arguments included; None where there is no limit.

    It is the allocator's limit without what others hold; of several devices and processes the least.

    Args:
        arguments: what the program is called with.
        memory_budget: goes before the devices' own limit.
    """
    found = memory_budget
    if found is None:
        # What only reference cycles hold is free.
        gc.collect()
        mine = [a for a in jax.tree.leaves(arguments) if isinstance(a, jax.Array)]
        devices = {device for array in mine for device in array.sharding.addressable_devices}
        free = [
            _free_bytes(device, device.memory_stats(), mine) for device in devices or jax.local_devices()[:1]
        ]
        found = None if None in free else min(free)
    if jax.process_count() > 1:
        of_all = multihost_utils.process_allgather(np.float64(np.inf if found is None else found))
        found = None if np.isinf(np.min(of_all)) else int(np.min(of_all))
    return found


def _free_bytes(
    device: jax.Device, stats: Mapping[str, int] | None, arguments: list[jax.Array]
) -> int | None:
    if not stats or "bytes_limit" not in stats:
        return None
    mine = sum(
        shard.data.nbytes
        for array in arguments
        for shard in array.addressable_shards
        if shard.device == device
    )
    others = max(0, stats.get("bytes_in_use", 0) - mine)
    return stats["bytes_limit"] - others


def choose(
    loss: CheckpointedLoss,
    arguments: tuple[Any, ...],
    compile_with: Callable[[GradientCheckpointing], Program],
    available: int | None,
    *,
    description: Mapping[str, Any],
) -> tuple[Program, str]:
    """The program of the cheapest policy that fits, and a sentence that says so.

    Args:
        loss: with a policy that leaves something to choose.
        arguments: state, frozen parameters, batch and key, as the step takes them.
        compile_with: compiles the step with a policy.
        available: see `available_bytes`.
        description: what the choice depends on beside the shapes of `arguments`, for its cache.

    Raises:
        StepTooLargeError: no policy fits.
    """
    key = _cache_key(loss.gradient_checkpointing, arguments, available is None, description)
    if (known := _read(key, available)) is not None:
        program = compile_with(known)
        if fits(program, available):
            return program, f"{_summary(program, arguments, available)}. It was chosen in an earlier run"
    planner = Planner(loss, arguments)
    tried: list[Program] = []
    excess = 0
    while True:
        candidate = planner.cheapest(available, excess)
        if candidate is None:
            # Nothing should fit; the compiler has the last word on what needs the least.
            candidate = min(planner.candidates(), key=lambda each: each.memory)
            if any(each.policy == candidate.policy for each in tried):
                break
        program = compile_with(candidate.policy)
        if fits(program, available):
            _write(key, program, available)
            summary = _summary(program, arguments, available)
            return program, f"{summary} ({_gib(candidate.memory)} predicted), {planner.repeated(candidate)}"
        tried.append(program)
        # The traces were wrong by this much; a policy that needs as much is no candidate any more.
        excess = max(excess, program.needed - candidate.memory, available + 1 - candidate.memory)
    raise too_large(min(tried, key=lambda each: each.needed), arguments, available)


def fits(program: Program, available: int | None) -> bool:
    """Whether a program finds the memory that it needs."""
    return available is None or program.needed is None or program.needed <= available


def too_large(
    program: Program, arguments: tuple[Any, ...], available: int, planner: "Planner | None" = None
) -> StepTooLargeError:
    """The error that says what a program needs, what there is, and what would fit.

    Args:
        program: what does not fit.
        arguments: state, frozen parameters, batch and key.
        available: see `available_bytes`.
        planner: of the same loss with ``"auto"``, to look for a policy that fits; None: there is none.
    """
    state, frozen, batch, _ = arguments
    held = {"frozen weights": frozen, "adapters and optimizer": state, "batch": batch}
    held = {name: _bytes_on_a_device(tree) for name, tree in held.items()}
    fixed = sum(held.values())
    parts = held | {"activations and temporaries": program.needed - fixed}
    listed = ", ".join(f"{_gib(size)} {name}" for name, size in sorted(parts.items(), key=lambda p: -p[1]))
    hints = []
    if planner is not None:
        excess = max(0, program.needed - planner.cost(program.policy).memory)
        # Another policy's trace may be wrong by somewhat more, and nobody compiles this one.
        if (best := planner.cheapest(int(_SAFE_SHARE * available), excess)) is not None:
            hints.append(
                f"gradient_checkpointing={name_of_policy(best.policy)} should fit, with "
                f"{_gib(best.memory + excess)} ('auto' finds it)"
            )
    rows, shards = _rows(batch), _shards(arguments)
    if rows and fixed < available:
        fitting = int(rows * (available - fixed) / (program.needed - fixed)) // shards * shards
        if fitting:
            hints.append(f"with this policy some {fitting} of the {rows} rows should fit")
    hints.append(MORE_MEMORY)
    named = "" if program.policy is None else f" with gradient_checkpointing={name_of_policy(program.policy)}"
    return StepTooLargeError(
        f"a training step of {_work(batch)}{named} needs {_gib(program.needed)} on a device, and "
        f"{_gib(available)} are available. It takes {listed}. Nothing was trained. {'; '.join(hints)}"
    )


class Planner:
    """Memory and work of policies, from traces.

    What the towers' policies and the halves of a layer cost adds up, so a trace for each of the sets does.

    Attributes:
        held: bytes of the step's arguments on a device.

    Args:
        loss: its policy says which parts have a choice.
        arguments: state, frozen parameters, batch and key, as the step takes them.
    """

    def __init__(self, loss: CheckpointedLoss, arguments: tuple[Any, ...]):
        self._loss = loss
        self._state, self._frozen, self._batch, self._key = arguments
        self._shards = _shards(arguments)
        self.held = sum(map(_bytes_on_a_device, arguments[:3]))
        self._traced: dict[str, np.ndarray] = {}
        self._parts = policy_by_part(loss.gradient_checkpointing)
        self._largest = self._largest_of_loss = 0
        self._everything = self._trace(False)

    def cheapest(self, available: int | None, excess: int = 0) -> Candidate | None:
        """The candidate that repeats the least work among those that should fit; None where there is none.

        Args:
            available: see `available_bytes`.
            excess: bytes that a step needs beyond what its trace says.
        """

        def should_fit(candidate: Candidate) -> bool:
            return available is None or candidate.memory + excess <= available

        # That everything fits shows without the other traces.
        if should_fit(most := self.cost(self._given(ALL))):
            return most
        fitting = filter(should_fit, self.candidates())
        return min(fitting, key=lambda each: (each.work, each.memory), default=None)

    def candidates(self) -> Iterator[Candidate]:
        """Every policy that may be taken."""
        base = self._trace(self._given({}))
        nothing = np.zeros_like(base)
        choices = [
            self._choices(part, base) if given == AUTO else [(given, nothing)]
            for part, given in self._parts.items()
        ]
        for chosen in itertools.product(*choices):
            policy = {part: each for part, (each, _) in zip(self._parts, chosen, strict=True)}
            yield self._candidate(policy, base + sum(more for _, more in chosen))

    def cost(self, policy: GradientCheckpointing) -> Candidate:
        """What a policy costs by its own trace."""
        return self._candidate(policy_by_part(policy), self._trace(policy))

    def repeated(self, candidate: Candidate) -> str:
        """How much work a candidate repeats, in words."""
        least = self._everything[2]
        return f"{100 * (candidate.work - least) / least:.0f} % more work than without checkpointing"

    def _given(self, policy: GradientCheckpointing) -> dict[str, GradientCheckpointing]:
        """A policy for those parts that have none yet."""
        return {part: policy if each == AUTO else each for part, each in self._parts.items()}

    def _choices(self, part: str, base: np.ndarray) -> list[tuple[dict[str, str], np.ndarray]]:
        """Policies of a part, and what each costs beyond computing all again."""

        def more(places: Mapping[str, str]) -> np.ndarray:
            return self._trace(self._given({}) | {part: places}) - base

        def costs(sets: Sequence[dict[str, str]]) -> list[tuple[dict[str, str], np.ndarray]]:
            # Where all of it changes nothing, as in a tower that does not run, neither does a part.
            largest = more(sets[-1])
            return [(places, more(places) if largest.any() else largest) for places in sets]

        attention = costs(ATTENTION_SETS)
        layers = list(itertools.product(costs(({},)), attention))
        if has_pinned_host():
            (_, of_inputs), (_, of_more) = inputs = costs(({LAYER_INPUT: "offload"}, INPUTS_AND_SPARE))
            # What goes to the host beside the inputs takes no time, or it does not go.
            of_more[1] = of_inputs[1]
            layers += [*itertools.product(inputs[:1], attention), (inputs[1], attention[0])]
        several = [(*each, mlp) for each in layers for mlp in costs(MLP_SETS)]
        return [(a | b | c, cost_a + cost_b + cost_c) for (a, cost_a), (b, cost_b), (c, cost_c) in several]

    def _trace(self, policy: GradientCheckpointing) -> np.ndarray:
        """Bytes on the device, on the host, work, bytes that no scan leaves, and of a step of each scan."""
        name = name_of_policy(policy)
        if name not in self._traced:
            loss = self._loss.with_checkpointing(policy)
            found = gradient_cost(loss, self._state.adapters, self._frozen, self._batch, self._key)
            self._largest = max(self._largest, found.products.largest)
            self._largest_of_loss = max(self._largest_of_loss, found.products.largest_in_while)
            self._traced[name] = _as_array(found)
        return self._traced[name]

    def _candidate(self, policy: dict[str, GradientCheckpointing], cost: np.ndarray) -> Candidate:
        device, host, flops, passing, *layers = cost.tolist()
        # A layer that is computed again lies there whole; so does the largest product with its gradient. But
        # with the loss's product lies what the end of the decoder leaves, which is gone by then.
        again = max((a - b for a, b in zip_longest(self._everything[4:], layers, fillvalue=0)), default=0)
        in_layers = device - passing + max(again, 2 * 4 * self._largest)
        activations = max(in_layers, device + 2 * 4 * self._largest_of_loss)
        memory = self.held + round(activations / self._shards)
        return Candidate(policy, memory, round(flops + OFFLOAD_FLOPS_PER_BYTE * host))


def _as_array(cost: GradientCost) -> np.ndarray:
    return np.array([cost.saved.device, cost.saved.host, cost.products.flops, cost.passing, *cost.layers])


def _bytes_on_a_device(tree: PyTree) -> int:
    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return int(np.prod(shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _shards(arguments: tuple[Any, ...]) -> int:
    mesh = mesh_of(arguments[0])
    return 1 if mesh is None else batch_shards(mesh)


def _rows(batch: Any) -> int | None:
    return batch["input_ids"].shape[0] if isinstance(batch, Mapping) and "input_ids" in batch else None


def _work(batch: Any) -> str:
    if _rows(batch) is None:
        return "this batch"
    rows, tokens = batch["input_ids"].shape
    return f"{rows} rows of {tokens:,} tokens"


def _summary(program: Program, arguments: tuple[Any, ...], available: int | None) -> str:
    limit = "there is no limit" if available is None else f"{_gib(available)} are available"
    needed = "an unknown amount" if program.needed is None else _gib(program.needed)
    return (
        f"gradient_checkpointing={name_of_policy(program.policy)} chosen for {_work(arguments[2])}. The step "
        f"takes {needed} on a device, where {limit}"
    )


def _gib(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def _cache_key(
    policy: GradientCheckpointing, arguments: tuple[Any, ...], is_unlimited: bool, more: Mapping[str, Any]
) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(arguments)
    shapes = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)} "
        f"{getattr(getattr(leaf, 'sharding', None), 'spec', '')}"
        for path, leaf in leaves
    ]
    mesh = mesh_of(arguments[0])
    return {
        "format": _FORMAT,
        "policy": name_of_policy(policy),
        "arrays": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "mesh": None if mesh is None else dict(mesh.shape),
        "device": jax.devices()[0].device_kind,
        "is_unlimited": is_unlimited,
        "versions": {"vlmlora": vlmlora.__version__, "jax": jax.__version__},
        **more,
    }


def _file(key: Mapping[str, Any]) -> Path | None:
    # Processes that read different choices would wait for each other for ever.
    directory = cache_directory()
    if directory is None or jax.process_count() > 1:
        return None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return directory / "policies" / f"{digest}.json"


def _read(key: Mapping[str, Any], available: int | None) -> dict[str, Any] | None:
    """The policy that was chosen before; None where there is none, or it was chosen for less memory."""
    file = _file(key)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text())
        if found["key"] != dict(key):
            return None
        if available is not None and not found["needed"] <= available <= found["available"] * (1 + _SAME):
            return None
        return None if has_auto(found["policy"]) else policy_by_part(found["policy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(key: Mapping[str, Any], program: Program, available: int | None) -> None:
    file = _file(key)
    if file is None or any(map(callable, program.policy.values())):
        return
    entry = {"key": key, "policy": program.policy, "available": available, "needed": program.needed}
    whole = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(json.dumps(entry))
        whole.replace(file)
    except OSError as error:
        logger.warning("the choice of gradient checkpointing was not kept: %s", error)
