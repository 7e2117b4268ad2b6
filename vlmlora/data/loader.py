"""Batches of a dataset, in an order that a seed fixes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmlora.data.packing import RowSize, pack
from vlmlora.data.processing import (
    Budget,
    Sample,
    SampleSize,
    VisionLanguageProcessor,
    budget_of,
    packing_budget_of,
)


@runtime_checkable
class Dataset(Protocol):
    """Samples by index: a list, a `datasets.Dataset`, anything with these two methods."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Mapping[str, Any] | Sequence[Any] | Sample:
        """Messages as `read_messages` takes them, or what `encode` made of them."""


def check_dataset(dataset: Any) -> None:
    """Fail on what is no `Dataset`.

    Raises:
        TypeError: it has no length or no rows by number.
    """
    if isinstance(dataset, Mapping):
        names = ", ".join(map(repr, dataset))
        raise TypeError(f"the dataset is a dict of {names}; pass one split of it, or a list of its rows")
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"the dataset is a {type(dataset).__name__} without a length or without rows by number, which "
            "shuffling and resuming need; list(dataset) has both"
        )


def make_batches(
    dataset: Dataset,
    processor: VisionLanguageProcessor,
    *,
    batch_size: int,
    budget: Budget | None = None,
    packing: bool = False,
    num_epochs: int | None = 1,
    shuffle: bool = True,
    seed: int = 3407,
    drop_remainder: bool = False,
    max_seq_length: int | None = None,
    train_on: str = "responses",
    truncation: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.MapDataset[dict[str, np.ndarray]]:
    """Encode, shuffle, batch and repeat a dataset.

    ``batches[i]`` is the batch of step `i`, always the same for the same arguments, so that a run resumes
    with ``batches[i:]``; ``len(batches)`` is the number of steps. Samples are encoded when their batch is
    asked for; see `prefetch`.

    With several processes, each makes its share of every batch, the rows
    ``batch_size / process_count * process_index`` and those that follow, and reads no other sample. A batch
    consists of the same samples however many processes there are.
    The step joins the shares, see `vlmlora.distributed.place_batch`.

    Args:
        dataset: samples by index.
        processor: makes the samples and batches.
        batch_size: rows of a batch, of all processes together.
        budget: sizes of every batch, or of a process's share; None: measured once by encoding the whole
            dataset, of which each process encodes its part, so that all batches have one shape. `Budget()`
            lets sizes vary.
        packing: let samples share a row, so that little of the batch is padding; see
            `VisionLanguageProcessor.collate_packed`. A row has `budget.max_length` tokens, or without a
            budget `max_seq_length`; which samples share it is decided once, from the sizes of all, which are
            measured in any case.
        num_epochs: times that every sample is seen, in another order each time; None: without end.
        shuffle: without, the dataset's order, with `packing` as far as the samples fit.
        seed: of the order.
        drop_remainder: leave out an epoch's last batch if it is not full. Otherwise it is filled with rows
            that carry no label.
        max_seq_length, train_on, truncation: see `VisionLanguageProcessor.encode`.
        process_index, process_count: None: this process's in JAX's runtime.

    Raises:
        ValueError: the dataset is empty, or too small for one batch with `drop_remainder`; or the processes
            cannot share `batch_size` evenly, or would have batches of different sizes. A sample that cannot
            be encoded raises when it is first read, and is named by its row, as is one that does not fit a
            packed row.
        TypeError: `dataset` has no rows by number: a stream, or a dict of splits.
        NotImplementedError: `packing` with a model whose samples cannot share a row.
    """
    check_dataset(dataset)
    if packing:
        processor.check_packing()
    size = len(dataset)
    if size < (batch_size if drop_remainder else 1):
        raise ValueError(f"a dataset of {size} samples gives no batch of {batch_size}")
    if process_index is None or process_count is None:
        process_index, process_count = _process()
    share = _share_of_rows(batch_size, process_count)

    def encode(index: int) -> Sample:
        sample = dataset[index]
        if isinstance(sample, Sample):
            return sample
        return processor.encode(
            sample, row=index, max_seq_length=max_seq_length, train_on=train_on, truncation=truncation
        )

    if budget is None or packing:
        part, parts = _process()
        mine = [processor.size(encode(i)) for i in range(part, size, parts)]
        sizes = _of_all_processes(mine, size)
    is_measured = budget is None
    if is_measured and packing:
        length = processor.max_seq_length if max_seq_length is None else max_seq_length
        multiple = processor.family.patch_multiple
        budget = packing_budget_of(sizes, batch_size=share, max_length=length, patch_multiple=multiple)
    elif is_measured:
        budget = budget_of(sizes, batch_size=share, images_multiple_of=_devices())
    open_sizes = budget.open_sizes(packing=packing)
    if (process_count > 1 or packing) and open_sizes:
        who = f"{process_count} processes" if process_count > 1 else "packed batches"
        raise ValueError(
            f"{budget} leaves sizes open, which {who} would fill differently; "
            "leave the budget out, or give all its sizes"
        )
    if packing:
        capacity = RowSize(
            budget.max_length, budget.max_segments, budget.max_patches, budget.max_image_segments
        )
        in_row = [each.in_row() for each in sizes]
        rows = pack(in_row, capacity, shuffle=shuffle, seed=seed)
        if is_measured:
            # Room for a segment costs attention memory, whether it is used or not.
            segments, image_segments = (max(sum(in_row[i][n] for i in row) for row in rows) for n in (1, 3))
            budget = replace(budget, max_segments=segments, max_image_segments=image_segments)
        if drop_remainder and len(rows) < batch_size:
            raise ValueError(f"{size} samples packed into {len(rows)} rows give no batch of {batch_size}")
    else:
        rows = range(size)

    def collate(numbers: Sequence[int]) -> dict[str, np.ndarray]:
        fixed = {"batch_size": share, "first_image_row": process_index * (budget.max_images or 0)}
        chosen = [rows[int(number)] for number in numbers]
        if packing:
            return processor.collate_packed([[encode(i) for i in row] for row in chosen], budget, **fixed)
        return processor.collate([encode(i) for i in chosen], budget, **fixed)

    numbers = grain.MapDataset.source(range(len(rows)))
    if shuffle:
        numbers = numbers.shuffle(seed=seed)
    first = process_index * share
    shares = numbers.batch(
        batch_size, drop_remainder=drop_remainder, batch_fn=lambda batch: batch[first : first + share]
    )
    return shares.map(collate).repeat(num_epochs)


def _process() -> tuple[int, int]:
    """Number of this process, and of all. Does not wake the devices of a process that is alone."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def _devices() -> int:
    """Devices that a process's rows are spread over, if it is one of several."""
    return jax.local_device_count() if jax.distributed.is_initialized() else 1


def _share_of_rows(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} counts the rows of all processes, of which there are {process_count}; "
            "it must be a multiple of that"
        )
    return batch_size // process_count


def _of_all_processes(sizes: Sequence[SampleSize], count: int) -> Sequence[SampleSize]:
    """The sizes of all `count` samples, of which each process measured its part, in the dataset's order."""
    _, parts = _process()
    if parts == 1:
        return sizes
    padded = np.zeros((-(-count // parts), len(SampleSize._fields)), np.int32)
    padded[: len(sizes)] = sizes
    found = np.asarray(multihost_utils.process_allgather(padded))
    # Sample i is process i % parts' number i // parts.
    return [
        SampleSize(*row) for row in found.transpose(1, 0, 2).reshape(-1, found.shape[-1])[:count].tolist()
    ]


def prefetch(
    batches: grain.MapDataset[dict[str, np.ndarray]], *, num_threads: int = 2, buffer_size: int = 4
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Iterate over batches while threads make the next ones; the iterator has `get_state` and `set_state`."""
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
    )
