"""The code of docs/judges.md as it is written there, with a local server and a tiny model for large ones."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from local_judges import write_local_judge
from servers import chat_server, say

from benchmarks.quality.judging import forms
from bernini.media import write_video
from datamodules.toyworld import make_item

GUIDE = (Path(__file__).parents[1] / "docs" / "judges.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


def test_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "of-nobody")
    for number, name in enumerate(("ring", "cross", "car")):
        clip = make_item("t2v", number, frames=81, height=32, width=32).targets[0].media.pixels
        write_video(f"runs/mine/videos/{name}.mp4", clip, 16.0)
    write_local_judge(Path("models/Qwen2.5-VL-7B-Instruct"))
    first, local, calibration = BLOCKS
    names: dict[str, Any] = {}
    with chat_server() as server:
        server.replies = [say("4")]
        exec(first.replace("http://localhost:8000/v1", server.url), names)
        assert "gpt-4o-2024-11-20 #" in (told := capsys.readouterr().out) and "mean=4.0" in told
        assert "[4.0, 4.0, 4.0]" in told and len(server.asked) == 9
        pictures = [part for part in server.asked[0][1]["messages"][0]["content"] if part["type"] == "image_url"]
        assert len(pictures) == 16 and len(Path("runs/mine/judge/answers.jsonl").read_text().splitlines()) == 9
        for _ in range(2):
            exec(calibration, names)
        assert names["drift"].is_none and len(server.asked) == 15
    exec(local.replace('"cuda"', '"cpu"'), names)
    assert names["judge"].dtype == torch.bfloat16


def test_table_of_forms_is_the_code() -> None:
    (table,) = re.findall(r"\| form \|.*?\n\n", GUIDE, re.DOTALL)
    told = [line.split("`")[1] for line in table.strip().splitlines()[2:]]
    assert told == [name for name, found in vars(forms).items() if hasattr(found, "read") and name != "Form"]
