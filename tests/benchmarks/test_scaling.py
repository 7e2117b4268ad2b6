"""Growth with the length of a row and with the rank: what is measured, saved and drawn."""

import json
import sys

import pytest

from benchmarks import plot, scaling

SMALL = ["--layers", "1", "--vision-layers", "1", "--shrink", "4", "--steps", "1", "--rank-work", "1x300"]


@pytest.mark.slow
def test_every_length_and_rank_is_a_row(tmp_path, monkeypatch, capsys):
    out = tmp_path / "scaling.json"
    arguments = [*SMALL, "--tokens", "600", "300", "--ranks", "4", "--r", "2"]
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments, "--out", str(out)])
    scaling.main()
    result = json.loads(out.read_text())
    works = [(row["varied"], row["rows"], row["tokens"], row["r"]) for row in result["rows"]]
    assert works == [("rank", 1, 300, 4), ("tokens", 1, 300, 2), ("tokens", 1, 600, 2)]
    assert all(row["step_seconds"] > 0 and row["loss"] > 0 for row in result["rows"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines == result["rows"]

    monkeypatch.setattr(sys, "argv", ["scaling", *arguments, "--budget", "0", "--out", str(out)])
    scaling.main()
    assert all("skipped" in row for row in json.loads(out.read_text())["rows"])


def test_plot_shows_figures_and_limit(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    rows = [
        {"varied": "tokens", "rows": 1, "tokens": tokens, "r": 16, "step_seconds": tokens / 10_000}
        | {"peak_gib": 8.0, "tflops": tokens / 20_000}
        for tokens in (4096, 1024)
    ]
    result = {"model": "qwen2_5_vl-7b", "quantization": "nf4", "device": "some GPU", "rows": rows}
    plot.draw_scaling(result, 1e12, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    times, memory = figures[0].axes
    measured, limit = times.lines
    assert measured.get_xydata().tolist() == [[1024, 0.1024], [4096, 0.4096]]
    assert limit.get_ydata() == pytest.approx([0.0512, 0.2048])
    assert memory.lines[0].get_ydata().tolist() == [8.0, 8.0]
    with pytest.raises(ValueError, match="no rows"):
        plot.draw_scaling({**result, "rows": []}, 1e12, tmp_path / "plot.png")
