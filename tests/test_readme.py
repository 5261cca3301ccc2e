"""The README's commands, as they are written there."""

import re
import shlex
from pathlib import Path

import pytest
from real_clips import write_pair

from bernini.cli import main
from bernini.media import probe_video

ROOT = Path(__file__).parents[1]
# Shorter, for the suite: what the README leaves to the configuration.
SHORT = {"prepare": ["--fps", "4"], "fit": ["--trainer.max_steps", "2"], "predict": ["--model.sampling.steps", "2"]}


def commands() -> list[list[str]]:
    """Every `.venv/bin/bernini` line."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/bernini ")]


def test_own_clips_end_as_an_edited_mp4_of_the_sources_geometry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("configs", "assets"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path / "clips")
    assert [command[0] for command in commands()] == ["prepare", "fit", "predict"]
    config = (ROOT / "configs/toy/clips.yaml").read_text().replace("every_n_train_steps: 20", "every_n_train_steps: 2")
    (tmp_path / "short.yaml").write_text(config)
    for command in commands():
        short = ["short.yaml" if word == "configs/toy/clips.yaml" else word for word in command]
        assert main([*short, *SHORT[command[0]]]) == 0
    source, edit = (probe_video(p) for p in ("clips/carphone.src.mp4", "runs/clips/edits/carphone.mp4"))
    assert source == edit
    assert edit == {"height": 144, "width": 176, "frames": 120, "fps": pytest.approx(30000 / 1001)}
