"""The demonstration on an untrained model: what it writes, and that training changes what is read."""

import io
import json

import numpy as np
import pytest
import torch
from bundled_model.directory import write_directory
from bundled_model.weights import write_initial_weights
from peft import PeftModel
from PIL import Image
from rich.console import Console
from transformers import Qwen2_5_VLForConditionalGeneration

from vlmlora.demo import run
from vlmlora.demo.handwriting import DemoSettings, bundled_model, exact_match
from vlmlora.demo.handwritten_digits import handwritten_samples
from vlmlora.demo.report import accuracy_table
from vlmlora.training.loop import History

SETTINGS = DemoSettings(steps=3, batch_size=4, train_strings=8, test_strings=4, r=2)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("untrained")
    write_directory(path)
    write_initial_weights(path, seed=0)
    return path


@pytest.fixture(scope="module")
def out(untrained, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "out"
    (path / "adapter").mkdir(parents=True)
    (path / "adapter" / "stale.txt").touch()
    (path / "mine.txt").touch()
    run(path, settings=SETTINGS, model_directory=untrained, console=Console(file=io.StringIO()))
    return path


def test_it_writes_its_files_and_nothing_else(out):
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter",
        "loss.png",
        "mine.txt",
        "report.json",
        "samples.png",
    ]
    assert not (out / "adapter" / "stale.txt").exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    for name in ("loss.png", "samples.png"):
        assert np.ptp(np.asarray(Image.open(out / name))) > 100


def test_the_report_has_what_it_promises(out):
    report = json.loads((out / "report.json").read_text())
    assert report.keys() == {
        "base_accuracy",
        "adapted_accuracy",
        "steps",
        "seconds",
        "trainable_parameters",
        "versions",
    }
    assert report["steps"] == SETTINGS.steps
    # Of the seven linear modules of a language layer and the five of a vision layer, each r * (in + out).
    text = 4 * 2 * ((192 + 192) * 2 + (192 + 64) * 2 + (192 + 512) * 3)
    vision = 4 * 2 * ((160 + 480) + (160 + 160) + (160 + 448) * 3)
    assert report["trainable_parameters"] == text + vision


def test_peft_loads_the_adapter(out, untrained):
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(untrained, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out / "adapter")
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert sum(bool(p.abs().max() > 0) for p in trained) == len(trained) == 4 * 7 + 4 * 5


def test_a_failed_run_leaves_what_was_there(untrained, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("vlmlora.demo.handwriting.plot_samples", fail)
    # Neither reading nor training matters here, and both take long to compile.
    monkeypatch.setattr("vlmlora.demo.handwriting.read_pictures", lambda *_: ["1"] * SETTINGS.test_strings)
    monkeypatch.setattr(
        "vlmlora.demo.handwriting.fit", lambda step, state, *_, **__: (state, History(losses=[1.0]))
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(OSError, match="disk full"):
        run(
            tmp_path / "out",
            settings=SETTINGS,
            model_directory=untrained,
            console=Console(file=io.StringIO()),
        )
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["out", "out/report.json"]
    assert (tmp_path / "out" / "report.json").read_text() == "{}"


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="out is a file"):
        run(tmp_path / "out")


def test_the_table_counts_strings_of_each_length():
    samples = handwritten_samples("test", 8, seed=0)
    right = [sample.text for sample in samples]
    console = Console(file=io.StringIO(), width=100)
    console.print(accuracy_table(samples, ["?"] * 8, right))
    shown = console.file.getvalue()
    assert shown.count("0.0%") == 5 + 5
    assert exact_match(samples, right) == 1
    assert exact_match(samples, ["?", *right[1:]]) == 7 / 8
    with pytest.raises(ValueError, match="3 answers for 8 pictures"):
        exact_match(samples, right[:3])


def test_an_incomplete_installation_is_named(monkeypatch):
    monkeypatch.setattr("vlmlora.demo.handwriting.BUNDLED_MODEL", "absent")
    with pytest.raises(FileNotFoundError, match=r"absent has no model\.safetensors"):
        bundled_model()
