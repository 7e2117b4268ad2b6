import io

import numpy as np
import pytest
from PIL import Image

from vlmlora.demo.printed_text import (
    MAX_LENGTH,
    MAX_WIDTH,
    MIN_WIDTH,
    is_held_out,
    matplotlib_fonts,
    printed_sample,
    random_text,
)

FONTS = matplotlib_fonts()


def test_a_sample_follows_from_its_seed_and_index_alone():
    first = printed_sample(3, 17, FONTS)
    printed_sample(3, 18, FONTS)
    again, other = printed_sample(3, 17, FONTS), printed_sample(4, 17, FONTS)
    assert first.text == again.text
    np.testing.assert_array_equal(first.image, again.image)
    assert (first.text, first.image.tobytes()) != (other.text, other.image.tobytes())


def test_training_and_held_out_strings_are_disjoint():
    train = {printed_sample(0, i, FONTS).text for i in range(400)}
    held_out = {printed_sample(0, i, FONTS, held_out=True).text for i in range(200)}
    assert not train & held_out
    assert all(is_held_out(text) for text in held_out)
    assert not any(is_held_out(str(i)) for i in range(100))


def test_pictures_have_sizes_that_the_processor_keeps():
    samples = [printed_sample(1, i, FONTS) for i in range(300)]
    for sample in samples:
        height, width, channels = sample.image.shape
        assert (height in (32, 48, 64), width % 16, channels) == (True, 0, 3)
        assert MIN_WIDTH <= width <= (MAX_WIDTH if height == 32 else MAX_WIDTH // 2)
        assert sample.image.dtype == np.uint8
    assert len({s.image.shape for s in samples}) > 10


def test_every_picture_shows_something():
    contrasts = [np.ptp(printed_sample(2, i, FONTS).image, axis=(0, 1)).max() for i in range(300)]
    assert min(contrasts) > 60


def test_texts_are_short_printable_ascii_with_digit_strings_of_every_length():
    rng = np.random.default_rng(0)
    texts = [random_text(rng) for _ in range(4000)]
    assert all(1 <= len(t) <= MAX_LENGTH and t.isascii() and t.isprintable() for t in texts)
    assert all(t == t.strip() for t in texts)
    assert {len(t) for t in texts if t.isdigit()} == set(range(1, 9))
    assert sum(t.isdigit() for t in texts) > 1000


def test_words_can_be_told_from_their_capitals():
    rng = np.random.default_rng(1)
    words = [t for t in (random_text(rng) for _ in range(4000)) if t.replace(" ", "").isalpha()]
    mixed = [w for w in words if len(w) > 2 and not set(w.lower()) & set("abdefghmnqrt")]
    # Codes are capitals without look-alikes, so only those may lack a letter that tells.
    assert all(set(w) <= set("CJKLPUVWXY") for w in mixed)


def test_no_fonts_is_an_error():
    with pytest.raises(ValueError, match="0 fonts"):
        printed_sample(0, 0, ())


def test_images_survive_png():
    sample = printed_sample(5, 5, FONTS)
    buffer = io.BytesIO()
    Image.fromarray(sample.image).save(buffer, "PNG")
    np.testing.assert_array_equal(np.asarray(Image.open(buffer)), sample.image)
