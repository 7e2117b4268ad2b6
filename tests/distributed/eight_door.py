"""The door on eight devices: train, read, save and merge a model of which no device holds the whole."""

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from vlmlora import FastVisionModel, adamw, fit, init_train_state, make_loss_fn, make_train_step
from vlmlora.data.loader import make_batches
from vlmlora.demo.handwriting import bundled_model
from vlmlora.demo.handwritten_digits import handwritten_samples
from vlmlora.demo.text_image import reading_messages
from vlmlora.distributed import make_mesh
from vlmlora.quantization.sharded import ShardedWeight

pytestmark = pytest.mark.slow

MESH = make_mesh(data=2, fsdp=2, tensor=2)


def trained(mesh):
    """The bundled model after two steps, what it says, and its processor."""
    model, processor = FastVisionModel.from_pretrained(bundled_model(), progress=False, mesh=mesh)
    model = FastVisionModel.get_peft_model(model, r=4, use_gradient_checkpointing=True, verbose=False)
    samples = handwritten_samples("train", 8, seed=1)
    rows = [processor.encode(reading_messages(sample, answer=True)) for sample in samples]
    batches = make_batches(rows, processor, batch_size=8, num_epochs=None)
    graphdef, adapters, frozen = model.split()
    # Large steps, so that two of them change what the model says.
    optimizer = adamw(2e-2, total_steps=3, warmup_steps=1)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=True), optimizer)
    state, history = fit(step, init_train_state(adapters, optimizer), frozen, batches, total_steps=2)
    model.update(state.adapters)
    prompts = [
        processor.encode(reading_messages(s, answer=False), labels=False, add_generation_prompt=True)
        for s in samples
    ]
    tokens = model.generate(processor.collate(prompts), max_new_tokens=4)
    return model, history, np.asarray(tokens)


@pytest.fixture(scope="module")
def both():
    return trained(MESH), trained(None)


def test_training_and_reading_are_those_of_one_device(both):
    (model, history, tokens), (_, wanted_history, wanted_tokens) = both
    np.testing.assert_allclose(history.losses, wanted_history.losses, rtol=1e-4)
    np.testing.assert_array_equal(tokens, wanted_tokens)
    for leaf in jax.tree.leaves(model.split()):
        assert not hasattr(leaf, "sharding") or leaf.sharding.mesh == MESH


def test_adapter_and_merged_checkpoint_are_those_of_one_device(both, tmp_path):
    for name, (model, *_) in zip(("mesh", "device"), both, strict=True):
        model.save_pretrained(tmp_path / name / "adapter")
        model.save_pretrained_merged(tmp_path / name / "merged", dtype="float32")
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        found, wanted = (load_file(tmp_path / name / file) for name in ("mesh", "device"))
        assert found.keys() == wanted.keys()
        for key, array in found.items():
            # Adam's first steps have the size of the learning rate and the gradient's sign, which
            # rounding decides where a gradient is zero but for rounding.
            close = np.isclose(array, wanted[key], rtol=1e-3, atol=1e-3)
            assert close.mean() > 0.99, (file, key, close.mean())


def test_merging_in_place_keeps_every_part_where_it_is(both):
    model = both[0][0].merge_and_unload()
    weight = model.module.model.language_model.layers.mlp.down_proj.weight.get_value()
    assert isinstance(weight, ShardedWeight)
    held = {shard.data.nbytes for shard in weight.value.addressable_shards}
    assert held == {weight.nbytes // 4}


def test_what_trains_beside_the_adapters_has_the_gradients_of_one_device():
    arguments = {"modules_to_save": ["merger"], "bias": "all", "trainable_token_indices": [3, 5, 80]}
    samples = handwritten_samples("train", 8, seed=1)

    def step(mesh, policy):
        """Loss and gradients, which gradient descent at rate 1 subtracts."""
        model, processor = FastVisionModel.from_pretrained(
            bundled_model(), load_in_16bit=True, progress=False, mesh=mesh
        )
        FastVisionModel.get_peft_model(model, r=4, layers_to_transform=[0, 2], verbose=False, **arguments)
        rows = [processor.encode(reading_messages(sample, answer=True)) for sample in samples]
        graphdef, adapters, frozen = model.split()
        before = jax.tree.map(np.asarray, adapters)
        optimizer = optax.sgd(1.0)
        take = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=policy), optimizer)
        batch = make_batches(rows, processor, batch_size=8)[0]
        state, metrics = take(init_train_state(adapters, optimizer), frozen, batch)
        return metrics["loss"], jax.tree.map(lambda a, b: a - np.asarray(b), before, state.adapters)

    loss, gradients = step(MESH, "attention+mlp")
    wanted_loss, wanted = step(None, True)
    # float32 sums over rows and features in another order.
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for found, each in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, each, rtol=0, atol=1e-4 * np.abs(each).max())
