"""Rows of several samples: the loss and gradients of rows of one."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.families.parity import GRADIENT, LOSS, load
from tests.nn.fake_cudnn import install
from vlmlora.data.loader import make_batches
from vlmlora.data.processing import VisionLanguageProcessor
from vlmlora.lora.apply import add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.variables import Trainable
from vlmlora.training.loss import make_loss_fn

# How three conversations share rows: all in one, or in another order, one beside the others.
ROWS = [[[0, 1, 2]], [[2, 1], [], [0]]]


@pytest.fixture(scope="module")
def packable(family, tmp_path_factory):
    """A model with adapters, its processor, and samples with images, videos and neither."""
    if family.processor is None:
        pytest.skip("the family's processor has tests of its own")
    directory = tmp_path_factory.mktemp("packing")
    reference = family.processor.reference()
    reference.save_pretrained(directory)
    config = family.processor.config(reference)
    if family_of(config).processor(directory, config).why_not_packed is not None:
        pytest.skip("the family does not pack samples")
    family.random_model(config).save_pretrained(directory)
    module = load(directory)
    lora = LoraConfig(r=2, init_lora_weights=False, finetune_projector=True)
    add_adapters(module, select(module_table(config), lora), lora, jax.random.key(0))
    processor = VisionLanguageProcessor.from_pretrained(directory)
    answers = ("A number, 123", "7", "The text says 4567 and 1.")
    samples = [
        processor.encode([*messages, {"role": "assistant", "content": answer}])
        for messages, answer in zip(family.processor.conversations(), answers, strict=True)
    ]
    return nnx.split(module, Trainable, ...), processor, samples


@pytest.fixture(scope="module")
def separate(packable):
    """A loss, and its value and gradients for rows of one sample."""
    (graphdef, adapters, frozen), processor, samples = packable
    loss_fn = make_loss_fn(graphdef, gradient_checkpointing=True, chunk_size=16)
    return loss_fn, *jax.jit(jax.value_and_grad(loss_fn))(adapters, frozen, processor.collate(samples))


@pytest.mark.parametrize("kernels", ["XLA", "cuDNN"])
def test_packed_rows_have_the_loss_and_gradients_of_separate_ones(packable, separate, kernels, monkeypatch):
    (_, adapters, frozen), processor, samples = packable
    loss_fn, loss, gradients = separate
    asked = install(monkeypatch) if kernels == "cuDNN" else []
    for rows in ROWS:
        batch = processor.collate_packed([[samples[i] for i in row] for row in rows])
        assert len(batch["input_ids"]) == len(batch["pixel_values"]) == len(rows)
        # Compiled anew, since the kernels may be others.
        packed, packed_gradients = jax.jit(jax.value_and_grad(lambda *a: loss_fn(*a)))(
            adapters, frozen, batch
        )
        np.testing.assert_allclose(packed, loss, rtol=LOSS)
        for a, b in zip(*map(jax.tree.leaves, (gradients, packed_gradients)), strict=True):
            assert np.linalg.norm(a - b) <= GRADIENT * np.linalg.norm(a)
    assert "xla" not in asked


def test_a_sample_does_not_see_its_neighbours(packable):
    (graphdef, adapters, frozen), processor, samples = packable
    module = nnx.merge(graphdef, adapters, frozen)

    @jax.jit
    def hidden(batch):
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "attention_mask")}
        return module(**inputs)[0]

    batch = processor.collate_packed([samples])
    before = np.asarray(hidden(batch))[0]
    second = batch["segment_ids"][0] == 2
    changed = dict(batch, input_ids=np.where(second, batch["input_ids"] ^ 1, batch["input_ids"]))
    changed["pixel_values"] = batch["pixel_values"].copy()
    # The second sample has the third image and the video, whose patches come last.
    items = [len(sample.images) for sample in samples]
    mine = np.flatnonzero(batch["image_segment_ids"][0] > items[0])
    changed["pixel_values"][0, mine] += 1
    is_image = batch["image_token_index"] >= 0
    changed["input_ids"] = np.where(is_image, batch["input_ids"], changed["input_ids"])
    after = np.asarray(hidden(changed))[0]
    filled = batch["segment_ids"][0] > 0
    np.testing.assert_array_equal(before[filled & ~second], after[filled & ~second])
    assert (before[second] != after[second]).any(axis=1).all()


def test_a_family_that_does_not_pack_says_so_before_any_work(family, tmp_path):
    if family.processor is None:
        pytest.skip("the family's processor has tests of its own")
    reference = family.processor.reference()
    reference.save_pretrained(tmp_path)
    family.processor.config(reference).save_pretrained(tmp_path)
    processor = VisionLanguageProcessor.from_pretrained(tmp_path)
    if processor.family.why_not_packed is None:
        pytest.skip("the family packs samples")

    class Untouched(list):
        def __getitem__(self, index):
            raise AssertionError("a sample was read")

    message = "several samples are not supported: .*; put one sample into a row"
    with pytest.raises(NotImplementedError, match=message):
        make_batches(Untouched([{}]), processor, batch_size=1, packing=True)
    with pytest.raises(NotImplementedError, match=message):
        processor.collate_packed([[]])
    with pytest.raises(NotImplementedError, match=message):
        processor.budget([], batch_size=1, packing=True)
