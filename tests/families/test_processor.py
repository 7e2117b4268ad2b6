"""Messages to logits, through the family's processor and through transformers' own."""

import numpy as np
import pytest
import torch

from tests.families.parity import assert_logits, load, logits
from vlmlora.data.processing import FamilyProcessor, VisionLanguageProcessor


def test_messages_become_transformers_arrays_and_logits(family, tmp_path):
    if family.processor is None:
        pytest.skip("the family's processor has tests of its own")
    case = family.processor
    reference = case.reference()
    reference.save_pretrained(tmp_path)
    model = family.random_model(case.config(reference))
    model.save_pretrained(tmp_path)
    processor = VisionLanguageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor.family, FamilyProcessor)

    samples, expected = [], []
    for messages in case.conversations():
        text = reference.apply_chat_template(messages, add_generation_prompt=True)
        parts = [part for message in messages for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        videos = [part["video"] for part in parts if part["type"] == "video"]
        theirs = reference(
            text=[text],
            images=images or None,
            videos=[video.transpose(0, 3, 1, 2) for video in videos] or None,
            return_tensors="pt",
        )
        sample = processor.encode(messages, labels=False, add_generation_prompt=True)
        np.testing.assert_array_equal(sample.input_ids, theirs["input_ids"][0])
        ours = processor.family(text, images, videos) if videos else processor.family(text, images)
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            array = np.asarray(array).reshape(ours[name].shape)
            np.testing.assert_allclose(ours[name], array, rtol=0, atol=case.atol.get(name, 0), err_msg=name)
        samples.append(sample)
        with torch.no_grad():
            expected.append(model(**theirs).logits[0])

    batch = processor.collate(samples)
    found = np.asarray(logits(load(tmp_path), batch))
    for row, theirs in enumerate(expected):
        assert_logits(found[row, : len(theirs)], theirs, np.ones(len(theirs), bool))
