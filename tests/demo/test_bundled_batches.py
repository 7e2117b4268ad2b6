"""The training script's fast path makes the batches that the library's processor makes."""

import jax
import numpy as np
import pytest
from bundled_model.batches import assemble, host_fields, make_tables
from bundled_model.conversations import PROMPTS, SYSTEM_PROMPT
from bundled_model.directory import write_directory
from bundled_model.pool import NUM_CONVERSATIONS, SIZES, SamplePool, draw_records, record_of
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLConfig

from vlmlora.data.processing import Budget, VisionLanguageProcessor
from vlmlora.demo.printed_text import matplotlib_fonts, printed_sample
from vlmlora.demo.text_image import TextImage, reading_messages


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundled")
    write_directory(path)
    return path


@pytest.fixture(scope="module")
def processor(directory):
    return VisionLanguageProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def tables(directory, processor):
    config = Qwen2_5_VLConfig.from_pretrained(directory)
    return make_tables(config, processor)


def every_size_and_conversation():
    rng = np.random.default_rng(0)
    samples = [
        TextImage(rng.integers(0, 256, (*size, 3), dtype=np.uint8), text)
        for size, text in zip(SIZES, ["7", "Zebra crossing", "$3.50"] * len(SIZES), strict=False)
    ]
    samples += [printed_sample(0, i, matplotlib_fonts()) for i in range(11)]
    return [(sample, i % NUM_CONVERSATIONS) for i, sample in enumerate(samples)]


def messages(sample, conversation, *, answer):
    said = reading_messages(sample, prompt=PROMPTS[conversation % len(PROMPTS)], answer=answer)
    if conversation < len(PROMPTS):
        return said
    return [{"role": "system", "content": SYSTEM_PROMPT}, *said]


@pytest.mark.parametrize("answers", [True, False])
def test_assembled_batches_equal_the_processors(directory, processor, tables, answers):
    cases = every_size_and_conversation()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    records = np.stack([record_of(sample, conversation, tokenizer) for sample, conversation in cases])
    batch = jax.jit(assemble, static_argnames="answers")(tables, host_fields(records), answers=answers)
    slots, tokens = tables.pixel_index.shape[1], tables.input_ids.shape[-1]
    samples = [
        processor.encode(messages(*case, answer=answers), labels=answers, add_generation_prompt=not answers)
        for case in cases
    ]
    expected = processor.collate(samples, Budget(tokens, len(cases), slots))
    assert {"labels", *batch} == set(expected)
    for name, array in batch.items():
        np.testing.assert_array_equal(np.asarray(array), expected[name], err_msg=name)


def test_the_pool_hands_out_what_the_renderer_draws(directory, tmp_path):
    fonts, tokenizer_file = matplotlib_fonts(), directory / "tokenizer.json"
    with SamplePool(fonts, tokenizer_file, tmp_path, capacity=24, chunk=8, workers=2, seed=5) as pool:
        pool.refresh(wait_for=2)
        first = pool.sample(np.random.default_rng(0), 50)
        while pool.rendered < 72:
            pool.refresh()
        later = pool.sample(np.random.default_rng(0), 50)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    drawn = {record.tobytes() for record in draw_records(5, 0, 160, fonts, tokenizer)}
    assert {record.tobytes() for record in first} <= drawn
    assert {record.tobytes() for record in later} <= drawn
    assert not {r.tobytes() for r in later} <= {r.tobytes() for r in first}


def test_a_dead_worker_is_an_error(directory, tmp_path):
    with (
        SamplePool(
            (), directory / "tokenizer.json", tmp_path, capacity=8, chunk=4, workers=1, seed=0
        ) as pool,
        pytest.raises(RuntimeError, match="worker has died"),
    ):
        pool.refresh()
