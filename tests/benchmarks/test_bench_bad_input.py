"""What is wrong with a command of `bernini bench` is said once, clearly, and ends it with a code that is not 0."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import CLIP_SIZE, WRITERS
from servers import Server, chat_server, say

from benchmarks.quality.environment import environment
from benchmarks.quality.folder import RunFolder, describe
from benchmarks.quality.toy import ToyBenchmark
from bernini.cli import main
from bernini.media import read_video, write_video

TOY = Path(__file__).parents[2] / "assets" / "toy"
MODEL = ["--model", str(TOY), "--steps", "1", "--text-rows", "48", "--mode", "v2v", "--omega", "txt=1,scale=1"]
MODEL += ["--device", "cpu"]
SMALL = ["--max-edge", "64", "--min-edge", "32"]
IVE = ["ivebench", "--root", "ivebench", "--frames", "5", *SMALL, *MODEL]
JUDGE = ["--judge-url", "http://127.0.0.1:1/v1", "--judge-model"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a run of each of two benchmarks, and one of a third that has made nothing yet."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("ivebench", "gedit"):
            WRITERS[name](root / name)
        (root / "a-file").write_text("x")
        assert main(["bench", "run", *IVE, "--accept-licence", "--out", "run", "--examples", "0"]) == 0
        words = ["--root", "gedit", *SMALL, *MODEL, "--out", "judged"]
        assert main(["bench", "generate", "gedit", *words]) == 0
        toy = ToyBenchmark(tasks=("t2v",), per_task=1)
        RunFolder(root / "toy").start(describe(toy, toy.items(), 1), environment())
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be broken."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


def refused(words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    try:
        found: Any = main(["bench", *words])
    except SystemExit as error:  # argparse's own
        found = error.code
    error = capsys.readouterr().err
    assert re.search(told, error) and "Traceback" not in error, error
    assert found == code and len(re.findall("error: ", error)) == 1


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["run", "no-benchmark"], 2, "invalid choice: 'no-benchmark'"),
        (["run", *IVE, "--out", "new"], 78, "the licence of ivebench has to be accepted"),
        (["prepare", *IVE[:7], "--out", "new"], 78, "the licence of ivebench has to be accepted"),
        (["run", *IVE, "--accept-licence", "--root", "nowhere", "--out", "new"], 77, "0 JSON files instead of one"),
        (["run", *IVE, "--accept-licence", "--frames", "6", "--out", "new"], 78, "frames is 6"),
        (["run", *IVE, "--accept-licence", "--fps", "-1", "--out", "new"], 78, "fps is -1"),
        (["run", *IVE, "--accept-licence", "--fps", "8", "--out", "run"], 78, "settings.fps is 16 there and 8 here"),
        (["run", *IVE, "--accept-licence", "--batch-size", "0", "--out", "new"], 2, "'0' is no whole number from 1 up"),
        (["run", *IVE, "--accept-licence", "--device", "gpu", "--out", "new"], 78, "there is no device 'gpu'"),
        (["run", *IVE, "--accept-licence", "--device", "cuda:99", "--out", "new"], 78, "there is no device 'cuda:99'"),
        (["run", *IVE, "--accept-licence", "--out", "a-file"], 1, "(?s)cannot be read or written.*a-file"),
        (["run", *IVE, "--accept-licence", "--out", "ivebench"], 78, "ivebench is not empty"),
        (["run", *IVE, "--accept-licence", "--model", "nowhere", "--out", "new"], 65, "nowhere"),
        (["score", "nowhere"], 78, "no manifest.json in nowhere"),
        (["score", "run", "--workers", "-1"], 2, "'-1' is no whole number from 0 up"),
        (["score", "run", "--shard", "2/2"], 78, "there is no shard 2 of 2"),
        (["score", "toy", *JUDGE, "gpt-4o-2024-11-20"], 78, "no judge can be asked about toy"),
        (["score", "judged", *JUDGE, "gpt-4o"], 78, "is not pinned"),
        (["score", "judged", *JUDGE, "gpt-4o-2024-11-20", "--judge-key-env", "NO_SUCH_KEY"], 78, "NO_SUCH_KEY"),
        (["score", "judged", "--judge-local", str(TOY)], 78, "there is no judge in"),
        (["report", "judged"], 78, "no summary.json in judged"),
    ],
)
def test_a_command_that_cannot_run_says_why(
    words: list[str], code: int, told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    refused(words, code, told, capsys)
    assert [path for path in sorted(place.rglob("*")) if path not in before and path.name != "items.jsonl"] in (
        [],
        [place / "new"],
    )


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_judge_that_answers_nobody_ends_the_run(
    status: int, place: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [say("no", status)]
    words = ["score", "judged", "--judge-url", server.url, "--judge-model", "judge-2026-01-31"]
    refused(words, 69, str(status), capsys)


@pytest.mark.parametrize(
    ("file", "verb"), [("manifest.json", "score"), ("manifest.json", "aggregate"), ("summary.json", "report")]
)
@pytest.mark.parametrize("content", ['{"run": {', "{}", "[]", "4"])
def test_a_damaged_file_of_a_run_is_named(
    file: str, verb: str, content: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "run" / file).write_text(content)
    refused([verb, "run"], 77, f"{file} is damaged", capsys)


def test_a_run_of_another_release_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    manifest["run"]["benchmark"]["settings"]["hue"] = 1
    (place / "run" / "manifest.json").write_text(json.dumps(manifest))
    refused(["score", "run"], 78, "ivebench has no setting 'hue'", capsys)


def other(frames: int, fps: float, scale: int = 1) -> Callable[[Path], None]:
    """An output that somebody put there, and that is not what was asked for."""
    height, width = (16 * (edge // 16) * scale for edge in CLIP_SIZE)
    return lambda path: write_video(path, torch.zeros(3, frames, height, width, dtype=torch.uint8), fps)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (Path.unlink, "does not exist"),
        (lambda path: path.write_bytes(b"no clip"), "does not begin as an MP4"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "clip"),
        (other(5, 8), r"expected \(5, 32, 64, 16"),
        (other(9, 16), r"\(9, 32, 64, 16.*expected \(5,"),
        (other(5, 16, scale=2), r"\(5, 64, 128, 16.*expected \(5, 32, 64"),
    ],
)
def test_an_output_that_is_not_what_was_asked_for_has_no_score_and_says_why(
    change: Callable[[Path], object], told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(place / "run" / "scores")
    clip = sorted((place / "run" / "videos").iterdir())[1]
    change(clip)
    assert main(["bench", "score", "run"]) == 0
    refused(["aggregate", "run", "--examples", "4"], 1, "1 of 4 items lack scores", capsys)
    (failed,) = json.loads((place / "run" / "summary.json").read_text())["failures"]
    assert failed["id"] == "clip_1" and re.search(told, failed["why"])
    page = (place / "run" / "report.html").read_text()
    assert page.count("<article") == 3 + clip.exists() and ("why there is no TF" in page) == clip.exists()
    assert main(["bench", "run", *IVE, "--accept-licence", "--out", "run", "--examples", "0"]) == 0, "it is made again"
    assert read_video(clip).pixels.shape == (3, 5, 32, 64)
