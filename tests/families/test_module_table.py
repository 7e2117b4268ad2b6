"""What is known of a model from its config alone: the module table, counts, shapes of batches."""

import re
import time

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from tests.families.parity import linear_names
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.batch import model_inputs


def test_the_table_is_that_of_transformers_linear_modules(family_case):
    family, name = family_case
    config = family.cases[name].config
    with torch.device("meta"):
        model = family.model_class(config)
    table = module_table(config)
    assert len({spec.name for spec in table}) == len(table)
    tied = getattr(config, "tie_word_embeddings", False) and model.get_output_embeddings()
    assert {spec.name for spec in table} == set(linear_names(model, head=not tied))
    for spec in table:
        linear = model.get_submodule(spec.name)
        assert (spec.in_features, spec.out_features) == (linear.in_features, linear.out_features)
        assert spec.bias == (linear.bias is not None)
        assert (spec.part, spec.role) == family.place(spec.name), spec.name
    stacks = {spec.path: [] for spec in table if spec.layer is not None}
    for spec in table:
        if spec.layer is not None:
            stacks[spec.path].append((spec.layer, int(re.search(r"\.(\d+)\.", spec.name)[1])))
    for path, layers in stacks.items():
        indices, numbers = zip(*layers, strict=True)
        assert indices == tuple(range(len(layers))), path
        assert list(numbers) == sorted(numbers), path


def test_counts_of_trained_parameters(family):
    assert family.counts
    for count in family.counts:
        start = time.process_time()
        table = module_table(count.config)
        # A table is made of shapes alone, at once for any size of model.
        assert time.process_time() - start < 2
        assert select(table, LoraConfig(**count.arguments)).parameters == count.parameters


def test_shapes_of_batches_are_what_the_model_takes(family):
    """Traced only: of a batch with images, and without."""
    config = family.first.config
    known = family_of(config)
    if known.batch_shapes is None:
        pytest.skip("no memory is planned for the family")
    graphdef, state = nnx.split(known.model(config, dtype=jnp.float32))

    def hidden(state, batch):
        return nnx.merge(graphdef, state)(**model_inputs(batch))[0]

    with_image = known.batch_shapes(config, 2, 64, (64, 120))
    assert set(with_image) <= set(family.make_inputs(family.first.rows, config, 0).ours)
    for batch in (with_image, known.batch_shapes(config, 2, 64, None)):
        assert batch["labels"].shape == (2, 64)
        assert jax.eval_shape(hidden, state, batch).shape == (2, 64, config.get_text_config().hidden_size)
