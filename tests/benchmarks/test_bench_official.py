"""`bernini bench` on official benchmarks, from their files to tables, with the toy model on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import WRITERS

from benchmarks.quality.bootstrap import estimate, mean_of
from benchmarks.quality.interface import Cell, cell
from benchmarks.quality.official.registry import OFFICIAL
from benchmarks.quality.tables import write_inputs
from benchmarks.quality.totals.records import Range
from bernini.cli import main

TOY = Path(__file__).parents[2] / "assets" / "toy"
SMALL = ["--model", str(TOY), "--steps", "1", "--text-rows", "48", "--mode", "v2v", "--omega", "txt=1,scale=1"]
SMALL += ["--device", "cpu", "--frames", "5", "--max-edge", "64", "--min-edge", "32"]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the benchmarks that are run here."""
    root = tmp_path_factory.mktemp("data")
    for name in ("ivebench", "openve"):
        WRITERS[name](root / name)
    return root


def run(name: str, files: Path, out: Path, *more: str, verb: str = "run") -> int:
    place = ["--root", str(files / name), "--accept-licence", "--out", str(out)]
    examples = ["--examples", "1"] if verb == "run" else []
    return main(["bench", verb, name, *place, *SMALL, *examples, *more])


@pytest.fixture(scope="module")
def edited(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of a benchmark of which one score needs no weights, with its bounds."""
    out = tmp_path_factory.mktemp("runs") / "ivebench"
    assert run("ivebench", files, out, "--bounds") == 0
    return out


def test_what_needs_no_weights_is_scored_and_the_rest_is_named_with_its_needs(edited: Path) -> None:
    found = summary(edited)
    (scored,) = found["cells"]
    assert (scored["metric"], scored["n"], scored["of"]) == ("TF", 4, 4) and 0 < scored["value"] <= 1
    assert {path.stem for path in (edited / "scores").iterdir()} == {"TF"}
    assert found["failures"] == [] and found["coverage"] == 1 and found["comparable"] is False
    lacking = {row["score"]: row for row in found["missing"]}
    assert lacking.keys() == OFFICIAL["ivebench"].metrics.keys() - {"TF"}
    assert (lacking["SC"]["items"], lacking["QA"]["items"]) == (4, 2)
    assert lacking["SC"]["needs"] == ["weights facebook/dino-vitb16 (hub, revision main)"]
    table, page = ((edited / name).read_text() for name in ("table.md", "report.html"))
    assert "| SC | 4 | weights facebook/dino-vitb16" in table and "not comparable with full runs" in table
    assert "Not scored in this run" in page


def test_there_is_no_ceiling_without_a_true_target(edited: Path, files: Path, tmp_path: Path) -> None:
    assert [path.name for path in (edited / "bounds").iterdir()] == ["source"]
    assert {path.name.split("-")[-1] for path in (edited / "examples").iterdir()} == {"source.mp4"}
    benchmark = OFFICIAL["ivebench"](root=str(files / "ivebench"), accept_licence=True, frames=5)
    labels = [label for label, _ in write_inputs(benchmark, benchmark.items()[0], tmp_path)]
    assert labels == ["source"]


def test_a_manifest_tells_the_place_of_the_data_and_compares_the_items(
    edited: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads((edited / "manifest.json").read_text())
    assert told["located"] == {"root": str(files / "ivebench"), "accept_licence": True}
    assert not told["located"].keys() & told["run"]["benchmark"]["settings"].keys()
    moved = tmp_path / "moved"
    moved.symlink_to(files, target_is_directory=True)
    videos = {path: path.stat().st_mtime_ns for path in edited.glob("videos/*")}
    assert run("ivebench", moved, edited, "--bounds") == 0, "the same data elsewhere make the same run"
    assert {path: path.stat().st_mtime_ns for path in videos} == videos
    assert json.loads((edited / "manifest.json").read_text())["located"]["root"] == str(moved / "ivebench")
    assert main(["bench", "aggregate", str(edited), "--examples", "0"]) == 0
    assert run("ivebench", files, edited, "--fps", "8") == 78
    assert "benchmark.settings.fps is 16 there and 8 here" in capsys.readouterr().err


def test_an_output_that_is_missing_is_told_where_nothing_is_scored(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("openve", files, out, "--types", "global_style", "--shard", "0/9", verb="generate") == 0
    assert main(["bench", "aggregate", str(out), "--examples", "0"]) == 1
    assert "47 of 53 items lack scores" in capsys.readouterr().err
    assert summary(out)["failures"][0]["why"] == "not generated yet"
    table = (out / "table.md").read_text()
    assert "53 of 53 items, nothing scored; not comparable" in table and "| task |" not in table


def test_a_lone_low_noise_expert_does_not_start_from_a_blank_target(
    wan: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from factories import build, make_config

    from benchmarks.quality.sampler import Trained
    from bernini.errors import ConfigError

    module = build(make_config(wan, tmp_path, tmp_path, expert="low"), tmp_path)
    benchmark = OFFICIAL["ivebench"](
        root=str(files / "ivebench"), accept_licence=True, frames=5, max_edge=64, min_edge=32
    )
    item = benchmark.items()[0]
    with pytest.raises(ConfigError, match="cannot start from pure noise"):
        Trained(module)([benchmark.conversation(item)], [0])


# -- figures of other ranges ---------------------------------------------------------------------------------------


def test_a_score_of_another_range_has_the_interval_of_the_bootstrap() -> None:
    found, allowed = [1.0, 3.0, 5.0, 4.0], Range(1, 5)
    low, high = estimate([mean_of(torch.tensor(found).numpy())], 4).bounds
    assert cell("v2v", "IS", found, 5, allowed) == Cell("v2v", "IS", 3.25, low, high, 4, 5)
    assert 1 <= low < 3.25 < high <= 5
    assert cell("v2v", "IS", [], 5, allowed) == Cell("v2v", "IS", None, 1, 5, 0, 5)
    assert cell("v2v", "VTSS", [], 5, Range()) == Cell("v2v", "VTSS", None, None, None, 0, 5)


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_list_groups_benchmarks_and_tells_their_licences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "list"]) == 0
    own, official = capsys.readouterr().out.split("Official, ")
    assert own.startswith("Own:\n\ntoy ")
    for name, kind in OFFICIAL.items():
        assert f"\n{name} {kind.version}: {kind.notes}\n  licence: {kind.source.licence}" in official
    assert official.count("--accept-licence") == sum(kind.source.restricted for kind in OFFICIAL.values())


def test_a_check_tells_what_is_there_and_what_is_missing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "scaled_offline.pth").touch()
    place = ["--root", str(files / "ivebench"), "--accept-licence", "--weights", str(tmp_path)]
    assert main(["bench", "check", "ivebench", *place]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"there: data of 4 items ({files / 'ivebench'})"
    assert "there: weights scaled_offline.pth (hub, facebook/cotracker3), for MF" in lines
    assert "missing: judge Qwen/Qwen2.5-VL-72B-Instruct (1 answer an item), for IS, CF" in lines
    assert lines[-3:] == [
        "scored from pixels: TF",
        "scored by models whose weights are there: nothing",
        "scored by a judge that is named: IS, CF",
    ]
    assert main(["bench", "check", "openve", "--root", str(tmp_path / "none"), "--accept-licence"]) == 0
    assert capsys.readouterr().out.startswith("missing: benchmark_videos.csv is missing (get ")
    assert main(["bench", "check", "openve"]) == 0
    assert "missing: the licence of openve has to be accepted" in capsys.readouterr().out


def test_a_check_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--rows"]):
        assert main(["bench", "check", *words]) == 0
        assert "201 of 210 totals" in capsys.readouterr().out
    assert main(["bench", "check", "--rows", str(tmp_path / "none.json")]) == 78
    assert main(["bench", "check", "--rows", "x.json", "openve"]) == 78
    assert "give one of the two" in capsys.readouterr().err


def test_a_licence_that_is_not_accepted_and_data_that_are_missing_end_a_run(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--root", str(files / "openve"), "--out", str(tmp_path / "a"), *SMALL]
    assert main(["bench", "run", "openve", *arguments]) == 78
    assert "the licence of openve has to be accepted" in capsys.readouterr().err
    assert run("openve", tmp_path, tmp_path / "a") == 77
    assert "openve" in capsys.readouterr().err and not (tmp_path / "a").exists()
