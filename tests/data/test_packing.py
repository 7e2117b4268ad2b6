"""Samples packed into rows: the algorithm, the batches, and who makes which."""

from itertools import pairwise

import numpy as np
import pytest

from tests.data.test_batches import answers, conversation, frames
from tests.processing.reference import picture
from vlmlora.data.loader import make_batches, prefetch
from vlmlora.data.packing import RowSize, pack, row_capacity
from vlmlora.data.processing import Budget, VisionLanguageProcessor


@pytest.fixture(scope="module")
def processor(family):
    return VisionLanguageProcessor(family, max_seq_length=256)


def mixed_sizes(count, seed=0):
    """Text alone, small images, large images, videos."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, 200, count)
    segments = rng.choice([0, 1, 1, 3], count)
    return [
        RowSize(int(t), 1, int(s * rng.integers(1, 12) * 64), int(s))
        for t, s in zip(tokens, segments, strict=True)
    ]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("buffer_size", [1, 16, 4096])
def test_rows_hold_every_sample_once_and_exceed_nothing(buffer_size, shuffle):
    sizes, capacity = mixed_sizes(500), RowSize(512, 5, 3000, 6)
    rows = pack(sizes, capacity, shuffle=shuffle, buffer_size=buffer_size)
    assert sorted(i for row in rows for i in row) == list(range(500))
    sums = np.array([np.sum([sizes[i] for i in row], axis=0) for row in rows])
    assert (sums <= np.array(capacity)).all()
    assert rows == pack(sizes, capacity, shuffle=shuffle, buffer_size=buffer_size)
    if not shuffle:
        assert all(row == sorted(row) for row in rows)
        first = [min(row) for row in rows if min(row) < buffer_size]
        assert set(range(min(buffer_size, 500))) >= set(first)


def test_little_of_a_row_is_left():
    sizes = mixed_sizes(2000)
    capacity = row_capacity(sizes, tokens=2048, patch_multiple=64)
    assert capacity.patches % 64 == 0
    rows = pack(sizes, capacity)
    tokens, patches = (sum(size[i] for size in sizes) for i in (0, 2))
    assert tokens / (len(rows) * 2048) > 0.93
    assert patches / (len(rows) * capacity.patches) > 0.8
    # A row each wastes more of both.
    assert tokens / (2000 * max(size.tokens for size in sizes)) < 0.6


def test_the_seed_fixes_what_shares_a_row():
    sizes, capacity = mixed_sizes(200), RowSize(512, 8, 4096, 8)
    assert pack(sizes, capacity, seed=1) == pack(sizes, capacity, seed=1)
    assert pack(sizes, capacity, seed=1, buffer_size=32) != pack(sizes, capacity, seed=2, buffer_size=32)


def test_a_sample_that_fits_no_row_is_named():
    sizes = [RowSize(10, 1, 64, 1), RowSize(10, 1, 640, 5)]
    with pytest.raises(ValueError, match="row 1: it takes 640 patches, of which a packed row holds 512"):
        pack(sizes, RowSize(100, 4, 512, 8))
    with pytest.raises(ValueError, match="row 1: it takes 5 image segments, of which a packed row holds 4"):
        pack(sizes, RowSize(100, 4, 640, 4))
    with pytest.raises(ValueError, match="row 0: it takes 10 tokens, of which a packed row holds 9"):
        row_capacity(sizes, tokens=9)
    # Three times those of an average row, which holds one sample.
    assert row_capacity(sizes, tokens=10) == RowSize(10, 3, 640, 9)


CONVERSATIONS = [
    conversation(picture(300, 200), answer="1"),
    conversation(answer="2 and 3"),
    conversation(picture(100, 77), picture(33, 400), videos=[frames(3)], answer="456"),
    conversation(videos=[frames(4, (120, 64)), frames(1)], answer="7"),
]


def test_a_packed_row_is_its_samples_one_after_another(processor):
    samples = [processor.encode(messages) for messages in CONVERSATIONS]
    budget = Budget(512, 3, 1536, 8, 6)
    batch = processor.collate_packed([[samples[2], samples[1]], [samples[3]]], budget, batch_size=3)
    assert {name: array.shape for name, array in batch.items()} == {
        "input_ids": (3, 512),
        "attention_mask": (3, 512),
        "labels": (3, 512),
        "segment_ids": (3, 512),
        "segment_offsets": (3, 7),
        "position_ids": (3, 3, 512),
        "pixel_values": (3, 1536, 1176),
        "patch_positions": (3, 1536, 2),
        "image_segment_ids": (3, 1536),
        "image_segment_offsets": (3, 9),
        "image_token_index": (3, 512),
    }
    merged = batch["pixel_values"].reshape(-1, 4 * 1176)
    for row, segment, sample in [(0, 1, samples[2]), (0, 2, samples[1]), (1, 1, samples[3])]:
        mine = batch["segment_ids"][row] == segment
        first, last = batch["segment_offsets"][row, segment - 1 : segment + 1]
        np.testing.assert_array_equal(np.flatnonzero(mine), np.arange(first, last))
        alone = processor.collate([sample])
        for name in ("input_ids", "labels", "attention_mask"):
            np.testing.assert_array_equal(batch[name][row, mine], alone[name][0, : len(sample)])
        positions = batch["position_ids"][:, row, mine]
        np.testing.assert_array_equal(positions, alone["position_ids"][:, 0, : len(sample)])
        index, index_alone = batch["image_token_index"][row, mine], np.full(len(sample), -1)
        if "pixel_values" in alone:
            index_alone = alone["image_token_index"][0, : len(sample)]
            merged_alone = alone["pixel_values"].reshape(-1, 4 * 1176)
            found = index_alone >= 0
            np.testing.assert_array_equal(merged[index[found]], merged_alone[index_alone[found]])
            # A row's images lie in the row of patches with the same number.
            assert set(index[found] // (1536 // 4)) == {row}
        np.testing.assert_array_equal(index >= 0, index_alone >= 0)
    # Two images and the two frame pairs of a video; then two videos of two and one.
    assert batch["image_segment_ids"].max(1).tolist() == [4, 3, 0]
    for ids, offsets in zip(batch["image_segment_ids"], batch["image_segment_offsets"], strict=True):
        for frame, (start, end) in enumerate(pairwise(offsets.tolist()), 1):
            assert set(ids[start:end]) <= {0, frame}
            assert start % 64 == 0
            assert (frame in ids) == (end > start)
        assert not ids[offsets[-1] :].any()
    assert batch["segment_offsets"][2].tolist() == [0] * 7
    assert not batch["segment_ids"][2].any()
    # Empty slots are zero throughout, and every patch is there once.
    assert not batch["pixel_values"][batch["image_segment_ids"] == 0].any()
    total = sum(len(item.pixel_values) for sample in samples[2:] for item in (*sample.images, *sample.videos))
    assert (batch["image_segment_ids"] > 0).sum() == total


def test_what_exceeds_a_packed_budget_is_named_by_its_row(processor):
    samples = [processor.encode(messages) for messages in CONVERSATIONS]
    rows = [[samples[1]], [samples[2], samples[0]]]
    slots = processor.size(samples[2]).patches + processor.size(samples[0]).patches
    full = Budget(512, 2, slots, 5, 2)
    processor.collate_packed(rows, full)

    def refused(message, **sizes):
        with pytest.raises(ValueError, match=message):
            processor.collate_packed(rows, Budget(**vars(full) | sizes))

    refused("row 1 of the batch: its 2 samples of .* tokens exceed max_length=128", max_length=128)
    refused(r"takes \d+ slots, its budget \d+, of which others of row 1 take", max_patches=slots - 64)
    refused("row 1 holds 5 images and frames of videos, its budget 4", max_image_segments=4)
    refused("row 1 holds 2 samples, its budget 1", max_segments=1)
    refused("max_images=5 rows of patches for 2 rows of tokens", max_images=5)
    refused("the batch holds 4 images and videos, its budget 0", max_images=0)
    with pytest.raises(ValueError, match="2 rows of samples for a batch of 1 rows"):
        processor.collate_packed(rows, batch_size=1)
    with pytest.raises(ValueError, match="0 rows of samples"):
        processor.collate_packed([])


def test_text_alone_is_packed_without_image_arrays(processor):
    samples = [processor.encode(CONVERSATIONS[1])] * 3
    batch = processor.collate_packed([samples])
    assert set(batch) == {
        *("input_ids", "attention_mask", "labels", "position_ids", "segment_ids", "segment_offsets")
    }
    budget = processor.budget(samples, batch_size=2, packing=True)
    assert (budget.max_images, budget.max_patches, budget.max_length) == (0, 0, 256)
    assert "pixel_values" not in processor.collate_packed([samples], budget, batch_size=2)


def many(count):
    """Samples with no image, one and two, and an answer each of its own."""
    sizes = [(60, 60), (120, 84), (30, 150)]
    return [
        {
            "messages": conversation(
                *[picture(*sizes[j], seed=i) for j in range(i % 3)],
                question="What? " * (1 + i % 5),
                answer=f"<{i}>",
            )
        }
        for i in range(count)
    ]


def said(processor, batch):
    """The answers in a batch, row by row."""
    return [text.replace("<|im_end|>", "").strip("<>").split("><") for text in answers(processor, batch)]


def test_an_epoch_of_packed_batches_sees_every_sample_once(processor):
    arguments = {"batch_size": 2, "packing": True, "num_epochs": 2, "seed": 1}
    batches = make_batches(many(30), processor, **arguments)
    assert len(batches) % 2 == 0
    seen = [said(processor, batch) for batch in batches]
    for epoch in (seen[: len(seen) // 2], seen[len(seen) // 2 :]):
        found = [answer for batch in epoch for row in batch for answer in row if answer]
        assert sorted(found) == sorted(map(str, range(30)))
    assert seen[: len(seen) // 2] != seen[len(seen) // 2 :]
    assert max(len(row) for batch in seen for row in batch) > 1
    # One shape, so that a run compiles one program.
    assert len({tuple((k, v.shape) for k, v in batch.items()) for batch in batches}) == 1
    again = make_batches(many(30), processor, **arguments)
    assert [said(processor, again[i]) for i in range(len(again))] == seen


def test_packed_batches_resume(processor):
    batches = make_batches(many(30), processor, batch_size=1, packing=True, num_epochs=None)
    iterator = iter(prefetch(batches))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [said(processor, next(iterator)) for _ in range(4)]
    resumed = iter(prefetch(batches))
    resumed.set_state(state)
    assert [said(processor, next(resumed)) for _ in range(4)] == expected
    assert [said(processor, batches[i]) for i in range(3, 7)] == expected


def test_processes_share_packed_batches(processor):
    dataset, arguments = many(30), {"batch_size": 4, "packing": True, "num_epochs": 2, "seed": 1}
    alone = make_batches(dataset, processor, **arguments)
    shares = [
        make_batches(dataset, processor, **arguments, process_index=p, process_count=2) for p in range(2)
    ]
    assert {len(share) for share in shares} == {len(alone)}
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        assert parts[0].keys() == whole.keys()
        for name, array in whole.items():
            axis = 1 if name == "position_ids" else 0
            joined = np.concatenate([part[name] for part in parts], axis)
            np.testing.assert_array_equal(joined, array, err_msg=name)


def test_a_sample_that_cannot_be_packed_is_named_by_its_row(processor):
    dataset = many(6)
    dataset[3] = {"messages": conversation(picture(300, 300), answer="3 " * 20)}
    slots = processor.size(processor.encode(dataset[3])).patches
    sizes = Budget(256, 2, slots - 64, 4, 4)
    with pytest.raises(ValueError, match=rf"row 3: it takes {slots} patches, of which .* {slots - 64};"):
        make_batches(dataset, processor, batch_size=2, packing=True, budget=sizes)
    with pytest.raises(ValueError, match=r"row 3: \d+ tokens .* exceed max_seq_length=100"):
        make_batches(dataset, processor, batch_size=2, packing=True, max_seq_length=100)
    with pytest.raises(ValueError, match="leaves sizes open, which packed batches would fill differently"):
        make_batches(dataset, processor, batch_size=2, packing=True, budget=Budget(256))
    with pytest.raises(ValueError, match=r"6 samples packed into \d rows give no batch of 5"):
        make_batches(dataset, processor, batch_size=5, packing=True, drop_remainder=True)
