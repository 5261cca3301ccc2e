"""Asking a judge: what a server may do, what is kept, what is asked twice (nothing), and what is told of it all."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import judges
import pytest
import torch
from judges import MODEL, Scorer, make_judge, make_question
from servers import Reply, Server, chat_server, say, send

from benchmarks.quality.folder import Journal, Shard
from benchmarks.quality.judging.answers import Answers
from benchmarks.quality.judging.asking import ask
from benchmarks.quality.judging.endpoint import EndpointConfig, EndpointJudge
from benchmarks.quality.judging.forms import Integers
from benchmarks.quality.judging.judged import Cap, Judged
from benchmarks.quality.judging.question import Question, address
from benchmarks.quality.judging.showing import Shown
from bernini.chat import Completion, UnwelcomeError
from bernini.errors import ConfigError, DataError

SPAWNED = multiprocessing.get_context("forkserver")
SPAWNED.set_forkserver_preload(["benchmarks.quality.judging.asking", "benchmarks.quality.judging.endpoint"])


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


def ask_one(server: Server, folder: Path, *replies: Reply, **more: Any) -> Judged:
    server.replies = list(replies)
    options = {name: more.pop(name) for name in ("repeats", "cap", "offline") if name in more}
    return ask(make_judge(server.url, **more), [make_question(1)], Answers(folder / "a.jsonl"), **options)


# -- what a server may do ------------------------------------------------------------------------------------------


def late(handler: Any) -> None:
    time.sleep(1.0)


PASSING: dict[str, Reply] = {
    "429": send("slow down", 429, **{"Retry-After": "0"}),
    "500": send("oops", 500),
    "408": send("", 408),
    "stalls": late,
    "half JSON": send('{"choices": [{"message": {"content": "4"'),
    "huge": say("4" * 200_000),
    "hangs up": lambda handler: None,
}
UNREADABLE = {
    "out of range": ("6", "6 is not from 1 to 5"),
    "prose with digits": ("I see 2 dogs, so 4", "not a bare whole number"),
    "a fraction": ("3.5", "not a bare whole number"),
    "empty": ("", "not a bare whole number"),
    "half JSON": ('{"quality": 4', "not a bare whole number"),
}
FINAL = {"400": send("bad image", 400), "redirect": send("", 302, Location="http://127.0.0.1:1/"), "413": send("", 413)}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_again_and_leaves_no_trace(name: str, server: Server, tmp_path: Path) -> None:
    judged = ask_one(
        server, tmp_path, PASSING[name], PASSING[name], say("4"), timeout=0.5 if name == "stalls" else 20.0
    )
    assert judged.values() == {"item1": {"quality": 4}} and len(server.asked) == 3
    assert len(Answers(tmp_path / "a.jsonl")) == 1


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_is_a_failure_that_the_next_run_asks_about(
    name: str, server: Server, tmp_path: Path
) -> None:
    judged = ask_one(server, tmp_path, PASSING[name], retries=1, timeout=0.5 if name == "stalls" else 20.0)
    (record,) = judged.records()
    assert (record.status, record.value, record.low, record.high) == ("failed", None, 1, 5)
    assert "no answer that can be used in 2 attempts" in record.why and judged.coverage() == (0, 1)
    assert len(server.asked) == 2
    assert ask_one(server, tmp_path, say("2")).values() == {"item1": {"quality": 2}}


@pytest.mark.parametrize("name", FINAL)
def test_a_refusal_is_final_for_this_question(name: str, server: Server, tmp_path: Path) -> None:
    (record,) = ask_one(server, tmp_path, FINAL[name]).records()
    assert record.status == "failed" and "refused with status" in record.why and len(server.asked) == 1


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_reminded_of_the_form_once(name: str, server: Server, tmp_path: Path) -> None:
    text, why = UNREADABLE[name]
    judged = ask_one(server, tmp_path, say(text), say("5"))
    assert judged.values() == {"item1": {"quality": 5}} and judged.raw[0].texts == (text, "5")
    first, second = (body["messages"] for _, body in server.asked)
    assert second[: len(first)] == first
    assert second[len(first) :] == [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Please answer with one whole number from 1 to 5 and nothing else."},
    ]

    (record,) = ask_one(server, tmp_path / "again", say(text)).records()
    assert (record.status, record.value, record.why) == ("unparsed", None, why)
    asked = len(server.asked)
    (same,) = ask_one(server, tmp_path / "again", say("5")).records()
    assert same == record and len(server.asked) == asked  # it had its chance


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_an_answer_that_was_cut_is_not_read(finish: str, server: Server, tmp_path: Path) -> None:
    judged = ask_one(server, tmp_path, say("4", finish_reason=finish))
    assert judged.records()[0].why == f"the answer was cut ({finish})" and len(server.asked) == 2


def test_an_answer_that_changes_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    for text in ("2", "3", "4"):
        assert ask_one(server, tmp_path, say(text)).values() == {"item1": {"quality": 2}}
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_judge_that_answers_nobody_stops_the_run_and_keeps_what_it_said(
    status: int, server: Server, tmp_path: Path
) -> None:
    server.replies = [say("4"), send("go away", status)]
    questions = [make_question(n) for n in range(60)]
    with pytest.raises(UnwelcomeError, match=f"the judge refused with status {status}") as caught:
        ask(make_judge(server.url, workers=2), questions, Answers(tmp_path / "a.jsonl"))
    assert caught.value.why == "go away" and len(server.asked) < 30
    assert len(Answers(tmp_path / "a.jsonl")) == 1


def test_a_judge_that_is_down_is_given_up(server: Server, tmp_path: Path) -> None:
    server.replies = [send("", 500)]
    questions = [make_question(n) for n in range(40)]
    judge = make_judge(server.url, workers=1, retries=0)
    judged = ask(judge, questions, Answers(tmp_path / "a.jsonl"), give_up=5)
    assert len(server.asked) == 5 and Counter(r.status for r in judged.records()) == {"failed": 40}
    assert "not asked, after 5 times in a row" in judged.records()[-1].why


def test_a_question_without_its_file_fails_alone(server: Server, tmp_path: Path) -> None:
    lost = make_question(1, content=(Shown(tmp_path / "lost.mp4"), "number 1"))
    short = make_question(2, content=(Shown(torch.zeros(3, 4, 8, 8, dtype=torch.uint8), (0, 4)), "number 2"))
    Scorer(server)
    judged = ask(make_judge(server.url), [lost, short, make_question(3)], Answers(tmp_path / "a.jsonl"))
    assert [record.status for record in judged.records()] == ["failed", "failed", "scored"]
    assert "does not exist" in judged.records()[0].why and "frame 4" in judged.records()[1].why
    assert judged.values() == {"item3": {"quality": 4}} and len(server.asked) == 1


# -- what is kept --------------------------------------------------------------------------------------------------


def test_answers_are_kept_as_they_came_with_their_facts(server: Server, tmp_path: Path) -> None:
    reply = {
        "model": f"{MODEL}-eu",
        "system_fingerprint": "fp_1",
        "usage": {"prompt_tokens": 9, "completion_tokens": 1},
        "choices": [{"message": {"content": " 4\n"}, "finish_reason": "stop"}],
    }
    judged = ask_one(server, tmp_path, send(json.dumps(reply)))
    (row,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert {name: row[name] for name in ("question", "repeat", "turn", "judge", "text", "finish")} == {
        "question": "q1",
        "repeat": 0,
        "turn": 0,
        "judge": MODEL,
        "text": " 4\n",
        "finish": "stop",
    }
    assert row["usage"] == reply["usage"] and row["seconds"] > 0 and row["at"].endswith("+00:00")
    assert judged.served() == {f"{MODEL}-eu fp_1": 1}


def test_several_models_behind_one_name_are_told_of(server: Server, tmp_path: Path) -> None:
    def named(model: str) -> Reply:
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "details": {"cached": 2}}
        return send(json.dumps({"model": model, "usage": usage, "choices": [{"message": {"content": "4"}}]}))

    server.replies = [named("one"), named("other")]
    judge, questions = make_judge(server.url, workers=1), [make_question(n) for n in range(3)]
    with pytest.warns(UserWarning, match="as several models, whose scores stand together: one, other"):
        judged = ask(judge, questions, Answers(tmp_path / "a.jsonl"))
    assert judged.served() == {"one": 1, "other": 2}
    assert judged.usage() == {"prompt_tokens": 27, "completion_tokens": 3}


def test_reading_again_takes_no_call(server: Server, tmp_path: Path) -> None:
    judged = ask_one(server, tmp_path, say("9"))
    assert judged.records()[0].status == "unparsed" and len(server.asked) == 2
    wider = [make_question(1, form=Integers(("quality",), 1, 10)), make_question(2)]
    again = ask(make_judge(server.url), wider, Answers(tmp_path / "a.jsonl"), offline=True)
    assert [record.status for record in again.records()] == ["scored", "failed"]
    assert again.values() == {"item1": {"quality": 9}} and len(server.asked) == 2


def test_whatever_changes_what_is_asked_is_asked_anew(server: Server) -> None:
    clip = torch.arange(4, dtype=torch.uint8).view(1, 4, 1, 1).expand(3, 4, 8, 8).contiguous()
    question = make_question(1, content=("look", Shown(clip, (0, 2)), "number 1"))
    shown = question.content[1]
    assert isinstance(shown, Shown)
    judge = make_judge(server.url)

    def place(question: Question, judge: EndpointJudge = judge, repeat: int = 0) -> str:
        return address(judge, question.prompt(), question.version, repeat)

    def showing(other: Shown) -> Question:
        return replace(question, content=("look", other, "number 1"))

    config = EndpointConfig(server.url, MODEL)
    others = [
        place(question, repeat=1),
        place(replace(question, version="2")),
        place(replace(question, system="You rate!")),
        place(replace(question, content=(shown, "look", "number 1"))),
        place(replace(question, content=("look", shown, "number 2"))),
        place(showing(replace(shown, indices=(0, 3)))),
        place(showing(replace(shown, indices=(2, 0)))),
        place(showing(replace(shown, fps=2.0))),
        place(showing(replace(shown, encoding=replace(shown.encoding, long_edge=4)))),
        place(showing(replace(shown, encoding=replace(shown.encoding, quality=90)))),
        place(showing(replace(shown, source=clip + 1))),
        place(question, EndpointJudge(replace(config, model="other-2026-01-31"))),
        place(question, EndpointJudge(replace(config, revision="a"))),
        place(question, EndpointJudge(replace(config, temperature=0.5))),
        place(question, EndpointJudge(replace(config, seed=None))),
        place(question, EndpointJudge(replace(config, max_tokens=2))),
        place(question, EndpointJudge(replace(config, effort="low"))),
    ]
    assert len({place(question), *others}) == len(others) + 1
    waiting = EndpointJudge(replace(config, url="http://elsewhere/v1", timeout=1.0, retries=0, workers=9))
    same = [place(question, waiting), place(replace(question, key="other", item="x"), judge)]
    same += [place(replace(question, form=Integers(("x",), 0, 9))), place(showing(replace(shown, source=clip + 0)))]
    assert {place(question)} == set(same)


def test_one_prompt_is_asked_once_however_many_ask_it_together(server: Server, tmp_path: Path) -> None:
    scorer = Scorer(server, delay=0.05)
    questions = [make_question(1, key=f"q{n}", item=f"item{n}") for n in range(12)]
    judged = ask(make_judge(server.url, workers=6), questions, Answers(tmp_path / "a.jsonl"))
    assert scorer.times == {1: 1} and judged.coverage() == (12, 12)


def test_processes_share_one_file_and_ask_nothing_twice(server: Server, tmp_path: Path) -> None:
    scorer = Scorer(server, delay=0.01)
    processes = [SPAWNED.Process(target=judges.run, args=(server.url, str(tmp_path), 30)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert scorer.times == Counter(range(30))
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 30


def test_a_run_that_is_killed_goes_on_and_asks_for_nothing_that_it_has(
    server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What has landed is not asked for again; only what was on the way when the process died is."""
    kills, count, workers, file = request.config.getoption("--kills"), 60, 4, tmp_path / "a.jsonl"
    whole = Scorer(server)
    expected = judges.run(server.url, str(tmp_path / "whole"), count)
    assert whole.times == Counter(range(count))

    scorer, random, landed = Scorer(server, delay=0.01), Random(0), set[int]()
    for _ in range(kills):
        before = len(scorer.asked)
        process = SPAWNED.Process(target=judges.run, args=(server.url, str(tmp_path), count, 1, workers))
        process.start()
        wanted = before + random.randint(1, max(1, (count - len(landed)) // 3))
        until = time.monotonic() + 60
        while len(scorer.asked) < wanted and process.is_alive():
            assert time.monotonic() < until
            time.sleep(random.random() / 200)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(0.1)  # what was on the way arrives
        assert landed.isdisjoint(scorer.asked[before:])
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        landed = {int(json.loads(line)["question"][1:]) for line in lines if line}
    before = len(scorer.asked)
    judged = judges.run(server.url, str(tmp_path), count)
    assert landed.isdisjoint(scorer.asked[before:])
    assert judged.records() == expected.records() and judged.coverage() == (count, count)
    assert set(scorer.times) == set(range(count))
    assert sum(scorer.times.values()) - count <= kills * workers
    asked = len(scorer.asked)
    judges.run(server.url, str(tmp_path), count)
    assert len(scorer.asked) == asked and len(Answers(file)) == count


@pytest.mark.parametrize("torn", [b'{"address": "', b'{"address": "ab"}', b"\xff\xfe", b"{}\n[]\nnull\n4"])
def test_what_a_crash_left_of_a_line_counts_as_not_there(torn: bytes, tmp_path: Path) -> None:
    file, completion = tmp_path / "a.jsonl", Completion("4")
    one, other = "1" * 64, "2" * 64
    Answers(file).add(one, completion, {})
    with file.open("ab") as end:
        end.write(torn)
    for _ in range(2):
        again = Answers(file)
        with again.asking(one) as known:
            assert known == completion
        with again.asking(other) as known:
            if known is None:
                again.add(other, Completion("5"), {})
    assert len(Answers(file)) == 2


def test_another_process_is_waited_for_and_not_asked_twice(tmp_path: Path) -> None:
    mine, other, place = Answers(tmp_path / "a.jsonl"), Answers(tmp_path / "a.jsonl"), "3" * 64
    with mine.asking(place) as known:
        assert known is None
        mine.add(place, Completion("1"), {})
    with other.asking(place) as known:
        assert known == Completion("1")


# -- repeats, caps, coverage ---------------------------------------------------------------------------------------


def test_repeats_are_asked_apart_and_give_mean_and_spread(server: Server, tmp_path: Path) -> None:
    replies = [say(text) for text in ("1", "2", "5", "4", "4", "4")]
    server.replies = list(replies)
    questions = [make_question(1), make_question(2)]
    judged = ask(make_judge(server.url, workers=1, seed=7), questions, Answers(tmp_path / "a.jsonl"), repeats=3)
    first, second = judged.records()
    assert (first.value, first.repeats, first.spread) == (8 / 3, (1, 2, 5), pytest.approx((13 / 3) ** 0.5))
    assert (second.value, second.spread) == (4, 0)
    assert judged.repeats("quality") == [2.5, 3, 4.5]
    assert [body["seed"] for _, body in server.asked] == [7, 8, 9] * 2
    fewer = ask(make_judge(server.url, seed=7), questions, Answers(tmp_path / "a.jsonl"), repeats=2)
    assert fewer.records()[0].value == 1.5 and len(server.asked) == 6  # the first two of the three


def test_a_score_that_lacks_a_repeat_or_a_question_is_none(server: Server, tmp_path: Path) -> None:
    server.replies = [say("2"), say("x"), say("x"), say("4"), say("5")]
    parts = [make_question(1, key="q1/a"), make_question(2, key="q1/b", item="item1"), make_question(3)]
    judged = ask(make_judge(server.url, workers=1), parts, Answers(tmp_path / "a.jsonl"))
    record, other = judged.records()
    assert (record.status, record.value, record.low, record.high) == ("unparsed", None, 1.5, 3.5)
    assert (other.value, other.item) == (4, "item3")
    assert judged.bounds("quality") == (4, 2.75, 3.75, 1, 2) and judged.coverage() == (1, 2)
    judged.require(0.5)
    with pytest.raises(DataError, match="scored 1 of 2") as caught:
        judged.require()
    assert "item1 quality: unparsed, not a bare whole number" in caught.value.why


CAPPED = Integers(("instruction", "detail", "quality"), 1, 5)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("off", {"instruction": 2, "detail": 4, "quality": 2}), ("enforce", dict.fromkeys(CAPPED.names, 2))],
)
def test_the_cap_rule_is_an_option_and_violations_are_counted_either_way(
    rule: Any, expected: dict[str, float], server: Server, tmp_path: Path
) -> None:
    server.replies = [say("2, 4, 2"), say("3, 4, 5"), say("5, 5, 1")]
    cap = Cap("instruction", ("detail", "quality"), rule)
    questions = [make_question(n, form=CAPPED) for n in range(3)]
    judged = ask(make_judge(server.url, workers=1), questions, Answers(tmp_path / "a.jsonl"), cap=cap)
    assert judged.values()["item0"] == expected and judged.values()["item2"]["quality"] == 1
    assert judged.violations() == {"detail": 2, "quality": 1}
    assert judged.raw[0].scores["detail"] == 4


@pytest.mark.parametrize("cap", [Cap("instructoin", ("detail",)), Cap("instruction", ("detail", "qualty"), "enforce")])
def test_a_cap_of_nothing_is_refused(cap: Cap, server: Server, tmp_path: Path) -> None:
    server.replies = [say("2, 4, 2")]
    with pytest.raises(ConfigError, match="caps nothing"):
        ask(make_judge(server.url), [make_question(1, form=CAPPED)], Answers(tmp_path / "a.jsonl"), cap=cap)


@pytest.mark.parametrize(("on", "rule"), [((), "off"), (("a",), "off"), (("b",), "on")])
def test_a_cap_without_a_meaning_is_refused(on: tuple[str, ...], rule: Any) -> None:
    with pytest.raises(ConfigError, match="cap rule"):
        Cap("a", on, rule)


def test_two_settings_never_share_a_column(server: Server, tmp_path: Path) -> None:
    Scorer(server)

    def column(cap: Cap | None = None, repeats: int = 1, version: str = "1", **more: Any) -> str:
        form = Integers(("a", "b"), 1, 5)
        server.replies = [say("1 2")]
        question = make_question(1, form=form, version=version)
        judge = make_judge(server.url, **more)
        return ask(judge, [question], Answers(tmp_path / "a.jsonl"), cap=cap, repeats=repeats).column

    off, enforced = Cap("a", ("b",)), Cap("a", ("b",), "enforce")
    columns = [column(), column(off), column(enforced), column(repeats=2), column(version="2"), column(temperature=1.0)]
    columns += [column(model="x-2026-01-31"), column(revision="r"), column(effort="low")]
    assert len(set(columns)) == len(columns) and all("2026-01-31" in name for name in columns)
    assert column() == columns[0] == column(timeout=9.0, workers=1)


def test_rows_are_those_of_a_run_folder(server: Server, tmp_path: Path) -> None:
    server.replies = [say("2"), say("3"), say("x")]
    judge, answers = make_judge(server.url, workers=1), Answers(tmp_path / "a.jsonl")
    judged = ask(judge, [make_question(1), make_question(2)], answers, repeats=2)
    journal = Journal(tmp_path / "scores" / "quality.jsonl", Shard())
    journal.append(judged.rows("quality"))
    assert journal.rows() == {
        "item1": {"id": "item1", "status": "scored", "value": 2.5, "repeats": [2, 3]},
        "item2": {
            "id": "item2",
            "status": "unparsed",
            "failed": "unparsed: not a bare whole number",
            "low": 1,
            "high": 5,
        },
    }


def test_progress_counts_questions(server: Server, tmp_path: Path) -> None:
    Scorer(server)
    told: list[int] = []
    questions = [make_question(n) for n in range(5)]
    ask(make_judge(server.url), questions, Answers(tmp_path / "a.jsonl"), repeats=2, progress=told.append)
    assert told == [1, 2, 3, 4, 5]
    assert ask(make_judge(server.url), [], Answers(tmp_path / "a.jsonl")).coverage() == (0, 0)


@pytest.mark.parametrize(
    ("questions", "repeats", "message"),
    [([make_question(1), make_question(1)], 1, "2 questions have the key 'q1'"), ([make_question(1)], 0, "0 times")],
)
def test_what_cannot_be_asked_is_named(
    questions: list[Question], repeats: int, message: str, server: Server, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(make_judge(server.url), questions, Answers(tmp_path / "a.jsonl"), repeats=repeats)
