"""`bernini bench run --judge-local` from end to end, offline, with a tiny random Qwen2.5-VL."""

import json
from html import escape
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from local_judges import write_local_judge
from official_files import WRITERS

from benchmarks.quality.folder import ANSWERS
from bernini.cli import main

TOY = Path(__file__).parents[2] / "assets" / "toy"
SMALL = ["--model", str(TOY), "--steps", "1", "--text-rows", "48", "--mode", "v2v", "--omega", "txt=1,scale=1"]
SMALL += ["--device", "cpu", "--max-edge", "64", "--min-edge", "32", "--examples", "4"]


def test_a_random_judge_answers_every_question_once_and_nothing_is_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    WRITERS["gedit"](tmp_path)
    first, second = sorted((tmp_path / "data").iterdir())
    pq.write_table(pq.read_table(first).slice(0, 4), first)  # two are English
    second.unlink()
    judge, out = write_local_judge(tmp_path / "judge"), tmp_path / "run"
    command = ["bench", "run", "gedit", "--root", str(tmp_path), "--out", str(out), *SMALL]
    command += ["--judge-local", str(judge)]
    assert main(command) == 1  # what it says makes no sense
    told = capsys.readouterr()
    assert "2 of 2 items lack scores" in told.err and "Traceback" not in told.err and "judge@" in told.out
    found = json.loads((out / "summary.json").read_text())
    assert found["coverage"] == 0 and found["missing"] == [] and not found["comparable"]
    assert all(cell["value"] is None and (cell["n"], cell["of"]) == (0, 2) for cell in found["cells"])
    assert found["judge"]["settings"]["judge"]["kind"] == "local"
    assert {row["stage"] for row in found["failures"]} == {"score"}
    assert all(row["why"].startswith("unparsed: ") for row in found["failures"])
    (total,) = found["totals"]
    assert total["figures"] == [] and "missing" in total["why"]
    rows = [json.loads(line) for line in (out / ANSWERS).read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2  # two questions, each with its reminder
    page = (out / "report.html").read_text()
    assert page.count("<summary>judge&#39;s answer: ") == 2 * 4 and escape(rows[0]["text"][:20]) in page
    before = (out / ANSWERS).read_bytes()
    assert main(command) == 1
    assert (out / ANSWERS).read_bytes() == before and json.loads((out / "summary.json").read_text()) == found
