"""Train models of known shape on all GPUs of a machine: throughput, scaling, memory, time in collectives.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=200 python -m benchmarks.multi_gpu

The 7B shape runs in NF4 and bfloat16 on one GPU, then data-, fully-sharded- and tensor-parallel on all; the
72B shape in NF4 on all. Scaling is weak: every device brings its own rows, so that a batch has 16k tokens a
device whatever the axis; under ``tensor`` all devices of a group compute on all of these rows together, each
with its part of the features. Scaling of 1 is the tokens a second of one GPU of the same machine, in the same
run, times the number of devices.

The losses and gradient norms of the first steps are compared with those of one GPU for the same rows: it
takes the shares of the devices one after another and steps with their mean gradient. The 72B shape has no run
on one GPU, and nothing to compare with, unless ``--configs 72b-nf4-single`` asks for it.

The layer inputs that ``"unsloth"`` checkpointing keeps in host memory are those of all devices; the 72B shape
under ``tensor`` needs more than XLA's limit of 64 GB, hence the second variable.

Peak memory is the most that JAX's allocator had in use while steps ran; what NCCL allocates for itself is not
in it. Each row is printed and saved as soon as it is there, with the error of a configuration that fails.
Without GPUs, ``--layers``, ``--vision-layers`` and ``--shrink`` make small models, for as many devices as
``XLA_FLAGS=--xla_force_host_platform_device_count=8`` pretends to have.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from transformers import PreTrainedConfig

from benchmarks.flops import training_flops
from benchmarks.memory import sampled_memory
from benchmarks.random_model import random_model
from benchmarks.record import save
from benchmarks.shapes import image_text_batch, join_batches, make_config
from benchmarks.trace import read_program, summarize, trace_steps
from vlmlora.compilation_cache import enable_compilation_cache
from vlmlora.distributed import DATA, FSDP, TENSOR, make_mesh, place_batch, shard_model
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.models.registry import family_of
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.step import TrainState, TrainStep, init_train_state, make_train_step

COMPARED_STEPS = 2
"""Steps whose loss and gradient are compared. The second depends on the gradients of every row."""
LOSS_BOUND = 2**-8
"""Of the relative difference of losses: one unit of bfloat16's last place. Devices add the same products in
another order and round the sums to bfloat16, which moves a logit by that much at most where nothing cancels;
the mean over thousands of labels moves by less."""
NORM_BOUND = 0.02
"""Of the relative difference of gradient norms: every layer's backward pass adds its roundings."""
ADAM_B1 = 0.9


class Configuration(NamedTuple):
    """What is trained, and how.

    Attributes:
        model: a key of `benchmarks.shapes.CONFIGS`.
        quant: how frozen weights are stored.
        axis: of the mesh, on which all devices lie; None for one device.
        steps: that are timed, after the first; with none the traced one is.
    """

    model: str
    quant: str
    axis: str | None
    steps: int


def _configurations() -> dict[str, Configuration]:
    found = {}
    for size, steps in (("7b", 3), ("72b", 0)):
        for label, quant in (("nf4", "nf4"), ("bf16", "none")):
            for axis in (None, DATA, FSDP, TENSOR):
                name = f"{size}-{label}-{axis or 'single'}"
                found[name] = Configuration(f"qwen2_5_vl-{size}", quant, axis, steps)
    return found


CONFIGURATIONS = _configurations()
DEFAULT = (
    *("7b-nf4-single", "7b-nf4-data", "7b-nf4-fsdp", "7b-nf4-tensor"),
    *("7b-bf16-single", "7b-bf16-fsdp", "7b-bf16-data"),
    *("72b-nf4-fsdp", "72b-nf4-tensor"),
)


class Reference(NamedTuple):
    """What one device measured for a model, with which those on many are compared."""

    tokens_per_second: float
    losses: list[float]
    grad_norms: list[float]


def measure(
    configuration: Configuration, arguments: argparse.Namespace, reference: Reference | None
) -> tuple[dict[str, Any], Reference | None]:
    """The row of a configuration, and of one on a single device what the others are compared with."""
    devices = jax.devices()[: arguments.devices]
    config = make_config(
        configuration.model,
        layers=arguments.layers,
        vision_layers=arguments.vision_layers,
        shrink=arguments.shrink,
    )
    used = devices[:1] if configuration.axis is None else devices
    start = time.perf_counter()
    model = _make_model(configuration, config, used, compared=reference is not None)
    FastVisionModel.get_peft_model(model, r=arguments.r, lora_alpha=arguments.r, verbose=False)
    graphdef, adapters, frozen = model.split()
    optimizer = optax.adamw(2e-4, b1=ADAM_B1, weight_decay=0.01)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=arguments.policy), optimizer)
    shares = [
        image_text_batch(config, arguments.rows, arguments.tokens, seed=number)
        for number in range(len(devices))
    ]
    batch = join_batches(config, shares[: len(used)])
    mesh = getattr(model.module, "mesh", None)
    batch = jax.device_put(batch) if mesh is None else place_batch(batch, mesh)
    state = init_train_state(adapters, optimizer)
    jax.block_until_ready(state)
    row: dict[str, Any] = {
        "devices": len(used),
        "rows": arguments.rows * len(used),
        "tokens": arguments.tokens,
        "make_seconds": round(time.perf_counter() - start, 1),
    }

    start = time.perf_counter()
    program = step.lower(state, frozen, batch).compile()
    row["compile_seconds"] = round(time.perf_counter() - start, 1)
    times, losses, norms = [], [], []

    def run(state: TrainState) -> TrainState:
        start = time.perf_counter()
        state, metrics = program(state, frozen, batch, None)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        times.append(time.perf_counter() - start)
        return state

    with sampled_memory(used) as peaks:
        for _ in range(1 + configuration.steps):
            state = run(state)
        events = trace_steps(lambda: run(state)) if arguments.trace or not configuration.steps else ()
    row |= {"losses": losses[:4], "grad_norms": norms[:4], "peak_gib": peaks}
    if events:
        summary = summarize(events, 1, read_program(program.as_text() or ""))
        collective = summary.kinds.get("collective", {"ms": 0.0, "exposed_ms": 0.0})
        row["collective_ms"] = round(collective["ms"], 1)
        row["exposed_collective_ms"] = round(collective["exposed_ms"], 1)
        row["traced_step_ms"] = round(summary.step, 1)
        row["kinds_ms"] = {kind: round(of_kind["ms"], 1) for kind, of_kind in summary.kinds.items()}
    seconds = statistics.median(times[1 : 1 + configuration.steps] or [row["traced_step_ms"] / 1000])
    throughput = arguments.rows * len(used) * arguments.tokens / seconds
    flops = training_flops(config, arguments.rows * len(used), arguments.tokens, arguments.r)
    row |= {
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(throughput),
        "tflops_per_second_and_device": round(flops.total / seconds / 1e12 / len(used), 1),
    }
    if configuration.axis is None:
        losses, norms = accumulated_steps(program, optimizer, adapters, frozen, shares)
        row["compared_losses"], row["compared_grad_norms"] = losses, norms
        return row, Reference(throughput, losses, norms)
    if reference is not None:
        row["scaling"] = round(throughput / reference.tokens_per_second / len(used), 4)
        row |= compare(losses, norms, reference)
    return row, None


def _make_model(
    configuration: Configuration, config: PreTrainedConfig, devices: Sequence[jax.Device], *, compared: bool
) -> FastVisionModel:
    """The model on its devices.

    One that is compared has the weights of the single device's, which are made there and cut; any other has
    its parts drawn where they lie.
    """
    if configuration.axis is None:
        return random_model(config, configuration.quant)
    sizes = {DATA: 1, FSDP: 1, TENSOR: 1, configuration.axis: len(devices)}
    mesh = make_mesh(**sizes, devices=devices)
    if not compared:
        return random_model(config, configuration.quant, mesh=mesh)
    model = random_model(config, configuration.quant)
    shard_model(model.module, family_of(config), mesh)
    return model


def accumulated_steps(
    step: TrainStep | jax.stages.Compiled,
    optimizer: optax.GradientTransformation,
    adapters: Any,
    frozen: Any,
    shares: Sequence[dict[str, Any]],
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of steps on several shares of a batch, by a program that takes one of them.

    A share's gradient is read off Adam's first moment, which after a first step is (1 − b1) times it. The
    shares have equally many labels, so that the gradient of all is their mean.

    Args:
        step: of one share; donates its state.
        optimizer: Adam with `ADAM_B1`.
        adapters: where the steps start.
        frozen: the frozen weights.
        shares: of the batch.
    """

    @jax.jit
    def update(gradients: Any, state: TrainState) -> tuple[TrainState, jax.Array]:
        gradient = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        return TrainState(adapters, opt_state, state.step + 1), optax.tree.norm(gradient)

    state = init_train_state(adapters, optimizer)
    losses, norms = [], []
    for _ in range(COMPARED_STEPS):
        of_shares, gradients = [], []
        for share in shares:
            fresh = init_train_state(state.adapters, optimizer)
            after, metrics = step(fresh, frozen, jax.device_put(share), None)
            of_shares.append(float(metrics["loss"]))
            moments = optax.tree.get(after.opt_state, "mu")
            gradients.append(jax.tree.map(lambda moment: moment / (1 - ADAM_B1), moments))
        state, norm = update(gradients, state)
        losses.append(statistics.fmean(of_shares))
        norms.append(float(norm))
    return losses, norms


def compare(losses: Sequence[float], norms: Sequence[float], reference: Reference) -> dict[str, Any]:
    """Relative differences from the single device's first steps, with the bounds that they should keep."""

    def difference(found: Sequence[float], wanted: Sequence[float]) -> float:
        return max(abs(f - w) / abs(w) for f, w in zip(found, wanted, strict=False))

    of_losses, of_norms = difference(losses, reference.losses), difference(norms, reference.grad_norms)
    return {
        "loss_difference": float(f"{of_losses:.2g}"),
        "loss_bound": LOSS_BOUND,
        "grad_norm_difference": float(f"{of_norms:.2g}"),
        "grad_norm_bound": NORM_BOUND,
        "equals_single": of_losses <= LOSS_BOUND and of_norms <= NORM_BOUND,
    }


def run(arguments: argparse.Namespace, record: Callable[[list[dict[str, Any]]], None]) -> None:
    """Every configuration that the budget allows, each recorded as soon as it is there."""
    begin, rows, references = time.perf_counter(), [], {}
    for name in arguments.configs:
        configuration = CONFIGURATIONS[name]
        row: dict[str, Any] = {"configuration": name, **configuration._asdict()}
        del row["steps"]
        spent = time.perf_counter() - begin
        if spent > arguments.budget:
            row["skipped"] = f"{spent:.0f} s of {arguments.budget:.0f} are spent"
        else:
            key = configuration.model, configuration.quant
            measured, reference = _attempt(configuration, arguments, references.get(key))
            row |= measured
            if reference is not None:
                references[key] = reference
            gc.collect()
        row["elapsed_seconds"] = round(time.perf_counter() - begin, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
        record(rows)


def _attempt(
    configuration: Configuration, arguments: argparse.Namespace, reference: Reference | None
) -> tuple[dict[str, Any], Reference | None]:
    """The row, or what went wrong; none of the configuration's arrays outlives the call."""
    try:
        return measure(configuration, arguments, reference)
    except Exception as error:  # Whatever it is, the other configurations are worth their time.
        return {"error": f"{type(error).__name__}: {error}"[:1000]}, None


def _policy(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else {"True": True, "False": False}.get(text, text)


def main() -> None:
    """Read the arguments, measure, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configs", nargs="+", choices=CONFIGURATIONS, default=DEFAULT, metavar="NAME")
    parser.add_argument("--devices", type=int, help="the first so many; all if left out")
    parser.add_argument("--rows", type=int, default=8, help="of each device")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--policy", type=_policy, default="unsloth", help="of checkpointing")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which none starts")
    parser.add_argument("--no-trace", dest="trace", action="store_false", help="no time in collectives")
    parser.add_argument("--layers", type=int, help="of the language model; all if left out")
    parser.add_argument("--vision-layers", type=int, help="of the vision tower; all if left out")
    parser.add_argument("--shrink", type=int, default=1, help="divides every width")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/multi_gpu.json"))
    arguments = parser.parse_args()
    enable_compilation_cache()
    settings = {
        "policy": arguments.policy,
        "r": arguments.r,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    run(arguments, lambda rows: save(arguments.out, {**settings, "rows": rows}))


if __name__ == "__main__":
    main()
