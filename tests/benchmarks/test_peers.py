"""The peers' side: the same batches and losses, checkpoints that they can read, record and picture."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import peers, plot
from benchmarks.random_checkpoint import write
from benchmarks.shapes import image_text_batch, make_config
from benchmarks.torch_step import peer_batch
from vlmlora.models.loading import load_model, read_config
from vlmlora.nn.variables import Trainable
from vlmlora.training.loss import make_loss_fn

MODELS = ["qwen2_5_vl-7b", "llama-3.2-11b-vision"]


@pytest.fixture(scope="module", params=[MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    write(directory, make_config(request.param, layers=4, vision_layers=2, shrink=4))
    return directory


def test_peers_see_the_same_batch(checkpoint):
    import torch
    from transformers import AutoModelForImageTextToText

    config = read_config(checkpoint)
    batch = peer_batch(config, 2, 300)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        wanted = float(model.eval()(**batch).loss)
    module = load_model(checkpoint, config, dtype=jnp.float32, quantize=None)
    graphdef, trained, frozen = nnx.split(module, Trainable, ...)
    loss = jax.jit(make_loss_fn(graphdef))(trained, frozen, image_text_batch(config, 2, 300))
    # Sums of float32 in another order.
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_checkpoint_has_a_processor(checkpoint):
    from PIL import Image
    from transformers import AutoProcessor

    config, processor = read_config(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (448, 448)), text=text, return_tensors="np")
    assert processor.tokenizer.decode(list(range(65, 70))) == processor.tokenizer.decode([65]) + "bcdef"[1:]
    is_mllama = config.model_type == "mllama"
    image = config.image_token_index if is_mllama else config.image_token_id
    assert np.sum(inputs["input_ids"] == image) == (1 if is_mllama else 256)
    assert inputs["input_ids"].max() < config.text_config.vocab_size


def test_a_failure_is_recorded_and_rows_are_added(tmp_path, monkeypatch, capsys):
    out = tmp_path / "peers.json"
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    earlier = {"peer": "Unsloth", "quantization": "nf4", "r": 16, "rows": 4, "tokens": 1024}
    earlier |= {"step_seconds": 2.0, "tokens_per_second": 2048, "peak_gib": 8.0, "losses": [12.0]}
    out.write_text(json.dumps({"rows": [earlier, {"peer": "vlmlora", "error": "exit status 1"}]}))
    arguments = ["--checkpoint", str(tmp_path), "--peer", "ours", "--policy", "unsloth"]
    monkeypatch.setattr(sys, "argv", ["peers", *arguments, "--add", "--out", str(out)])
    peers.main()
    kept, failed = json.loads(out.read_text())["rows"]
    assert kept == earlier
    assert failed["policy"] == "unsloth"
    assert failed["error"] == "exit status 1"
    assert "failed: " in capsys.readouterr().out


def row(peer, seconds, policy=None, **more):
    found = {"peer": peer, "quantization": "nf4", "r": 16, "rows": 4, "tokens": 1024, "losses": [12.0, 11.5]}
    found |= {"step_seconds": seconds, "tokens_per_second": round(4096 / seconds), "peak_gib": 8.0}
    return found | ({} if policy is None else {"policy": policy}) | more


def test_table_compares_with_unsloth():
    rows = [row("vlmlora", 0.5, "unsloth"), row("Unsloth", 1.5)]
    rows.append({"peer": "other", "quantization": "nf4", "rows": 4, "tokens": 1024, "out_of_memory": "CUDA"})
    lines = peers.table(rows).splitlines()
    assert "3.00×" in lines[1]
    assert "1.00×" in lines[2]
    assert "CUDA" in lines[3]


def test_plot_has_a_bar_for_each_figure_and_the_limit_above(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    result = {"model": "qwen2_5_vl-7b", "device": "some GPU"}
    result["rows"] = [row("vlmlora", 0.5, "unsloth"), row("Unsloth", 1.5)]
    plot.draw_peers(result, "nf4", 675e12, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    speed, memory = figures[0].axes
    assert [bar.get_height() for bar in speed.patches] == [8192, 2731]
    assert [bar.get_height() for bar in memory.patches] == [8.0, 8.0]
    (limit,) = speed.collections
    # 0.18 s of operations for the smallest work, at that rate.
    assert limit.get_segments()[0][0, 1] == pytest.approx(4096 / 0.184, rel=0.01)
    with pytest.raises(ValueError, match="no rows"):
        plot.draw_peers(result, "none", 675e12, tmp_path / "plot.png")
