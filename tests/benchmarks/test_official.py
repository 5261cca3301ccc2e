"""Every official benchmark over files of its format: items, names, sizes, sources, licence, and what is missing."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from official_files import CLIP_FPS, PICTURE_SIZE, WRITERS

from benchmarks.quality.folder import describe
from benchmarks.quality.interface import Item, subset
from benchmarks.quality.official.base import OfficialBenchmark
from benchmarks.quality.official.drafts import word
from benchmarks.quality.official.needs import Judge, Weights, is_cached
from benchmarks.quality.official.openve import FIVE, SIX
from benchmarks.quality.official.registry import OFFICIAL
from bernini.errors import ConfigError, DataError

COUNTS = {
    "vbench": {"t2v": 6225},  # 946 entries, one of them twice here: 6,230 clips that have 6,225 names
    "vbench_i2v": {"i2v": 1118 * 5},
    "vbench2": {"t2v": 1219 * 3 + 10 * 20},
    "opens2v": {"r2v": 180},
    "openve": {"v2v": 431},
    "editverse": {"v2v": 1, "rv2v": 1, "ads2v": 1},
    "five": {"v2v": 420},
    "ivebench": {"v2v": 4},
    "bernini_bench": {"v2v": 22, "rv2v": 1},
    "gedit": {"i2i": 11},
    "imgedit": {"i2i": 737},
    "geneval": {"t2i": 553 * 4},
    "dpg": {"t2i": 1065 * 4},
    "wise": {"t2i": 1000},
    "wise_legacy": {"t2i": 1000},
    "rise": {"i2i": 360},
}
OUTPUTS = {
    "vbench": ["a thing, 0-0.mp4", "a thing, 0-1.mp4"],
    "vbench_i2v": ["a view, 0-0.mp4", "a view, 0-1.mp4"],
    "vbench2": ["Human_Anatomy/" + ("a thing, 0" + " and on" * 40)[:180] + "-0.mp4"],
    "opens2v": ["singleobj_1.mp4"],
    "openve": ["0000_global_style_It's_edited.mp4"],
    "editverse": ["0/generate.mp4", "1/generate.mp4"],
    "five": ["0000_bus/1_a [red] bus on the road, numbe.mp4"],
    "ivebench": ["clip 0.mp4"],
    "bernini_bench": ["v2v/v-0.mp4"],
    "gedit": [f"fullset/background_change/en/{0:032x}.png", f"fullset/color_alter/en/{1:032x}.png"],
    "imgedit": ["1000.png"],
    "geneval": ["00000/samples/0000.png", "00000/samples/0001.png"],
    "dpg": ["item0/0.png"],
    "wise": ["1.png", "2.png"],
    "wise_legacy": ["1.png"],
    "rise": ["images/temporal_reasoning/temporal_reasoning_0.png"],
}


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory):
    """Gives each benchmark over files that are written once."""
    root = tmp_path_factory.mktemp("official")

    def make(name: str, **settings) -> OfficialBenchmark:
        folder = root / name
        if not folder.exists():
            WRITERS[name](folder)
        return OFFICIAL[name](root=str(folder), accept_licence=True, **settings)

    return make


def by_task(items: list[Item]) -> dict[str, Item]:
    return {item.task: item for item in reversed(items)}


def test_each_benchmark_has_files_here() -> None:
    assert OFFICIAL.keys() == WRITERS.keys() == COUNTS.keys() == OUTPUTS.keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_items_are_those_of_the_files_and_outputs_have_the_official_names(name: str, official) -> None:
    benchmark = official(name)
    items = benchmark.items()
    assert Counter(item.task for item in items) == COUNTS[name]
    names = [benchmark.output_path(item) for item in items]
    assert names[: len(OUTPUTS[name])] == OUTPUTS[name]
    assert len(set(names)) == len(names) == len({item.id for item in items})
    assert all(item.id == word(item.id) for item in items), "reports name files by it"
    seen = {metric for item in items for metric in item.metrics}
    of_another_split = {"uge"} if name == "imgedit" else set()
    assert seen == set(benchmark.metrics) - of_another_split, "each score is asked of some item"
    assert set(benchmark.needs) <= set(benchmark.metrics)
    assert len({item.seed(42) for item in items}) == len(items), "samples of one prompt differ"


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_same_settings_give_the_same_items_also_by_way_of_json(name: str, official) -> None:
    benchmark = official(name)
    again = type(benchmark)(**json.loads(json.dumps({**benchmark.settings(), **benchmark.located()})))
    assert again == benchmark
    assert describe(again, again.items(), 1) == describe(benchmark, benchmark.items(), 1)


@pytest.mark.parametrize("name", OFFICIAL)
def test_conversation_is_what_the_task_takes_and_the_output_is_as_large_as_what_it_follows(name: str, official) -> None:
    benchmark = official(name)
    for item in by_task(benchmark.items()).values():
        asked, expect = benchmark.conversation(item).check(), item.expect
        assert (asked.task, asked.prompt, asked.key) == (item.task, item.prompt, item.id)
        assert asked.info["blank_target"] is True
        (target,) = asked.targets
        assert target.media.pixels.shape == (3, expect.frames, expect.height, expect.width)
        assert target.media.fps == expect.fps
        assert (expect.frames, expect.fps) == (1, 0) or (expect.frames % 4 == 1 and expect.fps > 0)
        first = asked.sources[0].media if asked.sources else None
        if item.task in ("v2v", "rv2v", "ads2v"):
            assert first.pixels.shape == target.media.pixels.shape and first.fps == expect.fps
        elif item.task in ("i2i", "i2v"):
            assert first.pixels.shape[2:] == target.media.pixels.shape[2:]
        else:
            sizes = benchmark.sizes()
            assert (expect.height, expect.width) == (sizes.height, sizes.width)
        files = [*item.extra.get("videos", []), *item.extra.get("images", [])]
        assert len(asked.sources) == (1 if name == "gedit" else len(files))


@pytest.mark.parametrize("name", [name for name, kind in OFFICIAL.items() if kind.source.restricted])
def test_a_licence_is_accepted_before_anything_is_read(name: str, official, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the licence of {name} has to be accepted") as caught:
        OFFICIAL[name](root=str(tmp_path)).items()
    assert OFFICIAL[name].source.licence in caught.value.what and "accept_licence: true" in caught.value.fix


def test_data_that_may_not_be_used_freely_asks_for_it() -> None:
    asking = {name for name, kind in OFFICIAL.items() if kind.source.restricted}
    assert {"openve", "five", "editverse"} <= asking  # not for commercial use
    assert not asking & {"vbench", "vbench_i2v", "vbench2", "opens2v", "gedit", "geneval", "dpg", "bernini_bench"}


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_empty_folder_is_told_with_what_to_get(name: str, tmp_path: Path) -> None:
    benchmark = OFFICIAL[name](root=str(tmp_path), accept_licence=True)
    with pytest.raises(DataError) as caught:
        benchmark.items()
    assert str(tmp_path) in caught.value.where and caught.value.fix == f"get {benchmark.source.download}"


@pytest.mark.parametrize("wrong", [{"frames": 80}, {"height": 470}, {"fps": -1}, {"fps": 0}, {"max_edge": 0}])
def test_sizes_without_a_meaning_are_refused(wrong: dict) -> None:
    name = "opens2v" if "max_edge" in wrong else "vbench"
    with pytest.raises(ConfigError):
        OFFICIAL[name](**wrong)


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("vbench", {"dimensions": ("sene",)}, "did you mean 'scene'"),
        ("vbench", {"dimensions": ()}, "missing"),
        ("vbench2", {"dimensions": ("material", "material")}, "once"),
        ("vbench_i2v", {"ratio": "4-3"}, "16-9"),
        ("opens2v", {"domain": "opened"}, "did you mean 'open'"),
        ("opens2v", {"edition": "v2.0"}, "v1.1, v1.0"),
        ("openve", {"types": ("style",)}, "global_style"),
        ("imgedit", {"split": "hard"}, "basic, uge"),
        ("gedit", {"language": "zh"}, "en, cn, all"),
    ],
)
def test_settings_without_a_meaning_are_refused(name: str, wrong: dict, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OFFICIAL[name](**wrong)
    assert told in str(caught.value)


# -- what single benchmarks add ---------------------------------------------------------------------------------------


def test_vbench_makes_the_clips_of_a_prompt_that_comes_twice_once_for_the_dimensions_of_both(official) -> None:
    items = official("vbench").items()
    assert sum(item.extra["entries"] for item in items) == 6230
    twice = [item for item in items if item.extra["entries"] == 2]
    assert len(twice) == 5 and len({item.prompt for item in twice}) == 1
    assert set(twice[0].metrics) == {
        "appearance_style",
        "overall_consistency",
        "aesthetic_quality",
        "imaging_quality",
    }
    assert twice[0].extra["auxiliary_info"] == {"appearance_style": {"appearance_style": "oil painting"}}
    assert Counter(item.repeat for item in items if "temporal_flickering" in item.metrics) == dict.fromkeys(
        range(25), 75
    )


def test_vbench_dimensions_can_be_chosen(official) -> None:
    items = official("vbench", dimensions=["scene", "aesthetic_quality"]).items()
    assert len(items) == (86 + 93) * 5
    assert {item.metrics for item in items} == {("scene",), ("aesthetic_quality",)}


def test_i2v_starts_from_the_frame_of_the_ratio(official) -> None:
    items = official("vbench_i2v").items()
    camera = [item for item in items if "camera_motion" in item.metrics]
    assert len(camera) == 763 * 5 and camera[0].prompt == "a view, 0, camera pans left"
    assert camera[0].extra["images"] == ["crop/16-9/a view, 0.jpg"]


@pytest.mark.parametrize(
    ("domain", "edition", "count", "left_out"),
    [
        ("open", "v1.1", 180, set()),
        ("human", "v1.1", 60, {"nexus_score"}),
        ("single", "v1.0", 90, {"motion_smoothness"}),
        ("human", "v1.0", 60, {"nexus_score", "motion_smoothness"}),
    ],
)
def test_opens2v_domains_and_editions(domain: str, edition: str, count: int, left_out: set, official) -> None:
    benchmark = official("opens2v", domain=domain, edition=edition)
    items = benchmark.items()
    assert len(items) == count
    assert set(benchmark.metrics) - {metric for item in items for metric in item.metrics} == left_out
    faced = {item.category for item in items if "face_sim" in item.metrics}
    assert faced == {"singlehuman", "singleface", "faceobj", "humanobj"} & {item.category for item in items}
    three = next(item for item in items if len(item.extra["images"]) == 3)
    assert len(three.extra["class_label"]) == 3 and len(benchmark.conversation(three).sources) == 3


@pytest.mark.parametrize(("types", "count"), [(FIVE, 5 * 54 - 1), (SIX, 6 * 54 - 1)])
def test_openve_type_sets(types: tuple[str, ...], count: int, official) -> None:
    items = official("openve", types=types).items()
    assert len(items) == count and {item.category for item in items} == set(types)
    assert items[0].extra["videos"] == ["videos/0000_global_style_It's.mp4"]


def test_editverse_tags_become_words_and_sources(official) -> None:
    benchmark = official("editverse")
    plain, referring, filling = benchmark.items()
    assert plain.prompt == "Add a golden crown."
    assert referring.prompt == "Put the hat of the image on the woman in the video."
    assert filling.prompt == "Fill the video where the video 2 is white."
    assert plain.extra["text"].startswith("<video1>") and plain.extra["target_prompt"] == "a woman with a crown"
    assert [m.type for m in benchmark.conversation(referring).sources] == ["video", "image"]
    assert len(filling.extra["videos"]) == 2


def test_five_keeps_the_rate_and_has_masks_and_questions(official) -> None:
    items = official("five").items()
    first, last = items[0], next(item for item in items if item.id == "edit6-000-0000_bus")
    assert first.expect.fps == CLIP_FPS and first.expect.frames == 17  # 14, padded to 4k + 1
    assert first.prompt == "a red bus on the road, number 0 of many"
    assert first.extra["masks"] == "bmasks/0000_bus" and len(first.extra["questions"]) == 3
    assert not {"yn", "mc", "union", "inter"} & {*last.metrics} and last.extra["questions"] == {}
    assert Counter(item.category for item in items) == {
        **dict.fromkeys(("rigid_replace", "non_rigid_replace", "color", "material"), 100),
        **dict.fromkeys(("add", "remove"), 10),
    }
    slower = official("five", fps=8).items()[0]
    assert (slower.expect.fps, slower.expect.frames) == (8.0, 5)


def test_ivebench_counts_only_where_the_number_changes(official) -> None:
    items = official("ivebench").items()
    assert ["QA" in item.metrics for item in items] == [False, True, False, True]
    assert "target_span" not in items[0].extra and items[0].extra["target_phrase"] == "dogs"


def test_gedit_reads_each_source_from_its_row(official) -> None:
    benchmark = official("gedit", language="all", min_edge=1)
    items = benchmark.items()
    assert len(items) == 22 and len({item.extra["parquet"] for item in items}) == 2
    for item in items:
        number = int(item.extra["output"][-6:-4], 16)
        (source,) = benchmark.sources(item)[1]
        assert tuple(source.shape) == (3, 1, PICTURE_SIZE[0], PICTURE_SIZE[1] - number)
        assert item.extra["intersection"] == (number % 2 == 0)


def test_imgedit_hard_split(official) -> None:
    items = official("imgedit", split="uge").items()
    assert len(items) == 47 and items[0].extra["images"] == ["UGE/000000000.jpg"]


def test_dpg_questions_know_their_parents_and_the_row_that_is_left_out(official) -> None:
    first = official("dpg").items()[0]
    assert [(q["id"], q["parents"], q["row"]) for q in first.extra["questions"]] == [(1, [], 0), (2, [1], 1)]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("wise", {"culture": 400, **dict.fromkeys(("time", "space", "biology", "physics", "chemistry"), 120)}),
        (
            "wise_legacy",
            {"culture": 400, "time": 167, "space": 133, **dict.fromkeys(("biology", "physics", "chemistry"), 100)},
        ),
    ],
)
def test_wise_categories_follow_from_the_number(name: str, counts: dict[str, int], official) -> None:
    assert Counter(item.category for item in official(name).items()) == counts


def test_rise_gives_the_scores_that_apply(official) -> None:
    items = official("rise").items()
    assert set(items[0].metrics) == {"reasoning", "plausibility"} and items[0].extra["consistency_free"] is True
    logical = [item for item in items if item.category == "logical"]
    assert len(logical) == 85 and {item.metrics for item in logical} == {("reasoning", "consistency")}


# -- rewritten prompts, and what is missing ---------------------------------------------------------------------------


def test_rewritten_prompts_leave_names_as_they_are(official, tmp_path: Path) -> None:
    plain = official("vbench")
    entries = json.loads((Path(plain.root) / "VBench_full_info.json").read_text())
    lines = tmp_path / "longer.txt"
    lines.write_text("".join(f"At length, entry {n}.\n" for n in range(len(entries))))
    pairs = tmp_path / "longer.json"
    pairs.write_text(json.dumps({row["prompt_en"]: f"Longer: {row['prompt_en']}" for row in entries}))
    official_items = plain.items()
    for file in (lines, pairs):
        items = replace(plain, rewritten=str(file)).items()
        assert [item.extra["output"] for item in items] == [item.extra["output"] for item in official_items]
        assert [item.extra["prompt"] for item in items] == [item.prompt for item in official_items]
    assert items[0].prompt == "Longer: a thing, 0"
    by_line = {item.extra["prompt"]: item.prompt for item in replace(plain, rewritten=str(lines)).items()}
    assert by_line["a thing, 1"] == "At length, entry 1."
    (twice,) = {item.prompt for item in official_items if item.extra["entries"] == 2}
    assert by_line[twice] == f"At length, entry {[row['prompt_en'] for row in entries].index(twice)}.", "its first line"


@pytest.mark.parametrize(
    ("content", "told"),
    [("one line\n", "1 lines instead of 946"), ("x\n" * 945 + "\n", "a line is empty")],
)
def test_a_rewriting_of_something_else_is_refused(content: str, told: str, official, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text(content)
    with pytest.raises(DataError, match=told):
        replace(official("vbench"), rewritten=str(tmp_path / "some.txt")).items()
    (tmp_path / "some.json").write_text('{"another prompt": "longer"}')
    with pytest.raises(DataError, match="a prompt has no rewritten one"):
        replace(official("vbench"), rewritten=str(tmp_path / "some.json")).items()


def test_what_is_missing_is_told_line_by_line(official, tmp_path: Path) -> None:
    lines = list(official("openve").missing(lambda need: False))
    scores = "instruction_compliance, consistency, visual_quality"
    assert lines == [f"missing: judge gemini-2.5-pro (1 answer an item), for {scores}"]
    assert list(official("openve").missing(lambda need: isinstance(need, Judge))) == []
    absent, *_ = OFFICIAL["vbench"](root=str(tmp_path)).missing(lambda need: True)
    assert absent.startswith("missing: VBench_full_info.json is missing (get the wheel: pip download")
    human = list(official("opens2v", domain="human", edition="v1.0").missing(lambda need: False))
    assert not any("one-align" in line or "yolo" in line for line in human), "scores that no item gets need nothing"


def test_weights_are_found_in_a_folder_or_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    clip, raft = Weights("openai/clip"), Weights("raft.pth", origin="somewhere")
    assert not is_cached(clip) and not is_cached(raft, tmp_path) and not is_cached(Judge("any"), tmp_path)
    repository = tmp_path / "cache" / "models--openai--clip"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "preprocessor_config.json").touch()
    own = Weights("openai/clip", revision="0123")
    assert not is_cached(own) and is_cached(replace(own, processor=True)), "a processor is not the weights"
    (snapshot / "model.safetensors").touch()
    assert is_cached(own) and not is_cached(clip)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    assert is_cached(clip) and not is_cached(Weights("openai/clip", revision="v2"))
    (tmp_path / "raft.pth").touch()
    (tmp_path / "clip").mkdir()
    assert is_cached(raft, tmp_path) and is_cached(Weights("openai/clip", revision="v2"), tmp_path)


def test_missing_sources_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    WRITERS["openve"](tmp_path)
    for name in ("0003_global_style_It's", "0200_local_remove_It's"):
        path = next((tmp_path / "videos").glob(f"{name[:4]}_*"))
        path.unlink()
    with pytest.raises(DataError, match="2 of 431 source files of openve are missing, the first is videos/0003_"):
        OFFICIAL["openve"](root=str(tmp_path), accept_licence=True).items()


def test_a_part_is_spread_over_the_tasks(official) -> None:
    part = subset(official("bernini_bench").items(), 2)
    assert {item.task for item in part} == {"v2v", "rv2v"}
