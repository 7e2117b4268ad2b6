import numpy as np
import pytest
from sklearn.datasets import load_digits

from vlmlora.demo.handwritten_digits import compose_digits, handwritten_samples, load_handwritten_digits
from vlmlora.demo.text_image import reading_messages


def test_training_and_test_digits_are_disjoint_and_complete():
    train, test = load_handwritten_digits("train"), load_handwritten_digits("test")
    assert not set(train.source) & set(test.source)
    assert sorted([*train.source, *test.source]) == list(range(1797))
    reference = load_digits()
    np.testing.assert_array_equal(test.images * 16, reference.images[test.source])
    np.testing.assert_array_equal(test.labels, reference.target[test.source])
    assert np.bincount(test.labels).min() > 20


def test_samples_are_reproducible_strings_of_one_to_four_digits():
    samples, again = (handwritten_samples("test", 40, seed=1) for _ in range(2))
    for sample, same in zip(samples, again, strict=True):
        assert sample.text == same.text
        np.testing.assert_array_equal(sample.image, same.image)
        height, width, _ = sample.image.shape
        assert height == 32
        assert width % 16 == 0
        assert 32 <= width <= 128
    assert [len(s.text) for s in samples[:8]] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert samples[0].text != handwritten_samples("test", 1, seed=2)[0].text or not np.array_equal(
        samples[0].image, handwritten_samples("test", 1, seed=2)[0].image
    )


def test_digits_do_not_overlap_and_keep_their_order():
    digits = load_handwritten_digits("train")
    zero, one = (int(np.flatnonzero(digits.labels == d)[0]) for d in (0, 1))
    sample = compose_digits(digits, np.array([one, zero, one]), np.random.default_rng(0))
    assert sample.text == "101"
    ink = (sample.image[..., 0] < sample.image.max() - 40).any(axis=0)
    runs = np.flatnonzero(np.diff(np.pad(ink.astype(int), 1)) == 1)
    assert len(runs) == 3


def test_wrong_requests_are_errors():
    with pytest.raises(ValueError, match="'validation'"):
        load_handwritten_digits("validation")
    digits = load_handwritten_digits("train")
    with pytest.raises(ValueError, match="5 digits"):
        compose_digits(digits, np.arange(5), np.random.default_rng(0))


def test_messages_ask_and_answer():
    sample = handwritten_samples("train", 2, seed=0)[1]
    question, answer = reading_messages(sample, answer=True)
    assert [part["type"] for part in question["content"]] == ["image", "text"]
    np.testing.assert_array_equal(np.asarray(question["content"][0]["image"]), sample.image)
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": sample.text}]}
    assert len(reading_messages(sample, answer=False)) == 1
