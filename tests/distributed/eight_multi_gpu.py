"""The benchmark of many GPUs, on eight virtual devices and with a model of one layer."""

import json
import sys

import numpy as np
import pytest

from benchmarks import multi_gpu
from benchmarks.multi_gpu import LOSS_BOUND, NORM_BOUND, Reference, compare
from benchmarks.shapes import image_text_batch, join_batches, make_config

SMALL = ["--layers", "1", "--vision-layers", "1", "--r", "4", "--rows", "1", "--tokens", "300"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["multi_gpu", *SMALL, *arguments, "--out", str(out)])
        multi_gpu.main()
        rows = json.loads(out.read_text())["rows"]
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert [json.loads(line) for line in lines] == rows
        return rows

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "axes"), [(2, ["fsdp"]), (8, ["data", "fsdp", "tensor"])])
def test_losses_equal_those_of_one_device_and_collectives_are_timed(run, devices, axes):
    configs = [f"7b-nf4-{axis}" for axis in ("single", *axes)]
    single, *rows = run("--shrink", "4", "--devices", str(devices), "--configs", *configs)
    assert single["devices"] == 1
    assert single["collective_ms"] == 0
    # Of all shares, of which its own steps see the first alone.
    assert abs(single["compared_losses"][0] - single["losses"][0]) > LOSS_BOUND * single["losses"][0]
    for row in rows:
        assert row["devices"] == row["rows"] == devices
        assert row["losses"][:2] == pytest.approx(single["compared_losses"], rel=LOSS_BOUND)
        assert row["grad_norms"][:2] == pytest.approx(single["compared_grad_norms"], rel=NORM_BOUND)
        assert row["equals_single"]
        assert row["collective_ms"] > 0
        assert row["scaling"] == pytest.approx(
            row["tokens_per_second"] / single["tokens_per_second"] / devices, rel=0.05
        )


def test_a_failure_is_a_row_and_the_budget_ends_the_run(run):
    failed, other = run("--shrink", "7", "--configs", "7b-nf4-single", "7b-nf4-data")
    assert "shrink=7 does not divide" in failed["error"]
    assert "shrink=7" in other["error"]
    (skipped,) = run("--budget", "0", "--configs", "72b-nf4-fsdp")
    assert "spent" in skipped["skipped"]


def test_another_loss_is_not_equal():
    reference = Reference(1.0, [7.0, 6.9], [0.5, 0.5])
    assert compare([7.001, 6.9, 6.8], [0.501, 0.5], reference)["equals_single"]
    assert not compare([7.0, 6.8], [0.5, 0.5], reference)["equals_single"]
    assert not compare([7.0, 6.9], [0.5, 0.6], reference)["equals_single"]


@pytest.mark.parametrize("name", ["qwen2_5_vl-7b", "llama-3.2-11b-vision"])
def test_joined_batches_count_images_on(name):
    config = make_config(name, layers=1, vision_layers=1, shrink=4)
    whole = image_text_batch(config, 4, 300)
    parts = [image_text_batch(config, 2, 300, seed=seed) for seed in range(2)]
    joined = join_batches(config, parts)
    assert {k: v.shape for k, v in joined.items()} == {k: v.shape for k, v in whole.items()}
    counted = "image_index" if "image_index" in whole else "image_token_index"
    for array in (counted, "position_ids"):
        np.testing.assert_array_equal(joined[array], whole[array])
    np.testing.assert_array_equal(joined["pixel_values"][2:], parts[1]["pixel_values"])
