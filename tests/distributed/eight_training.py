"""Loss, gradients and a step on eight devices against those of one, and what the devices tell each other."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.jaxprs import output_shapes
from tests.models.qwen2_5_vl_cases import Case, Visual, batches, tiny_config
from vlmlora.distributed import make_mesh, place_batch, shard_model
from vlmlora.lora.apply import add_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.selection import select
from vlmlora.models.init import init_parameters
from vlmlora.models.module_table import linear_modules, module_table
from vlmlora.models.registry import family_of
from vlmlora.nn.low_rank import low_rank_products
from vlmlora.nn.variables import Trainable
from vlmlora.quantization.stacks import stack_weights
from vlmlora.quantization.weights import DenseWeight, INT8Weight, NF4Weight
from vlmlora.training import auto, remat
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.step import init_train_state, make_train_step

# Untied, so that there is a head to cut; every width of an MLP leaves blocks that straddle the cut.
CONFIG = tiny_config(text={"vocab_size": 256}, tie_word_embeddings=False)
FAMILY = family_of(CONFIG)
BATCH = batches(Case([[2, Visual(1, 4, 4), 3]] * 7 + [[9, Visual(1, 4, 4)]]), CONFIG)[1]
LORA = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, finetune_projector=True)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
MESHES = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "tensor": {"fsdp": 4, "tensor": 2},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


def make_model(stored: str):
    """A random model whose towers are stored in one way, or in several ("dynamic")."""
    module = FAMILY.model(CONFIG, dtype=jnp.float32)
    init_parameters(module, jax.random.key(0), std=0.1)
    quantizers = {"nf4": NF4Weight.quantize, "int8": INT8Weight.quantize}
    for number, (path, linear) in enumerate(linear_modules(module).items()):
        if "merger" in path or path == "lm_head" or stored == "dense":
            continue
        value = linear.weight.get_value().value
        if stored != "dynamic":
            linear.weight.set_value(quantizers[stored](value))
        elif number % 2:
            linear.weight.set_value(stack_weights([DenseWeight(value[0]), NF4Weight.quantize(value[1])]))
    add_adapters(module, select(module_table(CONFIG), LORA), LORA, jax.random.key(1))
    return module


def step_of(module, policy):
    """The step's inputs; with gradient descent at rate 1 the change of the adapters is the gradient."""
    graphdef, adapters, frozen = nnx_split(module)
    optimizer = optax.chain(optax.trace(0.9), optax.sgd(1.0))
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=policy), optimizer)
    return step, init_train_state(adapters, optimizer), adapters, frozen


def nnx_split(module):
    return nnx.split(module, Trainable, ...)


@functools.cache
def on_one_device(stored: str):
    step, state, adapters, frozen = step_of(make_model(stored), True)
    state, metrics = step(state, frozen, BATCH)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), adapters, state.adapters), metrics


def collectives(program: str) -> Counter:
    """Kind and number of axes of every array that a compiled program moves between devices, scalars aside.

    XLA joins several all-reduces in one operation, of which each operand counts.
    """
    found = Counter()
    for line in program.splitlines():
        operation = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if operation is None:
            continue
        ranks = [len(shape.split(",")) for shape in re.findall(r"\w+\[([\d,]+)\]", operation[1])]
        kind = operation[2]
        if kind == "all-reduce":
            found.update((kind, rank) for rank in ranks)
        elif ranks:
            found[kind] += 1
    return found


def expected_collectives(module, policy) -> Counter:
    """What the rules imply, for one step.

    Gathered: each array of a weight that is cut over ``fsdp``, once in the loop over the layers forward and
    once backward, where recomputing a layer and its derivative share it; once in all where there is no loop,
    and the head's, whose gradient is computed in the loop of its loss.
    A fused projection's output each time that it is computed, and its gradient. An array of an adapter, once.
    The ids of the tokens, and the features of the images, whose gradient is scattered again.

    Exchanged: the embeddings that the devices of an ``fsdp`` group looked up for each other.

    Summed over ``tensor``, as activations: of a row-parallel layer the output and, as A is cut, the product
    with A; computed again where the backward pass needs them, which does not need a layer's last output. Of a
    column-parallel layer the gradient of its input and, since B is cut, that of the product with A. The
    embedding, which is cut by tokens; the gradient of the head's input.

    Summed, of two axes: the gradient of every array of an adapter, over the batch; and in a vocabulary that
    is cut the largest logit, the sum of exponentials and the target's logit. Of one axis: which chunks of
    columns have labels in any row.
    """
    mesh, linears = module.mesh, linear_modules(module)
    cut = {axis: mesh.shape[axis] > 1 for axis in ("data", "fsdp", "tensor")}
    expected: Counter = Counter()
    adapters = jax.tree.leaves(nnx.state(module, Trainable))
    if cut["data"] or cut["fsdp"]:
        expected.update({("all-reduce", 2): len(adapters), "all-gather": 1, "reduce-scatter": 1})
        expected["all-reduce", 1] += 1
    if cut["fsdp"]:
        expected.update({"all-gather": 1, "all-to-all": 1})
        expected["all-gather"] += sum("fsdp" in str(leaf.sharding.spec) for leaf in adapters)
    if cut["tensor"]:
        expected.update({("all-reduce", 2): 3, ("all-reduce", 3): 1})
    for path, linear in linears.items():
        loops = linear.stack is not None
        weight, name = linear.weight.get_value(), path.rpartition(".")[2]
        for leaf in jax.tree.leaves(weight.parts):
            is_gathered = cut["fsdp"] and "fsdp" in str(leaf.sharding.spec)
            expected["all-gather"] += (2 if loops else 1) * is_gathered
        if weight.layout.gather_output:
            expected["all-gather"] += 3 if policy else 2
            expected["all-reduce", 3] += 1
        elif weight.layout.cut == "rows":
            expected["all-reduce", 3] += 2 if linear.adapter is not None else 1
        elif weight.layout.cut == "columns":
            again = {"down_proj": 1, "o_proj": 2, "proj": 2}.get(name, 0) if policy else 0
            expected["all-reduce", 3] += 2 + again
    return expected


@pytest.mark.parametrize(
    ("mesh", "stored", "policy"),
    [
        ("mixed", "nf4", True),
        *[
            pytest.param(mesh, stored, (number + turn) % 2 == 0, marks=pytest.mark.slow)
            for number, mesh in enumerate(MESHES)
            for turn, stored in enumerate(("dense", "nf4", "int8", "dynamic"))
            if (mesh, stored) != ("mixed", "nf4")
        ],
    ],
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(mesh, stored, policy):
    wanted, wanted_metrics = on_one_device(stored)
    module = make_model(stored)
    shard_model(module, FAMILY, make_mesh(**MESHES[mesh]))
    step, state, adapters, frozen = step_of(module, policy)
    before = jax.tree.map(np.asarray, adapters)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    program = step.lower(state, frozen, BATCH).compile()
    if stored != "dynamic":
        assert collectives(program.as_text()) == expected_collectives(module, policy)
    new, metrics = program(state, frozen, place_batch(BATCH, module.mesh), None)
    assert jax.tree.map(lambda leaf: leaf.sharding, new) == where
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    # float32 sums in another order: over rows, over features, and over the vocabulary.
    np.testing.assert_allclose(metrics["loss"], wanted_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], wanted_metrics["grad_norm"], rtol=1e-4)
    gradients = jax.tree.map(lambda a, b: a - np.asarray(b), before, new.adapters)
    for (path, found), leaf in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
    ):
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("mesh", "stored", "joins"),
    [("data", "nf4", True), ("fsdp", "dynamic", True), ("tensor", "nf4", False)],
)
def test_low_rank_products_join_where_no_product_is_cut(mesh, stored, joins, monkeypatch):
    joined = []

    def count(x, weights, factors, **options):
        joined.extend(weights)
        return low_rank_products(x, weights, factors, **options)

    monkeypatch.setattr("vlmlora.nn.linear.low_rank_products", count)
    module = make_model(stored)
    shard_model(module, FAMILY, make_mesh(**MESHES[mesh]))
    graphdef, adapters, frozen = nnx_split(module)
    jax.eval_shape(make_loss_fn(graphdef, gradient_checkpointing=True), adapters, frozen, BATCH)
    assert bool(joined) == joins


@pytest.mark.parametrize(("mesh", "columns"), [("data", 2), ("tensor", 1)])
def test_a_chunk_of_the_loss_has_as_many_tokens_on_every_device(mesh, columns):
    """Of eight rows a device has one, or two of them and its part of the logits."""
    module = make_model("dense")
    shard_model(module, FAMILY, make_mesh(**MESHES[mesh]))
    graphdef, adapters, frozen = nnx_split(module)
    loss = make_loss_fn(graphdef, gradient_checkpointing=True, chunk_size=2)
    shapes = output_shapes(jax.make_jaxpr(loss)(adapters, frozen, BATCH))
    vocabulary = CONFIG.text_config.vocab_size
    assert {shape for shape in shapes if len(shape) == 3 and shape[::2] == (8, vocabulary)} == {
        (8, columns, vocabulary)
    }


def test_offloaded_layer_inputs_are_named_on_a_mesh(monkeypatch):
    """There is no host memory to offload to on a CPU, so that the program is traced and not compiled."""
    module = make_model("nf4")
    shard_model(module, FAMILY, make_mesh(**MESHES["mixed"]))
    graphdef, adapters, frozen = nnx_split(module)
    monkeypatch.setattr(remat, "_offloads_to_host", lambda: True)
    gradient = jax.grad(make_loss_fn(graphdef, gradient_checkpointing="unsloth"))
    assert "<host>" in str(jax.make_jaxpr(gradient)(adapters, frozen, BATCH))


@pytest.mark.slow
def test_a_policy_is_chosen_for_each_device(tmp_path, monkeypatch):
    """A device of eight has an eighth of the activations, beside the same weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    optimizer = optax.chain(optax.trace(0.9), optax.sgd(1.0))
    policy = {"vision": True, "language": "auto"}

    def step_and_arguments(mesh):
        module = make_model("dense")
        if mesh is not None:
            shard_model(module, FAMILY, mesh)
        graphdef, adapters, frozen = nnx_split(module)
        loss = make_loss_fn(graphdef, gradient_checkpointing=policy)
        state = init_train_state(adapters, optimizer)
        step = make_train_step(loss, optimizer, memory_budget=2**30)
        return loss, step, (state, frozen, BATCH if mesh is None else place_batch(BATCH, mesh), None)

    mesh = make_mesh(**MESHES["data"])
    (one_loss, _, on_one), (loss, step, on_eight) = step_and_arguments(None), step_and_arguments(mesh)
    one, eight = auto.Planner(one_loss, on_one), auto.Planner(loss, on_eight)
    activations = [each.cost(True).memory - each.held for each in (one, eight)]
    assert activations[1] == pytest.approx(activations[0] / 8, rel=0.05)
    assert step.policy(*on_eight) == {"vision": True, "language": auto.ALL}
    _, metrics = step(*on_eight)
    np.testing.assert_allclose(metrics["loss"], on_one_device("dense")[1]["loss"], rtol=1e-5)


def test_rows_that_do_not_divide_are_refused():
    module = make_model("dense")
    shard_model(module, FAMILY, make_mesh(fsdp=8))
    step, state, _, frozen = step_of(module, True)
    uneven = {name: array[:, :6] if name == "position_ids" else array[:6] for name, array in BATCH.items()}
    with pytest.raises(
        ValueError, match=r"6 rows on axis 0, .* fsdp=8 = 8 devices; make batch_size a multiple of 8"
    ):
        step(state, frozen, uneven)
    images = BATCH | {
        name: BATCH[name][:3] for name in ("pixel_values", "patch_positions", "image_segment_ids")
    }
    with pytest.raises(ValueError, match=r"pixel_values \[3, .* make Budget\(max_images=…\) a multiple of 8"):
        step(state, frozen, images)
    with pytest.raises(ValueError, match="on a mesh already"):
        shard_model(module, FAMILY, make_mesh(fsdp=8))
