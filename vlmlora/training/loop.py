"""A loop around the step, with a progress bar."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlmlora.training.step import TrainState, TrainStep


@dataclass
class History:
    """What a run reports.

    Attributes:
        losses: loss of every step.
        tokens: tokens of every step, padding included.
        seconds: wall time of the whole run, compilation included.
        compile_seconds: wall time of the first step.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0


def fit(
    step: TrainStep,
    state: TrainState,
    frozen: PyTree,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    total_steps: int,
    key: PRNGKeyArray | None = None,
    console: Console | None = None,
) -> tuple[TrainState, History]:
    """Take a step for each batch, `total_steps` at most, and show loss, tokens/s and the time left.

    Args:
        step: from `vlmlora.training.step.make_train_step`.
        state: where to start; donated, so use the one that is returned.
        frozen: frozen parameters.
        batches: dicts of host arrays.
        total_steps: steps to take.
        key: for adapter dropout.
        console: where the bar goes; None shows none.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
        ValueError: `batches` held no batch.
    """
    history, start = History(), time.perf_counter()
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task("", total=total_steps, loss=float("nan"), rate=0.0)
        for number, batch in zip(range(total_steps), batches, strict=False):
            state, metrics = step(state, frozen, dict(batch), key)
            loss = float(metrics["loss"])
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of step {number} is {loss}; a lower learning rate may help"
                )
            if number == 0:
                history.compile_seconds = time.perf_counter() - start
            history.losses.append(loss)
            history.tokens.append(int(np.size(batch["input_ids"])))
            steady = max(time.perf_counter() - start - history.compile_seconds, 1e-9)
            rate = sum(history.tokens[1:]) / steady if number else 0.0
            progress.update(task, advance=1, loss=loss, rate=rate)
    if not history.losses:
        raise ValueError("there was no batch to train on")
    jax.block_until_ready(state.adapters)
    history.seconds = time.perf_counter() - start
    return state, history
