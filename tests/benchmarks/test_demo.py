"""`bernini demo` from end to end, with a few training steps."""

import json
import signal
from pathlib import Path

import pytest
from safetensors import safe_open

from bernini.cli import main
from bernini.media import probe_video


def test_demo_leaves_report_figures_clips_and_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, handler = tmp_path / "demo", signal.getsignal(signal.SIGTERM)
    assert main(["demo", "--out", str(out), "--steps", "12", "--samples", "16", "--held-out", "12"]) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert str(out / "report.html") in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["items"] == metrics["steps"] == 12
    assert metrics["source"]["edit_done"]["value"] == 0 and metrics["source"]["rest_unchanged"]["value"] == 1
    assert metrics["ceiling"]["edit_done"]["value"] > 0.8  # what the shipped VAE lets through
    assert metrics["before"]["edit_done"]["value"] < 0.2  # the shipped family does not know the edit
    for name in ("before", "after"):
        clips = sorted((out / name / "videos").rglob("*.mp4"))
        assert len(clips) == 12 == metrics[name]["edit_done"]["n"]
        assert probe_video(clips[0]) == {"height": 64, "width": 64, "frames": 9, "fps": 16}
    samples = sorted((out / "fit" / "samples").iterdir())
    assert [s.name for s in samples] == ["step-000000", "step-000004", "step-000008", "step-000012"]
    assert all(len(list(s.glob("*.mp4"))) == 4 for s in samples)
    assert sorted(p.name for p in (out / "fit" / "bench").iterdir())[-1] == "step-000012"
    page = (out / "report.html").read_text()
    # New edits: source, before, after, target. Reasoning edits: source, output without and with a plan.
    assert page.count("data:video/mp4;base64,") == 4 * 12 + 3 * 6
    assert page.count("data:image/png;base64,") == 6  # plans
    assert metrics["planned"]["edit_done"]["value"] > metrics["unplanned"]["edit_done"]["value"]
    assert f"bernini fit -c {out / 'fit.yaml'}" in page
    loras = sorted((out / "fit" / "lora").glob("*.safetensors"))
    assert len(loras) == 2
    with safe_open(loras[0], "pt") as file:
        assert any("lora_B" in key for key in file.keys())  # noqa: SIM118  not a dictionary


def test_demo_leaves_a_folder_of_something_else_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 78
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
