"""The report's gallery: what it shows, and that a browser filters, sorts and plays it."""

import json
from collections import Counter
from pathlib import Path

import pytest
from browser import Tab, browse, needs_chromium

from benchmarks.quality.environment import environment
from benchmarks.quality.folder import ANSWERS, RunFolder, describe
from benchmarks.quality.gallery import EDGE, choose, shrunk, standings
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.answers import answered
from benchmarks.quality.page import write_page
from benchmarks.quality.summary import aggregate
from benchmarks.quality.toy import ToyBenchmark
from bernini.media import read_video, resize, write_image, write_video

BENCHMARK = ToyBenchmark(tasks=("i2i", "v2v"), per_task=8, frames=9, size=64)
ITEMS = BENCHMARK.items()
VALUES = {(item.id, metric): 7 * n % 17 / 16 for n, item in enumerate(ITEMS) for metric in item.metrics}
LACKING = "v2v-000003"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run whose outputs are the sources, one of which could not be scored."""
    folder = RunFolder(tmp_path_factory.mktemp("gallery") / "run")
    folder.start(describe(BENCHMARK, ITEMS, len(ITEMS)), environment())
    for item in ITEMS:
        media = BENCHMARK.conversation(item).sources[0].media
        path = folder.output(BENCHMARK, item)
        write_video(path, media.pixels, media.fps) if path.suffix == ".mp4" else write_image(path, media.pixels)
        folder.generated.append([{"id": item.id, "file": str(path.relative_to(folder.root)), "seed": 1}])
        for metric in item.metrics:
            row = {"failed": "unparsed: <b>no</b> number"} if item.id == LACKING else {"value": VALUES[item.id, metric]}
            folder.scores(metric).append([{"id": item.id, **row}])
    answer(folder.root / ANSWERS, *((item.id, 0, 0, f"of {item.id}: </pre><script>no()") for item in ITEMS))
    aggregate(BENCHMARK, ITEMS, folder)
    return write_page(BENCHMARK, ITEMS, folder, 16)


def answer(path: Path, *said: tuple[str, int, int, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for item, repeat, turn, text in said:
            row = {"question": f"{item}/all", "item": item, "repeat": repeat, "turn": turn, "text": text}
            file.write(json.dumps(row) + "\n")


def test_an_item_stands_among_those_of_its_task() -> None:
    items = [Item(f"{task}{n}", task, "", ITEMS[0].expect, ("good", "bad")) for task in "ab" for n in range(3)]
    values = {(item.id, "good"): [1.0, 5.0, 5.0, 0.1, 0.2, 0.3][n] for n, item in enumerate(items)}
    found = standings(items, values | {("a0", "bad"): 9.0, ("a1", "bad"): 7.0}, {"bad"})
    assert found == pytest.approx(
        {"a0": (1 / 6 + 1 / 4) / 2, "a1": (2 / 3 + 3 / 4) / 2, "a2": 2 / 3} | {"b0": 1 / 6, "b1": 1 / 2, "b2": 5 / 6}
    )
    assert standings(items, {}, ()) == {}


@pytest.mark.parametrize("count", [0, 1, 3, 8, 16, 40])
def test_the_worst_the_best_and_random_ones_are_shown_once_each(count: int) -> None:
    values = {key: value for key, value in VALUES.items() if key[0] != LACKING}
    found = choose(ITEMS, values, (), count)
    shown = Counter(item.id for own in found.values() for item in own)
    assert shown.total() == min(count, len(ITEMS)) and set(shown.values()) <= {1}
    rank = standings(ITEMS, values, ())
    assert [len(found[name]) for name in ("worst", "best")] == [min(count // 4, 7)] * 2
    for chosen, least in (("worst", min), ("best", max)):
        if own := found[chosen]:
            assert rank[own[0].id] == least(rank[item.id] for item in ITEMS if item.id != LACKING)
    assert [item.id for item in found["score missing"]] == [LACKING] * (count >= 4)
    for alike in ({}, dict.fromkeys(VALUES, 1.0)):
        found = choose(ITEMS, alike, (), count)
        assert found["worst"] == found["best"] == [], "nothing is best where nothing is scored, or all is alike"


def test_what_the_judge_said_of_an_output_of_before_is_past(tmp_path: Path) -> None:
    path = tmp_path / ANSWERS
    assert answered(path) == {}
    answer(path, ("a", 0, 0, "first"), ("a", 0, 1, "again"), ("a", 1, 0, "twice"), ("a", 0, 0, "of the new output"))
    with path.open("a") as file:
        file.write('{"question": "b", "tex')
    assert answered(path) == {"a": [("a/all", "of the new output"), ("a/all, repeat 1", "twice")]}


def test_a_large_file_is_shown_smaller_and_made_again_when_it_changes(tmp_path: Path) -> None:
    pixels = resize(BENCHMARK.conversation(ITEMS[-1]).sources[0].media.pixels, EDGE // 2, 2 * EDGE)
    write_video(tmp_path / "clip.mp4", pixels, 8)
    label, copy = shrunk("output", tmp_path / "clip.mp4", tmp_path / "examples")
    assert label == f"output, {2 * EDGE}×{EDGE // 2} made smaller"  # noqa: RUF001
    assert read_video(copy).pixels.shape == (3, 9, EDGE // 4, EDGE) and read_video(copy).fps == 8
    before = copy.read_bytes()
    write_video(tmp_path / "clip.mp4", 255 - pixels, 8)
    assert shrunk("output", tmp_path / "clip.mp4", tmp_path / "examples")[1].read_bytes() != before
    write_video(tmp_path / "small.mp4", pixels[..., :EDGE], 8)
    assert shrunk("output", tmp_path / "small.mp4", tmp_path)[1] == tmp_path / "small.mp4"


@needs_chromium
def test_a_browser_filters_sorts_and_plays(page: Path, tmp_path: Path) -> None:
    seen = (
        "[...document.querySelectorAll('.case')].filter((c) => !c.hidden).map((c) => c.querySelector('h3').textContent)"
    )
    scores = "[...document.querySelectorAll('.case')].filter((c) => !c.hidden).map((c) => JSON.parse(c.dataset.scores))"

    def choose_from(name: str, value: str) -> str:
        find = f'document.querySelector(\'[data-facet="{name}"], [name="{name}"]\')'
        return f"{find}.value = '{value}'; {find}.dispatchEvent(new Event('input', {{bubbles: true}}))"

    async def drive(tab: Tab) -> None:
        assert len(await tab.run(seen)) == 16
        assert "16 of 16" in await tab.run("document.querySelector('.filter output').value")
        facets = await tab.run("[...document.querySelectorAll('[data-facet]')].map((m) => m.dataset.facet)")
        assert facets == ["shown as", "task", "category"]
        await tab.run(choose_from("shown as", "=worst"))
        assert len(await tab.run(seen)) == 4
        await tab.run(choose_from("shown as", "=score missing"))
        assert await tab.run(seen) == [LACKING]
        assert "unparsed: <b>no</b> number" in await tab.run(
            "document.querySelector('.case:not([hidden])').textContent"
        )
        said = "document.querySelector('.case:not([hidden]) details:last-of-type pre').textContent"
        assert await tab.run(said) == f"of {LACKING}: </pre><script>no()"
        await tab.run(choose_from("shown as", ""))
        await tab.run(choose_from("task", "=v2v"))
        assert len(await tab.run(seen)) == 8
        await tab.run(choose_from("score", "=motion"))
        found = [one.get("motion") for one in await tab.run(scores)]
        assert found[-1] is None and found[:-1] == sorted(found[:-1])
        await tab.run(choose_from("order", "-1"))
        assert [one.get("motion") for one in await tab.run(scores)] == [*found[-2::-1], None]
        await tab.run(choose_from("low", "0.4"))
        assert [one["motion"] for one in await tab.run(scores)] == [x for x in found[-2::-1] if x >= 0.4]
        await tab.run(choose_from("score", ""))
        assert len(await tab.run(seen)) == 8
        playing = "new Promise((done) => { const clip = document.querySelector('.case:not([hidden]) video'); "
        playing += "clip.scrollIntoView(); clip.muted = true; clip.play(); "
        playing += (
            "clip.addEventListener('timeupdate', () => { if (clip.currentTime > 0) done(clip.currentTime); }); })"
        )
        assert await tab.run(playing) > 0
        errors = "[...document.querySelectorAll('video')].filter((clip) => clip.error).length"
        assert await tab.run(errors) == 0
        await tab.shoot(tmp_path / "page.png")

    tab = browse(page, tmp_path / "profile", drive)
    assert tab.told == [] and tab.fetched <= {"file", "data"}
