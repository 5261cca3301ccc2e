"""`bernini bench` with a judge, from official files to tables, on the CPU with the toy model and a local server."""

import csv
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from judges import Replies
from official_files import WRITERS
from servers import Server, chat_server, say

from benchmarks.quality.folder import digest
from benchmarks.quality.inquiries.openve import LABELS
from benchmarks.quality.inquiries.registry import INQUIRIES
from benchmarks.quality.official.registry import OFFICIAL
from benchmarks.quality.tables import write_tables
from bernini.cli import main

TOY = Path(__file__).parents[2] / "assets" / "toy"
SIZES = ["--max-edge", "64", "--min-edge", "32"]
SMALL = ["--model", str(TOY), "--steps", "1", "--text-rows", "48", "--mode", "v2v", "--omega", "txt=1,scale=1"]
SMALL += ["--device", "cpu", *SIZES]
OWN = {"openve": ["--types", "camera_edit", "--frames", "5"], "gedit": []}
MODEL = ["--judge-model", "judge-2026-01-31"]


class Rater:
    """Answers that follow from what is asked alone, and a count of that."""

    def __init__(self, server: Server, read: Callable[[int], str], fail: Callable[[int], bool] = lambda n: False):
        self.read, self.fail, self.asked, self.lock = read, fail, Counter[str](), threading.Lock()
        server.replies = [self]

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        place = digest(handler.body)
        with self.lock:
            self.asked[place] += 1
            number = len(self.asked)
        if self.fail(number):
            say("no", 400)(handler)
        else:
            say(self.read(int(place[:6], 16)), finish_reason="stop")(handler)


def lines(number: int) -> str:
    scores = 1 + number % 5, 1 + number // 5 % 5, 1 + number // 25 % 5
    return "\n".join(f"{label}: {score}" for label, score in zip(LABELS.values(), scores, strict=True))


def pair(number: int) -> str:
    return json.dumps({"reasoning": "so it is", "score": [number % 11, number // 11 % 11]})


ANSWERS = {"openve": lines, "gedit": pair}


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in OWN:
        WRITERS[name](root / name)
    return root


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of both benchmarks, not yet judged."""
    root = tmp_path_factory.mktemp("runs")
    for name in OWN:
        assert run(name, files, root / name, verb="generate") == 0
    return root


def run(name: str, files: Path, out: Path, *more: str, verb: str = "run") -> int:
    place = ["--root", str(files / name), "--accept-licence", "--out", str(out)]
    return main(["bench", verb, name, *place, *SMALL, *OWN[name], *more])


def copied(made: Path, name: str, to: Path) -> Path:
    """A run of its own over the same outputs."""
    (to / name).mkdir(parents=True)
    for file in ("manifest.json", "gen.jsonl", "videos"):
        (to / name / file).symlink_to(made / name / file)
    return to / name


def judged(out: Path, server: Server, *more: str) -> int:
    return main(["bench", "score", str(out), "--judge-url", server.url, *MODEL, *more])


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(("name", "items", "questions"), [("openve", 54, 1), ("gedit", 11, 2)])
def test_one_command_makes_judges_and_tells(
    name: str, items: int, questions: int, made: Path, files: Path, server: Server, tmp_path: Path
) -> None:
    rater, out = Rater(server, ANSWERS[name]), copied(made, name, tmp_path)
    assert run(name, files, out, "--judge-url", server.url, *MODEL, "--examples", "1") == 0
    assert sum(rater.asked.values()) == items * questions and set(rater.asked.values()) == {1}
    found, kind = summary(out), OFFICIAL[name]
    assert found["missing"] == found["failures"] == [] and found["coverage"] == 1 and found["comparable"]
    column = found["judge"]["column"]
    assert column.startswith("judge-2026-01-31 #") and found["judge"]["settings"]["versions"][0].endswith("own-1")
    for score in kind.metrics:
        rows = [json.loads(line) for line in (out / "scores" / f"{score}.jsonl").read_text().splitlines()]
        assert len(rows) == items
        (cell,) = [cell for cell in found["cells"] if cell["metric"] == score]
        assert cell["value"] == pytest.approx(sum(row["value"] for row in rows) / items)
        assert cell["low"] <= cell["value"] <= cell["high"]
    (total,) = found["totals"]
    figures = {row["figure"]: row["value"] for row in total["figures"]}
    if name == "openve":
        assert figures.keys() == {"overall (camera_edit)", "camera_edit"} and total["published"] == ""
        assert figures["camera_edit"] == pytest.approx(sum(cell["value"] for cell in found["cells"]) / 3)
    else:
        assert list(figures)[:3] == ["G_SC", "G_PQ", "G_O"] and len(figures) == 36
    for file in ("table.md", "report.html"):
        assert column in (out / file).read_text()
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    assert run(name, files, out, "--judge-url", server.url, *MODEL, "--examples", "0") == 0
    assert set(rater.asked.values()) == {1} and before == {path: path.read_bytes() for path in before}


def test_one_command_judges_what_else_is_measured_otherwise(server: Server, tmp_path: Path) -> None:
    WRITERS["editverse"](tmp_path / "data")
    Replies(server, lambda text: "Instruction: 3\nQuality: 1\nBackground: 2")
    place = ["--root", str(tmp_path / "data"), "--accept-licence", "--out", str(tmp_path / "run"), "--frames", "9"]
    command = ["bench", "run", "editverse", *place, *SMALL, "--judge-url", server.url, *MODEL, "--examples", "0"]
    assert main(command) == 0
    found = summary(tmp_path / "run")
    judged = [(c["task"], c["metric"], c["value"], c["n"]) for c in found["cells"]]
    assert judged == [(task, "editing_quality", 6, 1) for task in ("v2v", "rv2v", "ads2v")]
    assert {row["score"] for row in found["missing"]} == {"pick", "frame_text", "video_text", "clip_tc", "dino_tc"}
    (total,) = found["totals"]
    assert total["figures"] == [{"figure": "editing_quality", "value": 6, "n": 3}] and not found["comparable"]


def test_one_command_has_two_tables_of_bernini_bench(server: Server, tmp_path: Path) -> None:
    WRITERS["bernini_bench"](tmp_path / "data")
    Replies(server, lambda text: "Overall: 1\nInstruction following: 2\nConsistency: 3\nIdentity: 4\nQuality: 5")
    place = ["--root", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--frames", "5", "--examples", "0"]
    assert main(["bench", "run", "bernini_bench", *place, *SMALL, "--judge-url", server.url, *MODEL]) == 0
    found = summary(tmp_path / "run")
    assert found["comparable"] and found["failures"] == found["missing"] == [] and len(server.asked) == 46
    figures = {row["figure"]: row["value"] for total in found["totals"] for row in total["figures"]}
    assert (figures["v2v_OS"], figures["rv2v_IC"], figures["v2v_GQ (reasoning)"]) == (1, 4, 5)
    assert [total["title"] for total in found["totals"]] == ["Bernini-Bench, v2v", "Bernini-Bench, rv2v"]


def test_what_the_judge_failed_to_answer_is_asked_again_and_nothing_else(
    made: Path, server: Server, tmp_path: Path
) -> None:
    whole, broken = copied(made, "openve", tmp_path / "a"), copied(made, "openve", tmp_path / "b")
    Rater(server, lines)
    assert judged(whole, server) == 0 and main(["bench", "aggregate", str(whole), "--examples", "0"]) == 0
    rater = Rater(server, lines, fail=lambda number: number % 9 == 0)
    assert judged(broken, server) == 0
    assert main(["bench", "aggregate", str(broken), "--examples", "0"]) == 1
    found = summary(broken)
    assert len(found["failures"]) == 6 and found["coverage"] == pytest.approx(48 / 54)
    assert "status 400" in found["failures"][0]["why"]
    (total,) = found["totals"]
    assert total["figures"] == [] and "missing" in total["why"], "no total of what is left"
    rater.fail = lambda number: False
    assert judged(broken, server) == 0
    assert Counter(rater.asked.values()) == {1: 48, 2: 6}
    assert main(["bench", "aggregate", str(broken), "--examples", "0"]) == 0
    assert summary(broken) == summary(whole)
    assert (broken / "table.md").read_bytes() == (whole / "table.md").read_bytes()


def test_shards_judge_their_own_items(made: Path, server: Server, tmp_path: Path) -> None:
    whole, parts = copied(made, "gedit", tmp_path / "a"), copied(made, "gedit", tmp_path / "b")
    rater = Rater(server, pair)
    assert judged(whole, server) == 0 and judged(parts, server, "--shard", "1/2") == 0
    assert Counter(rater.asked.values()) == {1: 12, 2: 10}
    assert judged(parts, server, "--shard", "0/2") == 0
    for out in (whole, parts):
        assert main(["bench", "aggregate", str(out), "--examples", "0"]) == 0
    assert summary(whole) == summary(parts)


@pytest.mark.parametrize(
    "other",
    [["--repeats", "2"], ["--cap", "enforce"], ["--judge-model", "judge-2026-02-01"], ["--rubric", "mine.json"]],
)
def test_two_settings_never_share_a_column(
    other: list[str], made: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps(dict.fromkeys(INQUIRIES["openve"].own.texts, "Rate: <instruction>")))
    out = copied(made, "openve", tmp_path)
    Rater(server, lines)
    assert judged(out, server) == 0
    scores = {path: path.read_bytes() for path in (out / "scores").iterdir()}
    assert judged(out, server, *other) == 78
    assert "the run was judged as judge-2026-01-31 #" in capsys.readouterr().err
    assert scores == {path: path.read_bytes() for path in (out / "scores").iterdir()}


def test_the_cap_lowers_what_is_above_it_and_is_counted(
    made: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for rule in ("off", "enforce"):
        out = copied(made, "openve", tmp_path / rule)
        Rater(server, lambda number: lines(25 * (number % 5) + 11))  # compliance 2, consistency 3
        assert judged(out, server, "--cap", rule) == 0
        assert "54 answers have consistency above what caps it" in capsys.readouterr().out
        assert main(["bench", "aggregate", str(out), "--examples", "0"]) == 0
        found[rule] = {cell["metric"]: cell["value"] for cell in summary(out)["cells"]}
    assert found["off"]["consistency"] == 3 and found["enforce"]["consistency"] == 2
    assert found["off"]["instruction_compliance"] == found["enforce"]["instruction_compliance"] == 2


def test_a_rubric_of_the_users_is_what_the_judge_reads(made: Path, server: Server, tmp_path: Path) -> None:
    texts = {kind: f"{kind}: rate <instruction>" for kind in INQUIRIES["openve"].own.texts}
    (tmp_path / "mine.json").write_text(json.dumps(texts))
    out = copied(made, "openve", tmp_path)
    Rater(server, lambda number: "Because of this.\nPrompt compliance: 4\nSeamless: 3\nPhysics: 2")
    assert judged(out, server, "--rubric", str(tmp_path / "mine.json")) == 0
    system = {body["messages"][0]["content"] for _, body in server.asked}
    assert "camera_edit: rate change it, 377" in system and len(system) == 54
    assert main(["bench", "aggregate", str(out), "--examples", "0"]) == 0
    assert [cell["value"] for cell in summary(out)["cells"]] == [4, 3, 2]
    assert "rubric file " in summary(out)["judge"]["settings"]["versions"][0]


def test_frames_shown_are_those_of_the_same_moments(files: Path, tmp_path: Path) -> None:
    benchmark = OFFICIAL["openve"](
        root=str(files / "openve"), accept_licence=True, types=("camera_edit",), frames=5, max_edge=64, min_edge=32
    )
    item = benchmark.items()[0]
    (question,) = INQUIRIES["openve"](benchmark).questions(item, tmp_path / "out.mp4")
    _, before, _, after = question.content
    assert after.indices == (0, 1, 2, 3, 4) and len(before.indices) == 5
    assert before.indices[0] == 0 and before.indices[-1] < 14 and before.fps == after.fps == 16


def test_published_rows_stand_beside_ours(made: Path, server: Server, tmp_path: Path) -> None:
    from benchmarks.quality.beside import printed, totals

    figures = [{"figure": name, "value": 3.0, "n": 54} for name in ("overall (6 types)", "global_style", "camera_edit")]
    told = {"title": "OpenVE-Bench", "published": "openve 6 types", "figures": figures, "why": ""}
    own, beside = totals({"judge": {"column": "judge #1"}, "totals": [told]})
    assert [row[0] for row in own.body] == ["overall (6 types)", "global_style", "camera_edit"]
    assert beside.head[:3] == ["figure", "this run (judge #1)", "Runway"] and "CoinVE" in beside.note
    assert beside.body == [
        ["overall (6 types)", "3.00", *(f"{row['overall (6 types)']:.2f}" for row in printed(told)[0].rows.values())],
        ["global_style", "3.00", *(f"{row['global_style']:.2f}" for row in printed(told)[0].rows.values())],
    ]
    assert totals({"judge": None, "totals": [{**told, "published": ""}]})[1:] == []


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--judge-url", "http://localhost:1/v1"], 78, "half a judge is named"),
        (["--judge-url", "http://localhost:1/v1", "--judge-model", "gpt-4o"], 78, "is not pinned"),
        (["--judge-url", "http://localhost:1/v1", *MODEL, "--judge-key-env", "NO_KEY"], 78, "NO_KEY"),
        (["--judge-local", "nowhere", *MODEL], 78, "two judges are named"),
        (["--judge-local", "nowhere"], 78, "there is no judge in nowhere"),
        (["--repeats", "3"], 78, "no judge is named"),
        (["--judge-url", "http://localhost:1/v1", *MODEL, "--rubric", "none.json"], 78, "there is no rubric none.json"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_told(
    words: list[str], code: int, told: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(made, "openve", tmp_path)
    assert main(["bench", "score", str(out), *words]) == code
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (out / "judge").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "no JSON"),
        ('{"semantic": "x"}', "not an object of texts"),
        ('{"semantic": "x", "quality": "y"}', "names no"),
    ],
)
def test_a_rubric_that_is_none_is_refused(
    content: str, told: str, made: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text(content)
    out = copied(made, "gedit", tmp_path)
    assert judged(out, server, "--rubric", str(tmp_path / "mine.json")) == 77
    assert told in capsys.readouterr().err and server.asked == []


def test_a_cap_where_there_is_none_and_a_benchmark_without_questions_are_refused(
    made: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(made, "gedit", tmp_path)
    assert judged(out, server, "--cap", "off") == 78
    assert "caps no score" in capsys.readouterr().err
    toy = ["--tasks", "t2i", "--per-task", "1", "--size", "32", "--steps", "1", "--device", "cpu"]
    assert main(["bench", "generate", "toy", "--model", str(TOY), "--out", str(tmp_path / "toy"), *toy]) == 0
    assert judged(tmp_path / "toy", server) == 78
    assert "no judge can be asked about toy" in capsys.readouterr().err and server.asked == []


def test_the_table_of_figures_holds_official_ones(made: Path, server: Server, tmp_path: Path) -> None:
    out = copied(made, "gedit", tmp_path)
    Rater(server, pair)
    assert judged(out, server) == 0 and main(["bench", "aggregate", str(out), "--examples", "0"]) == 0
    rows = {(row["row"], row["metric"]): row for row in csv.DictReader((out / "table.csv").open())}
    found = summary(out)
    (total,) = found["totals"]
    assert float(rows["GEdit-Bench, en", "G_O"]["value"]) == total["figures"][2]["value"]
    of_six = {"title": "OpenVE-Bench", "published": "openve 6 types", "why": ""}
    of_six["figures"] = [{"figure": "global_style", "value": 3.0, "n": 54}]
    write_tables(tmp_path, {**found, "totals": [of_six]})
    rows = {(row["row"], row["metric"]): row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert rows["OpenVE-Bench", "global_style"]["value"] == "3.0"
    assert rows["OpenVE-Bench, six types, Runway", "global_style"]["value"] == "3.72"
    assert not any(metric == "local_add" for _, metric in rows), "only what this run has, too"
    assert "| global_style | 3.00 | 3.72 | 1.49 |" in (tmp_path / "table.md").read_text()
