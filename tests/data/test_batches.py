"""Samples and batches against transformers' processor and position ids."""

import numpy as np
import pytest
import torch

from tests.processing.reference import hf_processor, picture
from tests.processing.test_positions import RopeIndex
from vlmlora.data.loader import check_dataset, make_batches, prefetch
from vlmlora.data.processing import Budget, VisionLanguageProcessor


@pytest.fixture(scope="module")
def processor(family):
    return VisionLanguageProcessor(family)


def frames(count, size=(70, 90)):
    return np.stack([np.asarray(picture(*size, seed=i)) for i in range(count)])


def conversation(*images, videos=(), answer="The number 123", question="What is written?"):
    parts = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "video", "video": video, "fps": 2} for video in videos]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]


CONVERSATIONS = [
    conversation(picture(300, 200)),
    conversation(),
    conversation(picture(100, 77), picture(33, 400), videos=[frames(3)], question="What?\n\n"),
    conversation(videos=[frames(4, (120, 64)), frames(1)], answer="4567"),
]


def test_samples_are_transformers_tokens(processor, reference):
    for messages in CONVERSATIONS:
        images = [p["image"] for m in messages for p in m["content"] if "image" in p]
        videos = [p["video"] for m in messages for p in m["content"] if "video" in p]
        expected = reference(
            text=[reference.apply_chat_template(messages)],
            images=images or None,
            videos=[video.transpose(0, 3, 1, 2) for video in videos] or None,
        )
        sample = processor.encode(messages)
        np.testing.assert_array_equal(sample.input_ids, expected["input_ids"][0])
        assert processor.apply_chat_template(messages) == reference.apply_chat_template(messages)
        assert processor.apply_chat_template(messages, tokenize=True) == expected["input_ids"][0]


@pytest.mark.parametrize("budget", [None, Budget(384, 8, 1024)])
def test_a_batch_holds_what_transformers_gives_the_model(processor, family, tokenizer, config, budget):
    samples = [processor.encode(messages) for messages in CONVERSATIONS]
    batch = processor.collate(samples, budget, batch_size=5)
    rows, tokens = batch["input_ids"].shape
    assert rows == 5
    assert tokens == (384 if budget else -(-max(map(len, samples)) // 64) * 64)
    for name, value in batch.items():
        assert value.dtype == (np.float32 if name == "pixel_values" else np.int32), name

    reference = hf_processor(tokenizer)
    texts = [reference.apply_chat_template(messages) for messages in CONVERSATIONS]
    parts = [
        p
        for messages in CONVERSATIONS
        for m in messages
        if isinstance(m["content"], list)
        for p in m["content"]
    ]
    expected = reference(
        text=texts,
        images=[p["image"] for p in parts if "image" in p],
        videos=[p["video"].transpose(0, 3, 1, 2) for p in parts if "video" in p],
        video_metadata=[{"fps": 2, "total_num_frames": len(p["video"])} for p in parts if "video" in p],
        padding="max_length",
        max_length=tokens,
        padding_side="right",
        return_tensors="pt",
    )
    np.testing.assert_array_equal(batch["input_ids"][:4], expected["input_ids"])
    np.testing.assert_array_equal(batch["attention_mask"][:4], expected["attention_mask"])
    assert not batch["attention_mask"][4].any()
    assert (batch["labels"][4] == -100).all()
    positions, _ = RopeIndex(config.vision_config.tokens_per_second).get_rope_index(
        expected["input_ids"],
        mm_token_type_ids=expected["mm_token_type_ids"],
        image_grid_thw=expected["image_grid_thw"],
        video_grid_thw=expected["video_grid_thw"],
        second_per_grid_ts=torch.as_tensor(expected["second_per_grid_ts"]),
        attention_mask=expected["attention_mask"],
    )
    np.testing.assert_array_equal(batch["position_ids"][:, :4], positions)

    # An image token's index leads to the patches that transformers merges into it.
    image_rows, patches, features = batch["pixel_values"].shape
    assert (image_rows, patches) == ((8, 1024) if budget else (6, patches))
    assert patches % 64 == 0
    merged = batch["pixel_values"].reshape(image_rows * patches // 4, 4 * features)
    types = expected["mm_token_type_ids"].numpy()
    np.testing.assert_array_equal(batch["image_token_index"][:4] >= 0, types > 0)
    for kind, name in ((1, "pixel_values"), (2, "pixel_values_videos")):
        theirs = expected[name].numpy().reshape(-1, 4 * features)
        ours = merged[batch["image_token_index"][:4][types == kind]]
        # Videos are resized with torchvision there; see the tests of the processor.
        np.testing.assert_allclose(ours, theirs, atol=0 if kind == 1 else 0.031, rtol=0)
    filled = batch["image_segment_ids"] > 0
    assert filled.sum() == len(expected["pixel_values"]) + len(expected["pixel_values_videos"])
    assert not batch["pixel_values"][~filled].any()
    assert sorted(batch["image_segment_ids"].max(1)[:6]) == [1, 1, 1, 1, 2, 2]


def test_a_batch_of_text_has_no_image_arrays(processor):
    sample = processor.encode(conversation())
    batch = processor.collate([sample])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"}
    assert batch["position_ids"][:, 0, : len(sample)].tolist() == [list(range(len(sample)))] * 3
    with_room = processor.collate([sample], Budget(max_images=2, max_patches=64))
    assert with_room["pixel_values"].shape == (2, 64, 1176)
    assert not with_room["image_segment_ids"].any()
    assert (with_room["image_token_index"] == -1).all()


def test_what_exceeds_the_budget_is_refused(processor):
    samples = [processor.encode(messages) for messages in CONVERSATIONS]
    with pytest.raises(ValueError, match=r"a sample of \d+ tokens exceeds the batch's max_length=20"):
        processor.collate(samples, Budget(max_length=20))
    with pytest.raises(ValueError, match="6 images and videos, its budget 5"):
        processor.collate(samples, Budget(max_images=5))
    with pytest.raises(ValueError, match=r"takes \d+ slots, its budget 64"):
        processor.collate(samples, Budget(max_patches=64))
    with pytest.raises(ValueError, match="patches=65 is no multiple"):
        processor.collate(samples, Budget(max_patches=65))
    with pytest.raises(ValueError, match="4 samples for a batch of 2 rows"):
        processor.collate(samples, batch_size=2)
    with pytest.raises(ValueError, match="no sample to collate"):
        processor.collate([])


def test_the_measured_budget_fits_any_batch(processor):
    samples = [processor.encode(messages) for messages in CONVERSATIONS]
    budget = processor.budget(samples, batch_size=2)
    # The two samples with most images and videos: three and two.
    assert budget.max_images == 5
    assert budget.max_length % 64 == 0
    shapes = {
        tuple(value.shape for value in processor.collate([a, b], budget).values())
        for a in samples
        for b in samples
        if a is not b
    }
    assert len(shapes) == 1


def test_samples_that_are_too_long(processor):
    messages = conversation(picture(100, 77), answer="The number is 123. " * 10)
    length = len(processor.encode(messages))
    with pytest.raises(
        ValueError, match=rf"row 4: {length} tokens \(12 of images\) exceed max_seq_length=60"
    ):
        processor.encode(messages, max_seq_length=60, row=4)
    whole = processor.encode(messages)
    cut = processor.encode(messages, max_seq_length=length - 5, truncation=True)
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:-5])
    np.testing.assert_array_equal(cut.labels, whole.labels[:-5])
    with pytest.raises(ValueError, match="cutting it would lose image tokens"):
        processor.encode(messages, max_seq_length=20, truncation=True)
    with pytest.raises(ValueError, match="no token carries a label"):
        processor.encode(conversation(answer="1"), max_seq_length=10, truncation=True)


def test_errors_of_images_and_templates_name_the_message(processor):
    with pytest.raises(ValueError, match=r"row 2, message 0: absolute aspect ratio"):
        processor.encode(conversation(picture(900, 3)), row=2)
    with pytest.raises(ValueError, match=r"row 2, message 0: .*frames of one size"):
        processor.encode(conversation(videos=[[picture(30, 30), picture(30, 31)]]), row=2)
    with pytest.raises(ValueError, match="train_on='answers' is not one of"):
        processor.encode(conversation(), train_on="answers")


def test_decode_and_save(processor, config, tmp_path):
    sample = processor.encode(conversation(answer="Größe 5 ≠ 6"))
    answer = sample.labels[sample.labels != -100]
    assert processor.decode(answer) == "Größe 5 ≠ 6"
    assert processor.batch_decode(np.stack([answer, answer])) == ["Größe 5 ≠ 6"] * 2
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    again = VisionLanguageProcessor.from_pretrained(tmp_path, max_seq_length=99)
    messages = conversation(picture(60, 60))
    first, second = processor.encode(messages), again.encode(messages)
    np.testing.assert_array_equal(first.input_ids, second.input_ids)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.images[0].pixel_values, second.images[0].pixel_values)
    assert again.max_seq_length == 99


def numbered(count):
    return [{"messages": conversation(question=f"What is {i}?", answer=str(i))} for i in range(count)]


def answers(processor, batch):
    return [processor.decode(row[row != -100]) for row in batch["labels"]]


def test_an_epoch_sees_every_sample_once_in_an_order_that_the_seed_fixes(processor):
    dataset = numbered(10)
    batches = make_batches(dataset, processor, batch_size=4, num_epochs=2, seed=1)
    assert len(batches) == 6
    seen = [answers(processor, batch) for batch in batches]
    epochs = [[answer for batch in epoch for answer in batch] for epoch in (seen[:3], seen[3:])]
    for epoch in epochs:
        # The last batch is filled with rows without labels.
        assert sorted(epoch) == sorted([str(i) for i in range(10)] + ["", ""])
    assert epochs[0] != epochs[1]
    assert len({batch["input_ids"].shape for batch in batches}) == 1
    again = make_batches(dataset, processor, batch_size=4, num_epochs=2, seed=1)
    assert [answers(processor, again[i]) for i in range(6)] == seen
    other = make_batches(dataset, processor, batch_size=4, num_epochs=2, seed=2)
    assert [answers(processor, batch) for batch in other] != seen
    in_order = make_batches(dataset, processor, batch_size=4, shuffle=False, drop_remainder=True)
    assert [answers(processor, batch) for batch in in_order] == [list("0123"), list("4567")]


def test_iteration_resumes_where_its_state_was_taken(processor):
    batches = make_batches(numbered(9), processor, batch_size=2, num_epochs=None)
    iterator = iter(prefetch(batches))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [answers(processor, next(iterator)) for _ in range(4)]
    resumed = iter(prefetch(batches))
    resumed.set_state(state)
    assert [answers(processor, next(resumed)) for _ in range(4)] == expected
    assert [answers(processor, batches[i]) for i in range(3, 7)] == expected


def test_a_sample_that_cannot_be_used_is_named_by_its_row(processor):
    dataset = numbered(5)
    dataset[3]["messages"][0]["role"] = "human"
    with pytest.raises(ValueError, match="row 3, message 0: role 'human'"):
        make_batches(dataset, processor, batch_size=2)
    batches = make_batches(dataset, processor, batch_size=2, budget=Budget(), num_epochs=2)
    with pytest.raises(ValueError, match="row 3, message 0: role 'human'"):
        list(batches[3:])
    with pytest.raises(ValueError, match="a dataset of 3 samples gives no batch of 4"):
        make_batches(dataset[:3], processor, batch_size=4, drop_remainder=True)
    with pytest.raises(ValueError, match="a dataset of 0 samples"):
        make_batches([], processor, batch_size=4)
    with pytest.raises(TypeError, match="a dict of 'train', 'test'; pass one split of it"):
        make_batches({"train": dataset, "test": dataset}, processor, batch_size=4)
    with pytest.raises(TypeError, match=r"a generator without a length .*list\(dataset\) has both"):
        check_dataset(row for row in dataset)


def test_samples_may_be_encoded_beforehand(processor):
    samples = [processor.encode(row) for row in numbered(4)]
    batches = make_batches(samples, processor, batch_size=2, shuffle=False)
    assert [answers(processor, batch) for batch in batches] == [["0", "1"], ["2", "3"]]


def test_processes_share_every_batch(processor):
    dataset = [
        {"messages": conversation(*[picture(60, 60)] * (i % 3), question=f"What is {i}?", answer=str(i))}
        for i in range(10)
    ]
    budget = processor.budget([processor.encode(row) for row in dataset], batch_size=2)
    arguments = {"batch_size": 8, "budget": budget, "num_epochs": 2, "seed": 1}
    alone = make_batches(dataset, processor, **arguments | {"budget": None})
    shares = [
        make_batches(dataset, processor, **arguments, process_index=p, process_count=4) for p in range(4)
    ]
    assert {len(share) for share in shares} == {len(alone)} == {4}
    for number in range(4):
        parts = [share[number] for share in shares]
        assert {part["input_ids"].shape for part in parts} == {(2, budget.max_length)}
        joined = [answer for part in parts for answer in answers(processor, part)]
        assert joined == answers(processor, alone[number])
        # Of an epoch's last batch there is nothing left for the last three processes.
        assert (number % 2 == 0) == any(joined[2:])
        for part, process in zip(parts, range(4), strict=True):
            # A token of an image finds its features in the rows of all processes, one after another.
            tokens = part["image_token_index"][part["image_token_index"] >= 0]
            slots = budget.max_patches // 4
            assert set(tokens // (budget.max_images * slots)) <= {process}
            filled = part["image_segment_ids"].reshape(-1, 4)[:, 0] > 0
            np.testing.assert_array_equal(
                np.sort(tokens) - process * budget.max_images * slots, np.flatnonzero(filled)
            )
    with pytest.raises(ValueError, match=r"batch_size=6 counts the rows of all .* are 4"):
        make_batches(dataset, processor, batch_size=6, process_index=0, process_count=4)
    with pytest.raises(ValueError, match="leaves sizes open, which 2 processes would fill differently"):
        make_batches(dataset, processor, batch_size=8, budget=Budget(), process_index=0, process_count=2)
