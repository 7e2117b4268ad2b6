"""The model on paper against what one GPU was measured to take."""

import json
from itertools import pairwise

import pytest

from benchmarks.cost_model import (
    GPUS,
    LAYOUTS,
    MEASURED,
    MODELS,
    MeshSize,
    bandwidth,
    communication_seconds,
    efficiency,
    estimate,
)

QWEN_7B = MODELS[0]


def test_one_gpu_takes_what_was_measured():
    measured = json.loads(MEASURED.read_text())
    assert measured["device"].startswith("NVIDIA H100")
    assert 0.2 < efficiency() < 0.8
    for work in measured["work"]:
        step = estimate(QWEN_7B, MeshSize(), work["rows"], work["tokens"])
        # The efficiency is that of the largest work; a smaller one is less efficient than is assumed.
        assert step.compute == pytest.approx(work["step_seconds"], rel=0.15)
        # What the allocator holds beyond one layer's arrays is not in the model.
        assert step.memory_gib == pytest.approx(work["peak_gib"], rel=0.1)
        assert step.communication == 0


def test_models_have_their_size():
    # Of the checkpoints, without norms, biases, convolutions and the parts between the towers.
    for model, billions in zip(MODELS, (8.29, 10.67, 73.4), strict=True):
        parameters = model.language_weights + model.vision_weights + 2 * model.head
        assert parameters == pytest.approx(billions * 1e9, rel=0.02)


def test_groups_use_the_links_between_their_members():
    nvlink, port = bandwidth(8, 1), bandwidth(2, 8)
    assert bandwidth(4, 2) == nvlink
    assert bandwidth(16, 1) == 8 * port < nvlink
    assert bandwidth(8, 4) == 2 * port


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_more_gpus_never_communicate_less_nor_hold_more(model):
    for mesh in LAYOUTS.values():
        steps = [estimate(model, mesh(gpus), 4 * mesh(gpus).tensor, 2048) for gpus in GPUS]
        assert all(mesh(gpus).gpus == gpus for gpus in GPUS)
        for fewer, more in pairwise(steps):
            assert more.communication >= fewer.communication
            assert more.memory_gib <= fewer.memory_gib
    # Adapters are small: repeating the model costs almost nothing, cutting every weight something.
    assert communication_seconds(model, MeshSize(data=64), 4, 2048) < 0.02
    assert communication_seconds(model, MeshSize(fsdp=64), 4, 2048) > 0.02
