"""One optimizer step as one compiled program, which is known to fit before it runs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree
from rich.console import Console

from vlmlora.distributed import mesh_of, place_batch, replicate_unplaced
from vlmlora.training.auto import (
    MARGIN,
    Planner,
    Program,
    available_bytes,
    bytes_of_program,
    choose,
    fits,
    too_large,
)
from vlmlora.training.loss import LossFn
from vlmlora.training.remat import (
    AUTO,
    CheckpointedLoss,
    GradientCheckpointing,
    has_auto,
    is_own,
    keeps_on_host,
    name_of_policy,
    policy_by_part,
    saves_values,
)
from vlmlora_kernels.compilation import kernels_compiled_beside


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["adapters", "opt_state", "step"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
        adapters: trainable parameters.
        opt_state: the optimizer's state for them.
        step: steps taken, int32 [] (or what stands for it while JAX handles the tree).
    """

    adapters: PyTree
    opt_state: PyTree
    step: PyTree


Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def init_train_state(
    adapters: PyTree, optimizer: optax.GradientTransformation, *, donate: bool = False
) -> TrainState:
    """The state before the first step. On a mesh, the optimizer's moments are cut as the parameters are.

    Args:
        adapters: what will be trained, from ``model.split()``.
        optimizer: any optax transformation.
        donate: take the arrays of `adapters` themselves, which saves the memory of a second copy. The first
            step frees them, and the model is without until ``model.update(state.adapters)``. By default they
            are copied, since a step donates its state, and the model keeps its own.
    """
    if not donate:
        adapters = jax.tree.map(jnp.copy, adapters)
    opt_state, step = optimizer.init(adapters), jnp.int32(0)
    if (mesh := mesh_of(adapters)) is not None:
        # Moments lie where their parameters do; counters have no place yet.
        opt_state, step = replicate_unplaced((opt_state, step), mesh)
    return TrainState(adapters, opt_state, step)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    memory_budget: int | None = None,
    verbose: bool = True,
) -> TrainStep:
    """``state, metrics = step(state, frozen, batch, key=None)``, jitted, the old state donated.

    The first call with a batch of new shapes compiles the step and compares the memory that the compiler says
    it takes with what the device has left, before anything runs. If the loss leaves its gradient
    checkpointing to be chosen (``"auto"``), that call chooses the policy that repeats the least work among
    those that fit, see `vlmlora.training.auto`, and keeps the choice in the user's cache directory for the
    next run.

    Args:
        loss_fn: from `vlmlora.training.loss.make_loss_fn`.
        optimizer: any optax transformation.
        memory_budget: bytes that the step may take on a device, weights included. None: what JAX's allocator
            has left, by default 75 % of a GPU's memory; on a CPU there is no limit.
        verbose: print which policy was chosen.

    Returns:
        The step. Its metrics are ``loss`` (before the update) and ``grad_norm``, float32 scalars on the
        device. `key` drives adapter dropout; each step folds its number in. If the state lies on a mesh, the
        rows of a batch of host arrays are put on its devices, and the new state lies as the old one.

    Raises:
        StepTooLargeError: when the step is called and does not fit; a `MemoryError` that says what is needed,
            what there is, and what would fit. The state is as it was.
        ValueError: a `memory_budget` below 1; or when the step is called on a mesh with a batch whose rows do
            not divide among its devices.
    """
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget={memory_budget}: it must be at least 1 byte")

    def step_of(loss_fn: LossFn) -> TrainStep:
        def step(
            state: TrainState,
            frozen: PyTree,
            batch: Mapping[str, jax.Array],
            key: PRNGKeyArray | None = None,
        ) -> tuple[TrainState, Metrics]:
            step_key = None if key is None else jax.random.fold_in(key, state.step)
            loss, grads = jax.value_and_grad(loss_fn)(state.adapters, frozen, batch, key=step_key)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
            adapters = optax.apply_updates(state.adapters, updates)
            metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
            return TrainState(adapters, opt_state, state.step + 1), metrics

        return step

    return _Step(loss_fn, step_of, memory_budget, verbose)


def choose_policy(
    loss_fn: CheckpointedLoss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: PyTree,
    batch: Mapping[str, Any],
    key: PRNGKeyArray | None = None,
    *,
    memory_budget: int | None = None,
    verbose: bool = True,
) -> dict[str, Any]:
    """The policy that ``"auto"`` stands for with such a batch, for training loops that make their own step.

    It is chosen by compiling the step of `make_train_step`; give it to `make_loss_fn`.

    Args:
        loss_fn: from ``make_loss_fn(graphdef, gradient_checkpointing="auto")``.
        optimizer: as for `make_train_step`.
        state: the step's arguments, which are left as they are.
        frozen: likewise.
        batch: likewise.
        key: likewise.
        memory_budget: as for `make_train_step`.
        verbose: as for `make_train_step`.

    Returns:
        A policy for each part, see `vlmlora.training.remat.tower_remats`.

    Raises:
        StepTooLargeError: no policy fits.
    """
    step = make_train_step(loss_fn, optimizer, memory_budget=memory_budget, verbose=verbose)
    return policy_by_part(step.policy(state, frozen, batch, key))


_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL"
_COMPILER_OPTIONS = {
    # Triton's products want other widths than those of low-rank products, and pad, which copies whole arrays.
    "xla_gpu_enable_triton_gemm": False,
    # Products of one array stay apart: joined, as XLA would have the smaller ones, their weights would be
    # copied to be beside each other, and what they give to be apart again.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # Time the algorithms of a product, but do not compare their results: that takes more copies of the
    # head's, which made the peak of the whole process (7B, 4 × 1024 tokens: 8.04 GiB instead of 7.68).
    "xla_gpu_autotune_level": 2,
    # What is computed again is for the policy to say, not for XLA, which would begin where three quarters of
    # the memory are used. (Percent of the 80 % of the device that it counts with.)
    "xla_gpu_memory_limit_slop_factor": 120,
    # Copies of saved values, to and from host memory too, overlap the computation: they run on streams of
    # their own, of which XLA has none by default.
    "xla_gpu_executable_num_compute_streams": 4,
    # CUDA graphs hold what is computed between those copies. Not the loops, for within a graph XLA has one
    # stream; but conditionals, which would fetch their index over the link that a layer's input fills.
    "xla_gpu_enable_command_buffer": _GRAPHS,
}
_WITHOUT_HOST = {
    # Kernels and products that read or write their part of a stack are in the graphs too, where nothing goes
    # to host memory: beside such copies they made a step 8 % slower (7B, 4 × 1024 and 8 × 2048 tokens).
    "xla_gpu_enable_command_buffer": f"{_GRAPHS},DYNAMIC_SLICE_FUSION",
}
_SAVING = {
    # What does not wait for each other in a graph runs beside each other: the next weight may decode while
    # the last blocks of a product run. It takes 2 % less time at 4 × 1024 tokens, as long at 8 × 2048, and
    # 0.5 to 1.0 GiB more (7B), which is little beside the values that such a step saves.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
# `scan_in_place` sends and fetches values in the step before they are needed. In other scans XLA does, and
# in this one it would once more.
_PLAIN_SCANS = {"xla_gpu_enable_pipelined_host_offloading": True}


def _compiler_options(loss_fn: LossFn, mesh: Mesh | None) -> dict[str, Any]:
    """Of a step with this loss; where it does not say where it keeps values, as if some were on the host."""
    is_known = isinstance(loss_fn, CheckpointedLoss)
    on_host = not is_known or keeps_on_host(loss_fn.gradient_checkpointing)
    if mesh is None and not on_host:
        saving = _SAVING if saves_values(loss_fn.gradient_checkpointing) else {}
        return _COMPILER_OPTIONS | _WITHOUT_HOST | saving
    is_plain = mesh is not None or not is_known or is_own(loss_fn.gradient_checkpointing)
    return _COMPILER_OPTIONS | (_PLAIN_SCANS if is_plain else {})


class _Step:
    """A step, compiled once for every shape of its arguments and every way in which they lie on a mesh."""

    def __init__(
        self,
        loss_fn: LossFn,
        step_of: Callable[[LossFn], TrainStep],
        memory_budget: int | None,
        verbose: bool,
    ):
        self._loss_fn = loss_fn
        self._step_of = step_of
        self._memory_budget = memory_budget
        self._verbose = verbose
        self._step = step_of(loss_fn)
        self._jitted: dict[Any, Any] = {}
        self._programs: dict[Any, Program] = {}

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: Mapping[str, Any], key: PRNGKeyArray | None = None
    ) -> tuple[TrainState, Metrics]:
        """The new state and the metrics."""
        arguments = self._place(state, frozen, batch, key)
        return self._program(arguments).step(*arguments)

    def lower(
        self, state: TrainState, frozen: PyTree, batch: Mapping[str, Any], key: PRNGKeyArray | None = None
    ) -> jax.stages.Lowered:
        """The step's program for these arguments, as ``jax.jit(...).lower``."""
        arguments = self._place(state, frozen, batch, key)
        loss_fn = self._loss_fn
        if self._is_open:
            loss_fn = loss_fn.with_checkpointing(self._program(arguments).policy)
        return self._jit(loss_fn, state).lower(*arguments)

    def policy(
        self, state: TrainState, frozen: PyTree, batch: Mapping[str, Any], key: PRNGKeyArray | None = None
    ) -> GradientCheckpointing | None:
        """The policy of the step for these arguments, which is compiled; nothing runs."""
        return self._program(self._place(state, frozen, batch, key)).policy

    def _place(
        self, state: TrainState, frozen: PyTree, batch: Mapping[str, Any], key: PRNGKeyArray | None
    ) -> tuple[TrainState, PyTree, Mapping[str, Any], PRNGKeyArray | None]:
        mesh = mesh_of(state)
        return state, frozen, batch if mesh is None else place_batch(batch, mesh), key

    def _program(self, arguments: tuple[Any, ...]) -> Program:
        leaves, structure = jax.tree.flatten(arguments)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            # Inside another program, which alone is compiled.
            return Program(None, self._jit(self._loss_fn, arguments[0]), None)
        of_leaves = tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
        if (structure, of_leaves) not in self._programs:
            self._programs[structure, of_leaves] = self._compile_what_fits(arguments)
        return self._programs[structure, of_leaves]

    @property
    def _is_open(self) -> bool:
        """Whether there is a policy to be chosen."""
        return isinstance(self._loss_fn, CheckpointedLoss) and has_auto(self._loss_fn.gradient_checkpointing)

    def _compile_what_fits(self, arguments: tuple[Any, ...]) -> Program:
        available = available_bytes(arguments[:3], self._memory_budget)
        if self._is_open:
            if available is not None and self._memory_budget is None:
                available = int(available * (1 - MARGIN))

            def compile_with(policy: GradientCheckpointing) -> Program:
                return self._compile(self._loss_fn.with_checkpointing(policy), arguments)

            program, message = choose(
                self._loss_fn,
                arguments,
                compile_with,
                available,
                description={"memory_budget": self._memory_budget},
            )
            if self._verbose and jax.process_index() == 0:
                Console().print(message, highlight=False, soft_wrap=True)
            return program
        program = self._compile(self._loss_fn, arguments)
        if not fits(program, available):
            planner = None
            if isinstance(self._loss_fn, CheckpointedLoss):
                planner = Planner(self._loss_fn.with_checkpointing(AUTO), arguments)
            raise too_large(program, arguments, available, planner)
        return program

    def _compile(self, loss_fn: LossFn, arguments: tuple[Any, ...]) -> Program:
        # The program itself is what runs. jit would compile it again for the second step: what a program with
        # copies to host memory returns is committed to its device, and what it was given first need not be.
        lowered = self._jit(loss_fn, arguments[0]).lower(*arguments)
        with kernels_compiled_beside(lowered):
            program = lowered.compile()
        policy = loss_fn.gradient_checkpointing if isinstance(loss_fn, CheckpointedLoss) else None
        return Program(policy, program, bytes_of_program(program))

    def _jit(self, loss_fn: LossFn, state: TrainState) -> Any:
        """The step as a jitted function; on a mesh the new state lies as the old one."""
        is_given = loss_fn is self._loss_fn
        policy = None if is_given else name_of_policy(loss_fn.gradient_checkpointing)
        mesh, where = mesh_of(state), {}
        if mesh is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            where = {"out_shardings": (shardings, NamedSharding(mesh, PartitionSpec()))}
        key = policy, None if mesh is None else (jax.tree.structure(state), *jax.tree.leaves(shardings))
        if key not in self._jitted:
            self._jitted[key] = jax.jit(
                self._step if is_given else self._step_of(loss_fn),
                donate_argnums=0,
                compiler_options=_compiler_options(loss_fn, mesh),
                **where,
            )
        return self._jitted[key]
