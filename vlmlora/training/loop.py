"""A loop around the step, with a progress bar."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlmlora.data.loader import prefetch
from vlmlora.training.state import Checkpoints, Resumed
from vlmlora.training.step import TrainState, TrainStep


@dataclass
class History:
    """What a run reports.

    Attributes:
        losses: loss of every step.
        tokens: tokens of every step, padding included.
        seconds: wall time of the whole run, compilation included.
        compile_seconds: wall time of the first step.
        first_step: steps that were taken before this run went on.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    first_step: int = 0


def fit(
    step: TrainStep,
    state: TrainState,
    frozen: PyTree,
    batches: Iterable[Mapping[str, np.ndarray | jax.Array]],
    *,
    total_steps: int,
    key: PRNGKeyArray | None = None,
    console: Console | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
) -> tuple[TrainState, History]:
    """Take a step for each batch, `total_steps` at most, and show loss, tokens/s and the time left.

    Args:
        step: from `vlmlora.training.step.make_train_step`.
        state: where to start; donated, so use the one that is returned.
        frozen: frozen parameters.
        batches: dicts of arrays. What can be sliced, as `make_batches` returns it, resumes without reading
            the batches before; so does an iterator of grain, such as `prefetch` makes.
        total_steps: steps of the whole run, those before it was resumed included.
        key: for adapter dropout.
        console: where the bar goes; None shows none. Of several processes the first shows it.
        checkpoints: where the state is saved, every so many steps and at the end.
        resume: go on from the latest checkpoint if there is one: with its state and key, and the batch after
            its last. A run so continued is bit for bit the one that was not interrupted, on the same devices.

    Raises:
        StepTooLargeError: the step does not fit the device; nothing was trained.
        FloatingPointError: the loss is not finite; the message names the step.
        ValueError: `batches` held no batch; or `resume` without `checkpoints`, or with those of another run.
        FileExistsError: `checkpoints` holds some already, and `resume` is False.
    """
    resumed = _resumed(state, checkpoints, resume)
    if resumed is not None:
        state, key = resumed.state, resumed.key
    first = 0 if resumed is None else resumed.position
    history, start = History(first_step=first), time.perf_counter()
    if first >= total_steps:
        return state, history
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    iterator = _iterate(batches, resumed)
    state_of = None if _is_sliceable(batches) else getattr(iterator, "get_state", None)
    silent = console is None or jax.process_index() > 0
    with Progress(*columns, console=console, disable=silent) as progress:
        task = progress.add_task("", total=total_steps, completed=first, loss=float("nan"), rate=0.0)
        for number, batch in zip(range(first, total_steps), iterator, strict=False):
            state, metrics = step(state, frozen, dict(batch), key)
            loss = float(metrics["loss"])
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of step {number} is {loss}; a lower learning rate may help"
                )
            if number == first:
                history.compile_seconds = time.perf_counter() - start
            history.losses.append(loss)
            history.tokens.append(int(np.size(batch["input_ids"])))
            steady = max(time.perf_counter() - start - history.compile_seconds, 1e-9)
            rate = sum(history.tokens[1:]) / steady if number > first else 0.0
            progress.update(task, advance=1, loss=loss, rate=rate)
            if checkpoints is not None and checkpoints.due(number + 1):
                _save(checkpoints, state, key, number + 1, state_of)
    if not history.losses:
        raise ValueError("there was no batch to train on")
    if checkpoints is not None:
        last = first + len(history.losses)
        if not checkpoints.due(last):
            _save(checkpoints, state, key, last, state_of)
        checkpoints.wait()
    jax.block_until_ready(state.adapters)
    history.seconds = time.perf_counter() - start
    return state, history


def _resumed(state: TrainState, checkpoints: Checkpoints | None, resume: bool) -> Resumed | None:
    if checkpoints is None:
        if resume:
            raise ValueError("resume=True needs checkpoints, the place of those to go on from")
        return None
    if not checkpoints.steps:
        return None
    if not resume:
        raise FileExistsError(
            f"{checkpoints.directory} holds checkpoints up to step {checkpoints.steps[-1]}; "
            "pass resume=True to go on from there, or choose another directory"
        )
    return checkpoints.restore(state)


def _iterate(batches: Iterable[Mapping[str, Any]], resumed: Resumed | None) -> Iterator[Mapping[str, Any]]:
    """The batches that are still to be taken."""
    if resumed is not None and _is_sliceable(batches):
        batches, resumed = batches[resumed.position :], None
    if hasattr(batches, "to_iter_dataset"):
        # Grain's own iterator would make hundreds of batches ahead.
        return iter(prefetch(batches))
    iterator = iter(batches)
    if resumed is None:
        return iterator
    if resumed.iterator_state is not None and hasattr(iterator, "set_state"):
        iterator.set_state(resumed.iterator_state)
        return iterator
    return islice(iterator, resumed.position, None)


def _is_sliceable(batches: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a batch can be had without those before it."""
    return hasattr(batches, "__getitem__") and hasattr(batches, "__len__")


def _save(
    checkpoints: Checkpoints,
    state: TrainState,
    key: PRNGKeyArray | None,
    position: int,
    state_of: Callable[[], Any] | None,
) -> None:
    iterator_state = None if state_of is None else state_of()
    checkpoints.save(state, key=key, position=position, iterator_state=iterator_state)
