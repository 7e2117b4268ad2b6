"""Batches of a dataset, in an order that a seed fixes."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from vlmlora.data.processing import Budget, Sample, VisionLanguageProcessor


@runtime_checkable
class Dataset(Protocol):
    """Samples by index: a list, a `datasets.Dataset`, anything with these two methods."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Mapping[str, Any] | Sequence[Any] | Sample:
        """Messages as `read_messages` takes them, or what `encode` made of them."""


def make_batches(
    dataset: Dataset,
    processor: VisionLanguageProcessor,
    *,
    batch_size: int,
    budget: Budget | None = None,
    num_epochs: int | None = 1,
    shuffle: bool = True,
    seed: int = 3407,
    drop_remainder: bool = False,
    max_seq_length: int | None = None,
    train_on: str = "responses",
    truncation: bool = False,
) -> grain.MapDataset[dict[str, np.ndarray]]:
    """Encode, shuffle, batch and repeat a dataset.

    ``batches[i]`` is the batch of step `i`, always the same for the same arguments, so that a run resumes
    with ``batches[i:]``; ``len(batches)`` is the number of steps. Samples are encoded when their batch is
    asked for; see `prefetch`.

    Args:
        dataset: samples by index.
        processor: makes the samples and batches.
        batch_size: rows of a batch.
        budget: sizes of every batch; None: measured once by encoding the whole dataset, so that all batches
            have one shape. `Budget()` lets sizes vary.
        num_epochs: times that every sample is seen, in another order each time; None: without end.
        shuffle: without, the dataset's order.
        seed: of the order.
        drop_remainder: leave out an epoch's last batch if it is not full. Otherwise it is filled with rows
            that carry no label.
        max_seq_length, train_on, truncation: see `VisionLanguageProcessor.encode`.

    Raises:
        ValueError: the dataset is empty, or too small for one batch with `drop_remainder`. A sample that
            cannot be encoded raises when it is first read, and is named by its row.
    """
    size = len(dataset)
    if size < (batch_size if drop_remainder else 1):
        raise ValueError(f"a dataset of {size} samples gives no batch of {batch_size}")

    def encode(index: int, sample: Any) -> Sample:
        if isinstance(sample, Sample):
            return sample
        return processor.encode(
            sample,
            row=index % size,
            max_seq_length=max_seq_length,
            train_on=train_on,
            truncation=truncation,
        )

    samples = grain.MapDataset.source(dataset).map_with_index(encode)
    if budget is None:
        budget = processor.budget((samples[i] for i in range(size)), batch_size=batch_size)
    if shuffle:
        samples = samples.shuffle(seed=seed)
    return samples.batch(
        batch_size,
        drop_remainder=drop_remainder,
        batch_fn=lambda batch: processor.collate(batch, budget, batch_size=batch_size),
    ).repeat(num_epochs)


def prefetch(
    batches: grain.MapDataset[dict[str, np.ndarray]], *, num_threads: int = 2, buffer_size: int = 4
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Iterate over batches while threads make the next ones; the iterator has `get_state` and `set_state`."""
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
    )
