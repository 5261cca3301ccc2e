"""`bernini demo` from end to end, with a few training steps."""

import json
from pathlib import Path

import pytest

from bernini.cli import main
from bernini.media import probe_video


def test_demo_leaves_report_figures_clips_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "40", "--samples", "32"]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["items"] == 48
    assert metrics["source"]["edit_done"] == 0 and metrics["source"]["rest_unchanged"] == 1
    assert metrics["ceiling"]["edit_done"] > 0.8  # what the shipped VAE lets through
    for expert in ("high", "low"):
        assert metrics[f"loss_{expert}"]["last"] < metrics[f"loss_{expert}"]["first"]
        assert (out / expert / "config.yaml").is_file()
        assert len(list((out / expert / "samples" / "step-000000").glob("*.mp4"))) == 4
    edits = [json.loads(line)["file"] for line in (out / "edits" / "predictions.jsonl").read_text().splitlines()]
    assert len(edits) == 48
    assert probe_video(out / "edits" / edits[0]) == {"height": 64, "width": 64, "frames": 9, "fps": 16}
    page = (out / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 36
    assert f"bernini fit -c {out / 'high.yaml'}" in page
    assert {p.name for p in (out / "model").iterdir()} == {"transformer", "transformer_2"}


def test_demo_leaves_a_folder_of_something_else_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 78
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
