"""What judges are asked about each benchmark: what is shown, what is read out of answers, and the official figures."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judges import Replies, make_judge, words
from official_files import WRITERS
from servers import Server, chat_server, say

from benchmarks.quality.beside import printed
from benchmarks.quality.folder import RunFolder
from benchmarks.quality.inquiries.base import read_rubric
from benchmarks.quality.inquiries.five import settled
from benchmarks.quality.inquiries.registry import INQUIRIES
from benchmarks.quality.interface import Item, subset
from benchmarks.quality.judged_scoring import score_by_judge
from benchmarks.quality.judging.judged import Judged
from benchmarks.quality.judging.showing import Shown
from benchmarks.quality.official.base import OfficialBenchmark
from benchmarks.quality.official.registry import OFFICIAL
from benchmarks.quality.tallying import tally
from benchmarks.quality.totals.records import SHARE
from bernini.errors import DataError
from bernini.media import write_image, write_video

SIZES = {"frames": 9, "max_edge": 64, "min_edge": 32, "height": 32, "width": 32, "accept_licence": True}
LABELLED = {
    "imgedit": ("Instruction compliance: 4\nSeamlessness: 3\nPreservation: 2", {"first": 4, "second": 3, "third": 2}),
    "openve": (
        "Instruction compliance: 4\nConsistency: 3\nVisual quality: 2",
        {"instruction_compliance": 4, "consistency": 3, "visual_quality": 2},
    ),
    "editverse": ("Instruction: 3\n**Quality:** 1\nBackground: 2", {"editing_quality": 6}),
    "opens2v": ("4", {"natural_score": 4}),
    "ivebench": ("2", {"IS": 2, "CF": 2}),
    "wise": ("Yes.", {"correct": 1}),
    "wise_legacy": (
        "Consistency: 2\nRealism: 1\nAesthetic quality: 0",
        {"consistency": 2, "realism": 1, "aesthetic_quality": 0},
    ),
    "rise": ("It grew.\n\n**Final Score:** **4**", dict.fromkeys(("reasoning", "consistency", "plausibility"), 4)),
    "gedit": (
        '{"score": [7, 3]}',
        dict.fromkeys(("success", "naturalness"), 7) | dict.fromkeys(("over_editing", "artefacts"), 3),
    ),
    "bernini_bench": (
        "Overall: 1\nInstruction following: 2\nConsistency: 3\nIdentity: 4\nQuality: 5",
        {"OS": 1, "IF": 2, "VC": 3, "IC": 4, "GQ": 5},
    ),
    "five": ("", {"yn": 1, "mc": 1, "union": 1, "inter": 1}),
}
"""What a judge may answer to our own texts, and the scores that it gives."""
OUT_OF_RANGE = {
    "opens2v": "6",
    "ivebench": "0",
    "editverse": "Instruction: 4\nQuality: 1\nBackground: 2",
    "wise": "Maybe",
    "wise_legacy": "Consistency: 3\nRealism: 1\nAesthetic quality: 0",
    "rise": "Final score: 6",
    "gedit": '{"score": [11, 3]}',
    "imgedit": "Instruction compliance: 4\nSeamlessness: 3\nPreservation: 0",
    "openve": "Instruction compliance: 6\nConsistency: 3\nVisual quality: 2",
    "bernini_bench": "Overall: 0\nInstruction following: 0\nConsistency: 3\nIdentity: 4\nQuality: 5",
    "five": "z",
}
MALFORMED = "I would give 4 of 5, since 2 dogs are seen."


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OfficialBenchmark]:
    """A benchmark over small files of its own, which are written once."""
    root = tmp_path_factory.mktemp("data")

    def make(name: str, **settings: Any) -> OfficialBenchmark:
        if not (root / name).exists():
            WRITERS[name](root / name)
        known = OFFICIAL[name].__dataclass_fields__
        return OFFICIAL[name](root=str(root / name), **{key: v for key, v in SIZES.items() if key in known}, **settings)

    return make


def some(benchmark: OfficialBenchmark, count: int = 4) -> list[Item]:
    """A few items that are judged."""
    asked = set(INQUIRIES[benchmark.name].scores)
    return subset([item for item in benchmark.items() if asked & set(item.metrics)], count)


def made(benchmark: OfficialBenchmark, items: list[Item], root: Path) -> RunFolder:
    """A run whose outputs are noise."""
    folder = RunFolder(root)
    for number, item in enumerate(items):
        noise, expect = torch.Generator().manual_seed(number), item.expect
        size = (3, expect.frames, expect.height, expect.width)
        pixels = torch.randint(256, size, generator=noise, dtype=torch.uint8)
        path = folder.output(benchmark, item)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, pixels) if path.suffix == ".png" else write_video(path, pixels, expect.fps)
    return folder


QUESTIONS = {
    "source_yes_no_question": "Is the bus blue?",
    "target_yes_no_question": "Is the bus red?",
    "multiple_choice_question": "Is the bus a) blue or b) red?",
}


def driving(source: str = "no", target: str = "yes", choice: str = "(B)") -> Callable[[str], str]:
    """Answers to FiVE's questions."""
    return lambda text: choice if "letter" in text else source if "blue" in text else target


def with_questions(items: list[Item], **questions: str) -> list[Item]:
    """FiVE's items with other questions."""
    return [replace(item, extra={**item.extra, "questions": questions}) for item in items]


def judged(name: str, benchmark: OfficialBenchmark, folder: RunFolder, items: list[Item], server: Server) -> Judged:
    inquiry = INQUIRIES[name](benchmark)
    return score_by_judge(inquiry, items, folder, make_judge(server.url), cap=inquiry.cap, repeats=1)


@pytest.mark.parametrize("name", INQUIRIES)
def test_each_benchmark_is_asked_about_and_its_answers_are_read(
    name: str, official: Callable[..., OfficialBenchmark], server: Server, tmp_path: Path
) -> None:
    benchmark = official(name)
    items = some(benchmark)
    folder = made(benchmark, items, tmp_path)
    answer, scores = LABELLED[name]
    if name == "five":
        items = with_questions(items, **QUESTIONS)
    Replies(server, driving() if name == "five" else lambda text: answer)
    found = judged(name, benchmark, folder, items, server)
    assert found.values() == {i.id: {k: v for k, v in scores.items() if k in i.metrics} for i in items}
    assert all(count == 0 for count in found.violations().values())
    for _, body in server.asked:
        assert "<" not in words(body) and "image_url" in str(body)
    judge = folder.judge()
    assert judge is not None and set(scores) <= set(judge["scores"]) <= set(benchmark.metrics)


@pytest.mark.parametrize("answer", ["malformed", "out of range"])
@pytest.mark.parametrize("name", INQUIRIES)
def test_what_is_no_answer_is_no_score(
    name: str, answer: str, official: Callable[..., OfficialBenchmark], server: Server, tmp_path: Path
) -> None:
    benchmark = official(name)
    items = some(benchmark, 2)
    folder = made(benchmark, items, tmp_path)
    Replies(server, lambda text: MALFORMED if answer == "malformed" else OUT_OF_RANGE[name])
    found = judged(name, benchmark, folder, items, server)
    assert found.values() == {} and found.coverage()[1] > 0
    for score in INQUIRIES[name].scores:
        rows = folder.scores(score).rows()
        assert rows.keys() == {item.id for item in items if score in item.metrics}
        assert all(row["failed"].startswith("unparsed: ") and "value" not in row for row in rows.values())
    for record in found.records():
        allowed = benchmark.ranges.get(record.score, SHARE)
        assert (record.low, record.high) == (allowed.low, allowed.high), "what is missing could be anything"
    values = folder.values(INQUIRIES[name].scores)
    assert all(total["figures"] == [] and total["why"] for total in tally(benchmark.tallies(items), values, True))


def test_imgedit_counts_answers_above_the_cap(
    official: Callable[..., OfficialBenchmark], server: Server, tmp_path: Path
) -> None:
    benchmark = official("imgedit")
    items = some(benchmark, 3)
    inquiry = INQUIRIES["imgedit"](benchmark)
    assert inquiry.cap is not None
    Replies(server, lambda text: "Instruction compliance: 2\nSeamlessness: 5\nPreservation: 1")
    for rule, second in (("off", 5), ("enforce", 2)):
        folder, cap = made(benchmark, items, tmp_path / rule), replace(inquiry.cap, rule=rule)
        found = score_by_judge(inquiry, items, folder, make_judge(server.url), cap=cap)
        assert found.violations() == {"second": 3, "third": 0}
        assert found.values() == {item.id: {"first": 2, "second": second, "third": 1} for item in items}


def test_hard_edits_of_imgedit_get_one_score(
    official: Callable[..., OfficialBenchmark], server: Server, tmp_path: Path
) -> None:
    benchmark = official("imgedit", split="uge")
    items = some(benchmark, 2)
    Replies(server, lambda text: "Score: 3")
    found = judged("imgedit", benchmark, made(benchmark, items, tmp_path), items, server)
    assert found.values() == {item.id: {"uge": 3} for item in items} and benchmark.tallies(items) == []


@pytest.mark.parametrize(
    ("source", "target", "choice", "yn", "mc"),
    [
        ("no", "yes", "b", 1, 1),
        ("yes", "yes", "b", 0, 1),
        ("no", "no", "B. red", 0, 1),
        ("No.", "Yes.", "a", 1, 0),
        ("yes", "no", "(a) blue", 0, 0),
    ],
)
def test_five_joins_its_answers(
    source: str,
    target: str,
    choice: str,
    yn: int,
    mc: int,
    official: Callable[..., OfficialBenchmark],
    server: Server,
    tmp_path: Path,
) -> None:
    benchmark = official("five")
    items = with_questions(some(benchmark, 2), **QUESTIONS)
    Replies(server, driving(source, target, choice))
    found = judged("five", benchmark, made(benchmark, items, tmp_path), items, server).values()
    assert found == {item.id: {"yn": yn, "mc": mc, "union": max(yn, mc), "inter": min(yn, mc)} for item in items}
    assert all(row["union"] + row["inter"] == row["yn"] + row["mc"] for row in found.values())


def test_five_takes_an_item_whole_or_not_at_all(
    official: Callable[..., OfficialBenchmark], server: Server, tmp_path: Path
) -> None:
    benchmark = official("five")
    one, two, three = some(benchmark, 3)
    without_source = {name: text for name, text in QUESTIONS.items() if not name.startswith("source")}
    without_choice = {name: text for name, text in QUESTIONS.items() if not name.startswith("multiple")}
    items = [
        *with_questions([one], **QUESTIONS),
        *with_questions([two], **without_source),
        *with_questions([three], **without_choice),
    ]
    Replies(server, driving(source="perhaps"))
    folder = made(benchmark, items, tmp_path)
    found = judged("five", benchmark, folder, items, server)
    assert found.values() == {two.id: {"yn": 1, "mc": 1, "union": 1, "inter": 1}}
    (unparsed,) = {record.why for record in found.records() if record.item == one.id}
    assert unparsed == "it does not begin with yes or no"
    rows = folder.scores("inter").rows()
    assert rows.keys() == {one.id, two.id, three.id}
    assert "has no multiple_choice_question" in rows[three.id]["failed"]
    assert [record.low for record in found.records() if record.item == one.id] == [0] * 4


def test_repeats_of_five_are_joined_one_by_one(
    official: Callable[..., OfficialBenchmark], server: Server, tmp_path: Path
) -> None:
    benchmark = official("five")
    items = with_questions(some(benchmark, 1), **QUESTIONS)
    inquiry = INQUIRIES["five"](benchmark)

    def reply(handler: Any) -> None:  # the source's question is answered well in the second repeat alone
        say(driving(source=["yes", "no"][handler.body["seed"]])(words(handler.body)))(handler)

    server.replies = [reply]
    judge = make_judge(server.url, seed=0)
    found = score_by_judge(inquiry, items, made(benchmark, items, tmp_path), judge, repeats=2)
    assert found.values() == {items[0].id: {"yn": 0.5, "mc": 1, "union": 1, "inter": 0.5}}
    assert found.repeats("yn") == [0, 1]


# -- what is shown -------------------------------------------------------------------------------------------------


def shown(questions: list[Any]) -> list[list[tuple[Any, tuple[int, ...], float]]]:
    """Pictures and clips of each question: source, frames and rate."""
    return [[(p.source, p.indices, p.fps) for p in q.content if isinstance(p, Shown)] for q in questions]


@pytest.mark.parametrize(("frames", "judged_frames"), [(9, [0, 3, 6]), (13, [0, 4, 8, 12])])
def test_editverse_shows_the_frames_of_the_official_script(
    frames: int, judged_frames: list[int], official: Callable[..., OfficialBenchmark], tmp_path: Path
) -> None:
    benchmark = OFFICIAL["editverse"](
        **{k: v for k, v in {**SIZES, "frames": frames}.items() if k not in ("height", "width")},
        root=official("editverse").root,
        fps=24,
    )
    item = benchmark.items()[0]
    assert item.expect.frames == frames
    questions = INQUIRIES["editverse"](benchmark).questions(item, tmp_path / "out.mp4")
    assert [q.key for q in questions] == [f"{item.id}/frame-{n}" for n in judged_frames]
    source = benchmark.folder / "videos/1.mp4"
    assert shown(questions) == [[(source, (n,), 0), (tmp_path / "out.mp4", (n,), 0)] for n in judged_frames]


def test_clips_are_shown_at_their_rate(official: Callable[..., OfficialBenchmark], tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    for name, frames, rate in (
        ("opens2v", tuple(range(9)), 16.0),
        ("five", (2, 6), 10.0),
        ("ivebench", tuple(range(9)), 16.0),
    ):
        benchmark = official(name)
        item = some(benchmark, 1)[0]
        if name == "five":
            item = replace(item, expect=replace(item.expect, frames=8))
        for own in shown(INQUIRIES[name](benchmark).questions(item, out)):
            assert own[-1] == (out, frames, rate)
            assert len(own) == (2 if name == "ivebench" else 1)


def test_bernini_bench_shows_references_and_asks_for_the_overall_score_apart(
    official: Callable[..., OfficialBenchmark], tmp_path: Path
) -> None:
    benchmark = official("bernini_bench")
    inquiry = INQUIRIES["bernini_bench"](benchmark)
    for item in benchmark.items():
        overall, parts = inquiry.questions(item, tmp_path / "out.mp4")
        assert overall.form.names == ("OS",)
        assert parts.form.names == tuple(name for name in item.metrics if name != "OS")
        references = [benchmark.folder / path for path in item.extra.get("images", [])]
        assert [source for source, *_ in shown([parts])[0]][2:] == references
        assert ("Identity" in parts.content[-1]) == bool(references)


@pytest.mark.parametrize(
    ("kind", "told", "asked", "pictures"),
    [
        ("temporal", {"reference": "a tree"}, "temporal reasoning", ["out"]),
        ("causal", {"reference": "a tree", "reasoning_img": "x"}, "causal reasoning beside the source", ["src", "out"]),
        ("spatial", {"reference": "a tree"}, "spatial reasoning", ["out"]),
        ("spatial", {"reference_img": "answer.png"}, "spatial reasoning by an image", ["answer", "out"]),
        ("logical", {"reference_txt": "a tree", "reference_img": "answer.png"}, "logical reasoning", ["out"]),
        ("logical", {"reference_img": "answer.png"}, "logical reasoning by an image", ["answer", "out"]),
        (
            "logical",
            {"reference_img": "answer.png", "reasoning_wo_ins": True},
            "logical reasoning by an image alone",
            ["answer", "out"],
        ),
    ],
)
def test_rise_shows_the_answer_as_the_official_script_does(
    kind: str,
    told: dict[str, Any],
    asked: str,
    pictures: list[str],
    official: Callable[..., OfficialBenchmark],
    tmp_path: Path,
) -> None:
    benchmark = official("rise")
    item = next(i for i in benchmark.items() if i.category == kind and "consistency" in i.metrics)
    item = replace(item, extra={"images": item.extra["images"], **told})
    inquiry = INQUIRIES["rise"](benchmark)
    questions = inquiry.questions(item, tmp_path / "out.png")
    by_score = dict(zip([q.form.names[0] for q in questions], questions, strict=True))
    assert by_score.keys() == set(item.metrics)
    places = {
        "out": tmp_path / "out.png",
        "src": benchmark.folder / item.extra["images"][0],
        "answer": benchmark.folder / "data" / "answer.png",
    }
    assert [source for source, *_ in shown([by_score["reasoning"]])[0]] == [places[p] for p in pictures]
    expected = inquiry.rubric.text(asked, instruction=item.prompt, reference="a tree")
    assert by_score["reasoning"].content[-1] == expected and ("a tree" in expected) == ("image" not in asked)
    first = places["answer" if "answer" in pictures else "src"]
    assert [source for source, *_ in shown([by_score["consistency"]])[0]] == [first, places["out"]]


def test_rise_without_an_answer_is_refused(official: Callable[..., OfficialBenchmark], tmp_path: Path) -> None:
    benchmark = official("rise")
    item = benchmark.items()[0]
    item = replace(item, extra={"images": item.extra["images"]})
    with pytest.raises(DataError, match="nothing says what the edit has to show"):
        INQUIRIES["rise"](benchmark).questions(item, tmp_path / "out.png")


# -- rubrics and totals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INQUIRIES)
def test_a_rubric_has_to_name_what_our_own_names(
    name: str, official: Callable[..., OfficialBenchmark], tmp_path: Path
) -> None:
    inquiry = INQUIRIES[name](official(name))
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({key: f"Rate: {inquiry.own.texts[key]}" for key in inquiry.text_keys()}))
    mine = INQUIRIES[name](official(name), file)
    assert mine.rubric.version.startswith("file ") and mine.version != inquiry.version
    for key in inquiry.text_keys():
        for fact in inquiry.own.named(key):
            file.write_text(json.dumps({**mine.rubric.texts, key: "Rate."}))
            with pytest.raises(DataError, match=f"the text {re.escape(repr(key))} names no"):
                read_rubric(file, inquiry.own, inquiry.text_keys())
            assert fact in {"<instruction>", "<reference>", "<explanation>", "<question>"}


def test_an_instruction_is_taken_as_it_stands(official: Callable[..., OfficialBenchmark]) -> None:
    rubric = INQUIRIES["wise"](official("wise")).rubric
    text = rubric.text("image", instruction="say <explanation> \\1", explanation="a sign")
    assert "The text: say <explanation> \\1\n" in text and "What it means: a sign" in text


def test_the_official_answer_of_editverse_is_its_total(
    official: Callable[..., OfficialBenchmark], server: Server, tmp_path: Path
) -> None:
    benchmark = official("editverse")
    (tmp_path / "mine.json").write_text(json.dumps({"frame": "Editing prompt: <instruction>"}))
    inquiry = INQUIRIES["editverse"](benchmark, tmp_path / "mine.json")
    items = benchmark.items()[:1]
    Replies(server, lambda text: "Prompt Following: 3 - done\nEdit Quality: 2 - fair\nTotal Score: 7")
    found = score_by_judge(inquiry, items, made(benchmark, items, tmp_path / "run"), make_judge(server.url))
    assert found.values() == {items[0].id: {"editing_quality": 7}}


@pytest.mark.parametrize("name", INQUIRIES)
def test_official_figures_follow_from_all_scores_or_from_none(
    name: str, official: Callable[..., OfficialBenchmark]
) -> None:
    benchmark = official(name)
    items = benchmark.items()
    best = {score: min(benchmark.ranges.get(score, SHARE).high, 1000.0) for score in benchmark.metrics}
    values = {(item.id, score): best[score] for item in items for score in item.metrics}
    tallies = benchmark.tallies(items)
    for total in tally(tallies, values, True):
        assert total["figures"] and not total["why"]
        own = {row["figure"] for row in total["figures"]}
        for table in printed(total):
            assert own & set(table.decimals), f"{total['title']} has nothing beside {table.title}"
    first, fact = next(iter(tallies[0].facts.items()))
    total = tally(tallies, {key: value for key, value in values.items() if key[0] != first}, True)[0]
    assert {row["figure"] for row in total["figures"]}.isdisjoint((*fact.scores, "total"))
    assert tallies[0].apart or (total["figures"] == [] and total["why"])


def test_five_is_settled_from_its_questions() -> None:
    assert settled({"target": 1, "mc": 0}) == {"yn": 1, "mc": 0, "union": 1, "inter": 0}
    assert settled({"source": 0, "target": 1, "mc": 1}) == {"yn": 0, "mc": 1, "union": 1, "inter": 0}
