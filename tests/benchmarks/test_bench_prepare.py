"""`bernini bench prepare`, and what `generate` makes of its list."""

import hashlib
import json
from pathlib import Path
from shutil import copytree

import pytest
from official_files import WRITERS

from benchmarks.quality.official.registry import OFFICIAL
from bernini.cli import main

SMALL = ["--frames", "5", "--max-edge", "64", "--min-edge", "32"]
TOY = Path(__file__).parents[2] / "assets" / "toy"
MODEL = ["--model", str(TOY), "--steps", "1", "--text-rows", "48", "--device", "cpu", "--mode", "v2v"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("ivebench", "gedit", "five"):
        WRITERS[name](root / name)
    return root


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """Files of four items of its own."""
    return copytree(written / "ivebench", tmp_path / "data")


def prepare(data: Path, out: Path, *more: str, name: str = "ivebench") -> int:
    sizes = SMALL if name == "ivebench" else SMALL[2:] if name == "gedit" else []
    return main(["bench", "prepare", name, "--root", str(data), "--accept-licence", "--out", str(out), *sizes, *more])


def generate(data: Path, out: Path, *more: str) -> int:
    place = ["--root", str(data), "--accept-licence", "--out", str(out)]
    return main(["bench", "generate", "ivebench", *place, *MODEL, *SMALL, *more])


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


def test_the_list_has_all_items_and_the_hashes_of_their_sources(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert prepare(data, tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert "there: 4 items, 4 source files, sha256 " in told and "missing: weights facebook/dino-vitb16" in told
    assert "missing: judge Qwen/Qwen2.5-VL-72B-Instruct" in told and "scored from pixels: TF" in told
    found = rows(tmp_path / "run")
    assert [row["prompt"] for row in found] == [f"make it {i} dogs" for i in range(4)]
    assert found[0]["expect"] == {"frames": 5, "height": 32, "width": 64, "fps": 16.0}
    clip = (data / "videos" / "clip 0.mp4").read_bytes()
    assert found[0]["sources"] == {"videos/clip 0.mp4": hashlib.sha256(clip).hexdigest()}
    assert prepare(data, tmp_path / "run", "--list", str(tmp_path / "mine.jsonl")) == 0
    assert (tmp_path / "mine.jsonl").read_bytes() == (tmp_path / "run" / "items.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "kinds"), [("gedit", {".parquet"}), ("five", {".mp4", ".jpg"})])
def test_all_that_scores_are_made_from_is_listed(name: str, kinds: set[str], written: Path, tmp_path: Path) -> None:
    assert prepare(written / name, tmp_path / "run", name=name) == 0
    found = rows(tmp_path / "run")
    assert len(found) == len(OFFICIAL[name](root=str(written / name), accept_licence=True).items())
    assert all({Path(file).suffix for file in row["sources"]} == kinds for row in found)


def test_a_source_that_does_not_open_is_told_before_anything_is_made(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = data / "videos" / "clip 2.mp4"
    content = clip.read_bytes()
    clip.unlink()  # a hard link to the others
    at = content.index(b"mdat") + 8
    clip.write_bytes(content[:at] + bytes(len(content[at:]) // 2) + content[at + len(content[at:]) // 2 :])
    for verb in (prepare, generate):
        assert verb(data, tmp_path / "run") == 77
        error = capsys.readouterr().err
        assert "1 of 4 source files cannot be read" in error and "clip 2.mp4" in error and "Traceback" not in error
        assert not (tmp_path / "run").exists()


def test_a_run_goes_by_its_list(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert prepare(data, out, "--frames", "9") == 0 and prepare(data, out) == 0  # nothing was made of it yet
    before = (out / "items.jsonl").stat().st_mtime_ns
    assert generate(data, out) == 0 and len([*(out / "videos").iterdir()]) == 4
    assert prepare(data, out) == 0 and prepare(data, out, "--frames", "9") == 78
    assert "the list is of other items" in capsys.readouterr().err
    clip = data / "videos" / "clip 1.mp4"
    other = clip.read_bytes() + b"\0\0\0\x08free"
    clip.unlink()
    clip.write_bytes(other)
    assert prepare(data, out) == 78
    assert "1 source files have changed, the first is videos/clip 1.mp4" in capsys.readouterr().err
    assert (out / "items.jsonl").stat().st_mtime_ns == before
    (out / "items.jsonl").write_text("{}\n")
    assert prepare(data, out) == 78
    assert "no list of items" in capsys.readouterr().err


def test_generating_prepares_where_that_was_not_done(data: Path, tmp_path: Path) -> None:
    assert generate(data, tmp_path / "a") == 0 and prepare(data, tmp_path / "b") == 0
    assert (tmp_path / "a" / "items.jsonl").read_bytes() == (tmp_path / "b" / "items.jsonl").read_bytes()


def test_the_toy_world_has_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = ["--tasks", "t2i", "--per-task", "2", "--out", str(tmp_path)]
    assert main(["bench", "prepare", "toy", *toy]) == 0
    assert "there: 2 items, 0 source files" in capsys.readouterr().out
    assert [row["sources"] for row in rows(tmp_path)] == [{}, {}]
