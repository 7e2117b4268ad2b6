"""A row of a batch gives what transformers gives for it alone, with and without images, in float32."""

import jax
import numpy as np
import torch
from flax import nnx

from tests.families.mllama import FAMILY, SEVERAL
from tests.families.parity import LOGITS, load
from tests.models.mllama_cases import EOS, IMAGE_TOKEN
from vlmlora.generation.greedy import greedy_decode
from vlmlora.nn.batch import model_inputs


def test_logits_and_greedy_tokens_do_not_depend_on_the_other_rows(tmp_path):
    """transformers gives a row blank images where another has more, which its tokens read; not so here."""
    config = FAMILY.first.config
    model = FAMILY.random_model(config, seed=2)
    model.save_pretrained(tmp_path)
    inputs = FAMILY.make_inputs(SEVERAL, config, 3)
    has_image = inputs.ours["image_spans"][..., 1] > 0
    assert not has_image.all()
    batch = inputs.ours | {"image_index": np.where(has_image, inputs.ours["image_index"], -1)}
    graphdef, state = nnx.split(load(tmp_path))

    @jax.jit
    def run(state, batch):
        module = nnx.merge(graphdef, state)
        return module.logits(module(**model_inputs(batch))[0])

    logits = np.asarray(run(state, batch))
    tokens = greedy_decode(graphdef, state, batch, max_new_tokens=8, eos_token_ids=(EOS,), pad_token_id=EOS)
    for row, length in enumerate(inputs.valid.sum(1)):
        prompt = FAMILY.one_row(inputs.theirs, row, length)
        assert ("pixel_values" in prompt) == bool((prompt["input_ids"] == IMAGE_TOKEN).any())
        with torch.no_grad():
            expected = model(**prompt).logits[0].numpy()
        assert np.abs(logits[row, :length] - expected).max() <= LOGITS * np.abs(expected).max()
        expected = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=EOS)
        expected = expected[0, length:].numpy()
        np.testing.assert_array_equal(np.asarray(tokens)[row, : len(expected)], expected)
        assert (np.asarray(tokens)[row, len(expected) :] == EOS).all()
