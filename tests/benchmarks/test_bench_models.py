"""`bernini bench` with models that measure: tiny random ones, from official files to tables, on the CPU."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import WRITERS
from tiny_encoders import write_clip, write_dino, write_dinov2, write_head

from benchmarks.measuring import fetch, places_of
from benchmarks.quality.folder import RunFolder, describe
from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.encoders import Clip, Dino
from benchmarks.quality.metrics.likeness import consistency
from benchmarks.quality.models.vbench import FOR_CLIP, FOR_DINO
from benchmarks.quality.official.needs import CLIP_B32, DINO_B16, LAION_LINEAR, MUSIQ_SPAQ, Places, Weights
from benchmarks.quality.official.vbench import VBench
from benchmarks.quality.summary import aggregate as aggregate_run
from benchmarks.quality.tallying import Tally, tally
from benchmarks.quality.totals import five
from benchmarks.quality.totals.records import Facts
from benchmarks.quality.toy import ToyBenchmark
from bernini.cli import main
from bernini.errors import ServiceError
from bernini.media import read_video, write_video

TOY = Path(__file__).parents[2] / "assets" / "toy"
SMALL = ["--model", str(TOY), "--steps", "1", "--text-rows", "48", "--mode", "v2v", "--omega", "txt=1,scale=1"]
SMALL += ["--device", "cpu", "--frames", "5"]
DIMENSIONS = "subject_consistency,background_consistency,aesthetic_quality,appearance_style,scene"
HUB = {"facebook/dino-vitb16": "dino", "openai/clip-vit-base-patch32": "clip"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights by their names, without the owner's."""
    root = tmp_path_factory.mktemp("weights")
    write_dino(root / "dino-vitb16")
    write_dino(root / "dino-vitb8", patch=8)
    write_dinov2(root / "dinov2-base")
    write_clip(root / "clip-vit-base-patch32")
    for seed, name in enumerate(("clip-vit-large-patch14", "PickScore_v1", "CLIP-ViT-H-14-laion2B-s32B-b79K"), 1):
        write_clip(root / name, seed)
    write_head(root / "sa_0_4_vit_l_14_linear.pth")
    write_head(root / "aesthetic-model.pth", (12, 8, 4, 1))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of a VBench with few prompts, not scored."""
    root = tmp_path_factory.mktemp("vbench")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        write_prompts(root / "data")
        assert main(["bench", "generate", "vbench", *words(root, root / "run")]) == 0
    noise = torch.Generator().manual_seed(0)
    for file in (root / "run" / "videos").iterdir():  # one step of sampling makes clips whose frames are too alike
        write_video(file, torch.randint(256, (3, 5, 32, 48), generator=noise, dtype=torch.uint8), 16)
    return root / "run"


def write_prompts(root: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt_en": "a cat", "dimension": ["subject_consistency", "aesthetic_quality"]},
        {"prompt_en": "a bay", "dimension": ["background_consistency", "scene"]},
        {
            "prompt_en": "a car, red",
            "dimension": ["appearance_style"],
            "auxiliary_info": {"appearance_style": {"appearance_style": "oil, red"}},
        },
    ]
    root.mkdir()
    (root / "VBench_full_info.json").write_text(json.dumps(rows))


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Let a VBench have three prompts with two clips each."""
    counts = dict.fromkeys(DIMENSIONS.split(","), 1)
    patch.setattr("benchmarks.quality.official.vbench.PER_DIMENSION", counts)
    patch.setattr("benchmarks.quality.official.vbench.ENTRIES", 3)
    patch.setattr("benchmarks.quality.official.vbench.SAMPLES", 2)


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of those outputs."""
    shrink(monkeypatch)
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def words(root: Path, out: Path) -> list[str]:
    place = ["--root", str(root / "data"), "--out", str(out), "--dimensions", DIMENSIONS]
    return [*place, *SMALL, "--height", "32", "--width", "48"]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def score(folder: Path, *more: str) -> int:
    return main(["bench", "score", str(folder), "--device", "cpu", *more])


def aggregate(folder: Path) -> dict[str, Any]:
    main(["bench", "aggregate", str(folder), "--examples", "0"])
    return summary(folder)


def values(folder: Path, name: str) -> dict[str, float]:
    return {key: row["value"] for key, row in RunFolder(folder).scores(name).rows().items()}


def test_without_weights_all_is_missing_as_before(run: Path) -> None:
    assert score(run) == 0
    assert not (run / "models.json").exists() and not (run / "scores").exists()
    found = aggregate(run)
    assert {row["score"] for row in found["missing"]} == set(DIMENSIONS.split(","))
    assert found["cells"] == [] and found["models"] == {}


def test_a_run_gives_the_scores_whose_weights_are_there_and_names_the_rest(
    run: Path, made: Path, weights: Path
) -> None:
    assert aggregate(run)["coverage"] == 1 and len(summary(run)["missing"]) == 5
    given = ["--weights", str(weights), "--examples", "1"]
    assert main(["bench", "run", "vbench", *words(made.parent, run), *given]) == 0
    found = summary(run)
    assert [(row["score"], row["items"]) for row in found["missing"]] == [("scene", 2)]
    assert {(cell["metric"], cell["n"], cell["of"]) for cell in found["cells"]} == {
        (name, 2, 2) for name in DIMENSIONS.split(",") if name != "scene"
    }
    assert found["coverage"] == 1 and found["failures"] == [] and not found["comparable"]
    assert found["models"].keys() == set(DIMENSIONS.split(",")) - {"scene"}
    assert found["models"]["aesthetic_quality"]["weights"].keys() == {
        "openai/clip-vit-large-patch14",
        "sa_0_4_vit_l_14_linear.pth",
    }
    (total,) = found["totals"]
    assert (total["figures"] == [] and "scene" in total["why"]) or "no item has" in total["why"]
    table = (run / "table.md").read_text()
    assert "subject consistency" in table and "| scene | 2 | weights tag2text" in table
    dino, clip = Dino(weights / "dino-vitb16", CPU), Clip(weights / "clip-vit-base-patch32", CPU)
    folder = RunFolder(run)
    for name, features in (
        ("subject_consistency", lambda clips: dino.features(FOR_DINO(clips))),
        ("background_consistency", lambda clips: clip.images(FOR_CLIP(clips))),
    ):
        for one, value in values(run, name).items():
            prompt = "a cat" if name.startswith("subject") else "a bay"
            pixels = read_video(folder.root / "videos" / f"{prompt}-{one[-1]}.mp4").pixels[:, :5]
            assert value == pytest.approx(consistency(features(pixels)), abs=1e-9) and 0 < value < 0.999


def test_scores_are_not_measured_twice_and_a_missing_output_is_a_failure(
    run: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = run / "videos" / "a cat-1.mp4"
    data = gone.read_bytes()
    gone.unlink()
    assert score(run, "--weights", str(weights)) == 0
    files = {path: path.read_bytes() for path in (run / "scores").iterdir()}
    found = aggregate(run)
    assert [(row["id"], row["stage"]) for row in found["failures"]] == [("0000-1", "score")]
    gone.write_bytes(data)
    assert score(run, "--weights", str(weights)) == 0
    for path, before in files.items():
        added = path.read_bytes().removeprefix(before)
        assert added.count(b"\n") == (path.stem in ("subject_consistency", "aesthetic_quality"))
    assert aggregate(run)["failures"] == []


def test_shards_score_as_one_process_does(run: Path, weights: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(run, parts)
    for shard in ("0/2", "1/2"):
        assert score(parts, "--weights", str(weights), "--shard", shard) == 0
    assert score(run, "--weights", str(weights)) == 0
    whole, split = aggregate(run), aggregate(parts)
    assert whole == split


def test_weights_are_named_one_by_one_or_lie_in_the_hubs_cache(run: Path, weights: Path, cache: Path) -> None:
    named = f"facebook/dino-vitb16={weights / 'dino-vitb16'}"
    repository = cache / "models--openai--clip-vit-base-patch32"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    shutil.copytree(weights / "clip-vit-base-patch32", repository / "snapshots" / "abc")
    assert score(run, "--weights", named) == 0
    assert aggregate(run)["models"].keys() == {"subject_consistency", "background_consistency", "appearance_style"}


def test_two_sets_of_weights_do_not_end_in_one_column(
    run: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(run, "--weights", str(weights)) == 0
    before = {path: path.read_bytes() for path in (run / "scores").iterdir()}
    other = write_dino(tmp_path / "other", seed=9)
    assert score(run, "--weights", f"facebook/dino-vitb16={other}") == 78
    assert "the run has subject_consistency by other weights" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (run / "scores").iterdir()} == before


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        ("facebook/dino-vitb16=nowhere", 78, "there are no weights nowhere"),
        ("nowhere", 78, "there are no weights nowhere"),
        ("facebook/dino-vitb61={}", 78, "did you mean 'facebook/dino-vitb16'"),
        ("facebook/dino-vitb16={}/clip-vit-base-patch32", 65, "config.json is of 'clip', not 'vit'"),
        ("facebook/dino-vitb16={}", 65, "there is no config.json"),
    ],
)
def test_weights_that_cannot_be_used_end_with_one_message(
    run: Path, weights: Path, given: str, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(run, "--weights", given.format(weights)) == code
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err and err.count("where:") == 1
    assert not (run / "scores").exists() and not (run / "models.json").exists()


def test_a_run_refuses_weights_before_anything_is_made(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "run", "vbench", *words(made.parent, tmp_path / "new"), "--weights", "nowhere"]) == 78
    assert "there are no weights nowhere" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_check_tells_what_models_can_measure(
    run: Path, made: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["bench", "check", "vbench", "--root", str(made.parent / "data"), "--dimensions", DIMENSIONS]
    assert main([*check, "--weights", f"facebook/dino-vitb16={weights / 'dino-vitb16'}"]) == 0
    told = capsys.readouterr().out
    assert "there: weights facebook/dino-vitb16" in told and "missing: weights openai/clip-vit-base-patch32" in told
    assert "scored by models whose weights are there: subject_consistency\n" in told
    assert main(check) == 0
    assert "scored by models whose weights are there: nothing\n" in capsys.readouterr().out


# -- whole runs of the other benchmarks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scores", "size"),
    [
        ("ivebench", {"SC", "BC"}, ["--max-edge", "64", "--min-edge", "32"]),
        ("editverse", {"pick", "frame_text", "clip_tc", "dino_tc"}, ["--max-edge", "64", "--min-edge", "32"]),
    ],
)
def test_a_run_of_one_command_measures(
    name: str, scores: set[str], size: list[str], weights: Path, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / "data")
    place = ["--root", str(tmp_path / "data"), "--accept-licence", "--out", str(tmp_path / "run"), *SMALL, *size]
    assert main(["bench", "run", name, *place, "--weights", str(weights), "--examples", "0"]) == 0
    found = summary(tmp_path / "run")
    measured = {cell["metric"] for cell in found["cells"]}
    assert scores <= measured and found["failures"] == [] and found["coverage"] == 1
    assert scores.isdisjoint(row["score"] for row in found["missing"])
    assert found["models"].keys() == scores
    if name == "editverse":  # its figures are no parts of a total
        (total,) = found["totals"]
        assert total["why"] == "" and {row["figure"] for row in total["figures"]} == scores
        (mean,) = [row["value"] for row in total["figures"] if row["figure"] == "dino_tc"]
        assert mean == pytest.approx(100 * sum(values(tmp_path / "run", "dino_tc").values()) / 3)
        assert "EditVerseBench beside" in (tmp_path / "run" / "table.md").read_text()


# -- figures of what is there ------------------------------------------------------------------------------------------


def test_figures_that_stand_alone_are_made_of_their_own_scores_or_not_at_all() -> None:
    names, kinds = tuple(five.CONVENTIONAL), five.TYPES
    facts = {kind: Facts(names, kind) for kind in kinds}
    edited, motion = "clip_similarity_target_image_edit_part", "motion_fidelity_score"
    values: dict[tuple[str, str], float | None] = {
        (kind, name): 0.5 for kind in kinds for name in ("structure_distance", edited)
    }
    values |= {(kind, motion): 0.25 for kind in kinds[1:]}  # an item lacks it
    named = Tally("FiVE", facts, five.conventional, "five", apart=True)
    (whole,), (part,) = tally([named], values, True), tally([named], values, False)
    (joined,) = tally([named._replace(apart=False)], values, True)
    assert {row["figure"]: (row["value"], row["n"]) for row in whole["figures"]} == {
        "dist_e3": (500, 6),
        "clip_edit": (0.5, 6),
    }
    assert whole["why"] == "" and part["figures"] == [] and part["why"] == "the run is of a part of the items"
    assert joined["figures"] == [] and "is missing" in joined["why"]
    values[kinds[0], edited] = None  # no score, by its definition; and the type has no other item
    (row,) = tally([named], values, True)[0]["figures"]
    assert row["figure"] == "dist_e3"


def test_a_score_that_does_not_exist_for_an_item_lowers_nothing(tmp_path: Path) -> None:
    benchmark = Vague(tasks=("v2v",), per_task=3)
    items, folder = benchmark.items(), RunFolder(tmp_path / "run")
    folder.start(describe(benchmark, items, 3), {})
    folder.scores("motion").append(
        [{"id": item.id, "value": value} for item, value in zip(items, (None, 0.5, 1.0), strict=True)]
    )
    folder.generated.append([{"id": item.id, "file": "any", "seed": 0} for item in items])
    found = aggregate_run(benchmark, items, folder)
    (cell,) = found["cells"]
    assert (cell["value"], cell["n"], cell["of"]) == (0.75, 2, 2)
    assert found["comparable"] and found["coverage"] == 1 and found["failures"] == found["missing"] == []


class Vague(ToyBenchmark):
    """A benchmark that asks for one score, which does not exist for all items."""

    name = "vague"

    def items(self) -> list[Item]:
        return [replace(item, metrics=("motion",)) for item in super().items()]

    def measured(self) -> tuple[str, ...]:
        return ("motion",)


# -- where weights lie -------------------------------------------------------------------------------------------------


def test_a_file_of_the_hub_is_found_in_its_cache(cache: Path) -> None:
    file = Weights("aesthetic-model.pth", origin="hub, BestWishYsh/OpenS2V-Weight")
    assert file.repository == "BestWishYsh/OpenS2V-Weight" and Places().find(file) is None
    snapshot = cache / "models--BestWishYsh--OpenS2V-Weight" / "snapshots" / "main"
    write_head(snapshot / "aesthetic-model.pth")
    assert Places().find(file) == snapshot / "aesthetic-model.pth"
    assert (CLIP_B32.repository, LAION_LINEAR.repository, MUSIQ_SPAQ.repository) == (CLIP_B32.name, "", "")
    assert Weights("tag2text.pth", origin="hub, spaces/a/b").repository == ""


def test_nothing_is_fetched_unless_it_is_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def offline(name: str, **more: Any) -> str:
        asked.append(name)
        raise OSError("the hub is out of reach")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert score(run) == 0 and asked == []
    assert score(run, "--download-weights") == 69
    told = capsys.readouterr().err
    assert asked == [DINO_B16.name] and "the hub is out of reach" in told and f"--weights {DINO_B16.name}=PATH" in told
    assert fetch(LAION_LINEAR) is None, "it does not lie on the hub"
    with pytest.raises(ServiceError):
        fetch(CLIP_B32)


def test_weights_are_looked_for_by_name_then_in_folders(weights: Path, tmp_path: Path) -> None:
    from argparse import Namespace

    options = Namespace(weights=[("facebook/dino-vitb16", tmp_path), ("", weights)])
    places = places_of(options, VBench())
    assert places.find(DINO_B16) == tmp_path and places.find(CLIP_B32) == weights / "clip-vit-base-patch32"
    assert places.find(Weights("facebook/none")) is None
