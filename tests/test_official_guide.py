"""docs/official.md against what there is: every row, example and configuration."""

import re
from pathlib import Path

import pytest
import yaml
from official_files import WRITERS, place
from test_configs import BASE, tiny

from benchmarks.quality.models.registry import MEASURES
from benchmarks.quality.official.registry import OFFICIAL
from bernini.cli import main

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "official.md").read_text()
BLOCKS = dict(re.findall(r"```(\w*)\n(.*?)```", GUIDE, re.DOTALL))
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in GUIDE.splitlines() if line.startswith("| `")]
KINDS = {cells[0].strip("`"): cells for cells in ROWS if len(cells) == 4}
PLACES = {name: cells for cells in ROWS if len(cells) == 3 for name in re.findall(r"`(\w+)`", cells[0])}
REAL = {"vbench": 5, "vbench2": 0}
"""Files that the real list of prompts has fewer than the one that is written here: it has one more prompt twice."""


def test_every_benchmark_has_its_rows() -> None:
    assert list(KINDS) == list(PLACES) == list(OFFICIAL)
    for name, (_, _, _, licence) in KINDS.items():
        source = OFFICIAL[name].source
        assert licence.endswith("*") == source.restricted
        assert source.licence.startswith(licence.removesuffix("*").strip().partition(",")[0])
    for name, (_, get, _) in PLACES.items():
        told = re.findall(r"dataset (\S+/[\w-]+)|(pip download --no-deps \S+?)`|github\.com/([\w-]+/\w+)", get)
        source = OFFICIAL[name].source
        assert all(next(filter(None, found)) in source.home + source.download for found in told)


def test_every_score_that_models_give_has_its_row_with_its_weights() -> None:
    section = GUIDE.partition("## Weights")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line]
    told = {(name, row[1].strip("`")): row[2].split(", ") for row in rows for name in row[0].split(", ")}
    assert told == {
        (name, score): [need.name for need in OFFICIAL[name].needs[score]]
        for name, measures in MEASURES.items()
        for score in measures
    }


@pytest.mark.parametrize("name", [name for name, cells in KINDS.items() if cells[1]])
def test_there_are_as_many_items(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    items = OFFICIAL[name](root=str(tmp_path), accept_licence=True).items()
    assert len(items) - REAL.get(name, 0) == int(KINDS[name][1])


def test_the_example_of_own_prompts_is_read(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(BLOCKS["json"])
    place(tmp_path, re.findall(r'"((?:clips|refs)/[^"]+)"', BLOCKS["json"]))
    items = OFFICIAL["bernini_bench"](root=str(tmp_path)).items()
    assert [(item.id, item.task) for item in items] == [("remove-01", "v2v"), ("add-01", "rv2v")]


def test_the_example_tells_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    exec(BLOCKS["python"], {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "evaluation_metadata.jsonl is missing" in lines[0]
    assert "mask2former" in lines[1] and "openai/clip-vit-large-patch14" in lines[2]
    WRITERS["geneval"](tmp_path / "data" / "geneval")
    for name in re.findall(r"weights (\S+)", "".join(lines)):
        (tmp_path / "data" / "weights" / name).mkdir(parents=True)
    exec(BLOCKS["python"], {})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_configuration_is_of_this_benchmark_and_accepts_no_licence(name: str) -> None:
    content = yaml.safe_load((ROOT / "configs" / "bench" / f"{name}.yaml").read_text())
    (callback,) = content["trainer"]["callbacks+"]
    made = callback["init_args"]["benchmark"]
    kind = OFFICIAL[name]
    assert made["class_path"] == f"{kind.__module__}.{kind.__qualname__}"
    assert made["init_args"].get("accept_licence") == (False if kind.source.restricted else None)
    assert callback["init_args"]["folder"].endswith(f"/bench/{name}")


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("openve", 78, "the licence of openve has to be accepted"),
        ("geneval", 77, "evaluation_metadata.jsonl is missing"),
    ],
)
def test_a_run_without_licence_or_data_ends_with_one_message(
    name: str, code: int, told: str, wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["-c", str(BASE), "-c", str(ROOT / "configs" / "bench" / f"{name}.yaml")]
    assert main(["fit", *files, *tiny(BASE, wan, shards)]) == code
    err = capsys.readouterr().err
    assert err.count(told) == 1 and "Traceback" not in err and "fix:" in err


def test_the_command_uses_configurations_that_exist() -> None:
    (words,) = [line.split() for line in BLOCKS[""].splitlines() if line.startswith("bernini ")]
    files = [word for word in words if word.endswith(".yaml")]  # tests/test_configs.py builds them one over the other
    assert words[1] == "fit" and len(files) == 2 and all((ROOT / file).is_file() for file in files)
